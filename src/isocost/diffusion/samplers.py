"""A sampler is a table of numbers: one line a network evaluation, and the same update for every sampler.

    x0 = the network's (unclipped) prediction of the clean latent at the line's timestep
    x' = a x + b x0 + c x0_previous + s noise

All coefficients are known before the first evaluation and are computed in float64. To add a sampler, write a function
(spec, num_steps, schedule) -> SamplerTable that cites its equations, and enter it in `SAMPLERS`.

Below, alpha and sigma are those of the line's state, `alpha_to` and `sigma_to` those of the state it leads to, which is the
state of the next line: always the true next entry of the grid, also where steps do not divide the schedule (diffusers'
DDIM takes a fixed stride instead; its issues 9261, 11347 and 12633).

Shape letters: S lines (network evaluations), T training timesteps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from isocost.diffusion.noise import Schedule
from isocost.errors import RequestError
from isocost.study import SamplerSpec

LEADING_OFFSET = 1
"""Stable Diffusion's `steps_offset`."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """The numbers of one sampler at one number of steps. Read-only; equal only to itself, so rows can share and hash it.

    Attributes:
        timesteps: int64 [S], falling; what the network is told.
        alpha, sigma: float64 [S], the state at each line is `alpha x0 + sigma noise`.
        a, b, c, s: float64 [S], `x' = a x + b x0 + c x0_previous + s noise`; c is 0 on the first line.
    """

    timesteps: NDArray[np.int64]
    alpha: Floats
    sigma: Floats
    a: Floats
    b: Floats
    c: Floats
    s: Floats

    def __post_init__(self) -> None:
        for field in fields(self):
            values = getattr(self, field.name)
            assert values.shape == self.timesteps.shape, f"{field.name} has shape {values.shape}, not {self.timesteps.shape}"
            assert np.all(np.isfinite(values)), f"{field.name} is not finite"
            values.setflags(write=False)

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)


@lru_cache(maxsize=4096)
def build_table(sampler: SamplerSpec, num_steps: int, schedule: Schedule) -> SamplerTable:
    """The table of `sampler` at `num_steps` on `schedule`; the same arguments give the same object.

    With "leading" spacing, few steps start far below the last timestep (DDIM: t = 1 at one step, 751 at four) although the
    start is pure noise; "trailing" starts at T - 1 always (Lin et al., arXiv 2305.08891, table 2).

    Raises:
        RequestError: the sampler is unknown, eta is given to a sampler without one, or the grid cannot hold so many steps.
    """
    if sampler.name not in SAMPLERS:
        raise RequestError(f"sampler {sampler.name!r}: choose one of {', '.join(SAMPLERS)}")
    if num_steps < 1:
        raise RequestError(f"num_steps = {num_steps}: a sampler takes at least one step")
    if sampler.eta and sampler.name != "ddim":
        raise RequestError(f"sampler {sampler.name} has no eta; leave it out or choose ddim")
    return SAMPLERS[sampler.name](sampler, num_steps, schedule)


def ddim(spec: SamplerSpec, num_steps: int, schedule: Schedule) -> SamplerTable:
    """Song et al., arXiv 2010.02502, eqs. 12 and 16, the noise prediction written through x0.

    Ends at the schedule's timestep 0 as Stable Diffusion does (`set_alpha_to_one: false`). So with "linspace" spacing, whose
    grid ends at timestep 0 itself, the last of several evaluations changes nothing.
    """
    grid = _grid(spec, num_steps, schedule)
    alpha, sigma = schedule.alpha[grid], schedule.sigma[grid]
    alpha_to, sigma_to = np.append(alpha[1:], schedule.alpha[0]), np.append(sigma[1:], schedule.sigma[0])
    s = spec.eta * sigma_to / sigma * np.sqrt(1 - (alpha / alpha_to) ** 2)
    a = np.sqrt(sigma_to**2 - s**2) / sigma
    return SamplerTable(grid, alpha, sigma, a=a, b=alpha_to - a * alpha, c=np.zeros_like(a), s=s)


def ddpm(spec: SamplerSpec, num_steps: int, schedule: Schedule) -> SamplerTable:
    """Ancestral sampling, Ho et al., arXiv 2006.11239, eqs. 6 and 7, with the posterior's variance. Ends clean."""
    grid = _grid(spec, num_steps, schedule)
    alpha, sigma = schedule.alpha[grid], schedule.sigma[grid]
    alpha_to, sigma_to = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
    beta = 1 - (alpha / alpha_to) ** 2
    a = alpha / alpha_to * (sigma_to / sigma) ** 2
    s = sigma_to / sigma * np.sqrt(beta)
    return SamplerTable(grid, alpha, sigma, a=a, b=alpha_to * beta / sigma**2, c=np.zeros_like(a), s=s)


def dpmsolver_2m(spec: SamplerSpec, num_steps: int, schedule: Schedule) -> SamplerTable:
    """DPM-Solver++(2M), Lu et al., arXiv 2211.01095, algorithm 2 and eq. 8: midpoint, first order on the first and last line.

    Ends clean, where the half log-SNR is infinite: `alpha_to (1 - exp(-h))` is written `alpha_to - alpha sigma_to / sigma`.
    """
    grid = _grid(spec, num_steps, schedule, clean_end_on_grid=True)
    alpha, sigma = schedule.alpha[grid], schedule.sigma[grid]
    alpha_to, sigma_to = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
    step = np.diff(np.log(alpha / sigma))
    extrapolation = np.zeros(num_steps)
    extrapolation[1:-1] = step[1:] / (2 * step[:-1])
    a = sigma_to / sigma
    b = (alpha_to - a * alpha) * (1 + extrapolation)
    c = -(alpha_to - a * alpha) * extrapolation
    return SamplerTable(grid, alpha, sigma, a=a, b=b, c=c, s=np.zeros_like(a))


SAMPLERS: dict[str, Callable[[SamplerSpec, int, Schedule], SamplerTable]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "dpmsolver++2m": dpmsolver_2m,
}


def _grid(spec: SamplerSpec, num_steps: int, schedule: Schedule, clean_end_on_grid: bool = False) -> NDArray[np.int64]:
    """Falling timesteps int64 [S] (arXiv 2305.08891, table 2). One "linspace" step is T - 1, where pure noise belongs.

    With `clean_end_on_grid`, "leading" and "linspace" are laid out for one more step, whose place the clean end takes.

    Raises:
        RequestError: the steps do not fit the schedule.
    """
    num_timesteps = schedule.num_timesteps
    laid: NDArray[np.floating]
    num_laid = num_steps + clean_end_on_grid
    if spec.spacing == "trailing":
        # For some steps float rounding lets `arange` end with a surplus entry, which the slice below drops.
        laid = np.arange(num_timesteps, 0, -num_timesteps / num_steps).round() - 1
    elif spec.spacing == "leading":
        laid = np.arange(num_laid)[::-1] * float(num_timesteps // num_laid) + LEADING_OFFSET
    else:
        laid = np.linspace(0, num_timesteps - 1, num_laid).round()[::-1] if num_laid > 1 else np.array([num_timesteps - 1.0])
    grid = laid[:num_steps].astype(np.int64)
    if grid[0] >= num_timesteps or np.any(np.diff(grid) >= 0):
        raise RequestError(f"{num_steps} steps of {spec.label} do not fit {num_timesteps} timesteps; take fewer, or trailing")
    return grid
