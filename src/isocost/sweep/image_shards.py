"""The images of a point in shards: each shard is written atomically, and complete shards are merged into the point.

The data of an image do not depend on the images that were generated with it. The point is therefore bit-identical for every
shard size and for every assignment of shards to workers.

Shapes: N images of a point, K saved images, R resolution.
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
from safetensors.torch import save_file
from torch import Tensor

from isocost.config.base import digest
from isocost.errors import RunError
from isocost.evaluation.evaluator import FeatureCollector
from isocost.evaluation.feature_store import SampleFeatures, read_sample_features, write_sample_features
from isocost.evaluation.reference_set import ReferenceSet
from isocost.sampling.request import SampleResult
from isocost.sampling.stage_times import StageTimes
from isocost.sweep.grid import SweepPoint
from isocost.utils.artifact_store import Store
from isocost.utils.tensor_files import read_tensors

MIB = 2**20
SHARD_VERSION = 1
MAX_NONFINITE_FRACTION = 0.01
IMAGES = "images.safetensors"


@dataclass(frozen=True)
class Shard:
    """Consecutive images of a point."""

    point: SweepPoint
    images: range
    digest: str


def split_into_shards(
    point: SweepPoint, size: int, bounds: Sequence[int] = (), extractors: Sequence[str] | None = None
) -> list[Shard]:
    """Split a point into shards.

    Args:
        point: the point.
        size: images of a shard; the last one before a bound may be smaller.
        bounds: image indices, increasing, at which a shard must end; the last one is the end. Default: the end of the point.
        extractors: the only feature extractors whose features the shards have; None for all of the protocol.
    """
    ends = [0, *(bounds or (point.spec.num_images,))]
    ranges = [
        range(first, min(first + size, stop)) for start, stop in itertools.pairwise(ends) for first in range(start, stop, size)
    ]
    stage: dict[str, Any] = {"stage": "shard", "version": SHARD_VERSION, "point": point.digest}
    if extractors is not None:
        stage["extractors"] = list(extractors)
    return [Shard(point, images, digest(stage, {"first": images.start, "stop": images.stop})) for images in ranges]


@dataclass(frozen=True)
class ShardChunk:
    """Images of one shard that the engine finished at the same time.

    Attributes:
        digest: digest of the shard.
        results: results with finite images.
        images: uint8 [n, 3, R, R], in the order of `results`.
        nonfinite: results without an image, because it is not finite.
    """

    digest: str
    results: list[SampleResult]
    images: Tensor
    nonfinite: list[SampleResult]


class ShardBuilder:
    """Collects the images of one shard and writes it."""

    def __init__(
        self,
        shard: Shard,
        reference: ReferenceSet,
        saved_indices: Collection[int],
        extractors: Sequence[str] | None = None,
    ) -> None:
        """
        Args:
            shard: the shard.
            reference: the reference set.
            saved_indices: indices of the samples whose images every point saves.
            extractors: names of the feature extractors to use; None for all of the protocol.
        """
        self.shard, self.reference, self.saved_indices = shard, reference, saved_indices
        self.collector = FeatureCollector(reference, extractors)
        self.images: dict[int, Tensor] = {}
        self.nonfinite: list[int] = []
        self.num_finite = 0
        self.min_batch_size = shard.point.spec.batch_size
        self.started = time.monotonic()

    @property
    def is_complete(self) -> bool:
        return self.num_finite + len(self.nonfinite) == len(self.shard.images)

    def add(self, chunk: ShardChunk) -> None:
        """Extract features of finite images, and list the others, which are never scored."""
        indices = [result.request.sample_index for result in chunk.results]
        if indices:
            self.collector.add(indices, chunk.images)
        self.num_finite += len(indices)
        self.images.update({i: chunk.images[position] for position, i in enumerate(indices) if i in self.saved_indices})
        self.nonfinite = sorted([*self.nonfinite, *(result.request.sample_index for result in chunk.nonfinite)])
        self.min_batch_size = min([self.min_batch_size, *(result.batch_size for result in (*chunk.results, *chunk.nonfinite))])

    def write(self, store: Store, stage_times: StageTimes, peak_bytes: int | None) -> None:
        """Write the shard to the store.

        Args:
            store: the artefact store.
            stage_times: measured milliseconds of the stages of sampling.
            peak_bytes: peak memory of the device; None if the device does not report it.
        """
        manifest: dict[str, Any] = {
            "point": self.shard.point.digest,
            "images": [self.shard.images.start, self.shard.images.stop],
            "saved": sorted(self.images),
            "nonfinite": self.nonfinite,
            "min_batch_size": self.min_batch_size,
            "stage_times": stage_times.to_dict(),
            "seconds": time.monotonic() - self.started,
            "peak_bytes": peak_bytes,
        }
        with store.create("shard", self.shard.digest, manifest) as folder:
            if self.num_finite:
                write_sample_features(folder, self.collector.features(), self.reference.feature_dtype)
            if self.images:
                save_file({"images": torch.stack([self.images[i] for i in manifest["saved"]])}, folder / IMAGES)


def merge_shards(
    store: Store, reference: ReferenceSet, point: SweepPoint, shards: Sequence[Shard], passes: tuple[int, int], size: str
) -> None:
    """Write the point's artefact from its shards, and remove the shards.

    Args:
        store: the artefact store.
        reference: the reference set.
        point: the point.
        shards: all of its shards, complete, in order.
        passes: evaluations per image of the network and of its guide.
        size: name of the network, for messages.

    Raises:
        RunError: too many images are not finite. The shards are removed, and the next run generates them again.
    """
    manifests = [store.manifest("shard", shard.digest) for shard in shards]
    nonfinite = sorted(i for manifest in manifests for i in manifest["nonfinite"])
    num_images = point.spec.num_images
    if len(nonfinite) > MAX_NONFINITE_FRACTION * num_images:
        _remove(store, shards)
        raise RunError(
            f"{size}, {point.title}: {len(nonfinite)} of {num_images} images contain NaN or inf "
            f"(the first is image {nonfinite[0]}); lower the guidance or train longer"
        )
    num_generated = sum(len(shard.images) for shard in shards)
    total_ms = sum(
        StageTimes(**manifest["stage_times"]).ms_per_image(*passes) * len(shard.images)
        for manifest, shard in zip(manifests, shards, strict=True)
    )
    peaks = [manifest["peak_bytes"] for manifest in manifests if manifest.get("peak_bytes") is not None]
    folders = [store.open("shard", shard.digest) for shard in shards]
    saved = [read_tensors(folder / IMAGES, "images")["images"] for folder in folders if (folder / IMAGES).is_file()]
    manifest = {
        "spec": point.spec.model_dump(mode="json"),
        "protocol": reference.protocol.id,
        "saved": [i for manifest in manifests for i in manifest["saved"]],
        "num_nonfinite": len(nonfinite),
        "nonfinite": nonfinite,
        "min_batch_size": min(manifest["min_batch_size"] for manifest in manifests),
        "ms_per_image": total_ms / num_generated,
        "seconds": sum(manifest["seconds"] for manifest in manifests),
        "peak_memory_mib": max(peaks) / MIB if peaks else None,
    }
    with store.create("point", point.digest, manifest) as folder:
        samples = read_shards(store, tuple(reference.extractors), shards)
        write_sample_features(folder, samples, reference.feature_dtype)
        save_file({"images": torch.cat(saved)}, folder / IMAGES)
    _remove(store, shards)


def read_shards(store: Store, extractors: tuple[str, ...], shards: Sequence[Shard]) -> SampleFeatures:
    """Read and concatenate the features of several shards by some extractors, in their order.

    Raises:
        RunError: no image is finite.
    """
    nonempty = [shard for shard in shards if len(store.manifest("shard", shard.digest)["nonfinite"]) < len(shard.images)]
    if not nonempty:
        raise RunError(f"{shards[0].point.title}: every image contains NaN or inf; lower the guidance or train longer")
    return _concatenate([read_sample_features(store.open("shard", shard.digest), extractors) for shard in nonempty])


def read_images(folder: Path) -> np.ndarray:
    """Read the saved images of a point's artefact: uint8 [K, R, R, 3]."""
    return read_tensors(folder / IMAGES, "images")["images"].permute(0, 2, 3, 1).numpy()


def _concatenate(parts: Sequence[SampleFeatures]) -> SampleFeatures:
    first = parts[0]

    def concatenated(field: str, name: str) -> np.ndarray:
        return np.concatenate([getattr(part, field)[name] for part in parts])

    alignment = [part.alignment for part in parts if part.alignment is not None]
    ids = [part.ids for part in parts if part.ids is not None]
    return SampleFeatures(
        {name: concatenated("features", name) for name in first.features},
        np.concatenate(alignment) if alignment else None,
        np.concatenate(ids) if ids else None,
        {name: concatenated("paired_metrics", name) for name in first.paired_metrics},
    )


def _remove(store: Store, shards: Sequence[Shard]) -> None:
    for shard in shards:
        store.remove("shard", shard.digest)
