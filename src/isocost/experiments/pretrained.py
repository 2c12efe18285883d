"""Checkpoints that others have trained: each is a run whose one checkpoint is there already."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial

from torch import nn

from isocost.config.study import StudySpec
from isocost.config.sweep import SweepSpec
from isocost.config.training import TrainSpec
from isocost.diffusion.solvers import solver_coefficients
from isocost.errors import ConfigError
from isocost.evaluation.protocol import Protocol
from isocost.experiments.base import EvalContext, EvalJob, Experiment, TrainingRun
from isocost.experiments.study_assets import StudyAssets
from isocost.models.checkpoint import CheckpointInfo, pretrained_info
from isocost.models.components import DownsamplingDecoder, load_pipeline_autoencoder
from isocost.models.pretrained.lora import split_loras
from isocost.models.pretrained.pipeline_config import find_base, source_digest
from isocost.models.pretrained.prompt_encoder import PipelineTextEncoder
from isocost.sampling.generate import PromptEmbeds, schedule_of
from isocost.training.objectives import Objective
from isocost.utils.device import best_device

TRAINED_ELSEWHERE = TrainSpec(num_images=1, batch_size=1)
"""Stands where the recipe of a training would."""


class PretrainedExperiment(Experiment):
    """`checkpoints`, `sweep` and `protocol` of a study.

    A few-step student is swept with the solvers that are `lcm`, others with those that are not, and one with LoRAs, which may
    make a student of it, with all that its schedule takes. Images larger than
    `data.resolution` are reduced to it before they are scored.
    """

    def __init__(self, study: StudySpec, assets: StudyAssets) -> None:
        self.study, self.assets = study, assets
        self.sweep, self.protocol_spec, self.metric = study.sweep, study.protocol, study.report.metric

    @cached_property
    def infos(self) -> dict[str, CheckpointInfo]:
        """What the checkpoints say of themselves, by the digest of their content.

        Raises:
            ConfigError: one is not read here, or two are the same or cannot be told apart in a table.
        """
        infos: dict[str, CheckpointInfo] = {}
        labels: dict[str, str] = {}
        for path in self.study.checkpoints:
            info, name = pretrained_info(path), source_digest(path)
            if info.label in labels:
                other = labels[info.label]
                raise ConfigError(f"checkpoints: {path} and {other} are both called {info.label}; rename a folder")
            if name in infos:
                raise ConfigError(f"checkpoints: {path} is the same as another one, file by file")
            infos[name], labels[info.label] = info, path
        return infos

    @cached_property
    def runs(self) -> list[TrainingRun]:
        """One a checkpoint, smallest first."""
        by_size = sorted(self.infos.items(), key=lambda item: (item[1].num_parameters, item[1].label))
        return [
            TrainingRun("text2image", info.model, TRAINED_ELSEWHERE, name, {0: name}, variant=info.variant, is_pretrained=True)
            for name, info in by_size
        ]

    def pretrained(self, run: TrainingRun) -> CheckpointInfo:
        """What the checkpoint says of itself."""
        return self.infos[run.final]

    def task(self, run: TrainingRun, network: nn.Module) -> Objective:
        """There is none."""
        raise AssertionError("what is given is not trained")

    def network(self, run: TrainingRun) -> nn.Module:
        """There is none to train."""
        raise AssertionError("what is given is not trained")

    def check(self) -> None:
        """Every checkpoint takes what the sweep asks of it, and the held-out images' features are made.

        Raises:
            ConfigError: a checkpoint draws smaller images than data.resolution, or does not take a solver.
        """
        for run in self.runs:
            info = self.pretrained(run)
            if info.resolution < self.study.data.resolution:
                raise ConfigError(
                    f"data.resolution: {self.study.data.resolution}, and {info.variant} draws {info.resolution} pixels; "
                    "images are reduced, not enlarged: take the smallest side among the checkpoints"
                )
            sweep = self.sweep_of(info)
            for solver in sweep.solvers:
                for num_steps in sweep.num_steps:
                    solver_coefficients(solver, num_steps, schedule_of(info))
        self.assets.reference  # noqa: B018

    def sweep_of(self, info: CheckpointInfo) -> SweepSpec:
        """The sweep with the solvers that a checkpoint is drawn with.

        Raises:
            ConfigError: the sweep names none.
        """
        if info.pretrained is not None and split_loras(info.pretrained.path)[1]:
            return self._sweep_of_added(info)
        is_student = info.solver.name == "lcm"
        solvers = tuple(one for one in self.sweep.solvers if (one.name == "lcm") is is_student)
        if not solvers:
            wanted = "a few-step student, which takes lcm" if is_student else "no few-step student, which lcm is for"
            raise ConfigError(f"sweep.solvers: none for {info.variant}: it is {wanted}")
        return self.sweep.model_copy(update={"solvers": solvers})

    def _sweep_of_added(self, info: CheckpointInfo) -> SweepSpec:
        solvers = tuple(one for one in self.sweep.solvers if not (one.name == "lcm" and schedule_of(info).is_flow))
        if not solvers:
            raise ConfigError(f"sweep.solvers: none for {info.variant}: it is a flow, which takes no lcm")
        return self.sweep.model_copy(update={"solvers": solvers})

    def jobs(self, run: TrainingRun) -> list[EvalJob]:
        """The grid of the checkpoint, or its races."""
        return self.eval_jobs_of_run(run, self.sweep_of(self.pretrained(run)), self.protocol, partial(self._eval_context, run))

    def _eval_context(self, run: TrainingRun) -> EvalContext:
        """The captions of the reference as this checkpoint encodes them, and its autoencoder."""
        assets, info = self.assets, self.pretrained(run)
        assert info.pretrained is not None
        folder = find_base(info.pretrained.path)
        states = PromptEmbeds.of(assets.reference.prompts, PipelineTextEncoder(folder, info, best_device()))
        autoencoder = load_pipeline_autoencoder(folder, best_device())
        side = self.study.data.resolution
        reduced = autoencoder if info.resolution == side else DownsamplingDecoder(autoencoder, side)
        return EvalContext(assets.reference, states, assets.saved_indices, self.protocol_spec.metrics, autoencoder=reduced)

    @property
    def protocol(self) -> Protocol:
        """The study's."""
        return self.assets.protocol

    @property
    def protocol_summary(self) -> str:
        """The study's protocol."""
        return self.assets.protocol.sentence()

    @property
    def baselines(self) -> Mapping[str, Mapping[str, float]]:
        """None: without training images there are no other real ones to compare."""
        return {"real": {}}

    @property
    def sample_labels(self) -> list[str]:
        """Captions."""
        return [self.assets.reference.prompts[i] for i in self.assets.saved_indices]
