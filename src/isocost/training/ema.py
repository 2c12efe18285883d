"""Exponential moving averages of a network's weights with several half-lives."""

from __future__ import annotations

import torch
from torch import Tensor

_RAMP_UP = 0.1


class Ema:
    """Moving averages of tensors, with half-lives in images. A sharded tensor has a sharded average.

    Early in training the half-life is limited to a tenth of the images seen (ramp-up of EDM2, arXiv 2312.02696, with 0.1).
    """

    def __init__(self, tensors: list[Tensor], half_lives: tuple[int, ...]) -> None:
        self.tensors, self.half_lives = tensors, half_lives
        self.averages = [[tensor.detach().clone() for tensor in tensors] for _ in half_lives]

    def update(self, images_seen: int, batch_size: int) -> None:
        """Move every average towards the tensors after a step of `batch_size` images."""
        for half_life, average in zip(self.half_lives, self.averages, strict=True):
            current_half_life = max(min(half_life, images_seen * _RAMP_UP), 1e-8)
            torch._foreach_lerp_(average, self.tensors, 1 - 0.5 ** (batch_size / current_half_life))
