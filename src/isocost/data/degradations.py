"""Make low-resolution images for super-resolution; all random choices are a function of (seed, image id, draw).

`bicubic` only downscales. `real-esrgan` follows arXiv 2107.10833 (section 3, figure 2): it applies blur, resize, noise and JPEG
twice, the second time with a final sinc filter, with parameters in the ranges of the spec.

Shapes: N images, R resolution, S scale, H x W an intermediate image, K size of a kernel.
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
_KERNEL_SIZES = tuple(range(7, 22, 2))
_KERNELS = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
_KERNEL_PROBABILITIES = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
_RESIZE_MODES = ("area", "bilinear", "bicubic")


def check_scale(resolution: int, scale: int, factor: int) -> None:
    """Check that the autoencoder can encode low-resolution images of this scale.

    Args:
        scale: by which images are downscaled.
        factor: by which the autoencoder downsamples, in pixels per latent position.

    Raises:
        ConfigError: the scale does not divide the resolution, or `factor` does not divide the low resolution.
    """
    if resolution % scale:
        raise ConfigError(f"superres.scale: {scale} does not divide data.resolution {resolution}; take a divisor")
    if (resolution // scale) % factor:
        raise ConfigError(
            f"superres.scale: the low resolution {resolution // scale} is not a multiple of {factor}, by which the autoencoder "
            "downsamples; take a smaller scale"
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
    """Degrade images uint8 [N, 3, R, R] to uint8 [N, 3, R / S, R / S].

    Args:
        ids: of the images; image i is degraded as a function of (seed, ids[i], draws[i]).
        draws: select another degradation of the same image, 0 if absent. A training passes the epochs, so that every epoch has
            other degradations.
    """
    if spec.kind == "bicubic":
        return resize(images, images.shape[-1] // scale)
    keyed = zip(images, ids, draws or [0] * len(images), strict=True)
    return torch.stack([_real_esrgan(image, spec, scale, _generator(seed, i, draw)) for image, i, draw in keyed])


def encode_enlarged(autoencoder: Autoencoder, low: Tensor, resolution: int) -> Tensor:
    """Upscale low-resolution images uint8 [N, 3, r, r] (bicubic) and encode them: mean latents, float32 on the CPU."""
    return autoencoder.encode(resize(low, resolution))[0].float().cpu()


def resize(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Resize uint8 [N, 3, ...] to uint8 [N, 3, H, W] as PIL and MATLAB do: bicubic, a = -0.5, antialiased when downscaling."""
    size = (size, size) if isinstance(size, int) else size
    return functional.interpolate(images.float(), size, mode="bicubic", antialias=True).round().clamp(0, 255).to(torch.uint8)


def _generator(seed: int, sample_index: int, draw: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, sample_index, draw])))


# --- Real-ESRGAN ------------------------------------------------------------------------------------------------------


def _real_esrgan(image: Tensor, spec: DegradationSpec, scale: int, random: np.random.Generator) -> Tensor:
    """uint8 [3, R, R] -> uint8 [3, R / S, R / S]."""
    resolution = image.shape[-1]
    values = image.float() / 255
    values = _blur_resize_noise(values, spec.first, resolution, random)
    values = _jpeg(values, _uniform(random, spec.first.jpeg_quality))
    values = _blur_resize_noise(values, spec.second, resolution / scale, random)
    sinc = _sinc_kernel(random) if random.random() < spec.final_sinc_probability else None
    quality = _uniform(random, spec.second.jpeg_quality)
    mode = _RESIZE_MODES[random.integers(3)]
    sinc_first = random.random() < 0.5
    if not sinc_first:
        values = _jpeg(values, quality)
    values = _resize(values, resolution // scale, resolution // scale, mode)
    values = values if sinc is None else _filter(values, sinc)
    if sinc_first:
        values = _jpeg(values.clamp(0, 1), quality)
    return (values.clamp(0, 1) * 255).round().to(torch.uint8)


def _blur_resize_noise(values: Tensor, stage: DegradationStage, resolution: float, random: np.random.Generator) -> Tensor:
    """Blur, resize to `resolution` times a random factor, and add noise; [3, H, W] in 0..1."""
    if random.random() < stage.blur_probability:
        values = _filter(values, _blur_kernel(stage, random))
    up, down, _ = np.cumsum(stage.resize_probabilities)
    direction = random.random()
    low, high = stage.resize_range
    factor = random.uniform(1, high) if direction < up else random.uniform(low, 1) if direction < down else 1.0
    size = max(2, round(resolution * factor))
    values = _resize(values, size, size, _RESIZE_MODES[random.integers(3)])
    return _add_noise(values, stage, random).clamp(0, 1)


def _blur_kernel(stage: DegradationStage, random: np.random.Generator) -> Kernel:
    """A blur kernel [K, K] of one of the six kinds of Real-ESRGAN, or a sinc filter."""
    if random.random() < stage.sinc_probability:
        return _sinc_kernel(random)
    kind = random.choice(_KERNELS, p=_KERNEL_PROBABILITIES)
    size = int(random.choice(_KERNEL_SIZES))
    sigma_x, sigma_y = (_uniform(random, stage.blur_sigma) for _ in range(2))
    angle = random.uniform(-np.pi, np.pi)
    if kind.endswith("_iso") or kind == "iso":
        sigma_y = sigma_x
    offsets = np.arange(size) - size // 2
    x, y = np.meshgrid(offsets, offsets)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    distance = (along / sigma_x) ** 2 + (across / sigma_y) ** 2
    if kind.startswith("plateau"):
        kernel = 1 / (distance ** _uniform_around_1(random, stage.plateau_beta) + 1)
    else:
        beta = _uniform_around_1(random, stage.generalized_beta) if kind.startswith("generalized") else 1.0
        kernel = np.exp(-0.5 * distance**beta)
    return (kernel / kernel.sum()).astype(np.float32)


def _sinc_kernel(random: np.random.Generator) -> Kernel:
    """A circular low-pass filter [K, K], which makes ringing and overshoot artefacts (arXiv 2107.10833, eq. 6)."""
    size = int(random.choice(_KERNEL_SIZES))
    cutoff = random.uniform(np.pi / 3 if size < 13 else np.pi / 5, np.pi)
    offsets = np.arange(size) - size // 2
    radius = np.hypot(*np.meshgrid(offsets, offsets))
    centre = radius == 0
    radius[centre] = 1.0
    kernel = cutoff * j1(cutoff * radius) / (2 * np.pi * radius)
    kernel[centre] = cutoff**2 / (4 * np.pi)
    return (kernel / kernel.sum()).astype(np.float32)


def _filter(values: Tensor, kernel: Kernel) -> Tensor:
    """Convolve [3, H, W] with [K, K]. Borders are mirrored, repeatedly if the image is smaller than the kernel."""
    pad = len(kernel) // 2
    rows, columns = (_mirrored_indices(length, pad) for length in values.shape[-2:])
    padded = values[:, rows][:, :, columns]
    # FFT, because a direct convolution is planned again for every new shape, which takes longer.
    size = padded.shape[-2:]
    spectrum = torch.fft.rfft2(padded) * torch.fft.rfft2(torch.from_numpy(kernel).flip(0, 1), s=size)
    return torch.fft.irfft2(spectrum, s=size)[:, 2 * pad :, 2 * pad :]


def _mirrored_indices(length: int, pad: int) -> Tensor:
    """Indices -reach ... length + reach - 1, folded back into 0 ... length - 1 without repeating the border."""
    period = max(1, 2 * (length - 1))
    folded = torch.arange(-pad, length + pad).remainder(period)
    return torch.where(folded < length, folded, period - folded)


def _resize(values: Tensor, height: int, width: int, mode: str) -> Tensor:
    return functional.interpolate(values[None], (height, width), mode=mode)[0]


def _add_noise(values: Tensor, stage: DegradationStage, random: np.random.Generator) -> Tensor:
    """Add Gaussian or Poisson noise, grey or coloured; [3, H, W] in 0..1."""
    is_gaussian = random.random() < stage.gaussian_probability
    channels = 1 if random.random() < stage.grey_noise_probability else 3
    strength = _uniform(random, stage.noise_sigma if is_gaussian else stage.poisson_scale)
    if is_gaussian:
        noise = random.standard_normal((channels, *values.shape[1:])) * strength / 255
    else:
        clean = values.mean(0, keepdim=True) if channels == 1 else values
        rates = (clean.clamp(0, 1) * 255).round().double().numpy()
        noise = strength * (random.poisson(rates) - rates) / 255
    return values + torch.from_numpy(noise).float()


def _jpeg(values: Tensor, quality: float) -> Tensor:
    """Compress to JPEG and decode again; [3, H, W] in 0..1."""
    pixels = (values.clamp(0, 1) * 255).round().to(torch.uint8)
    return decode_jpeg(encode_jpeg(pixels, quality=round(quality))).float() / 255


def _uniform(random: np.random.Generator, bounds: tuple[float, float]) -> float:
    return float(random.uniform(*bounds))


def _uniform_around_1(random: np.random.Generator, bounds: tuple[float, float]) -> float:
    """Uniform below 1 or uniform above 1, with equal probability."""
    low, high = bounds
    return float(random.uniform(low, 1) if random.random() < 0.5 else random.uniform(1, high))
