"""The embedding of the guidance weight for networks that take it as an input."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor


def guidance_embedding(guidance: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding [B, width] of w [B] (arXiv 2310.04378, appendix; as diffusers' LCM pipeline: of 1000 (w - 1)).

    Of width 1 it is w itself, for networks that embed it on their own (Flux).
    """
    if width == 1:
        return guidance[:, None]
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=guidance.device) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = 1000.0 * (guidance - 1)[:, None] * frequencies[None]
    return functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))
