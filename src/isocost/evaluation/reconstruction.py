"""Reconstruction quality of an autoencoder: decoded test images compared with the originals and with other real images.

Shapes: N test images, M other real images, R resolution.
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
    """Encode images uint8 [N, 3, R, R] to their mean latents and decode them again."""
    return torch.cat([autoencoder.decode(autoencoder.encode(batch)[0]).cpu() for batch in images.split(BATCH)])


@torch.inference_mode()
def autoencoder_quality(
    autoencoder: Autoencoder, held_out: Tensor, others: Tensor, extractor: FeatureExtractor, lpips: Lpips | None
) -> dict[str, Any]:
    """PSNR, LPIPS and squared MMD of decoded images.

    Args:
        autoencoder: encodes and decodes the images.
        held_out: test images, uint8 [N, 3, R, R].
        others: other real images, uint8 [M, 3, R, R].
        extractor: features of the squared MMD.
        lpips: AlexNet LPIPS; None leaves it out.

    Returns:
        `psnr_db`: mean over images; `lpips_alexnet`: mean over images; `mmd_of_decoded`: squared MMD between the decoded
        test images and the other real images; `mmd_of_real`: the same of the original test images, the value without any
        loss; the number of test images and the extractor's id.
    """
    decoded = round_trip(autoencoder, held_out)
    real = extractor(others).cpu().numpy()
    quality: dict[str, Any] = {
        "psnr_db": float(psnr(held_out.numpy(), decoded.numpy()).mean()),
        "mmd_of_decoded": float(squared_mmd(extractor(decoded).cpu().numpy(), real)),
        "mmd_of_real": float(squared_mmd(extractor(held_out).cpu().numpy(), real)),
        "num_held_out": len(held_out),
        "features": extractor.id,
    }
    if lpips is not None:
        pairs = zip(held_out.split(BATCH), decoded.split(BATCH), strict=True)
        quality["lpips_alexnet"] = float(torch.cat([lpips(to_unit(a), to_unit(b)).cpu() for a, b in pairs]).mean())
    return quality
