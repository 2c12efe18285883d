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
        feature_dim: features per image; None if it is known only after loading. Estimates need it.
        gflop: GFLOP of one image by `protocol.feature_size`; None if unknown. Estimates need it.
    """

    name: str
    column: str
    label: str
    make: MakeExtractor
    embeds_text: bool = False
    is_preference_model: bool = False
    classifies: bool = False
    feature_dim: int | None = None
    gflop: Callable[[int], float] | None = None


EFFICIENTNET_GFLOP_PER_PIXEL = 1.53024375e-5
ALEXNET_LAYERS = (
    (3, 64, 11, 4, 2, False), (64, 192, 5, 1, 2, True), (192, 384, 3, 1, 1, True),
    (384, 256, 3, 1, 1, False), (256, 256, 3, 1, 1, False),
)  # fmt: skip
"""Convolutions: channels in and out, kernel, stride, padding, and whether a max pool (3, stride 2) precedes."""
VIT_GFLOP = {
    "clip-vit-b-32": 8.82,
    "clip-vit-l-14": 162.03,
    "clip-vit-l-14-336": 381.92,
    "dinov2-vit-b-14": 46.32,
    "dinov2-vit-l-14": 162.02,
    "dino-vit-s-16": 9.20,
    "pickscore": 334.59,
    "hpsv2": 334.59,
}
"""GFLOP of one image at the extractor's input size, counted on the meta device as in `models/flops.py`."""

EXTRACTORS: Registry[RegisteredExtractor] = Registry("feature extractor")


def register_extractor(
    name: str,
    *,
    label: str | None = None,
    column: str | None = None,
    embeds_text: bool = False,
    is_preference_model: bool = False,
    classifies: bool = False,
    feature_dim: int | None = None,
    gflop: float | Callable[[int], float] | None = None,
) -> Callable[[MakeExtractor], MakeExtractor]:
    """Register the decorated function as the maker of a feature extractor.

    Args:
        name: as in `protocol.features`.
        label: its name in figures and tables; `name` by default.
        column: its part of column names; `name` with underscores by default.
        embeds_text: the extractor has `encode_text(texts) -> float32 [K, D]` and `scale`.
        is_preference_model: its image-text similarity is a trained preference score.
        classifies: the extractor has `logits(features) -> [N, L]`.
        feature_dim: features per image. Without it an estimate leaves out the disk space of the features.
        gflop: GFLOP of one image (one multiply-add is 2 FLOP), as a number or by `feature_size` in pixels. Without it an
            estimate leaves out the time of the extractor.

    Returns:
        A decorator for a function (feature_size, weights, device) -> FeatureExtractor. The function imports what it needs
        itself, so that a name can be registered without loading torch.

    Raises:
        ConfigError: the name is taken.
    """

    def register(make: MakeExtractor) -> MakeExtractor:
        column_name = column or re.sub(r"\W+", "_", name)
        by_size = gflop if gflop is None or callable(gflop) else lambda _: float(gflop)
        entry = RegisteredExtractor(
            name, column_name, label or name, make, embeds_text, is_preference_model, classifies, feature_dim, by_size
        )
        EXTRACTORS.add(name, entry)
        return make

    return register


def alexnet_gflop(feature_size: int) -> float:
    """GFLOP of AlexNet's five convolutions on an image of `feature_size` x `feature_size` pixels."""
    multiply_adds, side = 0, feature_size
    for inputs, outputs, kernel, stride, padding, pooled in ALEXNET_LAYERS:
        side = (((side - 3) // 2 + 1 if pooled else side) + 2 * padding - kernel) // stride + 1
        multiply_adds += side**2 * outputs * inputs * kernel**2
    return 2 * multiply_adds / 1e9


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


@register_extractor(
    "efficientnet-lite0", label="EfficientNet-lite0", column="efficientnet", classifies=True, feature_dim=1280,
    gflop=lambda feature_size: EFFICIENTNET_GFLOP_PER_PIXEL * feature_size**2,
)  # fmt: skip
def _efficientnet(feature_size: int, weights: str | None, device: Any) -> FeatureExtractor:
    from isocost.metrics.efficientnet import EfficientNetLite0

    if weights is not None:
        raise ConfigError("efficientnet-lite0 has its own weights and takes no others; remove it from protocol.weights")
    return EfficientNetLite0(side=feature_size, device=device)


@register_extractor("alexnet", label="AlexNet", feature_dim=1152, gflop=alexnet_gflop)
def _alexnet(feature_size: int, weights: str | None, device: Any) -> FeatureExtractor:
    from isocost.metrics.alexnet import AlexNetFeatures

    return AlexNetFeatures(feature_size, weights, device)


@register_extractor("inception", label="Inception", classifies=True, feature_dim=2048, gflop=11.42)
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
        name, label=spec.title, column=column, embeds_text=spec.kind == "clip", is_preference_model=is_preference_model,
        feature_dim=spec.feature_dim, gflop=VIT_GFLOP[name],
    )(make)  # fmt: skip


for _name in VIT_EXTRACTORS:
    _register_vit(_name)
