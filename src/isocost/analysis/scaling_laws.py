"""Quality against training compute: power laws with intervals, and their saturation.

A law is `value = asymptote + scale * C^-exponent` of training compute C. `value` is a distance, or 1 minus a metric that is a
fraction. The value falls like a power law while the second term is larger. Where both terms are equal, the slope in logarithms
has halved; this C is called the saturation. The curve of one size, and the frontier of the family (the best size at each
compute), are fitted in different ways (`isocost.analysis.power_laws`). C is counted in one of two ways:

training_gflop                 3 x forward x images: a backward pass costs two forward passes (Kaplan et al., arXiv 2001.08361,
                               sec. 2.1)
normalized_training_compute    GFLOP of one forward pass x iterations, the axis of arXiv 2404.01367, fig. 3; it does not include
                               the batch size

Shapes: M snapshots of a curve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from isocost.analysis.frontier_ci import Floats, frontier_points
from isocost.analysis.power_laws import MIN_POINTS, Law, fit_frontier, fit_law
from isocost.analysis.results_table import sizes_in_order, standard_errors, with_metric
from isocost.errors import ConfigError
from isocost.evaluation.metric_registry import metric_of

FORWARDS_PER_STEP = 3
"""Compute of a training step on an image, in forward passes."""
SETTING_COLUMNS = ("solver", "num_steps", "guidance")
FAMILY = "family"
"""Name of the law of the family."""


@dataclass(frozen=True)
class ScalingLaws:
    """The laws of a study over training compute.

    Attributes:
        axis: the count of compute.
        setting: the sampling setting of all points, as text.
        sizes: the laws of the sizes with enough snapshots.
        family: the law of the best size at each compute; None if its frontier has too few points.
        left_out: sizes with too few snapshots.
    """

    metric: str
    axis: str
    setting: str
    sizes: tuple[Law, ...]
    family: Law | None
    left_out: tuple[str, ...]


def points_over_compute(table: pd.DataFrame, metric: str, batch_size: int | None = None) -> pd.DataFrame:
    """Select the points of quality against training compute: all snapshots of all sizes at one sampling setting.

    The setting is the one with the most points, of the settings with points of earlier snapshots if there are any. Ties are
    resolved by more steps, then lower guidance, then the solver's name. Laws, figures and claims all use this selection, so
    they rest on the same points.

    Args:
        batch_size: of the training. If given, the column `normalized_training_compute` is computed from `training_gflop`.

    Returns:
        The points, ordered by number of parameters and training compute.

    Raises:
        ConfigError: no point has the metric, or the scores cannot be compared.
    """
    rows = with_metric(table, metric)
    columns = list(SETTING_COLUMNS)
    settings = (
        rows.assign(_is_earlier=~rows["is_final"].astype(bool))
        .groupby(columns, as_index=False)
        .agg(has_earlier=("_is_earlier", "any"), num_points=("images_seen", "count"))
    )
    order = ["has_earlier", "num_points", "num_steps", "guidance", "solver"]
    setting = settings.sort_values(order, ascending=[False, False, False, True, True]).iloc[0]
    rows = rows[(rows[columns] == setting[columns]).all(axis=1)]
    if batch_size is not None:
        compute = normalized_training_compute(rows["training_gflop"], batch_size)
        rows = rows.assign(normalized_training_compute=compute)
    return rows.sort_values(["num_parameters", "training_gflop"])


def format_setting(row: Mapping[Any, Any] | pd.Series) -> str:
    """The sampling setting of a point: "ddim/trailing, 16 steps, guidance 2"."""
    return f"{row['solver']}, {row['num_steps']} steps, guidance {row['guidance']:g}"


def normalized_training_compute(training_gflop: pd.Series, batch_size: int) -> pd.Series:
    """GFLOP of one forward pass x iterations, from 3 x forward x images."""
    return training_gflop / (FORWARDS_PER_STEP * batch_size)


def fit_scaling_laws(
    table: pd.DataFrame, metric: str, batch_size: int, axis: str = "training_gflop", num_replicates: int = 200, seed: int = 0
) -> ScalingLaws:
    """Fit the law of every size with at least `MIN_POINTS` snapshots, and the law of the family.

    Args:
        batch_size: of the training, for `normalized_training_compute`.
        axis: `training_gflop` or `normalized_training_compute`.
        num_replicates: number of bootstrap replicates.
        seed: random seed of the replicates.

    Raises:
        ConfigError: the axis is unknown, the metric has no law, or there are no points to compare.
    """
    if axis not in ("training_gflop", "normalized_training_compute"):
        raise ConfigError(f"axis {axis!r}: compute is counted as training_gflop or normalized_training_compute")
    check_law(metric)
    points = points_over_compute(table, metric, batch_size)
    laws, left_out = [], []
    for size in sizes_in_order(points):
        rows = points[points["size"] == size]
        if (law := _fit_size(size, rows, metric, axis, num_replicates, seed)) is None:
            left_out.append(size)
        else:
            laws.append(law)
    family = _fit_family(points, metric, axis, num_replicates, seed)
    return ScalingLaws(metric, axis, format_setting(points.iloc[0]), tuple(laws), family, tuple(left_out))


def check_law(metric: str) -> None:
    """Check that a metric has a best possible value, which a law can approach.

    Raises:
        ConfigError: it has none.
    """
    if metric_of(metric).better == "higher" and metric != "alignment":
        raise ConfigError(f"{metric}: no law for a metric without a maximum; choose a distance or alignment")


def loss_value(rows: pd.DataFrame, metric: str) -> Floats:
    """The values that a law is fitted to: a distance itself, or 1 minus a metric that is a fraction, [rows]."""
    values = rows[metric].to_numpy(dtype=float)
    return values if metric_of(metric).better == "lower" else 1 - values


def _fit_size(name: str, rows: pd.DataFrame, metric: str, axis: str, num_replicates: int, seed: int) -> Law | None:
    """The law of the snapshots of one size; None if there are too few."""
    values, compute = loss_value(rows, metric), rows[axis].to_numpy(dtype=float)
    usable = values > 0
    if len(np.unique(compute[usable])) < MIN_POINTS:
        return None
    return fit_law(name, compute[usable], values[usable], standard_errors(rows, metric)[usable], num_replicates, seed)


def _fit_family(points: pd.DataFrame, metric: str, axis: str, num_replicates: int, seed: int) -> Law | None:
    """The law of the frontier over training compute; None if it has too few points."""
    rows = points.assign(_loss=loss_value(points, metric)).sort_values([axis, "_loss"], kind="stable")
    compute, values = (rows[column].to_numpy(dtype=float) for column in (axis, "_loss"))
    compute, frontier = frontier_points(compute, values, standard_errors(rows, metric), num_replicates, seed)
    return fit_frontier(FAMILY, compute, frontier) if len(compute) >= MIN_POINTS else None
