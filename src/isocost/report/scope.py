"""The subject of a report: networks that the study trained, or published checkpoints that the study only scored."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from isocost.analysis.costs import REPORT_COSTS

PAPER_COST = "normalized_cost"
_FIRST_COSTS = ("gflop", "ms_per_image", "nfe")
CHECKPOINT_COSTS = (*_FIRST_COSTS, *(cost for cost in REPORT_COSTS if cost not in (*_FIRST_COSTS, PAPER_COST)), PAPER_COST)
"""Costs for published checkpoints in order of preference. The paper's cost ignores the guidance pass, so it is last."""


@dataclass(frozen=True)
class Scope:
    """The kind of networks in a report, and the cost that the report shows first.

    Attributes:
        budget_cost: cost of the budgets, a name of `REPORT_COSTS`.
        trained: false for published checkpoints, which have no snapshots, no training compute and no other experiments.
    """

    budget_cost: str = PAPER_COST
    trained: bool = True

    @property
    def noun(self) -> str:
        """The word for one network."""
        return "size" if self.trained else "checkpoint"

    @property
    def costs(self) -> tuple[str, ...]:
        """All costs in the order of the report; the cost of the budgets is first."""
        costs = REPORT_COSTS if self.trained else CHECKPOINT_COSTS
        return (self.budget_cost, *(cost for cost in costs if cost != self.budget_cost))


TRAINED = Scope()


def checkpoint_scope(table: pd.DataFrame) -> Scope:
    """The scope of published checkpoints. The budgets are in the first of `CHECKPOINT_COSTS` that all final points have."""
    finished = table[table["is_final"].astype(bool)]
    complete = [cost for cost in CHECKPOINT_COSTS if cost in finished and finished[cost].notna().all()]
    return Scope(complete[0] if complete else PAPER_COST, trained=False)
