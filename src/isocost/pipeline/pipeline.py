"""Run the stages of a study, from images to scored points. A stage whose artefact already exists is skipped."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from isocost.config.prices import load_prices
from isocost.config.sampling import FOLDER_SOLVERS
from isocost.config.study import StudySpec
from isocost.config.study_yaml import dump_study
from isocost.config.types import TaskName
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.solvers import SOLVERS, solver_coefficients
from isocost.errors import ConfigError
from isocost.evaluation.bootstrap import check_resampled
from isocost.evaluation.metric_registry import check_metrics, metric_columns, metric_of
from isocost.evaluation.paired import PointResamples
from isocost.experiments.base import EvalJob, Experiment, TrainingRun
from isocost.experiments.distillation import DistillExperiment
from isocost.experiments.dreambooth import DreamboothExperiment
from isocost.experiments.pretrain import PretrainExperiment
from isocost.experiments.pretrained import PretrainedExperiment
from isocost.experiments.seed_replicates import SeedReplicatesExperiment
from isocost.experiments.study_assets import StudyAssets
from isocost.experiments.superres import SuperresExperiment
from isocost.models.checkpoint import CheckpointInfo
from isocost.models.factory import check_widths
from isocost.models.flops import ModelCost, model_cost
from isocost.pipeline.compatibility import (
    DATA_PARTS,
    STUDY_FILE,
    RecordedContent,
    check_compatible,
    write_content,
)
from isocost.pipeline.status import PlannedPoint, Status, StatusFile, now, seconds_left, size_status
from isocost.pipeline.sweep_runner import Sweeper, planned_points, unsearched_cells
from isocost.sweep.grid import SweepPoint
from isocost.sweep.leases import Leases
from isocost.sweep.results_db import ResultsDB
from isocost.training.distributed import process_info
from isocost.training.state_checkpoint import newest_state_images
from isocost.training.throughput_estimate import ThroughputEstimate, ThroughputEstimator, oom_message
from isocost.training.trainer import DeadlineReached, train
from isocost.utils.artifact_store import Store, free_disk, write_atomically
from isocost.utils.output_paths import check_output_folder
from isocost.utils.signals import deadline_passed

logger = logging.getLogger(__name__)

RESULTS_DB_FILE = "results.sqlite"


class Pipeline:
    """One study in one output folder.

    `train` makes the study assets that it needs; `sweep` uses the checkpoints that `train` saved. `deadline` is a
    `time.monotonic()` after which a stage saves its progress and stops.
    """

    def __init__(self, study: StudySpec, out: str | Path, results_db: str | None = None) -> None:
        """
        Args:
            study: the study to run.
            out: the output folder.
            results_db: address of a database in place of the folder's own file; runs with the same database share the work.

        Raises:
            ConfigError: a width does not fit the family, the folder cannot be one, or it holds artefacts of a conflicting
                study.
        """
        if study.family is not None:
            check_widths(study.family)
        check_metrics(study.protocol.metrics, study.protocol.features)
        sweeps = [(study.sweep, study.report.metric)]
        sweeps += [(part.sweep, part.metric or study.report.metric) for part in study.finetune_parts().values()]
        for sweep, metric in sweeps:
            for solver in sweep.solvers:
                if not (study.checkpoints and solver.name in FOLDER_SOLVERS):
                    SOLVERS.check(solver.name, f"{study.name}: sweep.solvers")
                for num_steps in () if study.checkpoints else sweep.step_counts(solver):
                    solver_coefficients(solver, num_steps, NoiseSchedule.scaled_linear())
            first = sweep.solvers[0]
            if not study.checkpoints and first.steps_or(None, sweep.snapshot_num_steps) != sweep.snapshot_num_steps:
                raise ConfigError(
                    f"sweep.snapshot_num_steps = {sweep.snapshot_num_steps}: the first solver, {first.label}, samples the "
                    "snapshots; set it to the number of its timesteps, or list another solver first"
                )
            metric_of(metric)
            if sweep.search == "race":
                check_resampled(metric)
        if study.report.prices is not None:
            load_prices(study.report.prices)
        self.study, self.out = study, check_output_folder(out)
        self.results_db_address = results_db or self.out / RESULTS_DB_FILE
        self.store = Store(self.out)
        self.components = check_compatible(study, self.store)
        self.process = process_info()
        paths = {part: component.path for part, component in self.components.items()}
        self.assets = StudyAssets(study, self.store, self.process, paths, self._read_resamples)
        self._results_db: ResultsDB | None = None

    def prepare(self) -> None:
        """Check the data sources, write the resolved study and open the results database; every stage calls it first."""
        if self.process.rank == 0:
            self.open_results_db()
        self.process.wait()

    def open_results_db(self) -> ResultsDB:
        """Open the results database, once. The first process also checks the data sources and writes the resolved study.

        Raises:
            ConfigError: a data source is missing, or the database cannot be reached.
        """
        if self._results_db is None:
            if self.process.rank == 0:
                parts = ("reference",) if self.study.checkpoints else DATA_PARTS
                contents = {part: self.assets.source_content(part) for part in parts}
                self.out.mkdir(parents=True, exist_ok=True)
                write_content(self.out, RecordedContent(contents, self.components))
                write_atomically(self.out / STUDY_FILE, dump_study(self.study))
                self.store.remove_partial()
            self._results_db = ResultsDB(self.results_db_address)
        return self._results_db

    @property
    def results_db(self) -> ResultsDB:
        """The results database. It is opened on first use if `prepare` has not opened it."""
        return self.open_results_db()

    @cached_property
    def leases(self) -> Leases:
        """The leases of this run: the work that it does at present."""
        return Leases(self.results_db.engine)

    def _record_skipped(self) -> None:
        if self.process.rank:
            return
        for part, events in self.assets.skipped().items():
            self.results_db.set_events(f"data.{part}", events)

    # --- training ---

    @cached_property
    def experiments(self) -> dict[TaskName, Experiment]:
        """The experiments of the study: the family, then its fine-tuning; or the sweep of pretrained checkpoints."""
        if self.study.checkpoints:
            return {"text2image": PretrainedExperiment(self.study, self.assets)}
        family = PretrainExperiment(self.study, self.assets)
        experiments: dict[TaskName, Experiment] = {"text2image": family}
        if self.study.seed_replicates is not None:
            experiments["seed-replicates"] = SeedReplicatesExperiment(self.study.seed_replicates, family)
        if self.study.distill is not None:
            experiments["distill"] = DistillExperiment("distill", self.study.distill, self.assets, family)
        if self.study.superres is not None:
            superres = SuperresExperiment(self.study.superres, self.assets, family)
            experiments["superres"] = superres
            if (distill := self.study.superres.distill) is not None:
                experiments["superres-distill"] = DistillExperiment("superres-distill", distill, self.assets, superres)
        if self.study.dreambooth is not None:
            experiments["dreambooth"] = DreamboothExperiment(self.study.dreambooth, self.assets, family)
        return experiments

    @property
    def runs(self) -> list[TrainingRun]:
        """All trainings of the study, by experiment, smallest first."""
        return self.runs_of(None)

    def runs_of(self, tasks: Collection[TaskName] | None) -> list[TrainingRun]:
        """The trainings of some tasks, or of all where `tasks` is None or empty.

        Raises:
            ConfigError: the study has no part for a task.
        """
        for task in tasks or ():
            if task not in self.experiments:
                raise ConfigError(f"{self.study.name}: the study has no part `{task}`; add it, or leave out --task {task}")
        return [
            run for name, experiment in self.experiments.items() if tasks is None or name in tasks for run in experiment.runs
        ]

    def cost(self, run: TrainingRun) -> ModelCost:
        """Size and cost of a run's network at the study's latent shape and number of tokens.

        A pretrained checkpoint is counted at its own latent shape and number of tokens.
        """
        info = self.experiments[run.task].pretrained(run)
        if info is not None:
            numbers = (info.num_parameters, info.gflop_per_forward, info.normalized_cost_per_step)
            return ModelCost(info.size, info.model.width, *numbers)
        return model_cost(run.model, self.study.text_encoder.max_tokens)

    def denoiser_gflop(self, run: TrainingRun, point: SweepPoint) -> float:
        """Cost of the passes of one image of a run's network and of its guide."""
        experiment = self.experiments[run.task]
        main_passes, guide_passes = point.passes(run.model, experiment.schedule(run))
        gflop = self.cost(run).gflop_per_forward * main_passes
        if point.spec.guide is None or not guide_passes:
            return gflop
        name = point.spec.guide.checkpoint
        if (external := experiment.external_guides(run).get(name)) is not None:
            return gflop + external.gflop_per_forward * guide_passes
        guide_run = next(other for other in self.runs if name in other.checkpoints.values())
        return gflop + self.cost(guide_run).gflop_per_forward * guide_passes

    def train(self, run: TrainingRun, deadline: float | None = None) -> None:
        """Train from the newest saved state to the last snapshot that is missing; every snapshot becomes a checkpoint.

        A pretrained checkpoint is not trained; the store gets an entry for it.

        Raises:
            ConfigError: a snapshot was added that the training has passed, or the checkpoint to start from is missing.
            DeadlineReached: the deadline came; the state is saved.
        """
        self.prepare()
        for name, guide in self.experiments[run.task].external_guides(run).items():
            if not self.store.has("checkpoint", name):
                with self.store.create("checkpoint", name, {"info": guide.model_dump(mode="json")}):
                    pass
        missing = self.missing_snapshots(run)
        if not missing:
            return
        if (pretrained := self.experiments[run.task].pretrained(run)) is not None:
            with self.store.create("checkpoint", run.final, {"info": pretrained.model_dump(mode="json")}):
                return
        folder = self.store.folder("run", run.digest)
        passed = newest_state_images(folder)
        if min(missing) < passed:
            raise ConfigError(
                f"train.snapshots: no checkpoint was saved at {min(missing)} images, and {run.title} is already at {passed}; "
                f"remove this snapshot, or delete {folder} to train this size again"
            )
        spec, experiment, cost = run.spec, self.experiments[run.task], self.cost(run)

        def save_snapshot(network: nn.Module, weights: Iterable[tuple[str, Tensor]], snapshot: int) -> None:
            images_seen = spec.whole_batches(snapshot)
            name = run.checkpoints[images_seen]
            if not self.store.has("checkpoint", name):
                info = self._checkpoint_info(run, cost, images_seen).model_dump(mode="json")
                with self.store.create("checkpoint", name, {"info": info}) as partial_folder:
                    experiment.save(partial_folder, network, run, weights)

        if warning := oom_message(spec, cost, self.process.num_processes, free_disk(self.out)):
            logger.warning(warning)
        network = experiment.network(run)
        objective = experiment.objective(run, network)
        self._record_skipped()
        title = f"train {cost.size} ({run.title})"
        snapshots = tuple(snapshot for snapshot in run.checkpoints if snapshot <= max(missing))
        train(spec, objective, network, folder, save_snapshot, title=title, snapshots=snapshots, deadline=deadline)

    def estimate_training(self) -> list[ThroughputEstimate]:
        """Estimate hours, memory and disk of every size on this machine from a few measured steps; nothing is saved.

        Raises:
            ConfigError: it was started as several processes; the measurement needs a single one.
        """
        if self.process.num_processes > 1:
            raise ConfigError("--estimate measures one process: run it without torchrun or accelerate launch")
        self.study.require_training_parts()
        estimates = []
        for run in self.runs:
            if run is self.experiments[run.task].runs[0]:
                estimator = ThroughputEstimator(run.spec, self.study.text_encoder.max_tokens, free_disk(self.out))
            images = max(0, max(run.checkpoints) - newest_state_images(self.store.folder("run", run.digest)))
            estimate = estimator(run.model, images, tuple(run.checkpoints))
            suffix = "" if run.task == "text2image" else f" {run.task} {run.variant}".rstrip()
            estimates.append(replace(estimate, size=estimate.size + suffix))
            logger.info(str(estimates[-1]))
        return estimates

    def _checkpoint_info(self, run: TrainingRun, cost: ModelCost, images_seen: int) -> CheckpointInfo:
        facts: dict[str, Any] = {
            "model": run.model,
            "size": cost.size,
            "num_parameters": cost.num_parameters,
            "images_seen": images_seen,
            "gflop_per_forward": cost.gflop_per_forward,
            "normalized_cost_per_step": cost.normalized_cost_per_step,
            "prediction_type": run.spec.prediction_type,
            "rescale_betas_zero_snr": run.spec.rescale_betas_zero_snr,
            "autoencoder": self.assets.autoencoder_from_checkpoint,
            "autoencoder_subfolder": getattr(self.study.autoencoder, "subfolder", None),
            "text_encoder": self.study.text_encoder,
            "resolution": self.study.data.resolution,
            "run": run.digest,
            "training_gflop": self.experiments[run.task].training_gflop(run, images_seen),
        }
        return CheckpointInfo(**facts | self.experiments[run.task].checkpoint_metadata(run))

    # --- sweep ---

    def points(self, run: TrainingRun) -> list[SweepPoint]:
        """The points of one run: those of the grid, and the winners of the finished guidance searches."""
        return planned_points(self.experiments[run.task].jobs(run), self.races())

    def races(self) -> dict[str, dict[str, Any]]:
        """The finished guidance searches by cell; none if the results database does not exist yet."""
        database = self._existing_results_db()
        return {} if database is None else database.races()

    def recorded_points(self) -> set[str]:
        """Digests of the points in the results database; none if it does not exist yet."""
        database = self._existing_results_db()
        return set() if database is None else database.points()

    def _read_resamples(self, point: str) -> PointResamples | None:
        database = self._existing_results_db()
        return None if database is None else database.resamples(point)

    def _existing_results_db(self) -> ResultsDB | None:
        """The results database where it exists, opened without a change to the output folder."""
        if self._results_db is not None:
            return self._results_db
        if "://" in str(self.results_db_address) or Path(self.results_db_address).is_file():
            return self._unprepared_results_db
        return None

    @cached_property
    def _unprepared_results_db(self) -> ResultsDB:
        return ResultsDB(self.results_db_address)

    @cached_property
    def _sweeper(self) -> Sweeper:
        return Sweeper(self.store, self.results_db, self.leases, self.assets, self.experiments, self._write_status)

    def sweep(self, run: TrainingRun, deadline: float | None = None) -> bool:
        """Sample and score every point of one run that is not in the results database; False if the deadline came first.

        With `search: race` it searches the best guidance of each cell; `score_search_winners` scores the winners.

        Raises:
            ConfigError: a checkpoint is missing.
        """
        self.prepare()
        self.check_trained([run])
        self._record_skipped()
        return self._sweeper.sweep(run, self.cost(run).size, deadline)

    def check_tasks(self, runs: Sequence[TrainingRun]) -> None:
        """Check, before the first image is sampled, that everything needed for scoring the runs is available.

        Raises:
            ConfigError: weights, labels or images are missing.
        """
        for run in runs:
            self.experiments[run.task].check_guidance(run)
        for task in dict.fromkeys(run.task for run in runs):
            self.experiments[task].validate()

    def check_guides_of_teachers(self) -> None:
        """Check the guides that students learn from, before the study is written.

        Raises:
            ConfigError: a guide does not exist, or does not fit its teacher.
        """
        for experiment in self.experiments.values():
            if isinstance(experiment, DistillExperiment) and experiment.spec.guide is not None:
                assert experiment.runs, "every teacher has a student"

    def check_trained(self, runs: Sequence[TrainingRun]) -> None:
        """Check, before the first image is sampled, that the runs have all the checkpoints they need.

        Raises:
            ConfigError: a checkpoint is missing.
        """
        missing = [(run, snapshot) for run in runs for snapshot in self.missing_snapshots(run)]
        if not missing:
            return
        (run, snapshot), untrained = missing[0], {run.task for run, _ in missing}
        trained = [task for task in dict.fromkeys(run.task for run in runs) if task not in untrained]
        hint = f"; --task {' --task '.join(trained)} sweeps the trained part" if trained else ""
        raise ConfigError(
            f"{run.title}: no checkpoint at {snapshot} images yet; run `isocost train` first, or `isocost run`{hint}"
        )

    def missing_snapshots(self, run: TrainingRun) -> list[int]:
        """Images seen at the checkpoints of a run that are needed and absent.

        A checkpoint is needed while one of its points is not scored, while it guides a network that has such points, or while a
        training that starts from it has a missing checkpoint of its own. Without any points or such trainings, the checkpoint
        itself is the result, and is needed.
        """
        return [
            snapshot
            for snapshot, name in run.checkpoints.items()
            if not self.store.has("checkpoint", name) and self._is_needed(run, name)
        ]

    def _is_needed(self, run: TrainingRun, checkpoint: str) -> bool:
        has_points = self.experiments[run.task].has_points(run)
        if has_points and self._has_unscored_points(run, checkpoint):
            return True
        if any(self._has_unscored_points(other, other.final) for other in self._guided_by(checkpoint)):
            return True
        folder = self.store.folder("checkpoint", checkpoint)
        children = [child for child in self.runs if folder in child.sources]
        if not children:
            return not has_points
        return any(self.missing_snapshots(child) or self._has_unscored_points(child, checkpoint) for child in children)

    def _guided_by(self, checkpoint: str) -> list[TrainingRun]:
        """The runs that a checkpoint guides in the sweep."""
        guided = []
        for run in self.runs:
            guides = self.experiments[run.task].guides(run)
            if any(guide is not None and guide.checkpoint == checkpoint for guide in guides):
                guided.append(run)
        return guided

    def _has_unscored_points(self, run: TrainingRun, checkpoint: str) -> bool:
        """Whether the sweep of a run has a point of `checkpoint` that is not scored by all metrics, or an open search."""
        database, experiment = self._existing_results_db(), self.experiments[run.task]
        if checkpoint in run.checkpoints.values() and (database is None or checkpoint not in database.checkpoints()):
            return True  # known without the jobs, which read the reference images
        jobs = [job for job in experiment.jobs(run) if job.checkpoint == checkpoint]
        races = self.races()
        if unsearched_cells(jobs, races):
            return True
        scored = {} if database is None else database.metrics()
        for job in jobs:
            spec = job.protocol_spec or experiment.protocol_spec
            columns = {
                column for metric in spec.metrics for extractor in spec.features for column in metric_columns(metric, extractor)
            }
            if any(not columns <= scored.get(point.digest, set()) for point in planned_points([job], races)):
                return True
        return False

    def score_search_winners(self, runs: Sequence[TrainingRun], deadline: float | None = None) -> bool:
        """Score the winners of the runs' guidance searches, when all searches are over; False if the deadline came first."""
        return self._sweeper.score_search_winners(runs, deadline)

    def score_fresh(self, run: TrainingRun, job: EvalJob, title: str, deadline: float | None = None) -> bool:
        """Score the points of a job that are no part of the sweep; False if the deadline came first."""
        self.prepare()
        return self._sweeper.score_fresh(run, job, title, deadline)

    def remeasure(self, run: TrainingRun) -> int:
        """Measure the sampling time of all recorded points of one training again, on this machine; return their number.

        Raises:
            ConfigError: a checkpoint is missing.
        """
        self.prepare()
        self.check_trained([run])
        self.check_checkpoints([run])
        return self._sweeper.remeasure(run, self.cost(run).size)

    def check_checkpoints(self, runs: Sequence[TrainingRun]) -> None:
        """Check that the checkpoints of every recorded point of the runs exist: that of the point and that of its guide.

        A checkpoint may be absent once its points are scored.

        Raises:
            ConfigError: a checkpoint is missing.
        """
        recorded, races = self.recorded_points(), self.races()
        for run in runs:
            for job in self.experiments[run.task].jobs(run):
                specs = [point.spec for point in planned_points([job], races) if point.digest in recorded]
                needed = [spec.checkpoint for spec in specs]
                needed += [spec.guide.checkpoint for spec in specs if spec.guide is not None]
                missing = [name for name in dict.fromkeys(needed) if not self.store.has("checkpoint", name)]
                if missing:
                    raise ConfigError(
                        f"{run.title}: no checkpoint {missing[0]} in {self.out}, so its points cannot be timed; "
                        f"`isocost merge {self.out} OTHER --artefacts` copies it from an output folder that has it"
                    )

    # --- status ---

    def _write_status(self, stage: str, is_last: bool = False) -> None:
        """Write the status file, if that is due."""
        if is_last or self._status_file.is_due():
            self._status_file.write(self.status(stage))

    @cached_property
    def _status_file(self) -> StatusFile:
        return StatusFile(self.out)

    def status(self, stage: str) -> Status:
        """The progress of the study.

        Args:
            stage: a title of the current work.
        """
        table, races = self.results_db.table(), self.races()
        columns = [str(name) for name in table.columns]
        rows = (dict(zip(columns, values, strict=True)) for values in table.itertuples(index=False, name=None))
        rows_by_point = {row["point"]: row for row in rows}
        evaluated = {row["checkpoint"] for row in rows_by_point.values()}
        sizes, all_points = [], []
        for run in self.runs:
            cost, experiment = self.cost(run), self.experiments[run.task]
            jobs = experiment.jobs(run)
            points = [
                PlannedPoint(point.digest, self.denoiser_gflop(run, point) * point.spec.num_images)
                for point in planned_points(jobs, races)
            ]
            all_points += points
            reached = [
                snapshot
                for snapshot, name in run.checkpoints.items()
                if name in evaluated or self.store.has("checkpoint", name)
            ]
            images_seen = max([newest_state_images(self.store.folder("run", run.digest)), *reached])
            sizes.append(
                size_status(
                    run.title,
                    cost.size,
                    images_seen,
                    max(run.checkpoints),
                    points,
                    len(unsearched_cells(jobs, races)),
                    rows_by_point,
                    experiment.metric,
                )
            )
        num_workers = self.leases.num_workers()
        spent_s = sum(size.spent_s for size in sizes)
        left_s = seconds_left(all_points, rows_by_point, num_workers)
        return Status(self.study.name, stage, now(), num_workers, spent_s, left_s, sizes)

    # --- the complete study ---

    def run(self, deadline: float | None = None, tasks: Collection[TaskName] | None = None) -> bool:
        """Train and sweep every run, or only those of `tasks`; False if the deadline came first.

        Finished work is saved; a second call continues it.
        """
        self.check_guides_of_teachers()
        self.prepare()
        try:
            with self.leases.exclusively("assets"):  # one process makes them, the others read them
                runs = self.runs_of(tasks)
                self.check_tasks(runs)
            finished = self._run(runs, deadline)
        except DeadlineReached as stopped:
            logger.info(str(stopped))
            finished = False
        finally:
            self.close()
        self.write_last_status(finished)
        return finished

    def write_last_status(self, finished: bool) -> None:
        """Write that the work is done, or that it has stopped."""
        self._write_status("done" if finished else "stopped", is_last=True)

    def close(self) -> None:
        """Release the leases of this run."""
        self.leases.close()

    def _run(self, runs: list[TrainingRun], deadline: float | None) -> bool:
        """Train and sweep the runs that no other worker has leased, until all are done; False if the deadline came first."""
        unfinished = list(runs)
        while unfinished:
            for run in list(unfinished):
                training = f"train {run.digest}"
                if self._lacks_sources(run, unfinished) or not self.leases.acquire(training):
                    continue
                self._write_status(f"train {run.title}", is_last=True)
                self.train(run, deadline)
                self.leases.release(training)
                if self._lacks_guides(run, unfinished):
                    continue
                if not self.sweep(run, deadline):
                    return False
                unfinished.remove(run)
                break
            else:
                if deadline_passed(deadline):
                    return False
                self.leases.wait(*(f"train {run.digest}" for run in unfinished))
        return self.score_search_winners(runs, deadline)

    def _lacks_sources(self, run: TrainingRun, unfinished: list[TrainingRun]) -> bool:
        """Whether another unfinished run has yet to train a checkpoint that this one starts from."""
        return is_made_by_others({folder.name for folder in run.sources if not folder.is_dir()}, run, unfinished)

    def _lacks_guides(self, run: TrainingRun, unfinished: list[TrainingRun]) -> bool:
        """Whether another unfinished run has yet to train a guide of this one. Such a run is trained, not swept."""
        guides = {guide.checkpoint for guide in self.experiments[run.task].guides(run) if guide is not None}
        return is_made_by_others({name for name in guides if not self.store.has("checkpoint", name)}, run, unfinished)


def is_made_by_others(checkpoints: Collection[str], run: TrainingRun, unfinished: Sequence[TrainingRun]) -> bool:
    """Whether another unfinished run makes one of the checkpoints."""
    return any(not set(checkpoints).isdisjoint(other.checkpoints.values()) for other in unfinished if other is not run)
