"""The saved features of a point's images, in shards. New scores and bootstraps of a point need no sampling.

Shapes: N images, D features per image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from isocost.errors import RunError
from isocost.utils.tensor_files import read_tensors

SHARD_SIZE = 4096
PER_IMAGE_FILE = "by_image.safetensors"


@dataclass
class SampleFeatures:
    """The data from which the scores of a point are computed, one row per image.

    Attributes:
        features: float32 [N, D] by extractor name, in the order of image ids.
        alignment: fraction of labels that the attribute classifier recognises in each image, float64 [N]; None without labels.
        ids: image ids of the rows, int64 [N], ascending; None if row i is image i.
        paired_metrics: scores of each image against its original, float64 [N] by metric; empty without originals.
    """

    features: dict[str, np.ndarray]
    alignment: np.ndarray | None = None
    ids: np.ndarray | None = None
    paired_metrics: dict[str, np.ndarray] = field(default_factory=dict)


def write_features(folder: Path, features: Mapping[str, np.ndarray], feature_dtype: str = "fp32") -> None:
    """Write the features of each extractor as shards `NAME-00000.safetensors`, ... of 4096 images.

    Args:
        folder: an existing folder.
        features: float32 [N, D] by extractor name.
        feature_dtype: "fp32", or "fp16" for half the size. float16 changes a feature by at most 2⁻¹¹ of its value, or by
            2⁻²⁵ if the value is below 2⁻¹⁴.

    Raises:
        RunError: a feature is not finite, or too large for float16.
    """
    for name, matrix in features.items():
        if not np.isfinite(matrix).all():
            raise RunError(
                f"{name}: {int((~np.isfinite(matrix)).any(1).sum())} images have NaN or infinite features; "
                "check the weights of this feature extractor"
            )
        if feature_dtype == "fp16" and np.abs(matrix).max(initial=0.0) > np.finfo(np.float16).max:
            raise RunError(f"{name}: features are too large for float16: set protocol.feature_dtype to fp32")
        tensor = torch.from_numpy(np.ascontiguousarray(matrix)).to(torch.float32 if feature_dtype == "fp32" else torch.float16)
        for number, shard in enumerate(tensor.split(SHARD_SIZE)):
            save_file({"features": shard.contiguous()}, folder / f"{name}-{number:05d}.safetensors")


def read_features(folder: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Read the features of the extractors `names`, float32 [N, D] each, from an artefact's folder.

    Raises:
        RunError: an extractor has no shards there, or a shard is damaged.
    """
    features = {}
    for name in names:
        shards = sorted(folder.glob(f"{name}-[0-9][0-9][0-9][0-9][0-9].safetensors"))
        if not shards:
            raise RunError(f"{folder}: no features of {name}; delete the folder, then the next run computes them again")
        features[name] = torch.cat([read_tensors(shard, "features")["features"].float() for shard in shards]).numpy()
    return features


def write_sample_features(folder: Path, samples: SampleFeatures, feature_dtype: str = "fp32") -> None:
    """Write features as shards, and ids, alignment and paired metrics as one file.

    Raises:
        RunError: a feature is not finite, or too large for float16.
    """
    write_features(folder, samples.features, feature_dtype)
    per_image = {"ids": samples.ids, "alignment": samples.alignment, **samples.paired_metrics}
    tensors = {name: torch.from_numpy(values) for name, values in per_image.items() if values is not None}
    save_file(tensors, folder / PER_IMAGE_FILE)


def read_sample_features(folder: Path, names: tuple[str, ...]) -> SampleFeatures:
    """Read the output of `write_sample_features`, or the single file of an older version.

    Raises:
        RunError: the folder has no features of an extractor in `names`, or a file is damaged.
    """
    tensors = {name: tensor.numpy() for name, tensor in read_tensors(folder / PER_IMAGE_FILE).items()}
    paired_metrics = {name: values for name, values in tensors.items() if name not in ("alignment", "ids")}
    return SampleFeatures(read_features(folder, names), tensors.get("alignment"), tensors.get("ids"), paired_metrics)
