"""Distances between sets of features: pure functions in float64, on NumPy arrays or on tensors of any device.

Legend: N, M images of the two sets, D features of an image, r the rank of a covariance.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from isocost.metrics.arrays import Array, Features, _matrix, _space, _to_numpy

# --- Frechet ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean [D] and covariance [D, D] (divided by N - 1) of features: all that the Frechet distance sees of a set."""

    mean: Any
    covariance: Any

    @classmethod
    def of(cls, features: Features) -> Moments:
        """Moments of features [N, D], N at least 2."""
        matrix = _matrix(features)
        mean = matrix.mean(0)
        centred = matrix - mean
        moments = cls(mean, centred.T @ centred / (len(matrix) - 1))
        if len(matrix) <= matrix.shape[1]:
            # Fewer images than features: the images themselves are the root, and no decomposition is needed.
            moments.__dict__["root"] = centred / (len(matrix) - 1) ** 0.5
        return moments

    @cached_property
    def root(self) -> Any:
        """R [r, D] with R'R = covariance, by Cholesky, or by eigenvectors where it is singular. Computed once, then kept."""
        space = _space(self.covariance)
        try:
            return space.linalg.cholesky(self.covariance).T
        except (np.linalg.LinAlgError, torch.linalg.LinAlgError):
            variances, directions = _positive_eigh(self.covariance)
            return (directions * space.sqrt(variances)).T


def frechet_distance(a: Features, b: Features) -> float:
    """Squared Frechet distance of Gaussians fitted to features [N, D] and [M, D] (arXiv 1706.08500, eq. 6).

    Biased: at N images the value lies above the value at infinity by about c/N (arXiv 1911.07023), so compare at equal
    N only, or see `frechet_infinity`. Sets smaller than D are allowed.
    """
    return frechet_from_moments(Moments.of(a), Moments.of(b))


def frechet_from_moments(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|² + tr A + tr B - 2 tr (R A R')^½ with R'R = B, by symmetric eigenvalues. b's root is kept."""
    product = b.root @ a.covariance @ b.root.T
    spectrum = _above_rounding(_space(product).linalg.eigvalsh((product + product.T) / 2))
    offset = a.mean - b.mean
    traces = a.covariance.trace() + b.covariance.trace()
    return float(offset @ offset + traces - 2 * (spectrum**0.5).sum())


@dataclass(frozen=True)
class Extrapolation:
    """A distance at infinitely many generated images: the intercept of a line in 1/N, with its standard error of fit."""

    value: float
    fit_error: float
    slope: float
    sizes: tuple[int, ...]
    values: tuple[float, ...]


def frechet_infinity(
    features: Features, reference: Moments, *, num_sizes: int = 15, least: int | None = None, seed: int = 0
) -> Extrapolation:
    """Frechet distance of features [N, D] extrapolated to N at infinity (arXiv 1911.07023, section 4).

    The distance of `num_sizes` random subsets, sizes spread evenly from `least` to N, is fitted by a line in 1/N. `least` is
    N/10, but twice the features where N allows it: below, the law is no line. The reference's own bias, about c/M, stays.
    """
    matrix = _matrix(features)
    num, width = matrix.shape
    smallest = least or max(num // 10, min(2 * width, num // 2))
    generator = np.random.Generator(np.random.Philox(seed))
    sizes = np.unique(np.linspace(smallest, num, num_sizes).round().astype(int))
    chosen = [np.sort(generator.choice(num, size, replace=False)) for size in sizes]
    values = np.array([frechet_from_moments(Moments.of(matrix[rows]), reference) for rows in chosen])
    design = np.stack([np.ones(len(sizes)), 1 / sizes], axis=1)
    solved = np.linalg.lstsq(design, values, rcond=None)[0]
    residual = values - design @ solved
    spread = np.linalg.inv(design.T @ design)[0, 0] * (residual @ residual) / max(len(sizes) - 2, 1)
    return Extrapolation(
        float(solved[0]), float(spread**0.5), float(solved[1]), tuple(map(int, sizes)), tuple(map(float, values))
    )


def frechet_influence(a: Features, b: Features, moments_b: Moments | None = None) -> tuple[float, Array, Array]:
    """The Frechet distance with what each image adds to it to first order: (distance, influence_a [N], influence_b [M]).

    Each influence is the derivative of the distance when the image's weight in its set rises (Hampel 1974), so
    var(influence_a) / N + var(influence_b) / M is the distance's squared standard error. For the mean the derivative is
    2 (mean_a - mean_b); for the covariance it is I - T with T the optimal transport map from a's Gaussian to b's
    (T A T = B); b's side is the same with the inverse map. `moments_b` saves b's decomposition where it is at hand.
    """
    features_a, features_b = _matrix(a), _matrix(b)
    space = _space(features_a)
    of_a, of_b = Moments.of(features_a), moments_b or Moments.of(features_b)
    squares, axes = _positive_eigh(of_b.root @ of_a.covariance @ of_b.root.T)
    singular = space.sqrt(squares)
    offset = of_a.mean - of_b.mean
    value = offset @ offset + of_a.covariance.trace() + of_b.covariance.trace() - 2 * singular.sum()

    to_b = (axes / space.sqrt(singular)).T @ of_b.root  # to_b' to_b = T
    to_a = (to_b @ of_a.covariance) / singular[:, None]  # to_a' to_a = the inverse map

    def influence(centred: Any, transport: Any, slope: Any) -> Array:
        raw = centred @ slope + space.square(centred).sum(1) - space.square(centred @ transport.T).sum(1)
        return _to_numpy(raw - raw.mean())

    influence_a = influence(features_a - of_a.mean, to_b, 2 * offset)
    influence_b = influence(features_b - of_b.mean, to_a, -2 * offset)
    return float(value), influence_a, influence_b


def _positive_eigh(matrix: Any) -> tuple[Any, Any]:
    """Eigenvalues [r] above rounding error and their vectors [D, r] of a symmetric positive semi-definite [D, D]."""
    values, vectors = _space(matrix).linalg.eigh((matrix + matrix.T) / 2)
    kept = len(_above_rounding(values))
    return values[len(values) - kept :], vectors[:, len(values) - kept :]


def _above_rounding(rising: Any) -> Any:
    """The eigenvalues, in rising order, that are more than rounding error."""
    largest = float(rising[-1]) if len(rising) else 0.0
    return rising[rising > max(largest, 0.0) * len(rising) * np.finfo(np.float64).eps]
