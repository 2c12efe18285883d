"""The family trained again from other seeds, each of a size scored as the first one was: how much of a difference is luck."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from isocost.analysis.seed_variance import SEED_SUFFIX, estimate_seed_variance, side_by_side, training_of
from isocost.config.study import SeedReplicatesSpec
from isocost.errors import ConfigError
from isocost.experiments.base import TrainingRun, make_run
from isocost.experiments.pretrain import PretrainExperiment
from isocost.models.flops import model_cost


class SeedReplicatesExperiment(PretrainExperiment):
    """`seed_replicates` of a study: everything is the family's but the seed of initial weights, order and noise."""

    def __init__(self, spec: SeedReplicatesSpec, of: PretrainExperiment) -> None:
        super().__init__(of.study, of.assets)
        self.spec, self.baseline = spec, of

    @cached_property
    def runs(self) -> list[TrainingRun]:
        """Every further seed of every size that is repeated."""
        assert self.baseline is not None, "repeats are of a family"
        return [self._again(run, seed) for run in self.baseline.runs if self._is_repeated(run) for seed in self.spec.seeds]

    def _is_repeated(self, run: TrainingRun) -> bool:
        return not self.spec.widths or run.model.width in self.spec.widths

    def _again(self, run: TrainingRun, seed: int) -> TrainingRun:
        spec = run.spec.model_copy(update={"seed": seed})
        gflop = model_cost(run.model, self.study.text_encoder.max_tokens).gflop_per_forward
        return make_run("seed-replicates", run.model, spec, self.stage, gflop, variant=f"{SEED_SUFFIX} {seed}")

    def facts(self, run: TrainingRun) -> dict[str, Any]:
        """Which seed it is of."""
        return {"task": "seed-replicates", "variant": run.variant}

    def summarise(
        self, table: pd.DataFrame, samples: Mapping[str, np.ndarray]
    ) -> tuple[pd.DataFrame, Mapping[str, np.ndarray]]:
        """Sizes that were trained again, beside their first training."""
        names = table["size"].map(training_of)
        again = set(names[names.str[1] != ""].str[0])
        return table[names.str[0].isin(again)].reset_index(drop=True), samples

    def findings(self, table: pd.DataFrame) -> dict[str, Any]:
        """How far trainings of a size are apart, over all settings and at each."""
        try:
            seed_variance = str(estimate_seed_variance(table, self.metric))
        except ConfigError as error:
            return {"between trainings": str(error)}
        return {"between trainings": seed_variance, "setting by setting": side_by_side(table, self.metric)}
