"""Where a solver's network evaluations lie in time: spacings of a noise schedule, in float64.

Shape letters: S entries of a grid, T training timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from isocost.config.sampling import SolverSpec
from isocost.diffusion.noise_schedule import Floats, NoiseSchedule, shifted
from isocost.errors import ConfigError

KARRAS_RHO = 7.0


@dataclass(frozen=True, eq=False)
class Timesteps:
    """States from noise to clean.

    Attributes:
        timesteps: float64 [S], what the network is told.
        alpha, sigma: float64 [S], the state of each entry.
        alpha_end, sigma_end: the state that the last step leads to; the clean one unless said otherwise.
    """

    timesteps: Floats
    alpha: Floats
    sigma: Floats
    alpha_end: float = 1.0
    sigma_end: float = 0.0

    @classmethod
    def at(cls, schedule: NoiseSchedule, indices: NDArray[np.int64]) -> Timesteps:
        """The grid that stands at these indices of the schedule."""
        return cls(schedule.timesteps[indices], schedule.alpha[indices], schedule.sigma[indices])

    def with_final(self, alpha: float, sigma: float) -> Timesteps:
        """The same grid with another end."""
        return replace(self, alpha_end=float(alpha), sigma_end=float(sigma))

    @property
    def alpha_next(self) -> Floats:
        """float64 [S], alpha of the state that each step leads to."""
        return np.append(self.alpha[1:], self.alpha_end)

    @property
    def sigma_next(self) -> Floats:
        """float64 [S], sigma of the state that each step leads to."""
        return np.append(self.sigma[1:], self.sigma_end)

    @property
    def h(self) -> Floats:
        """Steps of half the log-SNR, float64 [S]; infinite to a clean end and from zero terminal SNR."""
        with np.errstate(divide="ignore"):
            half_log_snr = np.log(np.append(self.alpha, self.alpha_end)) - np.log(np.append(self.sigma, self.sigma_end))
        return np.diff(half_log_snr)


def make_timesteps(
    spec: SolverSpec, num_steps: int, schedule: NoiseSchedule, clean_end_on_grid: bool = False, fractional: bool = False
) -> Timesteps:
    """The states of `num_steps` steps (leading, trailing, linspace: arXiv 2305.08891, table 2).

    "karras" is even in `(sigma / alpha)^(1/7)` between the schedule's ends (arXiv 2206.00364, eq. 5). On a flow, "linspace"
    is diffusers' FlowMatchEulerDiscreteScheduler (even between the schedule's ends, then shifted once more, as Stable
    Diffusion 3 runs) and "trailing" starts at 1 and steps by 1 / num_steps before the shift (as Flux runs).

    Args:
        clean_end_on_grid: "leading" and "linspace" are laid out for one more step, whose place the clean end takes
            (diffusers' DPM-Solver and UniPC).
        fractional: entries need not be whole timesteps (diffusers' Euler and Heun).

    Raises:
        ConfigError: the steps do not fit the schedule, or the schedule does not have the spacing.
    """
    if schedule.is_flow:
        return _flow_timesteps(spec, num_steps, schedule)
    if spec.timestep_spacing == "karras":
        return _karras_timesteps(spec, num_steps, schedule, fractional)
    num_timesteps = schedule.num_timesteps
    num_laid = num_steps + clean_end_on_grid
    laid: Floats
    if spec.timestep_spacing == "trailing":
        # For some steps float rounding lets `arange` end with a surplus entry, which the slice below drops.
        laid = np.arange(float(num_timesteps), 0, -num_timesteps / num_steps).round() - 1
    elif spec.timestep_spacing == "leading":
        laid = np.arange(num_laid, dtype=np.float64)[::-1] * (num_timesteps // num_laid) + spec.steps_offset
    elif num_laid == 1:
        laid = np.array([num_timesteps - 1.0])  # where pure noise belongs
    else:
        laid = np.linspace(0.0, num_timesteps - 1.0, num_laid, dtype=np.float64)[::-1]
        laid = laid if fractional else laid.round()
    laid = laid[:num_steps]
    if laid[0] > num_timesteps - 1 or np.any(np.diff(laid) >= 0):
        raise ConfigError(f"{num_steps} steps of {spec.label} do not fit {num_timesteps} timesteps; take fewer, or trailing")
    if fractional and np.any(laid % 1):
        level = np.interp(laid, np.arange(num_timesteps), _sigmas(schedule))
        return _interpolate_sigmas(level, laid)
    return Timesteps.at(schedule, laid.astype(np.int64))


def _karras_timesteps(spec: SolverSpec, num_steps: int, schedule: NoiseSchedule, fractional: bool) -> Timesteps:
    if schedule.has_zero_terminal_snr:
        raise ConfigError(f"{spec.label}: karras spacing needs a start of finite noise level; take trailing")
    levels = _sigmas(schedule)
    high, low = levels[-1] ** (1 / KARRAS_RHO), levels[0] ** (1 / KARRAS_RHO)
    level = (high + np.linspace(0, 1, num_steps) * (low - high)) ** KARRAS_RHO
    timesteps = np.interp(np.log(level), np.log(levels), schedule.timesteps)
    return _interpolate_sigmas(level, timesteps if fractional else timesteps.round())


def _flow_timesteps(spec: SolverSpec, num_steps: int, schedule: NoiseSchedule) -> Timesteps:
    shift = schedule.sigma[0] * (schedule.num_timesteps - 1) / (1 - schedule.sigma[0])
    if spec.timestep_spacing == "linspace":
        sigma = shifted(np.linspace(schedule.sigma[-1], schedule.sigma[0], num_steps), shift)
    elif spec.timestep_spacing == "trailing":
        sigma = shifted(1 - np.arange(num_steps) / num_steps, shift)
    else:
        raise ConfigError(f"{spec.label}: a flow has no {spec.timestep_spacing} spacing; take trailing or linspace")
    return Timesteps(sigma * schedule.num_timesteps, 1 - sigma, sigma)


def _sigmas(schedule: NoiseSchedule) -> Floats:
    """sigma / alpha by index; infinite at zero terminal SNR."""
    with np.errstate(divide="ignore"):
        return schedule.sigma / schedule.alpha


def _interpolate_sigmas(level: Floats, timesteps: Floats) -> Timesteps:
    """Variance-preserving states of a noise level sigma / alpha."""
    alpha = 1 / np.sqrt(1 + level**2)
    return Timesteps(timesteps, alpha, np.sqrt(1 - alpha**2))
