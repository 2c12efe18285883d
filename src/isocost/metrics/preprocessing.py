"""What every extractor shares: images are checked, run in buckets of one size, in plain float32.

Legend: N images, B rows of a bucket, H x W pixels, D features of an image.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as functional
from torch import Tensor

from isocost.errors import ConfigError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CHANNEL_HINTS = {1: "grey: repeat the channel", 4: "RGBA: put them on the ground they stand on"}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def check_images(images: Tensor) -> None:
    """Raise ConfigError, which is a ValueError, where `images` are not uint8 [N, 3, H, W]."""
    if images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3:
        return
    reason = ""
    if images.is_floating_point() and not images.isfinite().all():
        reason = f"; {int((~images.isfinite()).flatten(1).any(1).sum())} images hold NaN or infinite pixels"
    elif images.ndim == 4 and images.shape[1] in _CHANNEL_HINTS:
        reason = f"; these are {_CHANNEL_HINTS[images.shape[1]]}"
    raise ConfigError(f"images must be uint8 [N, 3, H, W], not {images.dtype} {list(images.shape)}{reason}")


@torch.inference_mode()
def run_in_batches(
    images: Tensor, forward: Callable[[Tensor], Tensor], *, bucket: int, width: int, device: torch.device
) -> Tensor:
    """Features of uint8 [N, 3, H, W]: float32 [N, width] on `device`.

    `forward` sees uint8 [bucket, 3, H, W] every time, the last bucket filled up with black images, and gives
    [bucket, width]: so an image's features are the same, bit for bit, wherever it is in the same row of a bucket, whatever
    else is in `images`. `score/blocks.py` keeps each image in one row.
    """
    check_images(images)
    features = torch.empty(len(images), width, device=device)
    for start in range(0, len(images), bucket):
        rows = images[start : start + bucket].to(device)
        count = len(rows)
        rows = functional.pad(rows, (0, 0, 0, 0, 0, 0, 0, bucket - count))
        with exact_fp32(device):
            features[start : start + count] = forward(rows)[:count]
    return features


def resize_shorter_side(images: Tensor, side: int) -> Tensor:
    """Float [N, 3, H, W] in 0..255 so that the shorter side is `side`: bicubic, antialiased, in whole levels.

    Rows, then columns, each rounded and clipped: within one level of Pillow's bicubic on bytes, which CLIP, DINO and DINOv2
    were published with.
    """
    height, width = images.shape[-2:]
    if min(height, width) == side:
        return images
    new_height, new_width = (side * length // min(height, width) for length in (height, width))
    for size in ((height, new_width), (new_height, new_width)):
        images = functional.interpolate(images, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    return images


def centre_crop(images: Tensor, side: int) -> Tensor:
    """The middle `side` x `side` of [N, 3, H, W]; the odd pixel goes to the right and below."""
    top, left = ((length - side) // 2 for length in images.shape[-2:])
    return images[..., top : top + side, left : left + side]


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Values 0..255, [N, 3, H, W], to (x / 255 - mean) / std by channel."""
    shape = (1, 3, 1, 1)
    shift, scale = (torch.tensor(values, device=images.device).reshape(shape) for values in (mean, std))
    return (images / 255 - shift) / scale


class exact_fp32:
    """Inside, convolutions and products are plain float32 on every device: no autocast, no TF32, deterministic kernels."""

    def __init__(self, device: torch.device) -> None:
        self._contexts = (
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        )

    def __enter__(self) -> None:
        self._precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *exception: object) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*exception)
        torch.set_float32_matmul_precision(self._precision)
