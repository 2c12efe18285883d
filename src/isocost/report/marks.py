"""The data behind the marks: what each figure shows, before anything draws it.

matplotlib (`figures.py`) and plotly (`charts.py`) draw the same `Curves`, `HeatPanel` or `ContactSheet`.
Sizes are told apart twice, by a colour of viridis (dark is small) and by the shape of the mark; bands are 95 % intervals.

Shape letters: K prompts, H, W height and width in pixels; pictures are uint8 [K, H, W, 3].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import Normalize, to_hex

from isocost.analysis.frontier import (
    best_first,
    best_guidance,
    best_in_each,
    cost_of,
    finals,
    fits,
    format_number,
    format_score,
    metric_of,
    metric_words,
    pareto,
    scored,
    sizes_in_order,
)
from isocost.errors import RequestError

MARKS = (
    ("o", "circle"),
    ("s", "square"),
    ("^", "triangle-up"),
    ("D", "diamond"),
    ("v", "triangle-down"),
    ("P", "cross"),
    ("X", "x"),
    ("p", "pentagon"),
    ("*", "star"),
    ("h", "hexagon"),
    ("<", "triangle-left"),
    (">", "triangle-right"),
)
INK, MUTED, HAIRLINE, OPTIMUM, EMPTY = "#1c2127", "#5d6672", "#e4e7eb", "#d55e00", "#eceef1"
FLOOR_LABEL = "decoded real pictures"


@dataclass(frozen=True)
class Series:
    """One line: a size, or the frontier. `low` and `high` bound the band, NaN where there is no interval."""

    label: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray
    notes: tuple[str, ...]
    color: str
    mark: tuple[str, str]


@dataclass(frozen=True)
class Curves:
    """Quality against something that costs: one series a size, perhaps the frontier, perhaps the floor.

    `levels` are further values that no model made, by what made them.
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

    @property
    def dashed(self) -> list[tuple[str, float, str]]:
        """Label, value and dash of the lines across."""
        first = [] if self.floor is None else [(self.floor_label, self.floor, "dash")]
        return first + [(label, value, "dot") for label, value in self.levels]


@dataclass(frozen=True)
class HeatPanel:
    """Steps x guidance of one size under one sampler. `values` [steps, guidance], NaN where there is no point.

    `best` holds the column of the best guidance for every row, `optimum` the (row, column) of the best of all;
    `limits` are the values at the two ends of the colours, common to all panels, the better one dark.
    """

    size: str
    sampler: str
    num_steps: tuple[int, ...]
    guidance: tuple[float, ...]
    values: np.ndarray
    best: tuple[int, ...]
    optimum: tuple[int, int]
    limits: tuple[float, float]
    metric_label: str
    better: str

    @property
    def is_labelled(self) -> bool:
        """Whether its values can be written into their cells."""
        return self.values.size <= MOST_LABELLED


def some_places(number: int) -> list[int]:
    """Places of 0 to `number` - 1 that get a tick: all, or at most `MOST_TICKS` of them, evenly spread."""
    step = -(-number // MOST_TICKS)
    return list(range(0, number, step))


@dataclass(frozen=True)
class ContactCell:
    """The pictures [K, H, W, 3] of the point that stands for one size at one step count or budget."""

    point: str
    label: str
    pictures: np.ndarray


@dataclass(frozen=True)
class ContactSheet:
    """The same prompts and seeds over sizes (rows) and step counts or budgets (columns); None where no picture was kept."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    column_title: str
    cells: tuple[tuple[ContactCell | None, ...], ...]
    captions: tuple[str, ...]


MOST_LABELLED, MOST_TICKS = 200, 20
COMPUTE_AXES = {
    "training_gflop": ("true FLOPs", "training GFLOP (3 × forward × images seen)"),
    "paper_compute": ("the paper's axis", "GFLOP of a forward pass × iterations, as in arXiv 2404.01367"),
}
"""Ways to count training compute: column of the table, short words, title of the axis."""


def compute_curves(table: pd.DataFrame, metric: str, floor: float | None = None, axis: str = "training_gflop") -> Curves:
    """Quality of every size along its training, all points sampled alike; `axis` is one of `COMPUTE_AXES`.

    Drawn are the points at earlier training marks, and the final points that share their sampler, steps and guidance;
    where several such settings were scored, the one with the most marks.

    Raises:
        RequestError: no checkpoint before the last was scored.
    """
    rows = scored(table, metric)
    rows = rows[rows[axis].notna()]  # what was not trained has no place on it
    setting = ["sampler", "num_steps", "guidance"]
    earlier = rows[~rows["is_final"].astype(bool)]
    if earlier.empty:
        raise RequestError("no checkpoint before the last was scored: `train.marks` in the study asks for some")
    counts = earlier.groupby(setting).size().reset_index(name="count")
    chosen = counts.sort_values(["count", *setting], ascending=[False, True, True, True]).iloc[0]
    rows = rows[(rows[setting] == chosen[setting]).all(axis=1)].sort_values(["training_gflop", "point"])
    sampler, steps, guidance = chosen["sampler"], chosen["num_steps"], chosen["guidance"]
    return Curves(
        question="How good does each size get for its training compute?",
        setting=f"{sampler}, {steps} steps, guidance {guidance:g}",
        x_label=COMPUTE_AXES[axis][1],
        y_label=metric_of(metric).axis,
        series=_series_by_size(table, rows, axis, metric, "training compute {}"),
        frontier=None,
        floor=floor,
        log_y=_wants_log(rows, metric, floor),
    )


def cost_curves(table: pd.DataFrame, metric: str, cost: str, floor: float | None = None, sampler: str | None = None) -> Curves:
    """Quality of every size at its best guidance for each step count, and the frontier of all points under every sampler.

    Args:
        sampler: draw the sizes under this sampler only; the best sampler at each step count where None.
    """
    axis = cost_of(cost)
    competing = finals(table, metric, cost)
    if sampler is not None:
        competing = competing[competing["sampler"] == sampler]
        if competing.empty:
            raise RequestError(f"no point of sampler {sampler!r} carries {metric} and {cost}")
    rows = best_in_each(competing, metric, ["size", "num_steps"]).sort_values([cost, "num_steps"])
    frontier = pareto(table, cost, metric)
    samplers = sorted(competing["sampler"].unique())
    return Curves(
        question="Which size is best at equal cost?",
        setting=f"the best guidance{' and sampler' if len(samplers) > 1 else ''} at each step count" + _only(samplers),
        x_label=axis.axis,
        y_label=metric_of(metric).axis,
        series=_series_by_size(table, rows, cost, metric, f"{{}} {axis.unit}"),
        frontier=_series("frontier", frontier, cost, metric, f"{{}} {axis.unit}", INK, ("o", "circle-open")),
        floor=floor,
        log_y=_wants_log(rows, metric, floor),
    )


def guidance_panels(table: pd.DataFrame, metric: str) -> list[HeatPanel]:
    """One panel for every sampler and size, by sampler, then by size.

    The colours end at the best value of all and at the value that nine in ten beat: a few bad points do not flatten the rest.
    """
    rows = finals(table, metric)
    best = best_guidance(table, metric)
    about = metric_of(metric)
    sign = 1.0 if about.better == "lower" else -1.0
    badness = sign * rows[metric].to_numpy(dtype=float)
    limits = (float(sign * badness.min()), float(sign * np.quantile(badness, 0.9)))
    panels = []
    for sampler in sorted(rows["sampler"].unique()):
        for size in sizes_in_order(rows):
            here = rows[(rows["sampler"] == sampler) & (rows["size"] == size)]
            if here.empty:
                continue
            values = here.pivot(index="num_steps", columns="guidance", values=metric)
            tops = best[(best["sampler"] == sampler) & (best["size"] == size)].sort_values("num_steps")
            columns = [int(values.columns.get_loc(guidance)) for guidance in tops["guidance"]]
            top = best_first(tops, metric).iloc[0]
            panels.append(
                HeatPanel(
                    size=size,
                    sampler=str(sampler),
                    num_steps=tuple(int(steps) for steps in values.index),
                    guidance=tuple(float(guidance) for guidance in values.columns),
                    values=values.to_numpy(dtype=float),
                    best=tuple(columns),
                    optimum=(int(values.index.get_loc(top["num_steps"])), int(values.columns.get_loc(top["guidance"]))),
                    limits=limits,
                    metric_label=metric_words(metric),
                    better=about.better,
                )
            )
    return panels


def contact_cells(
    table: pd.DataFrame,
    metric: str,
    samples: Mapping[str, np.ndarray],
    captions: Sequence[str],
    cost: str = "paper_cost",
    budgets: Sequence[float] = (),
) -> ContactSheet:
    """For every size and step count (or budget, where given) the best point among those whose pictures were kept.

    Args:
        samples: point -> pictures uint8 [K, H, W, 3] of the same K prompts and seeds.
        captions: the K prompts.

    Raises:
        RequestError: no pictures were kept, or their number differs from that of the captions.
    """
    rows = finals(table, metric, cost)
    rows = best_first(rows[rows["point"].isin(list(samples))], metric, cost)
    if rows.empty:
        raise RequestError("no pictures were kept of any finished point: `isocost sweep` keeps some where it scores")
    for point in rows["point"]:
        pictures = samples[point]
        if pictures.ndim != 4 or pictures.shape[3] != 3 or pictures.dtype != np.uint8 or len(pictures) != len(captions):
            found = f"{pictures.dtype} {list(pictures.shape)}"
            raise RequestError(f"pictures of point {point}: {found} is not uint8 [{len(captions)} captions, H, W, 3]")
    sizes = sizes_in_order(rows)
    if budgets:
        columns = tuple(format_number(budget) for budget in budgets)
        title = f"budget ({cost_of(cost).unit})"
        masks = [fits(rows[cost], budget) for budget in budgets]
    else:
        steps = sorted(rows["num_steps"].unique())
        columns, title = tuple(str(number) for number in steps), "steps"
        masks = [rows["num_steps"] == number for number in steps]
    cells = tuple(tuple(_cell(rows[mask & (rows["size"] == size)], samples) for mask in masks) for size in sizes)
    return ContactSheet(tuple(sizes), columns, title, cells, tuple(captions))


def _cell(rows: pd.DataFrame, samples: Mapping[str, np.ndarray]) -> ContactCell | None:
    if rows.empty:
        return None
    row = rows.iloc[0]
    return ContactCell(str(row["point"]), _configuration_text(row), samples[row["point"]])


def _series_by_size(table: pd.DataFrame, rows: pd.DataFrame, x: str, metric: str, note: str) -> tuple[Series, ...]:
    sizes = sizes_in_order(table)
    present = [(at, size) for at, size in enumerate(sizes) if (rows["size"] == size).any()]
    colors = size_colors(len(sizes))
    return tuple(
        _series(size, rows[rows["size"] == size], x, metric, note, colors[at], MARKS[at % len(MARKS)]) for at, size in present
    )


def _series(label: str, rows: pd.DataFrame, x: str, metric: str, note: str, color: str, mark: tuple[str, str]) -> Series:
    low, high = (rows[f"{metric}_{side}"].to_numpy(dtype=float) for side in ("low", "high"))
    values = rows[metric].to_numpy(dtype=float)
    words = metric_words(metric)
    notes = tuple(
        f"{_configuration_text(row)}\n{words} {format_score(*score)}\n{note.format(format_number(row[x]))}"
        for (_, row), *score in zip(rows.iterrows(), values, low, high, strict=True)
    )
    return Series(label, rows[x].to_numpy(dtype=float), values, low, high, notes, color, mark)


def size_colors(num_sizes: int) -> list[str]:
    """Colours of viridis from dark (small) to light (large), short of its yellow, which fades on white."""
    places = np.linspace(0.0, 0.82, num_sizes) if num_sizes > 1 else [0.3]
    return [to_hex(colormaps["viridis"](place)) for place in places]


def _configuration_text(row: pd.Series) -> str:
    return f"{row['size']}, {row['num_steps']} steps, guidance {row['guidance']:g}, {row['sampler']}"


def _only(samplers: Sequence[str]) -> str:
    return f", {samplers[0]}" if len(samplers) == 1 else ""


def _wants_log(rows: pd.DataFrame, metric: str, floor: float | None) -> bool:
    """A logarithmic axis for distances that span more than a factor of 8, all of them (and the floor) well above zero."""
    if metric_of(metric).better == "higher":
        return False
    values = rows[metric].to_numpy(dtype=float)
    smallest, lowest = values.min(), rows[f"{metric}_low"].min()
    bands_fit = np.isnan(lowest) or lowest > smallest / 4
    floor_fits = floor is None or floor > smallest / 30
    return bool(smallest > 0 and values.max() > 8 * smallest and bands_fit and floor_fits)


# --- ticks ------------------------------------------------------------------------------------------------------------


def log_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Places and labels for a logarithmic axis: powers of two from 1/4 up, else 1-2-5, or powers of ten over wide ranges."""
    if low >= 0.25 and high <= 2**14:
        ticks = [2.0**power for power in range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)]
    else:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        digits = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
        ticks = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
    inside = [tick for tick in ticks if low / 1.5 <= tick <= high * 1.5]
    return inside, [_tick_label(tick) for tick in inside]


def _tick_label(value: float) -> str:
    if value < 1e4:
        return f"{value:g}"
    power = math.floor(math.log10(value))
    digit = round(value / 10**power)
    superscript = str(power).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{'' if digit == 1 else f'{digit}×'}10{superscript}"


def x_ticks(curves: Curves) -> tuple[list[float], list[str]]:
    """Places and labels for the cost axis."""
    every = np.concatenate([series.x for series in all_series(curves)])
    return log_ticks(float(every.min()), float(every.max()))


def all_series(curves: Curves) -> tuple[Series, ...]:
    """The lines, the frontier last."""
    return curves.series + ((curves.frontier,) if curves.frontier else ())


def y_range(curves: Curves) -> tuple[float, float]:
    """Least and greatest value that a drawing must show: lines, bands, floor and levels."""
    every = [value for series in all_series(curves) for value in (series.y, series.low, series.high)]
    values = np.concatenate([*every, [value for _, value, _ in curves.dashed]])
    return float(np.nanmin(values)), float(np.nanmax(values))


def panel_colors(panel: HeatPanel) -> tuple[Any, Normalize]:
    """Colour map and scale of a panel; dark is better."""
    colors = colormaps["cividis" if panel.better == "lower" else "cividis_r"]
    low, high = sorted(panel.limits)
    return colors, Normalize(low, high if high > low else low + 1e-9)
