"""The positions of the budget slider: for every cost, the budgets at which the best configuration changes.

A position is valid from its budget up to the next one. The choices come from `isocost.analysis.pareto.best_at_budgets`, as
those of `isocost recommend` do. Paired decisions at all positions of a cost are judged together.
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
from isocost.analysis.paired_decisions import Resamples
from isocost.analysis.pareto import BudgetChoice, Configuration, best_at_budgets
from isocost.analysis.recommend import describe_choice, sample_command
from isocost.analysis.results_table import final_points, rank_points
from isocost.analysis.timings import TIME_COLUMN, format_sweep_timings
from isocost.report.chart_panels import costs_in, metrics_in
from isocost.report.scope import TRAINED, Scope

NOT_RECORDED = "not recorded"


def slider_values(table: pd.DataFrame, metric: str, cost: str, resamples: Resamples | None = None) -> list[BudgetChoice]:
    """Return the choice at every budget where the best configuration or its runner-up changes, in order of cost.

    Args:
        resamples: resamples of the points by `metric`, for paired decisions.

    Raises:
        ConfigError: no final point has the metric and the cost.
    """
    rows = rank_points(final_points(table, metric, cost), metric, cost)
    costs = rows[cost].to_numpy(dtype=float)
    sizes = rows["size"].to_numpy()
    by_cost = np.argsort(costs, kind="stable")
    ends = np.searchsorted(costs[by_cost], costs[by_cost] * (1 + ROUNDING), side="right")
    best_ranks: dict[Any, int] = {}  # size -> best rank so far; rank 0 is the best point of all
    previous: tuple[int, ...] = ()
    budgets: list[float] = []
    start = 0
    while start < len(by_cost):
        for rank in by_cost[start : ends[start]].tolist():
            best_ranks[sizes[rank]] = min(best_ranks.get(sizes[rank], rank), rank)
        top_two = tuple(sorted(best_ranks.values())[:2])
        if top_two != previous:
            budgets.append(float(costs[by_cost[start]]))
            previous = top_two
        start = int(ends[start])
    return best_at_budgets(table, cost, metric, budgets, resamples=resamples)


def budget_slider(
    table: pd.DataFrame,
    metric: str,
    points_with_images: Collection[str],
    scope: Scope = TRAINED,
    resamples: Resamples | None = None,
) -> dict[str, Any]:
    """Return the data of the slider as plain values: `axes`, one per cost with its positions, and `configurations` by point.

    Args:
        points_with_images: points whose images the page can show.
        scope: gives the order of the costs and the word for one network.
        resamples: resamples of the points by `metric`, for paired decisions.

    Raises:
        ConfigError: no final point has the metric.
    """
    final_points(table, metric)
    axes: list[dict[str, Any]] = []
    shown: dict[str, Configuration] = {}
    for cost in costs_in(table, scope):
        choices = slider_values(table, metric, cost, resamples)
        timed_by_sweep = format_sweep_timings(final_points(table, metric, cost)) if cost == TIME_COLUMN else None
        values = [_slider_value(choice, scope, timed_by_sweep) for choice in choices]
        axes.append({"cost": cost, **_axis_labels(cost), "values": values})
        chosen = [configuration for choice in choices for configuration in (choice.best, choice.runner_up)]
        shown |= {configuration.point: configuration for configuration in chosen if configuration is not None}
    rows = table[table["point"].isin(list(shown))].to_dict("records")
    other_metrics = [name for name in metrics_in(table) if name != metric]
    configurations = {
        str(row["point"]): _configuration_data(row, shown[row["point"]], metric, other_metrics, points_with_images, scope)
        for row in rows
    }
    return {"metric": format_metric(metric), "axes": axes, "configurations": configurations}


def _axis_labels(cost: str) -> dict[str, str]:
    about = COSTS[cost]
    return {"label": about.label, "unit": about.unit, "axis_label": about.axis}


def _slider_value(choice: BudgetChoice, scope: Scope, note: str | None) -> dict[str, Any]:
    sentence = describe_choice(choice, scope.noun)
    assert choice.best is not None, "every position is the cost of a point"
    return {
        "budget": choice.budget,
        "budget_text": _format_rounded_up(choice.budget),
        "best": choice.best.point,
        "runner_up": choice.runner_up.point if choice.runner_up else None,
        "verdict": sentence.verdict,
        "decided": sentence.decided,
        "notes": [*sentence.notes, *([note] if note else [])],
    }


def _configuration_data(
    row: Mapping[Any, Any],
    configuration: Configuration,
    metric: str,
    other_metrics: list[str],
    points_with_images: Collection[str],
    scope: Scope,
) -> dict[str, Any]:
    """Return what the page shows of a point: label, score, `facts` by name, and the `sources` of the numbers."""
    names = [metric, *other_metrics]
    facts = {format_metric(metric, names): configuration.score}
    facts |= {format_metric(name, names): _format_row_score(row, name) for name in other_metrics if not _is_nan(row[name])}
    facts |= {COSTS[name].label: format_number(row[name]) for name in scope.costs if not _is_nan(row.get(name))}
    facts["parameters"] = f"{row['num_parameters']:,}"
    if "guidance_low" in row and not _is_nan(row["guidance_low"]):
        low, high = (format_number(row[f"guidance_{end}"]) for end in ("low", "high"))
        race = f"from a race of {row['race_images']:,.0f} images"
        facts["best guidance"] = f"{configuration.guidance:.3g} [{low}, {high}], {race}"
    task = row.get("task")
    origin = commit_and_device(row.get("provenance"))
    sources = {
        "point": configuration.point,
        "checkpoint": configuration.checkpoint,
        "protocol": f"{row['protocol']}, {row['num_images']:,} images, seed {row['seed']}",
        "commit": origin["commit"],
        "hardware": origin["device"],
    }
    return {
        "label": str(configuration),
        "score": configuration.score,
        "costs": {name: float(row[name]) for name in COSTS if not _is_nan(row.get(name))},
        "value": configuration.value,
        "facts": facts,
        "sources": sources,
        "command": sample_command(configuration, "OUT", task if isinstance(task, str) else "text2image"),
        "has_images": configuration.point in points_with_images,
    }


def commit_and_device(provenance: Any) -> dict[str, str]:
    """Return `commit` and `device` from the `provenance` (JSON) of a table row; "not recorded" where one is missing."""
    recorded = _parse_json(provenance) if isinstance(provenance, str) else {}
    return {name: str(recorded.get(name) or NOT_RECORDED) for name in ("commit", "device")}


@lru_cache(maxsize=1024)
def _parse_json(text: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(text)
    return value


def _format_rounded_up(budget: float) -> str:
    """Return a budget with four digits, rounded up so that its point still fits: 0.01615, 12, 18870."""
    unit = 10.0 ** (math.floor(math.log10(budget)) - 3)
    rounded = float(f"{math.ceil(budget / unit * (1 - ROUNDING)) * unit:.6g}")
    return f"{rounded:.0f}" if rounded >= 1000 else f"{rounded:.6g}"


def _format_row_score(row: Mapping[Any, Any], name: str) -> str:
    return format_score(*(float(row[column]) for column in (name, f"{name}_low", f"{name}_high")))


def _is_nan(value: Any) -> bool:
    return value is None or math.isnan(value)
