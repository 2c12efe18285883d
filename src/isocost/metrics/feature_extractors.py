"""The extractors by name: what a protocol may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from isocost.errors import ConfigError
from isocost.metrics.efficientnet import EfficientNetLite0
from isocost.metrics.extractor_base import FeatureExtractor
from isocost.metrics.inception import URL, Inception
from isocost.metrics.vit import VIT_EXTRACTORS, CLIPFeatureExtractor, ViTFeatureExtractor

EXTRACTOR_NAMES = ("efficientnet-lite0", "inception", *VIT_EXTRACTORS)


def make_extractor(
    name: str, *, feature_size: int = 64, weights: Mapping[Any, str] | None = None, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """The extractor called `name`; `feature_size` is EfficientNet-lite0's alone, the others have their own.

    `weights` maps names to places (`isocost.metrics.weights`) where the published ones are not to be fetched.

    Raises:
        ConfigError: there is no such extractor, or its weights cannot be had.
    """
    place = (weights or {}).get(name)
    if name == "efficientnet-lite0":
        if place is not None:
            raise ConfigError("efficientnet-lite0 comes with its package and takes no other weights; take it out of weights")
        return EfficientNetLite0(side=feature_size, device=device)
    if name == "inception":
        return Inception(place or URL, device)
    if name not in VIT_EXTRACTORS:
        raise ConfigError(f"no extractor is called {name!r}; known: {', '.join(EXTRACTOR_NAMES)}")
    return (CLIPFeatureExtractor if VIT_EXTRACTORS[name].kind == "clip" else ViTFeatureExtractor)(name, place, device)
