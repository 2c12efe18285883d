"""Figures for papers, each named after the question that it answers; `isocost report` writes every one as PNG and PDF.

A figure is a function of the table of points (`isocost.analysis.frontier`), drawn by `drawing.py` from what `marks.py`,
`tuned.py` and `sheets.py` gather. `levels` replace fields of its `Curves`: further lines across, the label of the floor.
Each raises ConfigError with what is missing where the table cannot answer.

Shape letters: K prompts, H, W height and width in pixels; images are uint8 [K, H, W, 3].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from isocost.analysis.costs import COSTS
from isocost.analysis.results_table import final_points, sizes_in_order
from isocost.errors import ConfigError
from isocost.report.image_grids import contact_cells
from isocost.report.matplotlib_backend import FORMATS, draw_curves, draw_panels, draw_sheet, draw_strips, save
from isocost.report.plot_data import (
    COMPUTE_AXES,
    check_guidance,
    compute_curves,
    cost_curves,
    guidance_curves,
    guidance_panels,
    solver_curves,
)
from isocost.report.plot_data_finetune import Pretrained, distillation_curves, pretraining_curves


def plot_quality_vs_cost(
    table: pd.DataFrame,
    metric: str,
    cost: str = "normalized_cost",
    floor: float | None = None,
    solver: str | None = None,
    **levels: Any,
) -> Figure:
    """Quality of every size against a cost, and the frontier; see `cost_curves`."""
    return draw_curves(replace(cost_curves(table, metric, cost, floor, solver), **levels))


def plot_quality_vs_compute(
    table: pd.DataFrame, metric: str, axis: str = "training_gflop", floor: float | None = None, **levels: Any
) -> Figure:
    """Quality of every size against its training compute; see `compute_curves`."""
    return draw_curves(replace(compute_curves(table, metric, floor, axis), **levels))


def plot_solvers(
    table: pd.DataFrame, metric: str, floor: float | None = None, size: str | None = None, **levels: Any
) -> Figure:
    """Quality under every solver against steps, of one size or of the best at each; see `solver_curves`."""
    return draw_curves(replace(solver_curves(table, metric, size, floor=floor), **levels))


def plot_guidance(table: pd.DataFrame, metric: str) -> Figure:
    """Quality over steps and guidance, one row a solver, one panel a size; see `guidance_panels`."""
    check_guidance(table, metric)
    return draw_panels(guidance_panels(table, metric), sizes_in_order(final_points(table, metric)))


def plot_guidance_heatmap(table: pd.DataFrame, metric: str, solver: str | None = None) -> Figure:
    """The best guidance of every size against steps, with the interval that a race found; see `guidance_curves`.

    `solver` is the one that was tried with the most values of guidance where None, the first by name of those.
    """
    if solver is None:
        tried = final_points(table, metric).groupby("solver")["guidance"].nunique()
        solver = str(tried.sort_index().idxmax())
    return draw_curves(guidance_curves(table, metric, solver))


def plot_steps_grid(table: pd.DataFrame, metric: str, samples: Mapping[str, np.ndarray], prompts: Sequence[str]) -> Figure:
    """Images of the same noise, one block a caption: sizes down, numbers of steps across; see `contact_cells`."""
    return draw_sheet(contact_cells(table, metric, samples, prompts))


def plot_budget_grid(
    table: pd.DataFrame,
    metric: str,
    samples: Mapping[str, np.ndarray],
    prompts: Sequence[str],
    budgets: Sequence[float],
    cost: str = "normalized_cost",
) -> Figure:
    """Images of the same noise, one block a caption: sizes down, budgets of `cost` across; see `contact_cells`.

    Raises:
        ConfigError: no budget was given.
    """
    if not budgets:
        raise ConfigError("no budget was given")
    return draw_sheet(contact_cells(table, metric, samples, prompts, cost, budgets))


def plot_inputs_outputs(images: Mapping[str, np.ndarray], prompts: Sequence[str]) -> Figure:
    """What was given, what every size made of it, what it should be: a row an image, uint8 [K, H, W, 3] by title.

    Raises:
        ConfigError: there are no images.
    """
    if not images:
        raise ConfigError("nothing was given to make images of")
    return draw_strips(images, prompts)


def plot_superres_vs_pretraining(
    table: pd.DataFrame, metric: str, pretrained: Pretrained, floor: float | None = None, **levels: Any
) -> Figure:
    """Super-resolution of every size against what its pretrained checkpoint scored; see `pretraining_curves`."""
    return draw_curves(replace(pretraining_curves(table, metric, pretrained, floor), **levels))


def plot_dreambooth_vs_pretraining(
    table: pd.DataFrame, metric: str, pretrained: Pretrained, floor: float | None = None, **levels: Any
) -> Figure:
    """Likeness to the subject of every size against what its pretrained checkpoint scored; see `pretraining_curves`."""
    return draw_curves(replace(pretraining_curves(table, metric, pretrained, floor), **levels))


def plot_distillation_frontier(
    table: pd.DataFrame, metric: str, cost: str = "normalized_cost", floor: float | None = None, **levels: Any
) -> Figure:
    """The frontiers of the undistilled and of every kind of student; see `distillation_curves`."""
    return draw_curves(replace(distillation_curves(table, metric, cost, floor), **levels))


FOLLOWING = {
    "superres": plot_superres_vs_pretraining,
    "dreambooth": plot_dreambooth_vs_pretraining,
}
"""Task -> the figure that sets it against the pretrained checkpoints."""


def every_figure(
    table: pd.DataFrame,
    metric: str,
    floor: float | None,
    samples: Mapping[str, np.ndarray],
    prompts: Sequence[str],
    budgets: Sequence[float],
    strips: Mapping[str, np.ndarray],
    pretrained: Pretrained | None = None,
    **levels: Any,
) -> dict[str, Callable[[], Figure]]:
    """All figures of one experiment by the name of their file, not drawn yet: the function's, then what is on its axis.

    Args:
        table: points, as in `isocost.analysis.frontier`.
        floor: value of what is drawn across, the best that can be hoped for.
        samples: point -> images uint8 [K, H, W, 3] of the same K prompts and seeds.
        captions: the K prompts.
        budgets: budgets of normalized cost.
        strips: title -> images uint8 [K, H, W, 3] to be laid side by side; maybe none.
        pretrained: what the experiment's runs started from, where its task is one of `FOLLOWING`.
    """
    given: dict[str, Any] = {"floor": floor, **levels}
    over: dict[Callable[..., Figure], Sequence[str]] = {
        plot_quality_vs_cost: list(COSTS),
        plot_quality_vs_compute: [axis for axis in COMPUTE_AXES if axis in table.columns],
        plot_distillation_frontier: list(COSTS),
    }
    alone: dict[Callable[..., Figure], Callable[[], Figure]] = {
        plot_solvers: lambda: plot_solvers(table, metric, **given),
        plot_guidance: lambda: plot_guidance(table, metric),
        plot_guidance_heatmap: lambda: plot_guidance_heatmap(table, metric),
        plot_steps_grid: lambda: plot_steps_grid(table, metric, samples, prompts),
        plot_budget_grid: lambda: plot_budget_grid(table, metric, samples, prompts, budgets),
        plot_inputs_outputs: lambda: plot_inputs_outputs(strips, prompts),
        **{draw: partial(_follow, draw, task, table, metric, pretrained, given) for task, draw in FOLLOWING.items()},
    }
    drawn = {
        f"{file_name(draw)}-{axis}": partial(draw, table, metric, axis, **given) for draw, axes in over.items() for axis in axes
    }
    return drawn | {file_name(draw): make for draw, make in alone.items()}


def file_name(draw: Callable[..., Figure]) -> str:
    """Name of a figure's file: "quality_vs_cost" of `plot_quality_vs_cost`."""
    return draw.__name__.removeprefix("plot_")


def save_figures(folder: Path, drawn: Mapping[str, Callable[[], Figure]]) -> list[str]:
    """Draw and save each in every one of `FORMATS`; returns the names of those that the table can give.

    Where it cannot, what an earlier report left under the name is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for name, draw in drawn.items():
        try:
            figure = draw()
        except ConfigError:
            for ending in FORMATS:
                (folder / f"{name}.{ending}").unlink(missing_ok=True)
            continue
        save(figure, folder, name)
        names.append(name)
    return names


def _follow(
    draw: Callable[..., Figure],
    task: str,
    table: pd.DataFrame,
    metric: str,
    pretrained: Pretrained | None,
    given: Mapping[str, Any],
) -> Figure:
    if pretrained is None or pretrained.task != task:
        raise ConfigError(f"this is no {task} of checkpoints that were scored before")
    return draw(table, metric, pretrained, **given)
