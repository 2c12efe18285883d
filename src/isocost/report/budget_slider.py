"""What the budget slider moves along: for every cost, the budgets at which the answer changes, and what it is there.

A stop holds from its budget up to the next one. The choices are those of `isocost.analysis.frontier.best_at_budgets`, so the
slider says what `isocost recommend` says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from isocost.analysis.costs import COSTS
from isocost.analysis.formatting import ROUNDING, format_metric, format_number, format_score
from isocost.analysis.pareto import BudgetChoice, Configuration, best_at_budgets
from isocost.analysis.recommend import answer, sample_command
from isocost.analysis.results_table import final_points, rank_points
from isocost.report.chart_panels import costs_in, metrics_in

NOT_RECORDED = "not recorded"


def stops(table: pd.DataFrame, metric: str, cost: str) -> list[BudgetChoice]:
    """The choices at all budgets at which the best configuration or its runner-up changes, from the cheapest point on.

    Raises:
        ConfigError: no finished point carries the metric and the cost.
    """
    rows = rank_points(final_points(table, metric, cost), metric, cost)
    costs = rows[cost].to_numpy(dtype=float)
    sizes = rows["size"].to_numpy()
    by_cost = np.argsort(costs, kind="stable")
    ends = np.searchsorted(costs[by_cost], costs[by_cost] * (1 + ROUNDING), side="right")
    leaders: dict[Any, int] = {}
    last: tuple[int, ...] = ()
    budgets: list[float] = []
    at = 0
    while at < len(by_cost):
        for rank in by_cost[at : ends[at]].tolist():
            leaders[sizes[rank]] = min(leaders.get(sizes[rank], rank), rank)
        now = tuple(sorted(leaders.values())[:2])  # ranks: place 0 is the best of all
        if now != last:
            budgets.append(float(costs[by_cost[at]]))
            last = now
        at = int(ends[at])
    return best_at_budgets(table, cost, metric, budgets)


def explorer(table: pd.DataFrame, metric: str, sample_labels: Collection[str]) -> dict[str, Any]:
    """Plain data for the page: `axes`, one a cost with its stops, and `configurations` by point.

    Args:
        imaged: points whose images the page can show.

    Raises:
        ConfigError: no finished point carries the metric.
    """
    final_points(table, metric)
    axes: list[dict[str, Any]] = []
    shown: dict[str, Configuration] = {}
    for cost in costs_in(table):
        found = stops(table, metric, cost)
        axes.append({"cost": cost, **_axis(cost), "stops": [_stop(choice) for choice in found]})
        chosen = [one for choice in found for one in (choice.best, choice.runner_up) if one is not None]
        shown |= {one.point: one for one in chosen}
    rows = table[table["point"].isin(list(shown))].to_dict("records")
    metrics = [name for name in metrics_in(table) if name != metric]
    told = {str(row["point"]): _configuration(row, shown[row["point"]], metric, metrics, sample_labels) for row in rows}
    return {"metric": format_metric(metric), "axes": axes, "configurations": told}


def _axis(cost: str) -> dict[str, str]:
    about = COSTS[cost]
    return {"label": about.label, "unit": about.unit, "axis": about.axis}


def _stop(choice: BudgetChoice) -> dict[str, Any]:
    """One stop: the budget in numbers and in words, the two points, whether they are told apart, and what to beware of."""
    said = answer(choice)
    assert choice.best is not None, "a stop is the cost of a point"
    return {
        "budget": choice.budget,
        "shown": _rounded_up(choice.budget),
        "best": choice.best.point,
        "runner_up": choice.runner_up.point if choice.runner_up else None,
        "verdict": said.verdict,
        "decided": said.decided,
        "notes": list(said.notes),
    }


def _configuration(
    row: Mapping[Any, Any], one: Configuration, metric: str, metrics: list[str], sample_labels: Collection[str]
) -> dict[str, Any]:
    """What the page tells of a point: words, score, facts by name, where the number comes from."""
    facts = {format_metric(metric): one.score}
    facts |= {format_metric(name): _score(row, name) for name in metrics if not _is_nan(row[name])}
    facts |= {cost.label: format_number(row[name]) for name, cost in COSTS.items() if not _is_nan(row[name])}
    facts["parameters"] = f"{row['num_parameters']:,}"
    if "guidance_low" in row and not _is_nan(row["guidance_low"]):
        low, high = (format_number(row[f"guidance_{side}"]) for side in ("low", "high"))
        facts["best guidance"] = f"{one.guidance:.3g} [{low}, {high}], from a race of {row['race_images']:,.0f} images"
    task = row.get("task")
    made = made_with(row.get("provenance"))
    origin = {
        "point": one.point,
        "checkpoint": one.checkpoint,
        "protocol": f"{row['protocol']}, {row['num_images']:,} images, seed {row['seed']}",
        "commit": made["commit"],
        "hardware": made["device"],
    }
    return {
        "words": str(one),
        "score": one.score,
        "costs": {name: float(row[name]) for name in COSTS if not _is_nan(row[name])},
        "value": one.value,
        "facts": facts,
        "origin": origin,
        "command": sample_command(one, "OUT", task if isinstance(task, str) else "text2image"),
        "has_images": one.point in sample_labels,
    }


def made_with(provenance: Any) -> dict[str, str]:
    """Commit and device of a point, out of its row's `provenance` (JSON); "not recorded" where there is none."""
    told = _parsed(provenance) if isinstance(provenance, str) else {}
    return {name: str(told.get(name) or NOT_RECORDED) for name in ("commit", "device")}


@lru_cache(maxsize=1024)
def _parsed(text: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(text)
    return told


def _rounded_up(budget: float) -> str:
    """A budget of four digits that its point fits into: 0.01615, 12, 18870."""
    unit = 10.0 ** (math.floor(math.log10(budget)) - 3)
    rounded = float(f"{math.ceil(budget / unit * (1 - ROUNDING)) * unit:.6g}")
    return f"{rounded:.0f}" if rounded >= 1000 else f"{rounded:.6g}"


def _score(row: Mapping[Any, Any], name: str) -> str:
    return format_score(*(float(row[column]) for column in (name, f"{name}_low", f"{name}_high")))


def _is_nan(value: Any) -> bool:
    return value is None or math.isnan(value)
