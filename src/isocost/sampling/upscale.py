"""An image made larger by a super-resolution checkpoint, in overlapping tiles where it is larger than the network's own.

Shapes: N tiles, R the network's resolution, S scale, h x w the given image, H x W = S h x S w, C L latent of a tile.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from isocost.config.sampling import SolverSpec
from isocost.config.sweep import DEFAULT_BATCH_SIZE
from isocost.config.types import DTypeName
from isocost.data.datasets import read_photograph
from isocost.data.degradations import resize
from isocost.data.latent_cache import NULL_CAPTION
from isocost.diffusion.philox import INITIAL_NOISE, philox_normal
from isocost.diffusion.solvers import solver_coefficients
from isocost.errors import ConfigError
from isocost.models.autoencoder import load_autoencoder
from isocost.models.checkpoint import Checkpoint, load_checkpoint
from isocost.models.text_encoder import MiniLMTextEncoder
from isocost.sampling.generate import PromptEmbeds, generate, make_engine, schedule_of
from isocost.sampling.request import SampleRequest, num_passes
from isocost.sampling.tiling import Tiling
from isocost.utils.device import best_device

MAX_PIXELS = 2**28


@dataclass(frozen=True)
class Upscaled:
    """The larger image uint8 [H, W, 3], how many tiles it took, what they cost and how long."""

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
) -> Upscaled:
    """Enlarge an image (a file, or uint8 [h, w, 3]) by the checkpoint's scale.

    Tiles overlap by at least `overlap` of their side and start from one field of noise, so that a solver without noise of its
    own draws the same things where they meet. An image smaller than a tile is continued by its mirror image, and cut again.

    Raises:
        ConfigError: no image, one that is too large, or a checkpoint that is not for super-resolution.
    """
    opened = load_checkpoint(checkpoint, best_device())
    info = opened.info
    if info.scale is None:
        raise ConfigError(f"{checkpoint}: made for {info.task}; `isocost upscale` takes a checkpoint of a study's `superres`")
    if not 0 <= overlap < 1:
        raise ConfigError(f"overlap = {overlap}: a share of a tile's side, from 0 to below 1")
    given = _read(image) if isinstance(image, str | Path) else torch.from_numpy(image.copy()).permute(2, 0, 1)
    scale, side, autoencoder = (
        info.scale,
        info.resolution,
        load_autoencoder(opened.autoencoder_path, info.autoencoder_subfolder, best_device()),
    )
    height, width = (scale * length for length in given.shape[1:])
    if height * width > MAX_PIXELS:
        raise ConfigError(f"{height} x {width} pixels come out, more than {MAX_PIXELS:,}: cut the image into parts first")
    unit = math.lcm(scale, autoencoder.factor)
    low = _reflect_pad(given, *(-(-max(length, side) // unit) * unit // scale for length in (height, width)))
    enlarged = resize(low[None], (scale * low.shape[1], scale * low.shape[2]))[0]
    tiling = Tiling.of(enlarged.shape[1], enlarged.shape[2], side, min(int(overlap * side), side - unit), unit)
    started = time.perf_counter()
    info.check_guidance(guidance)
    table = solver_coefficients(solver or info.solver, info.num_steps if num_steps is None else num_steps, schedule_of(info))
    rows = [SampleRequest(number, 0, table, guidance, seed=seed) for number in range(len(tiling.corners))]
    concat_cond = torch.cat([autoencoder.encode(tile)[0].float().cpu() for tile in tiling.cut(enlarged).split(1)])
    initial_noise = tiling.cut(
        _noise(opened, enlarged.shape[1] // autoencoder.factor, enlarged.shape[2] // autoencoder.factor, seed),
        autoencoder.factor,
    )
    engine = make_engine(
        opened.network,
        info,
        PromptEmbeds.of([prompt], MiniLMTextEncoder(opened.text_encoder, best_device())),
        batch_size=min(DEFAULT_BATCH_SIZE, len(rows) * num_passes(guidance, info.model.embeds_guidance)),
        dtype=dtype,
        concat_cond=lambda ids: concat_cond[ids],
        initial_noise=lambda ids: initial_noise[ids],
    )
    made: dict[int, Tensor] = {}
    for drawn in generate(engine, autoencoder, rows):
        if drawn.broken:
            raise ConfigError(
                f"tile {drawn.broken[0].row.sample_index} is not finite numbers: lower the guidance, or train longer"
            )
        made |= {row.row.sample_index: tile for row, tile in zip(drawn.rows, drawn.images, strict=True)}
    whole = tiling.join([made[number] for number in range(len(rows))])[:, :height, :width]
    nfe = engine.passes(rows[0]) * table.num_function_evaluations
    seconds = time.perf_counter() - started
    return Upscaled(whole.permute(1, 2, 0).numpy(), len(rows), nfe, nfe * len(rows) * info.gflop_per_forward, seconds)


def _read(file: str | Path) -> Tensor:
    """uint8 [3, h, w]."""
    return torch.from_numpy(np.array(read_photograph(Path(file)))).permute(2, 0, 1)


def _noise(opened: Checkpoint, height: int, width: int, seed: int) -> Tensor:
    """One field of start noise for all tiles, float32 [C, height, width]."""
    shape = (opened.info.model.latent_channels, height, width)
    return philox_normal(torch.tensor([seed]), torch.tensor([0]), INITIAL_NOISE, shape, torch.device("cpu"))[0]


def _reflect_pad(image: Tensor, height: int, width: int) -> Tensor:
    """[3, h, w] continued below and to the right by its mirror images to [3, height, width]."""
    rows, columns = (
        _reflect_index(torch.arange(length), there) for length, there in zip((height, width), image.shape[1:], strict=True)
    )
    return image[:, rows][:, :, columns]


def _reflect_index(places: Tensor, length: int) -> Tensor:
    """0 ... length - 1 and back again, without end."""
    turned = places.remainder(2 * length)
    return torch.where(turned < length, turned, 2 * length - 1 - turned)
