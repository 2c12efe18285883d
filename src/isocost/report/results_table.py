"""The table of points for the page, stored by column with repeated values stored once, so that 10,000 rows stay small.

Every column has `keys` to sort by (None sorts last) and `texts` to show. A column with few distinct values stores these once
and has `codes`, one index per row. `export` says whether a CSV file gets the keys or the texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from isocost.analysis.costs import COSTS, expected_costs
from isocost.analysis.formatting import format_metric, format_number, format_score
from isocost.analysis.pareto import metric_of
from isocost.analysis.results_table import rank_points, replaced_schedulers, sizes_in_order, with_metric
from isocost.report.budget_slider import commit_and_device
from isocost.report.chart_panels import metrics_in
from isocost.report.scope import TRAINED, Scope

MAX_CODED_FRACTION = 0.25
"""A column is stored as codes if it has at most this fraction of distinct values."""
PRINTED = ("size", "solver", "replaced_scheduler", "num_steps", "guidance", "point")
"""Columns that fit on paper, in addition to the leading metric and the costs."""
GUIDANCE_TITLES = {"guide": "guide", "guidance_interval": "log-SNR interval", "guidance_schedule": "guidance schedule"}
"""Columns that only tables with such points have."""
CSV_DIGITS = 9
"""Significant digits of numbers in a CSV file."""
Key = float | int | str | None


def point_columns(table: pd.DataFrame, metric: str, scope: Scope = TRAINED) -> dict[str, Any]:
    """Return the table as plain values, with the best point first.

    Args:
        table: points, as in `isocost.analysis.results_table`.
        metric: the metric that ranks the points.
        scope: gives the order of the costs; published checkpoints have no columns about training.

    Returns:
        `rows`, the number of rows; `columns`; and `sorted_by`, the index and direction of the column that orders the rows.
    """
    metrics = metrics_in(table)
    rows = (rank_points(table, metric) if metric in metrics else table).to_dict("records")
    replaced = replaced_schedulers(table)
    columns = [
        _column("size", scope.noun, [row["num_parameters"] for row in rows], [row["size"] for row in rows], numeric=False),
        _column("solver", "solver", *_strings(rows, "solver")),
        *([_column("replaced_scheduler", "in place of", *_strings(rows, "replaced_scheduler"))] if replaced else []),
        _column("num_steps", "steps", *_numbers(rows, "num_steps", str)),
        _column("guidance", "guidance", *_numbers(rows, "guidance", lambda value: f"{value:.4g}")),
        *(
            _column(name, title, *_strings(rows, name))
            for name, title in GUIDANCE_TITLES.items()
            if name in table.columns and table[name].notna().any()
        ),
    ]
    if "race_images" in table.columns and table["race_images"].notna().any():
        for end, title in (("low", "from"), ("high", "to")):
            name = f"guidance_{end}"
            columns.append(_column(name, f"best guidance {title}", *_numbers(rows, name, format_number)))
        columns.append(_column("race_images", "race images", *_numbers(rows, "race_images", _format_integer)))
    for name in metrics:
        texts = ["" if _is_nan(row[name]) else _format_row_score(row, name) for row in rows]
        column = _column(name, format_metric(name, metrics), [_plain(row[name]) for row in rows], texts)
        ends = {end: [_plain(row[f"{name}_{end}"]) for row in rows] for end in ("low", "high")}
        columns.append(column | ends)
    costs = [name for name in scope.costs if name in expected_costs(table)]
    columns += [_column(name, COSTS[name].label, *_numbers(rows, name, format_number)) for name in costs]
    if scope.trained:
        columns.append(_column("images_seen", "images seen", *_numbers(rows, "images_seen", _format_integer)))
        is_final = ["yes" if row["is_final"] else "no" for row in rows]
        columns.append(_column("is_final", "final checkpoint", is_final, is_final))
    digests = {"point": "point", "checkpoint": "checkpoint" if scope.trained else "digest", "protocol": "protocol"}
    columns += [_column(name, title, *_strings(rows, name)) for name, title in digests.items()]
    columns.append(_column("num_images", "images", *_numbers(rows, "num_images", _format_integer)))
    columns.append(_column("seed", "seed", *_numbers(rows, "seed", str)))
    origins = [commit_and_device(row.get("provenance")) for row in rows]
    for name, title in (("commit", "commit"), ("device", "hardware")):
        values = [origin[name] for origin in origins]
        columns.append(_column(name, title, values, values))
    order = "ascending" if metric_of(metric).better == "lower" else "descending"
    names = [column["name"] for column in columns]
    printed = {*PRINTED, metric, *COSTS}
    return {
        "rows": len(rows),
        "columns": [column if column["name"] in printed else column | {"screen_only": True} for column in columns],
        "sorted_by": [names.index(metric), order] if metric in metrics else None,
    }


def _column(name: str, title: str, keys: Sequence[Key], texts: Sequence[str], numeric: bool | None = None) -> dict[str, Any]:
    is_number = any(isinstance(key, int | float) for key in keys) if numeric is None else numeric
    about = {"name": name, "title": title, "numeric": is_number, "export": "keys" if is_number else "texts"}
    pairs = dict.fromkeys(zip(keys, texts, strict=True))
    if len(pairs) > MAX_CODED_FRACTION * len(keys):
        is_same = list(keys) == list(texts)
        return about | {"keys": list(keys)} | ({} if is_same else {"texts": list(texts)})
    code_of = {pair: code for code, pair in enumerate(pairs)}
    codes = [code_of[pair] for pair in zip(keys, texts, strict=True)]
    return about | {"codes": codes, "keys": [key for key, _ in pairs], "texts": [text for _, text in pairs]}


def _strings(rows: Sequence[Mapping[Any, Any]], name: str) -> tuple[list[Key], list[str]]:
    texts = ["" if pd.isna(row[name]) else str(row[name]) for row in rows]
    return list(texts), texts


def _numbers(rows: Sequence[Mapping[Any, Any]], name: str, format_value: Callable[[Any], str]) -> tuple[list[Key], list[str]]:
    """Return keys and texts of a numeric column; None and "" for a missing value."""
    return [_plain(row[name]) for row in rows], ["" if _is_nan(row[name]) else format_value(row[name]) for row in rows]


def _plain(value: Any) -> float | int | None:
    if _is_nan(value):
        return None
    return int(value) if float(value).is_integer() else float(f"{value:.{CSV_DIGITS}g}")


def _format_integer(value: float) -> str:
    return f"{value:,.0f}"


def _is_nan(value: Any) -> bool:
    return value is None or math.isnan(value)


def _format_row_score(row: Mapping[Any, Any], metric: str) -> str:
    return format_score(*(float(row[column]) for column in (metric, f"{metric}_low", f"{metric}_high")))


def size_rows(table: pd.DataFrame, scope: Scope = TRAINED) -> list[dict[str, str]]:
    """Return one row per final checkpoint, from small to large; published ones have no facts about their training.

    Args:
        table: points, as in `isocost.analysis.results_table`.
        scope: whether the study trained the networks.
    """
    rows = table[table["is_final"].astype(bool)].drop_duplicates("checkpoint").sort_values(["num_parameters", "checkpoint"])
    if not scope.trained:
        return [
            {
                "checkpoint": str(row["size"]),
                "parameters": f"{row['num_parameters']:,}",
                "digest": str(row["checkpoint"]),
            }
            for row in rows.to_dict("records")
        ]
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


def headline_facts(table: pd.DataFrame, metric: str, scope: Scope = TRAINED) -> dict[str, str]:
    """Return a few numbers about the extent of the study, by name.

    Args:
        table: points, as in `isocost.analysis.results_table`.
        metric: the metric that ranks the points.
        scope: gives the word for one network.
    """
    rows = with_metric(table, metric) if metric in metrics_in(table) else table
    extent = {
        f"{scope.noun}s": len(sizes_in_order(rows)),
        "solvers": rows["solver"].nunique(),
        "step counts": rows["num_steps"].nunique(),
        "guidance values": rows["guidance"].nunique(),
        "points": len(rows),
    }
    facts = {name.removesuffix("s") if number == 1 else name: f"{number:,}" for name, number in extent.items()}
    if len(rows):
        facts["images per point"] = f"{rows['num_images'].iloc[0]:,}"
        facts["protocol"] = str(rows["protocol"].iloc[0])
    return facts
