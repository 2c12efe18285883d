"""Which image is the n-th image of a training: a pure function of (seed, n), found without listing the others.

The same for every size of a family, every number of processes and after every resume; a pass over 600M images takes no
more memory than one over ten.

Shapes: B images.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_NUM_ROUNDS = 12
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def shuffled_indices(seed: int, first: int, count: int, num_images: int) -> Tensor:
    """Which images are the images `first`, ..., `first + count - 1` of a training: int64 [count].

    Each pass over the data is a permutation of its own: a Feistel network over the least square of a power of two that
    holds `num_images`, walked on from where it leaves them (Black & Rogaway, CT-RSA 2002, "cycle-walking cipher").
    """
    positions = np.arange(first, first + count, dtype=np.uint64)
    passes, places = positions // np.uint64(num_images), positions % np.uint64(num_images)
    half_bits = max(1, -(-(num_images - 1).bit_length() // 2))
    keys = _mixed(passes + _mixed(np.full_like(passes, seed % 2**64)))
    chosen = _feistel(places, keys, half_bits)
    while (outside := chosen >= num_images).any():
        chosen[outside] = _feistel(chosen[outside], keys[outside], half_bits)
    return torch.from_numpy(chosen.astype(np.int64))


def _feistel(values: NDArray[np.uint64], keys: NDArray[np.uint64], half_bits: int) -> NDArray[np.uint64]:
    bits, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left, right = values >> bits, values & mask
    for number in range(_NUM_ROUNDS):
        turned = _mixed(keys + np.uint64(number * _GOLDEN % 2**64) + right)
        left, right = right, left ^ ((turned >> np.uint64(20)) & mask)
    return (left << bits) | right


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al., OOPSLA 2014)."""
    values = values + np.uint64(_GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * _MIX[0]
    values = (values ^ (values >> np.uint64(27))) * _MIX[1]
    return values ^ (values >> np.uint64(31))
