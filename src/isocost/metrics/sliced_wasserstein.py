"""Monge Inception Distance: the sliced Wasserstein distance between two sets of features (arXiv 2605.06797).

Shapes: N, M images of the two sets, n = min(N, M), D features per image, U directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from isocost.metrics.arrays import Array, Features, as_matrix, to_numpy

NUM_DIRECTIONS, SEED = 1000, 2020
"""As in torch-fidelity, whose values these are; the paper recommends 100 to 1,000 directions."""
FACTOR_PER_FEATURE = 3.0
"""The distance is 3 D times the mean squared distance of the projections, so that it has the range of the FID."""
_BLOCK_DIRECTIONS = 100


@dataclass(frozen=True, eq=False)
class SlicedWasserstein:
    """A distance and the influence of every image on it.

    Attributes:
        value: 3 D times the squared 2-Wasserstein distance of the projections, averaged over directions; 0 for equal sets.
        influence: of the first set's images, float64 [N].
        reference_influence: of the second set's images, float64 [M].
    """

    value: float
    influence: Array
    reference_influence: Array


def sliced_wasserstein(
    a: Features, b: Features, *, num_directions: int = NUM_DIRECTIONS, seed: int = SEED
) -> SlicedWasserstein:
    """The Monge Inception Distance of features, as torch-fidelity computes it (`metric_mind.py` of version 0.5).

    Both sets are projected on random directions. In one dimension the best transport pairs the sorted values. If the sets
    differ in size, a random subset of the larger one takes part, drawn with the same seed. The estimate is biased up, as the
    Fréchet distance is: compare values at equal n.

    The influence of an image is the derivative of the distance with respect to its weight: the dual potential of the
    transport along each direction, averaged over directions. Images outside the subset have influence 0.

    Args:
        a: features [N, D].
        b: features [M, D].
        num_directions: U.
        seed: seed of directions and subset.

    Raises:
        ValueError: the sets differ in D, or one has fewer than two images.
    """
    left, right = (torch.as_tensor(as_matrix(features)) for features in (a, b))
    num_images, dim = min(len(left), len(right)), left.shape[1]
    if right.shape[1] != dim or num_images < 2:
        raise ValueError(f"two sets of two or more images are needed, not {list(left.shape)} and {list(right.shape)}")
    generator = torch.Generator().manual_seed(seed)
    subsets = [_subset(len(features), num_images, generator) for features in (left, right)]
    directions = torch.randn(num_directions, dim, generator=generator, dtype=torch.float32)
    directions = (directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-12)).to(left)
    total, potentials = 0.0, [left.new_zeros(num_images), left.new_zeros(num_images)]
    for block in directions.split(_BLOCK_DIRECTIONS):
        (x, x_order), (y, y_order) = (
            (features[subset.to(features.device)] @ block.T).sort(dim=0)
            for features, subset in zip((left, right), subsets, strict=True)
        )
        total += float((x - y).square().sum())
        for potential, order, dual in zip(potentials, (x_order, y_order), (_potentials(x, y), _potentials(y, x)), strict=True):
            potential += torch.zeros_like(dual).scatter_(0, order, dual).sum(dim=1)
    factor = FACTOR_PER_FEATURE * dim
    influences = [
        _spread(potential * (factor / num_directions), subset, len(features))
        for potential, subset, features in zip(potentials, subsets, (left, right), strict=True)
    ]
    return SlicedWasserstein(factor * total / (num_images * num_directions), *influences)


def _subset(num_all: int, num_images: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(num_all, generator=generator)[:num_images] if num_all > num_images else torch.arange(num_all)


def _potentials(x: Tensor, y: Tensor) -> Tensor:
    """Dual potential of every x for the transport of sorted x [n, U] to sorted y [n, U] at squared cost; mean 0.

    Between neighbours it rises by an amount between the costs of moving both to the lower and both to the upper target;
    the middle is taken.
    """
    to_lower = (x[1:] - y[:-1]).square() - (x[:-1] - y[:-1]).square()
    to_upper = (x[1:] - y[1:]).square() - (x[:-1] - y[1:]).square()
    potential = torch.cat([torch.zeros_like(x[:1]), ((to_lower + to_upper) / 2).cumsum(dim=0)])
    return potential - potential.mean(dim=0)


def _spread(potential: Tensor, subset: Tensor, num_all: int) -> Array:
    """Influences of all images from those of the subset: the same standard error, 0 outside."""
    influence = np.zeros(num_all)
    influence[subset.numpy()] = to_numpy(potential) * (num_all / len(subset))
    return influence
