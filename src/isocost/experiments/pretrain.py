"""Text-to-image from random weights: the family, and what its points rest on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn

from isocost.config.model import ModelSpec
from isocost.config.study import StudySpec
from isocost.evaluation.protocol import Protocol
from isocost.experiments.base import Bench, Experiment, Job, Run, make_run
from isocost.experiments.study_assets import Materials
from isocost.models.factory import build_network
from isocost.models.flops import model_cost
from isocost.training.objectives import Task, TextToImage, training_schedule


class TextToImageExperiment(Experiment):
    """`train`, `sweep` and `protocol` of a study."""

    def __init__(self, study: StudySpec, materials: Materials) -> None:
        self.study, self.materials = study, materials
        self.sweep, self.protocol_spec, self.metric = study.sweep, study.protocol, study.report.metric

    @cached_property
    def runs(self) -> list[Run]:
        """The trainings that the study asks for, smallest first."""
        channels, side, _ = self.materials.latent_shape
        family, context_width = self.study.own.family, self.materials.text.context_width
        runs = []
        for width in sorted(family.widths):
            model = ModelSpec(
                kind=family.kind,
                width=width,
                latent_channels=channels,
                latent_side=side,
                context_width=context_width,
                layers_per_block=family.layers_per_block,
                num_levels=family.num_levels,
                patch=family.patch,
            )
            gflop = model_cost(model, self.study.text.max_tokens).gflop_per_forward
            runs.append(make_run("text2image", model, self.study.own.train, self.stage, gflop))
        return runs

    @property
    def stage(self) -> dict[str, Any]:
        """What of the study decides its weights, besides recipe and network."""
        return {"cache": self.materials.cache_digest}

    def task(self, run: Run, network: nn.Module) -> Task:
        """Latents with captions from the cache."""
        cache = self.materials.cache
        return TextToImage(run.spec, cache, training_schedule(run.spec), None if cache.has_states else self.materials.text)

    def network(self, run: Run) -> nn.Module:
        """Random weights by the seed; on device "meta" where another process shares them out."""
        torch.manual_seed(run.spec.seed)
        return build_network(run.model, "cpu" if run.spec.sharding == "none" or self.materials.part.rank == 0 else "meta")

    def check(self) -> None:
        """The held-out pictures' features are made."""
        self.materials.reference  # noqa: B018

    def jobs(self, run: Run) -> list[Job]:
        """The grid at the last checkpoint, or its races; a point at every mark."""
        return self.jobs_of_run(run, self.sweep, self.protocol, self.make_bench)

    @property
    def protocol(self) -> Protocol:
        """The study's."""
        return self.materials.protocol

    def make_bench(self) -> Bench:
        """The captions of the reference."""
        materials = self.materials
        return Bench(materials.reference, materials.caption_states, materials.kept, self.protocol_spec.distances)

    @property
    def protocol_words(self) -> str:
        """The study's protocol."""
        return self.materials.protocol.sentence()

    @property
    def baselines(self) -> Mapping[str, Mapping[str, float]]:
        """Real pictures, as they are and after the codec."""
        return self.materials.floors()

    @property
    def pictured(self) -> list[str]:
        """Captions."""
        return [self.materials.reference.captions[i] for i in self.materials.kept]
