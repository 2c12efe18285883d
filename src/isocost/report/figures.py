"""Figures for papers; `isocost report` saves every one as PNG, and with `--pdf` as PDF too.

Each function takes the table of points (`isocost.analysis.results_table`) and returns a figure whose title is the question that
it answers. It raises ConfigError if the table lacks the data. `overrides` replace fields of the figure's `Curves`, for example
`reference_lines` and `floor_label`.

Shape letters: K prompts, H, W height and width in pixels; images are uint8 [K, H, W, 3].
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from isocost.analysis.costs import REPORT_COSTS
from isocost.analysis.guides import GUIDE_COSTS
from isocost.analysis.results_table import final_points, sizes_in_order
from isocost.errors import ConfigError
from isocost.report.image_grids import image_grid
from isocost.report.matplotlib_backend import (
    FORMATS,
    draw_comparison_rows,
    draw_cost_parts,
    draw_curves,
    draw_guide_heatmap,
    draw_heatmaps,
    draw_image_grid,
    save,
)
from isocost.report.plot_data import (
    COMPUTE_AXES,
    check_guidance_varies,
    compute_curves,
    cost_curves,
    guidance_curves,
    guidance_panels,
    solver_curves,
)
from isocost.report.plot_data_costs import cost_parts
from isocost.report.plot_data_finetune import Pretrained, distillation_curves, pretraining_curves
from isocost.report.plot_data_guides import guide_frontier, guide_heatmap
from isocost.report.plot_data_metrics import metric_front_curves
from isocost.report.scope import TRAINED, Scope


def plot_quality_vs_cost(
    table: pd.DataFrame,
    metric: str,
    cost: str = "normalized_cost",
    floor: float | None = None,
    solver: str | None = None,
    **overrides: Any,
) -> Figure:
    """Plot the quality of every size against a cost, and the frontier; see `cost_curves`."""
    return draw_curves(replace(cost_curves(table, metric, cost, floor, solver), **overrides))


def plot_quality_vs_compute(
    table: pd.DataFrame, metric: str, axis: str = "training_gflop", floor: float | None = None, **overrides: Any
) -> Figure:
    """Plot the quality of every size against its training compute; see `compute_curves`."""
    return draw_curves(replace(compute_curves(table, metric, floor, axis), **overrides))


def plot_solvers(
    table: pd.DataFrame, metric: str, floor: float | None = None, size: str | None = None, **overrides: Any
) -> Figure:
    """Plot the quality of every solver against steps, for one size or for the best size at each; see `solver_curves`."""
    return draw_curves(replace(solver_curves(table, metric, size, floor=floor), **overrides))


def plot_guidance_heatmap(table: pd.DataFrame, metric: str) -> Figure:
    """Plot quality over steps and guidance as heat maps, one per size and solver; see `guidance_panels`."""
    check_guidance_varies(table, metric)
    return draw_heatmaps(guidance_panels(table, metric), sizes_in_order(final_points(table, metric)))


def plot_best_guidance(table: pd.DataFrame, metric: str, solver: str | None = None) -> Figure:
    """Plot the best guidance of every size against steps, with the interval from the race; see `guidance_curves`.

    Args:
        solver: if None, the solver with the most guidance values, the first by name among equals.
    """
    if solver is None:
        num_values = final_points(table, metric).groupby("solver")["guidance"].nunique()
        solver = str(num_values.sort_index().idxmax())
    return draw_curves(guidance_curves(table, metric, solver))


def plot_steps_grid(table: pd.DataFrame, metric: str, samples: Mapping[str, np.ndarray], prompts: Sequence[str]) -> Figure:
    """Show images of the same noise for every size (rows) and number of steps (columns), one block per prompt."""
    return draw_image_grid(image_grid(table, metric, samples, prompts))


def plot_budget_grid(
    table: pd.DataFrame,
    metric: str,
    samples: Mapping[str, np.ndarray],
    prompts: Sequence[str],
    budgets: Sequence[float],
    cost: str = "normalized_cost",
) -> Figure:
    """Show images of the same noise for every size (rows) and budget of `cost` (columns), one block per prompt.

    Raises:
        ConfigError: `budgets` is empty.
    """
    if not budgets:
        raise ConfigError("no budgets to show images for; set `report.budgets` in the study")
    return draw_image_grid(image_grid(table, metric, samples, prompts, cost, budgets))


def plot_inputs_outputs(images: Mapping[str, np.ndarray], prompts: Sequence[str]) -> Figure:
    """Show the input, the output of every size and the target next to each other, one row per image.

    Args:
        images: column title -> images uint8 [K, H, W, 3].
        prompts: labels of the K images.

    Raises:
        ConfigError: `images` is empty.
    """
    if not images:
        raise ConfigError("this task has no input images to show")
    return draw_comparison_rows(images, prompts)


def plot_superres_vs_pretraining(
    table: pd.DataFrame, metric: str, pretrained: Pretrained, floor: float | None = None, **overrides: Any
) -> Figure:
    """Plot super-resolution of every size against the score of its pretrained checkpoint; see `pretraining_curves`."""
    return draw_curves(replace(pretraining_curves(table, metric, pretrained, floor), **overrides))


def plot_dreambooth_vs_pretraining(
    table: pd.DataFrame, metric: str, pretrained: Pretrained, floor: float | None = None, **overrides: Any
) -> Figure:
    """Plot the similarity to the subject against the score of the pretrained checkpoint; see `pretraining_curves`."""
    return draw_curves(replace(pretraining_curves(table, metric, pretrained, floor), **overrides))


def plot_distillation_frontier(
    table: pd.DataFrame, metric: str, cost: str = "normalized_cost", floor: float | None = None, **overrides: Any
) -> Figure:
    """Plot the frontiers of the undistilled models and of every kind of student; see `distillation_curves`."""
    return draw_curves(replace(distillation_curves(table, metric, cost, floor), **overrides))


def plot_guide_frontier(
    table: pd.DataFrame, metric: str, cost: str = "gflop", floor: float | None = None, **overrides: Any
) -> Figure:
    """Plot the frontier of every way of guidance: none, classifier-free, by a guide, and within an interval."""
    return draw_curves(replace(guide_frontier(table, metric, cost, floor), **overrides))


def plot_guide_heatmap(table: pd.DataFrame, metric: str, cost: str = "gflop") -> Figure:
    """Plot networks × guides: the best score of each pair relative to classifier-free guidance; see `guide_heatmap`."""
    return draw_guide_heatmap(guide_heatmap(table, metric, cost))


def plot_cost_parts(table: pd.DataFrame, metric: str) -> Figure:
    """Plot the shares of prompt, denoiser and decoder in the GFLOP of the points on the frontier; see `cost_parts`."""
    return draw_cost_parts(cost_parts(table, metric))


def plot_metric_front(table: pd.DataFrame, metric: str, other: str | None = None, cost: str = "gflop") -> Figure:
    """Plot the points that are best by two metrics at once, within several budgets; see `metric_front_curves`."""
    return draw_curves(metric_front_curves(table, metric, other, cost))


PRETRAINING_FIGURES = {
    "superres": plot_superres_vs_pretraining,
    "dreambooth": plot_dreambooth_vs_pretraining,
}
"""Task -> the figure that compares it with the pretrained checkpoints."""
MAX_PROCESSES = 4
"""Processes that draw figures. Each takes about 0.7 GB of memory."""
IMAGE_FIGURES = ("steps_grid", "budget_grid", "inputs_outputs")
"""Figures that need the images of points; they are not sent to another process."""


def all_figures(
    table: pd.DataFrame,
    metric: str,
    floor: float | None,
    samples: Mapping[str, np.ndarray],
    prompts: Sequence[str],
    budgets: Sequence[float],
    comparison_rows: Mapping[str, np.ndarray],
    pretrained: Pretrained | None = None,
    scope: Scope = TRAINED,
    **overrides: Any,
) -> dict[str, Callable[[], Figure]]:
    """Return a function for every figure of one experiment, by the name of its file.

    Args:
        table: points, as in `isocost.analysis.results_table`.
        floor: the best possible value, drawn as a horizontal line.
        samples: point -> images uint8 [K, H, W, 3] of the same K prompts and seeds.
        prompts: the K prompts.
        budgets: budgets of `scope.budget_cost`.
        comparison_rows: title -> images uint8 [K, H, W, 3] to show next to each other; may be empty.
        pretrained: the checkpoints that the runs started from, if the task is in `PRETRAINING_FIGURES`.
        scope: published checkpoints have no figures about training.
    """
    options: dict[str, Any] = {"floor": floor, **overrides}
    plots_by_axis: dict[Callable[..., Figure], Sequence[str]] = {
        plot_quality_vs_cost: scope.costs,
        plot_quality_vs_compute: [axis for axis in COMPUTE_AXES if scope.trained and axis in table.columns],
        plot_distillation_frontier: REPORT_COSTS,
        plot_guide_frontier: GUIDE_COSTS,
    }
    questions = {} if scope.trained else {plot_quality_vs_cost: {"question": "Which checkpoint is best at equal cost?"}}
    single_plots: dict[Callable[..., Figure], Callable[[], Figure]] = {
        plot_cost_parts: lambda: plot_cost_parts(table, metric),
        plot_metric_front: lambda: plot_metric_front(table, metric),
        plot_solvers: lambda: plot_solvers(table, metric, **options),
        plot_guidance_heatmap: lambda: plot_guidance_heatmap(table, metric),
        plot_best_guidance: lambda: plot_best_guidance(table, metric),
        plot_steps_grid: lambda: plot_steps_grid(table, metric, samples, prompts),
        plot_budget_grid: lambda: plot_budget_grid(table, metric, samples, prompts, budgets, scope.budget_cost),
        plot_inputs_outputs: lambda: plot_inputs_outputs(comparison_rows, prompts),
        **{
            plot: partial(_plot_vs_pretraining, plot, task, table, metric, pretrained, options)
            for task, plot in PRETRAINING_FIGURES.items()
        },
    }
    figures = {
        f"{file_name(plot)}-{axis}": partial(plot, table, metric, axis, **options, **questions.get(plot, {}))
        for plot, axes in plots_by_axis.items()
        for axis in axes
    }
    figures |= {
        f"{file_name(plot_guide_heatmap)}-{axis}": partial(plot_guide_heatmap, table, metric, axis) for axis in GUIDE_COSTS
    }
    return figures | {file_name(plot): make for plot, make in single_plots.items()}


def file_name(plot: Callable[..., Figure]) -> str:
    """Return the file name of a figure without its ending: "quality_vs_cost" for `plot_quality_vs_cost`."""
    return plot.__name__.removeprefix("plot_")


class FigureFiles:
    """Files of figures. Other processes draw them while this one goes on; without a second core, this one draws them first."""

    def __init__(self, folder: Path, figures: Mapping[str, Callable[[], Figure]], formats: Sequence[str] = FORMATS) -> None:
        """Start to draw.

        Args:
            folder: created if missing, and removed if there are no formats.
            figures: file name -> function that draws the figure.
            formats: some of `FORMATS`.

        Raises:
            ConfigError: an unknown format.
        """
        if unknown := [ending for ending in formats if ending not in FORMATS]:
            raise ConfigError(f"figure format {unknown[0]}: choose from {', '.join(FORMATS)}")
        self.folder, self.figures, self.formats = folder, figures if formats else {}, formats
        if not formats:
            shutil.rmtree(folder, ignore_errors=True)
            return
        folder.mkdir(parents=True, exist_ok=True)
        num_processes = min(joblib.effective_n_jobs(-1), MAX_PROCESSES)
        self.elsewhere = [name for name in figures if name not in IMAGE_FIGURES] if num_processes > 1 else []
        self.drawn = joblib.Parallel(n_jobs=num_processes, return_as="generator")(
            joblib.delayed(save_figure)(folder, name, figures[name], formats) for name in self.elsewhere
        )

    def names(self) -> list[str]:
        """Wait for the files, and return the names of the figures that the table has data for."""
        if not self.figures:
            return []
        here = {name: make for name, make in self.figures.items() if name not in self.elsewhere}
        is_drawn = {name: save_figure(self.folder, name, make, self.formats) for name, make in here.items()}
        is_drawn |= zip(self.elsewhere, self.drawn, strict=True)
        return [name for name in self.figures if is_drawn[name]]


def save_figure(folder: Path, name: str, make: Callable[[], Figure], formats: Sequence[str] = FORMATS) -> bool:
    """Save a figure; false if the table lacks its data.

    Files of an earlier report that are not written again are removed, because they may show old points.

    Args:
        folder: an existing folder.
        name: file name without ending.
        make: draws the figure.
        formats: some of `FORMATS`.
    """
    figure: Figure | None = None
    try:
        figure = make()
    except ConfigError:
        pass
    else:
        save(figure, folder, name, formats)
    for ending in FORMATS if figure is None else set(FORMATS) - set(formats):
        (folder / f"{name}.{ending}").unlink(missing_ok=True)
    return figure is not None


def _plot_vs_pretraining(
    plot: Callable[..., Figure],
    task: str,
    table: pd.DataFrame,
    metric: str,
    pretrained: Pretrained | None,
    options: Mapping[str, Any],
) -> Figure:
    if pretrained is None or pretrained.task != task:
        raise ConfigError(f"this experiment is not {task} of scored checkpoints")
    return plot(table, metric, pretrained, **options)


TABLE_PLOTS: dict[str, Callable[..., Figure]] = {
    file_name(draw): draw
    for draw in (
        plot_quality_vs_cost,
        plot_quality_vs_compute,
        plot_cost_parts,
        plot_metric_front,
        plot_solvers,
        plot_guidance_heatmap,
        plot_best_guidance,
        plot_guide_frontier,
        plot_guide_heatmap,
    )
}
"""Name -> the figures that need nothing but a results table: (table, metric, options) -> figure."""
