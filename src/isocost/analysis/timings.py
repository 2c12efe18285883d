"""Compare milliseconds on one device only: a table keeps the times of the device that timed most of its points."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

TIME_COLUMN = "ms_per_image"


def timing_device(provenance: Any) -> str:
    """The device that measured a point's milliseconds, or "" if it is not recorded.

    Args:
        provenance: the JSON text in the point's column `provenance`. A measurement by `isocost remeasure` replaces that of the
            sweep.
    """
    record = json.loads(provenance) if isinstance(provenance, str) else {}
    return str(record.get("timed_with", record).get("device", ""))


def keep_one_timing_device(table: pd.DataFrame) -> pd.DataFrame:
    """The table with NaN for all milliseconds that were not measured on the most frequent device.

    Scores, evaluations and FLOPs do not depend on the device and stay.
    """
    counts = _points_per_device(table)
    if len(counts) < 2:
        return table
    return table.assign(**{TIME_COLUMN: table[TIME_COLUMN].where(table["provenance"].map(timing_device) == counts.idxmax())})


def format_excluded_timings(table: pd.DataFrame) -> str | None:
    """A note on the milliseconds that `keep_one_timing_device` removed from this table; None if it removed none."""
    counts = _points_per_device(table)
    if len(counts) < 2:
        return None
    return (
        f"measured on {counts.idxmax()}; {counts.sum() - counts.max()} of {len(table)} points were timed on another device and "
        "have no time here (`isocost remeasure` measures them again)"
    )


def _points_per_device(table: pd.DataFrame) -> pd.Series[int]:
    """The number of points that each device timed; empty if the table has no provenance."""
    if "provenance" not in table.columns:
        return pd.Series(dtype=int)
    return table["provenance"].map(timing_device).value_counts().sort_index()
