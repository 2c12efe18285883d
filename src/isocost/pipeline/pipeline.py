"""A study from images to scored points: stages are functions of specs, artefacts named by digests, what exists skipped."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from isocost.config.base import parse_spec
from isocost.config.study import StudySpec
from isocost.config.study_yaml import dump_study
from isocost.config.types import TaskName
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.solvers import SOLVERS, solver_coefficients
from isocost.errors import ConfigError
from isocost.experiments.base import Experiment, TrainingRun
from isocost.experiments.distillation import DistillExperiment
from isocost.experiments.dreambooth import DreamboothExperiment
from isocost.experiments.pretrain import PretrainExperiment
from isocost.experiments.pretrained import PretrainedExperiment
from isocost.experiments.seed_replicates import SeedReplicatesExperiment
from isocost.experiments.study_assets import StudyAssets
from isocost.experiments.superres import SuperresExperiment
from isocost.metrics.registry import metric_of
from isocost.models.checkpoint import CheckpointInfo
from isocost.models.factory import check_widths
from isocost.models.flops import ModelCost, model_cost
from isocost.pipeline.status import PlannedPoint, Status, StatusFile, now, seconds_left, size_status
from isocost.pipeline.sweep_runner import Sweeper, planned_points, unsearched_cells
from isocost.sweep.grid import SweepPoint
from isocost.sweep.leases import POLL_S, Leases
from isocost.sweep.results_db import ResultsDB
from isocost.training.distributed import process_info
from isocost.training.state_checkpoint import newest_state
from isocost.training.throughput_estimate import Forecast, ThroughputEstimator, oom_message
from isocost.training.trainer import DeadlineReached, train
from isocost.utils.artifact_store import Store, free_disk, write_atomically
from isocost.utils.progress import say
from isocost.utils.signals import deadline_passed

STUDY_FILE = "study.yaml"
RESULTS_DB_FILE = "results.sqlite"


class Pipeline:
    """One study in one output folder.

    `train` makes the materials that it needs; `sweep` takes the checkpoints that `train` left. `deadline` is a
    `time.monotonic()` after which a stage keeps what it has and stops.
    """

    def __init__(self, study: StudySpec, out: str | Path, results_db: str | None = None) -> None:
        """
        Args:
            study: what is to be done.
            out: the output folder.
            results database: address of a database in place of the folder's own file; several runs on one share the work.

        Raises:
            ConfigError: a width does not fit the family, or the folder holds artefacts of a study that conflicts.
        """
        if study.family is not None:
            check_widths(study.family)
        asked = [(study.sweep, study.report.metric)]
        asked += [(tuned.sweep, tuned.metric or study.report.metric) for tuned in study.tuned().values()]
        for sweep, metric in asked:
            for solver in sweep.solvers:
                SOLVERS.check(solver.name, f"{study.name}: sweep.solvers")
                for num_steps in () if study.checkpoints else (*sweep.num_steps, sweep.snapshot_num_steps):
                    solver_coefficients(solver, num_steps, NoiseSchedule.scaled_linear())
            metric_of(metric)
        self.study, self.out = study, Path(out)
        self.where = results_db or self.out / RESULTS_DB_FILE
        self.store = Store(self.out)
        check_compatible(study, self.store)
        self.part = process_info()
        self.assets = StudyAssets(study, self.store, self.part)

    def prepare(self) -> None:
        """Check that the sources are there and write the resolved study; every stage does it first, in one process."""
        if self.part.rank == 0:
            self.results_db  # noqa: B018
        self.part.wait()

    @cached_property
    def results_db(self) -> ResultsDB:
        """Opened by `prepare`; by the first process of several before the others."""
        if self.part.rank == 0:
            for part in ("reference",) if self.study.checkpoints else ("train", "reference"):
                self.assets.source_key(part)
            self.out.mkdir(parents=True, exist_ok=True)
            write_atomically(self.out / STUDY_FILE, dump_study(self.study))
            self.store.remove_partial()
        return ResultsDB(self.where)

    @cached_property
    def claims(self) -> Leases:
        """What this run has in its hands."""
        return Leases(self.results_db.engine)

    def _record_skipped(self) -> None:
        if self.part.rank:
            return
        for part, events in self.assets.skipped().items():
            self.results_db.set_events(f"data.{part}", events)

    # --- training ---

    @cached_property
    def experiments(self) -> dict[TaskName, Experiment]:
        """What the study asks for: text-to-image, then what is tuned from it; or the checkpoints that it is given."""
        if self.study.checkpoints:
            return {"text2image": PretrainedExperiment(self.study, self.assets)}
        family = PretrainExperiment(self.study, self.assets)
        experiments: dict[TaskName, Experiment] = {"text2image": family}
        if self.study.seed_replicates is not None:
            experiments["seed-replicates"] = SeedReplicatesExperiment(self.study.seed_replicates, family)
        if self.study.distill is not None:
            experiments["distill"] = DistillExperiment("distill", self.study.distill, self.assets, family)
        if self.study.superres is not None:
            tuned = SuperresExperiment(self.study.superres, self.assets, family)
            experiments["superres"] = tuned
            if (few_steps := self.study.superres.distill) is not None:
                experiments["superres-distill"] = DistillExperiment("superres-distill", few_steps, self.assets, tuned)
        if self.study.dreambooth is not None:
            experiments["dreambooth"] = DreamboothExperiment(self.study.dreambooth, self.assets, family)
        return experiments

    @property
    def runs(self) -> list[TrainingRun]:
        """All trainings of the study, experiment by experiment, smallest first."""
        return self.runs_of(None)

    def runs_of(self, tasks: Collection[TaskName] | None) -> list[TrainingRun]:
        """Those of some tasks, or all.

        Raises:
            ConfigError: the study has no part for a task.
        """
        for task in tasks or ():
            if task not in self.experiments:
                raise ConfigError(f"{self.study.name}: no part `{task}`; the study says what to tune and how")
        return [
            run for name, experiment in self.experiments.items() if tasks is None or name in tasks for run in experiment.runs
        ]

    def cost(self, run: TrainingRun) -> ModelCost:
        """Size and cost of a run's network at the study's latent shape and number of tokens, or its own where it is given."""
        given = self.experiments[run.task].pretrained(run)
        if given is not None:
            facts = (given.num_parameters, given.gflop_per_forward, given.normalized_cost_per_step)
            return ModelCost(given.size, given.model.width, *facts)
        return model_cost(run.model, self.study.text_encoder.max_tokens)

    def train(self, run: TrainingRun, deadline: float | None = None) -> None:
        """Train until the run's last mark, from where it stands; every snapshot becomes a checkpoint. One that is given is entered.

        Raises:
            ConfigError: a mark was added that the training has passed, or there is no checkpoint to start from.
            DeadlineReached: the deadline came; the state is kept.
        """
        self.prepare()
        missing = self.missing_snapshots(run)
        if not missing:
            return
        if (given := self.experiments[run.task].pretrained(run)) is not None:
            with self.store.create("checkpoint", run.final, {"info": given.model_dump(mode="json")}):
                return
        folder = self.store.folder("run", run.digest)
        passed = newest_state(folder)
        if min(missing) < passed:
            raise ConfigError(
                f"train.snapshots: {min(missing)} images were passed without keeping a checkpoint ({run.title} stands "
                f"at {passed}); take that mark out, or remove {folder} to train this size anew"
            )
        spec, experiment, cost = run.spec, self.experiments[run.task], self.cost(run)

        def publish(network: nn.Module, weights: Iterable[tuple[str, Tensor]], snapshot: int) -> None:
            seen = spec.whole_batches(snapshot)
            name = run.checkpoints[seen]
            if not self.store.has("checkpoint", name):
                info = self._checkpoint_info(run, cost, seen).model_dump(mode="json")
                with self.store.create("checkpoint", name, {"info": info}) as partial:
                    experiment.save(partial, network, run, weights)

        if warning := oom_message(spec, cost, self.part.num_parts, free_disk(self.out)):
            say(warning)
        network = experiment.network(run)
        task = experiment.task(run, network)
        self._record_skipped()
        title = f"train {cost.size} ({run.title})"
        train(spec, task, network, folder, publish, title=title, snapshots=tuple(run.checkpoints), deadline=deadline)

    def forecast(self) -> list[Forecast]:
        """Hours, memory and disk of every size on this machine, from a few steps of each; nothing is kept.

        Raises:
            ConfigError: several processes ask; one can tell.
        """
        if self.part.num_parts > 1:
            raise ConfigError("--forecast measures one process: run it without torchrun or accelerate launch")
        self.study.own  # noqa: B018  given checkpoints are not trained
        found = []
        for run in self.runs:
            if run is self.experiments[run.task].runs[0]:
                forecaster = ThroughputEstimator(run.spec, self.study.text_encoder.max_tokens, free_disk(self.out))
            images = max(0, max(run.checkpoints) - newest_state(self.store.folder("run", run.digest)))
            of_size = forecaster(run.model, images, tuple(run.checkpoints))
            tuned = "" if run.task == "text2image" else f" {run.task} {run.variant}".rstrip()
            found.append(replace(of_size, size=of_size.size + tuned))
            say(str(found[-1]))
        return found

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
        return CheckpointInfo(**facts | self.experiments[run.task].facts(run))

    # --- sweep ---

    def points(self, run: TrainingRun) -> list[SweepPoint]:
        """All points of one run that are known: where guidance is raced for, those that were found."""
        return planned_points(self.experiments[run.task].jobs(run), self.races())

    def races(self) -> dict[str, dict[str, Any]]:
        """What the results database knows of races; nothing where there is no results database yet."""
        return self.results_db.races() if self._has_results_db else {}

    def recorded_points(self) -> set[str]:
        """Digests of the points that the results database has; none where there is no results database yet."""
        return self.results_db.points() if self._has_results_db else set()

    @property
    def _has_results_db(self) -> bool:
        return "://" in str(self.where) or Path(self.where).is_file()

    @cached_property
    def _sweeper(self) -> Sweeper:
        return Sweeper(self.store, self.results_db, self.claims, self.assets, self.experiments, self._write_status)

    def sweep(self, run: TrainingRun, deadline: float | None = None) -> bool:
        """Make and score every point of one run that the results database lacks; False where the deadline came first.

        Where guidance is raced for, this finds it; `settle` scores what was found.

        Raises:
            ConfigError: the run lacks a checkpoint.
        """
        self.prepare()
        self.check_trained([run])
        self._record_skipped()
        return self._sweeper.sweep(run, self.cost(run).size, deadline)

    def check_tasks(self, runs: Sequence[TrainingRun]) -> None:
        """Whether what the runs are scored by can be had, before the first image is made.

        Raises:
            ConfigError: weights, labels or images are missing.
        """
        for task in dict.fromkeys(run.task for run in runs):
            self.experiments[task].check()

    def check_trained(self, runs: Sequence[TrainingRun]) -> None:
        """Whether all that is to be swept is there, before the first image is made.

        Raises:
            ConfigError: a run lacks a checkpoint.
        """
        lacking = [(run, snapshot) for run in runs for snapshot in self.missing_snapshots(run)]
        if not lacking:
            return
        (run, snapshot), untrained = lacking[0], {run.task for run, _ in lacking}
        trained = [task for task in dict.fromkeys(run.task for run in runs) if task not in untrained]
        alone = f"; what is trained is swept with --task {' --task '.join(trained)}" if trained else ""
        raise ConfigError(
            f"{run.title}: no checkpoint at {snapshot} images yet; run `isocost train` first, or `isocost run`{alone}"
        )

    def missing_snapshots(self, run: TrainingRun) -> list[int]:
        """Images after which a checkpoint is wanted and not there.

        Others start from the last one; an earlier one is there for its points, and is not missed when the results database has those.
        """
        missing = [snapshot for snapshot, name in run.checkpoints.items() if not self.store.has("checkpoint", name)]
        if not missing or not self.store.has("checkpoint", run.final):
            return missing
        recorded = self.recorded_points()
        unscored = {
            job.checkpoint
            for job in self.experiments[run.task].jobs(run)
            if any(point.digest not in recorded for point in job.points)
        }
        return [snapshot for snapshot in missing if run.checkpoints[snapshot] in unscored]

    def score_search_winners(self, runs: Sequence[TrainingRun], deadline: float | None = None) -> bool:
        """Score what the races of runs found, when all are over; False where the deadline came first."""
        return self._sweeper.score_search_winners(runs, deadline)

    def remeasure(self, run: TrainingRun) -> int:
        """Time every recorded point of one run again, with what this machine has now; returns how many there are.

        Raises:
            ConfigError: the run lacks a checkpoint.
        """
        self.prepare()
        self.check_trained([run])
        return self._sweeper.remeasure(run, self.cost(run).size)

    # --- status ---

    def _write_status(self, stage: str, is_last: bool = False) -> None:
        """Write how the study stands, where that is due."""
        if is_last or self._status_file.is_due():
            self._status_file.write(self.status(stage))

    @cached_property
    def _status_file(self) -> StatusFile:
        return StatusFile(self.out)

    def status(self, stage: str) -> Status:
        """How the study stands; `stage` says what is at work."""
        table, races = self.results_db.table(), self.races()
        columns = [str(name) for name in table.columns]
        rows = (dict(zip(columns, values, strict=True)) for values in table.itertuples(index=False, name=None))
        scored = {row["point"]: row for row in rows}
        sizes, asked = [], []
        for run in self.runs:
            cost, experiment = self.cost(run), self.experiments[run.task]
            jobs = experiment.jobs(run)
            points = [
                PlannedPoint(point.digest, cost.gflop_per_forward * point.nfe(run.model) * point.spec.num_images)
                for point in planned_points(jobs, races)
            ]
            asked += points
            trained = [snapshot for snapshot, name in run.checkpoints.items() if self.store.has("checkpoint", name)]
            seen = max([newest_state(self.store.folder("run", run.digest)), *trained])
            open_races, wanted = len(unsearched_cells(jobs, races)), max(run.checkpoints)
            sizes.append(size_status(run.title, cost.size, seen, wanted, points, open_races, scored, experiment.metric))
        num_workers = self.claims.num_workers()
        spent = sum(size.spent_s for size in sizes)
        return Status(self.study.name, stage, now(), num_workers, spent, seconds_left(asked, scored, num_workers), sizes)

    # --- the whole ---

    def run(self, deadline: float | None = None, tasks: Collection[TaskName] | None = None) -> bool:
        """Train and sweep every run, of `tasks` alone where given; False where the deadline came first.

        What is done stays, and the same call goes on.
        """
        self.prepare()
        try:
            with self.claims.exclusively("materials"):  # one makes them, the others find them there
                runs = self.runs_of(tasks)
                self.check_tasks(runs)
            finished = self._run(runs, deadline)
        except DeadlineReached as stopped:
            say(str(stopped))
            finished = False
        finally:
            self.close()
        self._write_status("done" if finished else "stopped", is_last=True)
        return finished

    def close(self) -> None:
        """Give back what this run has in its hands."""
        self.claims.close()

    def _run(self, runs: list[TrainingRun], deadline: float | None) -> bool:
        """Every run that is in nobody else's hands, until all are trained and swept."""
        open_ = list(runs)
        while open_:
            for run in list(open_):
                training = f"train {run.digest}"
                if self._must_wait(run, open_) or not self.claims.take(training):
                    continue
                self._write_status(f"train {run.title}", is_last=True)
                self.train(run, deadline)
                self.claims.release(training)
                if not self.sweep(run, deadline):
                    return False
                open_.remove(run)
                break
            else:
                if deadline_passed(deadline):
                    return False
                time.sleep(POLL_S)
        return self.score_search_winners(runs, deadline)

    def _must_wait(self, run: TrainingRun, open_: list[TrainingRun]) -> bool:
        """Whether another run of `open_` has yet to train what this one starts from."""
        if run.parent is None or run.parent.is_dir():
            return False
        return any(run.parent.name == other.final for other in open_ if other is not run)


def check_compatible(study: StudySpec, store: Store) -> None:
    """Whether this study may go on in its output folder. A further size, step count, guidance, solver, mark or image may.

    Raises:
        ConfigError: the folder holds artefacts of a study that this one cannot continue.
    """
    file = store.out / STUDY_FILE
    if not file.is_file() or store.is_empty():
        return
    before = parse_spec(StudySpec, yaml.safe_load(file.read_text(encoding="utf-8")), str(file))
    was, now = before.immutable_fields(), study.immutable_fields()
    both = was.keys() & now.keys()  # what is tuned from the family may come later
    difference = _first_difference({key: was[key] for key in was if key in both}, {key: now[key] for key in now if key in both})
    if difference is not None:
        key, old, new = difference
        raise ConfigError(
            f"{store.out}: its artefacts were made with {key} = {old}, now it says {new}; give another --out, or set it back"
        )


def _first_difference(before: Any, now: Any, key: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in [*before, *(name for name in now if name not in before)]:
            found = _first_difference(before.get(name), now.get(name), f"{key}.{name}" if key else name)
            if found is not None:
                return found
        return None
    return None if before == now else (key, before, now)
