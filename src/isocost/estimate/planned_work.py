"""Trainings and sweep points that a study requires, computed from its file.

The trainings are listed by the study's experiments themselves, with shared assets of which only the shapes are known. Every
guidance value of a sweep counts as a point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from isocost.config.evaluation import ProtocolSpec
from isocost.config.finetune import DistillSpec, DreamboothSpec, PhotographedSubjects
from isocost.config.sampling import SolverSpec
from isocost.config.study import StudySpec
from isocost.config.sweep import SweepSpec
from isocost.config.types import TaskName
from isocost.data.dreambooth import PROMPT_BACKGROUNDS
from isocost.estimate.component_shapes import ComponentShapes
from isocost.evaluation.protocol import Protocol
from isocost.experiments.base import Experiment, TrainingRun, make_run
from isocost.experiments.distillation import DistillExperiment, StudentRun
from isocost.experiments.pretrain import PretrainExperiment
from isocost.experiments.seed_replicates import SeedReplicatesExperiment
from isocost.experiments.study_assets import StudyAssets
from isocost.experiments.superres import SuperresExperiment
from isocost.models.flops import ModelCost, model_cost
from isocost.sampling.request import passes_per_evaluation
from isocost.sweep.grid import NO_GUIDES, Guides, SweepPoint, grid_points, snapshot_point
from isocost.training.objectives import training_schedule
from isocost.utils.artifact_store import Store

NUM_SUBJECTS, NUM_PROMPTS = 30, 25
"""Subjects, and prompts per subject, of google/dreambooth (arXiv 2208.12242, section 4.1)."""
_PLACEHOLDER_PROTOCOL = Protocol(0, 0, 0, "", "", "", "none", 0, 0)
"""Protocol without reference images. Point digests with it are only unique within an estimate."""


class ShapeOnlyAssets(StudyAssets):
    """Shared assets of which only the shapes are known. The digests that follow from them belong to no artefact."""

    def __init__(self, study: StudySpec, shapes: ComponentShapes) -> None:
        super().__init__(study, Store(study.name))
        self.shapes = shapes

    def source_key(self, part: str) -> dict[str, Any]:
        """Placeholder without the content of the images."""
        return {"unseen": part}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        size = self.study.data.resolution // self.shapes.autoencoder.factor
        return self.shapes.autoencoder.latent_channels, size, size

    @cached_property
    def text_encoder(self) -> Any:
        """The shape of the text encoder, in place of the encoder itself. Prompts cannot be encoded with it."""
        return self.shapes.text_encoder


@dataclass(frozen=True)
class PlannedWork:
    """Work of one size of one task.

    Attributes:
        run: the training, or one of several equal trainings.
        cost: cost of the network.
        gflop_per_image: GFLOP of training per image, without text encoder and autoencoder.
        points: points of all trainings, by the protocol that scores them.
        num_trainings: number of equal trainings.
        class_images: forward passes per image and number of images, sampled before the training (DreamBooth's class images).
        has_captions: whether images have captions, which may have to be encoded in each step.
        encodes_images: whether the training encodes every image in each step.
        guide_gflop: GFLOP per forward of guides, by their checkpoint.
    """

    run: TrainingRun
    cost: ModelCost
    gflop_per_image: float
    points: Sequence[tuple[ProtocolSpec, Sequence[SweepPoint]]]
    num_trainings: int = 1
    class_images: tuple[int, int] = (0, 0)
    has_captions: bool = True
    encodes_images: bool = False
    guide_gflop: Mapping[str, float] = field(default_factory=dict)

    def gflop_of(self, point: SweepPoint) -> float:
        """GFLOP of the passes of one image of a point, by the network and its guide."""
        main_passes, guide_passes = point.passes(self.run.model, training_schedule(self.run.spec))
        guide = 0.0 if point.spec.guide is None else self.guide_gflop[point.spec.guide.checkpoint]
        return self.cost.gflop_per_forward * main_passes + guide * guide_passes

    @property
    def training_images(self) -> int:
        """Images seen by all trainings together."""
        return self.num_trainings * max(self.run.checkpoints)

    @property
    def variant(self) -> str:
        """Variant of the run; empty for DreamBooth, whose variants are the subjects."""
        return "" if self.run.task == "dreambooth" else self.run.variant


@dataclass
class StudyPlan:
    """All work of a study, the assumptions that were made, and the parts that cannot be counted from its file."""

    work: list[PlannedWork] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)
    not_counted: list[str] = field(default_factory=list)


def plan_study(study: StudySpec, shapes: ComponentShapes) -> StudyPlan:
    """List the work of a study, text-to-image first.

    Raises:
        ConfigError: a width, a latent size or a super-resolution scale does not fit.
    """
    plan = StudyPlan()
    assets = ShapeOnlyAssets(study, shapes)
    tokens = study.text_encoder.max_tokens
    family = PretrainExperiment(study, assets)
    for run in family.runs:
        cost = model_cost(run.model, tokens)
        points = _run_points(run, study.sweep, study.protocol, family.guides(run))
        guide_gflop = _guide_gflop(family, tokens)
        plan.work.append(
            PlannedWork(run, cost, 3 * cost.gflop_per_forward, [(study.protocol, points)], guide_gflop=guide_gflop)
        )
    if study.seed_replicates is not None:
        replicates = SeedReplicatesExperiment(study.seed_replicates, family)
        for run in replicates.runs:
            cost = model_cost(run.model, tokens)
            points = _run_points(run, study.sweep, study.protocol, replicates.guides(run))
            guide_gflop = _guide_gflop(family, tokens)
            plan.work.append(
                PlannedWork(run, cost, 3 * cost.gflop_per_forward, [(study.protocol, points)], guide_gflop=guide_gflop)
            )
    if study.distill is not None:
        _add_students(plan, "distill", study.distill, assets, family)
    if study.superres is not None:
        if study.superres.parents:
            plan.not_counted.append("superres: its parents are checkpoints, and the study does not contain their shapes")
        else:
            _add_superres(plan, assets, family)
    if study.dreambooth is not None:
        _add_dreambooth(plan, study.dreambooth, assets, family)
    return plan


def _guide_gflop(experiment: Experiment, tokens: int) -> dict[str, float]:
    """GFLOP per forward by checkpoint, of all networks that can be guides."""
    return {
        name: model_cost(run.model, tokens).gflop_per_forward for run in experiment.runs for name in run.checkpoints.values()
    }


def _run_points(run: TrainingRun, sweep: SweepSpec, protocol: ProtocolSpec, guides: Guides = NO_GUIDES) -> list[SweepPoint]:
    """Points as in `sweep.grid.run_points`, but with the full grid: the grid at the last checkpoint, one point per snapshot."""
    checkpoints = tuple(run.checkpoints.values())
    points = grid_points(run.final, sweep, protocol, _PLACEHOLDER_PROTOCOL, guides)
    if len(checkpoints) > 1:
        points += [snapshot_point(checkpoint, sweep, protocol, _PLACEHOLDER_PROTOCOL) for checkpoint in checkpoints]
    return list({point.digest: point for point in points}.values())


def _add_superres(plan: StudyPlan, assets: ShapeOnlyAssets, family: PretrainExperiment) -> None:
    spec = assets.study.superres
    assert spec is not None, "the caller checks it"
    experiment = SuperresExperiment(spec, assets, family)
    for run in experiment.runs:
        cost = model_cost(run.model, assets.study.text_encoder.max_tokens)
        points = _run_points(run, spec.sweep, spec.protocol, experiment.guides(run))
        guide_gflop = _guide_gflop(experiment, assets.study.text_encoder.max_tokens)
        scored = [(spec.protocol, points)]
        plan.work.append(
            PlannedWork(run, cost, 3 * cost.gflop_per_forward, scored, encodes_images=True, guide_gflop=guide_gflop)
        )
    if spec.distill is not None:
        _add_students(plan, "superres-distill", spec.distill, assets, experiment)
    plan.not_counted.append("superres: low-resolution images, which are made on the CPU, and paired metrics")


def _add_students(
    plan: StudyPlan, name: TaskName, spec: DistillSpec, assets: ShapeOnlyAssets, base: PretrainExperiment | SuperresExperiment
) -> None:
    if spec.teachers:
        plan.not_counted.append(f"{name}: its teachers are checkpoints, and the study does not contain their shapes")
        return
    if spec.guide is not None and spec.guide.checkpoint is not None:
        plan.not_counted.append(f"{name}: its guide is a checkpoint, and the study does not contain its shape")
        return
    for run in DistillExperiment(name, spec, assets, base).runs:
        assert isinstance(run, StudentRun), "DistillExperiment has only student runs"
        cost = model_cost(run.model, assets.study.text_encoder.max_tokens)
        if run.num_steps is None:
            points = _run_points(run, spec.sweep, base.protocol_spec)
        else:  # a progressive stage is sampled at its own number of steps, the last stage at fewer as well
            is_last = run.num_steps == spec.stages[-1]
            steps = tuple(n for n in spec.sweep.num_steps if n == run.num_steps or (is_last and n < run.num_steps))
            sweep = spec.sweep.model_copy(update={"solvers": (SolverSpec(),), "num_steps": steps})
            points = grid_points(run.final, sweep, base.protocol_spec, _PLACEHOLDER_PROTOCOL)
        is_superres = isinstance(base, SuperresExperiment)
        scored = [(base.protocol_spec, points)]
        plan.work.append(PlannedWork(run, cost, run.gflop_per_image, scored, encodes_images=is_superres))


def _add_dreambooth(plan: StudyPlan, spec: DreamboothSpec, assets: ShapeOnlyAssets, family: PretrainExperiment) -> None:
    """Add a training of every subject from every size, scored before and after on its prompts and on the study's prompts."""
    study, subjects = assets.study, spec.subjects
    if isinstance(subjects, PhotographedSubjects):
        num_subjects, max_prompts = len(subjects.names) or NUM_SUBJECTS, NUM_PROMPTS
        source = "as in google/dreambooth" if not subjects.names else "with the number of prompts of google/dreambooth"
    else:
        num_subjects, max_prompts = subjects.num_subjects, len(PROMPT_BACKGROUNDS)
        source = "as in the synthetic subjects"
    num_prompts = min(subjects.num_prompts or max_prompts, max_prompts)
    plan.assumptions.append(
        f"DreamBooth has {num_subjects} subjects with {num_prompts} prompts each, {source}; every subject has its own class."
    )
    if spec.train_text_encoder:
        plan.not_counted.append("dreambooth.train_text_encoder: training of the text encoder")
    subject_protocol = spec.protocol.model_copy(update={"num_images": num_prompts * spec.num_images})
    study_protocol = study.protocol.model_copy(update={"num_images": spec.num_prior_images})
    prior = spec.prior
    for parent in family.runs:
        cost = model_cost(parent.model, study.text_encoder.max_tokens)
        run = make_run("dreambooth", parent.model, spec.train, {"task": "dreambooth"}, cost.gflop_per_forward)
        scored = [
            *[(subject_protocol, _run_points(run, spec.sweep, subject_protocol))] * num_subjects,
            *[(study_protocol, grid_points(run.final, spec.sweep, study_protocol, _PLACEHOLDER_PROTOCOL))] * num_subjects,
            *[(subject_protocol, grid_points(parent.final, spec.sweep, subject_protocol, _PLACEHOLDER_PROTOCOL))]
            * num_subjects,
            (study_protocol, grid_points(parent.final, spec.sweep, study_protocol, _PLACEHOLDER_PROTOCOL)),
        ]
        passes = prior.num_steps * passes_per_evaluation(prior.guidance)
        plan.work.append(
            PlannedWork(
                run,
                cost,
                3 * cost.gflop_per_forward,
                scored,
                num_trainings=num_subjects,
                class_images=(passes, num_subjects * prior.num_images),
                has_captions=False,
            )
        )
