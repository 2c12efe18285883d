"""Pictures from one checkpoint, for a person who wants to look.

Shapes: P prompts, K pictures a prompt, N = P K pictures, R resolution.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from isocost.config.sampling import SamplerSpec
from isocost.config.sweep import DEFAULT_BUCKET_SIZE
from isocost.config.types import Precision
from isocost.diffusion.solvers import build_table
from isocost.errors import RequestError
from isocost.models.checkpoint import load_checkpoint
from isocost.models.components import codec_of, text_of
from isocost.sampling.generate import CaptionStates, generate, make_engine, schedule_of
from isocost.sampling.request import Row, num_passes
from isocost.utils.device import best_device


@dataclass(frozen=True)
class Samples:
    """Pictures uint8 [P, K, R, R, 3] of the prompts, what they cost and how long they took."""

    pictures: np.ndarray
    prompts: tuple[str, ...]
    nfe: int
    gflop: float
    seconds: float

    def sheet(self) -> Image.Image:
        """All pictures in one, a row a prompt."""
        num_prompts, num_each, side, _, _ = self.pictures.shape
        tiled = self.pictures.transpose(0, 2, 1, 3, 4).reshape(num_prompts * side, num_each * side, 3)
        return Image.fromarray(tiled)


def sample(
    checkpoint: str | Path,
    prompts: Sequence[str],
    *,
    sampler: SamplerSpec | None = None,
    num_steps: int | None = None,
    guidance: float = 2.0,
    num_pictures: int = 4,
    seed: int = 0,
    negative: str | None = None,
    precision: Precision = "fp32",
) -> Samples:
    """Draw `num_pictures` of each prompt. Picture k of prompt p starts from the noise of picture id p K + k.

    `negative` stands in for the empty caption in guidance's second pass. Where nothing else is said, a few-step student has
    its own sampler and takes 4 steps; others take 16 of DDIM.

    Raises:
        RequestError: the checkpoint does not load, it or the sampler does not take these settings.
    """
    if not prompts or any(not prompt.strip() for prompt in prompts):
        raise RequestError("give at least one prompt with words in it (--prompt TEXT)")
    if num_pictures < 1:
        raise RequestError(f"num_pictures = {num_pictures}: at least 1")
    if negative is not None and guidance in (0, 1):
        raise RequestError("a negative prompt does nothing without guidance; give a guidance above 1, or leave it out")
    opened = load_checkpoint(checkpoint, best_device())
    if opened.info.scale is not None:
        raise RequestError(f"{checkpoint}: made for super-resolution; `isocost upscale CHECKPOINT PICTURE OUT` takes it")
    opened.info.check_guidance(guidance)
    if negative is not None and opened.info.model.embeds_guidance:
        raise RequestError(f"{checkpoint}: a student takes guidance as an input, in one pass; a negative prompt has no place")
    steps = opened.info.num_steps if num_steps is None else num_steps
    table = build_table(sampler or opened.info.sampler, steps, schedule_of(opened.info))
    of_negative = None if negative is None else len(prompts)
    rows = [
        Row(i, i // num_pictures, table, guidance, seed=seed, negative=of_negative) for i in range(len(prompts) * num_pictures)
    ]
    codec = codec_of(opened, best_device())
    captions = list(prompts) if negative is None else [*prompts, negative]
    states = CaptionStates.of(captions, text_of(opened, best_device()))
    num_places = len(rows) * num_passes(guidance, opened.info.model.embeds_guidance)
    engine = make_engine(
        opened.network, opened.info, states, bucket_size=min(DEFAULT_BUCKET_SIZE, num_places), precision=precision
    )
    started = time.perf_counter()
    side = opened.info.resolution
    pictures = torch.empty(len(rows), 3, side, side, dtype=torch.uint8)
    for drawn in generate(engine, codec, rows):
        if drawn.broken:
            name = drawn.broken[0].row.picture_id
            raise RequestError(f"picture {name} is not finite numbers: lower the guidance, or train longer")
        pictures[[row.row.picture_id for row in drawn.rows]] = drawn.pictures
    seconds = time.perf_counter() - started
    shaped = pictures.permute(0, 2, 3, 1).numpy().reshape(len(prompts), num_pictures, side, side, 3)
    nfe = engine.passes(rows[0]) * table.num_evaluations
    return Samples(shaped, tuple(prompts), nfe, nfe * opened.info.gflop_per_forward, seconds)
