"""What every extractor shares: pictures are checked, run in buckets of one size, in plain float32.

Legend: N pictures, B rows of a bucket, H x W pixels, D features of a picture.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as functional
from torch import Tensor

from isocost.errors import RequestError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_KINDS = {1: "grey: repeat the channel", 4: "RGBA: put them on the ground they stand on"}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def check_pictures(pictures: Tensor) -> None:
    """Raise RequestError, which is a ValueError, where `pictures` are not uint8 [N, 3, H, W]."""
    if pictures.dtype == torch.uint8 and pictures.ndim == 4 and pictures.shape[1] == 3:
        return
    reason = ""
    if pictures.is_floating_point() and not pictures.isfinite().all():
        reason = f"; {int((~pictures.isfinite()).flatten(1).any(1).sum())} pictures hold NaN or infinite pixels"
    elif pictures.ndim == 4 and pictures.shape[1] in _KINDS:
        reason = f"; these are {_KINDS[pictures.shape[1]]}"
    raise RequestError(f"pictures must be uint8 [N, 3, H, W], not {pictures.dtype} {list(pictures.shape)}{reason}")


@torch.inference_mode()
def in_buckets(
    pictures: Tensor, forward: Callable[[Tensor], Tensor], *, bucket: int, width: int, device: torch.device
) -> Tensor:
    """Features of uint8 [N, 3, H, W]: float32 [N, width] on `device`.

    `forward` sees uint8 [bucket, 3, H, W] every time, the last bucket filled up with black pictures, and gives
    [bucket, width]: so a picture's features are the same, bit for bit, wherever it is in the same row of a bucket, whatever
    else is in `pictures`. `score/blocks.py` keeps each picture in one row.
    """
    check_pictures(pictures)
    features = torch.empty(len(pictures), width, device=device)
    for start in range(0, len(pictures), bucket):
        rows = pictures[start : start + bucket].to(device)
        count = len(rows)
        rows = functional.pad(rows, (0, 0, 0, 0, 0, 0, 0, bucket - count))
        with exact_fp32(device):
            features[start : start + count] = forward(rows)[:count]
    return features


def resize_shorter_side(pictures: Tensor, side: int) -> Tensor:
    """Float [N, 3, H, W] in 0..255 so that the shorter side is `side`: bicubic, antialiased, in whole levels.

    Rows, then columns, each rounded and clipped: within one level of Pillow's bicubic on bytes, which CLIP, DINO and DINOv2
    were published with.
    """
    height, width = pictures.shape[-2:]
    if min(height, width) == side:
        return pictures
    new_height, new_width = (side * length // min(height, width) for length in (height, width))
    for size in ((height, new_width), (new_height, new_width)):
        pictures = functional.interpolate(pictures, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    return pictures


def centre_crop(pictures: Tensor, side: int) -> Tensor:
    """The middle `side` x `side` of [N, 3, H, W]; the odd pixel goes to the right and below."""
    top, left = ((length - side) // 2 for length in pictures.shape[-2:])
    return pictures[..., top : top + side, left : left + side]


def normalise(pictures: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Values 0..255, [N, 3, H, W], to (x / 255 - mean) / std by channel."""
    shape = (1, 3, 1, 1)
    shift, scale = (torch.tensor(values, device=pictures.device).reshape(shape) for values in (mean, std))
    return (pictures / 255 - shift) / scale


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
