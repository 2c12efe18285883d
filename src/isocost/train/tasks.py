"""What is trained: a task gives the batch after so many images, and the loss of a network on it.

Shapes: B batch, C latent channels, L latent side, T tokens, D width of the caption states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from isocost.data.cache import LatentCache
from isocost.data.codec import TextCodec
from isocost.diffusion.noise import Schedule
from isocost.study import TrainSpec


@dataclass(frozen=True)
class Batch:
    """Noisy latents [B, C, L, L], timesteps int64 [B], caption states [B, T, D], and the network's target [B, C, L, L]."""

    noisy: Tensor
    timesteps: Tensor
    states: Tensor
    target: Tensor

    def part(self, rank: int, num_parts: int) -> Batch:
        """Every `num_parts`-th row: one process's share of the batch."""
        share = slice(rank, None, num_parts)
        return Batch(self.noisy[share], self.timesteps[share], self.states[share], self.target[share])

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        return Batch(self.noisy.to(device), self.timesteps.to(device), self.states.to(device), self.target.to(device))


class Task(Protocol):
    """One kind of training."""

    def batch(self, images_seen: int) -> Batch:
        """The batch that follows `images_seen` images: a pure function."""

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Scalar loss, a mean over the batch."""


class TextToImage:
    """Predict noise, velocity or clean latent from a noisy latent and its caption (arXiv 2006.11239, 2202.00512)."""

    def __init__(self, spec: TrainSpec, cache: LatentCache, schedule: Schedule, text: TextCodec | None = None) -> None:
        """`text` encodes captions in each step; it is needed only where the cache holds no states."""
        self.spec, self.cache, self.schedule, self.text = spec, cache, schedule, text

    def batch(self, images_seen: int) -> Batch:
        spec = self.spec
        latents, captions, generator = self.cache.batch(spec.seed, images_seen, spec.batch_size, spec.caption_dropout)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(self.schedule.num_timesteps, (len(latents),), generator=generator)
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        target = self.schedule.training_target(spec.prediction, latents, noise, timesteps)
        return Batch(noisy, timesteps, self._states(captions), target)

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        predicted = network(batch.noisy, batch.timesteps, batch.states).sample
        return (predicted.float() - batch.target).square().mean()

    def _states(self, captions: Tensor) -> Tensor:
        if self.cache.states is not None:
            return self.cache.states[captions].float()
        assert self.text is not None, "a cache without states needs a text encoder"
        return self.text.states(self.cache.token_ids[captions].numpy())
