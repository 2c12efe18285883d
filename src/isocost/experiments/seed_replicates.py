"""The family trained again from other seeds, each of a size scored as the first one was: how much of a difference is luck."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from isocost.analysis.seed_variance import SEED_WORD, side_by_side, training_luck, training_of
from isocost.config.study import RepeatsSpec
from isocost.errors import RequestError
from isocost.experiments.base import Run, make_run
from isocost.experiments.pretrain import TextToImageExperiment
from isocost.models.flops import model_cost


class RepeatsExperiment(TextToImageExperiment):
    """`repeats` of a study: everything is the family's but the seed of initial weights, order and noise."""

    def __init__(self, spec: RepeatsSpec, of: TextToImageExperiment) -> None:
        super().__init__(of.study, of.materials)
        self.spec, self.compared_with = spec, of

    @cached_property
    def runs(self) -> list[Run]:
        """Every further seed of every size that is repeated."""
        assert self.compared_with is not None, "repeats are of a family"
        return [self._again(run, seed) for run in self.compared_with.runs if self._is_repeated(run) for seed in self.spec.seeds]

    def _is_repeated(self, run: Run) -> bool:
        return not self.spec.widths or run.model.width in self.spec.widths

    def _again(self, run: Run, seed: int) -> Run:
        spec = run.spec.model_copy(update={"seed": seed})
        gflop = model_cost(run.model, self.study.text.max_tokens).gflop_per_forward
        return make_run("repeats", run.model, spec, self.stage, gflop, variant=f"{SEED_WORD} {seed}")

    def facts(self, run: Run) -> dict[str, Any]:
        """Which seed it is of."""
        return {"task": "repeats", "variant": run.variant}

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
            luck = str(training_luck(table, self.metric))
        except RequestError as error:
            return {"between trainings": str(error)}
        return {"between trainings": luck, "setting by setting": side_by_side(table, self.metric)}
