"""The data of the figure of two metrics at once: fronts within several budgets."""

from __future__ import annotations

import pandas as pd

from isocost.analysis.costs import cost_of
from isocost.analysis.formatting import format_metric
from isocost.analysis.metric_front import metric_front, second_metrics
from isocost.analysis.pareto import default_budgets
from isocost.errors import ConfigError
from isocost.evaluation.metric_registry import metric_of
from isocost.report.plot_data import Curves, make_series
from isocost.report.plot_style import MARKERS, size_colors

FRONT_QUESTION = "Which points are best by two metrics at once?"
NUM_BUDGETS = 4


def metric_front_curves(table: pd.DataFrame, metric: str, other: str | None = None, cost: str = "gflop") -> Curves:
    """Return the front of two metrics within each of `NUM_BUDGETS` budgets.

    Args:
        table: points, as in `isocost.analysis.results_table`.
        metric: the metric of the y axis.
        other: the metric of the x axis; by default the first metric of preference or alignment that the table has.
        cost: of the budgets, a name of `COSTS`.

    Raises:
        ConfigError: the table has no second metric, or no final point has the metrics and the cost.
    """
    if other is None:
        available = second_metrics(table, metric)
        if not available:
            raise ConfigError("no metric of preference or of prompt alignment was scored, so there is no second metric")
        other = available[0]
    about = cost_of(cost)
    budgets = default_budgets(table, cost, NUM_BUDGETS)
    lines = [
        make_series(
            f"within {about.format_amount(budget)}",
            metric_front(table, metric, other, cost, budget).sort_values(other, kind="stable"),
            other,
            metric,
            f"{format_metric(other, (metric, other))} {{}}",
            color,
            marker,
        )
        for budget, color, marker in zip(budgets, size_colors(len(budgets)), MARKERS, strict=False)
    ]
    return Curves(
        question=FRONT_QUESTION,
        setting="a point of the Pareto front of both metrics within a budget",
        x_label=metric_of(other).axis,
        y_label=metric_of(metric).axis,
        series=tuple(lines),
        frontier=None,
        floor=None,
        log_y=False,
        has_error_bars=True,
        log_x=False,
    )
