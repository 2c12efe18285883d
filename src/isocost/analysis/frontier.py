"""Questions to the table of points: best guidance, Pareto set, best configuration within a budget.

A table is a DataFrame with one row a point. Its columns: point, checkpoint (digests), size, width, num_parameters,
images_seen, training_gflop, is_final (last training mark), sampler, num_steps, guidance, num_pictures, seed, protocol,
the four costs of `COSTS`, and for every metric m of `isocost.metrics.names.METRICS` m, m_low, m_high (95 % interval; NaN
where absent).
Only final points compete; the earlier training marks belong to the curve over training compute.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from isocost.analysis.hardware import timed_on_one_device
from isocost.errors import RequestError
from isocost.metrics.names import metric_of
from isocost.score.protocol import difference

COMPARABLE_BY = ("protocol", "num_pictures", "seed")
CONFIGURATION = ("size", "sampler", "num_steps", "guidance")
CELL = ("size", "sampler", "num_steps")
COMPARED_WITH = {"repeats": "text2image", "distill": "text2image", "superres-distill": "superres"}
"""Whose points stand beside a task's own."""
ROUNDING = 1e-9
BEYOND = 1.1
INTERVAL_WIDTH = 2 * 1.959964
"""Width of a normal's 95 % interval in standard deviations."""


@dataclass(frozen=True)
class Cost:
    """A way to count what one picture costs to sample."""

    name: str
    label: str
    axis: str
    unit: str

    def amount(self, value: float) -> str:
        """`value` in words: "12 units of paper cost"."""
        return f"{format_number(value)} {self.unit}"


COSTS = {
    cost.name: cost
    for cost in (
        Cost("paper_cost", "paper cost", "paper cost (normalised cost × steps)", "units of paper cost"),
        Cost("nfe", "evaluations", "network evaluations per picture", "network evaluations per picture"),
        Cost("gflop", "GFLOP", "GFLOP per picture (denoiser, all passes)", "GFLOP per picture"),
        Cost("ms_per_picture", "milliseconds", "ms per picture (measured, by throughput)", "ms per picture"),
    )
}


@dataclass(frozen=True)
class Configuration:
    """One final point as a candidate: what to sample with, its cost, its value and the 95 % interval where there is one."""

    point: str
    checkpoint: str
    size: str
    sampler: str
    num_steps: int
    guidance: float
    cost: float
    value: float
    low: float | None
    high: float | None
    guidance_at_edge: bool

    @property
    def score(self) -> str:
        """The value with its interval: "0.123 [0.120, 0.126]"."""
        return format_score(self.value, self.low, self.high)

    def __str__(self) -> str:
        return configuration_words(self.size, self.num_steps, self.guidance, self.sampler)


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


def configuration_words(size: str, num_steps: int, guidance: float, sampler: str) -> str:
    """What to sample with in running text: "2.6M, 8 steps, guidance 2, ddim/trailing"."""
    steps = "1 step" if num_steps == 1 else f"{num_steps} steps"
    return f"{size}, {steps}, guidance {guidance:g}, {sampler}"


def metric_words(name: str) -> str:
    """The metric in running text: its label up to the first comma, "kernel distance"."""
    return metric_of(name).label.split(",")[0]


def cost_of(name: str) -> Cost:
    """The cost called `name`; RequestError with the known names where there is none."""
    if name not in COSTS:
        raise RequestError(f"no cost is called {name!r}; known: {', '.join(COSTS)}")
    return COSTS[name]


def of_task(table: pd.DataFrame, task: str = "text2image", protocol: str | None = None) -> pd.DataFrame:
    """The points of one task out of a ledger's table (`isocost.sweep.ledger.Ledger.table`), without the study or its folder.

    `is_final` marks the most images of each size, which is all that a ledger knows of it; students come with the finished
    points of what they are compared with.

    Raises:
        RequestError: there is no such point, or only the report of a folder sums such points up.
    """
    if task == "dreambooth":
        raise RequestError("a ledger has dreambooth subject by subject; ask the output folder, whose report sums them up")
    tasks = table["task"].fillna("text2image")
    if not (tasks == task).any():
        known = ", ".join(sorted(tasks.unique())) or "no point at all"
        raise RequestError(f"the ledger has no point of {task}; it has {known}")
    rows = table.assign(
        task=tasks, is_final=table["images_seen"] == table.groupby([tasks, "size"])["images_seen"].transform("max")
    )
    rows = rows[(tasks == task) | ((tasks == COMPARED_WITH.get(task)) & rows["is_final"])]
    if protocol is not None:
        known = ", ".join(sorted(rows["protocol"].unique()))
        rows = rows[rows["protocol"] == protocol]
        if rows.empty:
            raise RequestError(f"the ledger has no point of {task} under protocol {protocol}; known: {known}")
    return timed_on_one_device(rows).reset_index(drop=True)


def sizes_in_order(table: pd.DataFrame) -> list[str]:
    """Size names from the smallest network to the largest."""
    sizes = table[["num_parameters", "size"]].drop_duplicates("size")
    return [str(size) for size in sizes.sort_values(["num_parameters", "size"])["size"]]


def scored(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows that carry `metric`, after a check that their numbers may be compared.

    Raises:
        RequestError: no row carries it, or the rows differ in protocol, number of pictures or seed.
    """
    metric_of(metric)
    rows = table[table[metric].notna()] if metric in table.columns else table.iloc[:0]
    if rows.empty:
        raise RequestError(f"no point carries {metric}: run the sweep with a protocol that scores it, or name another metric")
    for column in COMPARABLE_BY:
        counts = rows[column].value_counts().sort_index()
        if len(counts) > 1:
            found = ", ".join(f"{value} ({count} points)" for value, count in counts.items())
            told = _told_apart(rows) if column == "protocol" else ""
            raise RequestError(
                f"points that differ in {column} cannot be compared: {found}{told}; keep the rows of one {column}"
            )
    return rows


def _told_apart(rows: pd.DataFrame) -> str:
    """What differs between the first two protocols of the rows, in words, where the table holds their parts."""
    if "protocol_parts" not in rows.columns:
        return ""
    parts = rows.dropna(subset=["protocol_parts"]).drop_duplicates("protocol").sort_values("protocol")["protocol_parts"]
    if len(parts) < 2:
        return ""
    return f"; they differ in {difference(*(json.loads(one) for one in parts.iloc[:2]))}"


def finals(table: pd.DataFrame, metric: str, cost: str | None = None) -> pd.DataFrame:
    """The competing points: final checkpoints with `metric` and, where given, a measured `cost`; `guidance_at_edge` added.

    The guidance of a point is at the edge when it is the lowest or the highest tried for its size, sampler and number of steps:
    if such a point is the best, the optimum may lie outside the grid. Guidance 0, below which there is none, is no edge, nor
    is 1 where nothing else was tried: sampling without guidance. A race (column `race_at_edge`) says of itself where it ended.

    Raises:
        RequestError: nothing competes, the numbers cannot be compared, or two points stand for one configuration.
    """
    rows = scored(table, metric)
    rows = rows[rows["is_final"].astype(bool)]
    if rows.empty:
        raise RequestError(f"no finished checkpoint carries {metric} yet: let `isocost run` finish training and sweep")
    doubled = rows[rows.duplicated(list(CONFIGURATION), keep=False)].sort_values(["point"])
    if not doubled.empty:
        row = doubled.iloc[0]
        twins = doubled[(doubled[list(CONFIGURATION)] == row[list(CONFIGURATION)]).all(axis=1)]["point"]
        where = f"{row['size']}, {row['sampler']}, {row['num_steps']} steps, guidance {row['guidance']:g}"
        raise RequestError(f"{where}: points {', '.join(twins)} stand for the same configuration; keep one of them")
    tried = rows.groupby(list(CELL))["guidance"]
    at_low = (rows["guidance"] == tried.transform("min")) & (rows["guidance"] != 0)
    at_high = rows["guidance"] == tried.transform("max")
    without = (rows["guidance"] == 1) & (tried.transform("nunique") == 1)
    at_edge = (at_low | at_high) & ~without
    if "race_at_edge" in rows.columns:
        raced = rows["race_at_edge"].notna()
        at_edge = (at_edge & ~raced) | rows["race_at_edge"].eq(True)
    rows = rows.assign(guidance_at_edge=at_edge)
    if cost is not None:
        rows = rows[rows[cost_of(cost).name].notna()]
        if rows.empty:
            raise RequestError(f"no point carries a measured {cost}; choose another cost of {', '.join(COSTS)}")
    return rows


def deviations(rows: pd.DataFrame, metric: str) -> NDArray[np.float64]:
    """Standard deviation of every row's score as its 95 % interval has it, taken as normal, [rows]; NaN without an interval."""
    low, high = (rows[f"{metric}_{side}"].to_numpy(dtype=float) for side in ("low", "high"))
    return np.asarray((high - low) / INTERVAL_WIDTH, dtype=np.float64)


def best_first(rows: pd.DataFrame, metric: str, cost: str = "paper_cost") -> pd.DataFrame:
    """`rows` from best to worst by `metric`. Ties go to the cheaper, smaller, shorter, less guided, then by name."""
    sign = 1.0 if metric_of(metric).better == "lower" else -1.0
    keys = [cost, "num_parameters", "num_steps", "guidance", "sampler", "point"]
    return rows.assign(_worse=sign * rows[metric]).sort_values(["_worse", *keys], kind="stable").drop(columns="_worse")


def best_in_each(rows: pd.DataFrame, metric: str, by: Sequence[str]) -> pd.DataFrame:
    """The best row of every group of `by`, in the order of size, sampler and steps."""
    best = best_first(rows, metric).drop_duplicates(list(by))
    return best.sort_values(["num_parameters", "size", "sampler", "num_steps"]).reset_index(drop=True)


def best_guidance(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The row with the best guidance for every (size, sampler, num_steps), with the column `guidance_at_edge`.

    The paper's rule (arXiv 2404.01367, section on sampling efficiency). The value of the best of several noisy scores is
    optimistic; its interval does not cover that choice.
    """
    return best_in_each(finals(table, metric), metric, CELL)


def pareto(table: pd.DataFrame, cost: str, metric: str) -> pd.DataFrame:
    """The points that no point of lower or equal cost matches, from cheap to dear; each is better than all before it."""
    rows = best_first(finals(table, metric, cost), metric, cost).sort_values(cost, kind="stable")
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
        RequestError: a budget is not a positive number, or there is nothing to choose from.
    """
    rows = best_first(finals(table, metric, cost), metric, cost)
    by_cost = rows.sort_values(cost, kind="stable")
    cheapest, dearest = (_configuration(by_cost.iloc[at], cost, metric) for at in (0, -1))
    allowed = rows if points is None else rows[rows["point"].isin(list(points))]
    choices = []
    for budget in budgets:
        if not (math.isfinite(budget) and budget > 0):
            raise RequestError(f"a budget is a positive number, not {budget:g}")
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


def fits(costs: pd.Series, budget: float) -> pd.Series:
    """Whether each cost <= budget, forgiving the last digits of floating point."""
    return costs <= budget * (1 + ROUNDING)


def intervals_overlap(one: Configuration, other: Configuration) -> bool:
    """Whether two 95 % intervals share a value; True as well where one is missing, since then nothing tells them apart."""
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return True
    return one.low <= other.high and other.low <= one.high


def default_budgets(table: pd.DataFrame, cost: str, num_budgets: int = 5) -> list[float]:
    """Budgets spread evenly over the logarithm of the final points' costs; the last takes in every point.

    Each is rounded up to two significant digits, so that it never falls below the point that it was meant to take in.

    Raises:
        RequestError: no finished point was measured by this cost.
    """
    costs = table.loc[table["is_final"].astype(bool), cost_of(cost).name].dropna()
    if costs.empty:
        raise RequestError(f"no finished point carries a measured {cost}; choose another cost of {', '.join(COSTS)}")
    spread = np.geomspace(costs.min(), costs.max(), num_budgets + 1)[1:]
    return sorted({_round_up(float(value)) for value in spread})


def format_number(value: float) -> str:
    """Three significant digits, thousands grouped: 0.0123, 12, 1,887."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def format_score(value: float, low: float | None, high: float | None) -> str:
    """A value with its 95 % interval, "0.123 [0.120, 0.126]".

    Three digits of the value, but at least one and at most two of the interval's half width.
    """
    bounds = [bound for bound in (low, high) if bound is not None and math.isfinite(bound)]
    digits = 2 - _magnitude(value)
    if len(bounds) < 2:
        return f"{value:.{_clamp(digits)}f}"
    half_width = _magnitude((bounds[1] - bounds[0]) / 2 * (1 + ROUNDING))
    digits = _clamp(max(min(digits, 1 - half_width), -half_width))
    return f"{value:.{digits}f} [{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"


def _configuration(row: pd.Series, cost: str, metric: str) -> Configuration:
    low, high = (None if pd.isna(row[f"{metric}_{side}"]) else float(row[f"{metric}_{side}"]) for side in ("low", "high"))
    return Configuration(
        point=str(row["point"]),
        checkpoint=str(row["checkpoint"]),
        size=str(row["size"]),
        sampler=str(row["sampler"]),
        num_steps=int(row["num_steps"]),
        guidance=float(row["guidance"]),
        cost=float(row[cost]),
        value=float(row[metric]),
        low=low,
        high=high,
        guidance_at_edge=bool(row["guidance_at_edge"]),
    )


def _round_up(value: float) -> float:
    unit = 10.0 ** (_magnitude(value) - 1)
    return float(f"{math.ceil(value / unit * (1 - ROUNDING)) * unit:.6g}")


def _magnitude(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value else 0


def _clamp(digits: int) -> int:
    return min(max(digits, 0), 8)
