"""Few-step students of every size, for text-to-image or super-resolution (arXiv 2404.01367, section 4.7).

A student is a run that starts from its teacher's final checkpoint. Progressive distillation is a chain of runs, each of which
starts from the student of the previous stage. Students are scored with the teacher's protocol, so their scores are comparable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from isocost.analysis.distillation import format_accelerations, format_equal_cost, format_teacher_differences
from isocost.config.finetune import ADAPTED_VARIANTS, NO_ADAPTER, DistillSpec, DistillVariant
from isocost.config.model import ModelSpec
from isocost.config.sampling import SolverSpec, VaeSpec
from isocost.config.training import TrainSpec
from isocost.config.types import TaskName
from isocost.errors import ConfigError
from isocost.experiments.base import EvalJob, Experiment, TrainingRun, make_run
from isocost.experiments.pretrain import PretrainExperiment
from isocost.experiments.study_assets import StudyAssets
from isocost.experiments.superres import SuperresExperiment
from isocost.models.checkpoint import Checkpoint, CheckpointInfo, checkpoint_name, load_checkpoint, read_info
from isocost.models.codi_unet import CoDiUNet
from isocost.models.component_costs import ComponentCosts
from isocost.models.factory import add_guidance_embedding
from isocost.models.flops import model_cost
from isocost.sampling.generate import schedule_of
from isocost.sweep.grid import grid_points, search_cells
from isocost.training.distillation import (
    ConditionalConsistencyDistillation,
    ConsistencyDistillation,
    Distillation,
    ProgressiveDistillation,
)
from isocost.training.objectives import Objective, TextToImage, training_schedule

DISTILL_VERSION = 1
DIGEST_FIELDS: dict[DistillVariant, tuple[str, ...]] = {
    "consistency": ("solver_steps", "huber_delta", "target_half_life_images"),
    "codi": ("solver_steps", "latent_weight", "one_timestep_per_batch", "target_half_life_images"),
    "codi-efficient": ("solver_steps", "latent_weight", "one_timestep_per_batch", "target_half_life_images"),
    "progressive": (),
}
"""Fields of the spec that decide a student's weights, besides its training and its guidance."""


@dataclass(frozen=True)
class Teacher:
    """A checkpoint that a student learns from or starts from."""

    folder: Path
    model: ModelSpec
    size: str
    variant: str = ""


@dataclass(frozen=True)
class TeacherGuide:
    """A checkpoint that guides a teacher."""

    folder: Path
    model: ModelSpec


@dataclass(frozen=True, kw_only=True)
class StudentRun(TrainingRun):
    """A training of a student.

    Attributes:
        kind: variant of distillation.
        size: size name of the teacher.
        teacher: folder of the undistilled checkpoint.
        num_steps: number of steps that a progressive stage learns; None for the other variants.
        is_first: whether it is the first progressive stage.
        guide: folder of the checkpoint that guides the teacher; None without one, and in later progressive stages.
        gflop_per_image: training compute per image, with the passes of the teacher, its guide and the weight average.
        gflop_before: training compute of the previous progressive stages.
    """

    kind: DistillVariant
    size: str
    teacher: Path
    num_steps: int | None = None
    is_first: bool = True
    guide: Path | None = None
    gflop_per_image: float
    gflop_before: float = 0.0

    @property
    def sources(self) -> tuple[Path, ...]:
        """The parent, the teacher if it is another checkpoint, and the guide of the teacher."""
        folders = [] if self.parent is None else [self.parent]
        folders += [] if self.kind == "progressive" else [self.teacher]
        folders += [] if self.guide is None else [self.guide]
        return tuple(dict.fromkeys(folders))


class DistillExperiment(Experiment):
    """The part `distill` of a study, or `superres.distill`."""

    def __init__(
        self, name: TaskName, spec: DistillSpec, assets: StudyAssets, base: PretrainExperiment | SuperresExperiment
    ) -> None:
        """
        Args:
            name: name of the experiment.
            spec: its configuration.
            assets: shared artefacts of the study.
            base: the experiment that trained the teachers.
        """
        self.name, self.spec, self.assets, self.base = name, spec, assets, base
        self.sweep, self.protocol_spec = spec.sweep, base.protocol_spec
        self.metric = spec.metric or base.metric
        self.baseline = base

    def components(self, checkpoint: str, vae: VaeSpec, guide: str | None) -> ComponentCosts:
        """Return the costs around the denoiser, which are those of the teacher."""
        return self.base.components(checkpoint, vae, guide)

    # --- trainings ---

    @cached_property
    def runs(self) -> list[TrainingRun]:
        """Every variant of every size; the stages of a progressive student are in order.

        Raises:
            ConfigError: a teacher or its guide does not exist or does not fit the study, or a teacher is a transformer and CoDi
                is requested.
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
        """Return the runs of a progressive student; the parent of each is the final checkpoint of the previous one."""
        stages = self.spec.stages
        images_per_stage = self.spec.train.whole_batches(max(1, self.spec.train.num_images // len(stages)))
        train = self.spec.train.model_copy(update={"num_images": images_per_stage, "snapshots": (), "snapshots_gflop": ()})
        runs: list[TrainingRun] = []
        parent, gflop_before = teacher.folder, 0.0
        for index, num_steps in enumerate(stages):
            stage: dict[str, Any] = {"num_steps": num_steps, "is_first": index == 0, "gflop_before": gflop_before}
            run = self._student("progressive", teacher, parent, teacher, train, **stage)
            parent = self.assets.store.folder("checkpoint", run.final)
            gflop_before += run.gflop_per_image * max(run.checkpoints)
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
        """Create the run of a student.

        Args:
            kind: variant of distillation.
            start: checkpoint whose network the student adapts.
            parent: folder of the initial weights.
            teacher: undistilled checkpoint.
            train: training configuration; None takes that of the spec.
            stage: fields of `StudentRun` that belong to a progressive stage.
        """
        spec, train = self.spec, train or self.spec.train
        half_lives = train.half_lives
        if spec.target_half_life_images not in half_lives:
            half_lives = (*half_lives, spec.target_half_life_images)
        train = train.model_copy(update={"ema_half_life_images": half_lives})
        guidance_embed_dim = None if spec.guidance_range is None else spec.guidance_embed_dim
        changes: dict[str, Any] = {"guidance_embed_dim": guidance_embed_dim}
        if kind in ADAPTED_VARIANTS:
            changes |= {"adapter": self._adapter, "extra_input_channels": teacher.model.extra_input_channels}
        model = start.model.model_copy(update=changes)
        inputs: dict[str, Any] = {"task": self.name, "distill": DISTILL_VERSION, "variant": kind, **self.base.stage}
        inputs |= {"parent": checkpoint_name(parent), "teacher": checkpoint_name(teacher.folder)}
        inputs |= {"guidance": spec.guidance_range}
        guide = self._guide_of(teacher) if stage.get("is_first", True) else None
        if guide is not None and spec.guide is not None:
            inputs["guide"] = {"checkpoint": checkpoint_name(guide.folder), "null_prompt": spec.guide.null_prompt}
        inputs |= {field: getattr(spec, field) for field in DIGEST_FIELDS[kind]}
        inputs |= {key: value for key, value in stage.items() if key in ("num_steps", "is_first")}
        num_tokens = self.assets.study.text_encoder.max_tokens
        gflop = model_cost(model, num_tokens).gflop_per_forward
        teacher_gflop = model_cost(teacher.model, num_tokens).gflop_per_forward
        second_gflop = teacher_gflop if guide is None else model_cost(guide.model, num_tokens).gflop_per_forward
        variant = f"{teacher.variant} {kind}".strip()
        run = make_run(self.name, model, train, inputs, gflop, parent, variant)
        is_guided, is_first = spec.guidance_range is not None, stage.get("is_first", True)
        teacher_passes, second_passes = _teacher_passes(kind, is_guided, is_first)
        average_passes = 0 if kind == "progressive" else 1
        return StudentRun(
            **{field.name: getattr(run, field.name) for field in fields(run)},
            kind=kind,
            size=teacher.size,
            teacher=teacher.folder,
            guide=None if guide is None else guide.folder,
            gflop_per_image=(3 + average_passes) * gflop + teacher_passes * teacher_gflop + second_passes * second_gflop,
            **stage,
        )

    @property
    def _adapter(self) -> str:
        """Input of the CoDi adapter."""
        return "concat_cond" if isinstance(self.base, SuperresExperiment) else "noisy"

    def _teachers(self) -> list[Teacher]:
        """Return the undistilled checkpoints: `teachers` of the spec, or the final checkpoints of the study's own runs.

        For super-resolution these are the runs with a pretrained start, if there are any.
        """
        if self.spec.teachers:
            return [self._load_teacher(folder) for folder in self.spec.teachers]
        store, runs = self.assets.store, self.base.runs
        runs = [run for run in runs if not run.variant] or runs
        tokens = self.assets.study.text_encoder.max_tokens
        return [
            Teacher(store.folder("checkpoint", run.final), run.model, model_cost(run.model, tokens).size, run.variant)
            for run in runs
        ]

    def _load_teacher(self, folder: str) -> Teacher:
        info = load_checkpoint(folder).info
        self._check_source(info, f"{self.name}.teachers: {folder}", "the undistilled checkpoint")
        return Teacher(Path(folder).expanduser(), info.model, info.size, info.variant)

    def _check_source(self, info: CheckpointInfo, source: str, needed: str) -> None:
        """
        Raises:
            ConfigError: a teacher or guide from a folder is a student, or of another task, autoencoder or prediction type.
        """
        if info.distilled:
            raise ConfigError(f"{source} is a student already ({info.distilled}); give {needed}")
        task = "superres" if isinstance(self.base, SuperresExperiment) else "text2image"
        if info.task not in ((task, "seed-replicates") if task == "text2image" else (task,)):
            raise ConfigError(f"{source} was trained for {info.task}; give a checkpoint of {task}")
        self.assets.check_compatible_parent(info, self.spec.train.prediction_type, source)

    def _guide_of(self, teacher: Teacher) -> TeacherGuide | None:
        """Return the one checkpoint that guides a teacher; None if the study names no guide.

        Raises:
            ConfigError: there is none, it is larger than the teacher or the teacher itself, or it does not fit the study.
        """
        spec = self.spec.guide
        if spec is None:
            return None
        source = f"{self.name}.guide: {spec.title}"
        guide = self._load_guide(spec.checkpoint, source) if spec.checkpoint is not None else self._member(teacher, source)
        if checkpoint_name(guide.folder) == checkpoint_name(teacher.folder):
            raise ConfigError(
                f"{source}: teacher {teacher.size} would guide itself; give an earlier snapshot or a smaller size, or list "
                f"larger teachers in {self.name}.teachers"
            )
        num_tokens = self.assets.study.text_encoder.max_tokens
        guide_cost, teacher_cost = (model_cost(model, num_tokens) for model in (guide.model, teacher.model))
        if guide_cost.gflop_per_forward > teacher_cost.gflop_per_forward:
            raise ConfigError(
                f"{source}: it is larger than teacher {teacher.size}; a guide has the size of the teacher or less: give a "
                f"smaller one, or list larger teachers in {self.name}.teachers"
            )
        return guide

    def _member(self, teacher: Teacher, source: str) -> TeacherGuide:
        """Return the member of the study that the guide's size and snapshot name for a teacher."""
        assert self.spec.guide is not None, "the caller checks it"
        assert self.spec.guide.size is not None, "a guide has a size or a checkpoint"
        size, snapshot = self.spec.guide.size, self.spec.guide.snapshot
        runs = [run for run in self.base.runs if run.variant == teacher.variant] or self.base.runs
        members = {run.model.width: run for run in runs}
        widths = sorted(members)
        if size == "smaller":
            smaller = [width for width in widths if width < teacher.model.width]
            if not smaller:
                raise ConfigError(
                    f"{source}: no width of the study is smaller than teacher {teacher.size}; give size: same with an earlier "
                    f"snapshot, or list larger teachers in {self.name}.teachers"
                )
            width = smaller[-1]
        else:
            width = teacher.model.width if size == "same" else size
        if width not in members:
            raise ConfigError(f"{source}: no such width; the study has {', '.join(map(str, widths))}")
        run = members[width]
        name = run.final if snapshot == "last" else run.checkpoint_after(snapshot, source)
        return TeacherGuide(self.assets.store.folder("checkpoint", name), run.model)

    def _load_guide(self, folder: str, source: str) -> TeacherGuide:
        info = read_info(Path(folder))
        self._check_source(info, source, "an undistilled network")
        if schedule_of(info) is not training_schedule(self.spec.train):
            raise ConfigError(f"{source} was trained on another noise schedule; give a guide of the study's schedule")
        return TeacherGuide(Path(folder).expanduser(), info.model)

    def _start(self, teacher: Teacher) -> Teacher:
        """Return the checkpoint that CoDi adapts.

        It is the teacher itself, or for super-resolution the text-to-image checkpoint from which the teacher was fine-tuned.
        """
        if not isinstance(self.base, SuperresExperiment):
            return teacher
        info = load_checkpoint(teacher.folder).info if self.spec.teachers else None
        model = teacher.model.model_copy(update={"extra_input_channels": 0})
        parents = [run for run in self.base.family.runs if run.model == model]
        if info is not None or teacher.variant or not parents:
            raise ConfigError(
                f"{self.name}: codi adapts a text-to-image checkpoint of the study, and {teacher.size} has none; "
                "leave codi out of the variants"
            )
        folder = self.assets.store.folder("checkpoint", parents[0].final)
        return Teacher(folder, model, teacher.size)

    def network(self, run: TrainingRun) -> nn.Module:
        """Build the student with its initial weights: it computes the same function as its parent at every guidance.

        Raises:
            ConfigError: the parent does not exist yet.
        """
        assert isinstance(run, StudentRun)
        network = self._open(run, self._parent(run)).network
        if self.spec.guidance_range is not None and run.is_first:
            network = add_guidance_embedding(network, self.spec.guidance_embed_dim)
        if run.model.adapter == "none":
            return network.requires_grad_(True).train()
        adapted = CoDiUNet.from_unet(network, run.model.adapter).requires_grad_(True).train()
        if run.kind == "codi-efficient":
            adapted.freeze_unet()
        return adapted

    def objective(self, run: TrainingRun, network: nn.Module) -> Objective:
        """Build the variant's loss on the teacher's training data."""
        assert isinstance(run, StudentRun)
        base = self.base.objective(run, network)
        assert isinstance(base, TextToImage), "students train on latents and captions"
        guide = None if run.guide is None else self._open(run, run.guide).network
        if run.kind == "progressive":
            teacher = self._open(run, self._parent(run)).network
            assert run.num_steps is not None
            return ProgressiveDistillation(self.spec, base, teacher, network, run.num_steps, run.is_first, guide)
        kind: type[Distillation] = ConsistencyDistillation if run.kind == "consistency" else ConditionalConsistencyDistillation
        needs_teacher = run.kind == "consistency" or self.spec.guidance_range is not None
        return kind(self.spec, base, self._open(run, run.teacher).network if needs_teacher else None, network, guide)

    @staticmethod
    def _parent(run: TrainingRun) -> Path:
        assert run.parent is not None, "every student has a parent"
        return run.parent

    @staticmethod
    def _open(run: TrainingRun, folder: Path) -> Checkpoint:
        if not folder.is_dir():
            raise ConfigError(f"{run.title}: its teacher does not exist yet; run `isocost train` or `isocost run`")
        return load_checkpoint(folder)

    def checkpoint_metadata(self, run: TrainingRun) -> dict[str, Any]:
        """Return how the student was distilled."""
        assert isinstance(run, StudentRun)
        return {
            "task": self.name,
            "size": run.size,
            "parent": checkpoint_name(self._parent(run)),
            "variant": run.variant,
            "distilled": run.kind,
            "guidance_range": self.spec.guidance_range,
            "teacher_guide": "" if run.guide is None else checkpoint_name(run.guide),
            "scale": self.base.spec.scale if isinstance(self.base, SuperresExperiment) else None,
        }

    def training_gflop(self, run: TrainingRun, images_seen: int) -> float:
        """Return the training compute: previous stages, and passes of the teacher, its guide and the weight average too."""
        assert isinstance(run, StudentRun)
        return run.gflop_before + run.gflop_per_image * images_seen

    # --- points ---

    def validate(self) -> None:
        """Validate the experiment of the teachers."""
        self.base.validate()

    def jobs(self, run: TrainingRun) -> list[EvalJob]:
        """Return the grid or the search cells of the final checkpoint, and a point at every snapshot.

        A progressive stage is scored at its own number of steps only, the last stage also at fewer steps.
        """
        assert isinstance(run, StudentRun)
        protocol, eval_context = self.base.protocol, self.base.make_eval_context
        if run.num_steps is None:
            return self.eval_jobs_of_run(run, self.sweep, protocol, eval_context)
        steps = self._stage_num_steps(run.num_steps)
        if not steps:
            return []
        sweep = self.sweep.model_copy(update={"solvers": (SolverSpec(),), "num_steps": steps})
        if sweep.search == "race":
            arguments = (sweep, self.protocol_spec, protocol, self.metric, run.model.embeds_guidance, self.schedule(run))
            cells = search_cells(run.final, *arguments)
            return [EvalJob(run.final, (), eval_context, tuple(cells))]
        return [EvalJob(run.final, tuple(grid_points(run.final, sweep, self.protocol_spec, protocol)), eval_context)]

    def _stage_num_steps(self, stage: int) -> tuple[int, ...]:
        """Return the sweep's numbers of steps at which a progressive stage is scored; possibly none."""
        is_last = stage == self.spec.stages[-1]
        return tuple(n for n in self.sweep.num_steps if n == stage or (is_last and n < stage))

    def has_points(self, run: TrainingRun) -> bool:
        """False for a progressive stage whose number of steps is not in the sweep."""
        assert isinstance(run, StudentRun)
        return run.num_steps is None or bool(self._stage_num_steps(run.num_steps))

    # --- report ---

    @property
    def protocol_summary(self) -> str:
        """One sentence about the teacher's protocol."""
        return self.base.protocol_summary

    @property
    def baselines(self) -> Mapping[str, Mapping[str, float]]:
        """Baselines of the teacher's experiment."""
        return self.base.baselines

    @property
    def sample_labels(self) -> list[str]:
        """Labels of the teacher's experiment."""
        return self.base.sample_labels

    def comparison_rows(self) -> Mapping[str, Tensor]:
        """Return the rows of the teacher's experiment."""
        return self.base.comparison_rows()

    def findings(self, table: pd.DataFrame) -> dict[str, Any]:
        """Compare students with teachers: at the same number of steps, in saved steps, and at equal cost."""
        comparer = self.assets.comparer(lambda: self.base.make_eval_context().reference, self.protocol_spec.metrics)
        return {
            "student minus its own teacher at equal steps": format_teacher_differences(table, self.metric, comparer),
            "steps that the undistilled model needs for the student's score, divided by the student's steps": (
                format_accelerations(table, self.metric)
            ),
            **format_equal_cost(table, self.metric, comparer),
        }


def _teacher_passes(kind: DistillVariant, is_guided: bool, is_first: bool) -> tuple[int, int]:
    """Return the forward passes per training image of the teacher, and of the network that guides it."""
    if kind == "progressive":
        return 2, 2 if is_guided and is_first else 0
    if kind == "consistency":
        return 1, 1 if is_guided else 0
    return (1, 1) if is_guided else (0, 0)
