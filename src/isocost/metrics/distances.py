"""Distances between sets of features and between pictures: pure functions, float64.

Legend: N, M pictures of the two sets, D features of a picture, r the rank of a covariance.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

_BLOCK_ROWS = 1024


# --- Frechet ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean [D] and covariance [D, D] (divided by N - 1) of features: all that the Frechet distance sees of a set."""

    mean: Array
    covariance: Array

    @classmethod
    def of(cls, features: ArrayLike) -> Moments:
        """Moments of features [N, D], N at least 2."""
        matrix = _matrix(features)
        mean = matrix.mean(0)
        centred = matrix - mean
        return cls(mean, centred.T @ centred / (len(matrix) - 1))

    @cached_property
    def root(self) -> Array:
        """R [r, D] with R'R = covariance; directions without variance are left out. Computed once, then kept."""
        variances, directions = _positive_eigh(self.covariance)
        return (directions * np.sqrt(variances)).T


def frechet_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Squared Frechet distance of Gaussians fitted to features [N, D] and [M, D] (arXiv 1706.08500, eq. 6).

    Biased: at N pictures the value lies above the value at infinity by about c/N (arXiv 1911.07023), so compare at equal
    N only. Sets smaller than D are allowed.
    """
    return frechet_from_moments(Moments.of(a), Moments.of(b))


def frechet_from_moments(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|² + tr A + tr B - 2 tr (R A R')^½ with R'R = B, by symmetric eigenvalues. b's root is kept."""
    spectrum, _ = _positive_eigh(b.root @ a.covariance @ b.root.T)
    offset = a.mean - b.mean
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return float(offset @ offset + traces - 2 * np.sqrt(spectrum).sum())


def frechet_influence(a: ArrayLike, b: ArrayLike, moments_b: Moments | None = None) -> tuple[float, Array, Array]:
    """The Frechet distance with what each picture adds to it to first order: (distance, influence_a [N], influence_b [M]).

    Each influence is the derivative of the distance when the picture's weight in its set rises (Hampel 1974), so
    var(influence_a) / N + var(influence_b) / M is the distance's squared standard error. For the mean the derivative is
    2 (mean_a - mean_b); for the covariance it is I - T with T the optimal transport map from a's Gaussian to b's
    (T A T = B); b's side is the same with the inverse map. `moments_b` saves b's decomposition where it is at hand.
    """
    features_a, features_b = _matrix(a), _matrix(b)
    of_a, of_b = Moments.of(features_a), moments_b or Moments.of(features_b)
    squares, axes = _positive_eigh(of_b.root @ of_a.covariance @ of_b.root.T)
    singular = np.sqrt(squares)
    offset = of_a.mean - of_b.mean
    value = offset @ offset + np.trace(of_a.covariance) + np.trace(of_b.covariance) - 2 * singular.sum()

    to_b = (axes / np.sqrt(singular)).T @ of_b.root  # to_b' to_b = T
    to_a = (to_b @ of_a.covariance) / singular[:, None]  # to_a' to_a = the inverse map

    def influence(centred: Array, transport: Array, slope: Array) -> Array:
        raw = centred @ slope + np.square(centred).sum(1) - np.square(centred @ transport.T).sum(1)
        return raw - raw.mean()

    influence_a = influence(features_a - of_a.mean, to_b, 2 * offset)
    influence_b = influence(features_b - of_b.mean, to_a, -2 * offset)
    return float(value), influence_a, influence_b


def _positive_eigh(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues [r] above rounding error and their vectors [D, r] of a symmetric positive semi-definite [D, D]."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    kept = values > values.max(initial=0.0) * len(values) * np.finfo(np.float64).eps
    return values[kept], vectors[:, kept]


# --- kernel -----------------------------------------------------------------------------------------------------------


def polynomial_kernel(a: ArrayLike, b: ArrayLike) -> Array:
    """(x.y / D + 1)³ for features [N, D] and [M, D]: [N, M] (arXiv 1801.01401, section 4)."""
    left, right = _matrix(a), _matrix(b)
    kernel = left @ right.T
    kernel /= left.shape[1]
    kernel += 1
    return kernel * kernel * kernel


def kernel_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Unbiased squared maximum mean discrepancy of features [N, D] and [M, D] under `polynomial_kernel`.

    The U-statistic over the full sets (arXiv 1801.01401, eq. 4; no subsets are drawn), so the mean does not depend on N
    or M, and values below zero are right where the sets are alike.
    """
    left, right = _matrix(a), _matrix(b)
    return _mean_within(left) + _mean_within(right) - 2 * _mean_across(left, right)


def _mean_within(a: Array) -> float:
    diagonal = (np.square(a).sum(1) / a.shape[1] + 1) ** 3
    return float((_mean_across(a, a) * len(a) ** 2 - diagonal.sum()) / (len(a) * (len(a) - 1)))


def _mean_across(a: Array, b: Array) -> float:
    total = sum(polynomial_kernel(a[start : start + _BLOCK_ROWS], b).sum() for start in range(0, len(a), _BLOCK_ROWS))
    return float(total / (len(a) * len(b)))


# --- pictures ---------------------------------------------------------------------------------------------------------


def psnr(a: ArrayLike, b: ArrayLike, *, peak: float = 255.0) -> Array:
    """Peak signal-to-noise ratio of pictures in pairs, [N, ...] twice, in dB: [N]; infinite for equal pictures."""
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape:
        raise ValueError(f"pictures in pairs must have one shape, not {left.shape} and {right.shape}")
    error = np.square(left - right).reshape(len(left), -1).mean(1)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(peak**2 / error)


def _matrix(features: ArrayLike) -> Array:
    matrix = np.asarray(features, dtype=np.float64)
    if matrix.ndim != 2:
        raise ValueError(f"features must be [N, D], not {matrix.shape}")
    return matrix
