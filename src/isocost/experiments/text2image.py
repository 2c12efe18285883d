"""Text-to-image from random weights: the family, and what its points rest on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from isocost.diffusion.generate import CaptionStates
from isocost.experiments.experiment import Run, make_run
from isocost.materials import Materials
from isocost.models.cost import model_cost
from isocost.models.unet import build_unet
from isocost.score.protocol import Protocol
from isocost.score.reference import Reference
from isocost.stages import ModelSpec
from isocost.study import StudySpec
from isocost.train.tasks import Task, TextToImage, training_schedule


class TextToImageExperiment:
    """`train`, `sweep` and `protocol` of a study."""

    beside = None

    def __init__(self, study: StudySpec, materials: Materials) -> None:
        self.study, self.materials = study, materials
        self.sweep, self.protocol_spec, self.metric = study.sweep, study.protocol, study.report.metric

    @cached_property
    def runs(self) -> list[Run]:
        """The trainings that the study asks for, smallest first."""
        channels, side, _ = self.materials.latent_shape
        family, context_width = self.study.family, self.materials.text.context_width
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
            gflop = model_cost(model, self.study.text.max_tokens).gflop_per_forward
            runs.append(make_run("text2image", model, self.study.train, {"cache": self.materials.cache_digest}, gflop))
        return runs

    @property
    def protocol(self) -> Protocol:
        """The study's own."""
        return self.materials.protocol

    def task(self, run: Run) -> Task:
        """Latents with captions from the cache."""
        cache = self.materials.cache
        return TextToImage(run.spec, cache, training_schedule(run.spec), None if cache.has_states else self.materials.text)

    def network(self, run: Run) -> nn.Module:
        """Random weights by the seed; on device "meta" where another process shares them out."""
        torch.manual_seed(run.spec.seed)
        return build_unet(run.model, "cpu" if run.spec.sharding == "none" or self.materials.part.rank == 0 else "meta")

    def facts(self, run: Run) -> dict[str, Any]:
        """Nothing beyond the rest."""
        return {}

    @property
    def reference(self) -> Reference:
        """The held-out pictures."""
        return self.materials.reference

    @property
    def captions(self) -> CaptionStates:
        """The captions of held-out pictures."""
        return self.materials.caption_states

    @property
    def kept(self) -> list[int]:
        """The first picture of each caption, then others."""
        return self.materials.kept

    @property
    def baselines(self) -> Mapping[str, Mapping[str, float]]:
        """Real pictures, as they are and after the codec."""
        return self.materials.floors()

    def findings(self, table: pd.DataFrame) -> dict[str, Any]:
        """Nothing."""
        return {}

    def strips(self) -> Mapping[str, Tensor]:
        """There are none."""
        return {}
