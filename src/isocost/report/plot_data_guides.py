"""The data of the figures on guide networks: frontiers by way of guidance, and the guides of every network."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import Normalize

from isocost.analysis.costs import cost_of
from isocost.analysis.formatting import format_metric
from isocost.analysis.guides import guide_changes, guides_in_order, points_by_way
from isocost.analysis.pareto import metric_of
from isocost.analysis.results_table import final_points, sizes_in_order
from isocost.report.plot_data import Curves, frontier_comparison

FRONTIER_QUESTION = "What does a guide buy at equal cost?"
HEATMAP_QUESTION = "Which guide is best for each network?"


@dataclass(frozen=True)
class GuideHeatmap:
    """Networks × guides: the best score of each pair relative to the network with classifier-free guidance at the same cost.

    Attributes:
        question: title of the figure.
        setting: the definition of the values.
        networks: names of the guided networks, small ones first.
        guides: labels of the guides.
        percent: relative change of the score in percent [networks, guides]; NaN where there is no value.
        best_columns: column of the guide with the best score in each row.
        notes: hover text of each cell [networks, guides]; "" without a point.
        better: direction of the metric, "lower" or "higher".
    """

    question: str
    setting: str
    networks: tuple[str, ...]
    guides: tuple[str, ...]
    percent: np.ndarray
    best_columns: tuple[int, ...]
    notes: tuple[tuple[str, ...], ...]
    better: str

    def text(self, row: int, column: int) -> str:
        """Return the text of a cell: the change with its sign, "?" for a pair without a reference, "" without a point."""
        value = float(self.percent[row, column])
        return format_change(value) if not math.isnan(value) else "?" if self.notes[row][column] else ""


def format_change(percent: float) -> str:
    """Return a relative change with its sign: "−23 %", "+4.2 %", "0 %"."""
    if abs(percent) < 0.05:
        return "0 %"
    return f"{percent:+.{0 if abs(percent) >= 9.95 else 1}f} %".replace("-", "−")


def guide_frontier(table: pd.DataFrame, metric: str, cost: str = "gflop", floor: float | None = None) -> Curves:
    """Return the frontier of every way of guidance over all networks: the best score within each cost.

    Args:
        table: points, as in `isocost.analysis.results_table`.
        metric: the metric to draw.
        cost: one of `isocost.analysis.guides.GUIDE_COSTS`.
        floor: the best possible value, drawn as a horizontal line.

    Raises:
        ConfigError: the cost does not count guides, or no point has a guide, or all points have one.
    """
    groups = points_by_way(table, metric, cost)
    curves = frontier_comparison(groups, metric, cost, FRONTIER_QUESTION, final_points(table, metric, cost), floor)
    return replace(curves, setting="the best network, guide, steps, guidance and solver within its cost")


def guide_heatmap(table: pd.DataFrame, metric: str, cost: str = "gflop") -> GuideHeatmap:
    """Return the best score of every pair of network and guide, relative to the network's own at equal cost.

    The values are those of `isocost.analysis.guides.guide_changes`.

    Args:
        table: points, as in `isocost.analysis.results_table`.
        metric: the metric to draw.
        cost: one of `isocost.analysis.guides.GUIDE_COSTS`.

    Raises:
        ConfigError: the cost does not count guides, or no point has a guide, or all points have one.
    """
    changes = guide_changes(table, metric, cost)
    used = {change.guide for change in changes}
    rows = final_points(table, metric, cost)
    guides = [guide for guide in guides_in_order(rows) if guide in used]
    guided = {change.size for change in changes}
    networks = [size for size in sizes_in_order(rows) if size in guided]
    percent = np.full((len(networks), len(guides)), np.nan)
    notes = [[""] * len(guides) for _ in networks]
    best_columns = [0] * len(networks)
    metric_label, about = format_metric(metric), metric_of(metric)
    for change in changes:
        row, column = networks.index(change.size), guides.index(change.guide)
        percent[row, column] = 100 * change.change
        compared = change.reference or "no point without a guide costs as little"
        notes[row][column] = f"{metric_label} {change.score}: {change.configuration}\nwithout a guide: {compared}"
        if change.is_best:
            best_columns[row] = column
    return GuideHeatmap(
        question=HEATMAP_QUESTION,
        setting=f"{metric_label} ({about.better} is better) of the best point with the guide, relative to the best point of "
        f"the network with classifier-free guidance or none, at the same {cost_of(cost).label} or less",
        networks=tuple(networks),
        guides=tuple(guides),
        percent=percent,
        best_columns=tuple(best_columns),
        notes=tuple(tuple(row) for row in notes),
        better=about.better,
    )


def change_colors(heatmap: GuideHeatmap) -> tuple[Any, Normalize]:
    """Return the colour map and the scale of the changes: blue is better, red is worse, white is no change."""
    largest = float(np.nanmax(np.abs(heatmap.percent))) if np.isfinite(heatmap.percent).any() else 0.0
    limit = largest or 1.0
    return colormaps["RdBu_r" if heatmap.better == "lower" else "RdBu"], Normalize(-limit, limit)
