"""The sweep of a study's trainings: points scored, guidance raced for, and what races found scored in its turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isocost.config.sweep import SweepSpec
from isocost.config.types import TaskName
from isocost.experiments.base import EvalJob, Experiment, TrainingRun
from isocost.experiments.study_assets import StudyAssets
from isocost.models.checkpoint import load_checkpoint, read_info
from isocost.sweep.grid import SearchCell, SweepPoint
from isocost.sweep.guidance_search_runner import TrialStore, make_candidate, run_races, stopped
from isocost.sweep.leases import Leases
from isocost.sweep.results_db import ResultsDB
from isocost.sweep.worker import Worker
from isocost.utils.artifact_store import Store
from isocost.utils.device import best_device
from isocost.utils.environment import provenance
from isocost.utils.progress import progress_bar

Races = Mapping[str, Mapping[str, Any]]
"""What the results database knows of races, by cell."""


def planned_points(jobs: Sequence[EvalJob], races: Races) -> list[SweepPoint]:
    """The points of some jobs, each once: of grids all, of races those that are found and not stopped."""
    points = [point for job in jobs for point in (*job.points, *winning_points(job, races, _stopped_before(races)))]
    return list({point.digest: point for point in points}.values())


def winning_points(job: EvalJob, races: Races, left_out: Collection[str]) -> list[SweepPoint]:
    """The points that the races of a job found, cells of `left_out` apart."""
    found = [cell for cell in job.cells if cell.digest in races and cell.digest not in left_out]
    return [cell.point(races[cell.digest]["guidance"]) for cell in found]


def unsearched_cells(jobs: Sequence[EvalJob], races: Races) -> list[SearchCell]:
    """The cells of some jobs whose races are not over."""
    return [cell for job in jobs for cell in job.cells if cell.digest not in races]


def _stopped_before(races: Races) -> set[str]:
    return {cell for cell, row in races.items() if row["stopped"] is not None}


@dataclass(frozen=True)
class Sweeper:
    """What sweeps of all experiments share. `deadline` is a `time.monotonic()`; False says that it came first.

    `after` is told what is at work, after every point and race.
    """

    store: Store
    results_db: ResultsDB
    claims: Leases
    assets: StudyAssets
    experiments: Mapping[TaskName, Experiment]
    after: Callable[[str], None]

    def sweep(self, run: TrainingRun, size: str, deadline: float | None) -> bool:
        """Score every point of a run that is known beforehand, and race for the others."""
        jobs = self.experiments[run.task].jobs(run)
        known = [(job, job.points) for job in jobs if job.points]
        if not self._score(run, known, f"sweep {size} ({run.title})", deadline):
            return False
        return all(self._race(run, job, f"race {size} ({run.title})", deadline) for job in jobs if job.cells)

    def remeasure(self, run: TrainingRun, size: str) -> int:
        """Time every recorded point of a run again, on this machine; returns how many there are.

        Points that differ in what does not touch their time - guidance at as many passes, weights of one training - are timed
        once.
        """
        jobs, recorded = self.experiments[run.task].jobs(run), self.results_db.points()
        races = self.results_db.races()
        known = [(job, [point for point in planned_points([job], races) if point.digest in recorded]) for job in jobs]
        total, done = sum(len(points) for _, points in known), 0
        taken: dict[tuple[Any, ...], tuple[float, int]] = {}
        title = f"time {size} ({run.title})"
        with progress_bar(title, total, "points") as progress:
            for job, points in known:
                worker = self._worker(run, job)
                for point in points:
                    alike = (*point.spec.numerics, point.spec.solver.label, point.spec.num_steps, point.nfe(run.model))
                    if alike not in taken:
                        taken[alike] = worker.time(point)
                    ms, num_images = taken[alike]
                    told = {name: provenance()[name] for name in ("commit", "device", "num_threads")}
                    self.results_db.set_time(point.digest, ms, {**told, "num_images": num_images})
                    progress(done := done + 1, f"{point.title}: {ms:.3g} ms")
        return total

    def score_search_winners(self, runs: Sequence[TrainingRun], deadline: float | None) -> bool:
        """Score what the races of these runs found, cells apart that cannot be on any frontier.

        All cells of an experiment are set against each other, so their races must be over.
        """
        for task in dict.fromkeys(run.task for run in runs):
            raced = [(run, job) for run in runs if run.task == task for job in self.experiments[task].jobs(run) if job.cells]
            races = self.results_db.races()
            reasons = self._stopped([job for _, job in raced], races, self.experiments[task].sweep)
            for run, job in raced:
                for cell in job.cells:
                    self.results_db.stop_cell(cell.digest, reasons.get(cell.digest))
                points = winning_points(job, races, reasons)
                if points and not self._score(run, [(job, points)], f"score what was found ({run.title})", deadline):
                    return False
        return True

    def _score(
        self, run: TrainingRun, jobs: Sequence[tuple[EvalJob, Sequence[SweepPoint]]], title: str, deadline: float | None
    ) -> bool:
        asked, ended = {point.digest for _, points in jobs for point in points}, set[str]()
        with progress_bar(title, len(asked), "points") as progress:

            def done(point: SweepPoint) -> None:
                ended.add(point.digest)
                progress(len(ended), point.title)
                self.after(f"{title}: {point.title}")

            return all(self._worker(run, job).run(points, done, deadline) for job, points in jobs)

    def _race(self, run: TrainingRun, job: EvalJob, title: str, deadline: float | None) -> bool:
        asked, ended = {cell.digest for cell in job.cells}, set[str]()
        with progress_bar(title, len(asked), "cells") as progress:

            def done(cell: SearchCell) -> None:
                ended.add(cell.digest)
                progress(len(ended), cell.title)
                self.after(f"{title}: {cell.title}")

            return run_races(self._worker(run, job), job.cells, done, deadline)

    def _stopped(self, jobs: Sequence[EvalJob], races: Races, sweep: SweepSpec) -> dict[str, str]:
        """Cells that are not scored, with the reason. Those whose images are not here any more stay as they were settled."""
        if sweep.race.stop_confidence is None:
            return {}
        contenders, settled = [], {}
        for job in jobs:
            info = read_info(self.store.folder("checkpoint", job.checkpoint))
            trials = TrialStore(self.store, job.eval_context().reference, sweep.shard_size)
            for cell in job.cells:
                guidance = races[cell.digest]["guidance"]
                drawn = json.loads(races[cell.digest]["images_at"])[str(guidance)]
                if not all(self.store.has("shard", shard.digest) for shard in trials.shards(cell, guidance, drawn)):
                    settled[cell.digest] = races[cell.digest]["stopped"]
                    continue
                contenders.append(make_candidate(cell, info, trials, guidance, drawn))
        known = {cell: reason for cell, reason in settled.items() if reason is not None}
        return stopped(contenders, sweep.race.stop_confidence) | known

    def _worker(self, run: TrainingRun, job: EvalJob) -> Worker:
        eval_context = job.eval_context()
        return Worker(
            self.store,
            self.results_db,
            self.claims,
            lambda: load_checkpoint(self.store.folder("checkpoint", job.checkpoint), best_device()),
            eval_context.autoencoder or self.assets.autoencoder,
            eval_context.reference,
            eval_context.prompts,
            eval_context.saved_indices,
            eval_context.metrics,
            self.experiments[run.task].sweep.shard_size,
            eval_context.concat_cond,
        )
