"""The features of AlexNet on which LPIPS is defined: a second judge that needs one small weights file.

Shapes: N images, H x W pixels, S x S pixels at the network's input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from isocost.errors import ConfigError
from isocost.metrics.download import find_weights
from isocost.metrics.lpips import load_lpips
from isocost.metrics.preprocessing import run_in_batches

MIN_SIDE = 64
"""Smallest side in pixels; below 63 AlexNet has no positions left."""


class AlexNetFeatures:
    """1152 features per image: the mean over the positions of each of the five feature maps that LPIPS compares.

    Images are resized to `side` x `side` in floating point (bicubic, antialiased, clipped to 0..255 and not rounded) and
    normalized by the mean and deviation of ImageNet.

    Source: LPIPS, arXiv 1801.03924, section 3; torchvision's AlexNet, IMAGENET1K_V1.
    """

    BATCH_SIZE = 32

    feature_dim = 64 + 192 + 384 + 256 + 256

    def __init__(self, side: int, weights: str | None = None, device: torch.device | str = "cpu") -> None:
        """Load the network.

        Args:
            side: height and width in pixels to which images are resized, at least 64.
            weights: a source as in `isocost.metrics.download` of a safetensors file with the convolutions under torchvision's
                names; torchvision's own weights by default.
            device: where the network runs.

        Raises:
            ConfigError: `side` is too small, or the weights cannot be loaded.
        """
        if side < MIN_SIDE:
            raise ConfigError(f"feature_size = {side}: AlexNet needs at least {MIN_SIDE} pixels")
        self.side, self.device = side, torch.device(device)
        file = None if weights is None else find_weights(weights, known_sha256=None, title="alexnet").path
        self._lpips = load_lpips(file, device)
        sha256 = self._lpips.id.split(":")[1].split("/")[0]
        self.id = (
            f"alexnet:{sha256}/resize=bicubic-antialias-float/side={side}/crop=none/norm=imagenet/pool=mean-of-5-maps/fp32"
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 [N, 1152], on the extractor's device, of images uint8 [N, 3, H, W], in fixed batches."""
        return run_in_batches(
            images, self._pooled, batch_size=self.BATCH_SIZE, feature_dim=self.feature_dim, device=self.device
        )

    def _pooled(self, batch: Tensor) -> Tensor:
        prepared = batch.float()
        if prepared.shape[-2:] != (self.side, self.side):
            prepared = functional.interpolate(prepared, (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 255)
        return torch.cat([feature_map.mean((2, 3)) for feature_map in self._lpips.maps(prepared / 127.5 - 1)], 1)
