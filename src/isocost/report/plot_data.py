"""The data of each figure, before any library draws it.

`matplotlib_backend` and `plotly_backend` draw the same `Curves` or `HeatPanel`; image grids are in `image_grids`.
Sizes differ in viridis colour (dark is small) and in marker shape; solvers differ in colour, marker shape and dash. Bands are
95 % intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import Normalize

from isocost.analysis.costs import cost_of
from isocost.analysis.formatting import ROW_COLUMNS, format_metric, format_number, format_row, format_score
from isocost.analysis.pareto import best_guidance, metric_of, pareto
from isocost.analysis.results_table import best_per_group, classifier_free, final_points, rank_points, sizes_in_order
from isocost.analysis.scaling_laws import format_setting, points_over_compute
from isocost.errors import ConfigError
from isocost.models.paper_table import TABLE_1
from isocost.report.plot_style import INK, MARKERS, MUTED, kind_style, log_ticks, size_colors

FLOOR_LABEL = "decoded real images"
MAX_LABELLED_CELLS = 200
PUBLISHED_LABEL = "published, not ours (arXiv 2404.01367)"
PUBLISHED_STEPS = 50
PUBLISHED_COLUMNS = {"fid": "fid", **dict.fromkeys(("clip_score_b32", "clip_score_l14", "clip_score_l14_336"), "clip")}
"""Metric -> the comparable column of the paper's Table 1. The paper does not name the CLIP model of its score."""
COMPUTE_AXES = {
    "training_gflop": ("true FLOPs", "training GFLOP (3 × forward × images seen)"),
    "normalized_training_compute": ("the paper's axis", "GFLOP of a forward pass × iterations, as in arXiv 2404.01367"),
}
"""Ways to count training compute: table column -> short label, axis title."""
STEP_AXES = {
    "num_steps": ("steps", "solver steps", "{} steps"),
    "nfe": ("evaluations", "network evaluations per image", "{} network evaluations per image"),
}
"""Axes for the comparison of solvers: table column -> short label, axis title, format of one value."""


@dataclass(frozen=True)
class Series:
    """One line of a figure: a size, a solver or the frontier.

    Attributes:
        low: lower end of the band; NaN where a point has no interval.
        high: upper end of the band.
        notes: hover text of each point.
        marker: marker shape as (matplotlib name, plotly name).
        point_labels: text next to each marker; empty for none.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray
    notes: tuple[str, ...]
    color: str
    marker: tuple[str, str]
    dash: str = "solid"
    point_labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Curves:
    """Quality against a cost, compute or number of steps.

    Attributes:
        question: title of the figure.
        setting: how the shown points were chosen.
        series: one line per size or solver.
        frontier: the best points of all sizes and solvers, where the figure has a frontier.
        floor: the best possible value, for example real images through the autoencoder.
        reference_lines: label and value of further scores that no model produced.
        published: the paper's numbers, as a layer that is hidden by default and is not part of `series`.
        off_line_points: points of the frontier that lie on no line, by size.
        has_error_bars: draw intervals as bars instead of bands.
        is_staircase: each value holds up to the next marker.
    """

    question: str
    setting: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    frontier: Series | None
    floor: float | None
    log_y: bool
    floor_label: str = FLOOR_LABEL
    reference_lines: tuple[tuple[str, float], ...] = ()
    published: Series | None = None
    off_line_points: tuple[Series, ...] = ()
    has_error_bars: bool = False
    is_staircase: bool = False
    log_x: bool = True

    @property
    def horizontal_lines(self) -> list[tuple[str, float, str]]:
        """Label, value and dash of every horizontal line: the floor first, then `reference_lines`."""
        floor = [] if self.floor is None else [(self.floor_label, self.floor, "dash")]
        return floor + [(label, value, "dot") for label, value in self.reference_lines]


@dataclass(frozen=True)
class HeatPanel:
    """Steps × guidance of one size under one solver.

    Attributes:
        values: scores [steps, guidance]; NaN where there is no point.
        best_columns: column of the best guidance in each row.
        optimum: (row, column) of the best value of the panel.
        color_limits: values at the two ends of the colour scale, the same for all panels; the better end is dark.
        race_intervals: 95 % interval of the best guidance in each row; None if no race chose the guidance.
    """

    size: str
    solver: str
    num_steps: tuple[int, ...]
    guidance: tuple[float, ...]
    values: np.ndarray
    best_columns: tuple[int, ...]
    optimum: tuple[int, int]
    color_limits: tuple[float, float]
    metric_label: str
    better: str
    race_intervals: tuple[tuple[float, float] | None, ...]

    @property
    def is_labelled(self) -> bool:
        """Whether the panel is small enough to write every value into its cell."""
        return self.values.size <= MAX_LABELLED_CELLS

    def column_position(self, guidance: float) -> float:
        """Return the position of a guidance value in units of columns, interpolated between their centres."""
        return float(np.interp(guidance, self.guidance, range(len(self.guidance))))


def compute_curves(table: pd.DataFrame, metric: str, floor: float | None = None, axis: str = "training_gflop") -> Curves:
    """Return the quality of every size along its training, with one solver, number of steps and guidance for all points.

    The points are those of the scaling laws (`isocost.analysis.scaling_laws.points_over_compute`), without untrained networks.

    Args:
        axis: a key of `COMPUTE_AXES`.

    Raises:
        ConfigError: no checkpoint before the last was scored.
    """
    rows = points_over_compute(table, metric)
    rows = rows[rows[axis].notna()].sort_values(["training_gflop", "point"])
    if rows["is_final"].astype(bool).all():
        raise ConfigError("no checkpoint before the last was scored: add train.snapshots to the study")
    return Curves(
        question="Does training compute alone decide, or size too?",
        setting=format_setting(rows.iloc[0]),
        x_label=COMPUTE_AXES[axis][1],
        y_label=metric_of(metric).axis,
        series=_series_by_size(table, rows, axis, metric, "training compute {}"),
        frontier=None,
        floor=floor,
        log_y=needs_log_scale(rows, metric, floor),
    )


def cost_curves(table: pd.DataFrame, metric: str, cost: str, floor: float | None = None, solver: str | None = None) -> Curves:
    """Return the quality of every size at its best guidance for each number of steps, and the frontier over all solvers.

    Args:
        solver: use the points of this solver only for the lines of the sizes; the best solver at each number of steps if None.

    Raises:
        ConfigError: no point was sampled with `solver`.
    """
    axis = cost_of(cost)
    competing = final_points(table, metric, cost)
    if solver is not None:
        competing = competing[competing["solver"] == solver]
        if competing.empty:
            raise ConfigError(f"no point of solver {solver!r} has both {metric} and {cost}")
    rows = best_per_group(competing, metric, ["size", "num_steps"]).sort_values([cost, "num_steps"])
    frontier = pareto(table, cost, metric)
    off_line = frontier[frontier["point"].isin(competing["point"]) & ~frontier["point"].isin(rows["point"])]
    solvers = sorted(competing["solver"].unique())
    chosen = " and solver" if len(solvers) > 1 else ""
    return Curves(
        question="Which size is best at equal cost?",
        setting=f"the best guidance{chosen} at each step count{_format_only_solver(solvers)}"
        + ("" if off_line.empty else f"; points off the lines: other guidance{chosen.replace('and', 'or')}"),
        x_label=axis.axis,
        y_label=metric_of(metric).axis,
        series=_series_by_size(table, rows, cost, metric, f"{{}} {axis.unit}"),
        frontier=make_series("frontier", frontier, cost, metric, f"{{}} {axis.unit}", INK, ("o", "circle-open")),
        floor=floor,
        log_y=needs_log_scale(rows, metric, floor),
        published=published_series(metric, cost),
        off_line_points=_series_by_size(table, off_line, cost, metric, f"{{}} {axis.unit}"),
    )


def published_series(metric: str, cost: str) -> Series | None:
    """Return the paper's Table 1 against the normalized cost, or None if the table has no comparable metric.

    The paper uses another data set, number of images and training. Its order of sizes can be compared with ours, its values
    cannot.
    """
    column = PUBLISHED_COLUMNS.get(metric)
    if column is None or cost != "normalized_cost":
        return None
    values = np.array([getattr(row, column) for row in TABLE_1])
    notes = tuple(
        f"{row.size} as published: {format_metric(metric)} {value:g}\n{PUBLISHED_STEPS} steps, guidance 7.5, ddim\n"
        "COCO-2014, 30,000 images: not comparable with our values"
        for row, value in zip(TABLE_1, values.tolist(), strict=True)
    )
    costs, unknown = (
        np.array([row.normalized_cost_per_step * PUBLISHED_STEPS for row in TABLE_1]),
        np.full(len(TABLE_1), np.nan),
    )
    return Series(PUBLISHED_LABEL, costs, values, unknown, unknown, notes, MUTED, ("D", "diamond-open"), "dashdot")


def solver_curves(
    table: pd.DataFrame, metric: str, size: str | None = None, axis: str = "num_steps", floor: float | None = None
) -> Curves:
    """Return the quality of every solver at its best guidance for each number of steps.

    Args:
        size: use the points of this size only; the best size at each number of steps if None.
        axis: a key of `STEP_AXES`.

    Raises:
        ConfigError: there is only one solver, or no point of `size`.
    """
    rows = final_points(table, metric)
    solvers = sorted(rows["solver"].unique())
    if len(solvers) == 1:
        raise ConfigError(f"every point has solver {solvers[0]}, so there is nothing to compare; list more solvers in `sweep`")
    if size is not None:
        rows = rows[rows["size"] == size]
        if rows.empty:
            raise ConfigError(f"no point of size {size!r} has {metric}")
    rows = best_per_group(rows, metric, ["solver", "num_steps"]).sort_values([axis, "num_steps"])
    _, x_label, note = STEP_AXES[axis]
    series = []
    for index, solver in enumerate(solvers):
        solver_rows = rows[rows["solver"] == solver]
        if solver_rows.empty:
            continue
        series.append(make_series(str(solver), solver_rows, axis, metric, note, *kind_style(index)))
    return Curves(
        question="Which solver is best at equal steps?",
        setting=f"the best guidance{' and size' if size is None else f' of {size}'} at each number of steps",
        x_label=x_label,
        y_label=metric_of(metric).axis,
        series=tuple(series),
        frontier=None,
        floor=floor,
        log_y=needs_log_scale(rows, metric, floor),
    )


def guidance_curves(table: pd.DataFrame, metric: str, solver: str) -> Curves:
    """Return the best guidance of every size against the number of steps, with the 95 % interval from the race.

    The interval is NaN where no race chose the guidance. It holds for the metric that decided the race; for another metric,
    drop the race columns from `table` first.

    Raises:
        ConfigError: all points have the same guidance, or there is no point of `solver`.
    """
    check_guidance_varies(table, metric)
    best = best_guidance(table, metric)
    best = best[best["solver"] == solver].sort_values("num_steps")
    if best.empty:
        raise ConfigError(f"no point of solver {solver!r} has {metric}")
    columns = {end: f"guidance_{end}" for end in ("low", "high")}
    ends = {f"best_{end}": best[name] if name in best.columns else np.nan for end, name in columns.items()}
    rows = best.assign(best=best["guidance"], **ends)
    sizes = sizes_in_order(table)
    colors = size_colors(len(sizes))
    series = []
    for index, size in enumerate(sizes):
        size_rows = rows[rows["size"] == size]
        if size_rows.empty:
            continue
        x, y, low, high = (size_rows[name].to_numpy(dtype=float) for name in ("num_steps", "best", "best_low", "best_high"))
        notes = tuple(_format_best_guidance(row, metric) for row in size_rows.to_dict("records"))
        series.append(Series(size, x, y, low, high, notes, colors[index], MARKERS[index % len(MARKERS)]))
    has_race = rows["best_low"].notna().any()
    return Curves(
        question="Which guidance is best for each number of steps?",
        setting=f"{solver}" + (", chosen by races; bars are 95 % intervals" if has_race else ", the best of the values tried"),
        x_label="solver steps",
        y_label="best guidance",
        series=tuple(series),
        frontier=None,
        floor=None,
        log_y=bool(rows["guidance"].min() > 0),
        has_error_bars=True,
    )


def check_guidance_varies(table: pd.DataFrame, metric: str) -> None:
    """Raise ConfigError if all points have the same guidance, so that none can be called the best."""
    if (values := final_points(table, metric)["guidance"].unique()).size == 1:
        raise ConfigError(
            f"every point has guidance {values[0]:g}, so the best guidance cannot be determined; list more in `sweep`"
        )


def guidance_panels(table: pd.DataFrame, metric: str) -> list[HeatPanel]:
    """Return one panel per solver and size, sorted by solver, then by size.

    The colour scale ends at the best value and at the value that 90 % of the points beat, so that a few bad points do not
    flatten the rest. If a race interval (columns `guidance_low`, `guidance_high`, by the metric that decided the race) reaches
    beyond the scored values, its end is an extra column without values.

    Raises:
        ConfigError: no point has classifier-free guidance at all noise levels.
    """
    rows = classifier_free(final_points(table, metric))
    if rows.empty:
        raise ConfigError("no point has classifier-free guidance at all noise levels; add `none` to sweep.guides")
    best = best_guidance(table, metric)
    about = metric_of(metric)
    sign = 1.0 if about.better == "lower" else -1.0
    badness = sign * rows[metric].to_numpy(dtype=float)
    color_limits = (float(sign * badness.min()), float(sign * np.quantile(badness, 0.9)))
    panels = []
    for solver in sorted(rows["solver"].unique()):
        for size in sizes_in_order(rows):
            panel_rows = rows[(rows["solver"] == solver) & (rows["size"] == size)]
            if panel_rows.empty:
                continue
            values = panel_rows.pivot(index="num_steps", columns="guidance", values=metric)
            best_rows = best[(best["solver"] == solver) & (best["size"] == size)].sort_values("num_steps")
            race_intervals = _race_intervals(best_rows)
            ends = [end for interval in race_intervals if interval for end in interval]
            extremes = [min([*ends, values.columns.min()]), max([*ends, values.columns.max()])]
            values = values.reindex(columns=sorted({*values.columns, *extremes}))
            best_columns = [int(values.columns.get_loc(guidance)) for guidance in best_rows["guidance"]]
            optimum = rank_points(best_rows, metric).iloc[0]
            panels.append(
                HeatPanel(
                    size=size,
                    solver=str(solver),
                    num_steps=tuple(int(steps) for steps in values.index),
                    guidance=tuple(float(guidance) for guidance in values.columns),
                    values=values.to_numpy(dtype=float),
                    best_columns=tuple(best_columns),
                    optimum=(
                        int(values.index.get_loc(optimum["num_steps"])),
                        int(values.columns.get_loc(optimum["guidance"])),
                    ),
                    color_limits=color_limits,
                    metric_label=format_metric(metric),
                    better=about.better,
                    race_intervals=race_intervals,
                )
            )
    return panels


def _race_intervals(rows: pd.DataFrame) -> tuple[tuple[float, float] | None, ...]:
    """Return the race's interval of the best guidance for every row; None if there was no race."""
    if "guidance_low" not in rows.columns:
        return (None,) * len(rows)
    ends = zip(rows["guidance_low"], rows["guidance_high"], strict=True)
    return tuple(None if pd.isna(low) else (float(low), float(high)) for low, high in ends)


def _format_best_guidance(row: Mapping[Any, Any], metric: str) -> str:
    configuration = format_row(row)
    score = format_score(row[metric], row[f"{metric}_low"], row[f"{metric}_high"])
    lines = [configuration, f"{format_metric(metric)} {score}"]
    if not np.isnan(row["best_low"]):
        interval = f"{format_number(row['best_low'])} to {format_number(row['best_high'])}"
        lines.append(f"best guidance {interval}, from a race of {row['race_images']:,.0f} images")
    return "\n".join([*lines, f"point {row['point']}"])


def _series_by_size(table: pd.DataFrame, rows: pd.DataFrame, x: str, metric: str, note: str) -> tuple[Series, ...]:
    sizes = sizes_in_order(table)
    colors = size_colors(len(sizes))
    rows_by_size = dict(iter(rows[_shown_columns(rows, x, metric)].groupby("size")))
    return tuple(
        make_series(size, rows_by_size[size], x, metric, note, colors[index], MARKERS[index % len(MARKERS)])
        for index, size in enumerate(sizes)
        if size in rows_by_size
    )


def _shown_columns(rows: pd.DataFrame, x: str, metric: str) -> list[str]:
    """The columns that a line shows; to select rows of all columns is slow."""
    names = dict.fromkeys([*ROW_COLUMNS, x, metric, f"{metric}_low", f"{metric}_high", "point"])
    return [name for name in names if name in rows.columns]


def make_series(
    label: str,
    rows: pd.DataFrame,
    x: str,
    metric: str,
    note: str,
    color: str,
    marker: tuple[str, str],
    dash: str = "solid",
) -> Series:
    """Return a line through table rows.

    Args:
        x: column on the x axis.
        note: format of the x value in the hover text, with one `{}`.
    """
    low, high = (rows[f"{metric}_{end}"].to_numpy(dtype=float) for end in ("low", "high"))
    values = rows[metric].to_numpy(dtype=float)
    metric_label = format_metric(metric)
    notes = tuple(
        f"{format_row(row)}\n{metric_label} {format_score(*score)}\n{note.format(format_number(row[x]))}\npoint {row['point']}"
        for row, *score in zip(rows[_shown_columns(rows, x, metric)].to_dict("records"), values, low, high, strict=True)
    )
    return Series(label, rows[x].to_numpy(dtype=float), values, low, high, notes, color, marker, dash)


def _format_only_solver(solvers: Sequence[str]) -> str:
    return f", {solvers[0]}" if len(solvers) == 1 else ""


def needs_log_scale(rows: pd.DataFrame, metric: str, floor: float | None) -> bool:
    """Return whether the y axis is logarithmic.

    It is for distances that span more than a factor of 8, if all values, intervals and the floor are well above zero.
    """
    if metric_of(metric).better == "higher":
        return False
    values = rows[metric].to_numpy(dtype=float)
    smallest, lowest = values.min(), rows[f"{metric}_low"].min()
    bands_fit = np.isnan(lowest) or lowest > smallest / 4
    floor_fits = floor is None or floor > smallest / 30
    return bool(smallest > 0 and values.max() > 8 * smallest and bands_fit and floor_fits)


# --- axis ranges and colours ------------------------------------------------------------------------------------------


def x_ticks(curves: Curves, with_published: bool = False) -> tuple[list[float], list[str]]:
    """Return ticks and labels of the x axis; `with_published` extends it to the paper's numbers."""
    shown = [*all_series(curves), *([curves.published] if with_published and curves.published else [])]
    values = np.concatenate([series.x for series in shown])
    return log_ticks(float(values.min()), float(values.max()))


def all_series(curves: Curves) -> tuple[Series, ...]:
    """Return all lines, the frontier last."""
    return curves.series + ((curves.frontier,) if curves.frontier else ())


def y_range(curves: Curves, with_published: bool = False) -> tuple[float, float]:
    """Return the smallest and the largest value of the y axis; `with_published` includes the paper's numbers."""
    shown = [*all_series(curves), *([curves.published] if with_published and curves.published else [])]
    series_values = [value for series in shown for value in (series.y, series.low, series.high)]
    values = np.concatenate([*series_values, [value for _, value, _ in curves.horizontal_lines]])
    return float(np.nanmin(values)), float(np.nanmax(values))


def panel_colors(panel: HeatPanel) -> tuple[Any, Normalize]:
    """Return the colour map and the scale of a panel; dark is better."""
    colors = colormaps["cividis" if panel.better == "lower" else "cividis_r"]
    low, high = sorted(panel.color_limits)
    return colors, Normalize(low, high if high > low else low + 1e-9)


def frontier_comparison(
    groups: Mapping[str, pd.DataFrame], metric: str, cost: str, question: str, competing: pd.DataFrame, floor: float | None
) -> Curves:
    """Return the frontier of every group of points: the best score within each cost.

    Args:
        groups: label -> points. An empty group draws nothing, but keeps its colour.
        competing: the points of all groups; they set the scale of the y axis.
    """
    axis = cost_of(cost)
    lines = [
        make_series(label, pareto(group, cost, metric), cost, metric, f"{{}} {axis.unit}", *kind_style(index))
        for index, (label, group) in enumerate(groups.items())
        if not group.empty
    ]
    return Curves(
        question=question,
        setting="the best size, steps, guidance and solver within its cost",
        x_label=axis.axis,
        y_label=metric_of(metric).axis,
        series=tuple(lines),
        frontier=None,
        floor=floor,
        log_y=needs_log_scale(competing, metric, floor),
        is_staircase=True,
    )
