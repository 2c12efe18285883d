"""Decide between two configurations with fresh images, batch after batch, until their paired difference excludes 0.

The two are the best configuration of a budget and the best one of another size. They were chosen as the best of many noisy
scores, so their old images are not used again: every batch has noise of its own, the same for both. A decision is tried after
each of `LOOKS`. Looking several times would find a difference by chance too often; the boundary of Pocock (1977,
doi 10.1093/biomet/64.2.191) keeps the probability of a false decision over all looks at 5 %.

Shapes: K batches, R resamples; row 0 of [1 + R] is the score itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy.stats import norm, t

from isocost.evaluation.confidence_intervals import Interval
from isocost.metrics.arrays import Array

LOOKS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Numbers of batches after which a decision is tried. The boundary is always that of all of them, so that a call with fewer
batches can be continued."""
MAX_BATCHES = LOOKS[-1]
LEVEL = 0.05
NUM_PATHS = 200_000
Outcome = Literal["first", "second", "open"]


@dataclass(frozen=True)
class SequentialDecision:
    """The result of a comparison with fresh images.

    Attributes:
        outcome: the better configuration; "open" if the last look does not tell them apart.
        difference: first minus second score, with an interval that covers the true difference at all looks together with 95 %.
        num_batches: batches of each configuration.
    """

    outcome: Outcome
    difference: Interval
    num_batches: int


@lru_cache(maxsize=32)
def boundary(looks: tuple[int, ...], level: float = LEVEL) -> float:
    """Return the number of standard errors that a difference must exceed at any look (Pocock 1977).

    It is the quantile of the largest |z| over the looks of a random walk without drift, from `NUM_PATHS` walks of a fixed seed.

    Args:
        looks: numbers of batches, increasing.
        level: probability that a walk exceeds the boundary at some look.
    """
    steps = np.diff(np.array([0, *looks]))
    walks = np.cumsum(np.random.default_rng(0).standard_normal((NUM_PATHS, len(looks))) * np.sqrt(steps), axis=1)
    return float(np.quantile(np.abs(walks / np.sqrt(looks)).max(1), 1 - level))


def critical_value(num_resamples: int, level: float = LEVEL) -> float:
    """Return the boundary in standard errors that are estimated from R resamples: the same tail of Student's t with R - 1."""
    tail = float(norm.sf(boundary(LOOKS, level)))
    return float(t.isf(tail, num_resamples - 1))


def decide_with_batches(
    draw: Callable[[int], tuple[Array, Array]], lower_is_better: bool, max_batches: int = MAX_BATCHES, level: float = LEVEL
) -> SequentialDecision:
    """Draw batches of both configurations until a look decides.

    Args:
        draw: batch number 0, 1, ... -> the scores of the first and of the second configuration on this batch in every bootstrap
            resample, [1 + R] each. All resamples draw the same image ids and the same reference images, so the errors that
            batches and configurations share are counted as shared.
        lower_is_better: direction of the metric.
        max_batches: no look has more of them.
        level: probability of a false decision, over all looks.

    Returns:
        The decision at the first look that tells the two apart, or at the last look.
    """
    differences: list[Array] = []
    for look in LOOKS:
        if differences and look > max_batches:
            break
        differences += [np.subtract(*draw(number)) for number in range(len(differences), look)]
        decision = _look(differences, lower_is_better, level)
        if decision.outcome != "open":
            break
    return decision


def _look(differences: Sequence[Array], lower_is_better: bool, level: float) -> SequentialDecision:
    mean = np.mean(differences, axis=0)
    value, error = float(mean[0]), float(mean[1:].std(ddof=1))
    half_width = critical_value(len(mean) - 1, level) * error
    outcome: Outcome = "open"
    if abs(value) > half_width:
        outcome = "first" if (value < 0) == lower_is_better else "second"
    return SequentialDecision(outcome, Interval(value, value - half_width, value + half_width, 1 - level), len(differences))
