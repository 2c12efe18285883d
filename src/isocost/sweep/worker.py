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
from dataclasses import dataclass, field
from functools import cached_property

from isocost.diffusion.noise_schedule import Schedule
from isocost.diffusion.solvers import build_table
from isocost.evaluation.evaluator import is_flagged, score, wanted
from isocost.evaluation.feature_store import read_measured
from isocost.evaluation.reference_set import Reference
from isocost.models.autoencoder import Codec
from isocost.models.checkpoint import Checkpoint, describe
from isocost.sampling.engine import Engine
from isocost.sampling.generate import CaptionStates, Drawn, generate, make_engine, schedule_of
from isocost.sampling.request import ByPicture, Row, num_passes
from isocost.sweep.grid import Point
from isocost.sweep.image_shards import Part, Shard, ShardInWork, assemble, shards_of
from isocost.sweep.leases import POLL_S, Claims
from isocost.sweep.results_db import Ledger
from isocost.utils.artifact_store import Store
from isocost.utils.device import instruments_of
from isocost.utils.environment import provenance
from isocost.utils.signals import is_over

Done = Callable[[Point], None]
WARM_UP_PICTURES = 8
SHARE_BYTES = 2**30
"""Memory for first evaluations: those of 30,000 pictures of 4 x 32 x 32 latents with guidance."""


@dataclass(frozen=True)
class Worker:
    """What every point of one checkpoint shares. It is opened, and its engines are made, when they are first needed."""

    store: Store
    ledger: Ledger
    claims: Claims
    open_checkpoint: Callable[[], Checkpoint]
    codec: Codec
    reference: Reference
    captions: CaptionStates
    kept: Sequence[int]
    distances: tuple[str, ...]
    shard_size: int
    beside: ByPicture | None = None
    _engines: dict[tuple[str, bool, int], Engine] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Not asked for where all points are recorded, so that it need not be there any more."""
        return self.open_checkpoint()

    def run(self, points: Sequence[Point], done: Done, deadline: float | None) -> bool:
        """Make and score what is not in the ledger yet; False where `deadline` (of time.monotonic) came first.

        Returns when all points are there, whoever made them.
        """
        missing = list(points)
        while missing := self._missing(missing, done):
            if is_over(deadline):
                return False
            shards = [shard for point in missing for shard in shards_of(point, self.shard_size)]
            if not self._make(shards, deadline, done):
                time.sleep(POLL_S)  # the rest is in other hands
        return True

    def make(self, shards: Sequence[Shard], deadline: float | None) -> bool:
        """Make shards that belong to no point that is to be scored; False where the deadline came first."""
        while missing := [shard for shard in shards if not self._is_made(shard)]:
            if is_over(deadline):
                return False
            if not self._make(missing, deadline, None):
                time.sleep(POLL_S)
        return True

    def time(self, point: Point) -> tuple[float, int]:
        """Milliseconds that a picture of a point takes when calls are full, denoised and decoded; and of how many pictures.

        As many pictures as a call has places, after as many to warm up; nothing is kept, and no first evaluation is shared.
        """
        pictures = range(min(point.spec.bucket_size, point.spec.num_pictures))
        (shard,) = shards_of(point, len(pictures), [len(pictures)])
        engine, schedule = self._engine(shard, of_one_point=True), schedule_of(self.checkpoint.info)
        clock = instruments_of(engine.device).clock
        for _ in ("warm up", "measure"):
            clock.wait()
            started = time.perf_counter()
            for _ in generate(engine, self.codec, _rows(shard, schedule)):
                pass
        clock.wait()
        return 1000 * (time.perf_counter() - started) / len(pictures), len(pictures)

    def _missing(self, points: Sequence[Point], done: Done) -> list[Point]:
        """Points that are not in the ledger; those that are whole on disk are put there."""
        metrics, asked = self.ledger.metrics(), wanted(self.reference, self.distances)
        missing = []
        for point in points:
            if asked <= metrics.get(point.digest, set()) or self._finish(point):
                done(point)
            else:
                missing.append(point)
        return missing

    def _make(self, shards: Sequence[Shard], deadline: float | None, done: Done | None) -> int:
        """Draw shards in one stream of each numerics, and put points together where `done` is to be told of them.

        Returns how many this worker made.
        """
        embeds, made = self.checkpoint.info.model.embeds_guidance, 0
        for numerics in sorted({shard.point.spec.numerics for shard in shards}):
            alike = [shard for shard in shards if shard.point.spec.numerics == numerics]
            # Rows of two passes first: they leave both outputs of their first evaluation to the others.
            alike.sort(key=lambda shard: -num_passes(shard.point.spec.guidance, embeds))
            made += self._draw(alike, deadline, done)
        return made

    def _engine(self, first: Shard, of_one_point: bool) -> Engine:
        """The engine of a shard's numerics, warm."""
        spec = first.point.spec
        if spec.numerics not in self._engines:
            engine = make_engine(
                copy.deepcopy(self.checkpoint.network),
                self.checkpoint.info,
                self.captions,
                bucket_size=spec.bucket_size,
                precision=spec.precision,
                compiled=spec.compiled,
                share_bytes=0 if of_one_point else SHARE_BYTES,
                beside=self.beside,
            )
            warm_up = itertools.islice(_rows(first, schedule_of(self.checkpoint.info)), WARM_UP_PICTURES)
            for _ in generate(engine, self.codec, warm_up):
                pass
            self._engines[spec.numerics] = engine
        return self._engines[spec.numerics]

    def _draw(self, shards: Sequence[Shard], deadline: float | None, done: Done | None) -> int:
        claimed = self._claimed(shards, deadline)
        first = next(claimed, None)
        if first is None:
            return 0
        engine = self._engine(first, of_one_point=len({shard.point.digest for shard in shards}) == 1)
        schedule = schedule_of(self.checkpoint.info)
        begun: dict[str, ShardInWork] = {}

        def rows() -> Iterator[Row]:
            for shard in itertools.chain([first], claimed):
                begun[shard.digest] = ShardInWork(shard, self.reference, frozenset(self.kept))
                yield from _rows(shard, schedule)

        made = 0
        instruments = instruments_of(engine.device)
        instruments.reset_peak()
        clock = _Clock()
        for drawn in generate(engine, self.codec, rows()):
            clock.stop(drawn)
            for part in _by_shard(drawn):
                work = begun[part.digest]
                work.add(part)
                if work.is_whole:
                    del begun[part.digest]
                    self._keep(work, clock.ms_per_evaluation, instruments.peak_bytes())
                    made += 1
                    if done is not None and self._finish(work.shard.point):
                        done(work.shard.point)
            clock.start()
        return made

    def _claimed(self, shards: Sequence[Shard], deadline: float | None) -> Iterator[Shard]:
        """Shards that are not there and not in other hands, claimed one by one as they are asked for."""
        for shard in shards:
            if is_over(deadline):
                return
            if self._is_made(shard) or not self.claims.take(shard.digest):
                continue
            if self._is_made(shard):  # between the two
                self.claims.release(shard.digest)
                continue
            yield shard

    def _is_made(self, shard: Shard) -> bool:
        return self.store.has("point", shard.point.digest) or self.store.has("shard", shard.digest)

    def _keep(self, work: ShardInWork, ms_per_evaluation: float, peak_bytes: int | None) -> None:
        """Make a shard durable, record it, and give its claim back."""
        shard = work.shard
        work.write(self.store, ms_per_evaluation, peak_bytes)
        self.ledger.add_shard(shard.digest, shard.point.digest, shard.pictures)
        self.claims.release(shard.digest)

    def _finish(self, point: Point) -> bool:
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
                info = self.checkpoint.info
                assemble(self.store, self.reference, point, shards, point.nfe(info.model), info.label)
            self._record(point)
        finally:
            self.claims.release(point.digest)
        return True

    def _record(self, point: Point) -> None:
        """Score the artefact and write the ledger's row."""
        manifest = self.store.manifest("point", point.digest)
        measured = read_measured(self.store.folder("point", point.digest), tuple(self.reference.extractors))
        scores = score(measured, self.reference, self.distances)
        row = {
            **point.coordinate(),
            **point.costs(self.checkpoint.info),
            **describe(self.checkpoint.info),
            "protocol": self.reference.protocol.id,
            "num_not_finite": manifest["num_not_finite"],
            "least_bucket_size": manifest["least_bucket_size"],
            "ms_per_picture": manifest["ms_per_picture"],
            "seconds": manifest["seconds"],
            "peak_memory_mib": manifest.get("peak_memory_mib"),
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
