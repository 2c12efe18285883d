"""Few-step students of every size, of text-to-image or of super-resolution (arXiv 2404.01367, section 4.7).

A student is a run that starts from its teacher's last checkpoint; a progressive one is a chain of runs, each of which starts
from the student of the stage before. Students are scored by the teacher's own protocol, so both stand on one axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from isocost.analysis.distillation import accelerations, against_teacher, at_equal_cost
from isocost.config.finetune import ADAPTED_VARIANTS, NO_ADAPTER, DistillSpec, DistillVariant
from isocost.config.model import ModelSpec
from isocost.config.sampling import SolverSpec
from isocost.config.training import TrainSpec
from isocost.config.types import TaskName
from isocost.errors import ConfigError
from isocost.evaluation.paired import PairedComparer
from isocost.experiments.base import EvalJob, Experiment, TrainingRun, make_run
from isocost.experiments.pretrain import PretrainExperiment
from isocost.experiments.study_assets import StudyAssets
from isocost.experiments.superres import SuperresExperiment
from isocost.models.checkpoint import Checkpoint, load_checkpoint
from isocost.models.codi_unet import CoDiUNet
from isocost.models.factory import with_guidance
from isocost.models.flops import model_cost
from isocost.sweep.grid import grid_points, search_cells
from isocost.training.distillation import (
    ConditionalConsistencyDistillation,
    ConsistencyDistillation,
    Distillation,
    ProgressiveDistillation,
)
from isocost.training.objectives import Objective, TextToImage

VERSION = 1
OF_VARIANT: dict[DistillVariant, tuple[str, ...]] = {
    "consistency": ("solver_steps", "huber_delta", "target_half_life_images"),
    "codi": ("solver_steps", "latent_weight", "one_timestep_per_batch", "target_half_life_images"),
    "codi-efficient": ("solver_steps", "latent_weight", "one_timestep_per_batch", "target_half_life_images"),
    "progressive": (),
}
"""What of the spec decides a student beside its training and its guidance."""


@dataclass(frozen=True)
class Teacher:
    """What a student is made from: the undistilled run, and the checkpoint that a variant starts from."""

    folder: Path
    model: ModelSpec
    size: str
    variant: str = ""


@dataclass(frozen=True, kw_only=True)
class StudentRun(TrainingRun):
    """A training of a student.

    `teacher` is the folder of the undistilled checkpoint, `num_steps` what a stage of progressive distillation is for, and
    `is_first` whether it is the first stage. `gflop_per_image` counts teacher and average, `gflop_before` is what the stages
    before took.
    """

    kind: DistillVariant
    size: str
    teacher: Path
    num_steps: int | None = None
    is_first: bool = True
    gflop_per_image: float
    gflop_before: float = 0.0


class DistillExperiment(Experiment):
    """`distill` of a study, or `superres.distill`."""

    def __init__(
        self, name: TaskName, spec: DistillSpec, assets: StudyAssets, of: PretrainExperiment | SuperresExperiment
    ) -> None:
        """`of` is what the teachers were trained on."""
        self.name, self.spec, self.assets, self.of = name, spec, assets, of
        self.sweep, self.protocol_spec = spec.sweep, of.protocol_spec
        self.metric = spec.metric or of.metric
        self.baseline = of

    # --- trainings ---

    @cached_property
    def runs(self) -> list[TrainingRun]:
        """Every variant of every size; a progressive student's stages in their order.

        Raises:
            ConfigError: a given teacher does not fit the study, or is a transformer where CoDi is asked for.
        """
        return [run for teacher in self._teachers() for kind in self.spec.variants for run in self._runs_of(teacher, kind)]

    def _runs_of(self, teacher: Teacher, kind: DistillVariant) -> list[TrainingRun]:
        if kind == "progressive":
            return self._stages(teacher)
        if kind in ADAPTED_VARIANTS and teacher.model.kind != "unet":
            raise ConfigError(f"{self.name}.variants: {NO_ADAPTER}")
        start = self._start(teacher) if kind in ADAPTED_VARIANTS else teacher
        return [self._student(kind, start, start.folder, teacher)]

    def _stages(self, teacher: Teacher) -> list[TrainingRun]:
        """A chain: each stage's parent is the last checkpoint of the one before."""
        stages = self.spec.stages
        share = self.spec.train.whole_batches(max(1, self.spec.train.num_images // len(stages)))
        spec = self.spec.train.model_copy(update={"num_images": share, "snapshots": (), "snapshots_gflop": ()})
        runs: list[TrainingRun] = []
        parent, before = teacher.folder, 0.0
        for number, num_steps in enumerate(stages):
            run = self._student(
                "progressive", teacher, parent, teacher, spec, num_steps=num_steps, is_first=number == 0, gflop_before=before
            )
            parent = self.assets.store.folder("checkpoint", run.final)
            before += run.gflop_per_image * max(run.checkpoints)
            runs.append(run)
        return runs

    def _student(
        self,
        kind: DistillVariant,
        start: Teacher,
        parent: Path,
        teacher: Teacher,
        train: TrainSpec | None = None,
        **stage: Any,
    ) -> StudentRun:
        spec, of_train = self.spec, train or self.spec.train
        own_lives = of_train.half_lives
        lives = own_lives if spec.target_half_life_images in own_lives else (*own_lives, spec.target_half_life_images)
        of_train = of_train.model_copy(update={"ema_half_life_images": lives})
        embedding = None if spec.guidance_range is None else spec.guidance_embed_dim
        changes: dict[str, Any] = {"guidance_embed_dim": embedding}
        if kind in ADAPTED_VARIANTS:
            changes |= {"adapter": self._write_prompt_embeds, "extra_input_channels": teacher.model.extra_input_channels}
        model = start.model.model_copy(update=changes)
        named: dict[str, Any] = {"task": self.name, "distill": VERSION, "variant": kind, **self.of.stage}
        named |= {"parent": parent.name, "teacher": teacher.folder.name, "guidance": spec.guidance_range}
        named |= {field: getattr(spec, field) for field in OF_VARIANT[kind]}
        named |= {key: value for key, value in stage.items() if key in ("num_steps", "is_first")}
        num_tokens = self.assets.study.text_encoder.max_tokens
        gflop, of_teacher = (model_cost(one, num_tokens).gflop_per_forward for one in (model, teacher.model))
        variant = f"{teacher.variant} {kind}".strip()
        run = make_run(self.name, model, of_train, named, gflop, parent, variant)
        taught = _teacher_passes(kind, spec.guidance_range is not None, stage.get("is_first", True))
        average = 0 if kind == "progressive" else 1
        return StudentRun(
            **{field.name: getattr(run, field.name) for field in fields(run)},
            kind=kind,
            size=teacher.size,
            teacher=teacher.folder,
            gflop_per_image=(3 + average) * gflop + taught * of_teacher,
            **stage,
        )

    @property
    def _write_prompt_embeds(self) -> str:
        """What a CoDi adapter sees."""
        return "concat_cond" if isinstance(self.of, SuperresExperiment) else "noisy"

    def _teachers(self) -> list[Teacher]:
        """The undistilled checkpoints: those given, or the last ones of the study's own runs.

        Of super-resolution those from a pretrained start, where there are such.
        """
        if self.spec.teachers:
            return [self._given(folder) for folder in self.spec.teachers]
        store, runs = self.assets.store, self.of.runs
        runs = [run for run in runs if not run.variant] or runs
        tokens = self.assets.study.text_encoder.max_tokens
        return [
            Teacher(store.folder("checkpoint", run.final), run.model, model_cost(run.model, tokens).size, run.variant)
            for run in runs
        ]

    def _given(self, folder: str) -> Teacher:
        info = load_checkpoint(folder).info
        named = f"{self.name}.teachers: {folder}"
        if info.distilled:
            raise ConfigError(f"{named} is a student already ({info.distilled}); give the undistilled checkpoint")
        if info.task != ("superres" if isinstance(self.of, SuperresExperiment) else "text2image"):
            raise ConfigError(f"{named} was made for {info.task}, which these students are not for")
        self.assets.check_parent(info, self.spec.train.prediction_type, named)
        return Teacher(Path(folder), info.model, info.size, info.variant)

    def _start(self, teacher: Teacher) -> Teacher:
        """What CoDi adapts: the teacher itself, for super-resolution the text-to-image checkpoint that it was tuned from."""
        if not isinstance(self.of, SuperresExperiment):
            return teacher
        info = load_checkpoint(teacher.folder).info if self.spec.teachers else None
        family = self.of.family.runs
        plain = teacher.model.model_copy(update={"extra_input_channels": 0})
        own = [run for run in family if run.model == plain]
        if info is not None or teacher.variant or not own:
            raise ConfigError(f"{self.name}: codi adapts a text-to-image checkpoint of the study; {teacher.size} has none")
        folder = self.assets.store.folder("checkpoint", own[0].final)
        return Teacher(folder, plain, teacher.size)

    def network(self, run: TrainingRun) -> nn.Module:
        """The student as it begins: the parent's function, whatever w.

        Raises:
            ConfigError: the parent is not there.
        """
        assert isinstance(run, StudentRun)
        network = self._open(run, self._parent(run)).network
        if self.spec.guidance_range is not None and run.is_first:
            network = with_guidance(network, self.spec.guidance_embed_dim)
        if run.model.adapter == "none":
            return network.requires_grad_(True).train()
        adapted = CoDiUNet.of(network, run.model.adapter).requires_grad_(True).train()
        if run.kind == "codi-efficient":
            adapted.freeze_unet()
        return adapted

    def task(self, run: TrainingRun, network: nn.Module) -> Objective:
        """The variant's loss on what the teacher was trained on."""
        assert isinstance(run, StudentRun)
        of = self.of.task(run, network)
        assert isinstance(of, TextToImage), "students learn what was trained on latents and captions"
        if run.kind == "progressive":
            teacher = self._open(run, self._parent(run)).network
            assert run.num_steps is not None
            return ProgressiveDistillation(self.spec, of, teacher, network, run.num_steps, run.is_first)
        kind: type[Distillation] = ConsistencyDistillation if run.kind == "consistency" else ConditionalConsistencyDistillation
        needs_teacher = run.kind == "consistency" or self.spec.guidance_range is not None
        return kind(self.spec, of, self._open(run, run.teacher).network if needs_teacher else None, network)

    @staticmethod
    def _parent(run: TrainingRun) -> Path:
        assert run.parent is not None, "every student has one"
        return run.parent

    @staticmethod
    def _open(run: TrainingRun, folder: Path) -> Checkpoint:
        if not folder.is_dir():
            raise ConfigError(f"{run.title}: no teacher to distil yet; `isocost train` or `isocost run` makes it")
        return load_checkpoint(folder)

    def facts(self, run: TrainingRun) -> dict[str, Any]:
        """How it was distilled, and what that took."""
        assert isinstance(run, StudentRun)
        return {
            "task": self.name,
            "size": run.size,
            "parent": self._parent(run).name,
            "variant": run.variant,
            "distilled": run.kind,
            "guidance_range": self.spec.guidance_range,
            "scale": self.of.spec.scale if isinstance(self.of, SuperresExperiment) else None,
        }

    def training_gflop(self, run: TrainingRun, images_seen: int) -> float:
        """Teacher's and average's passes counted, and earlier stages."""
        assert isinstance(run, StudentRun)
        return run.gflop_before + run.gflop_per_image * images_seen

    # --- points ---

    def check(self) -> None:
        """As of what the teachers were trained on."""
        self.of.check()

    def jobs(self, run: TrainingRun) -> list[EvalJob]:
        """The grid at the last checkpoint, a point at every snapshot; a progressive stage at its own number of steps.

        The last stage also takes fewer steps.
        """
        assert isinstance(run, StudentRun)
        protocol, eval_context = self.of.protocol, self.of.make_eval_context
        if run.num_steps is None:
            return self.eval_jobs_of_run(run, self.sweep, protocol, eval_context)
        last = run.num_steps == self.spec.stages[-1]
        steps = tuple(n for n in self.sweep.num_steps if n == run.num_steps or (last and n < run.num_steps))
        if not steps:
            return []
        sweep = self.sweep.model_copy(update={"solvers": (SolverSpec(),), "num_steps": steps})
        if sweep.search == "race":
            cells = search_cells(run.final, sweep, self.protocol_spec, protocol, self.metric, run.model.embeds_guidance)
            return [EvalJob(run.final, (), eval_context, tuple(cells))]
        return [EvalJob(run.final, tuple(grid_points(run.final, sweep, self.protocol_spec, protocol)), eval_context)]

    # --- report ---

    @property
    def protocol_summary(self) -> str:
        """The teacher's."""
        return self.of.protocol_summary

    @property
    def baselines(self) -> Mapping[str, Mapping[str, float]]:
        """The teacher's."""
        return self.of.baselines

    @property
    def sample_labels(self) -> list[str]:
        """The teacher's."""
        return self.of.sample_labels

    def strips(self) -> Mapping[str, Tensor]:
        """The teacher's."""
        return self.of.strips()

    def findings(self, table: pd.DataFrame) -> dict[str, Any]:
        """Students against teachers: at the same number of steps, in steps saved, and at equal cost."""
        reference = self.of.make_eval_context().reference
        pairing = PairedComparer((self.assets.store,), reference, self.protocol_spec.metrics)
        return {
            "student less its own teacher at equal steps": against_teacher(table, self.metric, pairing),
            "steps that the undistilled needs to match, over the student's": accelerations(table, self.metric),
            **at_equal_cost(table, self.metric, pairing),
        }


def _teacher_passes(kind: DistillVariant, is_guided: bool, is_first: bool) -> int:
    """Forward passes of the teacher that an image takes."""
    if kind == "progressive":
        return 4 if is_guided and is_first else 2
    if kind == "consistency":
        return 2 if is_guided else 1
    return 2 if is_guided else 0
