"""Frechet distance between two sets of features: pure functions in float64, on NumPy arrays or on tensors of any device.

Shapes: N, M images of the two sets, D features per image, r rank of a covariance.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from isocost.metrics.arrays import Array, Features, array_module, as_matrix, to_numpy


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean [D] and covariance [D, D] (divided by N - 1) of features; the Frechet distance depends on nothing else."""

    mean: Any
    covariance: Any

    @classmethod
    def of(cls, features: Features) -> Moments:
        """Moments of features [N, D] with N >= 2."""
        matrix = as_matrix(features)
        mean = matrix.mean(0)
        centred = matrix - mean
        moments = cls(mean, centred.T @ centred / (len(matrix) - 1))
        if len(matrix) <= matrix.shape[1]:
            # With fewer images than features the centred features are a root; no decomposition is needed.
            moments.__dict__["root"] = centred / (len(matrix) - 1) ** 0.5
        return moments

    @cached_property
    def root(self) -> Any:
        """R [r, D] with R'R = covariance, by Cholesky, or by eigenvectors if the covariance is singular; computed once."""
        module = array_module(self.covariance)
        try:
            return module.linalg.cholesky(self.covariance).T
        except (np.linalg.LinAlgError, torch.linalg.LinAlgError):
            variances, directions = _positive_eigh(self.covariance)
            return (directions * module.sqrt(variances)).T


def frechet_distance(a: Features, b: Features) -> float:
    """Squared Frechet distance of Gaussians fitted to features [N, D] and [M, D] (arXiv 1706.08500, eq. 6).

    The estimate is biased: with N images it exceeds its limit by about c/N (arXiv 1911.07023). Compare values at equal N
    only, or use `frechet_infinity`. Sets may have fewer than D images.
    """
    return frechet_from_moments(Moments.of(a), Moments.of(b))


def frechet_from_moments(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|² + tr A + tr B - 2 tr (R A R')^½ with R'R = B, by symmetric eigenvalues; caches the root of `b`."""
    product = b.root @ a.covariance @ b.root.T
    spectrum = _above_rounding_error(array_module(product).linalg.eigvalsh((product + product.T) / 2))
    offset = a.mean - b.mean
    traces = a.covariance.trace() + b.covariance.trace()
    return float(offset @ offset + traces - 2 * (spectrum**0.5).sum())


@dataclass(frozen=True)
class Extrapolation:
    """A distance extrapolated to infinitely many generated images.

    Attributes:
        value: intercept of a line in 1/N.
        fit_error: standard error of the intercept.
        slope: slope of the line.
        sizes: numbers of images to which the line was fitted.
        values: distances at those sizes.
    """

    value: float
    fit_error: float
    slope: float
    sizes: tuple[int, ...]
    values: tuple[float, ...]


def frechet_infinity(
    features: Features, reference: Moments, *, num_sizes: int = 15, min_size: int | None = None, seed: int = 0
) -> Extrapolation:
    """Frechet distance of features [N, D] extrapolated to infinite N (arXiv 1911.07023, section 4).

    A line in 1/N is fitted to the distances of random subsets. The bias of the reference, about c/M, remains.

    Args:
        features: [N, D].
        reference: moments of the real images.
        num_sizes: number of subset sizes, evenly spaced from `min_size` to N.
        min_size: smallest subset; by default the larger of N/10 and min(2 D, N/2), because the distance is not linear
            in 1/N below 2 D.
        seed: seed of the random subsets.
    """
    matrix = as_matrix(features)
    num_images, feature_dim = matrix.shape
    smallest = min_size or max(num_images // 10, min(2 * feature_dim, num_images // 2))
    generator = np.random.Generator(np.random.Philox(seed))
    sizes = np.unique(np.linspace(smallest, num_images, num_sizes).round().astype(int))
    subsets = [np.sort(generator.choice(num_images, size, replace=False)) for size in sizes]
    values = np.array([frechet_from_moments(Moments.of(matrix[rows]), reference) for rows in subsets])
    design = np.stack([np.ones(len(sizes)), 1 / sizes], axis=1)
    coefficients = np.linalg.lstsq(design, values, rcond=None)[0]
    residual = values - design @ coefficients
    variance = np.linalg.inv(design.T @ design)[0, 0] * (residual @ residual) / max(len(sizes) - 2, 1)
    intercept, slope = map(float, coefficients)
    return Extrapolation(intercept, float(variance**0.5), slope, tuple(map(int, sizes)), tuple(map(float, values)))


def frechet_influence(a: Features, b: Features, moments_b: Moments | None = None) -> tuple[float, Array, Array]:
    """The Frechet distance and the influence of each image on it.

    An influence is the derivative of the distance with respect to the weight of the image in its set (Hampel 1974), so the
    squared standard error of the distance is var(influence_a) / N + var(influence_b) / M. The derivative with respect to
    the mean of `a` is 2 (mean_a - mean_b). With respect to its covariance it is I - T, where T is the optimal transport map
    from a's Gaussian to b's (T A T = B). For `b` the inverse map is used.

    Args:
        a: features [N, D].
        b: features [M, D].
        moments_b: `Moments.of(b)`, if already computed.

    Returns:
        The distance, the influences of the images of `a`, [N], and those of `b`, [M].
    """
    features_a, features_b = as_matrix(a), as_matrix(b)
    module = array_module(features_a)
    moments_a, moments_b = Moments.of(features_a), moments_b or Moments.of(features_b)
    squares, axes = _positive_eigh(moments_b.root @ moments_a.covariance @ moments_b.root.T)
    singular = module.sqrt(squares)
    offset = moments_a.mean - moments_b.mean
    value = offset @ offset + moments_a.covariance.trace() + moments_b.covariance.trace() - 2 * singular.sum()

    to_b = (axes / module.sqrt(singular)).T @ moments_b.root  # to_b' to_b = T
    to_a = (to_b @ moments_a.covariance) / singular[:, None]  # to_a' to_a = the inverse map

    def influence(centred: Any, transport: Any, slope: Any) -> Array:
        raw = centred @ slope + module.square(centred).sum(1) - module.square(centred @ transport.T).sum(1)
        return to_numpy(raw - raw.mean())

    influence_a = influence(features_a - moments_a.mean, to_b, 2 * offset)
    influence_b = influence(features_b - moments_b.mean, to_a, -2 * offset)
    return float(value), influence_a, influence_b


def _positive_eigh(matrix: Any) -> tuple[Any, Any]:
    """Eigenvalues [r] above rounding error and their vectors [D, r] of a symmetric positive semi-definite [D, D]."""
    values, vectors = array_module(matrix).linalg.eigh((matrix + matrix.T) / 2)
    rank = len(_above_rounding_error(values))
    return values[len(values) - rank :], vectors[:, len(values) - rank :]


def _above_rounding_error(ascending: Any) -> Any:
    """Those of the ascending eigenvalues that exceed rounding error."""
    largest = float(ascending[-1]) if len(ascending) else 0.0
    return ascending[ascending > max(largest, 0.0) * len(ascending) * np.finfo(np.float64).eps]
