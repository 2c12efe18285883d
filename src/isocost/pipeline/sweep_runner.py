"""The sweep of trained models: score the points of the grid, search guidance, score the winners of the searches."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isocost.analysis.timings import NUM_ENERGY_IMAGES, NUM_LATENCY_RUNS
from isocost.config.types import TaskName
from isocost.experiments.base import EvalContext, EvalJob, Experiment, TrainingRun
from isocost.experiments.study_assets import StudyAssets
from isocost.models.checkpoint import read_info
from isocost.sweep.grid import SearchCell, SweepPoint
from isocost.sweep.guidance_search_runner import TrialStore, dominated, make_candidate, option_of, run_races
from isocost.sweep.leases import Leases
from isocost.sweep.results_db import ResultsDB
from isocost.sweep.worker import GuideSource, Worker
from isocost.utils.artifact_store import Store
from isocost.utils.environment import provenance
from isocost.utils.progress import progress_bar

Races = Mapping[str, Mapping[str, Any]]
"""The finished guidance searches by the digest of their cell, as in the results database."""

FRESH_TASK = "fresh-batch"
"""`task` of points that only a decision uses (`isocost.pipeline.until_decided`)."""

TimeKey = tuple[Any, ...]
"""The settings of a point that its times depend on."""


def planned_points(jobs: Sequence[EvalJob], races: Races) -> list[SweepPoint]:
    """The points of some jobs, without duplicates: all of the grids, and the winners of searches that are not dominated."""
    dominated_cells = {cell for cell, row in races.items() if row["dominated_by"] is not None}
    points = [point for job in jobs for point in (*job.points, *winning_points(job, races, dominated_cells))]
    return list({point.digest: point for point in points}.values())


def winning_points(job: EvalJob, races: Races, excluded: Collection[str]) -> list[SweepPoint]:
    """The winners of a job's finished guidance searches, without the cells whose digest is in `excluded`.

    Several cells may have the same winner: a race of intervals can end with guidance at all noise levels.
    """
    cells = [cell for cell in job.cells if cell.digest in races and cell.digest not in excluded]
    winners = [cell.point(races[cell.digest]["guidance"], option_of(races[cell.digest])) for cell in cells]
    return list({point.digest: point for point in winners}.values())


def unsearched_cells(jobs: Sequence[EvalJob], races: Races) -> list[SearchCell]:
    """The cells of some jobs whose guidance search is not finished."""
    return [cell for job in jobs for cell in job.cells if cell.digest not in races]


@dataclass(frozen=True)
class Sweeper:
    """Runs the sweeps of all experiments.

    Methods that take a `deadline`, a `time.monotonic()`, return False if it came before the work was done.

    Attributes:
        on_progress: called with the title of the current work after every point and guidance search.
    """

    store: Store
    results_db: ResultsDB
    leases: Leases
    assets: StudyAssets
    experiments: Mapping[TaskName, Experiment]
    on_progress: Callable[[str], None]

    def sweep(self, run: TrainingRun, size: str, deadline: float | None) -> bool:
        """Score the points of a run's grid and of its snapshots, then run its guidance searches.

        A guidance search finds the best guidance for one checkpoint, solver and number of steps.
        """
        jobs = self.experiments[run.task].jobs(run)
        grid = [(job, job.points) for job in jobs if job.points]
        if not self._score(run, grid, f"sweep {size} ({run.title})", deadline):
            return False
        return all(self._race(run, job, f"race {size} ({run.title})", deadline) for job in jobs if job.cells)

    def remeasure(self, run: TrainingRun, size: str) -> int:
        """Measure the times of every recorded point of a run again, on this machine; returns their number.

        Points that differ only in settings that do not change the time (guidance with the same number of passes, snapshots of
        one training) share one measurement. The latencies of a checkpoint are measured first, so that its network and its
        guides are in memory once at a time.
        """
        jobs, recorded = self.experiments[run.task].jobs(run), self.results_db.points()
        races = self.results_db.races()
        points_by_job = [(job, [point for point in planned_points([job], races) if point.digest in recorded]) for job in jobs]
        total, done = sum(len(points) for _, points in points_by_job), 0
        latencies: dict[TimeKey, tuple[float, int]] = {}
        throughputs: dict[TimeKey, tuple[float, int]] = {}
        energies: dict[TimeKey, tuple[float, int] | None] = {}
        title = f"time {size} ({run.title})"
        with progress_bar(title, 2 * total, "times") as progress:
            for job, points in points_by_job:
                keys = {point.digest: self._time_key(run, point) for point in points}
                worker = self._worker(run, job)
                for point in points:
                    if (key := keys[point.digest]) not in latencies:
                        latencies[key], energies[key] = worker.measure_latency_ms(point), worker.measure_joules(point)
                    progress(done := done + 1, f"{point.title}: {latencies[key][0]:.3g} ms for one image")
                worker = self._worker(run, job)
                for point in points:
                    if (key := keys[point.digest]) not in throughputs:
                        throughputs[key] = worker.measure_ms_per_image(point)
                    (ms, num_images), (latency_ms, num_runs) = throughputs[key], latencies[key]
                    source = {name: provenance()[name] for name in ("commit", "device", "num_threads")}
                    timed_with = {**source, "num_images": num_images, NUM_LATENCY_RUNS: num_runs}
                    joules = None
                    if (energy := energies[key]) is not None:
                        joules, timed_with[NUM_ENERGY_IMAGES] = energy
                    self.results_db.set_time(point.digest, ms, timed_with, latency_ms, joules)
                    progress(done := done + 1, f"{point.title}: {ms:.3g} ms per image")
        return total

    def _time_key(self, run: TrainingRun, point: SweepPoint) -> TimeKey:
        passes = point.passes(run.model, self.experiments[run.task].schedule(run))
        return (*point.spec.numerics, point.spec.solver.label, point.spec.num_steps, *passes, point.spec.guide)

    def score_search_winners(self, runs: Sequence[TrainingRun], deadline: float | None) -> bool:
        """Score the winners of these runs' guidance searches, except those that cannot be on any frontier.

        All cells of an experiment are compared with each other, so their searches must be finished.
        """
        for task in dict.fromkeys(run.task for run in runs):
            raced = [(run, job) for run in runs if run.task == task for job in self.experiments[task].jobs(run) if job.cells]
            races = self.results_db.races()
            reasons = self._dominated([job for _, job in raced], races, self.experiments[task])
            for run, job in raced:
                for cell in job.cells:
                    self.results_db.set_dominated(cell.digest, reasons.get(cell.digest))
                points = winning_points(job, races, reasons)
                if points and not self._score(run, [(job, points)], f"score the winners ({run.title})", deadline):
                    return False
        return True

    def score_fresh(self, run: TrainingRun, job: EvalJob, title: str, deadline: float | None) -> bool:
        """Score the points of a job that are no part of the sweep; the table of the study does not have them."""
        return self._score(run, [(job, job.points)], title, deadline, labels={"task": FRESH_TASK})

    def _score(
        self,
        run: TrainingRun,
        jobs: Sequence[tuple[EvalJob, Sequence[SweepPoint]]],
        title: str,
        deadline: float | None,
        labels: Mapping[str, str] | None = None,
    ) -> bool:
        requested, finished = {point.digest for _, points in jobs for point in points}, set[str]()
        with progress_bar(title, len(requested), "points") as progress:

            def done(point: SweepPoint) -> None:
                finished.add(point.digest)
                progress(len(finished), point.title)
                self.on_progress(f"{title}: {point.title}")

            return all(self._worker(run, job, labels).run(points, done, deadline) for job, points in jobs)

    def _race(self, run: TrainingRun, job: EvalJob, title: str, deadline: float | None) -> bool:
        requested, finished = {cell.digest for cell in job.cells}, set[str]()
        with progress_bar(title, len(requested), "cells") as progress:

            def done(cell: SearchCell) -> None:
                finished.add(cell.digest)
                progress(len(finished), cell.title)
                self.on_progress(f"{title}: {cell.title}")

            return run_races(self._worker(run, job), job.cells, done, deadline)

    def _dominated(self, jobs: Sequence[EvalJob], races: Races, experiment: Experiment) -> dict[str, str]:
        """Digests of the cells that are not scored, with the reason.

        A cell without its checkpoint or the images of its search keeps the decision of the results database.
        """
        sweep = experiment.sweep
        if sweep.race.stop_confidence is None:
            return {}
        candidates, decided = [], {}
        for job in jobs:
            has_checkpoint = self.store.has("checkpoint", job.checkpoint)
            trials = TrialStore(self.store, job.eval_context().reference, sweep.shard_size)
            for cell in job.cells:
                guidance, option = races[cell.digest]["guidance"], option_of(races[cell.digest])
                num_images = json.loads(races[cell.digest]["images_by_guidance"])[str(guidance)]
                shards = trials.shards(cell, guidance, num_images, option)
                if not has_checkpoint or not all(self.store.has("shard", shard.digest) for shard in shards):
                    decided[cell.digest] = races[cell.digest]["dominated_by"]
                    continue
                info = read_info(self.store.folder("checkpoint", job.checkpoint))
                guide_spec = cell.options[option].guide
                guide = None if guide_spec is None else read_info(self.store.folder("checkpoint", guide_spec.checkpoint))
                candidates.append(
                    make_candidate(cell, info, guide, trials, guidance, num_images, experiment.components_of_point, option)
                )
        reasons = {cell: reason for cell, reason in decided.items() if reason is not None}
        return dominated(candidates, sweep.race.stop_confidence) | reasons

    def _worker(self, run: TrainingRun, job: EvalJob, labels: Mapping[str, str] | None = None) -> Worker:
        eval_context = job.eval_context()
        return Worker(
            self.store,
            self.results_db,
            self.leases,
            self.store.folder("checkpoint", job.checkpoint),
            eval_context.autoencoder or self.assets.sampling_autoencoder(self.experiments[run.task].sweep.vae),
            eval_context.reference,
            eval_context.prompts,
            eval_context.saved_indices,
            eval_context.metrics,
            self.experiments[run.task].sweep.shard_size,
            self.experiments[run.task].components_of_point,
            eval_context.concat_cond,
            {name: self._guide_source(name, eval_context) for name in job.guides},
            labels={**self.experiments[run.task].labels(run), **(labels or {})},
        )

    def _guide_source(self, name: str, eval_context: EvalContext) -> GuideSource:
        return GuideSource(self.store.folder("checkpoint", name), eval_context.guide_prompts.get(name))
