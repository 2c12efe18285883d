"""Precision, recall, density and coverage: whose images lie within reach of whose nearest neighbours.

Legend: N generated images, M real images, D features of an image, k which neighbour sets the reach.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Array = NDArray[np.float64]
_BLOCK_ROWS = 1024


@dataclass(frozen=True, eq=False)
class PRDC:
    """What each image says; the means over images are precision, recall, density and coverage.

    Attributes:
        precision: [N], 1 where a generated image lies within reach of some real one (arXiv 1904.06991).
        recall: [M], 1 where a real image lies within reach of some generated one (arXiv 1904.06991).
        density: [N], real images within whose reach a generated one lies, divided by k (arXiv 2002.09797).
        coverage: [M], 1 where some generated image lies within reach of a real one (arXiv 2002.09797).
    """

    precision: Array
    recall: Array
    density: Array
    coverage: Array


def compute_prdc(
    generated: ArrayLike | Tensor, real: ArrayLike | Tensor, *, neighbour: int, radii_of_real: Tensor | None = None
) -> PRDC:
    """Neighbourhoods of generated [N, D] and real features [M, D]; an image reaches as far as its `neighbour`-th other one.

    Published with neighbour 3 for precision and recall and 5 for density and coverage. Distances are Euclidean, in float64,
    on the device of the features. `radii_of_real` saves the work on the real side where it is at hand.

    Raises:
        ValueError: a set has no `neighbour` other images.
    """
    one, other = _matrix(generated), _matrix(real)
    if min(len(one), len(other)) <= neighbour:
        raise ValueError(
            f"neighbour {neighbour} needs more than {neighbour} images on both sides, not {len(one)}, {len(other)}"
        )
    of_generated = radii(one, neighbour)
    of_real = radii(other, neighbour) if radii_of_real is None else radii_of_real.to(other.device)
    within_real = torch.zeros(len(one), device=one.device)
    found_by = torch.zeros(len(other), dtype=torch.bool, device=one.device)
    nearest = torch.full((len(other),), torch.inf, dtype=torch.float64, device=one.device)
    for start in range(0, len(one), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        apart = _pairwise_distances(one[rows], other)
        within_real[rows] = (apart <= of_real).sum(1).float()
        found_by |= (apart <= of_generated[rows, None]).any(0)
        nearest = torch.minimum(nearest, apart.min(0).values)
    return PRDC(
        *(
            numbers.double().cpu().numpy()
            for numbers in (within_real > 0, found_by, within_real / neighbour, nearest <= of_real)
        )
    )


def radii(features: ArrayLike | Tensor, neighbour: int) -> Tensor:
    """How far each image of features [N, D] reaches: to its `neighbour`-th other one, float64 [N]."""
    matrix = _matrix(features)
    # The nearest is the image itself.
    return torch.cat([_pairwise_distances(rows, matrix).kthvalue(neighbour + 1).values for rows in matrix.split(_BLOCK_ROWS)])


def _pairwise_distances(a: Tensor, b: Tensor) -> Tensor:
    """Distances of [N, D] and [M, D], [N, M], by matrix products: eight times as fast on a CPU, and equal to 1e-13."""
    return torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")


def _matrix(features: ArrayLike | Tensor) -> Tensor:
    matrix = (features if isinstance(features, Tensor) else torch.as_tensor(np.asarray(features))).double()
    if matrix.ndim != 2:
        raise ValueError(f"features must be [N, D], not {list(matrix.shape)}")
    return matrix
