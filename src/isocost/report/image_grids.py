"""The data behind a contact sheet: the same prompts and seeds over sizes, and over step counts or budgets.

Shape letters: K prompts, H, W height and width in pixels; images are uint8 [K, H, W, 3].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from isocost.analysis.costs import cost_of
from isocost.analysis.formatting import format_configuration, format_number
from isocost.analysis.results_table import final_points, fits, rank_points, sizes_in_order
from isocost.errors import ConfigError


@dataclass(frozen=True)
class ContactCell:
    """The images [K, H, W, 3] of the point that stands for one size at one step count or budget."""

    point: str
    label: str
    images: np.ndarray


@dataclass(frozen=True)
class ContactSheet:
    """The same prompts and seeds over sizes (rows) and step counts or budgets (columns); None where no image was kept."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    column_title: str
    cells: tuple[tuple[ContactCell | None, ...], ...]
    prompts: tuple[str, ...]


def contact_cells(
    table: pd.DataFrame,
    metric: str,
    samples: Mapping[str, np.ndarray],
    prompts: Sequence[str],
    cost: str = "normalized_cost",
    budgets: Sequence[float] = (),
) -> ContactSheet:
    """For every size and step count (or budget, where given) the best point among those whose images were kept.

    Args:
        samples: point -> images uint8 [K, H, W, 3] of the same K prompts and seeds.
        captions: the K prompts.

    Raises:
        ConfigError: no images were kept, or their number differs from that of the captions.
    """
    rows = final_points(table, metric, cost)
    rows = rank_points(rows[rows["point"].isin(list(samples))], metric, cost)
    if rows.empty:
        raise ConfigError("no images were kept of any finished point: `isocost sweep` keeps some where it scores")
    sizes = sizes_in_order(rows)
    if budgets:
        columns = tuple(format_number(budget) for budget in budgets)
        title = f"budget ({cost_of(cost).unit})"
        masks = [fits(rows[cost], budget) for budget in budgets]
    else:
        steps = sorted(rows["num_steps"].unique())
        columns, title = tuple(str(number) for number in steps), "steps"
        masks = [rows["num_steps"] == number for number in steps]
    cells = tuple(tuple(_cell(rows[mask & (rows["size"] == size)], samples, prompts) for mask in masks) for size in sizes)
    return ContactSheet(tuple(sizes), columns, title, cells, tuple(prompts))


def kept_of(point: str, samples: Mapping[str, np.ndarray], prompts: Sequence[str]) -> np.ndarray:
    """The images uint8 [K, H, W, 3] that a point kept.

    Raises:
        ConfigError: they are of another kind, or not as many as the captions.
    """
    images = samples[point]
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or len(images) != len(prompts):
        found = f"{images.dtype} {list(images.shape)}"
        raise ConfigError(f"images of point {point}: {found} is not uint8 [{len(prompts)} captions, H, W, 3]")
    return images


def _cell(rows: pd.DataFrame, samples: Mapping[str, np.ndarray], prompts: Sequence[str]) -> ContactCell | None:
    if rows.empty:
        return None
    row = rows.iloc[0]
    words = format_configuration(str(row["size"]), int(row["num_steps"]), float(row["guidance"]), str(row["solver"]))
    return ContactCell(str(row["point"]), words, kept_of(str(row["point"]), samples, prompts))
