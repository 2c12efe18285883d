"""Exponential moving averages of a network's weights, several half-lives at once."""

from __future__ import annotations

import torch
from torch import Tensor

_RAMP = 0.1


class Ema:
    """Averages of tensors with half-lives in images, held as the tensors are: whole, or this process's pieces.

    While few images were seen a half-life is a tenth of them (the ramp-up of EDM2, arXiv 2312.02696, with 0.1).
    """

    def __init__(self, tensors: list[Tensor], half_lives: tuple[int, ...]) -> None:
        self.tensors, self.half_lives = tensors, half_lives
        self.averages = [[tensor.detach().clone() for tensor in tensors] for _ in half_lives]

    def update(self, images_seen: int, batch_size: int) -> None:
        """Move every average towards the tensors after a step of `batch_size` images."""
        for half_life, average in zip(self.half_lives, self.averages, strict=True):
            span = max(min(half_life, images_seen * _RAMP), 1e-8)
            torch._foreach_lerp_(average, self.tensors, 1 - 0.5 ** (batch_size / span))
