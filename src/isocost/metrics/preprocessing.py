"""Image preparation shared by all feature extractors: checks, fixed batches, resizing, normalization, plain float32.

Shapes: N images, B images per batch, H x W pixels, D features per image.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as functional
from torch import Tensor

from isocost.errors import ConfigError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CHANNEL_HINTS = {1: "grey: repeat the channel", 4: "RGBA: composite onto a background first"}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def check_images(images: Tensor) -> None:
    """Check that `images` are uint8 [N, 3, H, W].

    Raises:
        ConfigError: they are not; ConfigError is a ValueError.
    """
    if images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3:
        return
    reason = ""
    if images.is_floating_point() and not images.isfinite().all():
        reason = f"; {int((~images.isfinite()).flatten(1).any(1).sum())} images contain NaN or infinite pixels"
    elif images.ndim == 4 and images.shape[1] in _CHANNEL_HINTS:
        reason = f"; these are {_CHANNEL_HINTS[images.shape[1]]}"
    raise ConfigError(f"images must be uint8 [N, 3, H, W], not {images.dtype} {list(images.shape)}{reason}")


@torch.inference_mode()
def run_in_batches(
    images: Tensor, forward: Callable[[Tensor], Tensor], *, batch_size: int, feature_dim: int, device: torch.device
) -> Tensor:
    """Compute features in batches of one fixed size.

    The last batch is padded with black images. The features of an image are therefore bit-equal in any set of images, as
    long as the image has the same row within its batch. `evaluation/feature_batches.py` keeps that row fixed.

    Args:
        images: uint8 [N, 3, H, W].
        forward: maps uint8 [batch_size, 3, H, W] to [batch_size, feature_dim].
        batch_size: B, the images in every call of `forward`.
        feature_dim: D.
        device: where `forward` runs.

    Returns:
        float32 [N, D] on `device`.

    Raises:
        ConfigError: `images` are not uint8 [N, 3, H, W].
    """
    check_images(images)
    features = torch.empty(len(images), feature_dim, device=device)
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size].to(device)
        count = len(batch)
        batch = functional.pad(batch, (0, 0, 0, 0, 0, 0, 0, batch_size - count))
        with exact_fp32(device):
            features[start : start + count] = forward(batch)[:count]
    return features


def resize_shorter_side(images: Tensor, side: int) -> Tensor:
    """Resize so that the shorter side is `side` pixels: bicubic, antialiased, rounded to whole grey levels.

    Rows are resized first, then columns; both results are rounded and clipped. The result is within one grey level of
    Pillow's bicubic resize of bytes, which the publications of CLIP, DINO and DINOv2 used.

    Args:
        images: float [N, 3, H, W], values 0..255.
        side: pixels.
    """
    height, width = images.shape[-2:]
    if min(height, width) == side:
        return images
    new_height, new_width = (side * length // min(height, width) for length in (height, width))
    for size in ((height, new_width), (new_height, new_width)):
        images = functional.interpolate(images, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    return images


def centre_crop(images: Tensor, side: int) -> Tensor:
    """Crop the middle `side` x `side` of [N, 3, H, W]; an odd margin is one pixel wider at the right or bottom."""
    top, left = ((length - side) // 2 for length in images.shape[-2:])
    return images[..., top : top + side, left : left + side]


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Map values 0..255, [N, 3, H, W], to (x / 255 - mean) / std per channel."""
    shape = (1, 3, 1, 1)
    shift, scale = (torch.tensor(values, device=images.device).reshape(shape) for values in (mean, std))
    return (images / 255 - shift) / scale


class exact_fp32:
    """Context in which convolutions and matrix products run in plain float32: no autocast, no TF32, deterministic kernels."""

    def __init__(self, device: torch.device) -> None:
        self._contexts = (
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        )

    def __enter__(self) -> None:
        self._matmul_precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *exception: object) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*exception)
        torch.set_float32_matmul_precision(self._matmul_precision)
