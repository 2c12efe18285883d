"""What an autoencoder loses: held-out images encoded, decoded and compared with themselves and with other real images.

Shapes: N held-out images, M other real images, R resolution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isocost.metrics.extractor_base import FeatureExtractor
from isocost.metrics.image_similarity import psnr
from isocost.metrics.lpips import Lpips
from isocost.metrics.mmd import squared_mmd
from isocost.models.autoencoder import Autoencoder, to_unit

BATCH = 128


def round_trip(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Images uint8 [N, 3, R, R] through the autoencoder and back, by the latents' means."""
    return torch.cat([autoencoder.decode(autoencoder.encode(batch)[0]).cpu() for batch in images.split(BATCH)])


@torch.inference_mode()
def autoencoder_quality(
    autoencoder: Autoencoder, held_out: Tensor, others: Tensor, extractor: FeatureExtractor, lpips: Lpips | None
) -> dict[str, Any]:
    """PSNR (dB, mean over images), LPIPS (AlexNet; absent without its weights) and squared MMD of decoded images.

    `kernel_of_decoded` compares decoded held-out images [N, 3, R, R] with other real ones [M, 3, R, R];
    `kernel_of_real` compares the same held-out images undecoded: what remains when nothing is lost.
    """
    decoded = round_trip(autoencoder, held_out)
    real = extractor(others).cpu().numpy()
    quality: dict[str, Any] = {
        "psnr_db": float(psnr(held_out.numpy(), decoded.numpy()).mean()),
        "kernel_of_decoded": float(squared_mmd(extractor(decoded).cpu().numpy(), real)),
        "kernel_of_real": float(squared_mmd(extractor(held_out).cpu().numpy(), real)),
        "num_held_out": len(held_out),
        "features": extractor.id,
    }
    if lpips is not None:
        pairs = zip(held_out.split(BATCH), decoded.split(BATCH), strict=True)
        quality["lpips_alexnet"] = float(torch.cat([lpips(to_unit(a), to_unit(b)).cpu() for a, b in pairs]).mean())
    return quality
