"""Milliseconds are compared on one device alone: a table keeps those of the device that timed the most of its points."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

TIMED = "ms_per_image"


def timed_on(provenance: Any) -> str:
    """The device that a point's milliseconds were taken on, out of its row's `provenance` (JSON): that of its sweep, or of
    `isocost remeasure`; empty where it is not recorded."""
    told = json.loads(provenance) if isinstance(provenance, str) else {}
    return str(told.get("timed_with", told).get("device", ""))


def timed_on_one_device(table: pd.DataFrame) -> pd.DataFrame:
    """The table, without the milliseconds that were taken on another device than most of its points' were.

    Scores, evaluations and FLOPs do not depend on the device, and stay.
    """
    counts = _devices(table)
    if len(counts) < 2:
        return table
    return table.assign(**{TIMED: table[TIMED].where(table["provenance"].map(timed_on) == counts.idxmax())})


def format_untimed(table: pd.DataFrame) -> str | None:
    """What a reader must know of a table that `timed_on_one_device` has taken milliseconds from; None where it took none."""
    counts = _devices(table)
    if len(counts) < 2:
        return None
    return (
        f"on {counts.idxmax()}; {counts.sum() - counts.max()} of {len(table)} points were timed on another device and carry "
        "none here (`isocost remeasure` measures them again)"
    )


def _devices(table: pd.DataFrame) -> pd.Series[int]:
    """How many points each device timed; nothing where the table does not tell."""
    if "provenance" not in table.columns:
        return pd.Series(dtype=int)
    return table["provenance"].map(timed_on).value_counts().sort_index()
