"""The data of an image grid: the same prompts and seeds for every size and number of steps, or for every size and budget.

Shape letters: K prompts, H, W height and width in pixels; images are uint8 [K, H, W, 3].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from isocost.analysis.costs import cost_of
from isocost.analysis.formatting import format_number, format_row
from isocost.analysis.results_table import final_points, is_within_budget, rank_points, sizes_in_order
from isocost.errors import ConfigError


@dataclass(frozen=True)
class GridCell:
    """The images [K, H, W, 3] of the best point of one size at one number of steps or budget."""

    point: str
    label: str
    images: np.ndarray


@dataclass(frozen=True)
class ImageGrid:
    """Cells by size (rows) and number of steps or budget (columns); None if no point with saved images fits."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    column_title: str
    cells: tuple[tuple[GridCell | None, ...], ...]
    prompts: tuple[str, ...]


def image_grid(
    table: pd.DataFrame,
    metric: str,
    samples: Mapping[str, np.ndarray],
    prompts: Sequence[str],
    cost: str = "normalized_cost",
    budgets: Sequence[float] = (),
) -> ImageGrid:
    """Return, for every size and number of steps, the best point among those with saved images.

    Args:
        samples: point -> images uint8 [K, H, W, 3] of the same K prompts and seeds.
        prompts: the K prompts.
        budgets: if given, the columns are these budgets of `cost` instead of numbers of steps.

    Raises:
        ConfigError: no final point has saved images, or their number differs from the number of prompts.
    """
    rows = final_points(table, metric, cost)
    rows = rank_points(rows[rows["point"].isin(list(samples))], metric, cost)
    if rows.empty:
        raise ConfigError("no final point has saved images; `isocost sweep` saves some when it scores a point")
    sizes = sizes_in_order(rows)
    if budgets:
        columns = tuple(format_number(budget) for budget in budgets)
        title = f"budget ({cost_of(cost).unit})"
        masks = [is_within_budget(rows[cost], budget) for budget in budgets]
    else:
        step_counts = sorted(rows["num_steps"].unique())
        columns, title = tuple(str(steps) for steps in step_counts), "steps"
        masks = [rows["num_steps"] == steps for steps in step_counts]
    cells = tuple(tuple(_best_cell(rows[mask & (rows["size"] == size)], samples, prompts) for mask in masks) for size in sizes)
    return ImageGrid(tuple(sizes), columns, title, cells, tuple(prompts))


def saved_images_of(point: str, samples: Mapping[str, np.ndarray], prompts: Sequence[str]) -> np.ndarray:
    """Return the saved images uint8 [K, H, W, 3] of a point.

    Raises:
        ConfigError: they have another shape or dtype, or their number differs from the number of prompts.
    """
    images = samples[point]
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or len(images) != len(prompts):
        actual = f"{images.dtype} {list(images.shape)}"
        raise ConfigError(f"images of point {point}: expected uint8 [{len(prompts)} prompts, H, W, 3], got {actual}")
    return images


def _best_cell(rows: pd.DataFrame, samples: Mapping[str, np.ndarray], prompts: Sequence[str]) -> GridCell | None:
    if rows.empty:
        return None
    row = rows.iloc[0]
    label = format_row(row)
    return GridCell(str(row["point"]), label, saved_images_of(str(row["point"]), samples, prompts))
