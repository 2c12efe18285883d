"""Figures named after the question they answer: first the data behind the marks, then matplotlib, then plotly.

Both ways of drawing take the same `Curves`, `HeatPanel` or `ContactSheet`, so what is tested on these holds for either.
Sizes are told apart twice, by a colour of viridis (dark is small) and by the shape of the mark; bands are 95 % intervals.

Shape letters: K prompts, H, W height and width in pixels; pictures are uint8 [K, H, W, 3].
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

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
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
FLOOR_LABEL = "decoded real pictures"
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": HAIRLINE,
    "legend.frameon": False,
    "savefig.bbox": "tight",
    "savefig.dpi": 160,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


# --- the data behind the marks ----------------------------------------------------------------------------------------


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
    """Quality against something that costs: one series a size, perhaps the frontier, perhaps the floor."""

    question: str
    setting: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    frontier: Series | None
    floor: float | None
    log_y: bool


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


def compute_curves(table: pd.DataFrame, metric: str, floor: float | None = None) -> Curves:
    """Quality of every size along its training, all points sampled alike.

    Drawn are the points at earlier training marks, and the final points that share their sampler, steps and guidance;
    where several such settings were scored, the one with the most marks.

    Raises:
        RequestError: no checkpoint before the last was scored.
    """
    rows = scored(table, metric)
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
        x_label="training GFLOP (3 × forward × images seen)",
        y_label=metric_of(metric).axis,
        series=_series_by_size(table, rows, "training_gflop", metric, "training compute {} GFLOP"),
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


def _x_ticks(curves: Curves) -> tuple[list[float], list[str]]:
    every = np.concatenate([series.x for series in _all_series(curves)])
    return log_ticks(float(every.min()), float(every.max()))


def _all_series(curves: Curves) -> tuple[Series, ...]:
    return curves.series + ((curves.frontier,) if curves.frontier else ())


# --- matplotlib: pictures for papers ----------------------------------------------------------------------------------


def quality_against_training_compute(table: pd.DataFrame, metric: str, floor: float | None = None) -> Figure:
    """Does compute alone decide, or size? See `compute_curves`."""
    return draw_curves(compute_curves(table, metric, floor))


def quality_against_cost(
    table: pd.DataFrame, metric: str, cost: str = "paper_cost", floor: float | None = None, sampler: str | None = None
) -> Figure:
    """Which size is best at equal cost? See `cost_curves`."""
    return draw_curves(cost_curves(table, metric, cost, floor, sampler))


def guidance_heatmap(table: pd.DataFrame, metric: str) -> Figure:
    """Which guidance is best for each size and step count? One row a sampler, one panel a size; see `guidance_panels`."""
    panels = guidance_panels(table, metric)
    samplers, sizes = sorted({panel.sampler for panel in panels}), sizes_in_order(finals(table, metric))
    widest, tallest = max(len(panel.guidance) for panel in panels), max(len(panel.num_steps) for panel in panels)
    shape = (len(sizes) * (widest * 0.46 + 0.7) + 1.2, len(samplers) * (tallest * 0.3 + 0.9))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=shape, layout="constrained")
        grid = figure.subplots(len(samplers), len(sizes), squeeze=False)
        for axes in grid.flat:
            axes.set_visible(False)
        for panel in panels:
            axes = grid[samplers.index(panel.sampler), sizes.index(panel.size)]
            axes.set_visible(True)
            mappable = _draw_panel(axes, panel)
            axes.set_title(panel.size if len(samplers) == 1 else f"{panel.size}, {panel.sampler}", fontsize=9)
        bar = figure.colorbar(mappable, ax=grid, shrink=0.8, extend="max" if panels[0].better == "lower" else "min")
        bar.set_label(f"{panels[0].metric_label} (dark is better)")
        figure.supxlabel("framed: the best guidance at those steps; ★ the best of the panel", fontsize=8.5, color=MUTED)
        bar.outline.set_visible(False)
    return figure


def contact_sheet(
    table: pd.DataFrame,
    metric: str,
    samples: Mapping[str, np.ndarray],
    captions: Sequence[str],
    cost: str = "paper_cost",
    budgets: Sequence[float] = (),
) -> Figure:
    """What do the numbers look like? One block a caption: sizes down, step counts or budgets across; see `contact_cells`."""
    sheet = contact_cells(table, metric, samples, captions, cost, budgets)
    across = min(len(captions), 2)
    down = math.ceil(len(captions) / across)
    block = (len(sheet.columns) * 0.72 + 0.8, len(sheet.rows) * 0.72 + 0.8)
    with matplotlib.rc_context(STYLE | {"axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(block[0] * across, block[1] * down), layout="constrained")
        grid = figure.subplots(down, across, squeeze=False)
        for axes in grid.flat:
            axes.set_visible(False)
        for number, (axes, caption) in enumerate(zip(grid.flat, captions, strict=False)):
            axes.set_visible(True)
            mosaic, centres_x, centres_y = _mosaic(sheet, number)
            axes.imshow(mosaic, interpolation="nearest")
            axes.set_xticks(centres_x, sheet.columns)
            axes.set_yticks(centres_y, sheet.rows)
            axes.tick_params(length=0)
            axes.set_xlabel(sheet.column_title)
            wrapped = textwrap.wrap(caption.replace("$", r"\$"), max(len(sheet.columns) * 9, 28))
            axes.set_title("\n".join(wrapped), fontsize=9, fontweight="normal")
    return figure


def draw_curves(curves: Curves) -> Figure:
    """Lines with bands, the frontier as a thin staircase, the floor dashed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.subplots()
        axes.set_xscale("log")
        if curves.log_y:
            axes.set_yscale("log")
        axes.grid(True, which="major", linewidth=0.7)
        for series in curves.series:
            axes.fill_between(series.x, series.low, series.high, color=series.color, alpha=0.16, linewidth=0)
            axes.plot(series.x, series.y, color=series.color, marker=series.mark[0], markersize=5, label=series.label)
        if curves.frontier is not None:
            line = curves.frontier
            axes.step(line.x, line.y, where="post", color=line.color, linewidth=0.9, alpha=0.7)
            rings = axes.scatter(line.x, line.y, s=70, zorder=3, label=line.label, edgecolors=line.color, linewidths=0.9)
            rings.set_facecolor("none")
        if curves.floor is not None:
            axes.axhline(curves.floor, color=MUTED, linestyle="--", linewidth=1, label=FLOOR_LABEL)
        ticks, labels = _x_ticks(curves)
        axes.set_xticks(ticks, labels)
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        if curves.log_y:
            places, names = log_ticks(*_y_range(curves))
            axes.set_yticks(places, names)
            axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.set_xlabel(curves.x_label)
        axes.set_ylabel(curves.y_label)
        axes.set_title(f"{curves.question}\n", pad=2)
        axes.text(0, 1.02, curves.setting, transform=axes.transAxes, color=MUTED, fontsize=8.5)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), handlelength=1.8)
    return figure


def _draw_panel(axes: Axes, panel: HeatPanel) -> ScalarMappable:
    colors, scale = _panel_colors(panel)
    image = axes.imshow(panel.values, cmap=colors, norm=scale, aspect="auto")
    axes.set_facecolor(EMPTY)
    for (row, column), value in np.ndenumerate(panel.values):
        if np.isnan(value):
            continue
        dark = _luminance(colors(scale(value))) < 0.45
        text = ("★" if (row, column) == panel.optimum else "") + format_number(value)
        axes.text(column, row, text, ha="center", va="center", fontsize=6, color="white" if dark else INK)
    for row, column in enumerate(panel.best):
        frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=OPTIMUM, linewidth=1.6, zorder=3)
        axes.add_patch(frame)
    axes.set_xticks(range(len(panel.guidance)), [f"{guidance:g}" for guidance in panel.guidance])
    axes.set_yticks(range(len(panel.num_steps)), [str(steps) for steps in panel.num_steps])
    axes.tick_params(length=0)
    axes.set_xlabel("guidance")
    axes.set_ylabel("steps")
    axes.spines[:].set_visible(False)
    return image


def _panel_colors(panel: HeatPanel) -> tuple[Any, Normalize]:
    colors = colormaps["cividis" if panel.better == "lower" else "cividis_r"]
    low, high = sorted(panel.limits)
    return colors, Normalize(low, high if high > low else low + 1e-9)


def _luminance(rgba: Any) -> float:
    return float(np.dot(rgba[:3], (0.299, 0.587, 0.114)))


def _mosaic(sheet: ContactSheet, number: int) -> tuple[np.ndarray, list[float], list[float]]:
    """Picture `number` of every cell in one array, with the centres of its columns and rows in pixels."""
    height, width = next(cell.pictures.shape[1:3] for row in sheet.cells for cell in row if cell)
    gap = max(1, height // 24)
    paper = np.full((len(sheet.rows) * (height + gap) - gap, len(sheet.columns) * (width + gap) - gap, 3), 255, np.uint8)
    for row, cells in enumerate(sheet.cells):
        for column, cell in enumerate(cells):
            top, left = row * (height + gap), column * (width + gap)
            paper[top : top + height, left : left + width] = 236 if cell is None else cell.pictures[number]
    centres_x = [column * (width + gap) + (width - 1) / 2 for column in range(len(sheet.columns))]
    centres_y = [row * (height + gap) + (height - 1) / 2 for row in range(len(sheet.rows))]
    return paper, centres_x, centres_y


def _y_range(curves: Curves) -> tuple[float, float]:
    every = [value for series in _all_series(curves) for value in (series.y, series.low, series.high)]
    values = np.concatenate([*every, [] if curves.floor is None else [curves.floor]])
    return float(np.nanmin(values)), float(np.nanmax(values))


# --- plotly: the same, for the page -----------------------------------------------------------------------------------


def plotly_curves(curves: Curves) -> go.Figure:
    """`draw_curves` for the page: hovering tells the configuration, a click on the legend hides a size."""
    figure = go.Figure()
    for series in curves.series:
        known = ~(np.isnan(series.low) | np.isnan(series.high))
        band_x, low, high = series.x[known], series.low[known], series.high[known]
        figure.add_scatter(
            x=[*band_x, *band_x[::-1]],
            y=[*high, *low[::-1]],
            fill="toself",
            fillcolor=_with_alpha(series.color, 0.16),
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            legendgroup=series.label,
            showlegend=False,
            name=f"{html.escape(series.label)} 95 % interval",
        )
    for series in curves.series:
        marker = {"symbol": series.mark[1], "size": 10, "line": {"color": "white", "width": 0.5}}
        figure.add_scatter(**_plotly_line(series), marker=marker, line={"color": series.color, "width": 2})
    if curves.frontier is not None:
        line = {"color": INK, "width": 1.2, "shape": "hv"}
        marker = {"symbol": "circle-open", "size": 15, "color": INK, "line": {"width": 1.2}}
        figure.add_scatter(**_plotly_line(curves.frontier), marker=marker, line=line)
    xs, ys = [series.x for series in _all_series(curves)], _y_range(curves)
    if curves.floor is not None:
        ends = [float(min(x.min() for x in xs)), float(max(x.max() for x in xs))]
        figure.add_scatter(
            x=ends,
            y=[curves.floor] * 2,
            mode="lines",
            line={"color": MUTED, "width": 1.5, "dash": "dash"},
            name=FLOOR_LABEL,
            hovertemplate=f"{FLOOR_LABEL}: {format_number(curves.floor)}<extra></extra>",
        )
    x_axis = _plotly_axis(curves.x_label) | _plotly_log(*_x_ticks(curves))
    y_axis = _plotly_axis(curves.y_label.split(",")[0].split(" (")[0]) | (_plotly_log(*log_ticks(*ys)) if curves.log_y else {})
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "itemwidth": 30}
    figure.update_layout(**_plotly_look(), xaxis=x_axis, yaxis=y_axis, legend=legend, hovermode="closest", height=520)
    figure.update_layout(margin={"l": 62, "r": 12, "t": 10, "b": 56})
    return figure


def plotly_heat(panel: HeatPanel) -> go.Figure:
    """One panel of `guidance_heatmap` for the page."""
    colors, scale = _panel_colors(panel)
    texts = [
        [
            "" if np.isnan(value) else ("★ " if (row, column) == panel.optimum else "") + format_number(value)
            for column, value in enumerate(values)
        ]
        for row, values in enumerate(panel.values)
    ]
    figure = go.Figure()
    figure.add_heatmap(
        z=panel.values,
        zmin=scale.vmin,
        zmax=scale.vmax,
        colorscale=[[place, to_hex(colors(place))] for place in np.linspace(0, 1, 11).tolist()],
        showscale=False,
        text=texts,
        texttemplate="%{text}",
        textfont={"size": 10},
        customdata=[[[steps, guidance] for guidance in panel.guidance] for steps in panel.num_steps],
        hovertemplate="%{customdata[0]} steps, guidance %{customdata[1]}: %{z:.4g}<extra></extra>",
        xgap=1,
        ygap=1,
    )
    for row, column in enumerate(panel.best):
        edges = {"x0": column - 0.48, "x1": column + 0.48, "y0": row - 0.46, "y1": row + 0.46}
        figure.add_shape(type="rect", line={"color": OPTIMUM, "width": 2.5}, **edges)
    guidance, steps = [f"{value:g}" for value in panel.guidance], [str(value) for value in panel.num_steps]
    x_axis = _plotly_axis("guidance") | _plotly_places(guidance)
    y_axis = _plotly_axis("steps") | _plotly_places(steps) | {"autorange": "reversed"}
    figure.update_layout(**_plotly_look(), xaxis=x_axis, yaxis=y_axis, height=110 + 30 * len(steps))
    figure.update_layout(margin={"l": 48, "r": 6, "t": 34, "b": 44})
    figure.update_layout(title={"text": html.escape(panel.size), "font": {"size": 14}, "x": 0, "xref": "paper", "y": 0.96})
    return figure


def _plotly_line(series: Series) -> dict[str, Any]:
    notes = [html.escape(note).replace("\n", "<br>") for note in series.notes]
    name = html.escape(series.label)
    plain = {"x": series.x.tolist(), "y": series.y.tolist(), "text": notes, "name": name, "legendgroup": series.label}
    return plain | {"mode": "lines+markers", "hovertemplate": "%{text}<extra></extra>"}


def _plotly_look() -> dict[str, Any]:
    font = {"family": FONT, "size": 13, "color": INK}
    hover = {"bgcolor": "white", "bordercolor": HAIRLINE, "font": font}
    return {"template": "none", "font": font, "paper_bgcolor": "white", "plot_bgcolor": "white", "hoverlabel": hover}


def _plotly_axis(title: str) -> dict[str, Any]:
    return {
        "title": {"text": html.escape(title), "font": {"size": 13, "color": INK}},
        "tickfont": {"size": 12, "color": MUTED},
        "gridcolor": HAIRLINE,
        "zeroline": False,
        "fixedrange": True,
        "automargin": True,
        "ticks": "",
    }


def _plotly_log(ticks: list[float], labels: list[str]) -> dict[str, Any]:
    return {"type": "log", "tickmode": "array", "tickvals": ticks, "ticktext": labels}


def _plotly_places(labels: list[str]) -> dict[str, Any]:
    return {"tickmode": "array", "tickvals": list(range(len(labels))), "ticktext": labels, "showgrid": False}


def _with_alpha(color: str, alpha: float) -> str:
    red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"
