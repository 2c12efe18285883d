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
from isocost.experiments.base import EvalContext, EvalJob, Experiment, TrainingRun, make_run
from isocost.experiments.study_assets import StudyAssets
from isocost.models.factory import build_network
from isocost.models.flops import model_cost
from isocost.training.objectives import Objective, TextToImage, training_schedule


class PretrainExperiment(Experiment):
    """`train`, `sweep` and `protocol` of a study."""

    def __init__(self, study: StudySpec, assets: StudyAssets) -> None:
        self.study, self.assets = study, assets
        self.sweep, self.protocol_spec, self.metric = study.sweep, study.protocol, study.report.metric

    @cached_property
    def runs(self) -> list[TrainingRun]:
        """The trainings that the study asks for, smallest first."""
        channels, side, _ = self.assets.latent_shape
        family, cross_attention_dim = self.study.own.family, self.assets.text_encoder.cross_attention_dim
        runs = []
        for width in sorted(family.widths):
            model = ModelSpec(
                kind=family.kind,
                width=width,
                latent_channels=channels,
                latent_size=side,
                cross_attention_dim=cross_attention_dim,
                layers_per_block=family.layers_per_block,
                num_levels=family.num_levels,
                patch=family.patch,
            )
            gflop = model_cost(model, self.study.text_encoder.max_tokens).gflop_per_forward
            runs.append(make_run("text2image", model, self.study.own.train, self.stage, gflop))
        return runs

    @property
    def stage(self) -> dict[str, Any]:
        """What of the study decides its weights, besides recipe and network."""
        return {"cache": self.assets.cache_digest}

    def task(self, run: TrainingRun, network: nn.Module) -> Objective:
        """Latents with captions from the cache."""
        cache = self.assets.cache
        return TextToImage(
            run.spec, cache, training_schedule(run.spec), None if cache.has_prompt_embeds else self.assets.text_encoder
        )

    def network(self, run: TrainingRun) -> nn.Module:
        """Random weights by the seed; on device "meta" where another process shares them out."""
        torch.manual_seed(run.spec.seed)
        return build_network(run.model, "cpu" if run.spec.sharding == "none" or self.assets.part.rank == 0 else "meta")

    def check(self) -> None:
        """The held-out images' features are made."""
        self.assets.reference  # noqa: B018

    def jobs(self, run: TrainingRun) -> list[EvalJob]:
        """The grid at the last checkpoint, or its races; a point at every snapshot."""
        return self.eval_jobs_of_run(run, self.sweep, self.protocol, self.make_eval_context)

    @property
    def protocol(self) -> Protocol:
        """The study's."""
        return self.assets.protocol

    def make_eval_context(self) -> EvalContext:
        """The captions of the reference."""
        assets = self.assets
        return EvalContext(assets.reference, assets.prompt_embeds, assets.saved_indices, self.protocol_spec.metrics)

    @property
    def protocol_summary(self) -> str:
        """The study's protocol."""
        return self.assets.protocol.sentence()

    @property
    def baselines(self) -> Mapping[str, Mapping[str, float]]:
        """Real images, as they are and after the autoencoder."""
        return self.assets.reconstruction_floors()

    @property
    def sample_labels(self) -> list[str]:
        """Captions."""
        return [self.assets.reference.prompts[i] for i in self.assets.saved_indices]
