"""Checkpoints that others have trained: each is a run whose one checkpoint is there already."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial

from torch import nn

from isocost.config.study import StudySpec
from isocost.config.sweep import SweepSpec
from isocost.config.training import TrainSpec
from isocost.diffusion.solvers import build_table
from isocost.errors import RequestError
from isocost.evaluation.protocol import Protocol
from isocost.experiments.base import Bench, Experiment, Job, Run
from isocost.experiments.study_assets import Materials
from isocost.models.checkpoint import CheckpointInfo, given_info
from isocost.models.components import ReducedCodec, pipeline_codec
from isocost.models.pretrained.lora import split_loras
from isocost.models.pretrained.pipeline_config import find_base, source_digest
from isocost.models.pretrained.prompt_encoder import PromptEncoder
from isocost.sampling.generate import CaptionStates, schedule_of
from isocost.training.objectives import Task
from isocost.utils.device import best_device

TRAINED_ELSEWHERE = TrainSpec(num_images=1, batch_size=1)
"""Stands where the recipe of a training would."""


class GivenExperiment(Experiment):
    """`checkpoints`, `sweep` and `protocol` of a study.

    A few-step student is swept with the samplers that are `lcm`, others with those that are not, and one with LoRAs, which may
    make a student of it, with all that its schedule takes. Pictures larger than
    `data.resolution` are reduced to it before they are scored.
    """

    def __init__(self, study: StudySpec, materials: Materials) -> None:
        self.study, self.materials = study, materials
        self.sweep, self.protocol_spec, self.metric = study.sweep, study.protocol, study.report.metric

    @cached_property
    def infos(self) -> dict[str, CheckpointInfo]:
        """What the checkpoints say of themselves, by the digest of their content.

        Raises:
            RequestError: one is not read here, or two are the same or cannot be told apart in a table.
        """
        infos: dict[str, CheckpointInfo] = {}
        labels: dict[str, str] = {}
        for path in self.study.checkpoints:
            info, name = given_info(path), source_digest(path)
            if info.label in labels:
                other = labels[info.label]
                raise RequestError(f"checkpoints: {path} and {other} are both called {info.label}; rename a folder")
            if name in infos:
                raise RequestError(f"checkpoints: {path} is the same as another one, file by file")
            infos[name], labels[info.label] = info, path
        return infos

    @cached_property
    def runs(self) -> list[Run]:
        """One a checkpoint, smallest first."""
        by_size = sorted(self.infos.items(), key=lambda item: (item[1].num_parameters, item[1].label))
        return [
            Run("text2image", info.model, TRAINED_ELSEWHERE, name, {0: name}, variant=info.variant, is_given=True)
            for name, info in by_size
        ]

    def given(self, run: Run) -> CheckpointInfo:
        """What the checkpoint says of itself."""
        return self.infos[run.final]

    def task(self, run: Run, network: nn.Module) -> Task:
        """There is none."""
        raise AssertionError("what is given is not trained")

    def network(self, run: Run) -> nn.Module:
        """There is none to train."""
        raise AssertionError("what is given is not trained")

    def check(self) -> None:
        """Every checkpoint takes what the sweep asks of it, and the held-out pictures' features are made.

        Raises:
            RequestError: a checkpoint draws smaller pictures than data.resolution, or does not take a sampler.
        """
        for run in self.runs:
            info = self.given(run)
            if info.resolution < self.study.data.resolution:
                raise RequestError(
                    f"data.resolution: {self.study.data.resolution}, and {info.variant} draws {info.resolution} pixels; "
                    "pictures are reduced, not enlarged: take the smallest side among the checkpoints"
                )
            sweep = self.sweep_of(info)
            for sampler in sweep.samplers:
                for num_steps in sweep.num_steps:
                    build_table(sampler, num_steps, schedule_of(info))
        self.materials.reference  # noqa: B018

    def sweep_of(self, info: CheckpointInfo) -> SweepSpec:
        """The sweep with the samplers that a checkpoint is drawn with.

        Raises:
            RequestError: the sweep names none.
        """
        if info.given is not None and split_loras(info.given.path)[1]:
            return self._sweep_of_added(info)
        is_student = info.sampler.name == "lcm"
        samplers = tuple(one for one in self.sweep.samplers if (one.name == "lcm") is is_student)
        if not samplers:
            wanted = "a few-step student, which takes lcm" if is_student else "no few-step student, which lcm is for"
            raise RequestError(f"sweep.samplers: none for {info.variant}: it is {wanted}")
        return self.sweep.model_copy(update={"samplers": samplers})

    def _sweep_of_added(self, info: CheckpointInfo) -> SweepSpec:
        samplers = tuple(one for one in self.sweep.samplers if not (one.name == "lcm" and schedule_of(info).is_flow))
        if not samplers:
            raise RequestError(f"sweep.samplers: none for {info.variant}: it is a flow, which takes no lcm")
        return self.sweep.model_copy(update={"samplers": samplers})

    def jobs(self, run: Run) -> list[Job]:
        """The grid of the checkpoint, or its races."""
        return self.jobs_of_run(run, self.sweep_of(self.given(run)), self.protocol, partial(self._bench, run))

    def _bench(self, run: Run) -> Bench:
        """The captions of the reference as this checkpoint encodes them, and its codec."""
        materials, info = self.materials, self.given(run)
        assert info.given is not None
        folder = find_base(info.given.path)
        states = CaptionStates.of(materials.reference.captions, PromptEncoder(folder, info, best_device()))
        codec = pipeline_codec(folder, best_device())
        side = self.study.data.resolution
        reduced = codec if info.resolution == side else ReducedCodec(codec, side)
        return Bench(materials.reference, states, materials.kept, self.protocol_spec.distances, codec=reduced)

    @property
    def protocol(self) -> Protocol:
        """The study's."""
        return self.materials.protocol

    @property
    def protocol_words(self) -> str:
        """The study's protocol."""
        return self.materials.protocol.sentence()

    @property
    def baselines(self) -> Mapping[str, Mapping[str, float]]:
        """None: without training pictures there are no other real ones to compare."""
        return {"real": {}}

    @property
    def pictured(self) -> list[str]:
        """Captions."""
        return [self.materials.reference.captions[i] for i in self.materials.kept]
