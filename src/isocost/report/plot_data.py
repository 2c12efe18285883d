"""The data behind the marks: what each figure shows, before anything draws it.

matplotlib (`figures.py`) and plotly (`charts.py`) draw the same `Curves` or `HeatPanel`; contact sheets are in `sheets.py`.
Sizes are told apart twice, by a colour of viridis (dark is small) and by the shape of the mark, solvers three times, by the
dash as well; bands are 95 % intervals.
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
from isocost.analysis.formatting import format_configuration, format_metric, format_number, format_score
from isocost.analysis.pareto import best_guidance, metric_of, pareto
from isocost.analysis.results_table import best_in_each, final_points, rank_points, sizes_in_order, with_metric
from isocost.errors import ConfigError
from isocost.models.paper_table import TABLE_1
from isocost.report.plot_style import INK, MARKS, MUTED, kind_style, log_ticks, size_colors

FLOOR_LABEL = "decoded real images"
MAX_LABELLED = 200
PUBLISHED_LABEL = "published, not ours (arXiv 2404.01367)"
PUBLISHED_STEPS = 50
OF_THE_KIND = {"fid": "fid", **dict.fromkeys(("clip_score_b32", "clip_score_l14", "clip_score_l14_336"), "clip")}
"""Metric -> the column of the paper's Table 1 that is comparable in kind; it does not name the tower of its CLIP score."""
COMPUTE_AXES = {
    "training_gflop": ("true FLOPs", "training GFLOP (3 × forward × images seen)"),
    "normalized_training_compute": ("the paper's axis", "GFLOP of a forward pass × iterations, as in arXiv 2404.01367"),
}
"""Ways to count training compute: column of the table, short words, title of the axis."""
STEP_AXES = {
    "num_steps": ("steps", "solver steps", "{} steps"),
    "nfe": ("evaluations", "network evaluations per image", "{} network evaluations per image"),
}
"""What solvers are compared across: column of the table, short words, title of the axis, a value in a sentence."""


@dataclass(frozen=True)
class Series:
    """One line: a size, a solver, or the frontier. `low` and `high` bound the band, NaN where there is no interval.

    `names` stand beside its marks; none where it is empty.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray
    notes: tuple[str, ...]
    color: str
    mark: tuple[str, str]
    dash: str = "solid"
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Curves:
    """Quality against something that costs: one series a size or solver, perhaps the frontier, perhaps the floor.

    `levels` are further values that no model made, by what made them. `published` is a layer of its own, of the paper's
    numbers: hidden until it is asked for, and no part of `series`. `beside` are marks of the frontier that lie on none of the
    lines, by size. Where `bars` is true, intervals are bars, not bands; a staircase holds each value up to the next mark.
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
    levels: tuple[tuple[str, float], ...] = ()
    published: Series | None = None
    beside: tuple[Series, ...] = ()
    bars: bool = False
    is_staircase: bool = False
    log_x: bool = True

    @property
    def dashed(self) -> list[tuple[str, float, str]]:
        """Label, value and dash of the lines across."""
        first = [] if self.floor is None else [(self.floor_label, self.floor, "dash")]
        return first + [(label, value, "dot") for label, value in self.levels]


@dataclass(frozen=True)
class HeatPanel:
    """Steps x guidance of one size under one solver. `values` [steps, guidance], NaN where there is no point.

    `best` holds the column of the best guidance for every row, `optimum` the (row, column) of the best of all;
    `limits` are the values at the two ends of the colours, common to all panels, the better one dark. Where guidance was raced
    for, `found` has the interval of the best one for every row, None where there was no race.
    """

    size: str
    solver: str
    num_steps: tuple[int, ...]
    guidance: tuple[float, ...]
    values: np.ndarray
    best: tuple[int, ...]
    optimum: tuple[int, int]
    limits: tuple[float, float]
    metric_label: str
    better: str
    found: tuple[tuple[float, float] | None, ...]

    @property
    def is_labelled(self) -> bool:
        """Whether its values can be written into their cells."""
        return self.values.size <= MAX_LABELLED

    def across(self, guidance: float) -> float:
        """Where a guidance lies between the centres of the columns, in columns."""
        return float(np.interp(guidance, self.guidance, range(len(self.guidance))))


def compute_curves(table: pd.DataFrame, metric: str, floor: float | None = None, axis: str = "training_gflop") -> Curves:
    """Quality of every size along its training, all points sampled alike; `axis` is one of `COMPUTE_AXES`.

    Drawn are the points at earlier training marks, and the final points that share their solver, steps and guidance;
    where several such settings were scored, the one with the most marks.

    Raises:
        ConfigError: no checkpoint before the last was scored.
    """
    rows = with_metric(table, metric)
    rows = rows[rows[axis].notna()]  # what was not trained has no place on it
    setting = ["solver", "num_steps", "guidance"]
    earlier = rows[~rows["is_final"].astype(bool)]
    if earlier.empty:
        raise ConfigError("no checkpoint before the last was scored: `train.snapshots` in the study asks for some")
    counts = earlier.groupby(setting).size().reset_index(name="count")
    chosen = counts.sort_values(["count", *setting], ascending=[False, True, True, True]).iloc[0]
    rows = rows[(rows[setting] == chosen[setting]).all(axis=1)].sort_values(["training_gflop", "point"])
    solver, steps, guidance = chosen["solver"], chosen["num_steps"], chosen["guidance"]
    return Curves(
        question="Does training compute alone decide, or size too?",
        setting=f"{solver}, {steps} steps, guidance {guidance:g}",
        x_label=COMPUTE_AXES[axis][1],
        y_label=metric_of(metric).axis,
        series=_series_by_size(table, rows, axis, metric, "training compute {}"),
        frontier=None,
        floor=floor,
        log_y=wants_log(rows, metric, floor),
    )


def cost_curves(table: pd.DataFrame, metric: str, cost: str, floor: float | None = None, solver: str | None = None) -> Curves:
    """Quality of every size at its best guidance for each step count, and the frontier of all points under every solver.

    Args:
        solver: draw the sizes under this solver only; the best solver at each step count where None.

    Raises:
        ConfigError: no point is of `solver`.
    """
    axis = cost_of(cost)
    competing = final_points(table, metric, cost)
    if solver is not None:
        competing = competing[competing["solver"] == solver]
        if competing.empty:
            raise ConfigError(f"no point of solver {solver!r} carries {metric} and {cost}")
    rows = best_in_each(competing, metric, ["size", "num_steps"]).sort_values([cost, "num_steps"])
    frontier = pareto(table, cost, metric)
    beside = frontier[frontier["point"].isin(competing["point"]) & ~frontier["point"].isin(rows["point"])]
    solvers = sorted(competing["solver"].unique())
    chosen = " and solver" if len(solvers) > 1 else ""
    return Curves(
        question="Which size is best at equal cost?",
        setting=f"the best guidance{chosen} at each step count{_only(solvers)}"
        + ("" if beside.empty else f"; off the lines: other guidance{chosen.replace('and', 'or')}"),
        x_label=axis.axis,
        y_label=metric_of(metric).axis,
        series=_series_by_size(table, rows, cost, metric, f"{{}} {axis.unit}"),
        frontier=series_of("frontier", frontier, cost, metric, f"{{}} {axis.unit}", INK, ("o", "circle-open")),
        floor=floor,
        log_y=wants_log(rows, metric, floor),
        published=published(metric, cost),
        beside=_series_by_size(table, beside, cost, metric, f"{{}} {axis.unit}"),
    )


def published(metric: str, cost: str) -> Series | None:
    """The paper's Table 1 against its own cost, as a layer beside ours; None where it published nothing of the kind.

    Another data set, other images and another training: its order of sizes may be compared with ours, its values may not.
    """
    column = OF_THE_KIND.get(metric)
    if column is None or cost != "normalized_cost":
        return None
    values = np.array([getattr(row, column) for row in TABLE_1])
    notes = tuple(
        f"{row.size} as published: {format_metric(metric)} {value:g}\n{PUBLISHED_STEPS} steps, guidance 7.5, ddim\n"
        "COCO-2014, 30,000 images: not our data, not our values"
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
    """Quality under every solver at its best guidance for each number of steps; `axis` is one of `STEP_AXES`.

    Args:
        size: one size; the best of all at each number of steps where None.

    Raises:
        ConfigError: there is but one solver, or no point of `size`.
    """
    rows = final_points(table, metric)
    solvers = sorted(rows["solver"].unique())
    if len(solvers) == 1:
        raise ConfigError(f"every point was made with {solvers[0]}, so there is nothing to compare")
    if size is not None:
        rows = rows[rows["size"] == size]
        if rows.empty:
            raise ConfigError(f"no point of size {size!r} carries {metric}")
    rows = best_in_each(rows, metric, ["solver", "num_steps"]).sort_values([axis, "num_steps"])
    _, x_label, note = STEP_AXES[axis]
    series = []
    for at, solver in enumerate(solvers):
        own = rows[rows["solver"] == solver]
        if own.empty:
            continue
        series.append(series_of(str(solver), own, axis, metric, note, *kind_style(at)))
    return Curves(
        question="Which solver is best at equal steps?",
        setting=f"the best guidance{' and size' if size is None else f' of {size}'} at each number of steps",
        x_label=x_label,
        y_label=metric_of(metric).axis,
        series=tuple(series),
        frontier=None,
        floor=floor,
        log_y=wants_log(rows, metric, floor),
    )


def guidance_curves(table: pd.DataFrame, metric: str, solver: str) -> Curves:
    """The best guidance of every size against steps, with the interval that a race found; NaN where there was no race.

    An interval is by the metric that was raced by: leave the races' columns out of `table` for another one.

    Raises:
        ConfigError: all points have one guidance, or there is no point of `solver`.
    """
    check_guidance(table, metric)
    best = best_guidance(table, metric)
    best = best[best["solver"] == solver].sort_values("num_steps")
    if best.empty:
        raise ConfigError(f"no point of solver {solver!r} carries {metric}")
    sides = {side: f"guidance_{side}" for side in ("low", "high")}
    ends = {f"best_{side}": best[name] if name in best.columns else np.nan for side, name in sides.items()}
    rows = best.assign(best=best["guidance"], **ends)
    sizes = sizes_in_order(table)
    colors = size_colors(len(sizes))
    series = []
    for at, size in enumerate(sizes):
        own = rows[rows["size"] == size]
        if own.empty:
            continue
        x, y, low, high = (own[name].to_numpy(dtype=float) for name in ("num_steps", "best", "best_low", "best_high"))
        notes = tuple(_found_text(row, metric) for row in own.to_dict("records"))
        series.append(Series(size, x, y, low, high, notes, colors[at], MARKS[at % len(MARKS)]))
    raced = rows["best_low"].notna().any()
    return Curves(
        question="Which guidance is best for each number of steps?",
        setting=f"{solver}" + (", raced for: bars are 95 % intervals of the best" if raced else ", the best of those tried"),
        x_label="solver steps",
        y_label="best guidance",
        series=tuple(series),
        frontier=None,
        floor=None,
        log_y=bool(rows["guidance"].min() > 0),
        bars=True,
    )


def check_guidance(table: pd.DataFrame, metric: str) -> None:
    """Raise ConfigError where every point was made with one guidance, so that none can be called the best."""
    if (tried := final_points(table, metric)["guidance"].unique()).size == 1:
        raise ConfigError(f"every point was made with guidance {tried[0]:g}, so there is nothing to choose")


def guidance_panels(table: pd.DataFrame, metric: str) -> list[HeatPanel]:
    """One panel for every solver and size, by solver, then by size.

    The colours end at the best value of all and at the value that nine in ten beat: a few bad points do not flatten the rest.
    Where a race's interval (columns `guidance_low`, `guidance_high`, by the metric that was raced by) reaches beyond the values
    that were scored, its end is a column too, without a value.
    """
    rows = final_points(table, metric)
    best = best_guidance(table, metric)
    about = metric_of(metric)
    sign = 1.0 if about.better == "lower" else -1.0
    badness = sign * rows[metric].to_numpy(dtype=float)
    limits = (float(sign * badness.min()), float(sign * np.quantile(badness, 0.9)))
    panels = []
    for solver in sorted(rows["solver"].unique()):
        for size in sizes_in_order(rows):
            here = rows[(rows["solver"] == solver) & (rows["size"] == size)]
            if here.empty:
                continue
            values = here.pivot(index="num_steps", columns="guidance", values=metric)
            tops = best[(best["solver"] == solver) & (best["size"] == size)].sort_values("num_steps")
            found = _found(tops)
            ends = [end for interval in found if interval for end in interval]
            widest = [min([*ends, values.columns.min()]), max([*ends, values.columns.max()])]
            values = values.reindex(columns=sorted({*values.columns, *widest}))
            columns = [int(values.columns.get_loc(guidance)) for guidance in tops["guidance"]]
            top = rank_points(tops, metric).iloc[0]
            panels.append(
                HeatPanel(
                    size=size,
                    solver=str(solver),
                    num_steps=tuple(int(steps) for steps in values.index),
                    guidance=tuple(float(guidance) for guidance in values.columns),
                    values=values.to_numpy(dtype=float),
                    best=tuple(columns),
                    optimum=(int(values.index.get_loc(top["num_steps"])), int(values.columns.get_loc(top["guidance"]))),
                    limits=limits,
                    metric_label=format_metric(metric),
                    better=about.better,
                    found=found,
                )
            )
    return panels


def _found(rows: pd.DataFrame) -> tuple[tuple[float, float] | None, ...]:
    """The interval of the best guidance that a race found, for every row."""
    if "guidance_low" not in rows.columns:
        return (None,) * len(rows)
    ends = zip(rows["guidance_low"], rows["guidance_high"], strict=True)
    return tuple(None if pd.isna(low) else (float(low), float(high)) for low, high in ends)


def _found_text(row: Mapping[Any, Any], metric: str) -> str:
    words = format_configuration(row["size"], row["num_steps"], row["guidance"], row["solver"])
    told = [words, f"{format_metric(metric)} {format_score(row[metric], row[f'{metric}_low'], row[f'{metric}_high'])}"]
    if not np.isnan(row["best_low"]):
        interval = f"{format_number(row['best_low'])} to {format_number(row['best_high'])}"
        told.append(f"best guidance {interval}, from a race of {row['race_images']:,.0f} images")
    return "\n".join([*told, f"point {row['point']}"])


def _series_by_size(table: pd.DataFrame, rows: pd.DataFrame, x: str, metric: str, note: str) -> tuple[Series, ...]:
    sizes = sizes_in_order(table)
    present = [(at, size) for at, size in enumerate(sizes) if (rows["size"] == size).any()]
    colors = size_colors(len(sizes))
    return tuple(
        series_of(size, rows[rows["size"] == size], x, metric, note, colors[at], MARKS[at % len(MARKS)]) for at, size in present
    )


def series_of(
    label: str,
    rows: pd.DataFrame,
    x: str,
    metric: str,
    note: str,
    color: str,
    mark: tuple[str, str],
    dash: str = "solid",
) -> Series:
    low, high = (rows[f"{metric}_{side}"].to_numpy(dtype=float) for side in ("low", "high"))
    values = rows[metric].to_numpy(dtype=float)
    words = format_metric(metric)
    notes = tuple(
        f"{format_configuration(row['size'], row['num_steps'], row['guidance'], row['solver'])}\n"
        f"{words} {format_score(*score)}\n{note.format(format_number(row[x]))}\npoint {row['point']}"
        for row, *score in zip(rows.to_dict("records"), values, low, high, strict=True)
    )
    return Series(label, rows[x].to_numpy(dtype=float), values, low, high, notes, color, mark, dash)


def _only(solvers: Sequence[str]) -> str:
    return f", {solvers[0]}" if len(solvers) == 1 else ""


def wants_log(rows: pd.DataFrame, metric: str, floor: float | None) -> bool:
    """A logarithmic axis for distances that span more than a factor of 8, all of them (and the floor) well above zero."""
    if metric_of(metric).better == "higher":
        return False
    values = rows[metric].to_numpy(dtype=float)
    smallest, lowest = values.min(), rows[f"{metric}_low"].min()
    bands_fit = np.isnan(lowest) or lowest > smallest / 4
    floor_fits = floor is None or floor > smallest / 30
    return bool(smallest > 0 and values.max() > 8 * smallest and bands_fit and floor_fits)


# --- extents ---------------------------------------------------------------------------------------------------------


def x_ticks(curves: Curves, with_published: bool = False) -> tuple[list[float], list[str]]:
    """Places and labels for the cost axis, the paper's layer taken in where it is shown."""
    shown = [*all_series(curves), *([curves.published] if with_published and curves.published else [])]
    every = np.concatenate([series.x for series in shown])
    return log_ticks(float(every.min()), float(every.max()))


def all_series(curves: Curves) -> tuple[Series, ...]:
    """The lines, the frontier last."""
    return curves.series + ((curves.frontier,) if curves.frontier else ())


def y_range(curves: Curves, with_published: bool = False) -> tuple[float, float]:
    """Least and greatest value that a drawing must show: lines, bands, floor, levels, the paper's layer where it is shown."""
    shown = [*all_series(curves), *([curves.published] if with_published and curves.published else [])]
    every = [value for series in shown for value in (series.y, series.low, series.high)]
    values = np.concatenate([*every, [value for _, value, _ in curves.dashed]])
    return float(np.nanmin(values)), float(np.nanmax(values))


def panel_colors(panel: HeatPanel) -> tuple[Any, Normalize]:
    """Colour map and scale of a panel; dark is better."""
    colors = colormaps["cividis" if panel.better == "lower" else "cividis_r"]
    low, high = sorted(panel.limits)
    return colors, Normalize(low, high if high > low else low + 1e-9)


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
        setting="the best size, steps, guidance and solver within its cost",
        x_label=axis.axis,
        y_label=metric_of(metric).axis,
        series=tuple(lines),
        frontier=None,
        floor=floor,
        log_y=wants_log(competing, metric, floor),
        is_staircase=True,
    )
