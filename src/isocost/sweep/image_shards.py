"""A point's pictures in shards: each is durable or absent, and the point is put together when all are there.

What is kept of a picture does not depend on which pictures came with it, so neither the size of the shards nor who made them
changes a bit of the point.

Shapes: N pictures of a point, K pictures kept, R resolution.
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
from isocost.errors import WorkError
from isocost.evaluation.evaluator import Measuring
from isocost.evaluation.feature_store import Measured, read_measured, write_measured
from isocost.evaluation.reference_set import Reference
from isocost.sampling.request import FinishedRow
from isocost.sweep.grid import Point
from isocost.utils.artifact_store import Store

MIB = 2**20
VERSION = 1
MAX_NOT_FINITE_SHARE = 0.01
PICTURES = "pictures.safetensors"


@dataclass(frozen=True)
class Shard:
    """Some consecutive pictures of a point."""

    point: Point
    pictures: range
    digest: str


def shards_of(point: Point, size: int, bounds: Sequence[int] = ()) -> list[Shard]:
    """The shards of a point, `size` pictures each or fewer; up to each of `bounds`, where given, by whole shards."""
    ends = [0, *(bounds or (point.spec.num_pictures,))]
    ranges = [
        range(first, min(first + size, stop)) for start, stop in itertools.pairwise(ends) for first in range(start, stop, size)
    ]
    stage = {"stage": "shard", "version": VERSION, "point": point.digest}
    return [Shard(point, each, digest(stage, {"first": each.start, "stop": each.stop})) for each in ranges]


@dataclass(frozen=True)
class Part:
    """What came at once of one shard: pictures uint8 [n, 3, R, R] of these rows, and the rows that have none."""

    digest: str
    rows: list[FinishedRow]
    pictures: Tensor
    broken: list[FinishedRow]


class ShardInWork:
    """A shard whose pictures are coming in."""

    def __init__(self, shard: Shard, reference: Reference, kept: Collection[int]) -> None:
        """`kept` are the ids of the pictures that every point keeps."""
        self.shard, self.reference, self.kept = shard, reference, kept
        self.measuring = Measuring(reference)
        self.pictures: dict[int, Tensor] = {}
        self.broken: list[int] = []
        self.num_measured = 0
        self.least_bucket_size = shard.point.spec.bucket_size
        self.started = time.monotonic()

    @property
    def is_whole(self) -> bool:
        """True when every picture has come."""
        return self.num_measured + len(self.broken) == len(self.shard.pictures)

    def add(self, part: Part) -> None:
        """Measure pictures, and name those that are not finite numbers, which are never scored."""
        ids = [row.row.picture_id for row in part.rows]
        if ids:
            self.measuring.add(ids, part.pictures)
        self.num_measured += len(ids)
        self.pictures.update({i: part.pictures[place] for place, i in enumerate(ids) if i in self.kept})
        self.broken = sorted([*self.broken, *(row.row.picture_id for row in part.broken)])
        self.least_bucket_size = min([self.least_bucket_size, *(row.bucket_size for row in (*part.rows, *part.broken))])

    def write(self, store: Store, ms_per_evaluation: float, peak_bytes: int | None) -> None:
        """Make the shard durable. `peak_bytes` of memory were in use meanwhile, if the device tells."""
        manifest: dict[str, Any] = {
            "point": self.shard.point.digest,
            "pictures": [self.shard.pictures.start, self.shard.pictures.stop],
            "kept": sorted(self.pictures),
            "not_finite": self.broken,
            "least_bucket_size": self.least_bucket_size,
            "ms_per_evaluation": ms_per_evaluation,
            "seconds": time.monotonic() - self.started,
            "peak_bytes": peak_bytes,
        }
        with store.create("shard", self.shard.digest, manifest) as folder:
            if self.num_measured:
                write_measured(folder, self.measuring.measured(), self.reference.kept)
            if self.pictures:
                save_file({"pictures": torch.stack([self.pictures[i] for i in manifest["kept"]])}, folder / PICTURES)


def assemble(
    store: Store, reference: Reference, point: Point, shards: Sequence[Shard], num_evaluations: int, size: str
) -> None:
    """The point's artefact from its shards, which are removed. `num_evaluations` are a picture's, `size` names the network.

    Raises:
        WorkError: too many of its pictures are not finite numbers; the shards are removed, and the next run makes them anew.
    """
    manifests = [store.manifest("shard", shard.digest) for shard in shards]
    broken = sorted(i for manifest in manifests for i in manifest["not_finite"])
    number = point.spec.num_pictures
    if len(broken) > MAX_NOT_FINITE_SHARE * number:
        _remove(store, shards)
        raise WorkError(
            f"{size}, {point.title}: {len(broken)} of {number} pictures are not finite "
            f"numbers (picture {broken[0]} first); lower the guidance, or train longer"
        )
    pictures = sum(len(shard.pictures) for shard in shards)
    per_evaluation = sum(
        manifest["ms_per_evaluation"] * len(shard.pictures) for manifest, shard in zip(manifests, shards, strict=True)
    )
    peaks = [manifest["peak_bytes"] for manifest in manifests if manifest.get("peak_bytes") is not None]
    folders = [store.folder("shard", shard.digest) for shard in shards]
    kept = [load_file(folder / PICTURES)["pictures"] for folder in folders if (folder / PICTURES).is_file()]
    manifest = {
        "spec": point.spec.model_dump(mode="json"),
        "protocol": reference.protocol.id,
        "kept": [i for manifest in manifests for i in manifest["kept"]],
        "num_not_finite": len(broken),
        "not_finite": broken,
        "least_bucket_size": min(manifest["least_bucket_size"] for manifest in manifests),
        "ms_per_picture": per_evaluation / pictures * num_evaluations,
        "seconds": sum(manifest["seconds"] for manifest in manifests),
        "peak_memory_mib": max(peaks) / MIB if peaks else None,
    }
    with store.create("point", point.digest, manifest) as folder:
        write_measured(folder, read_shards(store, reference, shards), reference.kept)
        save_file({"pictures": torch.cat(kept)}, folder / PICTURES)
    _remove(store, shards)


def read_shards(store: Store, reference: Reference, shards: Sequence[Shard]) -> Measured:
    """What is kept of several shards' pictures, in their order.

    Raises:
        WorkError: none of their pictures is finite numbers.
    """
    whole = [shard for shard in shards if len(store.manifest("shard", shard.digest)["not_finite"]) < len(shard.pictures)]
    if not whole:
        raise WorkError(f"{shards[0].point.title}: no picture is finite numbers; lower the guidance, or train longer")
    names = tuple(reference.extractors)
    return _joined([read_measured(store.folder("shard", shard.digest), names) for shard in whole])


def read_pictures(folder: Path) -> np.ndarray:
    """The pictures a point's artefact keeps: uint8 [K, R, R, 3]."""
    return load_file(folder / PICTURES)["pictures"].permute(0, 2, 3, 1).numpy()


def _joined(parts: Sequence[Measured]) -> Measured:
    """What is kept of several shards, in their order."""
    first = parts[0]

    def whole(of: str, name: str) -> np.ndarray:
        return np.concatenate([getattr(part, of)[name] for part in parts])

    alignment = [part.alignment for part in parts if part.alignment is not None]
    ids = [part.ids for part in parts if part.ids is not None]
    return Measured(
        {name: whole("features", name) for name in first.features},
        np.concatenate(alignment) if alignment else None,
        np.concatenate(ids) if ids else None,
        {name: whole("pairs", name) for name in first.pairs},
    )


def _remove(store: Store, shards: Sequence[Shard]) -> None:
    for shard in shards:
        store.remove("shard", shard.digest)
