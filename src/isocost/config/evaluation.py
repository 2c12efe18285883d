"""Configuration of the evaluation protocol."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from isocost.config.base import Spec

LEAST_PICTURES = 32
"""Fewer pictures on either side than this give a distance whose interval says nothing."""
FeatureName = Literal[
    "efficientnet-lite0",
    "inception",
    "clip-vit-b-32",
    "clip-vit-l-14",
    "clip-vit-l-14-336",
    "dinov2-vit-b-14",
    "dinov2-vit-l-14",
    "dino-vit-s-16",
    "pickscore",
    "hpsv2",
]
PairName = Literal["psnr", "ssim", "lpips"]
DistanceName = Literal[
    "kernel",
    "frechet",
    "frechet_infinity",
    "precision_recall",
    "density_coverage",
    "inception_score",
    "cmmd",
    "caption",
    "subject",
]


class ProtocolSpec(Spec):
    """What makes two numbers comparable: pictures, captions, features, reference."""

    num_pictures: int = Field(1000, ge=LEAST_PICTURES)
    num_reference: int | None = Field(None, ge=LEAST_PICTURES, description="reference pictures used; all where absent")
    features: tuple[FeatureName, ...] = Field(
        ("efficientnet-lite0",), min_length=1, description="one extractor or several, in one pass over the pictures"
    )
    weights: dict[FeatureName, str] = Field(
        default_factory=dict, description="where an extractor's weights lie: PATH, URL or hub:NAME@REVISION, #sha256=HEX behind"
    )
    feature_side: int = Field(64, ge=32, description="side that EfficientNet-lite0 sees, pixels; the others have their own")
    kept: Literal["fp32", "fp16"] = Field("fp32", description="precision in which a point keeps its features, and is scored")
    alignment: Literal["scenes", "class", "none"] = "none"
    distances: tuple[DistanceName, ...] = ("kernel",)
    pairs: tuple[PairName, ...] = Field((), description="super-resolution: each picture against its original")
    lpips: str | None = Field(None, description="AlexNet as a safetensors file for LPIPS; torchvision's where absent")
    num_bootstrap: int = Field(200, ge=20)
    seed: int = 0

    @field_validator("features", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("features")
    @classmethod
    def _each_once(cls, names: tuple[FeatureName, ...]) -> tuple[FeatureName, ...]:
        if len(set(names)) != len(names):
            raise ValueError("each extractor once")
        return names
