"""The registry of feature extractors: the names that `protocol.features` takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from isocost.errors import ConfigError
from isocost.metrics.vit_models import VIT_EXTRACTORS
from isocost.utils.registry import Registry

if TYPE_CHECKING:
    import torch

    from isocost.metrics.extractor_base import FeatureExtractor

MakeExtractor = Callable[[int, str | None, Any], "FeatureExtractor"]


@dataclass(frozen=True)
class RegisteredExtractor:
    """A registered feature extractor.

    Attributes:
        name: as in `protocol.features`.
        column: its part of a column name in the results table: "efficientnet" in `mmd_efficientnet`.
        label: its name in figures and tables.
        make: (feature_size in pixels, source of other weights or None, device) -> the extractor.
        embeds_text: whether it has `encode_text`, so that images are compared with prompts.
        is_preference_model: whether its image-text similarity is a trained preference score.
        classifies: whether it has `logits`, so that an Inception score can be computed.
    """

    name: str
    column: str
    label: str
    make: MakeExtractor
    embeds_text: bool = False
    is_preference_model: bool = False
    classifies: bool = False


EXTRACTORS: Registry[RegisteredExtractor] = Registry("feature extractor")


def register_extractor(
    name: str,
    *,
    label: str | None = None,
    column: str | None = None,
    embeds_text: bool = False,
    is_preference_model: bool = False,
    classifies: bool = False,
) -> Callable[[MakeExtractor], MakeExtractor]:
    """Register the decorated function as the maker of a feature extractor.

    Args:
        name: as in `protocol.features`.
        label: its name in figures and tables; `name` by default.
        column: its part of column names; `name` with underscores by default.
        embeds_text: the extractor has `encode_text(texts) -> float32 [K, D]` and `scale`.
        is_preference_model: its image-text similarity is a trained preference score.
        classifies: the extractor has `logits(features) -> [N, L]`.

    Returns:
        A decorator for a function (feature_size, weights, device) -> FeatureExtractor. The function imports what it needs
        itself, so that a name can be registered without loading torch.

    Raises:
        ConfigError: the name is taken.
    """

    def register(make: MakeExtractor) -> MakeExtractor:
        column_name = column or re.sub(r"\W+", "_", name)
        entry = RegisteredExtractor(name, column_name, label or name, make, embeds_text, is_preference_model, classifies)
        EXTRACTORS.add(name, entry)
        return make

    return register


def make_extractor(
    name: str, *, feature_size: int = 64, weights: Mapping[Any, str] | None = None, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """Load the feature extractor `name`.

    Args:
        name: a registered name.
        feature_size: height and width in pixels at which EfficientNet-lite0 sees images; other extractors have their own.
        weights: sources of weights by name (`isocost.metrics.download`), in place of the published ones.
        device: where the network runs.

    Raises:
        ConfigError: there is no such extractor, or its weights cannot be loaded.
    """
    return EXTRACTORS[name].make(feature_size, (weights or {}).get(name), device)


@register_extractor("efficientnet-lite0", label="EfficientNet-lite0", column="efficientnet", classifies=True)
def _efficientnet(feature_size: int, weights: str | None, device: Any) -> FeatureExtractor:
    from isocost.metrics.efficientnet import EfficientNetLite0

    if weights is not None:
        raise ConfigError("efficientnet-lite0 has its own weights and takes no others; remove it from protocol.weights")
    return EfficientNetLite0(side=feature_size, device=device)


@register_extractor("inception", label="Inception", classifies=True)
def _inception(feature_size: int, weights: str | None, device: Any) -> FeatureExtractor:
    from isocost.metrics.inception import URL, Inception

    return Inception(weights or URL, device)


def _register_vit(name: str) -> None:
    spec = VIT_EXTRACTORS[name]
    family, *rest = name.replace("-vit-", "-").split("-")
    column = "_".join([family, "".join(rest[:2]), *rest[2:]]) if rest else family

    def make(feature_size: int, weights: str | None, device: Any) -> FeatureExtractor:
        from isocost.metrics.vit import CLIPFeatureExtractor, ViTFeatureExtractor

        return (CLIPFeatureExtractor if spec.kind == "clip" else ViTFeatureExtractor)(name, weights, device)

    is_preference_model = name in ("pickscore", "hpsv2")
    register_extractor(
        name, label=spec.title, column=column, embeds_text=spec.kind == "clip", is_preference_model=is_preference_model
    )(make)


for _name in VIT_EXTRACTORS:
    _register_vit(_name)
