"""Intervals: how far a score would move if other images had been drawn.

Every interval resamples (or differentiates by) whole images, generated and reference alike, and is a function of its
inputs and a seed. One KernelReference serves every point of a study, so all points see the same reference resamples.

Legend: N generated images, M reference images, D features, R resamples; counts [1 + R, N] say how often each resample
draws each image, and row 0, all ones, is the sample itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm

from isocost.metrics.arrays import Array
from isocost.metrics.frechet import Moments, frechet_infinity, frechet_influence
from isocost.metrics.image_similarity import inception_score
from isocost.metrics.mmd import POLYNOMIAL, Kernel

_BLOCK_ROWS = 1024
_GENERATED, _REFERENCE = 0, 1


@dataclass(frozen=True)
class Interval:
    """A value and the interval that covers the true one in a share `confidence` of repeated experiments."""

    value: float
    low: float
    high: float
    confidence: float = 0.95


def independent_difference(one: Interval, other: Interval) -> Interval:
    """One less other, of scores whose noise is their own (Zou & Donner 2008, doi 10.1002/sim.3095): wider than a paired one."""
    value = one.value - other.value
    below = math.hypot(one.value - one.low, other.high - other.value)
    above = math.hypot(one.high - one.value, other.value - other.low)
    return Interval(value, value - below, value + above, one.confidence)


# --- means ------------------------------------------------------------------------------------------------------------


def mean_interval(values: ArrayLike, *, num_bootstrap: int = 200, seed: int = 0, confidence: float = 0.95) -> Interval:
    """Mean of one number an image, [N], with its percentile bootstrap interval (Efron 1979).

    For a paired difference of two points give the differences image by image. Values that are all equal give an
    interval of no width: the images then say nothing about how rare the other outcome is.
    """
    sample = np.asarray(values, dtype=np.float64)
    return percentiles(mean_resamples(sample, generated_counts(len(sample), num_bootstrap, seed)), confidence)


def mean_resamples(values: Array, counts: Array) -> Array:
    """Mean of values [N] for every resample of counts [1 + R, N]: [1 + R]."""
    return counts @ values / counts.sum(1)


# --- squared MMD --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class KernelReference:
    """The reference side of every kernel interval, computed once for a study."""

    features: Array  # [M, D]
    counts: Array  # [1 + R, M]
    within: Array  # [1 + R], mean kernel over pairs of different images
    seed: int
    kernel: Kernel = POLYNOMIAL

    @classmethod
    def of(
        cls, features: ArrayLike, *, num_bootstrap: int = 200, seed: int = 0, kernel: Kernel = POLYNOMIAL
    ) -> KernelReference:
        """Resample reference features [M, D] `num_bootstrap` times; memory stays at about 1024 x M numbers."""
        matrix = np.asarray(features, dtype=np.float64)
        counts = reference_counts(len(matrix), num_bootstrap, seed)
        return cls(matrix, counts, _within(matrix, counts, kernel), seed, kernel)


def kernel_interval(features: ArrayLike, reference: KernelReference, *, confidence: float = 0.95) -> Interval:
    """`kernel_distance` of features [N, D] to the reference, with its percentile bootstrap interval.

    A resample holds some images twice, and k(x, x) would push its U-statistic up: pairs of one original are left out, so
    the resamples centre on the value. Where the two sets are alike the statistic is degenerate and the interval too wide.
    """
    counts = generated_counts(len(np.asarray(features)), len(reference.within) - 1, reference.seed)
    return percentiles(kernel_resamples(features, counts, reference), confidence)


def kernel_resamples(features: ArrayLike, counts: Array, reference: KernelReference) -> Array:
    """`kernel_distance` of features [N, D] for every resample of counts [1 + R, N]: [1 + R].

    Two points with the same counts have paired resamples: their difference has the interval in which what they share cancels.
    """
    matrix = np.asarray(features, dtype=np.float64)
    within = _within(matrix, counts, reference.kernel) + reference.within
    return reference.kernel.factor * (within - 2 * _across(matrix, counts, reference))


def paired_kernel_difference(
    first: ArrayLike, second: ArrayLike, reference: KernelReference, *, confidence: float = 0.95
) -> Interval:
    """Squared MMD of `first` less that of `second`, both [N, D], image i of both from the same noise and caption.

    Each resample draws the same image ids for both and the same reference, so what the points share cancels.
    """
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.shape != two.shape:
        raise ValueError(f"a paired difference needs the same images on both sides, not {one.shape} and {two.shape}")
    counts = generated_counts(len(one), len(reference.within) - 1, reference.seed)
    resamples = [kernel_resamples(matrix, counts, reference) for matrix in (one, two)]
    return percentiles(resamples[0] - resamples[1], confidence)


def _within(features: Array, counts: Array, kernel: Kernel) -> Array:
    """Mean kernel over pairs of different originals, by resample: [1 + R]."""
    squares = np.square(counts)
    different = _weighted_pairs(features, counts, features, counts, kernel) - squares @ kernel.own(features)
    return different / (counts.sum(1) ** 2 - squares.sum(1))


def _across(features: Array, counts: Array, reference: KernelReference) -> Array:
    """Mean kernel between features and reference, by resample: [1 + R]."""
    total = _weighted_pairs(features, counts, reference.features, reference.counts, reference.kernel)
    return total / (counts.sum(1) * len(reference.features))


def _weighted_pairs(a: Array, counts_a: Array, b: Array, counts_b: Array, kernel: Kernel) -> Array:
    """Sum over i, j of counts_a[i] k(a_i, b_j) counts_b[j], by resample: [1 + R]."""
    total = np.zeros(len(counts_a))
    for start in range(0, len(a), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        total += np.einsum("rm,rm->r", counts_a[:, rows] @ kernel.between(a[rows], b), counts_b)
    return total


# --- Frechet distance -------------------------------------------------------------------------------------------------


def frechet_interval(
    features: ArrayLike, reference: ArrayLike, *, reference_moments: Moments | None = None, confidence: float = 0.95
) -> Interval:
    """`frechet_distance` of features [N, D] to reference [M, D], with a normal interval from its influence function.

    The interval says how far the value at this N and M would move with other images. The bias stays: the value lies above
    that of infinitely many images by about c/N, and neither end is corrected for it. Compare at equal N and M only.
    `reference_moments` saves the reference's decomposition where it is at hand.
    """
    value, of_features, of_reference = frechet_influence(features, reference, reference_moments)
    return _normal(value, _standard_error(of_features, of_reference), confidence)


def frechet_infinity_interval(
    features: ArrayLike,
    reference: ArrayLike,
    *,
    reference_moments: Moments | None = None,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """`frechet_infinity` of features [N, D] to reference [M, D], with a normal interval.

    Its squared error is the first-order error of the distance at N and M plus that of the fitted line. The reference's own
    bias, about c/M, stays in value and ends: compare at one reference only.
    """
    moments = reference_moments or Moments.of(reference)
    fitted = frechet_infinity(features, moments, seed=seed)
    _, of_features, of_reference = frechet_influence(features, reference, moments)
    error = np.hypot(_standard_error(of_features, of_reference), fitted.fit_error)
    return _normal(fitted.value, float(error), confidence)


def paired_frechet_difference(
    first: ArrayLike,
    second: ArrayLike,
    reference: ArrayLike,
    *,
    reference_moments: Moments | None = None,
    confidence: float = 0.95,
) -> Interval:
    """Frechet distance of `first` less that of `second`, both [N, D], image i of both from the same noise and caption.

    A normal interval from the differences of the images' influences, so what the points share cancels; the two biases
    cancel as far as they are alike.
    """
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.shape != two.shape:
        raise ValueError(f"a paired difference needs the same images on both sides, not {one.shape} and {two.shape}")
    moments = reference_moments or Moments.of(reference)
    value_one, of_one, reference_one = frechet_influence(one, reference, moments)
    value_two, of_two, reference_two = frechet_influence(two, reference, moments)
    error = _standard_error(of_one - of_two, reference_one - reference_two)
    return _normal(value_one - value_two, error, confidence)


def _standard_error(*influences: Array) -> float:
    return float(np.sqrt(sum(one.var(ddof=1) / len(one) for one in influences)))


def _normal(value: float, error: float, confidence: float) -> Interval:
    compute_prdc = float(norm.ppf((1 + confidence) / 2) * error)
    return Interval(value, value - compute_prdc, value + compute_prdc, confidence)


def frechet_resamples(
    features: ArrayLike, counts: Array, reference: ArrayLike, reference_moments: Moments, reference_counts: Array
) -> Array:
    """`frechet_distance` of features [N, D] to reference [M, D] for every resample, to first order: [1 + R].

    Each image's influence takes the place of a decomposition for every resample. The bias of N images stays in all of them:
    take differences at equal N only.
    """
    value, of_features, of_reference = frechet_influence(features, reference, reference_moments)
    moved = (counts - counts[:1]) @ of_features / counts.sum(1)
    return value + moved + (reference_counts - 1) @ of_reference / len(of_reference)


# --- Inception score --------------------------------------------------------------------------------------------------


def inception_score_interval(
    logits: ArrayLike, *, num_bootstrap: int = 200, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """`inception_score` of logits [N, L], all in one part, with a bootstrap interval moved back onto the value.

    A resample repeats images, so it shows fewer classes and its score lies lower; the interval is the resamples' spread
    around their own mean, put around the value.
    """
    matrix = np.asarray(logits)
    scores = inception_score(matrix, generated_counts(len(matrix), num_bootstrap, seed))
    return percentiles(np.concatenate([scores[:1], scores[1:] - scores[1:].mean() + scores[0]]), confidence)


# --- resampling -------------------------------------------------------------------------------------------------------


def generated_counts(num_images: int, num_bootstrap: int, seed: int) -> Array:
    """How often each resample draws each generated image, [1 + R, N]; row 0, all ones, is the sample itself."""
    return _resample(num_images, num_bootstrap, seed, _GENERATED)


def reference_counts(num_images: int, num_bootstrap: int, seed: int) -> Array:
    """The same of reference images, [1 + R, M]."""
    return _resample(num_images, num_bootstrap, seed, _REFERENCE)


def _resample(num_images: int, num_bootstrap: int, seed: int, stream: int) -> Array:
    """Counts [1 + R, N]: row 0 the sample itself, then multinomial draws of N images from N."""
    generator = np.random.Generator(np.random.Philox(seed).jumped(stream))
    draws = generator.multinomial(num_images, np.full(num_images, 1 / num_images), size=num_bootstrap)
    return np.concatenate([np.ones((1, num_images)), draws])


def percentiles(statistics: Array, confidence: float = 0.95) -> Interval:
    """The interval of resamples [1 + R], of which the first is the value."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(statistics[1:], [tail, 1 - tail])
    return Interval(float(statistics[0]), float(low), float(high), confidence)
