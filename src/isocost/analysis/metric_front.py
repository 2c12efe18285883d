"""Two metrics at once: the points within a budget that no other point beats by both.

A distance such as FID alone misleads at few steps (arXiv 2603.14186): it hardly sees whether an image follows its prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from isocost.analysis.constraints import budget as budget_constraint
from isocost.analysis.constraints import check_measured
from isocost.analysis.formatting import format_metric, format_number, format_row, format_score
from isocost.analysis.results_table import final_points, rank_points
from isocost.errors import ConfigError
from isocost.evaluation.metric_registry import metric_of

SECOND_METRICS = ("hpsv2", "pickscore", "clip_score_l14", "clip_score_l14_336", "clip_score_b32", "clip_t", "alignment")
"""Metrics of preference and of prompt alignment, in the order in which a report takes them for its second axis."""


def second_metrics(table: pd.DataFrame, metric: str) -> list[str]:
    """The `SECOND_METRICS` other than `metric` that final points have."""
    finished = table[table["is_final"].astype(bool)]
    return [name for name in SECOND_METRICS if name != metric and name in finished.columns and finished[name].notna().any()]


def metric_front(table: pd.DataFrame, metric: str, other: str, cost: str, budget: float) -> pd.DataFrame:
    """Return the points within a budget that no other point within it beats by both metrics, best by `metric` first.

    A point beats another one if it is at least as good by both metrics, and better by one. The comparison is of scores; their
    intervals are not used, so a point on the front can be there by chance.

    Args:
        table: points, as in `isocost.analysis.results_table`.
        metric: the first metric.
        other: the second metric.
        cost: name of a budget (`isocost.analysis.constraints.BUDGETS`).
        budget: in the unit of that budget.

    Raises:
        ConfigError: a metric or the cost is unknown or missing, the metrics are one, or no point fits.
    """
    if metric == other:
        raise ConfigError(f"a front needs two metrics, not {metric} twice; give another second metric")
    signs = [1.0 if metric_of(name).better == "lower" else -1.0 for name in (metric, other)]
    rows = final_points(table, metric)
    if other not in rows.columns or rows[other].isna().all():
        known = ", ".join(second_metrics(table, metric)) or "none"
        raise ConfigError(f"no point has {other} along with {metric}; second metrics of this table: {known}")
    constraint = budget_constraint(cost, budget)
    check_measured(rows[rows[other].notna()], [constraint])
    fits = rows[rows[other].notna() & constraint.holds(rows)]
    if fits.empty:
        cheapest = float(rows.loc[rows[other].notna(), constraint.column].min())
        raise ConfigError(
            f"a budget of {constraint.text} is below every point with both metrics; the cheapest has {format_number(cheapest)}"
        )
    ranked = rank_points(fits, metric)
    losses = np.stack([sign * ranked[name].to_numpy(dtype=float) for sign, name in zip(signs, (metric, other), strict=True)])
    is_beaten = [bool(((losses <= loss[:, None]).all(0) & (losses < loss[:, None]).any(0)).any()) for loss in losses.T]
    front = ranked[~np.array(is_beaten)]
    return front.drop_duplicates([metric, other]).reset_index(drop=True)


def format_front(front: pd.DataFrame, metric: str, other: str) -> list[str]:
    """One line per point of a front."""

    def score(row: Mapping[Any, Any], name: str) -> str:
        value, low, high = (float(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
        return f"{format_metric(name, (metric, other))} {format_score(value, low, high)}"

    return [f"{format_row(row)}: {score(row, metric)}, {score(row, other)}" for row in front.to_dict("records")]
