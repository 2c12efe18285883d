"""Quality against training compute: power laws with intervals, and where they saturate.

A law is `value = floor + scale * C^-exponent` of training compute C; `value` is a distance, or what a share lacks of 1.
It falls like a power law while the second term is the larger one; where the two are equal the slope in logarithms has
halved, and that C is called the saturation. A size's own curve and the family's frontier, the best size at each compute, are
fitted each in its way (`isocost.analysis.laws`). Two axes count C:

training_gflop   3 x forward x images: a backward pass costs two forward ones (Kaplan et al., arXiv 2001.08361, sec. 2.1)
normalized_training_compute    GFLOP of one forward x iterations, the axis of arXiv 2404.01367, fig. 3; the batch is not in it

Shapes: M snapshots of a curve.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from isocost.analysis.frontier_ci import Floats, frontier_points
from isocost.analysis.power_laws import MIN_SNAPSHOTS, Law, fit_frontier, fit_law
from isocost.analysis.results_table import deviations, sizes_in_order, with_metric
from isocost.errors import ConfigError
from isocost.metrics.registry import metric_of

FORWARDS_A_STEP = 3
SETTING = ("solver", "num_steps", "guidance")
FAMILY = "family"


@dataclass(frozen=True)
class Scaling:
    """The laws of a study: one for each size with enough snapshots, and that of the best size at each compute."""

    metric: str
    axis: str
    setting: str
    sizes: tuple[Law, ...]
    family: Law | None
    left_out: tuple[str, ...]


def compute_curves(table: pd.DataFrame, metric: str, batch_size: int) -> pd.DataFrame:
    """The points of quality against compute: one setting for all sizes and snapshots, with `normalized_training_compute` beside `training_gflop`.

    The setting is the one that most snapshots were scored at; ties go to more steps, then less guidance.

    Raises:
        ConfigError: no point carries the metric, or the points cannot be compared.
    """
    rows = with_metric(table, metric)
    settings = rows.groupby(list(SETTING), as_index=False).agg(snapshots=("images_seen", "count"))
    order = ["snapshots", "num_steps", "guidance", "solver"]
    chosen = settings.sort_values(order, ascending=[False, False, True, True]).iloc[0]
    rows = rows[(rows[list(SETTING)] == chosen[list(SETTING)]).all(axis=1)]
    compute = normalized_training_compute(rows["training_gflop"], batch_size)
    return rows.assign(normalized_training_compute=compute).sort_values(["num_parameters", "training_gflop"])


def normalized_training_compute(training_gflop: pd.Series, batch_size: int) -> pd.Series:
    """GFLOP of one forward x iterations, from 3 x forward x images."""
    return training_gflop / (FORWARDS_A_STEP * batch_size)


def scaling(
    table: pd.DataFrame, metric: str, batch_size: int, axis: str = "training_gflop", num_bootstrap: int = 200, seed: int = 0
) -> Scaling:
    """Fit every size with `MIN_SNAPSHOTS` snapshots or more, and the family.

    Args:
        batch_size: images a step of the training, for the paper's axis.
        axis: `training_gflop` or `normalized_training_compute`.

    Raises:
        ConfigError: the axis or metric has no law, or there are no points to compare.
    """
    if axis not in ("training_gflop", "normalized_training_compute"):
        raise ConfigError(f"axis {axis!r}: compute is counted as training_gflop or normalized_training_compute")
    check_law(metric)
    curves = compute_curves(table, metric, batch_size)
    first = curves.iloc[0]
    setting = f"{first['solver']}, {first['num_steps']} steps, guidance {first['guidance']:g}"
    laws, left_out = [], []
    for size in sizes_in_order(curves):
        rows = curves[curves["size"] == size]
        if (law := _law_of(size, rows, metric, axis, num_bootstrap, seed)) is None:
            left_out.append(size)
        else:
            laws.append(law)
    return Scaling(metric, axis, setting, tuple(laws), _family(curves, metric, axis, num_bootstrap, seed), tuple(left_out))


def check_law(metric: str) -> None:
    """Raise ConfigError where a metric has no end that a law could fall towards."""
    if metric_of(metric).better == "higher" and metric != "alignment":
        raise ConfigError(f"{metric}: no law for a quality without an upper end; take a distance or alignment")


def loss_value(rows: pd.DataFrame, metric: str) -> Floats:
    """What a law is fitted to: a distance itself, of a share what it lacks of 1, [rows]."""
    values = rows[metric].to_numpy(dtype=float)
    return values if metric_of(metric).better == "lower" else 1 - values


def _law_of(name: str, rows: pd.DataFrame, metric: str, axis: str, num_bootstrap: int, seed: int) -> Law | None:
    values, compute = loss_value(rows, metric), rows[axis].to_numpy(dtype=float)
    usable = values > 0
    if len(np.unique(compute[usable])) < MIN_SNAPSHOTS:
        return None
    return fit_law(name, compute[usable], values[usable], deviations(rows, metric)[usable], num_bootstrap, seed)


def _family(curves: pd.DataFrame, metric: str, axis: str, num_bootstrap: int, seed: int) -> Law | None:
    """The law of the points that no point of lower or equal compute matches."""
    rows = curves.assign(_lacks=loss_value(curves, metric)).sort_values([axis, "_lacks"], kind="stable")
    compute, values = (rows[column].to_numpy(dtype=float) for column in (axis, "_lacks"))
    compute, draws = frontier_points(compute, values, deviations(rows, metric), num_bootstrap, seed)
    return fit_frontier(FAMILY, compute, draws) if len(compute) >= MIN_SNAPSHOTS else None
