"""Trainings of the family from further seeds, scored in the same way, to measure training-seed variance."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from isocost.analysis.seed_variance import SEED_SUFFIX, estimate_seed_variance, format_replicate_scores, split_training_name
from isocost.config.study import SeedReplicatesSpec
from isocost.errors import ConfigError
from isocost.experiments.base import TrainingRun, make_run
from isocost.experiments.pretrain import PretrainExperiment
from isocost.models.flops import model_cost
from isocost.sweep.grid import Guides


class SeedReplicatesExperiment(PretrainExperiment):
    """The part `seed_replicates` of a study: only the seed of initial weights, data order and noise differs from the family."""

    def __init__(self, spec: SeedReplicatesSpec, base: PretrainExperiment) -> None:
        super().__init__(base.study, base.assets)
        self.spec, self.baseline = spec, base

    @cached_property
    def runs(self) -> list[TrainingRun]:
        """Every further seed of every replicated size."""
        assert self.baseline is not None, "replicates have a family"
        return [
            self._replicate(run, seed) for run in self.baseline.runs if self._is_replicated(run) for seed in self.spec.seeds
        ]

    def _is_replicated(self, run: TrainingRun) -> bool:
        return not self.spec.widths or run.model.width in self.spec.widths

    def _replicate(self, run: TrainingRun, seed: int) -> TrainingRun:
        spec = run.spec.model_copy(update={"seed": seed})
        gflop = model_cost(run.model, self.study.text_encoder.max_tokens).gflop_per_forward
        return make_run("seed-replicates", run.model, spec, self.stage, gflop, variant=f"{SEED_SUFFIX} {seed}")

    def guides(self, run: TrainingRun) -> Guides:
        """Return the guides of the first training of the same size."""
        assert self.baseline is not None, "replicates have a family"
        original = next(other for other in self.baseline.runs if other.model == run.model)
        return self.baseline.guides(original)

    def checkpoint_metadata(self, run: TrainingRun) -> dict[str, Any]:
        """Return the seed as the variant."""
        return {"task": "seed-replicates", "variant": run.variant}

    def summarise(
        self, table: pd.DataFrame, samples: Mapping[str, np.ndarray]
    ) -> tuple[pd.DataFrame, Mapping[str, np.ndarray]]:
        """Return the rows of the replicated sizes, with those of their first training."""
        names = table["size"].map(split_training_name)
        replicated_sizes = set(names[names.str[1] != ""].str[0])
        return table[names.str[0].isin(replicated_sizes)].reset_index(drop=True), samples

    def findings(self, table: pd.DataFrame) -> dict[str, Any]:
        """Return the variance between trainings of a size, over all settings and at each setting."""
        try:
            seed_variance = str(estimate_seed_variance(table, self.metric))
        except ConfigError as error:
            return {"between trainings": str(error)}
        return {"between trainings": seed_variance, "setting by setting": format_replicate_scores(table, self.metric)}
