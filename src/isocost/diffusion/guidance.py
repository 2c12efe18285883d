"""Guidance as a function of the noise level: an interval or a schedule over the log-SNR.

Noise levels are given as log-SNR, `log(alpha^2 / sigma^2)`, which rises while an image is denoised. So an interval or a
schedule means the same for every solver and number of steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from isocost.diffusion.noise_schedule import Floats, NoiseSchedule
from isocost.errors import ConfigError

NO_GUIDANCE = 1.0
"""w of `uncond + w (cond - uncond)` at which the second pass has no weight."""

Interval = tuple[float | None, float | None]
"""(low, high): guidance applies where `low <= log-SNR < high`; None is an open end."""

GuidanceSchedule = Sequence[tuple[float, float]]
"""Points (log-SNR, w) with rising log-SNR. w is linear between them and constant outside."""


def log_snr(alpha: Floats, sigma: Floats) -> Floats:
    """`log(alpha^2 / sigma^2)`; -inf at pure noise."""
    with np.errstate(divide="ignore"):
        return 2 * (np.log(alpha) - np.log(sigma))


def guidance_per_evaluation(
    alpha: Floats, sigma: Floats, guidance: float, interval: Interval | None = None, schedule: GuidanceSchedule | None = None
) -> tuple[float, ...]:
    """Guidance weight of every network evaluation.

    An interval of noise levels is from Kynkäänniemi et al., arXiv 2404.07724, eq. 3: guidance for
    `sigma_low < sigma <= sigma_high`, elsewhere w = 1.

    Args:
        alpha, sigma: float64 [S], the state at each evaluation, as in `SolverCoefficients`.
        guidance: w, where no schedule is given.
        interval: noise levels with guidance; None is all.
        schedule: w by noise level, in place of `guidance`.

    Returns:
        S values; exactly 1 outside the interval.
    """
    levels = log_snr(alpha, sigma)
    if schedule is None:
        weights = np.full(len(levels), float(guidance))
    else:
        known_levels, known_weights = zip(*schedule, strict=True)
        weights = np.interp(levels, known_levels, known_weights)
    if interval is not None:
        low, high = interval
        inside = (levels >= (-np.inf if low is None else low)) & (levels < (np.inf if high is None else high))
        weights = np.where(inside, weights, NO_GUIDANCE)
    return tuple(weights.tolist())


def check_interval(interval: Interval, schedule: NoiseSchedule) -> None:
    """Check that some noise level of a schedule lies in the interval.

    Raises:
        ConfigError: the interval is empty, or lies outside of the schedule.
    """
    low, high = interval
    check_order(interval)
    levels = log_snr(schedule.alpha, schedule.sigma)
    first, last = float(levels[-1]), float(levels[0])
    if (high is not None and high <= first) or (low is not None and low > last):
        raise ConfigError(
            f"guidance interval {format_interval(interval)}: the log-SNR of this noise schedule goes from {first:.2f} to "
            f"{last:.2f}; give an interval inside of it"
        )


def check_order(interval: Interval) -> None:
    """Check that the lower end of an interval is below its upper end.

    Raises:
        ConfigError: it is not.
    """
    low, high = interval
    if low is not None and high is not None and low >= high:
        raise ConfigError(
            f"guidance interval {format_interval(interval)}: the lower log-SNR comes first; low log-SNR is high noise"
        )


def check_schedule(schedule: GuidanceSchedule) -> GuidanceSchedule:
    """Check that a schedule has points with rising log-SNR, and return it.

    Raises:
        ConfigError: it does not.
    """
    levels = [level for level, _ in schedule]
    if not levels or any(later <= earlier for earlier, later in itertools.pairwise(levels)):
        raise ConfigError("a guidance schedule has points (log-SNR, guidance) with rising log-SNR; sort them")
    return schedule


def format_interval(interval: Interval) -> str:
    """Text such as "[-3, 2]" or "[-3, null]"."""
    return f"[{', '.join('null' if end is None else f'{end:g}' for end in interval)}]"
