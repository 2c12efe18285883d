"""Images from one checkpoint, for a person who wants to look.

Shapes: P prompts, K images a prompt, N = P K images, R resolution.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from isocost.config.sampling import SolverSpec
from isocost.config.sweep import DEFAULT_BATCH_SIZE
from isocost.config.types import DTypeName
from isocost.diffusion.solvers import solver_coefficients
from isocost.errors import ConfigError
from isocost.models.checkpoint import load_checkpoint
from isocost.models.components import load_checkpoint_autoencoder, load_checkpoint_text_encoder
from isocost.sampling.generate import PromptEmbeds, generate, make_engine, schedule_of
from isocost.sampling.request import SampleRequest, num_passes
from isocost.utils.device import best_device


@dataclass(frozen=True)
class Samples:
    """Images uint8 [P, K, R, R, 3] of the prompts, what they cost and how long they took."""

    images: np.ndarray
    prompts: tuple[str, ...]
    nfe: int
    gflop: float
    seconds: float

    def sheet(self) -> Image.Image:
        """All images in one, a row a prompt."""
        num_prompts, num_each, side, _, _ = self.images.shape
        tiled = self.images.transpose(0, 2, 1, 3, 4).reshape(num_prompts * side, num_each * side, 3)
        return Image.fromarray(tiled)


def sample(
    checkpoint: str | Path,
    prompts: Sequence[str],
    *,
    solver: SolverSpec | None = None,
    num_steps: int | None = None,
    guidance: float = 2.0,
    num_images: int = 4,
    seed: int = 0,
    negative_prompt: str | None = None,
    dtype: DTypeName = "fp32",
) -> Samples:
    """Draw `num_images` of each prompt. Image k of prompt p starts from the noise of image id p K + k.

    `negative` stands in for the empty caption in guidance's second pass. Where nothing else is said, a few-step student has
    its own solver and takes 4 steps; others take 16 of DDIM.

    Raises:
        ConfigError: the checkpoint does not load, it or the solver does not take these settings.
    """
    if not prompts or any(not prompt.strip() for prompt in prompts):
        raise ConfigError("give at least one prompt with words in it (--prompt TEXT)")
    if num_images < 1:
        raise ConfigError(f"num_images = {num_images}: at least 1")
    if negative_prompt is not None and guidance in (0, 1):
        raise ConfigError("a negative prompt does nothing without guidance; give a guidance above 1, or leave it out")
    opened = load_checkpoint(checkpoint, best_device())
    if opened.info.scale is not None:
        raise ConfigError(f"{checkpoint}: made for super-resolution; `isocost upscale CHECKPOINT IMAGE OUT` takes it")
    opened.info.check_guidance(guidance)
    if negative_prompt is not None and opened.info.model.embeds_guidance:
        raise ConfigError(f"{checkpoint}: a student takes guidance as an input, in one pass; a negative prompt has no place")
    steps = opened.info.num_steps if num_steps is None else num_steps
    table = solver_coefficients(solver or opened.info.solver, steps, schedule_of(opened.info))
    of_negative = None if negative_prompt is None else len(prompts)
    rows = [
        SampleRequest(i, i // num_images, table, guidance, seed=seed, negative_prompt=of_negative)
        for i in range(len(prompts) * num_images)
    ]
    autoencoder = load_checkpoint_autoencoder(opened, best_device())
    encoded = list(prompts) if negative_prompt is None else [*prompts, negative_prompt]
    states = PromptEmbeds.of(encoded, load_checkpoint_text_encoder(opened, best_device()))
    num_places = len(rows) * num_passes(guidance, opened.info.model.embeds_guidance)
    engine = make_engine(opened.network, opened.info, states, batch_size=min(DEFAULT_BATCH_SIZE, num_places), dtype=dtype)
    started = time.perf_counter()
    side = opened.info.resolution
    images = torch.empty(len(rows), 3, side, side, dtype=torch.uint8)
    for drawn in generate(engine, autoencoder, rows):
        if drawn.broken:
            name = drawn.broken[0].row.sample_index
            raise ConfigError(f"image {name} is not finite numbers: lower the guidance, or train longer")
        images[[row.row.sample_index for row in drawn.rows]] = drawn.images
    seconds = time.perf_counter() - started
    shaped = images.permute(0, 2, 3, 1).numpy().reshape(len(prompts), num_images, side, side, 3)
    nfe = engine.passes(rows[0]) * table.num_function_evaluations
    return Samples(shaped, tuple(prompts), nfe, nfe * opened.info.gflop_per_forward, seconds)
