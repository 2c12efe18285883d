"""A study from pictures to scored points: stages are functions of specs, artefacts named by digests, what exists skipped."""

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
from isocost.diffusion.noise_schedule import Schedule
from isocost.diffusion.solvers import build_table
from isocost.errors import RequestError
from isocost.experiments.base import Experiment, Run
from isocost.experiments.distillation import DistillExperiment
from isocost.experiments.dreambooth import DreamboothExperiment
from isocost.experiments.pretrain import TextToImageExperiment
from isocost.experiments.pretrained import GivenExperiment
from isocost.experiments.seed_replicates import RepeatsExperiment
from isocost.experiments.study_assets import Materials
from isocost.experiments.superres import SuperresExperiment
from isocost.metrics.registry import metric_of
from isocost.models.checkpoint import CheckpointInfo
from isocost.models.factory import check_widths
from isocost.models.flops import ModelCost, model_cost
from isocost.pipeline.status import PlannedPoint, Status, StatusFile, now, seconds_left, size_status
from isocost.pipeline.sweep_runner import Sweeper, known_points, open_cells
from isocost.sweep.grid import Point
from isocost.sweep.leases import POLL_S, Claims
from isocost.sweep.results_db import Ledger
from isocost.training.distributed import this_part
from isocost.training.state_checkpoint import newest_state
from isocost.training.throughput_estimate import Forecast, Forecaster, too_large
from isocost.training.trainer import OutOfTime, train
from isocost.utils.artifact_store import Store, free_disk, write_atomically
from isocost.utils.progress import say
from isocost.utils.signals import is_over

STUDY_FILE = "study.yaml"
LEDGER_FILE = "ledger.sqlite"


class Pipeline:
    """One study in one output folder.

    `train` makes the materials that it needs; `sweep` takes the checkpoints that `train` left. `deadline` is a
    `time.monotonic()` after which a stage keeps what it has and stops.
    """

    def __init__(self, study: StudySpec, out: str | Path, ledger: str | None = None) -> None:
        """
        Args:
            study: what is to be done.
            out: the output folder.
            ledger: address of a database in place of the folder's own file; several runs on one share the work.

        Raises:
            RequestError: a width does not fit the family, or the folder holds artefacts of a study that conflicts.
        """
        if study.family is not None:
            check_widths(study.family)
        asked = [(study.sweep, study.report.metric)]
        asked += [(tuned.sweep, tuned.metric or study.report.metric) for tuned in study.tuned().values()]
        for sweep, metric in asked:
            for sampler in sweep.samplers:
                for num_steps in () if study.checkpoints else (*sweep.num_steps, sweep.marks_num_steps):
                    build_table(sampler, num_steps, Schedule.scaled_linear())
            metric_of(metric)
        self.study, self.out = study, Path(out)
        self.where = ledger or self.out / LEDGER_FILE
        self.store = Store(self.out)
        refuse_conflict(study, self.store)
        self.part = this_part()
        self.materials = Materials(study, self.store, self.part)

    def prepare(self) -> None:
        """Check that the sources are there and write the resolved study; every stage does it first, in one process."""
        if self.part.rank == 0:
            self.ledger  # noqa: B018
        self.part.wait()

    @cached_property
    def ledger(self) -> Ledger:
        """Opened by `prepare`; by the first process of several before the others."""
        if self.part.rank == 0:
            for part in ("reference",) if self.study.checkpoints else ("train", "reference"):
                self.materials.source_key(part)
            self.out.mkdir(parents=True, exist_ok=True)
            write_atomically(self.out / STUDY_FILE, dump_study(self.study))
            self.store.remove_partial()
        return Ledger(self.where)

    @cached_property
    def claims(self) -> Claims:
        """What this run has in its hands."""
        return Claims(self.ledger.engine)

    def _record_skipped(self) -> None:
        if self.part.rank:
            return
        for part, events in self.materials.skipped().items():
            self.ledger.set_events(f"data.{part}", events)

    # --- training ---

    @cached_property
    def experiments(self) -> dict[TaskName, Experiment]:
        """What the study asks for: text-to-image, then what is tuned from it; or the checkpoints that it is given."""
        if self.study.checkpoints:
            return {"text2image": GivenExperiment(self.study, self.materials)}
        family = TextToImageExperiment(self.study, self.materials)
        experiments: dict[TaskName, Experiment] = {"text2image": family}
        if self.study.repeats is not None:
            experiments["repeats"] = RepeatsExperiment(self.study.repeats, family)
        if self.study.distill is not None:
            experiments["distill"] = DistillExperiment("distill", self.study.distill, self.materials, family)
        if self.study.superres is not None:
            tuned = SuperresExperiment(self.study.superres, self.materials, family)
            experiments["superres"] = tuned
            if (few_steps := self.study.superres.distill) is not None:
                experiments["superres-distill"] = DistillExperiment("superres-distill", few_steps, self.materials, tuned)
        if self.study.dreambooth is not None:
            experiments["dreambooth"] = DreamboothExperiment(self.study.dreambooth, self.materials, family)
        return experiments

    @property
    def runs(self) -> list[Run]:
        """All trainings of the study, experiment by experiment, smallest first."""
        return self.runs_of(None)

    def runs_of(self, tasks: Collection[TaskName] | None) -> list[Run]:
        """Those of some tasks, or all.

        Raises:
            RequestError: the study has no part for a task.
        """
        for task in tasks or ():
            if task not in self.experiments:
                raise RequestError(f"{self.study.name}: no part `{task}`; the study says what to tune and how")
        return [
            run for name, experiment in self.experiments.items() if tasks is None or name in tasks for run in experiment.runs
        ]

    def cost(self, run: Run) -> ModelCost:
        """Size and cost of a run's network at the study's latent shape and number of tokens, or its own where it is given."""
        given = self.experiments[run.task].given(run)
        if given is not None:
            facts = (given.num_parameters, given.gflop_per_forward, given.normalised_cost)
            return ModelCost(given.size, given.model.width, *facts)
        return model_cost(run.model, self.study.text.max_tokens)

    def train(self, run: Run, deadline: float | None = None) -> None:
        """Train until the run's last mark, from where it stands; every mark becomes a checkpoint. One that is given is entered.

        Raises:
            RequestError: a mark was added that the training has passed, or there is no checkpoint to start from.
            OutOfTime: the deadline came; the state is kept.
        """
        self.prepare()
        missing = self.missing_marks(run)
        if not missing:
            return
        if (given := self.experiments[run.task].given(run)) is not None:
            with self.store.create("checkpoint", run.final, {"info": given.model_dump(mode="json")}):
                return
        folder = self.store.folder("run", run.digest)
        passed = newest_state(folder)
        if min(missing) < passed:
            raise RequestError(
                f"train.marks: {min(missing)} images were passed without keeping a checkpoint ({run.title} stands "
                f"at {passed}); take that mark out, or remove {folder} to train this size anew"
            )
        spec, experiment, cost = run.spec, self.experiments[run.task], self.cost(run)

        def publish(network: nn.Module, weights: Iterable[tuple[str, Tensor]], mark: int) -> None:
            seen = spec.whole_batches(mark)
            name = run.checkpoints[seen]
            if not self.store.has("checkpoint", name):
                info = self._checkpoint_info(run, cost, seen).model_dump(mode="json")
                with self.store.create("checkpoint", name, {"info": info}) as partial:
                    experiment.save(partial, network, run, weights)

        if warning := too_large(spec, cost, self.part.num_parts, free_disk(self.out)):
            say(warning)
        network = experiment.network(run)
        task = experiment.task(run, network)
        self._record_skipped()
        title = f"train {cost.size} ({run.title})"
        train(spec, task, network, folder, publish, title=title, marks=tuple(run.checkpoints), deadline=deadline)

    def forecast(self) -> list[Forecast]:
        """Hours, memory and disk of every size on this machine, from a few steps of each; nothing is kept.

        Raises:
            RequestError: several processes ask; one can tell.
        """
        if self.part.num_parts > 1:
            raise RequestError("--forecast measures one process: run it without torchrun or accelerate launch")
        self.study.own  # noqa: B018  given checkpoints are not trained
        found = []
        for run in self.runs:
            if run is self.experiments[run.task].runs[0]:
                forecaster = Forecaster(run.spec, self.study.text.max_tokens, free_disk(self.out))
            images = max(0, max(run.checkpoints) - newest_state(self.store.folder("run", run.digest)))
            of_size = forecaster(run.model, images, tuple(run.checkpoints))
            tuned = "" if run.task == "text2image" else f" {run.task} {run.variant}".rstrip()
            found.append(replace(of_size, size=of_size.size + tuned))
            say(str(found[-1]))
        return found

    def _checkpoint_info(self, run: Run, cost: ModelCost, images_seen: int) -> CheckpointInfo:
        facts: dict[str, Any] = {
            "model": run.model,
            "size": cost.size,
            "num_parameters": cost.num_parameters,
            "images_seen": images_seen,
            "gflop_per_forward": cost.gflop_per_forward,
            "normalised_cost": cost.normalised_cost,
            "prediction": run.spec.prediction,
            "zero_terminal_snr": run.spec.zero_terminal_snr,
            "codec": self.materials.codec_from_checkpoint,
            "codec_subfolder": getattr(self.study.codec, "subfolder", None),
            "text": self.study.text,
            "resolution": self.study.data.resolution,
            "run": run.digest,
            "training_gflop": self.experiments[run.task].training_gflop(run, images_seen),
        }
        return CheckpointInfo(**facts | self.experiments[run.task].facts(run))

    # --- sweep ---

    def points(self, run: Run) -> list[Point]:
        """All points of one run that are known: where guidance is raced for, those that were found."""
        return known_points(self.experiments[run.task].jobs(run), self.races())

    def races(self) -> dict[str, dict[str, Any]]:
        """What the ledger knows of races; nothing where there is no ledger yet."""
        return self.ledger.races() if self._has_ledger else {}

    def recorded_points(self) -> set[str]:
        """Digests of the points that the ledger has; none where there is no ledger yet."""
        return self.ledger.points() if self._has_ledger else set()

    @property
    def _has_ledger(self) -> bool:
        return "://" in str(self.where) or Path(self.where).is_file()

    @cached_property
    def _sweeper(self) -> Sweeper:
        return Sweeper(self.store, self.ledger, self.claims, self.materials, self.experiments, self._tell)

    def sweep(self, run: Run, deadline: float | None = None) -> bool:
        """Make and score every point of one run that the ledger lacks; False where the deadline came first.

        Where guidance is raced for, this finds it; `settle` scores what was found.

        Raises:
            RequestError: the run lacks a checkpoint.
        """
        self.prepare()
        self.check_trained([run])
        self._record_skipped()
        return self._sweeper.sweep(run, self.cost(run).size, deadline)

    def check_tasks(self, runs: Sequence[Run]) -> None:
        """Whether what the runs are scored by can be had, before the first picture is made.

        Raises:
            RequestError: weights, labels or pictures are missing.
        """
        for task in dict.fromkeys(run.task for run in runs):
            self.experiments[task].check()

    def check_trained(self, runs: Sequence[Run]) -> None:
        """Whether all that is to be swept is there, before the first picture is made.

        Raises:
            RequestError: a run lacks a checkpoint.
        """
        lacking = [(run, mark) for run in runs for mark in self.missing_marks(run)]
        if not lacking:
            return
        (run, mark), untrained = lacking[0], {run.task for run, _ in lacking}
        trained = [task for task in dict.fromkeys(run.task for run in runs) if task not in untrained]
        alone = f"; what is trained is swept with --task {' --task '.join(trained)}" if trained else ""
        raise RequestError(
            f"{run.title}: no checkpoint at {mark} images yet; run `isocost train` first, or `isocost run`{alone}"
        )

    def missing_marks(self, run: Run) -> list[int]:
        """Images after which a checkpoint is wanted and not there.

        Others start from the last one; an earlier one is there for its points, and is not missed when the ledger has those.
        """
        missing = [mark for mark, name in run.checkpoints.items() if not self.store.has("checkpoint", name)]
        if not missing or not self.store.has("checkpoint", run.final):
            return missing
        recorded = self.recorded_points()
        unscored = {
            job.checkpoint
            for job in self.experiments[run.task].jobs(run)
            if any(point.digest not in recorded for point in job.points)
        }
        return [mark for mark in missing if run.checkpoints[mark] in unscored]

    def settle(self, runs: Sequence[Run], deadline: float | None = None) -> bool:
        """Score what the races of runs found, when all are over; False where the deadline came first."""
        return self._sweeper.settle(runs, deadline)

    def retime(self, run: Run) -> int:
        """Time every recorded point of one run again, with what this machine has now; returns how many there are.

        Raises:
            RequestError: the run lacks a checkpoint.
        """
        self.prepare()
        self.check_trained([run])
        return self._sweeper.retime(run, self.cost(run).size)

    # --- status ---

    def _tell(self, stage: str, is_last: bool = False) -> None:
        """Write how the study stands, where that is due."""
        if is_last or self._status_file.is_due():
            self._status_file.write(self.status(stage))

    @cached_property
    def _status_file(self) -> StatusFile:
        return StatusFile(self.out)

    def status(self, stage: str) -> Status:
        """How the study stands; `stage` says what is at work."""
        table, races = self.ledger.table(), self.races()
        columns = [str(name) for name in table.columns]
        rows = (dict(zip(columns, values, strict=True)) for values in table.itertuples(index=False, name=None))
        scored = {row["point"]: row for row in rows}
        sizes, asked = [], []
        for run in self.runs:
            cost, experiment = self.cost(run), self.experiments[run.task]
            jobs = experiment.jobs(run)
            points = [
                PlannedPoint(point.digest, cost.gflop_per_forward * point.nfe(run.model) * point.spec.num_pictures)
                for point in known_points(jobs, races)
            ]
            asked += points
            trained = [mark for mark, name in run.checkpoints.items() if self.store.has("checkpoint", name)]
            seen = max([newest_state(self.store.folder("run", run.digest)), *trained])
            open_races, wanted = len(open_cells(jobs, races)), max(run.checkpoints)
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
        except OutOfTime as stopped:
            say(str(stopped))
            finished = False
        finally:
            self.close()
        self._tell("done" if finished else "stopped", is_last=True)
        return finished

    def close(self) -> None:
        """Give back what this run has in its hands."""
        self.claims.close()

    def _run(self, runs: list[Run], deadline: float | None) -> bool:
        """Every run that is in nobody else's hands, until all are trained and swept."""
        open_ = list(runs)
        while open_:
            for run in list(open_):
                training = f"train {run.digest}"
                if self._waits(run, open_) or not self.claims.take(training):
                    continue
                self._tell(f"train {run.title}", is_last=True)
                self.train(run, deadline)
                self.claims.release(training)
                if not self.sweep(run, deadline):
                    return False
                open_.remove(run)
                break
            else:
                if is_over(deadline):
                    return False
                time.sleep(POLL_S)
        return self.settle(runs, deadline)

    def _waits(self, run: Run, open_: list[Run]) -> bool:
        """Whether another run of `open_` has yet to train what this one starts from."""
        if run.parent is None or run.parent.is_dir():
            return False
        return any(run.parent.name == other.final for other in open_ if other is not run)


def refuse_conflict(study: StudySpec, store: Store) -> None:
    """Whether this study may go on in its output folder. A further size, step count, guidance, sampler, mark or image may.

    Raises:
        RequestError: the folder holds artefacts of a study that this one cannot continue.
    """
    file = store.out / STUDY_FILE
    if not file.is_file() or store.is_empty():
        return
    before = parse_spec(StudySpec, yaml.safe_load(file.read_text(encoding="utf-8")), str(file))
    was, now = before.fixed_part(), study.fixed_part()
    both = was.keys() & now.keys()  # what is tuned from the family may come later
    difference = _first_difference({key: was[key] for key in was if key in both}, {key: now[key] for key in now if key in both})
    if difference is not None:
        key, old, new = difference
        raise RequestError(
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
