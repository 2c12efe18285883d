"""What benchmarks share: rows, targets, and the last line of their output."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from isocost.utils.environment import provenance

Row = dict[str, Any]


def row(what: str, values: Sequence[float], unit: str, **further: Any) -> Row:
    """The median of some measurements with the tenth and ninetieth percentile."""
    low, high = np.quantile(values, [0.1, 0.9])
    return {"what": what, "value": float(np.median(values)), "unit": unit, "low": float(low), "high": float(high), **further}


def at_least(rows: Sequence[Row], bounds: Mapping[str, float]) -> list[Row]:
    """Targets of those rows that have a lower bound."""
    return [
        {"what": one["what"], "value": one["value"], "target": f">= {least:g}", "met": one["value"] >= least}
        for one in rows
        if (least := bounds.get(one["what"])) is not None
    ]


def print_results(benchmark: str, rows: Sequence[Row], targets: Sequence[Row], **machine: Any) -> None:
    """One line of JSON."""
    facts = {**provenance(), **machine}
    print(json.dumps({"benchmark": benchmark, "machine": facts, "rows": list(rows), "targets": list(targets)}))
