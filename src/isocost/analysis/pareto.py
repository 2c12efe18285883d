"""The best guidance, the Pareto set and the best configuration within a budget, from a results table.

The columns of a table are listed in `isocost.analysis.results_table`. Only the points of final checkpoints compete; the points
of earlier training snapshots belong to the curve over training compute.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from isocost.analysis.costs import cost_of, format_unmeasured, is_measured
from isocost.analysis.formatting import ROUNDING, decimal_exponent, format_configuration, format_guidance, format_score
from isocost.analysis.paired_decisions import PairedDecision, Resamples, decide, decide_together
from isocost.analysis.results_table import (
    CELL_COLUMNS,
    best_per_group,
    classifier_free,
    final_points,
    is_within_budget,
    rank_points,
)
from isocost.errors import ConfigError
from isocost.evaluation.metric_registry import metric_of

BEYOND_DATA_FACTOR = 1.1
"""A budget this much larger than the highest cost of all points is called beyond the data."""


@dataclass(frozen=True)
class Configuration:
    """A final point as a candidate: its sampling configuration, cost and score.

    Attributes:
        cost: in the unit of the cost that was asked for.
        value: the score; `low` and `high` are the ends of its 95 % interval, None without one.
        guide, guide_checkpoint: label and digest of the guide network; None without one.
        guide_null_prompt: whether the guide gets the empty prompt.
        guidance_interval, guidance_schedule: as JSON; None without.
        guidance_at_boundary: whether the guidance is the lowest or the highest that was tried (`final_points`).
        dtype, compiled: of the network.
        seed: of the noise.
        replaced_scheduler: scheduler class of a published checkpoint, if `solver` stands in for it.
        vae_dtype, vae_tile_size, vae_slicing: settings of the autoencoder (`isocost.config.sampling.VaeSpec`).
    """

    point: str
    checkpoint: str
    size: str
    solver: str
    num_steps: int
    guidance: float
    cost: float
    value: float
    low: float | None
    high: float | None
    guidance_at_boundary: bool
    dtype: str = "fp32"
    compiled: bool = False
    seed: int = 0
    guide: str | None = None
    guide_checkpoint: str | None = None
    guide_null_prompt: bool = False
    guidance_interval: str | None = None
    guidance_schedule: str | None = None
    replaced_scheduler: str = ""
    vae_dtype: str = "fp32"
    vae_tile_size: int | None = None
    vae_slicing: bool = False

    @property
    def score(self) -> str:
        """The score with its interval: "0.123 [0.120, 0.126]"."""
        return format_score(self.value, self.low, self.high)

    def __str__(self) -> str:
        guidance = format_guidance(self.guidance, self.guide, self.guidance_interval, self.guidance_schedule)
        return format_configuration(self.size, self.num_steps, guidance, self.solver)


@dataclass(frozen=True)
class BudgetChoice:
    """The best configuration within a budget, and the best one of any other size.

    Attributes:
        num_points: number of points within the budget.
        best: None if the budget is below the cost of every point.
        runner_up: the best configuration of another size; None if no other size fits.
        undecided: whether the paired decision does not separate `best` and `runner_up`. Without one: whether their intervals
            overlap, or one of the two has no interval.
        beyond_data: whether the budget exceeds the cost of the most expensive point by more than 10 %, so that a still more
            expensive configuration could be better.
        cheapest: of all points, whether they fit or not.
        most_expensive: of all points, whether they fit or not.
        decision: the paired difference between the sizes of `best` and `runner_up`; None without resamples of all their points.
    """

    budget: float
    cost: str
    metric: str
    num_points: int
    best: Configuration | None
    runner_up: Configuration | None
    undecided: bool
    beyond_data: bool
    cheapest: Configuration
    most_expensive: Configuration
    decision: PairedDecision | None = None


def best_guidance(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The row with the best guidance for every (size, solver, num_steps), with the column `guidance_at_boundary`.

    This is the rule of arXiv 2404.01367 (section on sampling efficiency), which knows classifier-free guidance only. So points
    with a guide, an interval or a schedule take part only where a table has no other points. The best of several noisy scores
    is optimistic; its interval does not include the effect of this selection.
    """
    rows = final_points(table, metric)
    plain = classifier_free(rows)
    return best_per_group(rows if plain.empty else plain, metric, CELL_COLUMNS)


def pareto(table: pd.DataFrame, cost: str, metric: str) -> pd.DataFrame:
    """The Pareto set: points that are better than every point of lower or equal cost, in order of rising cost."""
    rows = rank_points(final_points(table, metric, cost), metric, cost).sort_values(cost, kind="stable")
    sign = 1.0 if metric_of(metric).better == "lower" else -1.0
    losses = sign * rows[metric].to_numpy(dtype=float)
    best_before = np.concatenate([[np.inf], np.minimum.accumulate(losses)[:-1]])
    return rows[losses < best_before].reset_index(drop=True)


def best_at_budgets(
    table: pd.DataFrame,
    cost: str,
    metric: str,
    budgets: Iterable[float],
    points: Collection[str] | None = None,
    resamples: Resamples | None = None,
) -> list[BudgetChoice]:
    """For each budget the best configuration within it, and the best one of any other size.

    With resamples, the paired difference decides between the two sizes, and the choices of all budgets are judged together
    (`decide_together`).

    Args:
        cost: a name of `COSTS`.
        budgets: in the unit of that cost.
        points: digests of the points that may be chosen; None for all. The other points still count for `cheapest`,
            `most_expensive` and the boundaries of guidance.
        resamples: the resamples of the points by `metric`.

    Returns:
        One choice per budget, in the same order.

    Raises:
        ConfigError: a budget is not a positive number, or there are no points to choose from.
    """
    rows = rank_points(final_points(table, metric, cost), metric, cost)
    by_cost = rows.sort_values(cost, kind="stable")
    cheapest, most_expensive = (_configuration(by_cost.iloc[index], cost, metric) for index in (0, -1))
    allowed = rows if points is None else rows[rows["point"].isin(list(points))]
    choices = []
    for budget in budgets:
        if not (math.isfinite(budget) and budget > 0):
            raise ConfigError(f"a budget must be a positive number, not {budget:g}")
        within = allowed[is_within_budget(allowed[cost], budget)]
        best = _configuration(within.iloc[0], cost, metric) if len(within) else None
        others = within[within["size"] != best.size] if best else within
        runner_up = _configuration(others.iloc[0], cost, metric) if len(others) else None
        choices.append(
            BudgetChoice(
                budget=float(budget),
                cost=cost,
                metric=metric,
                num_points=len(within),
                best=best,
                runner_up=runner_up,
                undecided=best is not None and runner_up is not None and intervals_overlap(best, runner_up),
                beyond_data=budget > most_expensive.cost * BEYOND_DATA_FACTOR,
                cheapest=cheapest,
                most_expensive=most_expensive,
                decision=_decide(within, best, runner_up, metric, resamples),
            )
        )
    decisions = decide_together([choice.decision for choice in choices])
    return [
        choice if decision is None else replace(choice, decision=decision, undecided=not decision.is_decided)
        for choice, decision in zip(choices, decisions, strict=True)
    ]


def _decide(
    within: pd.DataFrame,
    best: Configuration | None,
    runner_up: Configuration | None,
    metric: str,
    resamples: Resamples | None,
) -> PairedDecision | None:
    """The paired difference between the size of the best point and the size of the runner-up, within a budget."""
    if best is None or runner_up is None or not resamples:
        return None
    first, second = (within[within["size"] == configuration.size] for configuration in (best, runner_up))
    return decide(first, second, metric, resamples)


def intervals_overlap(first: Configuration, second: Configuration) -> bool:
    """Whether two 95 % intervals overlap. True if an interval is missing, because the scores then cannot be distinguished."""
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return True
    return first.low <= second.high and second.low <= first.high


def default_budgets(table: pd.DataFrame, cost: str, num_budgets: int = 5) -> list[float]:
    """Budgets evenly spaced over the logarithm of the final points' costs; every point fits the last budget.

    Each budget is rounded up to two significant digits, so it is never below the cost that it was computed from.

    Raises:
        ConfigError: no final point has a measurement of this cost.
    """
    finished = table[table["is_final"].astype(bool)]
    if not is_measured(finished, cost_of(cost).name):
        raise ConfigError(format_unmeasured(cost, "final point"))
    costs = finished[cost].dropna()
    budgets = np.geomspace(costs.min(), costs.max(), num_budgets + 1)[1:]
    return sorted({_round_up(float(budget)) for budget in budgets})


def _configuration(row: pd.Series, cost: str, metric: str) -> Configuration:
    low, high = (None if pd.isna(row[f"{metric}_{end}"]) else float(row[f"{metric}_{end}"]) for end in ("low", "high"))
    return Configuration(
        point=str(row["point"]),
        checkpoint=str(row["checkpoint"]),
        size=str(row["size"]),
        solver=str(row["solver"]),
        num_steps=int(row["num_steps"]),
        guidance=float(row["guidance"]),
        cost=float(row[cost]),
        value=float(row[metric]),
        low=low,
        high=high,
        guidance_at_boundary=bool(row["guidance_at_boundary"]),
        dtype=str(row.get("dtype", "fp32")),
        compiled=bool(row.get("compiled", False)),
        seed=int(row.get("seed", 0)),
        guide_null_prompt=not pd.isna(is_null := row.get("guide_null_prompt")) and bool(is_null),
        guide=_text(row, "guide"),
        guide_checkpoint=_text(row, "guide_checkpoint"),
        guidance_interval=_text(row, "guidance_interval"),
        guidance_schedule=_text(row, "guidance_schedule"),
        replaced_scheduler=str(row.get("replaced_scheduler", "")),
        **_vae_settings(row),
    )


def _vae_settings(row: pd.Series) -> dict[str, Any]:
    """The settings of the autoencoder. A table has columns of them only if a point has other settings than the defaults."""
    if pd.isna(row.get("vae_dtype")):
        return {}
    tile_size = None if pd.isna(row["vae_tile_size"]) else int(row["vae_tile_size"])
    return {"vae_dtype": str(row["vae_dtype"]), "vae_tile_size": tile_size, "vae_slicing": bool(row["vae_slicing"])}


def _text(row: pd.Series, column: str) -> str | None:
    value = row.get(column)
    return None if pd.isna(value) else str(value)


def _round_up(value: float) -> float:
    """Round up to two significant digits."""
    unit = 10.0 ** (decimal_exponent(value) - 1)
    return float(f"{math.ceil(value / unit * (1 - ROUNDING)) * unit:.6g}")
