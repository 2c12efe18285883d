"""The interface of a feature extractor."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class FeatureExtractor(Protocol):
    """Images to features. `id` tells exactly how the numbers are made; equal ids mean comparable features."""

    @property
    def id(self) -> str: ...

    @property
    def feature_dim(self) -> int: ...

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] to float32 [N, feature_dim]."""
        ...
