"""Compare times on one device only: a table keeps the times of the device that timed most of its points."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

from isocost.analysis.costs import COSTS, REMEASURE

TIME_COLUMN, LATENCY_COLUMN, ENERGY_COLUMN = "ms_per_image", "latency_ms", "joules_per_image"
TIME_LABELS = {column: COSTS[column].label for column in (TIME_COLUMN, LATENCY_COLUMN, ENERGY_COLUMN)}
"""Columns of measured times and energies with their names in running text."""
NUM_LATENCY_RUNS = "num_latency_runs"
"""In the record `timed_with` of a point: the measured runs of its latency."""
NUM_ENERGY_IMAGES = "num_energy_images"
"""In the record `timed_with` of a point: the images whose energy was measured."""
_MARKS = {LATENCY_COLUMN: NUM_LATENCY_RUNS, ENERGY_COLUMN: NUM_ENERGY_IMAGES}
"""Column -> the key of `timed_with` that a measurement of it leaves."""


def timing_device(provenance: Any) -> str:
    """The device that measured a point's milliseconds, or "" if it is not recorded.

    Args:
        provenance: the JSON text in the point's column `provenance`. A measurement by `isocost remeasure` replaces that of the
            sweep.
    """
    record = _record(provenance)
    return str(record.get("timed_with", record).get("device", ""))


def keep_one_timing_device(table: pd.DataFrame) -> pd.DataFrame:
    """The table with NaN for all times that were not measured on the most frequent device.

    Throughput and latency have a most frequent device each. Scores, evaluations and FLOPs do not depend on the device and stay.
    """
    for column in TIME_LABELS:
        counts = _points_per_device(table, column)
        if len(counts) >= 2:
            is_kept = table["provenance"].map(timing_device) == counts.idxmax()
            table = table.assign(**{column: table[column].where(is_kept)})
    return table


def format_excluded_timings(table: pd.DataFrame, column: str = TIME_COLUMN) -> str | None:
    """A note on the times in `column` that `keep_one_timing_device` removed from this table; None if it removed none."""
    counts = _points_per_device(table, column)
    if len(counts) < 2:
        return None
    return (
        f"measured on {counts.idxmax()}; {counts.sum() - counts.max()} of {len(table)} points were timed on another device and "
        "have no time here (`isocost remeasure` measures them again)"
    )


def format_sweep_timings(table: pd.DataFrame) -> str | None:
    """A note on `ms_per_image` that was measured while the study ran, and on the command that measures it properly.

    None if no point has such a time, or if the table does not record how its times were measured.
    """
    if not {"provenance", TIME_COLUMN} <= set(table.columns):
        return None
    records = table.loc[table[TIME_COLUMN].notna(), "provenance"].map(_record)
    num_points, num_sweep = len(records), sum(bool(record) and "timed_with" not in record for record in records)
    if not num_sweep:
        return None
    subject = f"{TIME_COLUMN} is" if num_sweep == num_points else f"{TIME_COLUMN} of {num_sweep} of {num_points} points is"
    return (
        f"{subject} the throughput at full batches, measured in stages while the study ran; "
        f"{REMEASURE} on an idle device measures each point, with its latency"
    )


def _points_per_device(table: pd.DataFrame, column: str) -> pd.Series[int]:
    """The number of points that each device timed; empty if the table has no provenance."""
    if "provenance" not in table.columns:
        return pd.Series(dtype=int)
    provenance = table["provenance"]
    if mark := _MARKS.get(column):
        provenance = provenance[[mark in _record(text).get("timed_with", {}) for text in provenance]]
    return provenance.map(timing_device).value_counts().sort_index()


def _record(provenance: Any) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(provenance) if isinstance(provenance, str) and provenance else {}
    return record
