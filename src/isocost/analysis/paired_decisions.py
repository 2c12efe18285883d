"""Decide between two groups of points from their paired bootstrap resamples.

The points of a study share noise, prompts and reference images. Their resamples draw the same images, so the shared part of the
error cancels in a difference. Intervals of single scores ignore this, and leave most comparisons undecided.

Each group is represented by its best point, and the best of many noisy scores is too optimistic. The difference is corrected
for it as in `isocost.analysis.frontier_ci`: in a resample the observed scores act as the truth, so the optimism of the selected
point is its score in the resample minus its observed score (basic bootstrap, Davison and Hinkley 1997, section 5.2).

Shapes: N points, R resamples; row 0 of [1 + R] is the estimate itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.stats import norm

from isocost.evaluation.confidence_intervals import Interval
from isocost.evaluation.metric_registry import metric_of
from isocost.metrics.arrays import Array

Resamples = Mapping[str, Array]
"""The score of each point in every bootstrap resample, float64 [1 + R] by the digest of the point."""
LEVEL = 0.05
TAILS = (LEVEL / 2, 1 - LEVEL / 2)
MAX_IMAGES = 10**9


@dataclass(frozen=True)
class PairedDecision:
    """The best score of one group minus the best score of another.

    Attributes:
        difference: the difference, corrected for the selection of the best points, with its 95 % interval.
        p_value: probability of a difference this large between equal groups (normal approximation).
        is_decided: whether the whole interval says that the first group is better, and the p-value passes where several
            decisions are made at once.
        num_images: estimated number of images per point that would decide it, if the difference stays as it is; None if it is
            not above the present number. More images do not lower the error from the reference images, so the true number can
            be higher.
    """

    difference: Interval
    p_value: float
    is_decided: bool
    num_images: int | None


def decide(first: pd.DataFrame, second: pd.DataFrame, metric: str, resamples: Resamples) -> PairedDecision | None:
    """Decide whether the best point of one group is better than the best point of another.

    Args:
        first: rows of the points of the group with the better score, with `point`, `num_images` and the metric.
        second: rows of the other group.
        metric: the column of the scores.
        resamples: the resamples of the points.

    Returns:
        The decision; None if a point has no resamples, or the points have different numbers of images or resamples.
    """
    rows = pd.concat([first, second])
    replicates = joint_replicates(rows, metric, resamples)
    if replicates is None or rows["num_images"].nunique() != 1:
        return None
    sign = 1.0 if metric_of(metric).better == "lower" else -1.0
    values = sign * rows[metric].to_numpy(dtype=float)
    split = len(first)
    difference = corrected_minimum(values[:split], replicates[:, :split]) - corrected_minimum(
        values[split:], replicates[:, split:]
    )
    return _decision(difference, sign, int(rows["num_images"].iloc[0]))


def joint_replicates(rows: pd.DataFrame, metric: str, resamples: Resamples) -> Array | None:
    """Return the resamples of some points side by side, so that lower is better.

    Args:
        rows: the points.
        metric: the column of the scores.
        resamples: the resamples of the points.

    Returns:
        float64 [R, N]; None if a point has no resamples, or another number of them.
    """
    found = [resamples.get(point) for point in rows["point"]]
    known = [values for values in found if values is not None]
    if not known or len(known) < len(found) or len({len(values) for values in known}) > 1:
        return None
    sign = 1.0 if metric_of(metric).better == "lower" else -1.0
    return sign * np.stack([values[1:] for values in known], axis=1)


def corrected_minimum(values: Array, replicates: Array) -> Array:
    """Return the lowest of some scores, corrected for the optimism of its selection.

    Args:
        values: scores, lower is better, [N].
        replicates: bootstrap replicates of the scores, [R, N].

    Returns:
        The estimate and its replicates, [1 + R].
    """
    optimism = replicates.min(1) - values[replicates.argmin(1)]
    return np.asarray(values.min() - np.concatenate([[optimism.mean()], optimism]))


def decide_together(decisions: Sequence[PairedDecision | None]) -> list[PairedDecision | None]:
    """Keep those decisions that also hold when all are judged at once (Benjamini and Hochberg 1995).

    At most 5 % of the decisions are then expected to be false, however many there are.
    """
    ordered = sorted(decision.p_value for decision in decisions if decision is not None)
    passed = [p for rank, p in enumerate(ordered, start=1) if p <= LEVEL * rank / len(ordered)]
    threshold = passed[-1] if passed else -1.0
    return [
        None if decision is None else replace(decision, is_decided=decision.is_decided and decision.p_value <= threshold)
        for decision in decisions
    ]


def _decision(difference: Array, sign: float, num_images: int) -> PairedDecision:
    """The decision from a difference [1 + R] in which lower is better; `sign` converts it to the direction of the metric."""
    value = float(difference[0])
    low, high = (float(end) for end in np.quantile(difference[1:], TAILS, method="weibull"))
    low, high = min(low, value), max(high, value)
    error = float(difference[1:].std(ddof=1))
    z = abs(value) / error if error > 0 else math.inf if value else 0.0
    enough = math.ceil(min(num_images * (float(norm.ppf(TAILS[1])) / z) ** 2, MAX_IMAGES)) if z else MAX_IMAGES
    interval = Interval(value, low, high) if sign > 0 else Interval(-value, -high, -low)
    return PairedDecision(interval, float(2 * norm.sf(z)), high < 0, enough if enough > num_images else None)
