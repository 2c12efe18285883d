"""Milliseconds of a batch of images, stage by stage, from captions to uint8 images in the host's memory.

A pass is what a caller waits for: tokenise and encode the captions, (super-resolution) encode the small images, denoise,
decode. It is run as it stands, and the stages are marks on the way, so they add up to the whole but for the marks themselves.
The network's calls are those of the engine: one call an evaluation, with a place for every pass of every image.

Shapes: B images of a batch, P passes of an evaluation, C L latent, T tokens, D width of the prompt embeddings, K width of their
keys and values, R resolution, S scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from isocost.data.degradations import encode_enlarged
from isocost.diffusion.solvers import SolverCoefficients
from isocost.errors import ConfigError
from isocost.models.autoencoder import Autoencoder
from isocost.models.checkpoint import CheckpointInfo
from isocost.models.text_encoder import TextEncoder
from isocost.sampling.denoiser import Denoiser
from isocost.sampling.engine import Engine
from isocost.sampling.generate import DECODE_BATCH, PromptEmbeds
from isocost.sampling.request import SampleRequest, SampleResult, num_passes
from isocost.utils.device import HostTimer, Timer

TEXT, ENCODER, DENOISER, DECODER, END_TO_END = "text", "encoder", "denoiser", "decoder", "whole"
NUM_WARM_UP = 3
MIN_REPEATS = 3

StageCallback = Callable[[str], None]
"""Called with a stage's name when it has ended."""
Work = Callable[[StageCallback], None]
"""A pass: does its stages in order and says when each has ended."""


# --- times ---


@dataclass(frozen=True)
class Summary:
    """Milliseconds of one stage: median, median absolute deviation from it, 90th percentile (linear between two times).

    `raw_ms` are all times in the order of the measurement, unrounded.
    """

    median_ms: float
    mad_ms: float
    p90_ms: float
    raw_ms: tuple[float, ...]

    @classmethod
    def of(cls, raw_ms: list[float]) -> Summary:
        """
        Raises:
            ConfigError: fewer than `MIN_REPEATS` times.
        """
        if len(raw_ms) < MIN_REPEATS:
            raise ConfigError(f"{len(raw_ms)} times: a median and its spread take at least {MIN_REPEATS}")
        values = np.array(raw_ms)
        median = float(np.median(values))
        deviation = float(np.median(np.abs(values - median)))
        return cls(median, deviation, float(np.percentile(values, 90)), tuple(raw_ms))


def time_pass(work: Work, clock: Timer, outer: Timer | None = None) -> dict[str, float]:
    """Milliseconds of each stage of one pass by `clock`, and of the whole by `outer`, the host's clock where None is given."""
    outer = outer or HostTimer()
    names: list[str] = []
    clock.wait()
    started = outer.record()
    snapshots = [clock.record()]

    def ended(stage: str) -> None:
        names.append(stage)
        snapshots.append(clock.record())

    work(ended)
    clock.wait()
    whole = outer.elapsed_ms(started, outer.record())
    stages = {name: clock.elapsed_ms(*ends) for name, ends in zip(names, pairwise(snapshots), strict=True)}
    return {**stages, END_TO_END: whole}


def time_passes(work: Work, clock: Timer, repeats: int, outer: Timer | None = None) -> dict[str, list[float]]:
    """Milliseconds of `repeats` passes, a list a stage and one of the whole."""
    passes = [time_pass(work, clock, outer) for _ in range(repeats)]
    return {stage: [one[stage] for one in passes] for stage in passes[0]}


# --- what is timed ---


class CallCounter:
    """A network as the engine calls it that counts: calls, and rows in them."""

    def __init__(self, network: Denoiser) -> None:
        self._denoise = network.denoise()
        self.num_calls = self.num_rows = 0

    def __call__(self, x: Tensor, timesteps: Tensor, states: Tensor, guidance: Tensor) -> Tensor:
        """As `Denoise`."""
        self.num_calls += 1
        self.num_rows += len(x)
        return self._denoise(x, timesteps, states, guidance)


class LoadedModel:
    """A checkpoint with all that an image takes, on one device.

    Text encoder and autoencoder compute in float32, as wherever images are made; the network in its own precision. The empty
    caption belongs to the checkpoint: it is encoded and projected here, once.
    """

    def __init__(self, info: CheckpointInfo, network: Denoiser, autoencoder: Autoencoder, text: TextEncoder) -> None:
        self.info, self.network, self.autoencoder, self.text_encoder = info, network, autoencoder, text
        self.null = network.project(PromptEmbeds.of((), text).null[None])[0]

    def passes(self, guidance: float) -> int:
        """Network passes of an evaluation."""
        return num_passes(guidance, self.network.embeds_guidance)


class BatchedPipeline:
    """A pass over a batch of B images; each has its own caption and, for super-resolution, its own small image.

    After a pass `finished` holds the rows in the order of their images, `images` is uint8 [B, 3, R, R] on the CPU, and
    `calls` has counted the network's calls of that pass alone.

    Raises:
        ConfigError: a size below 1, or guidance that no row takes.
    """

    def __init__(self, prepared: LoadedModel, table: SolverCoefficients, guidance: float, size: int) -> None:
        if size < 1:
            raise ConfigError(f"batch = {size}: at least one image")
        self.prepared, self.size = prepared, size
        info, network = prepared.info, prepared.network
        self.prompts = [f"a red circle and {number} blue squares on a white background" for number in range(size)]
        self.rows = [SampleRequest(number, number, table, guidance) for number in range(size)]
        side = info.resolution // (info.scale or 1)
        self.small = torch.randint(0, 256, (size, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        self.calls = CallCounter(network)
        self.finished: list[SampleResult] = []
        self.images = torch.empty(0, 3, info.resolution, info.resolution, dtype=torch.uint8)
        self._states = torch.empty(0)
        shape = (info.model.latent_channels, info.model.latent_size, info.model.latent_size)
        self._concat_cond = torch.zeros(size, *shape, device=network.device)
        self._engine = Engine(
            self.calls,
            info.prediction_type,
            lambda ids: network.project(self._states[ids.to(self._states.device)]),
            prepared.null,
            shape,
            size * prepared.passes(guidance),
            network.device,
            embeds_guidance=network.embeds_guidance,
            concat_cond=None if info.scale is None else lambda ids: self._concat_cond[ids.to(self._concat_cond.device)],
        )

    def __call__(self, ended: StageCallback) -> None:
        """Captions to images, once."""
        self.calls.num_calls = self.calls.num_rows = 0
        autoencoder, device = self.prepared.autoencoder, self.prepared.network.device
        self._states = self.prepared.text_encoder.encode(self.prompts)
        ended(TEXT)
        if self.prepared.info.scale is not None:
            parts = self.small.to(device).split(DECODE_BATCH)
            self._concat_cond = torch.cat([encode_enlarged(autoencoder, part, self.prepared.info.resolution) for part in parts])
            ended(ENCODER)
        self.finished = sorted(self._engine.run(self.rows), key=lambda done: done.row.sample_index)
        ended(DENOISER)
        latents = torch.stack([done.latent for done in self.finished])
        self.images = torch.cat([autoencoder.decode(part).cpu() for part in latents.split(DECODE_BATCH)])
        ended(DECODER)

    def check(self) -> None:
        """
        Raises:
            ConfigError: an image of the last pass is not finite numbers.
        """
        broken = [done.row.sample_index for done in self.finished if not done.finite]
        if broken:
            raise ConfigError(
                f"image {broken[0]} of {self.size} is not finite numbers: lower the guidance, or take precision fp32"
            )
