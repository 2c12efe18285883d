"""Confidence intervals of scores: the variation of a score over other draws of generated and reference images.

Every interval resamples whole images, or differentiates by the weight of whole images, on both sides. It is a function of
its inputs and a seed. All points of a study share one KernelReference, so they use the same resamples of the reference.

Shapes: N generated images, M reference images, D features, R resamples. Counts [1 + R, N] say how often each resample
contains each image; row 0 is all ones and stands for the sample itself.
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
    """A value with an interval that covers the true value in a fraction `confidence` of repeated experiments."""

    value: float
    low: float
    high: float
    confidence: float = 0.95


def independent_difference(first: Interval, second: Interval) -> Interval:
    """First minus second score, for scores with independent noise (Zou & Donner 2008, doi 10.1002/sim.3095).

    The interval is wider than that of a paired difference.
    """
    value = first.value - second.value
    below = math.hypot(first.value - first.low, second.high - second.value)
    above = math.hypot(first.high - first.value, second.value - second.low)
    return Interval(value, value - below, value + above, first.confidence)


# --- means ------------------------------------------------------------------------------------------------------------


def mean_interval(values: ArrayLike, *, num_bootstrap: int = 200, seed: int = 0, confidence: float = 0.95) -> Interval:
    """Mean over images with its percentile bootstrap interval (Efron 1979).

    If all values are equal the interval has zero width, because the sample has no information about rarer outcomes.

    Args:
        values: one number per image, [N]; for a paired difference of two points, the difference per image.
        num_bootstrap: R, number of resamples.
        seed: of the resamples.
        confidence: coverage, 0..1.
    """
    sample = np.asarray(values, dtype=np.float64)
    return percentile_interval(mean_resamples(sample, generated_counts(len(sample), num_bootstrap, seed)), confidence)


def mean_resamples(values: Array, counts: Array) -> Array:
    """Mean of values [N] in every resample of counts [1 + R, N]: [1 + R]."""
    return counts @ values / counts.sum(1)


# --- squared MMD --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class KernelReference:
    """The reference side of every kernel interval, computed once per study.

    Attributes:
        features: [M, D].
        counts: [1 + R, M].
        within: [1 + R], mean kernel over pairs of different images, per resample.
        seed: of the resamples.
        kernel: of the squared MMD.
    """

    features: Array
    counts: Array
    within: Array
    seed: int
    kernel: Kernel = POLYNOMIAL

    @classmethod
    def of(
        cls, features: ArrayLike, *, num_bootstrap: int = 200, seed: int = 0, kernel: Kernel = POLYNOMIAL
    ) -> KernelReference:
        """Resample reference features [M, D] `num_bootstrap` times; needs memory for about 1024 x M numbers."""
        matrix = np.asarray(features, dtype=np.float64)
        counts = reference_counts(len(matrix), num_bootstrap, seed)
        return cls(matrix, counts, _within(matrix, counts, kernel), seed, kernel)


def kernel_interval(features: ArrayLike, reference: KernelReference, *, confidence: float = 0.95) -> Interval:
    """`squared_mmd` of features [N, D] to the reference, with its percentile bootstrap interval.

    A resample contains some images twice, and k(x, x) would bias its U-statistic upwards. Pairs of copies of one image are
    therefore excluded, so that the resamples are centred on the value. If the two sets have the same distribution the
    statistic is degenerate and the interval is too wide.
    """
    counts = generated_counts(len(np.asarray(features)), len(reference.within) - 1, reference.seed)
    return percentile_interval(kernel_resamples(features, counts, reference), confidence)


def kernel_resamples(features: ArrayLike, counts: Array, reference: KernelReference) -> Array:
    """`squared_mmd` of features [N, D] in every resample of counts [1 + R, N]: [1 + R].

    Two points with the same counts have paired resamples: noise that the points share cancels in the difference.
    """
    matrix = np.asarray(features, dtype=np.float64)
    within = _within(matrix, counts, reference.kernel) + reference.within
    return reference.kernel.factor * (within - 2 * _across(matrix, counts, reference))


def paired_kernel_difference(
    first: ArrayLike, second: ArrayLike, reference: KernelReference, *, confidence: float = 0.95
) -> Interval:
    """Squared MMD of `first` minus that of `second`, with an interval in which shared noise cancels.

    Each resample contains the same image ids of both sets and the same reference images.

    Args:
        first: features [N, D].
        second: features [N, D]; image i has the same noise and prompt as image i of `first`.
        reference: the reference side.
        confidence: coverage, 0..1.

    Raises:
        ValueError: the shapes differ.
    """
    features_1, features_2 = _paired(first, second)
    counts = generated_counts(len(features_1), len(reference.within) - 1, reference.seed)
    resamples_1, resamples_2 = (kernel_resamples(features, counts, reference) for features in (features_1, features_2))
    return percentile_interval(resamples_1 - resamples_2, confidence)


def _within(features: Array, counts: Array, kernel: Kernel) -> Array:
    """Mean kernel over pairs of different images, per resample: [1 + R]."""
    squares = np.square(counts)
    different = _weighted_kernel_sum(features, counts, features, counts, kernel) - squares @ kernel.diagonal(features)
    return different / (counts.sum(1) ** 2 - squares.sum(1))


def _across(features: Array, counts: Array, reference: KernelReference) -> Array:
    """Mean kernel between features and reference, per resample: [1 + R]."""
    total = _weighted_kernel_sum(features, counts, reference.features, reference.counts, reference.kernel)
    return total / (counts.sum(1) * len(reference.features))


def _weighted_kernel_sum(a: Array, counts_a: Array, b: Array, counts_b: Array, kernel: Kernel) -> Array:
    """Sum over i, j of counts_a[i] k(a_i, b_j) counts_b[j], per resample: [1 + R]."""
    total = np.zeros(len(counts_a))
    for start in range(0, len(a), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        total += np.einsum("rm,rm->r", counts_a[:, rows] @ kernel.gram(a[rows], b), counts_b)
    return total


# --- Frechet distance -------------------------------------------------------------------------------------------------


def frechet_interval(
    features: ArrayLike, reference: ArrayLike, *, reference_moments: Moments | None = None, confidence: float = 0.95
) -> Interval:
    """`frechet_distance` with a normal interval from its influence function.

    The interval covers the variation of the value at this N and M over other images. The bias remains: the value exceeds
    that of infinitely many images by about c/N, and neither end is corrected for it. Compare values at equal N and M only.

    Args:
        features: [N, D].
        reference: [M, D].
        reference_moments: `Moments.of(reference)`, if already computed.
        confidence: coverage, 0..1.
    """
    return influence_interval(*frechet_influence(features, reference, reference_moments), confidence=confidence)


def influence_interval(value: float, *influences: Array, confidence: float = 0.95) -> Interval:
    """Return the normal interval of a value from the influences of the images of each set on it, [N] and [M]."""
    return _normal_interval(value, _standard_error(*influences), confidence)


def frechet_infinity_interval(
    features: ArrayLike,
    reference: ArrayLike,
    *,
    reference_moments: Moments | None = None,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """`frechet_infinity` of features [N, D] to reference [M, D], with a normal interval.

    The squared standard error is the sum of the first-order error of the distance at N and M and the error of the fitted
    line. The bias of the reference, about c/M, remains in the value and both ends: compare values with one reference only.
    `reference_moments` is `Moments.of(reference)`, if already computed.
    """
    moments = reference_moments or Moments.of(reference)
    extrapolation = frechet_infinity(features, moments, seed=seed)
    _, influence, reference_influence = frechet_influence(features, reference, moments)
    error = np.hypot(_standard_error(influence, reference_influence), extrapolation.fit_error)
    return _normal_interval(extrapolation.value, float(error), confidence)


def paired_frechet_difference(
    first: ArrayLike,
    second: ArrayLike,
    reference: ArrayLike,
    *,
    reference_moments: Moments | None = None,
    num_bootstrap: int = 200,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Frechet distance of `first` minus that of `second`, with an interval in which shared noise cancels.

    Each resample contains the same image ids of both sets and the same reference images, to first order. The two biases
    cancel as far as they are equal.

    Args:
        first: features [N, D].
        second: features [N, D]; image i has the same noise and prompt as image i of `first`.
        reference: [M, D].
        reference_moments: `Moments.of(reference)`, if already computed.
        num_bootstrap: R, number of resamples.
        seed: of the resamples.
        confidence: coverage, 0..1.

    Raises:
        ValueError: the shapes differ.
    """
    moments = reference_moments or Moments.of(reference)
    of_reference = reference_counts(len(np.asarray(reference)), num_bootstrap, seed)
    resamples_1, resamples_2 = (
        influence_resamples(
            *frechet_influence(features, reference, moments),
            generated_counts(len(features), num_bootstrap, seed),
            of_reference,
        )
        for features in _paired(first, second)
    )
    return percentile_interval(resamples_1 - resamples_2, confidence)


def _paired(first: ArrayLike, second: ArrayLike) -> tuple[Array, Array]:
    features_1, features_2 = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if features_1.shape != features_2.shape:
        raise ValueError(
            f"a paired difference needs the same images in both sets, not {features_1.shape} and {features_2.shape}"
        )
    return features_1, features_2


def _standard_error(*influences: Array) -> float:
    return float(np.sqrt(sum(influence.var(ddof=1) / len(influence) for influence in influences)))


def _normal_interval(value: float, error: float, confidence: float) -> Interval:
    half_width = float(norm.ppf((1 + confidence) / 2) * error)
    return Interval(value, value - half_width, value + half_width, confidence)


def influence_resamples(
    value: float, influence: Array, reference_influence: Array, counts: Array, reference_counts: Array
) -> Array:
    """A distance between two sets in every resample, to first order: [1 + R].

    The images' influences replace a decomposition per resample. The bias at N images remains in all resamples: use
    differences at equal N only.

    Args:
        value: the distance.
        influence: of the images on it, [N] (`frechet_influence`, `sliced_wasserstein`).
        reference_influence: of the reference images, [M].
        counts: [1 + R, N].
        reference_counts: [1 + R, M].
    """
    change = (counts - counts[:1]) @ influence / counts.sum(1)
    return value + change + (reference_counts - 1) @ reference_influence / len(reference_influence)


# --- Inception score --------------------------------------------------------------------------------------------------


def inception_score_interval(
    logits: ArrayLike, *, num_bootstrap: int = 200, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """`inception_score` of logits [N, L] without splits, with a bootstrap interval that is re-centred on the value.

    A resample repeats images, so it has less variety and a lower score. The interval is the spread of the resamples around
    their own mean, shifted to the value.
    """
    matrix = np.asarray(logits)
    scores = inception_score(matrix, generated_counts(len(matrix), num_bootstrap, seed))
    return percentile_interval(np.concatenate([scores[:1], scores[1:] - scores[1:].mean() + scores[0]]), confidence)


# --- resampling -------------------------------------------------------------------------------------------------------


def generated_counts(num_images: int, num_bootstrap: int, seed: int) -> Array:
    """How often each resample contains each generated image, [1 + R, N]; row 0 is all ones."""
    return _resample(num_images, num_bootstrap, seed, _GENERATED)


def reference_counts(num_images: int, num_bootstrap: int, seed: int) -> Array:
    """How often each resample contains each reference image, [1 + R, M]; drawn from another random stream."""
    return _resample(num_images, num_bootstrap, seed, _REFERENCE)


def _resample(num_images: int, num_bootstrap: int, seed: int, stream: int) -> Array:
    """Counts [1 + R, N]: a row of ones, then multinomial draws of N from N images."""
    generator = np.random.Generator(np.random.Philox(seed).jumped(stream))
    draws = generator.multinomial(num_images, np.full(num_images, 1 / num_images), size=num_bootstrap)
    return np.concatenate([np.ones((1, num_images)), draws])


def percentile_interval(statistics: Array, confidence: float = 0.95) -> Interval:
    """Percentile interval of resamples [1 + R], the first of which is the value."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(statistics[1:], [tail, 1 - tail])
    return Interval(float(statistics[0]), float(low), float(high), confidence)
