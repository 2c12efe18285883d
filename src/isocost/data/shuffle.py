"""The order of images in a training: the index of the n-th image is a pure function of (seed, n).

The order is the same for all sizes of a family, for any number of processes and after every resume. It needs no list of images,
so an epoch of 600M images takes no more memory than an epoch of ten.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_NUM_ROUNDS = 12
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def shuffled_indices(seed: int, first: int, count: int, num_images: int) -> Tensor:
    """Return the data set indices of the images `first`, ..., `first + count - 1` of a training, int64 [count].

    Each epoch has its own permutation: a Feistel network over the smallest power of four that is at least `num_images`, applied
    again to values outside the data set until they are inside (Black & Rogaway, CT-RSA 2002, "cycle-walking cipher").

    Args:
        num_images: images of the data set.
    """
    positions = np.arange(first, first + count, dtype=np.uint64)
    epochs, positions_in_epoch = positions // np.uint64(num_images), positions % np.uint64(num_images)
    half_bits = max(1, -(-(num_images - 1).bit_length() // 2))
    keys = _mix(epochs + _mix(np.full_like(epochs, seed % 2**64)))
    indices = _feistel(positions_in_epoch, keys, half_bits)
    while (outside := indices >= num_images).any():
        indices[outside] = _feistel(indices[outside], keys[outside], half_bits)
    return torch.from_numpy(indices.astype(np.int64))


def _feistel(values: NDArray[np.uint64], keys: NDArray[np.uint64], half_bits: int) -> NDArray[np.uint64]:
    bits, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left, right = values >> bits, values & mask
    for number in range(_NUM_ROUNDS):
        hashed = _mix(keys + np.uint64(number * _GOLDEN % 2**64) + right)
        left, right = right, left ^ ((hashed >> np.uint64(20)) & mask)
    return (left << bits) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al., OOPSLA 2014)."""
    values = values + np.uint64(_GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * _MULTIPLIERS[0]
    values = (values ^ (values >> np.uint64(27))) * _MULTIPLIERS[1]
    return values ^ (values >> np.uint64(31))
