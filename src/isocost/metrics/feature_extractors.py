"""The extractors by name: what a protocol may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from isocost.errors import RequestError
from isocost.metrics.efficientnet import EfficientNetLite0
from isocost.metrics.extractor_base import Extractor
from isocost.metrics.inception import URL, Inception
from isocost.metrics.vit import TOWERS, ClipTower, PictureTower

EXTRACTOR_NAMES = ("efficientnet-lite0", "inception", *TOWERS)


def make_extractor(
    name: str, *, feature_side: int = 64, weights: Mapping[Any, str] | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """The extractor called `name`; `feature_side` is EfficientNet-lite0's alone, the others have their own.

    `weights` maps names to places (`isocost.metrics.weights`) where the published ones are not to be fetched.

    Raises:
        RequestError: there is no such extractor, or its weights cannot be had.
    """
    place = (weights or {}).get(name)
    if name == "efficientnet-lite0":
        if place is not None:
            raise RequestError("efficientnet-lite0 comes with its package and takes no other weights; take it out of weights")
        return EfficientNetLite0(side=feature_side, device=device)
    if name == "inception":
        return Inception(place or URL, device)
    if name not in TOWERS:
        raise RequestError(f"no extractor is called {name!r}; known: {', '.join(EXTRACTOR_NAMES)}")
    return (ClipTower if TOWERS[name].kind == "clip" else PictureTower)(name, place, device)
