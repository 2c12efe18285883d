"""The data of the figure on the parts of the cost of an image: prompt, denoiser and decoder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from isocost.analysis.formatting import format_metric, format_number, format_row
from isocost.analysis.pareto import pareto
from isocost.errors import ConfigError

PARTS_QUESTION = "Which part of the model does an image pay for?"
PARTS = {
    "gflop_text": ("prompt (text encoder)", "#0072b2"),
    "gflop_encoder": ("input image (encoder)", "#7a5c00"),
    "gflop_denoiser": ("denoiser, all passes", "#b84a00"),
    "gflop_decoder": ("image (decoder)", "#00795a"),
}
"""Column of a part of GFLOP -> its label and its colour, in the order of the work."""
MAX_BARS = 16
MIN_LABELLED_SHARE = 6
"""Share in percent from which a part of a bar has its number."""


@dataclass(frozen=True)
class CostParts:
    """One stacked bar for each of some points.

    Attributes:
        question: title of the figure.
        setting: which points the bars are.
        labels: configuration of each bar, the cheapest first.
        totals: GFLOP of each bar.
        shares: label of a part -> its share of each bar in percent [bars]; parts without any cost are left out.
        colors: label of a part -> its colour.
    """

    question: str
    setting: str
    labels: tuple[str, ...]
    totals: np.ndarray
    shares: dict[str, np.ndarray]
    colors: dict[str, str]

    def note(self, part: str, bar: int) -> str:
        """Return the hover text of a part of a bar."""
        share = float(self.shares[part][bar])
        gflop = format_number(share / 100 * float(self.totals[bar]))
        return f"{self.labels[bar]}\n{part}: {share:.0f} %, {gflop} GFLOP"


def cost_parts(table: pd.DataFrame, metric: str) -> CostParts:
    """Return the parts of the cost of the points on the frontier under GFLOP, at most `MAX_BARS` of them.

    Raises:
        ConfigError: no final point has `metric` and the parts of its cost.
    """
    columns = [column for column in PARTS if column in table.columns]
    known = table[table[columns].notna().all(axis=1)] if len(columns) == len(PARTS) else table.iloc[:0]
    if known.empty:
        raise ConfigError("the GFLOP of the text encoder and the decoder are not known; `isocost report OUT` adds them")
    rows = pareto(known, "gflop", metric)
    setting = f"points on the frontier by {format_metric(metric)} under GFLOP, the cheapest first"
    if len(rows) > MAX_BARS:
        rows = rows.iloc[np.linspace(0, len(rows) - 1, MAX_BARS).round().astype(int)]
        setting += f"; {MAX_BARS} of them"
    totals = rows["gflop"].to_numpy(dtype=float)
    shares = {
        label: 100 * rows[column].to_numpy(dtype=float) / totals for column, (label, _) in PARTS.items() if rows[column].any()
    }
    labels = tuple(format_row(row) for row in rows.to_dict("records"))
    return CostParts(PARTS_QUESTION, setting, labels, totals, shares, dict(PARTS.values()))
