"""Configuration of the evaluation protocol."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from isocost.config.base import Spec
from isocost.config.types import MAX_SAMPLES, Seed

MIN_IMAGES = 32
"""With fewer generated or reference images than this, the interval of a distance is meaningless."""
PairedMetricName = Literal["psnr", "ssim", "lpips"]


class ProtocolSpec(Spec):
    """The evaluation protocol. Two scores are comparable only if they have the same protocol."""

    num_images: int = Field(1000, ge=MIN_IMAGES, le=MAX_SAMPLES, description="generated images per point")
    num_reference: int | None = Field(
        None, ge=MIN_IMAGES, le=MAX_SAMPLES, description="number of reference images; all if absent"
    )
    features: tuple[str, ...] = Field(
        ("efficientnet-lite0",), min_length=1, description="one or more feature extractors; see `isocost list extractors`"
    )
    weights: dict[str, str] = Field(
        default_factory=dict,
        description="weights by extractor: PATH, URL or hub:NAME@REVISION, optionally with #sha256=HEX at the end",
    )
    feature_size: int = Field(
        64, ge=32, le=2048, description="input size of EfficientNet-lite0, pixels; other extractors have a fixed size"
    )
    feature_dtype: Literal["fp32", "fp16"] = Field(
        "fp32", description="dtype of the stored features, which are the scored ones"
    )
    alignment: Literal["scenes", "class", "none"] = Field(
        "none", description="attributes that a classifier checks: those of `scenes`, or the `class` label; none disables it"
    )
    metrics: tuple[str, ...] = Field(("mmd",), description="names of metrics; see `isocost list metrics`")
    paired_metrics: tuple[PairedMetricName, ...] = Field(
        (), description="super-resolution: metrics between each image and its original"
    )
    lpips: str | None = Field(None, description="AlexNet as a safetensors file for LPIPS; torchvision's weights if absent")
    num_bootstrap: int = Field(200, ge=20, le=100_000, description="bootstrap resamples of an interval")
    seed: Seed = Field(0, description="seed of the bootstrap and of the attribute classifier")

    @field_validator("features", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("features")
    @classmethod
    def _distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) != len(names):
            raise ValueError("name each extractor once")
        return names
