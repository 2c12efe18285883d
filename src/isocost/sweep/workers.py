"""Points made and scored one after another in this process.

A point's artefact holds its features and its first pictures; the ledger's row comes after it. A kill between the two leaves
an artefact from which the row is written without sampling again.

Shapes: N pictures of a point, K pictures kept, R resolution, D features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from isocost.data.codec import Codec
from isocost.diffusion.engine import Row
from isocost.diffusion.generate import CaptionStates, generate, make_engine
from isocost.diffusion.noise import Schedule
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


@dataclass(frozen=True)
class Worker:
    """What every point of one checkpoint shares."""

    store: Store
    ledger: Ledger
    reference: Reference
    captions: CaptionStates
    kept: Sequence[int]
    distances: tuple[str, ...]
    batch_size: int

    def run(self, checkpoint: Checkpoint, codec: Codec, points: Sequence[Point], done: Done, deadline: float | None) -> bool:
        """Make and score what is not in the ledger yet; False where `deadline` (of time.monotonic) came first."""
        recorded, asked = self.ledger.points(), wanted(self.reference, self.distances)
        for point in points:
            if point.digest in recorded and asked <= self.ledger.metrics_of(point.digest):
                done(point)
                continue
            if deadline is not None and time.monotonic() > deadline:
                return False
            if not self.store.has("point", point.digest):
                self._make(checkpoint, codec, point)
            self._record(checkpoint, point)
            done(point)
        return True

    def _make(self, checkpoint: Checkpoint, codec: Codec, point: Point) -> None:
        """Draw the point's pictures and keep their features, their alignment and the pictures `kept`."""
        spec = point.spec
        engine = make_engine(
            checkpoint.network, checkpoint.info, self.captions, batch_size=self.batch_size, precision=spec.precision
        )
        rows = _rows(point)
        for _ in generate(engine, codec, rows[:WARM_UP_PICTURES]):
            pass
        measuring, pictures, not_finite = Measuring(self.reference), {}, 0
        started = time.monotonic()
        seconds_sampling = 0.0
        sampling_since = time.perf_counter()
        for finished, drawn in generate(engine, codec, rows):
            seconds_sampling += time.perf_counter() - sampling_since
            ids = [row.row.picture_id for row in finished]
            not_finite += sum(not row.finite for row in finished)
            measuring.add(ids, drawn)
            pictures.update({i: drawn[place] for place, i in enumerate(ids) if i in self.kept})
            sampling_since = time.perf_counter()
        if not_finite > MAX_NOT_FINITE_SHARE * len(rows):
            raise WorkError(
                f"{checkpoint.info.size}, {point.title}: {not_finite} of {len(rows)} pictures are not finite numbers; "
                "lower the guidance, or train longer"
            )
        measured = measuring.measured()
        manifest: dict[str, Any] = {
            "spec": spec.model_dump(mode="json"),
            "protocol": self.reference.protocol.id,
            "kept": list(self.kept),
            "num_not_finite": not_finite,
            "ms_per_picture": 1000 * seconds_sampling / len(rows),
            "seconds": time.monotonic() - started,
        }
        with self.store.create("point", point.digest, manifest) as folder:
            write_measured(folder, measured, self.reference.kept)
            save_file({"pictures": torch.stack([pictures[i] for i in self.kept])}, folder / "pictures.safetensors")

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
            "ms_per_picture": manifest["ms_per_picture"],
            "seconds": manifest["seconds"],
            "flagged": is_flagged(point.spec.num_pictures, self.reference, self.distances),
        }
        self.ledger.add_protocol(self.reference.protocol.id, self.reference.protocol.parts)
        self.ledger.add_point(row, scores, provenance())


def read_pictures(folder: Path) -> np.ndarray:
    """The pictures a point's artefact keeps: uint8 [K, R, R, 3]."""
    return load_file(folder / "pictures.safetensors")["pictures"].permute(0, 2, 3, 1).numpy()


def _rows(point: Point) -> list[Row]:
    spec = point.spec
    table = build_table(spec.sampler, spec.num_steps, Schedule.scaled_linear())
    return [Row(i, i, table, spec.guidance, seed=spec.seed) for i in range(spec.num_pictures)]
