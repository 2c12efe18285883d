"""Queries on a results table: one row per scored point."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from isocost.analysis.costs import COSTS, cost_of
from isocost.analysis.formatting import ROUNDING
from isocost.analysis.timings import timed_on_one_device
from isocost.errors import ConfigError
from isocost.evaluation.protocol import difference
from isocost.metrics.registry import metric_of

COMPARABLE_BY = ("protocol", "num_images", "seed")
CONFIGURATION = ("size", "solver", "num_steps", "guidance")
CELL = ("size", "solver", "num_steps")
COMPARED_WITH = {"seed-replicates": "text2image", "distill": "text2image", "superres-distill": "superres"}
"""Whose points stand beside a task's own."""
INTERVAL_WIDTH = 2 * 1.959964
"""Width of a normal's 95 % interval in standard deviations."""


def of_task(table: pd.DataFrame, task: str = "text2image", protocol: str | None = None) -> pd.DataFrame:
    """The points of one task out of a results database's table (`isocost.sweep.ledger.Ledger.table`), without the study or its folder.

    `is_final` snapshots the most images of each size, which is all that a results database knows of it; students come with the finished
    points of what they are compared with.

    Raises:
        ConfigError: there is no such point, or only the report of a folder sums such points up.
    """
    if task == "dreambooth":
        raise ConfigError(
            "a results database has dreambooth subject by subject; ask the output folder, whose report sums them up"
        )
    tasks = table["task"].fillna("text2image")
    if not (tasks == task).any():
        known = ", ".join(sorted(tasks.unique())) or "no point at all"
        raise ConfigError(f"the results database has no point of {task}; it has {known}")
    rows = table.assign(
        task=tasks, is_final=table["images_seen"] == table.groupby([tasks, "size"])["images_seen"].transform("max")
    )
    rows = rows[(tasks == task) | ((tasks == COMPARED_WITH.get(task)) & rows["is_final"])]
    if protocol is not None:
        known = ", ".join(sorted(rows["protocol"].unique()))
        rows = rows[rows["protocol"] == protocol]
        if rows.empty:
            raise ConfigError(f"the results database has no point of {task} under protocol {protocol}; known: {known}")
    return timed_on_one_device(rows).reset_index(drop=True)


def sizes_in_order(table: pd.DataFrame) -> list[str]:
    """Size names from the smallest network to the largest."""
    sizes = table[["num_parameters", "size"]].drop_duplicates("size")
    return [str(size) for size in sizes.sort_values(["num_parameters", "size"])["size"]]


def with_metric(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows that carry `metric`, after a check that their numbers may be compared.

    Raises:
        ConfigError: no row carries it, or the rows differ in protocol, number of images or seed.
    """
    metric_of(metric)
    rows = table[table[metric].notna()] if metric in table.columns else table.iloc[:0]
    if rows.empty:
        raise ConfigError(f"no point carries {metric}: run the sweep with a protocol that scores it, or name another metric")
    for column in COMPARABLE_BY:
        counts = rows[column].value_counts().sort_index()
        if len(counts) > 1:
            found = ", ".join(f"{value} ({count} points)" for value, count in counts.items())
            told = _distinguishing_columns(rows) if column == "protocol" else ""
            raise ConfigError(
                f"points that differ in {column} cannot be compared: {found}{told}; keep the rows of one {column}"
            )
    return rows


def _distinguishing_columns(rows: pd.DataFrame) -> str:
    """What differs between the first two protocols of the rows, in words, where the table holds their parts."""
    if "protocol_parts" not in rows.columns:
        return ""
    parts = rows.dropna(subset=["protocol_parts"]).drop_duplicates("protocol").sort_values("protocol")["protocol_parts"]
    if len(parts) < 2:
        return ""
    return f"; they differ in {difference(*(json.loads(one) for one in parts.iloc[:2]))}"


def final_points(table: pd.DataFrame, metric: str, cost: str | None = None) -> pd.DataFrame:
    """The competing points: final checkpoints with `metric` and, where given, a measured `cost`; `guidance_at_boundary` added.

    The guidance of a point is at the edge when it is the lowest or the highest tried for its size, solver and number of steps:
    if such a point is the best, the optimum may lie outside the grid. Guidance 0, below which there is none, is no edge, nor
    is 1 where nothing else was tried: sampling without guidance. A race (column `race_at_boundary`) says of itself where it ended.

    Raises:
        ConfigError: nothing competes, the numbers cannot be compared, or two points stand for one configuration.
    """
    rows = with_metric(table, metric)
    rows = rows[rows["is_final"].astype(bool)]
    if rows.empty:
        raise ConfigError(f"no finished checkpoint carries {metric} yet: let `isocost run` finish training and sweep")
    doubled = rows[rows.duplicated(list(CONFIGURATION), keep=False)].sort_values(["point"])
    if not doubled.empty:
        row = doubled.iloc[0]
        twins = doubled[(doubled[list(CONFIGURATION)] == row[list(CONFIGURATION)]).all(axis=1)]["point"]
        where = f"{row['size']}, {row['solver']}, {row['num_steps']} steps, guidance {row['guidance']:g}"
        raise ConfigError(f"{where}: points {', '.join(twins)} stand for the same configuration; keep one of them")
    tried = rows.groupby(list(CELL))["guidance"]
    at_low = (rows["guidance"] == tried.transform("min")) & (rows["guidance"] != 0)
    at_high = rows["guidance"] == tried.transform("max")
    without = (rows["guidance"] == 1) & (tried.transform("nunique") == 1)
    at_edge = (at_low | at_high) & ~without
    if "race_at_boundary" in rows.columns:
        raced = rows["race_at_boundary"].notna()
        at_edge = (at_edge & ~raced) | rows["race_at_boundary"].eq(True)
    rows = rows.assign(guidance_at_boundary=at_edge)
    if cost is not None:
        rows = rows[rows[cost_of(cost).name].notna()]
        if rows.empty:
            raise ConfigError(f"no point carries a measured {cost}; choose another cost of {', '.join(COSTS)}")
    return rows


def deviations(rows: pd.DataFrame, metric: str) -> NDArray[np.float64]:
    """Standard deviation of every row's score as its 95 % interval has it, taken as normal, [rows]; NaN without an interval."""
    low, high = (rows[f"{metric}_{side}"].to_numpy(dtype=float) for side in ("low", "high"))
    return np.asarray((high - low) / INTERVAL_WIDTH, dtype=np.float64)


def rank_points(rows: pd.DataFrame, metric: str, cost: str = "normalized_cost") -> pd.DataFrame:
    """`rows` from best to worst by `metric`. Ties go to the cheaper, smaller, shorter, less guided, then by name."""
    sign = 1.0 if metric_of(metric).better == "lower" else -1.0
    keys = [cost, "num_parameters", "num_steps", "guidance", "solver", "point"]
    return rows.assign(_worse=sign * rows[metric]).sort_values(["_worse", *keys], kind="stable").drop(columns="_worse")


def best_in_each(rows: pd.DataFrame, metric: str, by: Sequence[str]) -> pd.DataFrame:
    """The best row of every group of `by`, in the order of size, solver and steps."""
    best = rank_points(rows, metric).drop_duplicates(list(by))
    return best.sort_values(["num_parameters", "size", "solver", "num_steps"]).reset_index(drop=True)


def fits(costs: pd.Series, budget: float) -> pd.Series:
    """Whether each cost <= budget, forgiving the last digits of floating point."""
    return costs <= budget * (1 + ROUNDING)


REPORT_DATA = "report_data"
"""Folder in an output folder, beside the tables: what else its report was drawn from (`isocost.report.drawn`)."""


def table_file(out: str | Path, task: str = "text2image", suffix: str = "parquet") -> Path:
    """Where a report leaves the points of a task: `table.parquet`, `table-superres.parquet`."""
    return Path(out) / f"table{'' if task == 'text2image' else f'-{task}'}.{suffix}"


def read_table(out: str | Path, task: str = "text2image") -> pd.DataFrame:
    """The points of a task as the last report of an output folder left them.

    Raises:
        ConfigError: there is none.
    """
    file = table_file(out, task)
    if not file.is_file():
        raise ConfigError(f"{out}: no {file.name}; an output folder has one after `isocost run` or `isocost report`")
    return pd.read_parquet(file)
