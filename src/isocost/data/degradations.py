"""Low-resolution images for super-resolution, every random choice a function of (seed, image id, draw).

`bicubic` shrinks; `real-esrgan` does what arXiv 2107.10833 (section 3, figure 2) does to an image: twice blur, resize, noise
and JPEG, the second time with a final sinc filter, in the ranges of the spec.

Shapes: N images, R their side, S scale, H x W an image on its way, K side of a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from scipy.special import j1
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg

from isocost.config.finetune import DegradationSpec, DegradationStage
from isocost.errors import ConfigError
from isocost.models.autoencoder import Autoencoder

Kernel = NDArray[np.float32]
_KERNEL_SIDES = tuple(range(7, 22, 2))
_KERNELS = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
_KERNEL_SHARES = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
_RESIZES = ("area", "bilinear", "bicubic")


def check_scale(resolution: int, scale: int, factor: int) -> None:
    """Whether images and latents of this size have a low-resolution form of this scale.

    `factor` is the pixels a latent's place takes: the low-resolution image must itself be one that the autoencoder could encode.

    Raises:
        ConfigError: the scale does not divide the side, or what is left is none that the autoencoder encodes.
    """
    if resolution % scale:
        raise ConfigError(f"superres.scale: {scale} does not divide data.resolution {resolution}")
    if (resolution // scale) % factor:
        low = resolution // scale
        raise ConfigError(
            f"superres.scale: {low} x {low} pixels are no whole places of the autoencoder, which takes {factor} x {factor} "
            f"each; take a scale that leaves a multiple of {factor}"
        )


def degrade(
    images: Tensor,
    ids: Sequence[int],
    spec: DegradationSpec,
    scale: int,
    *,
    seed: int,
    draws: Sequence[int] | None = None,
) -> Tensor:
    """uint8 [N, 3, R, R] -> uint8 [N, 3, R / S, R / S]; image i of them is degraded as (seed, ids[i], draws[i]) say.

    A training gives its passes over the data as `draws`, so that each pass sees other degradations; they are 0 where absent.
    """
    if spec.kind == "bicubic":
        return resize(images, images.shape[-1] // scale)
    keyed = zip(images, ids, draws or [0] * len(images), strict=True)
    return torch.stack([_real_esrgan(image, spec, scale, _generator(seed, i, draw)) for image, i, draw in keyed])


def encode_enlarged(autoencoder: Autoencoder, low: Tensor, resolution: int) -> Tensor:
    """What a network sees of low-resolution images uint8 [N, 3, r, r]: mean latents float32 of their bicubic enlargement."""
    return autoencoder.encode(resize(low, resolution))[0].float().cpu()


def resize(images: Tensor, side: int | tuple[int, int]) -> Tensor:
    """Bicubic (a = -0.5, with antialiasing where it shrinks), uint8 [N, 3, ...] -> uint8 [N, 3, H, W]: PIL's and MATLAB's."""
    size = (side, side) if isinstance(side, int) else side
    return functional.interpolate(images.float(), size, mode="bicubic", antialias=True).round().clamp(0, 255).to(torch.uint8)


def _generator(seed: int, sample_index: int, draw: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, sample_index, draw])))


# --- Real-ESRGAN ------------------------------------------------------------------------------------------------------


def _real_esrgan(image: Tensor, spec: DegradationSpec, scale: int, random: np.random.Generator) -> Tensor:
    """uint8 [3, R, R] -> uint8 [3, R / S, R / S]."""
    side = image.shape[-1]
    values = image.float() / 255
    values = _stage(values, spec.first, side, random)
    values = _jpeg(values, _between(random, spec.first.jpeg_quality))
    values = _stage(values, spec.second, side / scale, random)
    final = _sinc(random) if random.random() < spec.final_sinc_probability else None
    quality = _between(random, spec.second.jpeg_quality)
    mode = _RESIZES[random.integers(3)]
    sinc_first = random.random() < 0.5
    if not sinc_first:
        values = _jpeg(values, quality)
    values = _resized(values, side // scale, side // scale, mode)
    values = values if final is None else _filtered(values, final)
    if sinc_first:
        values = _jpeg(values.clamp(0, 1), quality)
    return (values.clamp(0, 1) * 255).round().to(torch.uint8)


def _stage(values: Tensor, stage: DegradationStage, side: float, random: np.random.Generator) -> Tensor:
    """Blur, resize to a random share of `side`, noise; [3, H, W] in 0..1."""
    if random.random() < stage.blur_probability:
        values = _filtered(values, _kernel(stage, random))
    up, down, _ = np.cumsum(stage.resize_probabilities)
    turn = random.random()
    low, high = stage.resize_range
    share = random.uniform(1, high) if turn < up else random.uniform(low, 1) if turn < down else 1.0
    new_side = max(2, round(side * share))
    values = _resized(values, new_side, new_side, _RESIZES[random.integers(3)])
    return _noisy(values, stage, random).clamp(0, 1)


def _kernel(stage: DegradationStage, random: np.random.Generator) -> Kernel:
    """A blur kernel [K, K] of one of the six kinds of Real-ESRGAN, or a sinc filter."""
    if random.random() < stage.sinc_probability:
        return _sinc(random)
    kind = random.choice(_KERNELS, p=_KERNEL_SHARES)
    side = int(random.choice(_KERNEL_SIDES))
    sigma_x, sigma_y = (_between(random, stage.blur_sigma) for _ in range(2))
    angle = random.uniform(-np.pi, np.pi)
    if kind.endswith("_iso") or kind == "iso":
        sigma_y = sigma_x
    places = np.arange(side) - side // 2
    x, y = np.meshgrid(places, places)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    distance = (along / sigma_x) ** 2 + (across / sigma_y) ** 2
    if kind.startswith("plateau"):
        kernel = 1 / (distance ** _skewed(random, stage.plateau_beta) + 1)
    else:
        beta = _skewed(random, stage.generalized_beta) if kind.startswith("generalized") else 1.0
        kernel = np.exp(-0.5 * distance**beta)
    return (kernel / kernel.sum()).astype(np.float32)


def _sinc(random: np.random.Generator) -> Kernel:
    """A circular low-pass filter [K, K] that rings and overshoots (arXiv 2107.10833, eq. 6)."""
    side = int(random.choice(_KERNEL_SIDES))
    cutoff = random.uniform(np.pi / 3 if side < 13 else np.pi / 5, np.pi)
    places = np.arange(side) - side // 2
    radius = np.hypot(*np.meshgrid(places, places))
    centre = radius == 0
    radius[centre] = 1.0
    kernel = cutoff * j1(cutoff * radius) / (2 * np.pi * radius)
    kernel[centre] = cutoff**2 / (4 * np.pi)
    return (kernel / kernel.sum()).astype(np.float32)


def _filtered(values: Tensor, kernel: Kernel) -> Tensor:
    """[3, H, W] by [K, K], mirrored at the borders as often as an image smaller than the kernel needs."""
    reach = len(kernel) // 2
    rows, columns = (_mirrored(length, reach) for length in values.shape[-2:])
    padded = values[:, rows][:, :, columns]
    # By its spectrum: a convolution would be planned anew for every shape, which takes longer.
    size = padded.shape[-2:]
    spectrum = torch.fft.rfft2(padded) * torch.fft.rfft2(torch.from_numpy(kernel).flip(0, 1), s=size)
    return torch.fft.irfft2(spectrum, s=size)[:, 2 * reach :, 2 * reach :]


def _mirrored(length: int, reach: int) -> Tensor:
    """Indices -reach ... length + reach - 1, folded back into 0 ... length - 1 without repeating the border."""
    period = max(1, 2 * (length - 1))
    folded = torch.arange(-reach, length + reach).remainder(period)
    return torch.where(folded < length, folded, period - folded)


def _resized(values: Tensor, height: int, width: int, mode: str) -> Tensor:
    return functional.interpolate(values[None], (height, width), mode=mode)[0]


def _noisy(values: Tensor, stage: DegradationStage, random: np.random.Generator) -> Tensor:
    """Gaussian or Poisson noise, in grey for some images; [3, H, W] in 0..1."""
    is_gaussian = random.random() < stage.gaussian_probability
    channels = 1 if random.random() < stage.grey_noise_probability else 3
    strength = _between(random, stage.noise_sigma if is_gaussian else stage.poisson_scale)
    if is_gaussian:
        noise = random.standard_normal((channels, *values.shape[1:])) * strength / 255
    else:
        clean = values.mean(0, keepdim=True) if channels == 1 else values
        rates = (clean.clamp(0, 1) * 255).round().double().numpy()
        noise = strength * (random.poisson(rates) - rates) / 255
    return values + torch.from_numpy(noise).float()


def _jpeg(values: Tensor, quality: float) -> Tensor:
    """Through the JPEG autoencoder; [3, H, W] in 0..1."""
    pixels = (values.clamp(0, 1) * 255).round().to(torch.uint8)
    return decode_jpeg(encode_jpeg(pixels, quality=round(quality))).float() / 255


def _between(random: np.random.Generator, ends: tuple[float, float]) -> float:
    return float(random.uniform(*ends))


def _skewed(random: np.random.Generator, ends: tuple[float, float]) -> float:
    """Below and above 1 equally often."""
    low, high = ends
    return float(random.uniform(low, 1) if random.random() < 0.5 else random.uniform(1, high))
