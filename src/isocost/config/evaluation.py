"""Configuration of the evaluation protocol."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from isocost.config.base import Spec

MIN_IMAGES = 32
"""Fewer images on either side than this give a distance whose interval says nothing."""
ExtractorName = Literal[
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
PairedMetricName = Literal["psnr", "ssim", "lpips"]
MetricGroupName = Literal[
    "mmd",
    "frechet",
    "frechet_infinity",
    "precision_recall",
    "density_coverage",
    "inception_score",
    "cmmd",
    "prompt_similarity",
    "subject_similarity",
]


class ProtocolSpec(Spec):
    """What makes two numbers comparable: images, captions, features, reference."""

    num_images: int = Field(1000, ge=MIN_IMAGES)
    num_reference: int | None = Field(None, ge=MIN_IMAGES, description="reference images used; all where absent")
    features: tuple[ExtractorName, ...] = Field(
        ("efficientnet-lite0",), min_length=1, description="one extractor or several, in one pass over the images"
    )
    weights: dict[ExtractorName, str] = Field(
        default_factory=dict, description="where an extractor's weights lie: PATH, URL or hub:NAME@REVISION, #sha256=HEX behind"
    )
    feature_size: int = Field(64, ge=32, description="side that EfficientNet-lite0 sees, pixels; the others have their own")
    feature_dtype: Literal["fp32", "fp16"] = Field(
        "fp32", description="precision in which a point keeps its features, and is scored"
    )
    alignment: Literal["scenes", "class", "none"] = "none"
    metrics: tuple[MetricGroupName, ...] = ("mmd",)
    paired_metrics: tuple[PairedMetricName, ...] = Field((), description="super-resolution: each image against its original")
    lpips: str | None = Field(None, description="AlexNet as a safetensors file for LPIPS; torchvision's where absent")
    num_bootstrap: int = Field(200, ge=20)
    seed: int = 0

    @field_validator("features", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("features")
    @classmethod
    def _each_once(cls, names: tuple[ExtractorName, ...]) -> tuple[ExtractorName, ...]:
        if len(set(names)) != len(names):
            raise ValueError("each extractor once")
        return names
