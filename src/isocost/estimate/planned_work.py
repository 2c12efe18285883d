"""What a study asks for, from its file alone: trainings of every size with their snapshots, and the points of their checkpoints.

The trainings are those of the experiments themselves, over materials of which nothing is known but their shapes. Every value of
guidance in a sweep is a point here.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from isocost.estimate.component_shapes import Shapes
from isocost.evaluation.protocol import Protocol
from isocost.experiments.base import TrainingRun, make_run
from isocost.experiments.distillation import DistillExperiment, StudentRun
from isocost.experiments.pretrain import PretrainExperiment
from isocost.experiments.seed_replicates import SeedReplicatesExperiment
from isocost.experiments.study_assets import StudyAssets
from isocost.experiments.superres import SuperresExperiment
from isocost.models.flops import ModelCost, model_cost
from isocost.sampling.request import num_passes
from isocost.sweep.grid import SweepPoint, grid_points, snapshot_point
from isocost.utils.artifact_store import Store

NUM_SUBJECTS, NUM_PROMPTS = 30, 25
"""Of google/dreambooth (arXiv 2208.12242, section 4.1)."""
_UNSEEN = Protocol(0, 0, 0, "", "", "", "none", 0, 0)
"""Of images that were not read: it names points apart from each other, and from no other protocol's."""


class ShapeOnlyAssets(StudyAssets):
    """Materials of which shapes alone are known. No artefact has the digests that follow from them."""

    def __init__(self, study: StudySpec, shapes: Shapes) -> None:
        super().__init__(study, Store(study.name))
        self.shapes = shapes

    def source_key(self, part: str) -> dict[str, Any]:
        """Nothing of the images enters."""
        return {"unseen": part}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, side, side."""
        side = self.study.data.resolution // self.shapes.autoencoder.factor
        return self.shapes.autoencoder.latent_channels, side, side

    @cached_property
    def text_encoder(self) -> Any:
        """Has the width of the states, and reads no caption."""
        return self.shapes.text_encoder


@dataclass(frozen=True)
class PlannedWork:
    """One size of one task.

    Attributes:
        run: its training, or one of several that are alike.
        cost: of the network.
        num_trainings: how many are alike.
        gflop_per_image: of training, the captions' encoder and the autoencoder left out.
        points: by what they are scored by; of all trainings together.
        drawn_before: evaluations and images of what is drawn before the training.
        reads_captions: whether its images come with captions that may have to be encoded in each step.
        encodes_images: whether each image of the training is encoded in its step.
    """

    run: TrainingRun
    cost: ModelCost
    gflop_per_image: float
    points: Sequence[tuple[ProtocolSpec, Sequence[SweepPoint]]]
    num_trainings: int = 1
    drawn_before: tuple[int, int] = (0, 0)
    reads_captions: bool = True
    encodes_images: bool = False

    @property
    def training_images(self) -> int:
        """Of all trainings together."""
        return self.num_trainings * max(self.run.checkpoints)

    @property
    def variant(self) -> str:
        """What sets it apart from others of the task and size."""
        return "" if self.run.task == "dreambooth" else self.run.variant


@dataclass
class Plan:
    """All that a study asks for; what had to be assumed, and which parts its file does not say enough of."""

    asked: list[PlannedWork] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)
    not_counted: list[str] = field(default_factory=list)


def plan(study: StudySpec, shapes: Shapes) -> Plan:
    """The study's sizes, text-to-image first.

    Raises:
        ConfigError: a width, a latent or a scale does not fit.
    """
    made = Plan()
    assets = ShapeOnlyAssets(study, shapes)
    tokens = study.text_encoder.max_tokens
    family = PretrainExperiment(study, assets)
    for run in family.runs:
        cost = model_cost(run.model, tokens)
        points = _run_points(run, study.sweep, study.protocol)
        made.asked.append(PlannedWork(run, cost, 3 * cost.gflop_per_forward, [(study.protocol, points)]))
    if study.seed_replicates is not None:
        for run in SeedReplicatesExperiment(study.seed_replicates, family).runs:
            cost = model_cost(run.model, tokens)
            made.asked.append(
                PlannedWork(
                    run, cost, 3 * cost.gflop_per_forward, [(study.protocol, _run_points(run, study.sweep, study.protocol))]
                )
            )
    if study.distill is not None:
        _add_students(made, "distill", study.distill, assets, family)
    if study.superres is not None:
        if study.superres.parents:
            made.not_counted.append("superres: its parents are checkpoints whose networks the study does not say")
        else:
            _add_superres(made, assets, family)
    if study.dreambooth is not None:
        _add_dreambooth(made, study.dreambooth, assets, family)
    return made


def _run_points(run: TrainingRun, sweep: SweepSpec, protocol: ProtocolSpec) -> list[SweepPoint]:
    """As of `sweep.points.run_points`, whatever the search: the grid at the last checkpoint, one point at every snapshot."""
    names = tuple(run.checkpoints.values())
    points = grid_points(run.final, sweep, protocol, _UNSEEN)
    if len(names) > 1:
        points += [snapshot_point(name, sweep, protocol, _UNSEEN) for name in names]
    return list({point.digest: point for point in points}.values())


def _add_superres(made: Plan, assets: ShapeOnlyAssets, family: PretrainExperiment) -> None:
    spec = assets.study.superres
    assert spec is not None, "asked for by name"
    tuned = SuperresExperiment(spec, assets, family)
    for run in tuned.runs:
        cost = model_cost(run.model, assets.study.text_encoder.max_tokens)
        points = _run_points(run, spec.sweep, spec.protocol)
        asked = PlannedWork(run, cost, 3 * cost.gflop_per_forward, [(spec.protocol, points)], encodes_images=True)
        made.asked.append(asked)
    if spec.distill is not None:
        _add_students(made, "superres-distill", spec.distill, assets, tuned)
    made.not_counted.append("superres: its low-resolution images, which processors make, and scores in pairs")


def _add_students(
    made: Plan, name: TaskName, spec: DistillSpec, assets: ShapeOnlyAssets, of: PretrainExperiment | SuperresExperiment
) -> None:
    if spec.teachers:
        made.not_counted.append(f"{name}: its teachers are checkpoints whose networks the study does not say")
        return
    for run in DistillExperiment(name, spec, assets, of).runs:
        assert isinstance(run, StudentRun), "students come from DistillExperiment"
        cost = model_cost(run.model, assets.study.text_encoder.max_tokens)
        if run.num_steps is None:
            points = _run_points(run, spec.sweep, of.protocol_spec)
        else:  # a progressive stage is drawn at its own number of steps, the last one at fewer as well
            is_last = run.num_steps == spec.stages[-1]
            steps = tuple(n for n in spec.sweep.num_steps if n == run.num_steps or (is_last and n < run.num_steps))
            own = spec.sweep.model_copy(update={"solvers": (SolverSpec(),), "num_steps": steps})
            points = grid_points(run.final, own, of.protocol_spec, _UNSEEN)
        beside = isinstance(of, SuperresExperiment)
        scored = [(of.protocol_spec, points)]
        made.asked.append(PlannedWork(run, cost, run.gflop_per_image, scored, encodes_images=beside))


def _add_dreambooth(made: Plan, spec: DreamboothSpec, assets: ShapeOnlyAssets, family: PretrainExperiment) -> None:
    """Every subject from every size; scored on its prompts and on the study's captions, before and after."""
    study, subjects = assets.study, spec.subjects
    if isinstance(subjects, PhotographedSubjects):
        number, most = len(subjects.names) or NUM_SUBJECTS, NUM_PROMPTS
        said = "as google/dreambooth has" if not subjects.names else "the prompts as of google/dreambooth"
    else:
        number, most, said = subjects.num_subjects, len(PROMPT_BACKGROUNDS), "as the embedded ones have"
    num_prompts = min(subjects.num_prompts or most, most)
    made.assumptions.append(f"DreamBooth: {number} subjects of {num_prompts} prompts, {said}, each of a class of its own.")
    if spec.train_text_encoder:
        made.not_counted.append("dreambooth.train_text_encoder: what the caption encoder takes to learn")
    of_subject = spec.protocol.model_copy(update={"num_images": num_prompts * spec.num_images})
    of_study = study.protocol.model_copy(update={"num_images": spec.num_prior_images})
    prior = spec.prior
    for parent in family.runs:
        cost = model_cost(parent.model, study.text_encoder.max_tokens)
        run = make_run("dreambooth", parent.model, spec.train, {"task": "dreambooth"}, cost.gflop_per_forward)
        scored = [
            *[(of_subject, _run_points(run, spec.sweep, of_subject))] * number,
            *[(of_study, grid_points(run.final, spec.sweep, of_study, _UNSEEN))] * number,
            *[(of_subject, grid_points(parent.final, spec.sweep, of_subject, _UNSEEN))] * number,
            (of_study, grid_points(parent.final, spec.sweep, of_study, _UNSEEN)),
        ]
        evaluations = prior.num_steps * num_passes(prior.guidance)
        made.asked.append(
            PlannedWork(
                run,
                cost,
                3 * cost.gflop_per_forward,
                scored,
                num_trainings=number,
                drawn_before=(evaluations, number * prior.num_images),
                reads_captions=False,
            )
        )
