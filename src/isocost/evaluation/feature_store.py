"""What a point keeps of its pictures: features in shards, so that new scores and bootstraps need no sampling.

Shapes: N pictures, D features, S pictures a shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from isocost.errors import WorkError

SHARD_SIZE = 4096
BY_PICTURE_FILE = "by_picture.safetensors"
ONE_EXTRACTOR_FILE = "measured.safetensors"
"""Where points kept features and alignment when there was one extractor."""


@dataclass
class Measured:
    """What is kept of a point's pictures.

    Attributes:
        features: float32 [N, D] by extractor name, in the order of picture ids.
        alignment: the share of labels found in each picture, float64 [N]; None where there are none to find.
        pairs: each picture against its original, float64 [N] by score name; empty where there are no originals.
        ids: picture ids of the rows, int64 [N], rising; None where row i is picture i.
    """

    features: dict[str, np.ndarray]
    alignment: np.ndarray | None = None
    ids: np.ndarray | None = None
    pairs: dict[str, np.ndarray] = field(default_factory=dict)


def write_features(folder: Path, features: Mapping[str, np.ndarray], kept: str = "fp32") -> None:
    """`NAME-00000.safetensors` and so on: features [N, D] of each extractor in shards of 4096 pictures.

    `kept` "fp16" halves them: a feature moves by at most 2⁻¹¹ of itself, or by 2⁻²⁵ where it is below 2⁻¹⁴.

    Raises:
        WorkError: a feature is no finite number, or too large for float16.
    """
    for name, matrix in features.items():
        if not np.isfinite(matrix).all():
            raise WorkError(f"{name}: {int((~np.isfinite(matrix)).any(1).sum())} pictures have features that are not finite")
        if kept == "fp16" and np.abs(matrix).max(initial=0.0) > np.finfo(np.float16).max:
            raise WorkError(f"{name}: features are too large for float16: set protocol.kept to fp32")
        whole = torch.from_numpy(np.ascontiguousarray(matrix)).to(torch.float32 if kept == "fp32" else torch.float16)
        for number, shard in enumerate(whole.split(SHARD_SIZE)):
            save_file({"features": shard.contiguous()}, folder / f"{name}-{number:05d}.safetensors")


def read_features(folder: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Features by extractor, float32 [N, D], of an artefact's folder.

    Raises:
        WorkError: an extractor has no shards there.
    """
    features = {}
    for name in names:
        shards = sorted(folder.glob(f"{name}-[0-9][0-9][0-9][0-9][0-9].safetensors"))
        if not shards:
            raise WorkError(f"{folder}: no features of {name}; remove the folder, and the next run makes it anew")
        features[name] = torch.cat([load_file(shard)["features"].float() for shard in shards]).numpy()
    return features


def write_measured(folder: Path, measured: Measured, kept: str = "fp32") -> None:
    """Features in shards, and beside them the pictures' ids, alignment and pair scores where they have them."""
    write_features(folder, measured.features, kept)
    by_picture = {"ids": measured.ids, "alignment": measured.alignment, **measured.pairs}
    tensors = {name: torch.from_numpy(values) for name, values in by_picture.items() if values is not None}
    save_file(tensors, folder / BY_PICTURE_FILE)


def read_measured(folder: Path, names: tuple[str, ...]) -> Measured:
    """What `write_measured` wrote, or a point from when there was one extractor and one file."""
    older = folder / ONE_EXTRACTOR_FILE
    file = older if older.is_file() else folder / BY_PICTURE_FILE
    tensors = {name: tensor.numpy() for name, tensor in load_file(file).items()}
    features = {names[0]: tensors["features"]} if older.is_file() else read_features(folder, names)
    pairs = {name: values for name, values in tensors.items() if name not in ("features", "alignment", "ids")}
    return Measured(features, tensors.get("alignment"), tensors.get("ids"), pairs)
