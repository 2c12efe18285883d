"""Generate and score the points of a checkpoint in this process, in one stream of sample requests.

The engine is never drained between two points, and points with the same first evaluation share it. Workers share the work by
shards: a worker acquires the lease of a shard before it generates the images. Any number of workers with one results database
and one output folder therefore generate each shard once, and the images do not depend on the worker. The worker that finds all
shards of a point merges them, and then writes the point to the results database. If it is killed between these two steps, the
next run writes the row without sampling again.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from isocost.config.sampling import VaeSpec
from isocost.config.sweep import PointSpec
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.solvers import solver_coefficients
from isocost.evaluation.evaluator import Scorer, has_too_few_samples, metric_names
from isocost.evaluation.feature_store import read_sample_features
from isocost.evaluation.reference_set import ReferenceSet
from isocost.models.autoencoder import Autoencoder, images_per_call
from isocost.models.checkpoint import CheckpointInfo, load_checkpoint, open_checkpoint, read_info, summary_columns
from isocost.models.component_costs import ComponentCosts
from isocost.sampling.denoiser import torch_dtype
from isocost.sampling.engine import Engine
from isocost.sampling.generate import GeneratedBatch, PromptEmbeds, generate, make_engine, schedule_of
from isocost.sampling.guides import check_guide, make_guide
from isocost.sampling.latency import load_components, load_guide
from isocost.sampling.latency_stages import (
    BatchedPipeline,
    CallCounter,
    LoadedGuide,
    LoadedModel,
    measure_joules,
    measure_latency_ms,
)
from isocost.sampling.request import PerSampleFn, SampleRequest, passes_per_evaluation
from isocost.sampling.stage_times import StageTimes, measure_guide, measure_stage_times
from isocost.sweep.grid import SweepPoint, guide_label
from isocost.sweep.image_shards import Shard, ShardBuilder, ShardChunk, merge_shards, split_into_shards
from isocost.sweep.leases import Leases
from isocost.sweep.results_db import ResultsDB
from isocost.utils.artifact_store import Store
from isocost.utils.device import HostTimer, best_device, device_monitor
from isocost.utils.environment import provenance
from isocost.utils.signals import deadline_passed

logger = logging.getLogger(__name__)

MEASURED_GUIDANCE = 2.0
"""w of the requests that measure the time of a guide, which is the same at any w above 1."""
PointCallback = Callable[[SweepPoint], None]
WARM_UP_IMAGES = 8
MAX_MEASURED_STEPS = 2
FIRST_STEP_CACHE_BYTES = 2**30
"""Memory for shared first evaluations, enough for 30,000 images with guidance and 4 x 32 x 32 latents."""


@dataclass(frozen=True)
class GuideSource:
    """A checkpoint that guides others.

    Attributes:
        folder: folder of the checkpoint.
        prompts: makes its own prompt embeddings by sample index; None for those of the network that it guides.
    """

    folder: Path
    prompts: Callable[[], PromptEmbeds] | None = None

    @cached_property
    def info(self) -> CheckpointInfo:
        """Metadata of the checkpoint."""
        return read_info(self.folder)


@dataclass(frozen=True)
class Worker:
    """Everything that the points of one checkpoint share. The engines are created on first use.

    Attributes:
        store: artefacts of the output folder.
        results_db: results database.
        leases: leases of this process.
        checkpoint_folder: folder of the checkpoint. Each engine reads the network from it, because it changes the network.
        autoencoder: decodes the latents.
        reference: reference set of the scores.
        prompts: prompt embeddings by sample index.
        saved_indices: indices of the samples whose images every point saves.
        metrics: metrics to compute.
        shard_size: images of a shard.
        components: returns the costs of the text encoder and the autoencoder of a point.
        concat_cond: second input of the network by sample index (super-resolution).
        guides: checkpoints that guide points, by the name in the points.
        labels: columns of the results table that the study decides, where the checkpoint was trained for another one.
        now: seconds since an arbitrary origin.
    """

    store: Store
    results_db: ResultsDB
    leases: Leases
    checkpoint_folder: Path
    autoencoder: Autoencoder
    reference: ReferenceSet
    prompts: PromptEmbeds
    saved_indices: Sequence[int]
    metrics: tuple[str, ...]
    shard_size: int
    components: Callable[[PointSpec], ComponentCosts]
    concat_cond: PerSampleFn | None = None
    guides: Mapping[str, GuideSource] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    now: Callable[[], float] = time.perf_counter
    _engines: dict[tuple[str, bool, int], Engine] = field(default_factory=dict, init=False, repr=False)
    _stage_times: dict[tuple[tuple[str, bool, int], str | None], StageTimes] = field(
        default_factory=dict, init=False, repr=False
    )
    _models: dict[tuple[str, bool, VaeSpec], LoadedModel] = field(default_factory=dict, init=False, repr=False)
    _guides: dict[tuple[str, bool, str], LoadedGuide] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def info(self) -> CheckpointInfo:
        """Read on first use: the checkpoint need not exist if all points are recorded."""
        return read_info(self.checkpoint_folder)

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of the checkpoint."""
        return schedule_of(self.info)

    def run(self, points: Sequence[SweepPoint], done: PointCallback, deadline: float | None) -> bool:
        """Generate and score the points that are not in the results database, until all are, from this or another worker.

        Args:
            points: points of the checkpoint.
            done: called with every point that is recorded.
            deadline: `time.monotonic()` after which the work stops; None never stops.

        Returns:
            False if the deadline came first.

        Raises:
            RunError: too many images of a point are not finite.
        """
        missing = list({point.digest: point for point in points}.values())
        while missing := self._missing(missing, done):
            if deadline_passed(deadline):
                return False
            shards = [shard for point in missing for shard in split_into_shards(point, self.shard_size)]
            if not self._generate(shards, deadline, done):
                self._wait(shards)
        return True

    def generate_shards(self, shards: Sequence[Shard], extractors: Sequence[str] | None, deadline: float | None) -> bool:
        """Generate shards of a search, whose points are not scored, with the features of some extractors; None for all.

        Returns:
            False if the deadline came first.
        """
        missing = list({shard.digest: shard for shard in shards}.values())
        while missing := [shard for shard in missing if not self._exists(shard)]:
            if deadline_passed(deadline):
                return False
            if not self._generate(missing, deadline, None, extractors):
                self._wait(missing)
        return True

    def measure_ms_per_image(self, point: SweepPoint) -> tuple[float, int]:
        """Measure denoising and decoding of full calls, after the same images as warm-up, and add the text encoder.

        The images are not saved, and no first evaluation is shared. Where some evaluations take two passes of the network and
        others one, the last calls of the stream have empty slots, which other images would take in a longer stream. The time
        of these slots is measured without decoding and subtracted.

        Returns:
            Milliseconds per image, and the number of measured images.
        """
        (shard,) = split_into_shards(point, point.spec.num_images, [point.spec.num_images])
        engine = self._engine(shard, is_single_point=True)
        decoder_batch = images_per_call(engine.latent_shape[-1] * self.autoencoder.factor)
        full_batch = -(-max(engine.num_slots, decoder_batch) // decoder_batch) * decoder_batch
        num_images = min(full_batch, point.spec.num_images)
        (shard,) = split_into_shards(point, num_images, [num_images])

        def images() -> int:
            return sum(len(batch.results) for batch in generate(engine, self.autoencoder, _requests(shard, self.schedule)))

        def latents() -> int:
            return len(list(engine.run(_requests(shard, self.schedule))))

        counter = CallCounter(engine.denoise)
        engine.denoise = counter
        images()
        engine.denoise = counter.denoise
        total_s = self._seconds(images, engine)
        num_empty = counter.num_rows - num_images * point.passes(self.info.model, self.schedule)[0]
        if num_empty > 0 and point.spec.guide is None:
            total_s -= self._seconds(latents, engine) * num_empty / counter.num_rows
        return self.prompts.ms_per_prompt + 1000 * total_s / num_images, num_images

    def _seconds(self, work: Callable[[], int], engine: Engine) -> float:
        clock = device_monitor(engine.device).clock
        clock.wait()
        started = self.now()
        work()
        clock.wait()
        return self.now() - started

    def measure_latency_ms(self, point: SweepPoint) -> tuple[float, int]:
        """Measure one image alone, from its prompt to its pixels: text encoder, every pass of both networks, decoder.

        It is the end-to-end time of `isocost latency --batch 1`. Both networks are on the device.

        Returns:
            Milliseconds, and the number of measured runs.
        """
        device = best_device()
        clock, host_clock = device_monitor(device).clock, HostTimer(lambda: round(1e9 * self.now()))
        return measure_latency_ms(self._pipeline(point, 1), clock, host_clock)

    def measure_joules(self, point: SweepPoint) -> tuple[float, int] | None:
        """Measure the energy of one image at full batches, from its prompt to its pixels.

        Returns:
            Joules of the whole device per image, and the number of measured images; None if the device does not report them.
        """
        monitor = device_monitor(best_device())
        if monitor.read().energy_j is None:
            return None
        spec, embeds_guidance = point.spec, self.info.model.embeds_guidance
        num_passes = 1 if spec.guide is not None else passes_per_evaluation(spec.guidance, embeds_guidance)
        try:
            return measure_joules(self._pipeline(point, max(1, spec.batch_size // num_passes)), monitor, self.now)
        except torch.OutOfMemoryError:
            logger.warning(f"{point.title}: its energy is not measured: a full batch with all networks does not fit")
            return None

    def _pipeline(self, point: SweepPoint, batch_size: int) -> BatchedPipeline:
        """The point as a run over one batch, from the prompts to the pixels."""
        spec, device = point.spec, best_device()
        key = (spec.dtype, spec.compiled, spec.vae)
        model = self._models.get(key)
        if model is None:
            checkpoint = load_checkpoint(self.checkpoint_folder, device, torch_dtype(spec.dtype))
            model = self._models[key] = load_components(checkpoint, spec.dtype, spec.compiled, device, spec.vae)
        guide = None if spec.guide is None else self._loaded_guide(spec.guide.checkpoint, spec, model)
        null_prompt = spec.guide is not None and spec.guide.null_prompt
        coefficients, weights = solver_coefficients(spec.solver, spec.num_steps, self.schedule), point.weights(self.schedule)
        return BatchedPipeline(model, coefficients, spec.guidance, batch_size, weights, guide, null_prompt)

    def _loaded_guide(self, name: str, spec: PointSpec, main: LoadedModel) -> LoadedGuide:
        key = (spec.dtype, spec.compiled, name)
        if key not in self._guides:
            source = self.guides[name]
            check_guide(self.info, source.info)
            guide = open_checkpoint(source.folder)
            shares_text_encoder = source.prompts is None
            self._guides[key] = load_guide(guide, spec.dtype, spec.compiled, best_device(), main, shares_text_encoder)
        return self._guides[key]

    def _missing(self, points: Sequence[SweepPoint], done: PointCallback) -> list[SweepPoint]:
        """Record points whose images are complete, and return the points that are still not recorded."""
        recorded, required = self.results_db.metrics(), metric_names(self.reference, self.metrics)
        missing = []
        for point in points:
            if required <= recorded.get(point.digest, set()) or self._finish(point):
                done(point)
            else:
                missing.append(point)
        return missing

    def _generate(
        self,
        shards: Sequence[Shard],
        deadline: float | None,
        done: PointCallback | None,
        extractors: Sequence[str] | None = None,
    ) -> int:
        """Generate shards, one stream of requests for each setting of the numerics.

        Args:
            shards: the shards.
            deadline: as in `run`.
            done: called with every point that is recorded; None records no point.
            extractors: names of the feature extractors to use; None for all of the protocol.

        Returns:
            The number of shards that this worker generated.
        """
        model, num_generated = self.info.model, 0
        for numerics in sorted({shard.point.spec.numerics for shard in shards}):
            same_numerics = [shard for shard in shards if shard.point.spec.numerics == numerics]
            # Two-pass requests first: one-pass requests can then share either output of the first evaluation.
            same_numerics.sort(
                key=lambda shard: -passes_per_evaluation(shard.point.weights(self.schedule)[0], model.embeds_guidance)
            )
            num_generated += self._run_stream(same_numerics, deadline, done, extractors)
        return num_generated

    def _engine(self, first: Shard, is_single_point: bool) -> Engine:
        """Return the warmed-up engine for a shard's numerics."""
        spec = first.point.spec
        if spec.numerics not in self._engines:
            engine = make_engine(
                load_checkpoint(self.checkpoint_folder, best_device(), torch_dtype(spec.dtype)).network,
                self.info,
                self.prompts,
                batch_size=spec.batch_size,
                dtype=spec.dtype,
                compiled=spec.compiled,
                cache_bytes=0 if is_single_point else FIRST_STEP_CACHE_BYTES,
                concat_cond=self.concat_cond,
            )
            self._engines[spec.numerics] = engine
            self._add_guide(engine, spec)
            warm_up = itertools.islice(_requests(first, self.schedule), WARM_UP_IMAGES)
            for _ in generate(engine, self.autoencoder, warm_up):
                pass
        self._add_guide(self._engines[spec.numerics], spec)
        return self._engines[spec.numerics]

    def _add_guide(self, engine: Engine, spec: PointSpec) -> None:
        """Load the guide of a point into the engine, if it is not there."""
        if spec.guide is None or spec.guide.checkpoint in engine.guides:
            return
        source = self.guides[spec.guide.checkpoint]
        check_guide(self.info, source.info)
        network = load_checkpoint(source.folder, best_device(), torch_dtype(spec.dtype)).network
        prompts = self.prompts if source.prompts is None else source.prompts()
        engine.add_guide(
            spec.guide.checkpoint, make_guide(network, source.info, prompts, dtype=spec.dtype, compiled=spec.compiled)
        )

    def _measure_stage_times(self, shard: Shard, engine: Engine) -> StageTimes:
        """Return the times of the stages for a shard's numerics and guide, measured on full batches of one or two steps."""
        spec = shard.point.spec
        solver = spec.solver.model_copy(update={"timesteps": None})  # which timesteps changes no time
        coefficients = solver_coefficients(solver, min(spec.num_steps, MAX_MEASURED_STEPS), self.schedule)
        if (spec.numerics, None) not in self._stage_times:
            passes = passes_per_evaluation(spec.guidance, self.info.model.embeds_guidance) if spec.guide is None else 1
            guidance = spec.guidance if spec.guide is None else 1.0
            num_images = min(spec.num_images, max(1, engine.num_slots // passes))
            requests = [SampleRequest(i, i, coefficients, guidance, seed=spec.seed) for i in range(num_images)]
            self._stage_times[spec.numerics, None] = measure_stage_times(
                engine, self.autoencoder, requests, self.prompts.ms_per_prompt, self.now
            )
        times = self._stage_times[spec.numerics, None]
        if spec.guide is None:
            return times
        key = (spec.numerics, spec.guide.checkpoint)
        if key not in self._stage_times:
            num_images = min(spec.num_images, engine.num_slots)
            requests = [
                SampleRequest(i, i, coefficients, MEASURED_GUIDANCE, seed=spec.seed, guide=spec.guide.checkpoint)
                for i in range(num_images)
            ]
            self._stage_times[key] = measure_guide(times, engine, requests, self.now)
        return self._stage_times[key]

    def _run_stream(
        self,
        shards: Sequence[Shard],
        deadline: float | None,
        done: PointCallback | None,
        extractors: Sequence[str] | None,
    ) -> int:
        acquired = self._acquire(shards, deadline)
        first = next(acquired, None)
        if first is None:
            return 0
        engine = self._engine(first, is_single_point=len({shard.point.digest for shard in shards}) == 1)
        for shard in shards:
            self._add_guide(engine, shard.point.spec)
        stage_times = {shard.point.spec.guide: self._measure_stage_times(shard, engine) for shard in (first, *shards)}
        builders: dict[str, ShardBuilder] = {}

        def requests() -> Iterator[SampleRequest]:
            for shard in itertools.chain([first], acquired):
                builders[shard.digest] = ShardBuilder(shard, self.reference, frozenset(self.saved_indices), extractors)
                yield from _requests(shard, self.schedule)

        num_generated = 0
        monitor = device_monitor(engine.device)
        monitor.reset_peak()
        for batch in generate(engine, self.autoencoder, requests()):
            for chunk in _split_by_shard(batch):
                builder = builders[chunk.digest]
                builder.add(chunk)
                if builder.is_complete:
                    del builders[chunk.digest]
                    self._commit_shard(builder, stage_times[builder.shard.point.spec.guide], monitor.peak_bytes())
                    num_generated += 1
                    if done is not None and self._finish(builder.shard.point):
                        done(builder.shard.point)
        return num_generated

    def _acquire(self, shards: Sequence[Shard], deadline: float | None) -> Iterator[Shard]:
        """Acquire the leases of missing shards one by one, when the engine needs more requests."""
        for shard in shards:
            if deadline_passed(deadline):
                return
            if self._exists(shard) or not self.leases.acquire(shard.digest):
                continue
            if self._exists(shard):  # another worker finished it between the check and the lease
                self.leases.release(shard.digest)
                continue
            yield shard

    def _wait(self, shards: Sequence[Shard]) -> None:
        """Wait for the other workers that hold the missing shards or merge the points."""
        self.leases.wait(*(shard.digest for shard in shards), *dict.fromkeys(shard.point.digest for shard in shards))

    def _exists(self, shard: Shard) -> bool:
        return self.store.has("point", shard.point.digest) or self.store.has("shard", shard.digest)

    def _commit_shard(self, builder: ShardBuilder, stage_times: StageTimes, peak_bytes: int | None) -> None:
        """Write a shard to the store, record it, and release its lease."""
        shard = builder.shard
        builder.write(self.store, stage_times, peak_bytes)
        self.results_db.add_shard(shard.digest, shard.point.digest, shard.images)
        if self.autoencoder.fallbacks:
            events = [(self.info.label, fallback) for fallback in self.autoencoder.fallbacks]
            self.results_db.set_events(f"decode {shard.point.spec.checkpoint}", events)
        self.leases.release(shard.digest)

    def _finish(self, point: SweepPoint) -> bool:
        """Merge the shards of a point and record it; False if a shard is missing or another worker does it.

        Raises:
            RunError: too many images are not finite.
        """
        shards = split_into_shards(point, self.shard_size)
        if not self.store.has("point", point.digest) and not self._has_all(shards):
            return False
        if not self.leases.acquire(point.digest):
            return False
        try:
            if not self.store.has("point", point.digest):
                if not self._has_all(shards):
                    return False  # another worker has just merged them
                info = self.info
                passes = point.passes(info.model, self.schedule)
                merge_shards(self.store, self.reference, point, shards, passes, info.label)
            self._record(point)
        finally:
            self.leases.release(point.digest)
        return True

    def _has_all(self, shards: Sequence[Shard]) -> bool:
        return all(self.store.has("shard", shard.digest) for shard in shards)

    def _record(self, point: SweepPoint) -> None:
        """Score a merged point and write it to the results database."""
        manifest = self.store.manifest("point", point.digest)
        features = read_sample_features(self.store.open("point", point.digest), tuple(self.reference.extractors))
        scorer = Scorer(features, self.reference, self.metrics, point.spec.num_images)
        scores, resamples = scorer.intervals(), scorer.resamples()
        guide = None if point.spec.guide is None else self.guides[point.spec.guide.checkpoint].info
        row = {
            **point.coordinate(),
            **point.costs(self.info, guide, self.components(point.spec)),
            **summary_columns(self.info),
            "guide": None if guide is None else guide_label(guide, self.info, point.spec.guide),
            "guide_nfe": point.passes(self.info.model, self.schedule)[1],
            **self.labels,
            "protocol": self.reference.protocol.id,
            "num_nonfinite": manifest["num_nonfinite"],
            "min_batch_size": manifest["min_batch_size"],
            "ms_per_image": manifest["ms_per_image"],
            "seconds": manifest["seconds"],
            "peak_memory_mib": manifest.get("peak_memory_mib"),
            "has_too_few_samples": has_too_few_samples(point.spec.num_images, self.reference, self.metrics),
        }
        self.results_db.add_point(row, scores, provenance(), self.reference.protocol.parts, point.vae_columns(), resamples)


def _split_by_shard(batch: GeneratedBatch) -> Iterator[ShardChunk]:
    digests = {result.request.tag for result in (*batch.results, *batch.nonfinite)}
    for digest in sorted(digests, key=str):
        positions = [position for position, result in enumerate(batch.results) if result.request.tag == digest]
        nonfinite = [result for result in batch.nonfinite if result.request.tag == digest]
        yield ShardChunk(str(digest), [batch.results[position] for position in positions], batch.images[positions], nonfinite)


def _requests(shard: Shard, schedule: NoiseSchedule) -> Iterator[SampleRequest]:
    spec = shard.point.spec
    coefficients, weights = solver_coefficients(spec.solver, spec.num_steps, schedule), shard.point.weights(schedule)
    for i in shard.images:
        yield SampleRequest(
            i,
            i,
            coefficients,
            spec.guidance,
            tag=shard.digest,
            seed=spec.seed,
            guidance_per_evaluation=weights,
            guide=None if spec.guide is None else spec.guide.checkpoint,
            guide_is_unconditional=spec.guide is not None and spec.guide.null_prompt,
        )
