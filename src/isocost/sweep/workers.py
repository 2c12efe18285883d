"""Points made and scored in this process, all points of a checkpoint in one stream of rows.

The engine is never drained between two points, and pictures that start alike at several points share their first
evaluation. A point's artefact holds its features and its first pictures; the ledger's row comes after it. A kill between the
two leaves an artefact from which the row is written without sampling again.

Shapes: N pictures of a point, K pictures kept, R resolution, D features.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from isocost.data.codec import Codec
from isocost.diffusion.generate import CaptionStates, Drawn, generate, make_engine, schedule_of
from isocost.diffusion.noise import Schedule
from isocost.diffusion.rows import ByPicture, FinishedRow, Row, num_passes
from isocost.diffusion.samplers import build_table
from isocost.errors import WorkError
from isocost.models.checkpoint import Checkpoint, describe
from isocost.provenance import provenance
from isocost.score.kept import read_measured, write_measured
from isocost.score.reference import Reference
from isocost.score.score import Measuring, is_flagged, score, wanted
from isocost.store import Store
from isocost.sweep.ledger import Ledger
from isocost.sweep.points import Point

Done = Callable[[Point], None]
MAX_NOT_FINITE_SHARE = 0.01
WARM_UP_PICTURES = 8
SHARE_BYTES = 2**30
"""Memory for first evaluations: those of 30,000 pictures of 4 x 32 x 32 latents with guidance."""


@dataclass(frozen=True)
class Worker:
    """What every point of one checkpoint shares."""

    store: Store
    ledger: Ledger
    reference: Reference
    captions: CaptionStates
    kept: Sequence[int]
    distances: tuple[str, ...]
    beside: ByPicture | None = None

    def run(self, checkpoint: Checkpoint, codec: Codec, points: Sequence[Point], done: Done, deadline: float | None) -> bool:
        """Make and score what is not in the ledger yet; False where `deadline` (of time.monotonic) came first."""
        recorded, asked = self.ledger.points(), wanted(self.reference, self.distances)
        missing = []
        for point in points:
            if point.digest in recorded and asked <= self.ledger.metrics_of(point.digest):
                done(point)
            elif self.store.has("point", point.digest):
                self._record(checkpoint, point)
                done(point)
            else:
                missing.append(point)
        # Rows of two passes first: they leave both outputs of their first evaluation to the others.
        missing.sort(key=lambda point: -num_passes(point.spec.guidance))
        numerics = sorted({point.spec.numerics for point in missing})
        return all(
            self._make([point for point in missing if point.spec.numerics == one], checkpoint, codec, done, deadline)
            for one in numerics
        )

    def _make(self, points: Sequence[Point], checkpoint: Checkpoint, codec: Codec, done: Done, deadline: float | None) -> bool:
        """Draw the pictures of points of the same numerics in one stream; each point is kept as it is whole."""
        spec = points[0].spec
        engine = make_engine(
            copy.deepcopy(checkpoint.network),
            checkpoint.info,
            self.captions,
            bucket_size=spec.bucket_size,
            precision=spec.precision,
            compiled=spec.compiled,
            share_bytes=SHARE_BYTES if len(points) > 1 else 0,
            beside=self.beside,
        )
        schedule = schedule_of(checkpoint.info)
        warm_up = itertools.islice(_rows(points[0], schedule), WARM_UP_PICTURES)
        for _ in generate(engine, codec, warm_up):
            pass
        begun: dict[str, _PointInWork] = {}

        def rows() -> Iterator[Row]:
            for point in points:
                if deadline is not None and time.monotonic() > deadline:
                    return
                begun[point.digest] = _PointInWork(point, self.reference, frozenset(self.kept))
                yield from _rows(point, schedule)

        finished = 0
        clock = _Clock()
        for drawn in generate(engine, codec, rows()):
            clock.stop(drawn)
            for part in _by_point(drawn):
                work = begun[part.digest]
                work.add(part)
                if work.is_whole:
                    self._keep(work, checkpoint, clock.ms_per_evaluation * work.point.nfe(checkpoint.info.model))
                    del begun[part.digest]
                    self._record(checkpoint, work.point)
                    done(work.point)
                    finished += 1
            clock.start()
        return finished == len(points)

    def _keep(self, work: _PointInWork, checkpoint: Checkpoint, ms_per_picture: float) -> None:
        """Write a point's artefact.

        Raises:
            WorkError: too many of its pictures are not finite numbers.
        """
        spec, broken = work.point.spec, work.broken
        if len(broken) > MAX_NOT_FINITE_SHARE * spec.num_pictures:
            raise WorkError(
                f"{checkpoint.info.size}, {work.point.title}: {len(broken)} of {spec.num_pictures} pictures are not finite "
                f"numbers (picture {broken[0]} first); lower the guidance, or train longer"
            )
        manifest: dict[str, Any] = {
            "spec": spec.model_dump(mode="json"),
            "protocol": self.reference.protocol.id,
            "kept": sorted(work.pictures),
            "num_not_finite": len(broken),
            "not_finite": broken,
            "least_bucket_size": work.least_bucket_size,
            "ms_per_picture": ms_per_picture,
            "seconds": time.monotonic() - work.started,
        }
        with self.store.create("point", work.point.digest, manifest) as folder:
            write_measured(folder, work.measuring.measured(), self.reference.kept)
            save_file({"pictures": torch.stack([work.pictures[i] for i in manifest["kept"]])}, folder / "pictures.safetensors")

    def _record(self, checkpoint: Checkpoint, point: Point) -> None:
        """Score the artefact and write the ledger's row."""
        manifest = self.store.manifest("point", point.digest)
        measured = read_measured(self.store.folder("point", point.digest), tuple(self.reference.extractors))
        scores = score(measured, self.reference, self.distances)
        row = {
            **point.coordinate(),
            **point.costs(checkpoint.info),
            **describe(checkpoint.info),
            "protocol": self.reference.protocol.id,
            "num_not_finite": manifest["num_not_finite"],
            "least_bucket_size": manifest["least_bucket_size"],
            "ms_per_picture": manifest["ms_per_picture"],
            "seconds": manifest["seconds"],
            "flagged": is_flagged(point.spec.num_pictures, self.reference, self.distances),
        }
        self.ledger.add_protocol(self.reference.protocol.id, self.reference.protocol.parts)
        self.ledger.add_point(row, scores, provenance())


def read_pictures(folder: Path) -> np.ndarray:
    """The pictures a point's artefact keeps: uint8 [K, R, R, 3]."""
    return load_file(folder / "pictures.safetensors")["pictures"].permute(0, 2, 3, 1).numpy()


@dataclass(frozen=True)
class _Part:
    """What came at once of one point: pictures uint8 [n, 3, R, R] of these rows, and the rows that have none."""

    digest: str
    rows: list[FinishedRow]
    pictures: Tensor
    broken: list[FinishedRow]


class _PointInWork:
    """A point whose pictures are coming in."""

    def __init__(self, point: Point, reference: Reference, kept: frozenset[int]) -> None:
        self.point, self.kept = point, kept
        self.measuring = Measuring(reference)
        self.pictures: dict[int, Tensor] = {}
        self.broken: list[int] = []
        self.num_measured = 0
        self.least_bucket_size = point.spec.bucket_size
        self.started = time.monotonic()

    @property
    def is_whole(self) -> bool:
        """True when every picture has come."""
        return self.num_measured + len(self.broken) == self.point.spec.num_pictures

    def add(self, part: _Part) -> None:
        """Measure pictures, and name those that are not finite numbers, which are never scored."""
        ids = [row.row.picture_id for row in part.rows]
        if ids:
            self.measuring.add(ids, part.pictures)
        self.num_measured += len(ids)
        self.pictures.update({i: part.pictures[place] for place, i in enumerate(ids) if i in self.kept})
        self.broken = sorted([*self.broken, *(row.row.picture_id for row in part.broken)])
        self.least_bucket_size = min([self.least_bucket_size, *(row.bucket_size for row in (*part.rows, *part.broken))])


class _Clock:
    """Seconds of sampling and decoding, features apart, over the network evaluations computed in them."""

    def __init__(self) -> None:
        self.seconds, self.num_evaluations = 0.0, 0
        self.start()

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self, drawn: Drawn) -> None:
        self.seconds += time.perf_counter() - self._since
        self.num_evaluations += sum(row.nfe_computed for row in (*drawn.rows, *drawn.broken))

    @property
    def ms_per_evaluation(self) -> float:
        """Milliseconds an evaluation, with its share of decoding; 0 evaluations give 0."""
        return 1000 * self.seconds / max(self.num_evaluations, 1)


def _by_point(drawn: Drawn) -> Iterator[_Part]:
    digests = {row.row.tag for row in (*drawn.rows, *drawn.broken)}
    for digest in sorted(digests, key=str):
        places = [place for place, row in enumerate(drawn.rows) if row.row.tag == digest]
        broken = [row for row in drawn.broken if row.row.tag == digest]
        yield _Part(str(digest), [drawn.rows[place] for place in places], drawn.pictures[places], broken)


def _rows(point: Point, schedule: Schedule) -> Iterator[Row]:
    spec = point.spec
    table = build_table(spec.sampler, spec.num_steps, schedule)
    for i in range(spec.num_pictures):
        yield Row(i, i, table, spec.guidance, tag=point.digest, seed=spec.seed)
