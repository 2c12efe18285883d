"""A study from pictures to scored points: stages are functions of specs, artefacts named by digests, what exists skipped."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from isocost.diffusion.noise import Schedule
from isocost.diffusion.samplers import build_table
from isocost.errors import RequestError
from isocost.materials import Materials
from isocost.metrics.names import metric_of
from isocost.models.checkpoint import CheckpointInfo, load_checkpoint, save_networks
from isocost.models.cost import ModelCost, model_cost
from isocost.models.unet import build_unet, check_width
from isocost.progress import progress_bar, say
from isocost.score.protocol import Protocol
from isocost.spec import digest, parse_spec
from isocost.store import Store, free_disk, write_atomically
from isocost.study import ModelSpec, StudySpec
from isocost.study_file import dump_study
from isocost.sweep.ledger import Ledger
from isocost.sweep.points import Point, grid_points, mark_point
from isocost.sweep.workers import Worker
from isocost.train.forecast import Forecast, Forecaster, too_large
from isocost.train.loop import OutOfTime, train
from isocost.train.parallel import this_part
from isocost.train.state import newest_state
from isocost.train.tasks import TextToImage, training_schedule

TRAIN_VERSION = 2
STUDY_FILE = "study.yaml"
LEDGER_FILE = "ledger.sqlite"


@dataclass(frozen=True)
class Run:
    """One training of the study: its network, the digest of its run, and the digest of its checkpoint by images seen."""

    model: ModelSpec
    digest: str
    checkpoints: dict[int, str]

    @property
    def final(self) -> str:
        """Digest of the last checkpoint."""
        return self.checkpoints[max(self.checkpoints)]


class Pipeline:
    """One study in one output folder.

    `train` makes the materials that it needs; `sweep` takes the checkpoints that `train` left. `deadline` is a
    `time.monotonic()` after which a stage keeps what it has and stops.
    """

    def __init__(self, study: StudySpec, out: str | Path) -> None:
        """
        Raises:
            RequestError: a width does not fit the family, or the folder holds artefacts of a study that conflicts.
        """
        for width in study.family.widths:
            check_width(width)
        for sampler in study.sweep.samplers:
            for num_steps in (*study.sweep.num_steps, study.sweep.marks_num_steps):
                build_table(sampler, num_steps, Schedule.scaled_linear())
        metric_of(study.report.metric)
        self.study, self.out = study, Path(out)
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
        """Opened by `prepare`."""
        for part in ("train", "reference"):
            self.materials.source_key(part)
        self.out.mkdir(parents=True, exist_ok=True)
        write_atomically(self.out / STUDY_FILE, dump_study(self.study))
        self.store.remove_partial()
        return Ledger(self.out / LEDGER_FILE)

    def _record_skipped(self) -> None:
        if self.part.rank:
            return
        for part, events in self.materials.skipped().items():
            self.ledger.set_events(f"data.{part}", events)

    # --- training ---

    @cached_property
    def runs(self) -> list[Run]:
        """The trainings that the study asks for, smallest first."""
        channels, side, _ = self.materials.latent_shape
        spec, family, context_width = self.study.train, self.study.family, self.materials.text.context_width
        runs = []
        for width in sorted(family.widths):
            model = ModelSpec(
                width=width,
                latent_channels=channels,
                latent_side=side,
                context_width=context_width,
                layers_per_block=family.layers_per_block,
                num_levels=family.num_levels,
            )
            stage = {"stage": "train", "version": TRAIN_VERSION, "cache": self.materials.cache_digest, "recipe": spec.recipe()}
            name = digest(stage, model)
            gflop = model_cost(model, self.study.text.max_tokens).gflop_per_forward
            marks = sorted({spec.whole_batches(mark) for mark in spec.all_marks(gflop)})
            runs.append(Run(model, name, {mark: self._checkpoint_digest(name, mark) for mark in marks}))
        return runs

    def _checkpoint_digest(self, run: str, images_seen: int) -> str:
        average = self.study.train.publish_ema
        published = {} if average is None else {"ema": average}
        return digest({"stage": "checkpoint", "run": run, "images": images_seen, **published})

    def cost(self, run: Run) -> ModelCost:
        """Size and cost of a run's network at the study's latent shape and number of tokens."""
        return model_cost(run.model, self.study.text.max_tokens)

    def train(self, run: Run, deadline: float | None = None) -> None:
        """Train one size until its last mark, from where it stands; every mark becomes a checkpoint.

        Raises:
            RequestError: a mark was added that the training has passed.
            OutOfTime: the deadline came; the state is kept.
        """
        self.prepare()
        missing = [mark for mark, name in run.checkpoints.items() if not self.store.has("checkpoint", name)]
        if not missing:
            return
        folder = self.store.folder("run", run.digest)
        passed = newest_state(folder)
        if min(missing) < passed:
            raise RequestError(
                f"train.marks: {min(missing)} images were passed without keeping a checkpoint (width {run.model.width} stands "
                f"at {passed}); take that mark out, or remove {folder} to train this size anew"
            )
        spec, materials, cost = self.study.train, self.materials, self.cost(run)

        def publish(network: nn.Module, weights: Iterable[tuple[str, Tensor]], mark: int) -> None:
            seen = spec.whole_batches(mark)
            name = run.checkpoints[seen]
            if not self.store.has("checkpoint", name):
                info = self._checkpoint_info(run, cost, seen).model_dump(mode="json")
                with self.store.create("checkpoint", name, {"info": info}) as partial:
                    save_networks(partial, network, spec.prediction, spec.zero_terminal_snr, weights)

        if warning := too_large(spec, cost, self.part.num_parts, free_disk(self.out)):
            say(warning)
        cache = materials.cache
        self._record_skipped()
        task = TextToImage(spec, cache, training_schedule(spec), None if cache.has_states else materials.text)
        torch.manual_seed(spec.seed)
        network = build_unet(run.model, "cpu" if spec.sharding == "none" or self.part.rank == 0 else "meta")
        title = f"train {cost.size} (width {run.model.width})"
        train(spec, task, network, folder, publish, title=title, marks=tuple(run.checkpoints), deadline=deadline)

    def forecast(self) -> list[Forecast]:
        """Hours, memory and disk of every size on this machine, from a few steps of each; nothing is kept.

        Raises:
            RequestError: several processes ask; one can tell.
        """
        if self.part.num_parts > 1:
            raise RequestError("--forecast measures one process: run it without torchrun or accelerate launch")
        forecaster = Forecaster(self.study.train, self.study.text.max_tokens, free_disk(self.out))
        found = []
        for run in self.runs:
            images = max(0, max(run.checkpoints) - newest_state(self.store.folder("run", run.digest)))
            found.append(forecaster(run.model, images, tuple(run.checkpoints)))
            say(str(found[-1]))
        return found

    def _checkpoint_info(self, run: Run, cost: ModelCost, images_seen: int) -> CheckpointInfo:
        return CheckpointInfo(
            model=run.model,
            size=cost.size,
            num_parameters=cost.num_parameters,
            images_seen=images_seen,
            gflop_per_forward=cost.gflop_per_forward,
            normalised_cost=cost.normalised_cost,
            prediction=self.study.train.prediction,
            zero_terminal_snr=self.study.train.zero_terminal_snr,
            codec=self.materials.codec_from_checkpoint,
            codec_subfolder=getattr(self.study.codec, "subfolder", None),
            text=self.study.text,
            resolution=self.study.data.resolution,
            run=run.digest,
        )

    # --- sweep ---

    def points(self, run: Run, protocol: Protocol) -> dict[str, list[Point]]:
        """The points of one size by checkpoint: the grid at the last one, one point at every mark where there are several."""
        sweep, spec = self.study.sweep, self.study.protocol
        points: dict[str, list[Point]] = {}
        for name in run.checkpoints.values():
            grid = grid_points(name, sweep, spec, protocol) if name == run.final else []
            marked = [mark_point(name, sweep, spec, protocol)] if len(run.checkpoints) > 1 else []
            points[name] = list({point.digest: point for point in [*grid, *marked]}.values())
        return points

    def sweep(self, run: Run, deadline: float | None = None) -> bool:
        """Make and score every point of one size that the ledger lacks; False where the deadline came first.

        Raises:
            RequestError: the size lacks a checkpoint.
        """
        self.prepare()
        for mark, name in run.checkpoints.items():
            if not self.store.has("checkpoint", name):
                raise RequestError(
                    f"width {run.model.width}: no checkpoint at {mark} images yet; run `isocost train` first, or `isocost run`"
                )
        materials = self.materials
        by_checkpoint = self.points(run, materials.protocol)
        self._record_skipped()
        worker = Worker(
            self.store,
            self.ledger,
            materials.reference,
            materials.caption_states,
            materials.kept,
            self.study.protocol.distances,
        )
        numbers = {point.digest: n for n, point in enumerate((p for ps in by_checkpoint.values() for p in ps), start=1)}
        with progress_bar(f"sweep {self.cost(run).size} (width {run.model.width})", len(numbers), "points") as progress:
            for name, points in by_checkpoint.items():
                checkpoint = load_checkpoint(self.store.folder("checkpoint", name))
                finished = worker.run(
                    checkpoint, materials.codec, points, lambda point: progress(numbers[point.digest], point.title), deadline
                )
                if not finished:
                    return False
        return True

    # --- the whole ---

    def run(self, deadline: float | None = None) -> bool:
        """Train and sweep every size; False where the deadline came first. What is done stays, and the same call goes on."""
        self.prepare()
        runs = self.runs
        self.materials.reference  # noqa: B018  a protocol that cannot be met shows before the first training
        for run in runs:
            try:
                self.train(run, deadline)
            except OutOfTime as stopped:
                say(str(stopped))
                return False
            if not self.sweep(run, deadline):
                return False
        return True

    def plan(self) -> dict[str, Any]:
        """What `run` would do, by size: images and GFLOP to train, points to make. Reads the pictures; writes nothing."""
        protocol = self.materials.protocol
        recorded = self.ledger.points() if (self.out / LEDGER_FILE).is_file() else set()
        sizes = []
        for run in self.runs:
            cost = self.cost(run)
            passed = newest_state(self.store.folder("run", run.digest))
            points = [point for some in self.points(run, protocol).values() for point in some]
            missing = [point for point in points if point.digest not in recorded]
            images = max(0, max(run.checkpoints) - passed)
            if all(self.store.has("checkpoint", name) for name in run.checkpoints.values()):
                images = 0
            pictures = self.study.protocol.num_pictures
            sizes.append(
                {
                    "size": cost.size,
                    "width": cost.width,
                    "images_to_train": images,
                    "training_gflop": 3 * cost.gflop_per_forward * images,
                    "points": len(points),
                    "points_to_make": len(missing),
                    "sampling_gflop": sum(cost.gflop_per_forward * point.nfe * pictures for point in missing),
                }
            )
        return {"study": self.study.name, "out": str(self.out), "protocol": protocol.id, "sizes": sizes}


def refuse_conflict(study: StudySpec, store: Store) -> None:
    """Raise RequestError where an output folder holds artefacts of a study that this one cannot continue.

    Adding a size, a step count, a guidance value, a sampler, a mark or images is the normal case and no conflict.
    """
    file = store.out / STUDY_FILE
    if not file.is_file() or store.is_empty():
        return
    before = parse_spec(StudySpec, yaml.safe_load(file.read_text(encoding="utf-8")), str(file))
    difference = _first_difference(before.fixed_part(), study.fixed_part())
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
