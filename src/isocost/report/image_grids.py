"""The data behind a contact sheet: the same prompts and seeds over sizes, and over step counts or budgets.

Shape letters: K prompts, H, W height and width in pixels; pictures are uint8 [K, H, W, 3].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from isocost.analysis.costs import cost_of
from isocost.analysis.formatting import configuration_words, format_number
from isocost.analysis.results_table import best_first, finals, fits, sizes_in_order
from isocost.errors import RequestError


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
    sizes = sizes_in_order(rows)
    if budgets:
        columns = tuple(format_number(budget) for budget in budgets)
        title = f"budget ({cost_of(cost).unit})"
        masks = [fits(rows[cost], budget) for budget in budgets]
    else:
        steps = sorted(rows["num_steps"].unique())
        columns, title = tuple(str(number) for number in steps), "steps"
        masks = [rows["num_steps"] == number for number in steps]
    cells = tuple(tuple(_cell(rows[mask & (rows["size"] == size)], samples, captions) for mask in masks) for size in sizes)
    return ContactSheet(tuple(sizes), columns, title, cells, tuple(captions))


def kept_of(point: str, samples: Mapping[str, np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """The pictures uint8 [K, H, W, 3] that a point kept.

    Raises:
        RequestError: they are of another kind, or not as many as the captions.
    """
    pictures = samples[point]
    if pictures.ndim != 4 or pictures.shape[3] != 3 or pictures.dtype != np.uint8 or len(pictures) != len(captions):
        found = f"{pictures.dtype} {list(pictures.shape)}"
        raise RequestError(f"pictures of point {point}: {found} is not uint8 [{len(captions)} captions, H, W, 3]")
    return pictures


def _cell(rows: pd.DataFrame, samples: Mapping[str, np.ndarray], captions: Sequence[str]) -> ContactCell | None:
    if rows.empty:
        return None
    row = rows.iloc[0]
    words = configuration_words(str(row["size"]), int(row["num_steps"]), float(row["guidance"]), str(row["sampler"]))
    return ContactCell(str(row["point"]), words, kept_of(str(row["point"]), samples, captions))
