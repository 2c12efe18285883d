"""Figures for papers, each named after the question that it answers; `isocost report` writes every one as PNG and PDF.

A figure is a function of the table of points (`isocost.analysis.frontier`), drawn by `drawing.py` from what `marks.py`,
`tuned.py` and `sheets.py` gather. `levels` replace fields of its `Curves`: further lines across, the label of the floor.
Each raises RequestError with what is missing where the table cannot answer.

Shape letters: K prompts, H, W height and width in pixels; pictures are uint8 [K, H, W, 3].
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
from isocost.analysis.results_table import finals, sizes_in_order
from isocost.errors import RequestError
from isocost.report.image_grids import contact_cells
from isocost.report.matplotlib_backend import FORMATS, draw_curves, draw_panels, draw_sheet, draw_strips, save
from isocost.report.plot_data import (
    COMPUTE_AXES,
    check_guidance,
    compute_curves,
    cost_curves,
    guidance_curves,
    guidance_panels,
    sampler_curves,
)
from isocost.report.plot_data_finetune import Pretrained, distillation_curves, pretraining_curves


def which_size_is_best_at_equal_cost(
    table: pd.DataFrame,
    metric: str,
    cost: str = "paper_cost",
    floor: float | None = None,
    sampler: str | None = None,
    **levels: Any,
) -> Figure:
    """Quality of every size against a cost, and the frontier; see `cost_curves`."""
    return draw_curves(replace(cost_curves(table, metric, cost, floor, sampler), **levels))


def does_compute_alone_decide(
    table: pd.DataFrame, metric: str, axis: str = "training_gflop", floor: float | None = None, **levels: Any
) -> Figure:
    """Quality of every size against its training compute; see `compute_curves`."""
    return draw_curves(replace(compute_curves(table, metric, floor, axis), **levels))


def which_sampler_is_best_at_equal_steps(
    table: pd.DataFrame, metric: str, floor: float | None = None, size: str | None = None, **levels: Any
) -> Figure:
    """Quality under every sampler against steps, of one size or of the best at each; see `sampler_curves`."""
    return draw_curves(replace(sampler_curves(table, metric, size, floor=floor), **levels))


def which_guidance_is_best(table: pd.DataFrame, metric: str) -> Figure:
    """Quality over steps and guidance, one row a sampler, one panel a size; see `guidance_panels`."""
    check_guidance(table, metric)
    return draw_panels(guidance_panels(table, metric), sizes_in_order(finals(table, metric)))


def does_the_best_guidance_change_with_steps(table: pd.DataFrame, metric: str, sampler: str | None = None) -> Figure:
    """The best guidance of every size against steps, with the interval that a race found; see `guidance_curves`.

    `sampler` is the one that was tried with the most values of guidance where None, the first by name of those.
    """
    if sampler is None:
        tried = finals(table, metric).groupby("sampler")["guidance"].nunique()
        sampler = str(tried.sort_index().idxmax())
    return draw_curves(guidance_curves(table, metric, sampler))


def what_do_more_steps_look_like(
    table: pd.DataFrame, metric: str, samples: Mapping[str, np.ndarray], captions: Sequence[str]
) -> Figure:
    """Pictures of the same noise, one block a caption: sizes down, numbers of steps across; see `contact_cells`."""
    return draw_sheet(contact_cells(table, metric, samples, captions))


def what_does_each_budget_buy(
    table: pd.DataFrame,
    metric: str,
    samples: Mapping[str, np.ndarray],
    captions: Sequence[str],
    budgets: Sequence[float],
    cost: str = "paper_cost",
) -> Figure:
    """Pictures of the same noise, one block a caption: sizes down, budgets of `cost` across; see `contact_cells`.

    Raises:
        RequestError: no budget was given.
    """
    if not budgets:
        raise RequestError("no budget was given")
    return draw_sheet(contact_cells(table, metric, samples, captions, cost, budgets))


def what_is_made_of_what_was_given(pictures: Mapping[str, np.ndarray], captions: Sequence[str]) -> Figure:
    """What was given, what every size made of it, what it should be: a row a picture, uint8 [K, H, W, 3] by title.

    Raises:
        RequestError: there are no pictures.
    """
    if not pictures:
        raise RequestError("nothing was given to make pictures of")
    return draw_strips(pictures, captions)


def does_super_resolution_follow_pretraining(
    table: pd.DataFrame, metric: str, pretrained: Pretrained, floor: float | None = None, **levels: Any
) -> Figure:
    """Super-resolution of every size against what its pretrained checkpoint scored; see `pretraining_curves`."""
    return draw_curves(replace(pretraining_curves(table, metric, pretrained, floor), **levels))


def does_dreambooth_follow_pretraining(
    table: pd.DataFrame, metric: str, pretrained: Pretrained, floor: float | None = None, **levels: Any
) -> Figure:
    """Likeness to the subject of every size against what its pretrained checkpoint scored; see `pretraining_curves`."""
    return draw_curves(replace(pretraining_curves(table, metric, pretrained, floor), **levels))


def does_distillation_change_the_frontier(
    table: pd.DataFrame, metric: str, cost: str = "paper_cost", floor: float | None = None, **levels: Any
) -> Figure:
    """The frontiers of the undistilled and of every kind of student; see `distillation_curves`."""
    return draw_curves(replace(distillation_curves(table, metric, cost, floor), **levels))


FOLLOWING = {
    "superres": does_super_resolution_follow_pretraining,
    "dreambooth": does_dreambooth_follow_pretraining,
}
"""Task -> the figure that sets it against the pretrained checkpoints."""


def every_figure(
    table: pd.DataFrame,
    metric: str,
    floor: float | None,
    samples: Mapping[str, np.ndarray],
    captions: Sequence[str],
    budgets: Sequence[float],
    strips: Mapping[str, np.ndarray],
    pretrained: Pretrained | None = None,
    **levels: Any,
) -> dict[str, Callable[[], Figure]]:
    """All figures of one experiment by the name of their file, not drawn yet: the function's, then what is on its axis.

    Args:
        table: points, as in `isocost.analysis.frontier`.
        floor: value of what is drawn across, the best that can be hoped for.
        samples: point -> pictures uint8 [K, H, W, 3] of the same K prompts and seeds.
        captions: the K prompts.
        budgets: budgets of paper cost.
        strips: title -> pictures uint8 [K, H, W, 3] to be laid side by side; maybe none.
        pretrained: what the experiment's runs started from, where its task is one of `FOLLOWING`.
    """
    given: dict[str, Any] = {"floor": floor, **levels}
    over: dict[Callable[..., Figure], Sequence[str]] = {
        which_size_is_best_at_equal_cost: list(COSTS),
        does_compute_alone_decide: [axis for axis in COMPUTE_AXES if axis in table.columns],
        does_distillation_change_the_frontier: list(COSTS),
    }
    alone: dict[Callable[..., Figure], Callable[[], Figure]] = {
        which_sampler_is_best_at_equal_steps: lambda: which_sampler_is_best_at_equal_steps(table, metric, **given),
        which_guidance_is_best: lambda: which_guidance_is_best(table, metric),
        does_the_best_guidance_change_with_steps: lambda: does_the_best_guidance_change_with_steps(table, metric),
        what_do_more_steps_look_like: lambda: what_do_more_steps_look_like(table, metric, samples, captions),
        what_does_each_budget_buy: lambda: what_does_each_budget_buy(table, metric, samples, captions, budgets),
        what_is_made_of_what_was_given: lambda: what_is_made_of_what_was_given(strips, captions),
        **{draw: partial(_follow, draw, task, table, metric, pretrained, given) for task, draw in FOLLOWING.items()},
    }
    drawn = {
        f"{draw.__name__}-{axis}": partial(draw, table, metric, axis, **given) for draw, axes in over.items() for axis in axes
    }
    return drawn | {draw.__name__: make for draw, make in alone.items()}


def save_figures(folder: Path, drawn: Mapping[str, Callable[[], Figure]]) -> list[str]:
    """Draw and save each in every one of `FORMATS`; returns the names of those that the table can give.

    Where it cannot, what an earlier report left under the name is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for name, draw in drawn.items():
        try:
            figure = draw()
        except RequestError:
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
        raise RequestError(f"this is no {task} of checkpoints that were scored before")
    return draw(table, metric, pretrained, **given)
