"""Score images that are in memory or in folders against reference images, without a named protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from isocost.config.evaluation import MIN_IMAGES, ProtocolSpec
from isocost.errors import ConfigError
from isocost.evaluation.confidence_intervals import Interval
from isocost.evaluation.evaluator import score
from isocost.evaluation.feature_store import SampleFeatures
from isocost.evaluation.image_sources import SourceImage, iter_images
from isocost.evaluation.protocol import make_protocol
from isocost.evaluation.reference_set import ReferenceSet, make_extractors
from isocost.evaluation.reference_stats import FeatureSet, extract_features
from isocost.utils.device import best_device

Images = str | Path | np.ndarray | Tensor | Sequence[Image.Image]


def score_images(
    images: Images,
    reference: Images,
    metrics: Sequence[str],
    features: Sequence[str],
    feature_size: int = 64,
    weights: Mapping[str, str] | None = None,
) -> dict[str, Interval]:
    """Score images against reference images.

    Args:
        images: a folder, uint8 [N, H, W, 3] (NumPy), uint8 [N, 3, H, W] (torch), or PIL images.
        reference: the same.
        metrics: names that `protocol.metrics` takes; metrics that compare with prompts are not available here.
        features: names that `protocol.features` takes.
        feature_size: height and width in pixels at which EfficientNet-lite0 sees the images.
        weights: sources of weights by extractor name, in place of the published ones.

    Returns:
        Column name -> score with its 95 % interval.

    Raises:
        ConfigError: a name is unknown, an input is missing or of the wrong type, or there are too few images.
    """
    if "prompt_similarity" in metrics:
        raise ConfigError("score: prompt_similarity compares images with prompts; use a study, or `score_folder` with prompts")
    spec = ProtocolSpec(
        features=tuple(features), metrics=tuple(metrics), feature_size=feature_size, weights=dict(weights or {})
    )
    extractors = make_extractors(spec, best_device())
    generated = _features_of(images, "images", extractors)
    real = _features_of(reference, "reference", extractors)
    protocol = make_protocol(
        spec.model_copy(update={"num_images": len(generated)}),
        resolution=0,
        extractor=[extractor.id for extractor in extractors.values()],
        reference=real.content,
        num_reference=len(real),
        prompts=[],
    )
    reference_set = ReferenceSet(protocol, extractors, real.features, [])
    return score(SampleFeatures(generated.features), reference_set, tuple(metrics))


def _features_of(images: Images, name: str, extractors: Any) -> FeatureSet:
    features = extract_features(_iter_images(images, name), extractors)
    if len(features) < MIN_IMAGES:
        raise ConfigError(f"score: {name}: {len(features)} images; give at least {MIN_IMAGES}")
    return features


def _iter_images(images: Images, name: str) -> Iterator[SourceImage]:
    if isinstance(images, str | Path):
        yield from iter_images(str(images), resolution=None, exact=False)
        return
    for number, pixels in enumerate(_pixels(images, name)):
        yield SourceImage(f"{number:08d}", f"{name} {number}", pixels)


def _pixels(images: np.ndarray | Tensor | Sequence[Image.Image], name: str) -> Iterator[Tensor]:
    """uint8 [3, H, W] of each image."""
    if isinstance(images, Tensor):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ConfigError(f"score: {name}: a tensor of {images.dtype} {list(images.shape)}; give uint8 [N, 3, H, W]")
        yield from images.cpu()
    elif isinstance(images, np.ndarray):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ConfigError(f"score: {name}: an array of {images.dtype} {list(images.shape)}; give uint8 [N, H, W, 3]")
        yield from torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    else:
        for image in images:
            if not isinstance(image, Image.Image):
                raise ConfigError(
                    f"score: {name}: a {type(image).__name__}; give a folder, uint8 arrays or tensors, or PIL images"
                )
            if image.mode not in ("RGB", "L"):
                raise ConfigError(f"score: {name}: an image of mode {image.mode}; convert it to RGB first")
            yield torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
