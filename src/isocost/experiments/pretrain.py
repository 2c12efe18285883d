"""Text-to-image training of the model family from random weights, and the evaluation of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn

from isocost.config.model import ModelSpec
from isocost.config.study import StudySpec
from isocost.evaluation.paired import PairedComparer
from isocost.evaluation.protocol import Protocol
from isocost.experiments.base import EvalContext, EvalJob, Experiment, TrainingRun, make_run
from isocost.experiments.study_assets import StudyAssets
from isocost.models.factory import build_network
from isocost.models.flops import model_cost
from isocost.training.objectives import Objective, TextToImage, training_schedule


class PretrainExperiment(Experiment):
    """The parts `family`, `train`, `sweep` and `protocol` of a study."""

    def __init__(self, study: StudySpec, assets: StudyAssets) -> None:
        self.study, self.assets = study, assets
        self.sweep, self.protocol_spec, self.metric = study.sweep, study.protocol, study.report.metric

    @cached_property
    def runs(self) -> list[TrainingRun]:
        """One training per width, smallest first."""
        channels, latent_size, _ = self.assets.latent_shape
        family, cross_attention_dim = self.study.training_parts.family, self.assets.text_encoder.cross_attention_dim
        runs = []
        for width in sorted(family.widths):
            model = ModelSpec(
                kind=family.kind,
                width=width,
                latent_channels=channels,
                latent_size=latent_size,
                cross_attention_dim=cross_attention_dim,
                layers_per_block=family.layers_per_block,
                num_levels=family.num_levels,
                patch=family.patch,
            )
            gflop = model_cost(model, self.study.text_encoder.max_tokens).gflop_per_forward
            runs.append(make_run("text2image", model, self.study.training_parts.train, self.stage, gflop))
        return runs

    @property
    def stage(self) -> dict[str, Any]:
        """Digest inputs of a training besides the recipe and the network."""
        return {"cache": self.assets.cache_digest}

    def objective(self, run: TrainingRun, network: nn.Module) -> Objective:
        """Train on latents and captions of the latent cache, which is computed first if it is missing."""
        cache = self.assets.load_or_build_latent_cache()
        return TextToImage(
            run.spec, cache, training_schedule(run.spec), None if cache.has_prompt_embeds else self.assets.text_encoder
        )

    def network(self, run: TrainingRun) -> nn.Module:
        """Build the network with random weights by the seed; on device "meta" if another process distributes the weights."""
        torch.manual_seed(run.spec.seed)
        return build_network(run.model, "cpu" if run.spec.sharding == "none" or self.assets.process.rank == 0 else "meta")

    def validate(self) -> None:
        """Compute the features of the reference images.

        Raises:
            ConfigError: there are too few reference images, or the labels that alignment needs are missing.
        """
        self.assets.prepare_reference()

    def labels(self, run: TrainingRun) -> dict[str, str]:
        """Return the task and the size: an equal training can be a seed replicate in another study."""
        size = model_cost(run.model, self.study.text_encoder.max_tokens).size
        return {"task": run.task, "size": f"{size} {run.variant}".rstrip()}

    def jobs(self, run: TrainingRun) -> list[EvalJob]:
        """Return the grid or the search cells of the last checkpoint, and a point at every snapshot."""
        return self.eval_jobs_of_run(run, self.sweep, self.protocol, self.make_eval_context)

    @property
    def protocol(self) -> Protocol:
        """The protocol of the study."""
        return self.assets.protocol

    def make_eval_context(self) -> EvalContext:
        """Build the context with the prompts of the reference set."""
        assets = self.assets
        return EvalContext(assets.reference, assets.prompt_embeds, assets.saved_indices, self.protocol_spec.metrics)

    def comparer(self) -> PairedComparer:
        """Return the paired differences between points, by the reference set of the study."""
        return self.assets.comparer(lambda: self.assets.reference, self.protocol_spec.metrics)

    @property
    def protocol_summary(self) -> str:
        """One sentence about the study's protocol."""
        return self.assets.protocol.sentence()

    @property
    def baselines(self) -> Mapping[str, Mapping[str, float]]:
        """Scores of real images after the autoencoder and before it."""
        return self.assets.reconstruction_floors()

    @property
    def sample_labels(self) -> list[str]:
        """Prompts of the saved samples."""
        return [self.assets.reference.prompts[i] for i in self.assets.saved_indices]
