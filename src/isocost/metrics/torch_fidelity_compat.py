"""KID, precision, recall and Inception score as torch-fidelity computes them, with its subsets, splits and seeds.

These functions serve comparisons with published numbers. The scores of isocost use every image and draw no subsets.

Shapes: N, M images of the two sets, D features, L logits.
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
    """Mean and standard deviation over subsets or splits; the variance is divided by their number, not by one less."""

    mean: float
    std: float


def kid(
    generated: ArrayLike, real: ArrayLike, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = SEED
) -> MeanAndStd:
    """Kernel Inception distance over random subsets of features [N, D] and [M, D], drawn as torch-fidelity 0.4 does.

    Raises:
        ValueError: a set is smaller than a subset.
    """
    generated_features, real_features = np.asarray(generated), np.asarray(real)
    num_generated, num_real = len(generated_features), len(real_features)
    if min(num_generated, num_real) < subset_size:
        raise ValueError(f"subsets of {subset_size} cannot be drawn from {num_generated} and {num_real} images")
    random = np.random.RandomState(seed)
    values = []
    for _ in range(num_subsets):
        generated_subset = generated_features[random.choice(num_generated, subset_size, replace=False)]
        real_subset = real_features[random.choice(num_real, subset_size, replace=False)]
        values.append(squared_mmd(generated_subset, real_subset))
    return MeanAndStd(float(np.mean(values)), float(np.std(values)))


def inception_score_of_splits(logits: ArrayLike, *, num_splits: int = 10, shuffle: bool = True, seed: int = SEED) -> MeanAndStd:
    """Inception score over `num_splits` parts of logits [N, L], shuffled as torch-fidelity 0.4 does."""
    matrix = np.asarray(logits)
    if shuffle:
        matrix = matrix[np.random.RandomState(seed).permutation(len(matrix))]
    bounds = [split * len(matrix) // num_splits for split in range(num_splits + 1)]
    values = [inception_score(matrix[low:high])[0] for low, high in pairwise(bounds)]
    return MeanAndStd(float(np.mean(values)), float(np.std(values)))


def precision_recall(generated: ArrayLike, real: ArrayLike, *, k: int = 3) -> tuple[float, float]:
    """Precision and recall of features [N, D] against [M, D], counted as torch-fidelity 0.4 does."""
    prdc = compute_prdc(generated, real, k=k)
    return float(prdc.precision.mean()), float(prdc.recall.mean())
