"""A point's images in shards: each is durable or absent, and the point is put together when all are there.

What is kept of an image does not depend on which images came with it, so neither the size of the shards nor who made them
changes a bit of the point.

Shapes: N images of a point, K images kept, R resolution.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from isocost.config.base import digest
from isocost.errors import RunError
from isocost.evaluation.evaluator import FeatureCollector
from isocost.evaluation.feature_store import SampleFeatures, read_measured, write_measured
from isocost.evaluation.reference_set import ReferenceSet
from isocost.sampling.request import SampleResult
from isocost.sweep.grid import SweepPoint
from isocost.utils.artifact_store import Store

MIB = 2**20
VERSION = 1
MAX_NONFINITE_FRACTION = 0.01
IMAGES = "images.safetensors"


@dataclass(frozen=True)
class Shard:
    """Some consecutive images of a point."""

    point: SweepPoint
    images: range
    digest: str


def split_into_shards(point: SweepPoint, size: int, bounds: Sequence[int] = ()) -> list[Shard]:
    """The shards of a point, `size` images each or fewer; up to each of `bounds`, where given, by whole shards."""
    ends = [0, *(bounds or (point.spec.num_images,))]
    ranges = [
        range(first, min(first + size, stop)) for start, stop in itertools.pairwise(ends) for first in range(start, stop, size)
    ]
    stage = {"stage": "shard", "version": VERSION, "point": point.digest}
    return [Shard(point, each, digest(stage, {"first": each.start, "stop": each.stop})) for each in ranges]


@dataclass(frozen=True)
class ShardChunk:
    """What came at once of one shard: images uint8 [n, 3, R, R] of these rows, and the rows that have none."""

    digest: str
    rows: list[SampleResult]
    images: Tensor
    broken: list[SampleResult]


class ShardBuilder:
    """A shard whose images are coming in."""

    def __init__(self, shard: Shard, reference: ReferenceSet, saved_indices: Collection[int]) -> None:
        """`saved_indices` are the indices of the samples whose images every point saves."""
        self.shard, self.reference, self.saved_indices = shard, reference, saved_indices
        self.measuring = FeatureCollector(reference)
        self.images: dict[int, Tensor] = {}
        self.broken: list[int] = []
        self.num_measured = 0
        self.min_batch_size = shard.point.spec.batch_size
        self.started = time.monotonic()

    @property
    def is_whole(self) -> bool:
        """True when every image has come."""
        return self.num_measured + len(self.broken) == len(self.shard.images)

    def add(self, part: ShardChunk) -> None:
        """Measure images, and name those that are not finite numbers, which are never scored."""
        ids = [row.row.sample_index for row in part.rows]
        if ids:
            self.measuring.add(ids, part.images)
        self.num_measured += len(ids)
        self.images.update({i: part.images[place] for place, i in enumerate(ids) if i in self.saved_indices})
        self.broken = sorted([*self.broken, *(row.row.sample_index for row in part.broken)])
        self.min_batch_size = min([self.min_batch_size, *(row.batch_size for row in (*part.rows, *part.broken))])

    def write(self, store: Store, ms_per_evaluation: float, peak_bytes: int | None) -> None:
        """Make the shard durable. `peak_bytes` of memory were in use meanwhile, if the device tells."""
        manifest: dict[str, Any] = {
            "point": self.shard.point.digest,
            "images": [self.shard.images.start, self.shard.images.stop],
            "saved": sorted(self.images),
            "nonfinite": self.broken,
            "min_batch_size": self.min_batch_size,
            "ms_per_evaluation": ms_per_evaluation,
            "seconds": time.monotonic() - self.started,
            "peak_bytes": peak_bytes,
        }
        with store.create("shard", self.shard.digest, manifest) as folder:
            if self.num_measured:
                write_measured(folder, self.measuring.measured(), self.reference.feature_dtype)
            if self.images:
                save_file({"images": torch.stack([self.images[i] for i in manifest["saved"]])}, folder / IMAGES)


def merge_shards(
    store: Store, reference: ReferenceSet, point: SweepPoint, shards: Sequence[Shard], num_function_evaluations: int, size: str
) -> None:
    """The point's artefact from its shards, which are removed. `num_function_evaluations` are an image's, `size` names the network.

    Raises:
        RunError: too many of its images are not finite numbers; the shards are removed, and the next run makes them anew.
    """
    manifests = [store.manifest("shard", shard.digest) for shard in shards]
    broken = sorted(i for manifest in manifests for i in manifest["nonfinite"])
    number = point.spec.num_images
    if len(broken) > MAX_NONFINITE_FRACTION * number:
        _remove(store, shards)
        raise RunError(
            f"{size}, {point.title}: {len(broken)} of {number} images are not finite "
            f"numbers (image {broken[0]} first); lower the guidance, or train longer"
        )
    images = sum(len(shard.images) for shard in shards)
    per_evaluation = sum(
        manifest["ms_per_evaluation"] * len(shard.images) for manifest, shard in zip(manifests, shards, strict=True)
    )
    peaks = [manifest["peak_bytes"] for manifest in manifests if manifest.get("peak_bytes") is not None]
    folders = [store.folder("shard", shard.digest) for shard in shards]
    saved = [load_file(folder / IMAGES)["images"] for folder in folders if (folder / IMAGES).is_file()]
    manifest = {
        "spec": point.spec.model_dump(mode="json"),
        "protocol": reference.protocol.id,
        "saved": [i for manifest in manifests for i in manifest["saved"]],
        "num_nonfinite": len(broken),
        "nonfinite": broken,
        "min_batch_size": min(manifest["min_batch_size"] for manifest in manifests),
        "ms_per_image": per_evaluation / images * num_function_evaluations,
        "seconds": sum(manifest["seconds"] for manifest in manifests),
        "peak_memory_mib": max(peaks) / MIB if peaks else None,
    }
    with store.create("point", point.digest, manifest) as folder:
        write_measured(folder, read_shards(store, reference, shards), reference.feature_dtype)
        save_file({"images": torch.cat(saved)}, folder / IMAGES)
    _remove(store, shards)


def read_shards(store: Store, reference: ReferenceSet, shards: Sequence[Shard]) -> SampleFeatures:
    """What is kept of several shards' images, in their order.

    Raises:
        RunError: none of their images is finite numbers.
    """
    whole = [shard for shard in shards if len(store.manifest("shard", shard.digest)["nonfinite"]) < len(shard.images)]
    if not whole:
        raise RunError(f"{shards[0].point.title}: no image is finite numbers; lower the guidance, or train longer")
    names = tuple(reference.extractors)
    return _joined([read_measured(store.folder("shard", shard.digest), names) for shard in whole])


def read_images(folder: Path) -> np.ndarray:
    """The images a point's artefact keeps: uint8 [K, R, R, 3]."""
    return load_file(folder / IMAGES)["images"].permute(0, 2, 3, 1).numpy()


def _joined(parts: Sequence[SampleFeatures]) -> SampleFeatures:
    """What is kept of several shards, in their order."""
    first = parts[0]

    def whole(of: str, name: str) -> np.ndarray:
        return np.concatenate([getattr(part, of)[name] for part in parts])

    alignment = [part.alignment for part in parts if part.alignment is not None]
    ids = [part.ids for part in parts if part.ids is not None]
    return SampleFeatures(
        {name: whole("features", name) for name in first.features},
        np.concatenate(alignment) if alignment else None,
        np.concatenate(ids) if ids else None,
        {name: whole("paired_metrics", name) for name in first.paired_metrics},
    )


def _remove(store: Store, shards: Sequence[Shard]) -> None:
    for shard in shards:
        store.remove("shard", shard.digest)
