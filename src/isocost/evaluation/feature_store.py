"""What a point keeps of its images: features in shards, so that new scores and bootstraps need no sampling.

Shapes: N images, D features, S images a shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from isocost.errors import RunError

SHARD_SIZE = 4096
PER_IMAGE_FILE = "by_image.safetensors"
ONE_EXTRACTOR_FILE = "measured.safetensors"
"""Where points kept features and alignment when there was one extractor."""


@dataclass
class SampleFeatures:
    """What is kept of a point's images.

    Attributes:
        features: float32 [N, D] by extractor name, in the order of image ids.
        alignment: the share of labels found in each image, float64 [N]; None where there are none to find.
        paired_metrics: each image against its original, float64 [N] by score name; empty where there are no originals.
        ids: image ids of the rows, int64 [N], rising; None where row i is image i.
    """

    features: dict[str, np.ndarray]
    alignment: np.ndarray | None = None
    ids: np.ndarray | None = None
    paired_metrics: dict[str, np.ndarray] = field(default_factory=dict)


def write_features(folder: Path, features: Mapping[str, np.ndarray], feature_dtype: str = "fp32") -> None:
    """`NAME-00000.safetensors` and so on: features [N, D] of each extractor in shards of 4096 images.

    `kept` "fp16" halves them: a feature moves by at most 2⁻¹¹ of itself, or by 2⁻²⁵ where it is below 2⁻¹⁴.

    Raises:
        RunError: a feature is no finite number, or too large for float16.
    """
    for name, matrix in features.items():
        if not np.isfinite(matrix).all():
            raise RunError(f"{name}: {int((~np.isfinite(matrix)).any(1).sum())} images have features that are not finite")
        if feature_dtype == "fp16" and np.abs(matrix).max(initial=0.0) > np.finfo(np.float16).max:
            raise RunError(f"{name}: features are too large for float16: set protocol.feature_dtype to fp32")
        whole = torch.from_numpy(np.ascontiguousarray(matrix)).to(torch.float32 if feature_dtype == "fp32" else torch.float16)
        for number, shard in enumerate(whole.split(SHARD_SIZE)):
            save_file({"features": shard.contiguous()}, folder / f"{name}-{number:05d}.safetensors")


def read_features(folder: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Features by extractor, float32 [N, D], of an artefact's folder.

    Raises:
        RunError: an extractor has no shards there.
    """
    features = {}
    for name in names:
        shards = sorted(folder.glob(f"{name}-[0-9][0-9][0-9][0-9][0-9].safetensors"))
        if not shards:
            raise RunError(f"{folder}: no features of {name}; remove the folder, and the next run makes it anew")
        features[name] = torch.cat([load_file(shard)["features"].float() for shard in shards]).numpy()
    return features


def write_measured(folder: Path, measured: SampleFeatures, feature_dtype: str = "fp32") -> None:
    """Features in shards, and beside them the images' ids, alignment and pair scores where they have them."""
    write_features(folder, measured.features, feature_dtype)
    by_image = {"ids": measured.ids, "alignment": measured.alignment, **measured.paired_metrics}
    tensors = {name: torch.from_numpy(values) for name, values in by_image.items() if values is not None}
    save_file(tensors, folder / PER_IMAGE_FILE)


def read_measured(folder: Path, names: tuple[str, ...]) -> SampleFeatures:
    """What `write_measured` wrote, or a point from when there was one extractor and one file."""
    older = folder / ONE_EXTRACTOR_FILE
    file = older if older.is_file() else folder / PER_IMAGE_FILE
    tensors = {name: tensor.numpy() for name, tensor in load_file(file).items()}
    features = {names[0]: tensors["features"]} if older.is_file() else read_features(folder, names)
    pairs = {name: values for name, values in tensors.items() if name not in ("features", "alignment", "ids")}
    return SampleFeatures(features, tensors.get("alignment"), tensors.get("ids"), pairs)
