"""Questions to the table of points: best guidance, Pareto set, best configuration within a budget.

A table is a DataFrame with one row a point. Its columns: point, checkpoint (digests), size, width, num_parameters,
images_seen, training_gflop, is_final (last snapshot), solver, num_steps, guidance, num_images, seed, protocol,
the four costs of `COSTS`, and for every metric m of `isocost.metrics.names.METRICS` m, m_low, m_high (95 % interval; NaN
where absent).
Only final points compete; the earlier training snapshots belong to the curve over training compute.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from isocost.analysis.costs import COSTS, cost_of
from isocost.analysis.formatting import ROUNDING, _magnitude, format_configuration, format_score
from isocost.analysis.results_table import CELL, best_in_each, final_points, fits, rank_points
from isocost.errors import ConfigError
from isocost.metrics.registry import metric_of

BEYOND = 1.1


@dataclass(frozen=True)
class Configuration:
    """One final point as a candidate: what to sample with, its cost, its value and the 95 % interval where there is one."""

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

    @property
    def score(self) -> str:
        """The value with its interval: "0.123 [0.120, 0.126]"."""
        return format_score(self.value, self.low, self.high)

    def __str__(self) -> str:
        return format_configuration(self.size, self.num_steps, self.guidance, self.solver)


@dataclass(frozen=True)
class BudgetChoice:
    """The best configuration with cost <= budget, and the best one of any other size.

    `best` is None where the budget lies below every point. `undecided` says that the two intervals overlap, or that one of
    the two has no interval; `beyond_data` that the budget exceeds the dearest point by more than a tenth, so that a dearer
    one might be better still.
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
    dearest: Configuration


def best_guidance(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The row with the best guidance for every (size, solver, num_steps), with the column `guidance_at_boundary`.

    The paper's rule (arXiv 2404.01367, section on sampling efficiency). The value of the best of several noisy scores is
    optimistic; its interval does not cover that choice.
    """
    return best_in_each(final_points(table, metric), metric, CELL)


def pareto(table: pd.DataFrame, cost: str, metric: str) -> pd.DataFrame:
    """The points that no point of lower or equal cost matches, from cheap to dear; each is better than all before it."""
    rows = rank_points(final_points(table, metric, cost), metric, cost).sort_values(cost, kind="stable")
    sign = 1.0 if metric_of(metric).better == "lower" else -1.0
    worse = sign * rows[metric].to_numpy(dtype=float)
    best_before = np.concatenate([[np.inf], np.minimum.accumulate(worse)[:-1]])
    return rows[worse < best_before].reset_index(drop=True)


def best_at_budgets(
    table: pd.DataFrame, cost: str, metric: str, budgets: Iterable[float], points: Collection[str] | None = None
) -> list[BudgetChoice]:
    """For each budget, in the order given, the best configuration with cost <= budget and the best of any other size.

    Args:
        points: those that may be chosen, all where None; the others count for `cheapest`, `dearest` and the edges of guidance.

    Raises:
        ConfigError: a budget is not a positive number, or there is nothing to choose from.
    """
    rows = rank_points(final_points(table, metric, cost), metric, cost)
    by_cost = rows.sort_values(cost, kind="stable")
    cheapest, dearest = (_configuration(by_cost.iloc[at], cost, metric) for at in (0, -1))
    allowed = rows if points is None else rows[rows["point"].isin(list(points))]
    choices = []
    for budget in budgets:
        if not (math.isfinite(budget) and budget > 0):
            raise ConfigError(f"a budget is a positive number, not {budget:g}")
        within = allowed[fits(allowed[cost], budget)]
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
                beyond_data=budget > dearest.cost * BEYOND,
                cheapest=cheapest,
                dearest=dearest,
            )
        )
    return choices


def intervals_overlap(one: Configuration, other: Configuration) -> bool:
    """Whether two 95 % intervals share a value; True as well where one is missing, since then nothing tells them apart."""
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return True
    return one.low <= other.high and other.low <= one.high


def default_budgets(table: pd.DataFrame, cost: str, num_budgets: int = 5) -> list[float]:
    """Budgets spread evenly over the logarithm of the final points' costs; the last takes in every point.

    Each is rounded up to two significant digits, so that it never falls below the point that it was meant to take in.

    Raises:
        ConfigError: no finished point was measured by this cost.
    """
    costs = table.loc[table["is_final"].astype(bool), cost_of(cost).name].dropna()
    if costs.empty:
        raise ConfigError(f"no finished point carries a measured {cost}; choose another cost of {', '.join(COSTS)}")
    spread = np.geomspace(costs.min(), costs.max(), num_budgets + 1)[1:]
    return sorted({_round_up(float(value)) for value in spread})


def _configuration(row: pd.Series, cost: str, metric: str) -> Configuration:
    low, high = (None if pd.isna(row[f"{metric}_{side}"]) else float(row[f"{metric}_{side}"]) for side in ("low", "high"))
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
    )


def _round_up(value: float) -> float:
    unit = 10.0 ** (_magnitude(value) - 1)
    return float(f"{math.ceil(value / unit * (1 - ROUNDING)) * unit:.6g}")
