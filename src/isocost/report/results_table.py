"""The table of points as the page holds it: column by column, repeated values once, so that ten thousand rows stay small.

A column that has few different values is `codes` into them, another one has its values row by row. `keys` are what it sorts by
(None sorts last), `texts` what is shown, `export` says which of the two a CSV file gets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from isocost.analysis.costs import COSTS
from isocost.analysis.formatting import format_metric, format_number, format_score
from isocost.analysis.pareto import metric_of
from isocost.analysis.results_table import rank_points, sizes_in_order, with_metric
from isocost.report.budget_slider import made_with
from isocost.report.chart_panels import metrics_in

CODED_SHARE = 0.25
"""A column whose different values are at most this share of its rows is kept as codes."""
PRINTED = ("size", "solver", "num_steps", "guidance", "point")
"""Columns that fit on paper, beside the leading metric and the costs."""
DIGITS = 9
"""Significant digits of the numbers that a CSV file gets."""
Key = float | int | str | None


def point_columns(table: pd.DataFrame, metric: str) -> dict[str, Any]:
    """Plain data for the page: number of rows, `columns`, and `sorted_by` (column, direction); the best point comes first."""
    metrics = metrics_in(table)
    rows = (rank_points(table, metric) if metric in metrics else table).to_dict("records")
    columns = [
        _column("size", "size", [row["num_parameters"] for row in rows], [row["size"] for row in rows], numeric=False),
        _column("solver", "solver", *_same(rows, "solver")),
        _column("num_steps", "steps", *_numbers(rows, "num_steps", str)),
        _column("guidance", "guidance", *_numbers(rows, "guidance", lambda value: f"{value:.4g}")),
    ]
    if "race_images" in table.columns and table["race_images"].notna().any():
        for side, words in (("low", "from"), ("high", "to")):
            name = f"guidance_{side}"
            columns.append(_column(name, f"best guidance {words}", *_numbers(rows, name, format_number)))
        columns.append(_column("race_images", "race images", *_numbers(rows, "race_images", _grouped)))
    for name in metrics:
        texts = ["" if _is_nan(row[name]) else _score_text(row, name) for row in rows]
        column = _column(name, format_metric(name), [_plain(row[name]) for row in rows], texts)
        ends = {side: [_plain(row[f"{name}_{side}"]) for row in rows] for side in ("low", "high")}
        columns.append(column | ends)
    columns += [_column(name, cost.label, *_numbers(rows, name, format_number)) for name, cost in COSTS.items()]
    columns.append(_column("images_seen", "images seen", *_numbers(rows, "images_seen", _grouped)))
    is_final = ["yes" if row["is_final"] else "no" for row in rows]
    columns.append(_column("is_final", "last checkpoint", is_final, is_final))
    columns += [_column(name, name, *_same(rows, name)) for name in ("point", "checkpoint", "protocol")]
    columns.append(_column("num_images", "images", *_numbers(rows, "num_images", _grouped)))
    columns.append(_column("seed", "seed", *_numbers(rows, "seed", str)))
    made = [made_with(row.get("provenance")) for row in rows]
    for name, words in (("commit", "commit"), ("device", "hardware")):
        told = [one[name] for one in made]
        columns.append(_column(name, words, told, told))
    order = "ascending" if metric_of(metric).better == "lower" else "descending"
    names = [column["name"] for column in columns]
    printed = {*PRINTED, metric, *COSTS}
    return {
        "rows": len(rows),
        "columns": [column if column["name"] in printed else column | {"aside": True} for column in columns],
        "sorted_by": [names.index(metric), order] if metric in metrics else None,
    }


def _column(name: str, title: str, keys: Sequence[Key], texts: Sequence[str], numeric: bool | None = None) -> dict[str, Any]:
    is_number = any(isinstance(key, int | float) for key in keys) if numeric is None else numeric
    about = {"name": name, "title": title, "numeric": is_number, "export": "keys" if is_number else "texts"}
    pairs = dict.fromkeys(zip(keys, texts, strict=True))
    if len(pairs) > CODED_SHARE * len(keys):
        same = list(keys) == list(texts)
        return about | {"keys": list(keys)} | ({} if same else {"texts": list(texts)})
    places = {pair: at for at, pair in enumerate(pairs)}
    codes = [places[pair] for pair in zip(keys, texts, strict=True)]
    return about | {"codes": codes, "keys": [key for key, _ in pairs], "texts": [text for _, text in pairs]}


def _same(rows: Sequence[Mapping[Any, Any]], name: str) -> tuple[list[Key], list[str]]:
    texts = [str(row[name]) for row in rows]
    return list(texts), texts


def _numbers(rows: Sequence[Mapping[Any, Any]], name: str, words: Any) -> tuple[list[Key], list[str]]:
    """Keys and texts of a column of numbers; None and "" where there is none."""
    return [_plain(row[name]) for row in rows], ["" if _is_nan(row[name]) else words(row[name]) for row in rows]


def _plain(value: Any) -> float | int | None:
    if _is_nan(value):
        return None
    return int(value) if float(value).is_integer() else float(f"{value:.{DIGITS}g}")


def _grouped(value: float) -> str:
    return f"{value:,.0f}"


def _is_nan(value: Any) -> bool:
    return value is None or math.isnan(value)


def _score_text(row: Mapping[Any, Any], metric: str) -> str:
    return format_score(*(float(row[column]) for column in (metric, f"{metric}_low", f"{metric}_high")))


def size_rows(table: pd.DataFrame) -> list[dict[str, str]]:
    """What was trained, one row a finished checkpoint, from small to large."""
    rows = table[table["is_final"].astype(bool)].drop_duplicates("checkpoint").sort_values(["num_parameters", "checkpoint"])
    return [
        {
            "size": str(row["size"]),
            "width": str(row["width"]),
            "parameters": f"{row['num_parameters']:,}",
            "images seen": f"{row['images_seen']:,}",
            "training GFLOP": f"{row['training_gflop']:,.0f}",
            "checkpoint": str(row["checkpoint"]),
        }
        for row in rows.to_dict("records")
    ]


def headline_facts(table: pd.DataFrame, metric: str) -> dict[str, str]:
    """The extent of the study in a few numbers."""
    rows = with_metric(table, metric) if metric in metrics_in(table) else table
    extent = {
        "sizes": len(sizes_in_order(rows)),
        "solvers": rows["solver"].nunique(),
        "step counts": rows["num_steps"].nunique(),
        "guidance values": rows["guidance"].nunique(),
        "points": len(rows),
    }
    facts = {name.removesuffix("s") if number == 1 else name: f"{number:,}" for name, number in extent.items()}
    if len(rows):
        facts["images a point"] = f"{rows['num_images'].iloc[0]:,}"
        facts["protocol"] = str(rows["protocol"].iloc[0])
    return facts
