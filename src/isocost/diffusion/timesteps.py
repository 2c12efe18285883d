"""The timesteps of a solver's network evaluations: spacings of a noise schedule, in float64.

Shape letters: S steps, T training timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from isocost.config.sampling import SolverSpec
from isocost.diffusion.noise_schedule import Floats, NoiseSchedule, apply_time_shift
from isocost.errors import ConfigError

KARRAS_RHO = 7.0
BETA_SHAPE = 0.6
"""Both shape parameters of the beta distribution (arXiv 2407.12173)."""


def _karras(high: float, low: float, num_steps: int) -> Floats:
    """Uniform in the seventh root (arXiv 2206.00364, eq. 5)."""
    first, last = high ** (1 / KARRAS_RHO), low ** (1 / KARRAS_RHO)
    return (first + np.linspace(0, 1, num_steps) * (last - first)) ** KARRAS_RHO


def _exponential(high: float, low: float, num_steps: int) -> Floats:
    """Uniform in the logarithm."""
    return np.exp(np.linspace(np.log(high), np.log(low), num_steps))


def _beta(high: float, low: float, num_steps: int) -> Floats:
    """Quantiles of a beta distribution, dense at both ends (arXiv 2407.12173)."""
    from scipy.stats import beta

    return np.asarray(low + beta.ppf(1 - np.linspace(0, 1, num_steps), BETA_SHAPE, BETA_SHAPE) * (high - low))


NOISE_RATIO_SPACINGS: dict[str, Callable[[float, float, int], Floats]] = {
    "karras": _karras,
    "exponential": _exponential,
    "beta": _beta,
}
"""Spacings of sigma / alpha: highest and lowest value of the schedule, number of steps -> [S], falling."""


@dataclass(frozen=True, eq=False)
class Timesteps:
    """The states of a solver's steps, from noise to clean.

    Attributes:
        timesteps: float64 [S], the network's input.
        alpha, sigma: float64 [S], `x = alpha x0 + sigma noise` at the start of each step.
        alpha_end, sigma_end: the state after the last step; by default the clean latent.
    """

    timesteps: Floats
    alpha: Floats
    sigma: Floats
    alpha_end: float = 1.0
    sigma_end: float = 0.0

    @classmethod
    def from_indices(cls, schedule: NoiseSchedule, indices: NDArray[np.int64]) -> Timesteps:
        """The timesteps at these indices [S] of the schedule."""
        return cls(schedule.timesteps[indices], schedule.alpha[indices], schedule.sigma[indices])

    def with_final(self, alpha: float, sigma: float) -> Timesteps:
        """The same timesteps with another final state."""
        return replace(self, alpha_end=float(alpha), sigma_end=float(sigma))

    @property
    def alpha_next(self) -> Floats:
        """float64 [S], alpha after each step."""
        return np.append(self.alpha[1:], self.alpha_end)

    @property
    def sigma_next(self) -> Floats:
        """float64 [S], sigma after each step."""
        return np.append(self.sigma[1:], self.sigma_end)

    @property
    def h(self) -> Floats:
        """Step sizes in half the log-SNR, float64 [S]; infinite towards a clean end and from zero terminal SNR."""
        with np.errstate(divide="ignore"):
            half_log_snr = np.log(np.append(self.alpha, self.alpha_end)) - np.log(np.append(self.sigma, self.sigma_end))
        return np.diff(half_log_snr)


def make_timesteps(
    spec: SolverSpec, num_steps: int, schedule: NoiseSchedule, includes_clean_end: bool = False, fractional: bool = False
) -> Timesteps:
    """The timesteps of `num_steps` steps (leading, trailing, linspace: arXiv 2305.08891, table 2).

    "karras", "exponential" and "beta" space `sigma / alpha` between the ends of the schedule (`NOISE_RATIO_SPACINGS`). On a
    flow, "linspace" is diffusers' FlowMatchEulerDiscreteScheduler (uniform between the ends of the schedule, then shifted once
    more, as in Stable Diffusion 3), and "trailing" starts at 1 and steps by 1 / num_steps before the shift (as in Flux).

    Args:
        spec: its timesteps, or its spacing and offset, are used.
        num_steps: S.
        schedule: the noise schedule.
        includes_clean_end: "leading" and "linspace" are computed for S + 1 steps, and the clean end replaces the last one
            (diffusers' DPM-Solver and UniPC).
        fractional: timesteps need not be integers (diffusers' Euler and Heun).

    Raises:
        ConfigError: the steps do not fit the schedule, or the schedule does not support the spacing or a list of timesteps.
    """
    if spec.timesteps is not None:
        return _given_timesteps(spec.timesteps, num_steps, schedule)
    if schedule.is_flow:
        return _flow_timesteps(spec, num_steps, schedule)
    if spec.timestep_spacing in NOISE_RATIO_SPACINGS:
        return _noise_ratio_timesteps(spec, num_steps, schedule, fractional)
    num_timesteps = schedule.num_timesteps
    num_spaced = num_steps + includes_clean_end
    timesteps: Floats
    if spec.timestep_spacing == "trailing":
        # For some numbers of steps, rounding makes `arange` return one entry too many, which the slice below drops.
        timesteps = np.arange(float(num_timesteps), 0, -num_timesteps / num_steps).round() - 1
    elif spec.timestep_spacing == "leading":
        timesteps = np.arange(num_spaced, dtype=np.float64)[::-1] * (num_timesteps // num_spaced) + spec.steps_offset
    elif num_spaced == 1:
        timesteps = np.array([num_timesteps - 1.0])  # a single step starts at pure noise
    else:
        timesteps = np.linspace(0.0, num_timesteps - 1.0, num_spaced, dtype=np.float64)[::-1]
        timesteps = timesteps if fractional else timesteps.round()
    timesteps = timesteps[:num_steps]
    if timesteps[0] > num_timesteps - 1 or np.any(np.diff(timesteps) >= 0):
        raise ConfigError(
            f"{num_steps} steps of {spec.label} do not fit {num_timesteps} timesteps; use fewer steps or trailing spacing"
        )
    if fractional and np.any(timesteps % 1):
        noise_ratio = np.interp(timesteps, np.arange(num_timesteps), _noise_ratios(schedule))
        return _from_noise_ratio(noise_ratio, timesteps)
    return Timesteps.from_indices(schedule, timesteps.astype(np.int64))


def _given_timesteps(timesteps: Sequence[int], num_steps: int, schedule: NoiseSchedule) -> Timesteps:
    if schedule.is_flow:
        raise ConfigError("timesteps: a flow has no list of timesteps; use timestep_spacing trailing or linspace")
    if len(timesteps) != num_steps:
        raise ConfigError(f"timesteps: {len(timesteps)} timesteps for {num_steps} steps; give one for each step")
    if timesteps[0] >= schedule.num_timesteps:
        raise ConfigError(f"timesteps: {timesteps[0]} is beyond the schedule, which ends at {schedule.num_timesteps - 1}")
    return Timesteps.from_indices(schedule, np.array(timesteps, dtype=np.int64))


def _noise_ratio_timesteps(spec: SolverSpec, num_steps: int, schedule: NoiseSchedule, fractional: bool) -> Timesteps:
    if schedule.has_zero_terminal_snr:
        raise ConfigError(
            f"{spec.label}: {spec.timestep_spacing} spacing cannot start from zero terminal SNR; use trailing spacing"
        )
    noise_ratios = _noise_ratios(schedule)
    noise_ratio = NOISE_RATIO_SPACINGS[spec.timestep_spacing](noise_ratios[-1], noise_ratios[0], num_steps)
    timesteps = np.interp(np.log(noise_ratio), np.log(noise_ratios), schedule.timesteps)
    if not fractional:  # as in diffusers
        timesteps = timesteps.round() if spec.timestep_spacing == "karras" else np.floor(timesteps)
    return _from_noise_ratio(noise_ratio, timesteps)


def _flow_timesteps(spec: SolverSpec, num_steps: int, schedule: NoiseSchedule) -> Timesteps:
    shift = schedule.sigma[0] * (schedule.num_timesteps - 1) / (1 - schedule.sigma[0])
    if spec.timestep_spacing == "linspace":
        sigma = apply_time_shift(np.linspace(schedule.sigma[-1], schedule.sigma[0], num_steps), shift)
    elif spec.timestep_spacing == "trailing":
        sigma = apply_time_shift(1 - np.arange(num_steps) / num_steps, shift)
    else:
        raise ConfigError(f"{spec.label}: a flow has no {spec.timestep_spacing} spacing; use trailing or linspace")
    return Timesteps(sigma * schedule.num_timesteps, 1 - sigma, sigma)


def _noise_ratios(schedule: NoiseSchedule) -> Floats:
    """sigma / alpha by index, [T]; infinite at zero terminal SNR."""
    with np.errstate(divide="ignore"):
        return schedule.sigma / schedule.alpha


def _from_noise_ratio(noise_ratio: Floats, timesteps: Floats) -> Timesteps:
    """Variance-preserving states with `noise_ratio` = sigma / alpha, [S]."""
    alpha = 1 / np.sqrt(1 + noise_ratio**2)
    return Timesteps(timesteps, alpha, np.sqrt(1 - alpha**2))
