"""Draws `Curves`, `HeatPanel`s and image grids with matplotlib, and saves figures for print and screen.

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
from isocost.report.image_grids import ImageGrid
from isocost.report.plot_data import Curves, HeatPanel, panel_colors, x_ticks, y_range
from isocost.report.plot_data_costs import MIN_LABELLED_SHARE, CostParts
from isocost.report.plot_data_guides import GuideHeatmap, change_colors
from isocost.report.plot_style import DASHES, EMPTY, HAIRLINE, INK, MUTED, OPTIMUM, log_ticks, tick_indices

FORMATS = ("png", "pdf")
LONG_LABEL = 48
"""Number of characters above which an axis label is broken into two lines."""
CHARACTER_WIDTH, MAX_CELL_WIDTH = 0.085, 1.3
"""Width of a character of a tick label, and of a cell of the heat map of guides, in inches. Longer names are tilted."""
GUIDE_HEATMAP_LEGEND = "blue: better; red: worse; framed: the guide with the best score"
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


def save(figure: Figure, folder: Path, name: str, formats: Sequence[str] = FORMATS) -> None:
    """Write NAME.png at 160 dpi, and NAME.pdf with embedded fonts, which takes longer than the PNG file.

    The files contain no time stamp, so equal figures have equal bytes.

    Args:
        figure: its layout is fixed.
        folder: an existing folder.
        name: file name without ending.
        formats: some of `FORMATS`.
    """
    with matplotlib.rc_context(STYLE):
        for ending in formats:
            figure.savefig(folder / f"{name}.{ending}", metadata={"CreationDate": None} if ending == "pdf" else None)
            figure.set_layout_engine("none")  # the second format keeps the layout of the first


def draw_heatmaps(panels: Sequence[HeatPanel], sizes: Sequence[str]) -> Figure:
    """Draw heat maps of steps × guidance: one row per solver, one panel per size, in the order of `sizes`."""
    solvers = sorted({panel.solver for panel in panels})
    widest, tallest = max(len(panel.guidance) for panel in panels), max(len(panel.num_steps) for panel in panels)
    cell_width, cell_height = (0.46, 0.3) if all(panel.is_labelled for panel in panels) else (0.12, 0.12)
    figure_size = (len(sizes) * (widest * cell_width + 0.7) + 1.2, len(solvers) * (tallest * cell_height + 0.9))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=figure_size, layout="constrained")
        grid = figure.subplots(len(solvers), len(sizes), squeeze=False)
        for axes in grid.flat:
            axes.set_visible(False)
        for panel in panels:
            axes = grid[solvers.index(panel.solver), sizes.index(panel.size)]
            axes.set_visible(True)
            mappable = _draw_heatmap(axes, panel)
            axes.set_title(panel.size if len(solvers) == 1 else f"{panel.size}, {panel.solver}", fontsize=9)
        bar = figure.colorbar(mappable, ax=grid, shrink=0.8, extend="max" if panels[0].better == "lower" else "min")
        bar.set_label(f"{panels[0].metric_label} (dark is better)")
        legend = "framed: the best guidance at this number of steps; ★: the best of the panel"
        if any(interval for panel in panels for interval in panel.race_intervals):
            legend += "; bars: 95 % intervals of the best guidance"
        figure.supxlabel(legend, fontsize=8.5, color=MUTED)
        bar.outline.set_visible(False)
    return figure


def draw_guide_heatmap(heatmap: GuideHeatmap) -> Figure:
    """Draw networks (rows) × guides (columns), with the relative change of the score in every cell."""
    colors, scale = change_colors(heatmap)
    longest = max(map(len, heatmap.guides)) * CHARACTER_WIDTH
    cell_width, is_tilted = min(max(longest, 0.72), MAX_CELL_WIDTH), longest > MAX_CELL_WIDTH
    names = max(map(len, heatmap.networks)) * CHARACTER_WIDTH + 0.5
    width = len(heatmap.guides) * cell_width
    setting = textwrap.wrap(heatmap.setting, max(round(width / 0.072), 60))
    height = len(heatmap.networks) * 0.36 + 0.17 * len(setting) + 1.1 + (longest / 2 if is_tilted else 0)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width + names, height), layout="constrained")
        axes = figure.subplots()
        axes.imshow(heatmap.percent, cmap=colors, norm=scale, aspect="auto")
        axes.set_facecolor(EMPTY)
        for (row, column), value in np.ndenumerate(heatmap.percent):
            is_dark = not np.isnan(value) and _luminance(colors(scale(value))) < 0.45
            ink = "white" if is_dark else INK
            axes.text(column, row, heatmap.text(row, column), ha="center", va="center", fontsize=8, color=ink)
        for row, column in enumerate(heatmap.best_columns):
            frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=OPTIMUM, linewidth=1.8, zorder=3)
            frame.set_clip_on(False)
            axes.add_patch(frame)
        tilt: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if is_tilted else {}
        axes.set_xticks(range(len(heatmap.guides)), list(heatmap.guides), **tilt)
        axes.set_yticks(range(len(heatmap.networks)), list(heatmap.networks))
        axes.tick_params(length=0)
        axes.set_xlabel("guide\n" + GUIDE_HEATMAP_LEGEND, color=MUTED, fontsize=8.5)
        axes.set_ylabel("network", color=MUTED, fontsize=8.5)
        axes.spines[:].set_visible(False)
        axes.set_title(heatmap.question, pad=10 + 11.5 * len(setting))
        below_title: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "bottom"}
        axes.annotate("\n".join(setting), (0, 1), (0, 6), color=MUTED, fontsize=8.5, **below_title)
    return figure


def draw_cost_parts(parts: CostParts) -> Figure:
    """Draw one horizontal bar per point, divided into the shares of the parts, with its GFLOP at the end."""
    num_bars = len(parts.labels)
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(max(map(len, parts.labels)) * CHARACTER_WIDTH * 0.8 + 4.4, 0.28 * num_bars + 1.5), layout="constrained"
        )
        axes = figure.subplots()
        left = np.zeros(num_bars)
        for label, share in parts.shares.items():
            axes.barh(range(num_bars), share, left=left, color=parts.colors[label], label=label, height=0.74)
            for bar, value in enumerate(share):
                if value >= MIN_LABELLED_SHARE:
                    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8, "color": "white"}
                    axes.text(left[bar] + value / 2, bar, f"{value:.0f}", **style)
            left = left + share
        for bar, total in enumerate(parts.totals):
            axes.text(101, bar, format_number(float(total)), va="center", fontsize=8.5, color=INK)
        axes.text(101, -0.85, "GFLOP", va="center", fontsize=8.5, color=MUTED)
        axes.set_yticks(range(num_bars), list(parts.labels))
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("share of the GFLOP of an image (%)")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_title(f"{parts.question}\n", pad=14)
        below_title: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "bottom"}
        axes.annotate(parts.setting, (0, 1), (0, 12), color=MUTED, fontsize=8.5, **below_title)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(parts.shares))
    return figure


def draw_image_grid(grid: ImageGrid) -> Figure:
    """Draw one block per prompt: sizes as rows, numbers of steps or budgets as columns."""
    num_columns = min(len(grid.prompts), 2)
    num_rows = math.ceil(len(grid.prompts) / num_columns)
    block_width, block_height = len(grid.columns) * 0.72 + 0.8, len(grid.rows) * 0.72 + 0.8
    with matplotlib.rc_context(STYLE | {"axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(block_width * num_columns, block_height * num_rows), layout="constrained")
        blocks = figure.subplots(num_rows, num_columns, squeeze=False)
        for axes in blocks.flat:
            axes.set_visible(False)
        for index, (axes, prompt) in enumerate(zip(blocks.flat, grid.prompts, strict=False)):
            axes.set_visible(True)
            mosaic, centres_x, centres_y = _mosaic(grid, index)
            axes.imshow(mosaic, interpolation="nearest")
            axes.set_xticks(centres_x, grid.columns)
            axes.set_yticks(centres_y, grid.rows)
            axes.tick_params(length=0)
            axes.set_xlabel(grid.column_title)
            wrapped = textwrap.wrap(prompt, max(len(grid.columns) * 9, 28))
            axes.set_title("\n".join(wrapped), fontsize=9, fontweight="normal")
    return figure


def draw_comparison_rows(images: Mapping[str, np.ndarray], prompts: Sequence[str]) -> Figure:
    """Draw inputs, outputs and targets next to each other, one row per image.

    Args:
        images: column title -> images uint8 [K, H, W, 3].
        prompts: the K prompts; only their number is used.
    """
    if any(len(batch) != len(prompts) for batch in images.values()):
        raise ValueError(f"{len(prompts)} images of every kind are needed, not {[len(batch) for batch in images.values()]}")
    shown = {title: batch.repeat(max(1, 72 // batch.shape[1]), 1) for title, batch in images.items()}
    shown = {title: batch.repeat(max(1, 72 // batch.shape[2]), 2) for title, batch in shown.items()}
    height, width = (max(batch.shape[axis] for batch in shown.values()) for axis in (1, 2))
    row_height, column_width = height + height // 12, width + width // 12
    mosaic = np.full((len(prompts) * row_height, len(shown) * column_width, 3), 255, np.uint8)
    for column, batch in enumerate(shown.values()):
        for row, image in enumerate(batch):
            top, left = row * row_height, column * column_width
            mosaic[top : top + image.shape[0], left : left + image.shape[1]] = image
    titles = ["\n".join(textwrap.wrap(title, 12)) for title in shown]
    with matplotlib.rc_context(STYLE | {"axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(0.95 * len(shown) + 1.2, 0.95 * len(prompts) + 0.4), layout="constrained")
        axes = figure.subplots()
        axes.imshow(mosaic, interpolation="nearest")
        axes.set_xticks([column * column_width + (width - 1) / 2 for column in range(len(shown))], titles, fontsize=8)
        axes.set_yticks([])
        axes.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False)
    return figure


def draw_curves(curves: Curves) -> Figure:
    """Draw lines with bands, the frontier as a thin staircase, the floor as a dashed line."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.subplots()
        if curves.log_x:
            axes.set_xscale("log")
        if curves.log_y:
            axes.set_yscale("log")
        axes.grid(True, which="major", linewidth=0.7)
        max_x = max(float(series.x.max()) for series in curves.series)
        for series in curves.series:
            if curves.is_staircase:
                axes.fill_between(series.x, series.low, series.high, step="post", color=series.color, alpha=0.16, linewidth=0)
            elif curves.has_error_bars:
                axes.vlines(series.x, series.low, series.high, color=series.color, linewidth=1.2, alpha=0.7)
            else:
                axes.fill_between(series.x, series.low, series.high, color=series.color, alpha=0.16, linewidth=0)
            style = f"{series.marker[0]}{DASHES[series.dash]}"
            draw_style = "steps-post" if curves.is_staircase else "default"
            axes.plot(series.x, series.y, style, color=series.color, markersize=5, label=series.label, drawstyle=draw_style)
            if curves.is_staircase:
                ends = [(float(series.x[-1]), float(series.y[-1])), (max_x, float(series.y[-1]))]
                axes.add_collection(LineCollection([ends], colors=series.color, linestyles=[DASHES[series.dash]]))
            for x, y, label in zip(series.x, series.y, series.point_labels, strict=False):
                text = axes.annotate(label, (x, y), (7, -11), textcoords="offset points", fontsize=8, color=MUTED, zorder=4)
                text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        for series in curves.off_line_points:
            axes.plot(series.x, series.y, series.marker[0], color=series.color, markersize=5)
        if curves.frontier is not None:
            frontier = curves.frontier
            axes.step(frontier.x, frontier.y, where="post", color=frontier.color, linewidth=0.9, alpha=0.7)
            rings = axes.scatter(
                frontier.x, frontier.y, s=70, zorder=3, label=frontier.label, edgecolors=frontier.color, linewidths=0.9
            )
            rings.set_facecolor("none")
        for label, value, dash in curves.horizontal_lines:
            axes.axhline(value, color=MUTED, linestyle=DASHES[dash], linewidth=1, label=label)
        if curves.log_x:
            axes.set_xticks(*x_ticks(curves))
            axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        if curves.log_y:
            axes.set_yticks(*log_ticks(*y_range(curves)))
            axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.set_xlabel(curves.x_label)
        axes.set_ylabel(curves.y_label.replace(" (", "\n(") if len(curves.y_label) > LONG_LABEL else curves.y_label)
        axes.set_title(f"{curves.question}\n", pad=2)
        axes.text(0, 1.02, curves.setting, transform=axes.transAxes, color=MUTED, fontsize=8.5)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), handlelength=1.8)
    return figure


def _draw_heatmap(axes: Axes, panel: HeatPanel) -> ScalarMappable:
    colors, scale = panel_colors(panel)
    image = axes.imshow(panel.values, cmap=colors, norm=scale, aspect="auto")
    axes.set_facecolor(EMPTY)
    for (row, column), value in np.ndenumerate(panel.values):
        if np.isnan(value) or not (panel.is_labelled or (row, column) == panel.optimum):
            continue
        is_dark = _luminance(colors(scale(value))) < 0.45
        text = ("★" if (row, column) == panel.optimum else "") + (format_number(value) if panel.is_labelled else "")
        axes.text(column, row, text, ha="center", va="center", fontsize=6, color="white" if is_dark else INK)
    for row, column in enumerate(panel.best_columns):
        frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=OPTIMUM, linewidth=1.6, zorder=3)
        axes.add_patch(frame)
    for row, interval in enumerate(panel.race_intervals):
        if interval is not None:
            low, high = (panel.column_position(end) for end in interval)
            axes.plot([low, high], [row + 0.34] * 2, color=OPTIMUM, linewidth=1.6, marker="|", markersize=4, zorder=4)
    columns, rows = (tick_indices(len(values)) for values in (panel.guidance, panel.num_steps))
    axes.set_xticks(columns, [format_number(panel.guidance[column]) for column in columns])
    axes.set_yticks(rows, [str(panel.num_steps[row]) for row in rows])
    axes.tick_params(length=0)
    axes.set_xlabel("guidance")
    axes.set_ylabel("steps")
    axes.spines[:].set_visible(False)
    return image


def _luminance(rgba: Any) -> float:
    return float(np.dot(rgba[:3], (0.299, 0.587, 0.114)))


def _mosaic(grid: ImageGrid, index: int) -> tuple[np.ndarray, list[float], list[float]]:
    """Return image `index` of every cell in one array, and the centres of its columns and rows in pixels."""
    height, width = next(cell.images.shape[1:3] for row in grid.cells for cell in row if cell)
    gap = max(1, height // 24)
    mosaic = np.full((len(grid.rows) * (height + gap) - gap, len(grid.columns) * (width + gap) - gap, 3), 255, np.uint8)
    for row, cells in enumerate(grid.cells):
        for column, cell in enumerate(cells):
            top, left = row * (height + gap), column * (width + gap)
            mosaic[top : top + height, left : left + width] = 236 if cell is None else cell.images[index]
    centres_x = [column * (width + gap) + (width - 1) / 2 for column in range(len(grid.columns))]
    centres_y = [row * (height + gap) + (height - 1) / 2 for row in range(len(grid.rows))]
    return mosaic, centres_x, centres_y
