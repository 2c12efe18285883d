"""What a codec loses: held-out pictures encoded, decoded and compared with themselves and with other real pictures.

Shapes: N held-out pictures, M other real pictures, R resolution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isocost.metrics.extractor_base import Extractor
from isocost.metrics.image_similarity import psnr
from isocost.metrics.lpips import Lpips
from isocost.metrics.mmd import kernel_distance
from isocost.models.autoencoder import Codec, to_unit

BATCH = 128


def round_trip(codec: Codec, pictures: Tensor) -> Tensor:
    """Pictures uint8 [N, 3, R, R] through the codec and back, by the latents' means."""
    return torch.cat([codec.decode(codec.encode(batch)[0]).cpu() for batch in pictures.split(BATCH)])


@torch.inference_mode()
def codec_quality(codec: Codec, held_out: Tensor, others: Tensor, extractor: Extractor, lpips: Lpips | None) -> dict[str, Any]:
    """PSNR (dB, mean over pictures), LPIPS (AlexNet; absent without its weights) and kernel distances of decoded pictures.

    `kernel_of_decoded` compares decoded held-out pictures [N, 3, R, R] with other real ones [M, 3, R, R];
    `kernel_of_real` compares the same held-out pictures undecoded: what remains when nothing is lost.
    """
    decoded = round_trip(codec, held_out)
    real = extractor(others).cpu().numpy()
    quality: dict[str, Any] = {
        "psnr_db": float(psnr(held_out.numpy(), decoded.numpy()).mean()),
        "kernel_of_decoded": float(kernel_distance(extractor(decoded).cpu().numpy(), real)),
        "kernel_of_real": float(kernel_distance(extractor(held_out).cpu().numpy(), real)),
        "num_held_out": len(held_out),
        "features": extractor.id,
    }
    if lpips is not None:
        pairs = zip(held_out.split(BATCH), decoded.split(BATCH), strict=True)
        quality["lpips_alexnet"] = float(torch.cat([lpips(to_unit(a), to_unit(b)).cpu() for a, b in pairs]).mean())
    return quality
