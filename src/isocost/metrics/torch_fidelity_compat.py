"""torch-fidelity's numbers: KID, precision and recall, and the Inception score with its subsets, splits and seeds.

For comparing with what others have published. isocost's own scores use every image and draw no subsets.

Legend: N, M images of the two sets, D features, L logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from isocost.metrics.image_similarity import inception_score
from isocost.metrics.mmd import squared_mmd
from isocost.metrics.precision_recall import compute_prdc

SEED = 2020
"""torch-fidelity's `rng_seed`."""


@dataclass(frozen=True)
class MeanAndStd:
    """Mean and standard deviation (divided by their number) over subsets or splits."""

    mean: float
    std: float


def kid(
    generated: ArrayLike, real: ArrayLike, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = SEED
) -> MeanAndStd:
    """Kernel Inception distance over random subsets of features [N, D] and [M, D], as torch-fidelity 0.4 draws them.

    Raises:
        ValueError: a set is smaller than a subset.
    """
    one, other = np.asarray(generated), np.asarray(real)
    if min(len(one), len(other)) < subset_size:
        raise ValueError(f"subsets of {subset_size} cannot be drawn from {len(one)} and {len(other)} images")
    draws = np.random.RandomState(seed)
    values = []
    for _ in range(num_subsets):
        left = one[draws.choice(len(one), subset_size, replace=False)]
        right = other[draws.choice(len(other), subset_size, replace=False)]
        values.append(squared_mmd(left, right))
    return MeanAndStd(float(np.mean(values)), float(np.std(values)))


def inception_score_of_splits(logits: ArrayLike, *, num_splits: int = 10, shuffle: bool = True, seed: int = SEED) -> MeanAndStd:
    """Inception score of `num_splits` parts of logits [N, L], shuffled as torch-fidelity 0.4 does."""
    matrix = np.asarray(logits)
    if shuffle:
        matrix = matrix[np.random.RandomState(seed).permutation(len(matrix))]
    bounds = [part * len(matrix) // num_splits for part in range(num_splits + 1)]
    values = [inception_score(matrix[low:high])[0] for low, high in pairwise(bounds)]
    return MeanAndStd(float(np.mean(values)), float(np.std(values)))


def precision_recall(generated: ArrayLike, real: ArrayLike, *, neighbour: int = 3) -> tuple[float, float]:
    """Precision and recall of features [N, D] against [M, D], as torch-fidelity 0.4 counts them."""
    found = compute_prdc(generated, real, neighbour=neighbour)
    return float(found.precision.mean()), float(found.recall.mean())
