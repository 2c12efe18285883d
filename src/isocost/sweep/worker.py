"""Points made and scored in this process, all points of a checkpoint in one stream of rows.

The engine is never drained between two points, and images that start alike at several points share their first
evaluation. Work is shared by shards: a worker claims one before it draws it, so any number of workers on one results database and one
folder make each shard once, and what they make does not depend on who made it. Whoever finds all shards of a point there puts
it together; the results database's row comes after that. A kill between the two leaves a point from which the row is written without
sampling again.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.solvers import solver_coefficients
from isocost.evaluation.evaluator import has_too_few_samples, score, wanted
from isocost.evaluation.feature_store import read_measured
from isocost.evaluation.reference_set import ReferenceSet
from isocost.models.autoencoder import Autoencoder
from isocost.models.checkpoint import Checkpoint, summary_columns
from isocost.sampling.engine import Engine
from isocost.sampling.generate import GeneratedBatch, PromptEmbeds, generate, make_engine, schedule_of
from isocost.sampling.request import PerSampleFn, SampleRequest, num_passes
from isocost.sweep.grid import SweepPoint
from isocost.sweep.image_shards import Shard, ShardBuilder, ShardChunk, merge_shards, split_into_shards
from isocost.sweep.leases import POLL_S, Leases
from isocost.sweep.results_db import ResultsDB
from isocost.utils.artifact_store import Store
from isocost.utils.device import device_monitor
from isocost.utils.environment import provenance
from isocost.utils.signals import deadline_passed

Done = Callable[[SweepPoint], None]
WARM_UP_IMAGES = 8
FIRST_STEP_CACHE_BYTES = 2**30
"""Memory for first evaluations: those of 30,000 images of 4 x 32 x 32 latents with guidance."""


@dataclass(frozen=True)
class Worker:
    """What every point of one checkpoint shares. It is opened, and its engines are made, when they are first needed."""

    store: Store
    results_db: ResultsDB
    claims: Leases
    open_checkpoint: Callable[[], Checkpoint]
    autoencoder: Autoencoder
    reference: ReferenceSet
    prompts: PromptEmbeds
    saved_indices: Sequence[int]
    metrics: tuple[str, ...]
    shard_size: int
    concat_cond: PerSampleFn | None = None
    _engines: dict[tuple[str, bool, int], Engine] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Not asked for where all points are recorded, so that it need not be there any more."""
        return self.open_checkpoint()

    def run(self, points: Sequence[SweepPoint], done: Done, deadline: float | None) -> bool:
        """Make and score what is not in the results database yet; False where `deadline` (of time.monotonic) came first.

        Returns when all points are there, whoever made them.
        """
        missing = list(points)
        while missing := self._missing(missing, done):
            if deadline_passed(deadline):
                return False
            shards = [shard for point in missing for shard in split_into_shards(point, self.shard_size)]
            if not self._make(shards, deadline, done):
                time.sleep(POLL_S)  # the rest is in other hands
        return True

    def make(self, shards: Sequence[Shard], deadline: float | None) -> bool:
        """Make shards that belong to no point that is to be scored; False where the deadline came first."""
        while missing := [shard for shard in shards if not self._is_made(shard)]:
            if deadline_passed(deadline):
                return False
            if not self._make(missing, deadline, None):
                time.sleep(POLL_S)
        return True

    def time(self, point: SweepPoint) -> tuple[float, int]:
        """Milliseconds that an image of a point takes when calls are full, denoised and decoded; and of how many images.

        As many images as a call has places, after as many to warm up; nothing is kept, and no first evaluation is shared.
        """
        images = range(min(point.spec.batch_size, point.spec.num_images))
        (shard,) = split_into_shards(point, len(images), [len(images)])
        engine, schedule = self._engine(shard, of_one_point=True), schedule_of(self.checkpoint.info)
        clock = device_monitor(engine.device).clock
        for _ in ("warm up", "measure"):
            clock.wait()
            started = time.perf_counter()
            for _ in generate(engine, self.autoencoder, _rows(shard, schedule)):
                pass
        clock.wait()
        return 1000 * (time.perf_counter() - started) / len(images), len(images)

    def _missing(self, points: Sequence[SweepPoint], done: Done) -> list[SweepPoint]:
        """Points that are not in the results database; those that are whole on disk are put there."""
        metrics, asked = self.results_db.metrics(), wanted(self.reference, self.metrics)
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
                self.prompts,
                batch_size=spec.batch_size,
                dtype=spec.dtype,
                compiled=spec.compiled,
                cache_bytes=0 if of_one_point else FIRST_STEP_CACHE_BYTES,
                concat_cond=self.concat_cond,
            )
            warm_up = itertools.islice(_rows(first, schedule_of(self.checkpoint.info)), WARM_UP_IMAGES)
            for _ in generate(engine, self.autoencoder, warm_up):
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
        begun: dict[str, ShardBuilder] = {}

        def rows() -> Iterator[SampleRequest]:
            for shard in itertools.chain([first], claimed):
                begun[shard.digest] = ShardBuilder(shard, self.reference, frozenset(self.saved_indices))
                yield from _rows(shard, schedule)

        made = 0
        monitor = device_monitor(engine.device)
        monitor.reset_peak()
        clock = _Clock()
        for drawn in generate(engine, self.autoencoder, rows()):
            clock.stop(drawn)
            for part in _by_shard(drawn):
                work = begun[part.digest]
                work.add(part)
                if work.is_whole:
                    del begun[part.digest]
                    self._keep(work, clock.ms_per_evaluation, monitor.peak_bytes())
                    made += 1
                    if done is not None and self._finish(work.shard.point):
                        done(work.shard.point)
            clock.start()
        return made

    def _claimed(self, shards: Sequence[Shard], deadline: float | None) -> Iterator[Shard]:
        """Shards that are not there and not in other hands, claimed one by one as they are asked for."""
        for shard in shards:
            if deadline_passed(deadline):
                return
            if self._is_made(shard) or not self.claims.take(shard.digest):
                continue
            if self._is_made(shard):  # between the two
                self.claims.release(shard.digest)
                continue
            yield shard

    def _is_made(self, shard: Shard) -> bool:
        return self.store.has("point", shard.point.digest) or self.store.has("shard", shard.digest)

    def _keep(self, work: ShardBuilder, ms_per_evaluation: float, peak_bytes: int | None) -> None:
        """Make a shard durable, record it, and give its claim back."""
        shard = work.shard
        work.write(self.store, ms_per_evaluation, peak_bytes)
        self.results_db.add_shard(shard.digest, shard.point.digest, shard.images)
        self.claims.release(shard.digest)

    def _finish(self, point: SweepPoint) -> bool:
        """Put a point together whose shards are all there, and record it; False where one is missing or another is at it.

        Raises:
            RunError: too many of its images are not finite numbers.
        """
        shards = split_into_shards(point, self.shard_size)
        if not self.store.has("point", point.digest) and not all(self.store.has("shard", one.digest) for one in shards):
            return False
        if not self.claims.take(point.digest):
            return False
        try:
            if not self.store.has("point", point.digest):
                if not all(self.store.has("shard", one.digest) for one in shards):
                    return False  # another has just put it together
                info = self.checkpoint.info
                merge_shards(self.store, self.reference, point, shards, point.nfe(info.model), info.label)
            self._record(point)
        finally:
            self.claims.release(point.digest)
        return True

    def _record(self, point: SweepPoint) -> None:
        """Score the artefact and write the results database's row."""
        manifest = self.store.manifest("point", point.digest)
        measured = read_measured(self.store.folder("point", point.digest), tuple(self.reference.extractors))
        scores = score(measured, self.reference, self.metrics)
        row = {
            **point.coordinate(),
            **point.costs(self.checkpoint.info),
            **summary_columns(self.checkpoint.info),
            "protocol": self.reference.protocol.id,
            "num_nonfinite": manifest["num_nonfinite"],
            "min_batch_size": manifest["min_batch_size"],
            "ms_per_image": manifest["ms_per_image"],
            "seconds": manifest["seconds"],
            "peak_memory_mib": manifest.get("peak_memory_mib"),
            "has_too_few_samples": has_too_few_samples(point.spec.num_images, self.reference, self.metrics),
        }
        self.results_db.add_point(row, scores, provenance(), self.reference.protocol.parts)


class _Clock:
    """Seconds of sampling and decoding, features apart, over the network evaluations computed in them."""

    def __init__(self) -> None:
        self.seconds, self.num_function_evaluations = 0.0, 0
        self.start()

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self, drawn: GeneratedBatch) -> None:
        self.seconds += time.perf_counter() - self._since
        self.num_function_evaluations += sum(row.nfe_executed for row in (*drawn.rows, *drawn.broken))

    @property
    def ms_per_evaluation(self) -> float:
        """Milliseconds an evaluation, with its share of decoding; 0 evaluations give 0."""
        return 1000 * self.seconds / max(self.num_function_evaluations, 1)


def _by_shard(drawn: GeneratedBatch) -> Iterator[ShardChunk]:
    digests = {row.row.tag for row in (*drawn.rows, *drawn.broken)}
    for digest in sorted(digests, key=str):
        places = [place for place, row in enumerate(drawn.rows) if row.row.tag == digest]
        broken = [row for row in drawn.broken if row.row.tag == digest]
        yield ShardChunk(str(digest), [drawn.rows[place] for place in places], drawn.images[places], broken)


def _rows(shard: Shard, schedule: NoiseSchedule) -> Iterator[SampleRequest]:
    spec = shard.point.spec
    table = solver_coefficients(spec.solver, spec.num_steps, schedule)
    for i in shard.images:
        yield SampleRequest(i, i, table, spec.guidance, tag=shard.digest, seed=spec.seed)
