"""Enlarge an image with a super-resolution checkpoint, in overlapping tiles if it is larger than the network's resolution.

Shapes: N tiles, R the network's resolution, S scale, h x w the input image, H x W = S h x S w, C L latent of a tile.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from isocost.config.sampling import SolverSpec, VaeSpec
from isocost.config.sweep import DEFAULT_BATCH_SIZE
from isocost.config.types import DTypeName
from isocost.data.degradations import resize
from isocost.data.image_files import read_image_file
from isocost.data.latent_cache import NULL_CAPTION
from isocost.diffusion.philox import INITIAL_NOISE, philox_normal
from isocost.diffusion.solvers import solver_coefficients
from isocost.errors import ConfigError
from isocost.models.autoencoder import load_autoencoder
from isocost.models.checkpoint import Checkpoint, load_checkpoint
from isocost.models.component_costs import checkpoint_components
from isocost.models.text_encoder import MiniLMTextEncoder
from isocost.sampling.generate import PromptEmbeds, generate, make_engine, schedule_of
from isocost.sampling.request import SampleRequest, passes_in_total, passes_per_evaluation
from isocost.sampling.tiling import Tiling
from isocost.utils.device import best_device

MAX_PIXELS = 2**28


@dataclass(frozen=True)
class Upscaled:
    """An enlarged image and its cost.

    Attributes:
        image: uint8 [H, W, 3].
        num_tiles: N.
        nfe: network evaluations per tile.
        gflop: cost of the image: the prompt, and of every tile the encoder, the network evaluations and the decoder.
        seconds: wall-clock time.
    """

    image: np.ndarray
    num_tiles: int
    nfe: int
    gflop: float
    seconds: float


def upscale(
    checkpoint: str | Path,
    image: str | Path | np.ndarray,
    *,
    prompt: str = NULL_CAPTION,
    solver: SolverSpec | None = None,
    num_steps: int | None = None,
    guidance: float = 1.0,
    overlap: float = 0.25,
    seed: int = 0,
    dtype: DTypeName = "fp32",
    compiled: bool = False,
    vae: VaeSpec | None = None,
) -> Upscaled:
    """Enlarge an image by the checkpoint's scale.

    All tiles start from parts of one noise field. A solver that adds no noise then generates the same content where tiles
    overlap. An image that is smaller than a tile is padded by reflection, and the result is cropped.

    Args:
        checkpoint: a super-resolution checkpoint.
        image: a file, or uint8 [h, w, 3].
        prompt: empty by default.
        solver: by default the checkpoint's own: DDIM, or LCM for a consistency student.
        num_steps: by default 16, and 4 for a few-step student.
        guidance: w in `uncond + w (cond - uncond)`.
        overlap: smallest overlap of neighbouring tiles, as a fraction of the tile size.
        seed: of the noise.
        dtype: of the denoiser.
        compiled: compile the denoiser.
        vae: dtype, tiling and slicing of the autoencoder.

    Raises:
        ConfigError: the image is unreadable or too large, the checkpoint is not for super-resolution or does not support the
            settings, or a tile contains NaN or inf.
    """
    opened = load_checkpoint(checkpoint, best_device())
    info = opened.info
    if info.scale is None:
        raise ConfigError(f"{checkpoint}: trained for {info.task}; `isocost upscale` needs a `superres` checkpoint of a study")
    if not 0 <= overlap < 1:
        raise ConfigError(f"overlap = {overlap}: give a fraction of the tile size, at least 0 and below 1")
    original = _read(image) if isinstance(image, str | Path) else torch.from_numpy(image.copy()).permute(2, 0, 1)
    scale, tile_size = info.scale, info.resolution
    vae = vae or VaeSpec()
    vae.check_resolution(tile_size, "vae_tile_size (--vae-tile-size)")
    autoencoder = load_autoencoder(opened.autoencoder_path, info.autoencoder_subfolder, best_device(), vae)
    height, width = (scale * length for length in original.shape[1:])
    if height * width > MAX_PIXELS:
        raise ConfigError(f"the result of {height} x {width} pixels exceeds the limit of {MAX_PIXELS:,}; split the image first")
    unit = math.lcm(scale, autoencoder.factor)
    padded = _reflect_pad(original, *(-(-max(length, tile_size) // unit) * unit // scale for length in (height, width)))
    enlarged = resize(padded[None], (scale * padded.shape[1], scale * padded.shape[2]))[0]
    min_overlap = min(int(overlap * tile_size), tile_size - unit)
    tiling = Tiling.from_size(enlarged.shape[1], enlarged.shape[2], tile_size, min_overlap, unit)
    started = time.perf_counter()
    guidance = info.effective_guidance(guidance)
    spec = info.resolve_solver(solver)
    coefficients = solver_coefficients(spec, spec.steps_or(num_steps, info.num_steps), schedule_of(info))
    requests = [SampleRequest(i, 0, coefficients, guidance, seed=seed) for i in range(len(tiling.corners))]
    concat_cond = torch.cat([autoencoder.encode(tile)[0].float().cpu() for tile in tiling.cut(enlarged).split(1)])
    latent_height, latent_width = (length // autoencoder.factor for length in enlarged.shape[1:])
    initial_noise = tiling.cut(_noise(opened, latent_height, latent_width, seed), autoencoder.factor)
    engine = make_engine(
        opened.network,
        info,
        PromptEmbeds.encode([prompt], MiniLMTextEncoder(opened.text_encoder, best_device())),
        batch_size=min(DEFAULT_BATCH_SIZE, len(requests) * passes_per_evaluation(guidance, info.model.embeds_guidance)),
        dtype=dtype,
        compiled=compiled,
        concat_cond=lambda indices: concat_cond[indices],
        initial_noise=lambda indices: initial_noise[indices],
    )
    tiles: dict[int, Tensor] = {}
    for batch in generate(engine, autoencoder, requests):
        if batch.nonfinite:
            index = batch.nonfinite[0].request.sample_index
            raise ConfigError(f"tile {index} contains NaN or inf; lower the guidance or train longer")
        tiles |= {result.request.sample_index: tile for result, tile in zip(batch.results, batch.images, strict=True)}
    joined = tiling.join([tiles[i] for i in range(len(requests))])[:, :height, :width]
    nfe, _ = passes_in_total(requests[0].weights, info.model.embeds_guidance)
    seconds = time.perf_counter() - started
    components = checkpoint_components(opened, vae=vae)
    gflop_per_tile = nfe * info.gflop_per_forward + components.gflop_encoder + components.gflop_decoder
    gflop = components.gflop_text + len(requests) * gflop_per_tile
    return Upscaled(joined.permute(1, 2, 0).numpy(), len(requests), nfe, gflop, seconds)


def _read(file: str | Path) -> Tensor:
    """uint8 [3, h, w]."""
    return torch.from_numpy(np.array(read_image_file(Path(file)))).permute(2, 0, 1)


def _noise(opened: Checkpoint, height: int, width: int, seed: int) -> Tensor:
    """One field of initial noise for all tiles, float32 [C, height, width]."""
    shape = (opened.info.model.latent_channels, height, width)
    return philox_normal(torch.tensor([seed]), torch.tensor([0]), INITIAL_NOISE, shape, torch.device("cpu"))[0]


def _reflect_pad(image: Tensor, height: int, width: int) -> Tensor:
    """Pad [3, h, w] to [3, height, width] below and to the right by reflection."""
    rows, columns = (
        _reflect_index(torch.arange(padded), length) for padded, length in zip((height, width), image.shape[1:], strict=True)
    )
    return image[:, rows][:, :, columns]


def _reflect_index(indices: Tensor, length: int) -> Tensor:
    """Map 0, 1, ... to 0 ... length - 1 and back to 0, periodically."""
    period_index = indices.remainder(2 * length)
    return torch.where(period_index < length, period_index, 2 * length - 1 - period_index)
