"""The embedding of the guidance weight for networks that take it as an input."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor


def guidance_embedding(guidance: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding of 1000 (w - 1), as in diffusers' LCM pipeline (arXiv 2310.04378, appendix).

    Args:
        guidance: w, [B].
        width: width of the embedding; 1 returns w itself, for networks that embed it themselves (Flux).

    Returns:
        [B, width].
    """
    if width == 1:
        return guidance[:, None]
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=guidance.device) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = 1000.0 * (guidance - 1)[:, None] * frequencies[None]
    return functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))
