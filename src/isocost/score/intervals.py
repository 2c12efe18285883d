"""Intervals: how far a score would move if other pictures had been drawn.

Every interval resamples (or differentiates by) whole pictures, generated and reference alike, and is a function of its
inputs and a seed. One KernelReference serves every point of a study, so all points see the same reference resamples.

Legend: N generated pictures, M reference pictures, D features, R resamples; counts [1 + R, N] say how often each resample
draws each picture, and row 0, all ones, is the sample itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm

from isocost.metrics.distances import Array, Moments, frechet_influence, polynomial_kernel

_BLOCK_ROWS = 1024
_GENERATED, _REFERENCE = 0, 1


@dataclass(frozen=True)
class Interval:
    """A value and the interval that covers the true one in a share `confidence` of repeated experiments."""

    value: float
    low: float
    high: float
    confidence: float = 0.95


# --- means ------------------------------------------------------------------------------------------------------------


def mean_interval(values: ArrayLike, *, num_bootstrap: int = 200, seed: int = 0, confidence: float = 0.95) -> Interval:
    """Mean of one number a picture, [N], with its percentile bootstrap interval (Efron 1979).

    For a paired difference of two points give the differences picture by picture. Values that are all equal give an
    interval of no width: the pictures then say nothing about how rare the other outcome is.
    """
    sample = np.asarray(values, dtype=np.float64)
    counts = _resample(len(sample), num_bootstrap, seed, _GENERATED)
    return _percentiles(counts @ sample / len(sample), confidence)


# --- kernel distance --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class KernelReference:
    """The reference side of every kernel interval, computed once for a study."""

    features: Array  # [M, D]
    counts: Array  # [1 + R, M]
    within: Array  # [1 + R], mean kernel over pairs of different pictures
    seed: int

    @classmethod
    def of(cls, features: ArrayLike, *, num_bootstrap: int = 200, seed: int = 0) -> KernelReference:
        """Resample reference features [M, D] `num_bootstrap` times; memory stays at about 1024 x M numbers."""
        matrix = np.asarray(features, dtype=np.float64)
        counts = _resample(len(matrix), num_bootstrap, seed, _REFERENCE)
        return cls(matrix, counts, _within(matrix, counts), seed)


def kernel_interval(features: ArrayLike, reference: KernelReference, *, confidence: float = 0.95) -> Interval:
    """`kernel_distance` of features [N, D] to the reference, with its percentile bootstrap interval.

    A resample holds some pictures twice, and k(x, x) would push its U-statistic up: pairs of one original are left out, so
    the resamples centre on the value. Where the two sets are alike the statistic is degenerate and the interval too wide.
    """
    matrix = np.asarray(features, dtype=np.float64)
    counts = _resample(len(matrix), len(reference.within) - 1, reference.seed, _GENERATED)
    across = _across(matrix, counts, reference)
    return _percentiles(_within(matrix, counts) + reference.within - 2 * across, confidence)


def paired_kernel_difference(
    first: ArrayLike, second: ArrayLike, reference: KernelReference, *, confidence: float = 0.95
) -> Interval:
    """Kernel distance of `first` less that of `second`, both [N, D], picture i of both from the same noise and caption.

    Each resample draws the same picture ids for both and the same reference, so what the points share cancels.
    """
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.shape != two.shape:
        raise ValueError(f"a paired difference needs the same pictures on both sides, not {one.shape} and {two.shape}")
    counts = _resample(len(one), len(reference.within) - 1, reference.seed, _GENERATED)
    within = _within(one, counts) - _within(two, counts)
    across = _across(one, counts, reference) - _across(two, counts, reference)
    return _percentiles(within - 2 * across, confidence)


def _within(features: Array, counts: Array) -> Array:
    """Mean kernel over pairs of different originals, by resample: [1 + R]."""
    squares = np.square(counts)
    diagonal = (np.square(features).sum(1) / features.shape[1] + 1) ** 3
    different = _weighted_pairs(features, counts, features, counts) - squares @ diagonal
    return different / (len(features) ** 2 - squares.sum(1))


def _across(features: Array, counts: Array, reference: KernelReference) -> Array:
    """Mean kernel between features and reference, by resample: [1 + R]."""
    total = _weighted_pairs(features, counts, reference.features, reference.counts)
    return total / (len(features) * len(reference.features))


def _weighted_pairs(a: Array, counts_a: Array, b: Array, counts_b: Array) -> Array:
    """Sum over i, j of counts_a[i] k(a_i, b_j) counts_b[j], by resample: [1 + R]."""
    total = np.zeros(len(counts_a))
    for start in range(0, len(a), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        total += np.einsum("rm,rm->r", counts_a[:, rows] @ polynomial_kernel(a[rows], b), counts_b)
    return total


# --- Frechet distance -------------------------------------------------------------------------------------------------


def frechet_interval(
    features: ArrayLike, reference: ArrayLike, *, reference_moments: Moments | None = None, confidence: float = 0.95
) -> Interval:
    """`frechet_distance` of features [N, D] to reference [M, D], with a normal interval from its influence function.

    The interval says how far the value at this N and M would move with other pictures. The bias stays: the value lies above
    that of infinitely many pictures by about c/N, and neither end is corrected for it. Compare at equal N and M only.
    `reference_moments` saves the reference's decomposition where it is at hand.
    """
    value, of_features, of_reference = frechet_influence(features, reference, reference_moments)
    error = np.sqrt(of_features.var(ddof=1) / len(of_features) + of_reference.var(ddof=1) / len(of_reference))
    reach = float(norm.ppf((1 + confidence) / 2) * error)
    return Interval(value, value - reach, value + reach, confidence)


# --- resampling -------------------------------------------------------------------------------------------------------


def _resample(num_pictures: int, num_bootstrap: int, seed: int, stream: int) -> Array:
    """Counts [1 + R, N]: row 0 the sample itself, then multinomial draws of N pictures from N."""
    generator = np.random.Generator(np.random.Philox(seed).jumped(stream))
    draws = generator.multinomial(num_pictures, np.full(num_pictures, 1 / num_pictures), size=num_bootstrap)
    return np.concatenate([np.ones((1, num_pictures)), draws])


def _percentiles(statistics: Array, confidence: float) -> Interval:
    """Row 0 is the value; the others its resamples."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(statistics[1:], [tail, 1 - tail])
    return Interval(float(statistics[0]), float(low), float(high), confidence)
