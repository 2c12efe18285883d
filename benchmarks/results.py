"""Shared code of the benchmarks: the flags --quick and --json, rows, targets, and the JSON line at the end of the output."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from isocost.utils.environment import provenance

Row = dict[str, Any]


def argument_parser(description: str | None, quick: str) -> argparse.ArgumentParser:
    """Parser with the flags that every benchmark has.

    Args:
        description: docstring of the benchmark.
        quick: help text of --quick, which must keep the benchmark under a minute.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    return parser


def row(what: str, values: Sequence[float], unit: str, **fields: Any) -> Row:
    """Median of measurements with their 10th and 90th percentiles as `low` and `high`."""
    low, high = np.quantile(values, [0.1, 0.9])
    return {"what": what, "value": float(np.median(values)), "unit": unit, "low": float(low), "high": float(high), **fields}


def at_least(rows: Sequence[Row], bounds: Mapping[str, float]) -> list[Row]:
    """Targets of the rows that have a lower bound."""
    return [
        {"what": row["what"], "value": row["value"], "target": f">= {bound:g}", "met": row["value"] >= bound}
        for row in rows
        if (bound := bounds.get(row["what"])) is not None
    ]


def print_results(benchmark: str, rows: Sequence[Row], targets: Sequence[Row], **settings: Any) -> None:
    """Print the JSON line: machine (with `settings`), rows and targets."""
    machine = {**provenance(), **settings}
    print(json.dumps({"benchmark": benchmark, "machine": machine, "rows": list(rows), "targets": list(targets)}))
