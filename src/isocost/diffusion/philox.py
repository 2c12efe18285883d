"""Counter-based Gaussian noise (Philox 4x32), keyed by seed, sample index and evaluation.

Shape letters: B samples, C H W latent.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

INITIAL_NOISE = 0
"""The evaluation number of an image's initial noise; solver step i (from 0) adds the noise of evaluation i + 1."""

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10


def philox_normal(
    seed: int | Tensor,
    sample_indices: Tensor,
    evaluation: int | Tensor,
    shape: tuple[int, int, int],
    device: torch.device | str,
) -> Tensor:
    """Standard normal noise as a pure function of (seed, sample index, evaluation, element).

    It does not depend on the other samples of the call. Philox4x32-10 with key = the seed's two 32-bit words (low, high) and
    counter = (sample index low, sample index high, evaluation, block). The four words of block k give elements 4k to 4k + 3
    of the latent in C order by Box-Muller: (cos, sin) of words (0, 1), then of words (2, 3).

    Args:
        seed: int64, a scalar or [B].
        sample_indices: int64 [B].
        evaluation: int64 in [0, 2^32), a scalar or [B]. `INITIAL_NOISE` (0) is the initial noise; solver step i adds i + 1.
        shape: (C, H, W).
        device: computes the numbers. Devices agree up to float32 rounding.

    Returns:
        float32 [B, C, H, W].
    """
    ids = sample_indices.to(device)
    seeds, evaluations = _broadcast(seed, ids), _broadcast(evaluation, ids)
    num_elements = math.prod(shape)
    blocks = torch.arange(-(-num_elements // 4), device=device).expand(len(ids), -1)
    per_sample = torch.stack([ids & _MASK, (ids >> 32) & _MASK, evaluations])[:, :, None].expand(-1, -1, blocks.shape[1])
    key = torch.stack([seeds & _MASK, (seeds >> 32) & _MASK])[:, :, None]
    words = philox4x32(torch.cat([per_sample, blocks[None]]), key)
    uniform = (words.double() + 0.5).mul_(2.0**-32)
    radius = uniform[0::2].log().mul_(-2).sqrt_()
    angle = uniform[1::2].mul_(2 * math.pi)
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return pairs.flatten(0, 1).permute(1, 2, 0).flatten(1)[:, :num_elements].float().reshape(-1, *shape)


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10, a counter-based generator (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3").

    Args:
        counter: int64 [4, ...] of words in [0, 2^32).
        key: int64 [2, ...] of words in [0, 2^32), broadcast against the counter.

    Returns:
        int64 [4, ...] of random words in [0, 2^32).
    """
    # Signed products wrap modulo 2^64, so they have the bits of the unsigned products; the mask drops the shifted-in sign bits.
    shape = (2,) + (1,) * (counter.ndim - 1)
    multipliers, key_steps = (words.view(shape) for words in _philox_constants(counter.device))
    even, odd = counter[0::2], counter[1::2]
    for _ in range(_NUM_ROUNDS):
        product = (even * multipliers).flip(0)
        even = (product >> 32).bitwise_xor_(odd).bitwise_xor_(key).bitwise_and_(_MASK)
        odd = product.bitwise_and_(_MASK)
        key = (key + key_steps) & _MASK
    return torch.stack([even, odd], dim=1).flatten(0, 1)


@lru_cache(maxsize=16)
def _philox_constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """Multipliers and key steps, each int64 [2]. Copied to a device once, because a copy waits for its queue."""
    with torch.inference_mode(False):
        return torch.tensor(_MULTIPLIERS, device=device), torch.tensor(_KEY_STEPS, device=device)


def _broadcast(value: int | Tensor, ids: Tensor) -> Tensor:
    """A scalar or one value per id, as int64 [B] on the device of `ids`."""
    if isinstance(value, int):
        return torch.full_like(ids, value)
    return value.to(ids.device, torch.int64).expand(len(ids))
