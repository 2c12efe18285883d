"""The data behind figures that set frontiers side by side: kinds of students, studies."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from isocost.analysis.frontier import cost_of, metric_of, pareto
from isocost.report.marks import Curves, series_of, wants_log
from isocost.report.scales import kind_style


def frontiers_side_by_side(
    groups: Mapping[str, pd.DataFrame], metric: str, cost: str, question: str, competing: pd.DataFrame, floor: float | None
) -> Curves:
    """The frontier of every group of points, by its label: the best score within each cost. An empty one keeps its colour.

    Args:
        competing: the points of all groups, for the axis of scores.
    """
    axis = cost_of(cost)
    lines = [
        series_of(label, pareto(group, cost, metric), cost, metric, f"{{}} {axis.unit}", *kind_style(at))
        for at, (label, group) in enumerate(groups.items())
        if not group.empty
    ]
    return Curves(
        question=question,
        setting="the best size, steps, guidance and sampler within its cost",
        x_label=axis.axis,
        y_label=metric_of(metric).axis,
        series=tuple(lines),
        frontier=None,
        floor=floor,
        log_y=wants_log(competing, metric, floor),
        is_staircase=True,
    )
