"""Points made and scored in this process, all points of a checkpoint in one stream of rows.

The engine is never drained between two points, and pictures that start alike at several points share their first
evaluation. Work is shared by shards: a worker claims one before it draws it, so any number of workers on one ledger and one
folder make each shard once, and what they make does not depend on who made it. Whoever finds all shards of a point there puts
it together; the ledger's row comes after that. A kill between the two leaves a point from which the row is written without
sampling again.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from isocost.data.codec import Codec
from isocost.diffusion.generate import CaptionStates, Drawn, generate, make_engine, schedule_of
from isocost.diffusion.noise import Schedule
from isocost.diffusion.rows import ByPicture, Row, num_passes
from isocost.diffusion.samplers import build_table
from isocost.models.checkpoint import Checkpoint, describe
from isocost.provenance import provenance
from isocost.score.kept import read_measured
from isocost.score.reference import Reference
from isocost.score.score import is_flagged, score, wanted
from isocost.store import Store
from isocost.sweep.claims import POLL_S, Claims
from isocost.sweep.ledger import Ledger
from isocost.sweep.points import Point
from isocost.sweep.shards import Part, Shard, ShardInWork, assemble, shards_of

Done = Callable[[Point], None]
WARM_UP_PICTURES = 8
SHARE_BYTES = 2**30
"""Memory for first evaluations: those of 30,000 pictures of 4 x 32 x 32 latents with guidance."""


@dataclass(frozen=True)
class Worker:
    """What every point of one checkpoint shares."""

    store: Store
    ledger: Ledger
    claims: Claims
    reference: Reference
    captions: CaptionStates
    kept: Sequence[int]
    distances: tuple[str, ...]
    shard_size: int
    beside: ByPicture | None = None

    def run(self, checkpoint: Checkpoint, codec: Codec, points: Sequence[Point], done: Done, deadline: float | None) -> bool:
        """Make and score what is not in the ledger yet; False where `deadline` (of time.monotonic) came first.

        Returns when all points are there, whoever made them.
        """
        embeds = checkpoint.info.model.embeds_guidance
        missing = list(points)
        while missing := self._missing(missing, checkpoint, done):
            if deadline is not None and time.monotonic() > deadline:
                return False
            # Rows of two passes first: they leave both outputs of their first evaluation to the others.
            missing.sort(key=lambda point: -num_passes(point.spec.guidance, embeds))
            made = 0
            for numerics in sorted({point.spec.numerics for point in missing}):
                alike = [point for point in missing if point.spec.numerics == numerics]
                made += self._make(alike, checkpoint, codec, done, deadline)
            if not made:
                time.sleep(POLL_S)  # the rest is in other hands
        return True

    def _missing(self, points: Sequence[Point], checkpoint: Checkpoint, done: Done) -> list[Point]:
        """Points that are not in the ledger; those that are whole on disk are put there."""
        metrics, asked = self.ledger.metrics(), wanted(self.reference, self.distances)
        missing = []
        for point in points:
            if asked <= metrics.get(point.digest, set()) or self._finish(point, checkpoint):
                done(point)
            else:
                missing.append(point)
        return missing

    def _make(self, points: Sequence[Point], checkpoint: Checkpoint, codec: Codec, done: Done, deadline: float | None) -> int:
        """Draw the shards of points of the same numerics in one stream; returns how many this worker made."""
        claimed = self._claimed(points, deadline)
        first = next(claimed, None)
        if first is None:
            return 0
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
        for _ in generate(engine, codec, itertools.islice(_rows(first, schedule), WARM_UP_PICTURES)):
            pass
        begun: dict[str, ShardInWork] = {}

        def rows() -> Iterator[Row]:
            for shard in itertools.chain([first], claimed):
                begun[shard.digest] = ShardInWork(shard, self.reference, frozenset(self.kept))
                yield from _rows(shard, schedule)

        made = 0
        clock = _Clock()
        for drawn in generate(engine, codec, rows()):
            clock.stop(drawn)
            for part in _by_shard(drawn):
                work = begun[part.digest]
                work.add(part)
                if work.is_whole:
                    del begun[part.digest]
                    self._keep(work, clock.ms_per_evaluation)
                    made += 1
                    if self._finish(work.shard.point, checkpoint):
                        done(work.shard.point)
            clock.start()
        return made

    def _claimed(self, points: Sequence[Point], deadline: float | None) -> Iterator[Shard]:
        """Shards that are not there and not in other hands, claimed one by one as they are asked for."""
        for point in points:
            for shard in shards_of(point, self.shard_size):
                if deadline is not None and time.monotonic() > deadline:
                    return
                if self._is_made(shard) or not self.claims.take(shard.digest):
                    continue
                if self._is_made(shard):  # between the two
                    self.claims.release(shard.digest)
                    continue
                yield shard

    def _is_made(self, shard: Shard) -> bool:
        return self.store.has("point", shard.point.digest) or self.store.has("shard", shard.digest)

    def _keep(self, work: ShardInWork, ms_per_evaluation: float) -> None:
        """Make a shard durable, record it, and give its claim back."""
        shard = work.shard
        work.write(self.store, ms_per_evaluation)
        self.ledger.add_shard(shard.digest, shard.point.digest, shard.pictures)
        self.claims.release(shard.digest)

    def _finish(self, point: Point, checkpoint: Checkpoint) -> bool:
        """Put a point together whose shards are all there, and record it; False where one is missing or another is at it.

        Raises:
            WorkError: too many of its pictures are not finite numbers.
        """
        shards = shards_of(point, self.shard_size)
        if not self.store.has("point", point.digest) and not all(self.store.has("shard", one.digest) for one in shards):
            return False
        if not self.claims.take(point.digest):
            return False
        try:
            if not self.store.has("point", point.digest):
                if not all(self.store.has("shard", one.digest) for one in shards):
                    return False  # another has just put it together
                nfe = point.nfe(checkpoint.info.model)
                assemble(self.store, self.reference, point, shards, nfe, checkpoint.info.label)
            self._record(checkpoint, point)
        finally:
            self.claims.release(point.digest)
        return True

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
        self.ledger.add_point(row, scores, provenance(), self.reference.protocol.parts)


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


def _by_shard(drawn: Drawn) -> Iterator[Part]:
    digests = {row.row.tag for row in (*drawn.rows, *drawn.broken)}
    for digest in sorted(digests, key=str):
        places = [place for place, row in enumerate(drawn.rows) if row.row.tag == digest]
        broken = [row for row in drawn.broken if row.row.tag == digest]
        yield Part(str(digest), [drawn.rows[place] for place in places], drawn.pictures[places], broken)


def _rows(shard: Shard, schedule: Schedule) -> Iterator[Row]:
    spec = shard.point.spec
    table = build_table(spec.sampler, spec.num_steps, schedule)
    for i in shard.pictures:
        yield Row(i, i, table, spec.guidance, tag=shard.digest, seed=spec.seed)
