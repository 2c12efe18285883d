"""Maximum mean discrepancy between two sets of features, with a polynomial or a Gaussian kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from isocost.metrics.arrays import Features, _matrix, _space, _unit

_BLOCK_ROWS = 1024


# --- kernel -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """A kernel between images' features, and the factor that its distance is reported with.

    `between` maps features [N, D] and [M, D] to [N, M]; `own` maps [N, D] to k(x, x), [N].
    """

    name: str
    between: Callable[[Any, Any], Any]
    own: Callable[[Any], Any]
    factor: float = 1.0


def polynomial_kernel(a: Features, b: Features) -> Any:
    """(x.y / D + 1)³ for features [N, D] and [M, D]: [N, M] (arXiv 1801.01401, section 4)."""
    left, right = _matrix(a), _matrix(b)
    kernel = left @ right.T
    kernel /= left.shape[1]
    kernel += 1
    return kernel * kernel * kernel


def gaussian_kernel(a: Features, b: Features, *, deviation: float = 10.0) -> Any:
    """exp(-|x - y|² / (2 deviation²)) of unit vectors along features [N, D] and [M, D]: [N, M] (arXiv 2401.09603)."""
    left, right = _unit(_matrix(a)), _unit(_matrix(b))
    return _space(left).exp((left @ right.T - 1) / deviation**2)


def _own_polynomial(features: Any) -> Any:
    return ((features * features).sum(1) / features.shape[1] + 1) ** 3


POLYNOMIAL = Kernel("polynomial", polynomial_kernel, _own_polynomial)
GAUSSIAN = Kernel("gaussian", gaussian_kernel, lambda features: features[:, 0] * 0 + 1, factor=1000.0)
"""The kernel of CMMD: deviation 10, distance times 1000."""


def squared_mmd(a: Features, b: Features, kernel: Kernel = POLYNOMIAL) -> float:
    """Unbiased squared maximum mean discrepancy of features [N, D] and [M, D], times the kernel's factor.

    The U-statistic over the full sets (arXiv 1801.01401, eq. 4; no subsets are drawn), so the mean does not depend on N
    or M, and values below zero are right where the sets are alike.
    """
    left, right = _matrix(a), _matrix(b)
    within = _mean_within(left, kernel) + _mean_within(right, kernel)
    return kernel.factor * (within - 2 * _mean_across(left, right, kernel))


def _mean_within(a: Any, kernel: Kernel) -> float:
    total = _mean_across(a, a, kernel) * len(a) ** 2 - float(kernel.own(a).sum())
    return total / (len(a) * (len(a) - 1))


def _mean_across(a: Any, b: Any, kernel: Kernel) -> float:
    total = sum(float(kernel.between(a[start : start + _BLOCK_ROWS], b).sum()) for start in range(0, len(a), _BLOCK_ROWS))
    return total / (len(a) * len(b))
