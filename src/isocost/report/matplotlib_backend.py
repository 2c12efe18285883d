"""Matplotlib draws what `marks.py`, `tuned.py` and `sheets.py` gather, and a figure is saved for paper and for screen.

Shape letters: K prompts, H, W height and width in pixels; images are uint8 [K, H, W, 3].
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from isocost.analysis.formatting import format_number
from isocost.report.image_grids import ContactSheet
from isocost.report.plot_data import Curves, HeatPanel, panel_colors, x_ticks, y_range
from isocost.report.plot_style import DASHES, EMPTY, HAIRLINE, INK, MUTED, OPTIMUM, log_ticks, some_places

FORMATS = ("png", "pdf")
LONG_LABEL = 48
"""Characters of a label that is set in two lines beside its axis."""
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
    "pdf.fonttype": 42,
    "savefig.bbox": "tight",
    "savefig.dpi": 160,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write NAME.png, 160 dots an inch, and NAME.pdf with its type embedded; neither holds the time at which it was written."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(folder / f"{name}.png")
        figure.set_layout_engine("none")  # stays as it has just been laid out
        figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})


def draw_panels(panels: Sequence[HeatPanel], sizes: Sequence[str]) -> Figure:
    """Heat maps of steps and guidance: one row a solver, one panel a size, in the order of `sizes`."""
    solvers = sorted({panel.solver for panel in panels})
    widest, tallest = max(len(panel.guidance) for panel in panels), max(len(panel.num_steps) for panel in panels)
    across, down = (0.46, 0.3) if all(panel.is_labelled for panel in panels) else (0.12, 0.12)
    shape = (len(sizes) * (widest * across + 0.7) + 1.2, len(solvers) * (tallest * down + 0.9))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=shape, layout="constrained")
        grid = figure.subplots(len(solvers), len(sizes), squeeze=False)
        for axes in grid.flat:
            axes.set_visible(False)
        for panel in panels:
            axes = grid[solvers.index(panel.solver), sizes.index(panel.size)]
            axes.set_visible(True)
            mappable = _draw_panel(axes, panel)
            axes.set_title(panel.size if len(solvers) == 1 else f"{panel.size}, {panel.solver}", fontsize=9)
        bar = figure.colorbar(mappable, ax=grid, shrink=0.8, extend="max" if panels[0].better == "lower" else "min")
        bar.set_label(f"{panels[0].metric_label} (dark is better)")
        told = "framed: the best guidance at those steps; ★ the best of the panel"
        if any(interval for panel in panels for interval in panel.found):
            told += "; bars: 95 % intervals of the races"
        figure.supxlabel(told, fontsize=8.5, color=MUTED)
        bar.outline.set_visible(False)
    return figure


def draw_sheet(sheet: ContactSheet) -> Figure:
    """One block a caption: sizes down, step counts or budgets across."""
    across = min(len(sheet.prompts), 2)
    down = math.ceil(len(sheet.prompts) / across)
    block = (len(sheet.columns) * 0.72 + 0.8, len(sheet.rows) * 0.72 + 0.8)
    with matplotlib.rc_context(STYLE | {"axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(block[0] * across, block[1] * down), layout="constrained")
        grid = figure.subplots(down, across, squeeze=False)
        for axes in grid.flat:
            axes.set_visible(False)
        for number, (axes, prompt) in enumerate(zip(grid.flat, sheet.prompts, strict=False)):
            axes.set_visible(True)
            mosaic, centres_x, centres_y = _mosaic(sheet, number)
            axes.imshow(mosaic, interpolation="nearest")
            axes.set_xticks(centres_x, sheet.columns)
            axes.set_yticks(centres_y, sheet.rows)
            axes.tick_params(length=0)
            axes.set_xlabel(sheet.column_title)
            wrapped = textwrap.wrap(prompt, max(len(sheet.columns) * 9, 28))
            axes.set_title("\n".join(wrapped), fontsize=9, fontweight="normal")
    return figure


def draw_strips(images: Mapping[str, np.ndarray], prompts: Sequence[str]) -> Figure:
    """What was given, what was made of it, what it should be: a row an image, uint8 [K, H, W, 3] by title."""
    shown = {title: some.repeat(max(1, 72 // some.shape[1]), 1) for title, some in images.items()}
    shown = {title: some.repeat(max(1, 72 // some.shape[2]), 2) for title, some in shown.items()}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.95 * len(shown) + 1.2, 0.95 * len(prompts) + 0.4), layout="constrained")
        grid = figure.subplots(len(prompts), len(shown), squeeze=False)
        for number, row in enumerate(grid):
            for axes, (title, some) in zip(row, shown.items(), strict=True):
                axes.imshow(some[number], interpolation="nearest")
                axes.set_xticks([])
                axes.set_yticks([])
                if number == 0:
                    axes.set_title("\n".join(textwrap.wrap(title, 12)), fontsize=8, fontweight="normal")
                for spine in axes.spines.values():
                    spine.set_visible(False)
    return figure


def draw_curves(curves: Curves) -> Figure:
    """Lines with bands, the frontier as a thin staircase, the floor dashed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.subplots()
        if curves.log_x:
            axes.set_xscale("log")
        if curves.log_y:
            axes.set_yscale("log")
        axes.grid(True, which="major", linewidth=0.7)
        dearest = max(float(series.x.max()) for series in curves.series)
        for series in curves.series:
            if curves.is_staircase:
                axes.fill_between(series.x, series.low, series.high, step="post", color=series.color, alpha=0.16, linewidth=0)
            elif curves.bars:
                axes.vlines(series.x, series.low, series.high, color=series.color, linewidth=1.2, alpha=0.7)
            else:
                axes.fill_between(series.x, series.low, series.high, color=series.color, alpha=0.16, linewidth=0)
            look = f"{series.mark[0]}{DASHES[series.dash]}"
            drawn = "steps-post" if curves.is_staircase else "default"
            axes.plot(series.x, series.y, look, color=series.color, markersize=5, label=series.label, drawstyle=drawn)
            if curves.is_staircase:
                ends = [(float(series.x[-1]), float(series.y[-1])), (dearest, float(series.y[-1]))]
                axes.add_collection(LineCollection([ends], colors=series.color, linestyles=[DASHES[series.dash]]))
            for x, y, name in zip(series.x, series.y, series.names, strict=False):
                beside = axes.annotate(name, (x, y), (7, -11), textcoords="offset points", fontsize=8, color=MUTED, zorder=4)
                beside.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        for series in curves.beside:
            axes.plot(series.x, series.y, series.mark[0], color=series.color, markersize=5)
        if curves.frontier is not None:
            line = curves.frontier
            axes.step(line.x, line.y, where="post", color=line.color, linewidth=0.9, alpha=0.7)
            rings = axes.scatter(line.x, line.y, s=70, zorder=3, label=line.label, edgecolors=line.color, linewidths=0.9)
            rings.set_facecolor("none")
        for label, value, dash in curves.dashed:
            axes.axhline(value, color=MUTED, linestyle=DASHES[dash], linewidth=1, label=label)
        if curves.log_x:
            axes.set_xticks(*x_ticks(curves))
            axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        if curves.log_y:
            places, names = log_ticks(*y_range(curves))
            axes.set_yticks(places, names)
            axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.set_xlabel(curves.x_label)
        axes.set_ylabel(curves.y_label.replace(" (", "\n(") if len(curves.y_label) > LONG_LABEL else curves.y_label)
        axes.set_title(f"{curves.question}\n", pad=2)
        axes.text(0, 1.02, curves.setting, transform=axes.transAxes, color=MUTED, fontsize=8.5)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), handlelength=1.8)
    return figure


def _draw_panel(axes: Axes, panel: HeatPanel) -> ScalarMappable:
    colors, scale = panel_colors(panel)
    image = axes.imshow(panel.values, cmap=colors, norm=scale, aspect="auto")
    axes.set_facecolor(EMPTY)
    for (row, column), value in np.ndenumerate(panel.values):
        if np.isnan(value) or not (panel.is_labelled or (row, column) == panel.optimum):
            continue
        dark = _luminance(colors(scale(value))) < 0.45
        text = ("★" if (row, column) == panel.optimum else "") + (format_number(value) if panel.is_labelled else "")
        axes.text(column, row, text, ha="center", va="center", fontsize=6, color="white" if dark else INK)
    for row, column in enumerate(panel.best):
        frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=OPTIMUM, linewidth=1.6, zorder=3)
        axes.add_patch(frame)
    for row, interval in enumerate(panel.found):
        if interval is not None:
            low, high = (panel.across(end) for end in interval)
            axes.plot([low, high], [row + 0.34] * 2, color=OPTIMUM, linewidth=1.6, marker="|", markersize=4, zorder=4)
    columns, rows = (some_places(len(values)) for values in (panel.guidance, panel.num_steps))
    axes.set_xticks(columns, [format_number(panel.guidance[at]) for at in columns])
    axes.set_yticks(rows, [str(panel.num_steps[at]) for at in rows])
    axes.tick_params(length=0)
    axes.set_xlabel("guidance")
    axes.set_ylabel("steps")
    axes.spines[:].set_visible(False)
    return image


def _luminance(rgba: Any) -> float:
    return float(np.dot(rgba[:3], (0.299, 0.587, 0.114)))


def _mosaic(sheet: ContactSheet, number: int) -> tuple[np.ndarray, list[float], list[float]]:
    """Image `number` of every cell in one array, with the centres of its columns and rows in pixels."""
    height, width = next(cell.images.shape[1:3] for row in sheet.cells for cell in row if cell)
    gap = max(1, height // 24)
    paper = np.full((len(sheet.rows) * (height + gap) - gap, len(sheet.columns) * (width + gap) - gap, 3), 255, np.uint8)
    for row, cells in enumerate(sheet.cells):
        for column, cell in enumerate(cells):
            top, left = row * (height + gap), column * (width + gap)
            paper[top : top + height, left : left + width] = 236 if cell is None else cell.images[number]
    centres_x = [column * (width + gap) + (width - 1) / 2 for column in range(len(sheet.columns))]
    centres_y = [row * (height + gap) + (height - 1) / 2 for row in range(len(sheet.rows))]
    return paper, centres_x, centres_y
