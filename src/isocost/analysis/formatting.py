"""Format numbers, scores and configurations as short text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from isocost.diffusion.guidance import format_interval
from isocost.evaluation.metric_registry import metric_of

ROUNDING = 1e-9
"""Relative tolerance that absorbs floating-point rounding."""


def format_steps(num_steps: int) -> str:
    """The number of steps with its noun: "1 step", "8 steps"."""
    return "1 step" if num_steps == 1 else f"{num_steps} steps"


def format_configuration(size: str, num_steps: int, guidance: str, solver: str) -> str:
    """A sampling configuration in running text: "2.6M, 8 steps, guidance 2, ddim/trailing"."""
    return f"{size}, {format_steps(num_steps)}, {guidance}, {solver}"


ROW_COLUMNS = ("size", "num_steps", "guidance", "solver", "guide", "guidance_interval", "guidance_schedule")
"""Columns of a results table that `format_row` reads; the last three may be absent."""


def format_row(row: Mapping[Any, Any] | pd.Series) -> str:
    """The sampling configuration of a row of a results table in running text."""
    return format_configuration(str(row["size"]), int(row["num_steps"]), format_row_guidance(row), str(row["solver"]))


def format_row_guidance(row: Mapping[Any, Any] | pd.Series) -> str:
    """The guidance of a row of a results table in running text; see `format_guidance`."""
    guide, interval, schedule = (
        None if pd.isna(value := row.get(column)) else str(value)
        for column in ("guide", "guidance_interval", "guidance_schedule")
    )
    return format_guidance(float(row["guidance"]), guide, interval, schedule)


def format_guidance(guidance: float, guide: str | None = None, interval: str | None = None, schedule: str | None = None) -> str:
    """Guidance in running text: "guidance 2 by 0.8M in [-3, 2]".

    Args:
        guidance: w.
        guide: label of the guide network.
        interval: JSON of the guidance interval.
        schedule: JSON of the guidance schedule, in place of w.
    """
    text = f"guidance {guidance:g}" if schedule is None else f"guidance {schedule}"
    text += "" if guide is None else f" by {guide}"
    return text if interval is None else f"{text} in {format_interval(json.loads(interval))}"


def format_metric(name: str, among: Iterable[str] = ()) -> str:
    """The metric in running text: "squared MMD".

    Args:
        name: its column.
        among: the metrics in the same text or table. If another one has the same text, the features are named: "squared MMD on
            AlexNet features".
    """
    text, _, features = metric_of(name).label.partition(", ")
    is_ambiguous = any(other != name and metric_of(other).label.partition(", ")[0] == text for other in among)
    return f"{text} on {features}" if is_ambiguous and features else text


def format_number(value: float) -> str:
    """Three significant digits, thousands grouped: 0.0123, 12, 1,887."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def format_score(value: float, low: float | None, high: float | None) -> str:
    """A value with its 95 % interval: "0.123 [0.120, 0.126]".

    The value has three significant digits. The half width of the interval has at least one and at most two.
    """
    bounds = [bound for bound in (low, high) if bound is not None and math.isfinite(bound)]
    digits = 2 - decimal_exponent(value)
    if len(bounds) < 2:
        return f"{value:.{_clamp_digits(digits)}f}"
    half_width = decimal_exponent((bounds[1] - bounds[0]) / 2 * (1 + ROUNDING))
    digits = _clamp_digits(max(min(digits, 1 - half_width), -half_width))
    return f"{value:.{digits}f} [{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"


def decimal_exponent(value: float) -> int:
    """The power of ten of the first significant digit; 0 for a value of 0."""
    return math.floor(math.log10(abs(value))) if value else 0


def _clamp_digits(digits: int) -> int:
    return min(max(digits, 0), 8)
