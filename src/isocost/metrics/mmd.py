"""Squared maximum mean discrepancy between two sets of features, with a polynomial or a Gaussian kernel.

Shapes: N, M images of the two sets, D features per image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from isocost.metrics.arrays import Features, array_module, as_matrix, unit_rows

_BLOCK_ROWS = 1024


@dataclass(frozen=True)
class Kernel:
    """A kernel on the features of two images.

    Attributes:
        name: name in cache keys.
        gram: maps features [N, D] and [M, D] to k(x, y), [N, M].
        diagonal: maps features [N, D] to k(x, x), [N].
        factor: the squared MMD is reported multiplied by it.
    """

    name: str
    gram: Callable[[Any, Any], Any]
    diagonal: Callable[[Any], Any]
    factor: float = 1.0


def polynomial_kernel(a: Features, b: Features) -> Any:
    """(x.y / D + 1)³ for features [N, D] and [M, D]: [N, M] (arXiv 1801.01401, section 4)."""
    left, right = as_matrix(a), as_matrix(b)
    kernel = left @ right.T
    kernel /= left.shape[1]
    kernel += 1
    return kernel * kernel * kernel


def gaussian_kernel(a: Features, b: Features, *, deviation: float = 10.0) -> Any:
    """exp(-|x - y|² / (2 deviation²)) of the unit vectors along features [N, D] and [M, D]: [N, M] (arXiv 2401.09603)."""
    left, right = unit_rows(as_matrix(a)), unit_rows(as_matrix(b))
    return array_module(left).exp((left @ right.T - 1) / deviation**2)


def _polynomial_diagonal(features: Any) -> Any:
    return ((features * features).sum(1) / features.shape[1] + 1) ** 3


POLYNOMIAL = Kernel("polynomial", polynomial_kernel, _polynomial_diagonal)
GAUSSIAN = Kernel("gaussian", gaussian_kernel, lambda features: features[:, 0] * 0 + 1, factor=1000.0)
"""The kernel of CMMD: deviation 10, distance times 1000."""


def squared_mmd(a: Features, b: Features, kernel: Kernel = POLYNOMIAL) -> float:
    """Unbiased squared maximum mean discrepancy of features [N, D] and [M, D], times the kernel's factor.

    This is the U-statistic over the full sets (arXiv 1801.01401, eq. 4); no subsets are drawn. Its mean does not depend on
    N or M. Values below zero are correct if the distributions are alike.
    """
    left, right = as_matrix(a), as_matrix(b)
    within = _mean_within(left, kernel) + _mean_within(right, kernel)
    return kernel.factor * (within - 2 * _mean_across(left, right, kernel))


def _mean_within(a: Any, kernel: Kernel) -> float:
    """Mean kernel over pairs of different images of one set."""
    total = _mean_across(a, a, kernel) * len(a) ** 2 - float(kernel.diagonal(a).sum())
    return total / (len(a) * (len(a) - 1))


def _mean_across(a: Any, b: Any, kernel: Kernel) -> float:
    """Mean kernel over all pairs of an image of `a` and an image of `b`."""
    total = sum(float(kernel.gram(a[start : start + _BLOCK_ROWS], b).sum()) for start in range(0, len(a), _BLOCK_ROWS))
    return total / (len(a) * len(b))
