"""Basic queries on a results table: select, check, rank and group points.

A table is a DataFrame with one row per scored point. Its columns:

point, checkpoint                         digests
size, width, num_parameters               the network
images_seen, training_gflop, is_final     the training; `is_final` is true for the last checkpoint of a training run
solver, num_steps, guidance               the sampling configuration
guide, guide_checkpoint                   label and digest of the guide network; absent with classifier-free guidance
guide_null_prompt                         whether the guide has the empty prompt
guidance_interval, guidance_schedule      as JSON, in log-SNR; absent without
guidance_low, guidance_high, race_images, race_at_boundary    the guidance search, if there was one
replaced_scheduler                        with solver `nearest`: scheduler class of the checkpoint for which `solver` stands
num_images, seed, protocol                the evaluation
guide_nfe                                 the evaluations by the guide, part of nfe
normalized_cost, nfe, gflop, ms_per_image, latency_ms    the costs (`isocost.analysis.costs.COSTS`), NaN if not measured
gflop_text, gflop_encoder, gflop_denoiser, gflop_decoder the parts of `gflop`; the encoder's is 0 except in super-resolution
m, m_low, m_high                          for every metric m: the score and the ends of its 95 % interval, NaN where absent
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from isocost.analysis.costs import COSTS, cost_of, format_unmeasured, is_measured
from isocost.analysis.formatting import ROUNDING, format_row
from isocost.analysis.timings import keep_one_timing_device
from isocost.errors import ConfigError
from isocost.evaluation.metric_registry import METRICS, metric_of
from isocost.evaluation.protocol import format_difference

COMPARABLE_BY = ("protocol", "num_images", "seed")
GUIDANCE_COLUMNS = ("guide", "guide_checkpoint", "guidance_interval", "guidance_schedule")
"""Columns of guidance beyond the classifier-free one at all noise levels; absent there, and in tables of version 0.1."""
CONFIGURATION_COLUMNS = ("size", "solver", "num_steps", "guidance", *GUIDANCE_COLUMNS)
CELL_COLUMNS = ("size", "solver", "num_steps")
"""One guidance is chosen for each combination of these columns."""
BASELINE_TASKS = {"seed-replicates": "text2image", "distill": "text2image", "superres-distill": "superres"}
"""Task -> the task whose final points are added to its table for comparison."""
INTERVAL_WIDTH = 2 * 1.959964
"""Width of the 95 % interval of a normal distribution, in standard deviations."""


def of_task(table: pd.DataFrame, task: str = "text2image", protocol: str | None = None) -> pd.DataFrame:
    """Select the points of one task from the table of a results database (`isocost.sweep.results_db.ResultsDB.table`).

    A results database does not contain the study, so `is_final` is set for the checkpoints with the most images of each size.
    A task in `BASELINE_TASKS` also gets the final points of the task that it is compared with.

    Args:
        protocol: id of a protocol, to select its points only.

    Raises:
        ConfigError: there is no such point, or the task is dreambooth (only the report of a folder combines its scores).
    """
    if task == "dreambooth":
        raise ConfigError(
            "a results database has the dreambooth scores of single subjects only; "
            "give the output folder, whose report combines them"
        )
    tasks = table["task"].fillna("text2image")
    if not (tasks == task).any():
        known = ", ".join(sorted(tasks.unique())) or "no point at all"
        raise ConfigError(f"the results database has no point of {task}; it has {known}")
    rows = table.assign(
        task=tasks, is_final=table["images_seen"] == table.groupby([tasks, "size"])["images_seen"].transform("max")
    )
    rows = rows[(tasks == task) | ((tasks == BASELINE_TASKS.get(task)) & rows["is_final"])]
    if protocol is not None:
        known = ", ".join(sorted(rows["protocol"].unique()))
        rows = rows[rows["protocol"] == protocol]
        if rows.empty:
            raise ConfigError(f"the results database has no point of {task} under protocol {protocol}; known: {known}")
    return keep_one_timing_device(rows).reset_index(drop=True)


def sizes_in_order(table: pd.DataFrame) -> list[str]:
    """The names of the sizes, from the smallest network to the largest."""
    sizes = table[["num_parameters", "size"]].drop_duplicates("size")
    return [str(size) for size in sizes.sort_values(["num_parameters", "size"])["size"]]


def replaced_schedulers(table: pd.DataFrame) -> list[str]:
    """One line for every checkpoint whose own scheduler another solver stands in for (`solver: nearest`)."""
    if "replaced_scheduler" not in table.columns:
        return []
    rows = table[table["replaced_scheduler"] != ""].drop_duplicates(["size", "solver"]).sort_values(["num_parameters", "size"])
    return [f"{row['size']}: {row['solver']} in place of {row['replaced_scheduler']}" for row in rows.to_dict("records")]


def with_metric(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows that have a score by `metric`, after a check that the scores may be compared.

    Raises:
        ConfigError: no row has the metric, or the rows differ in protocol, number of images or seed.
    """
    metric_of(metric)
    rows = table[table[metric].notna()] if metric in table.columns else table.iloc[:0]
    if rows.empty:
        known = ", ".join(name for name in METRICS if name in table.columns and table[name].notna().any()) or "none"
        raise ConfigError(
            f"no point has {metric}: run the sweep with a protocol that computes it, or take another metric: {known}"
        )
    for column in COMPARABLE_BY:
        counts = rows[column].value_counts().sort_index()
        if len(counts) > 1:
            values = ", ".join(f"{value} ({count} points)" for value, count in counts.items())
            details = _distinguishing_columns(rows) if column == "protocol" else ""
            raise ConfigError(
                f"points that differ in {column} cannot be compared: {values}{details}; keep the rows of one {column}"
            )
    return rows


def _distinguishing_columns(rows: pd.DataFrame) -> str:
    """A clause on the differences between the first two protocols of the rows; "" if the table has no `protocol_parts`."""
    if "protocol_parts" not in rows.columns:
        return ""
    parts = rows.dropna(subset=["protocol_parts"]).drop_duplicates("protocol").sort_values("protocol")["protocol_parts"]
    if len(parts) < 2:
        return ""
    return f"; they differ in {format_difference(*(json.loads(text) for text in parts.iloc[:2]))}"


@contextmanager
def shared_final_points() -> Iterator[None]:
    """Inside this context `final_points` selects the rows of a table once; a page asks for them hundreds of times.

    The tables must not be changed inside the context.
    """
    token = _SHARED.set({})
    try:
        yield
    finally:
        _SHARED.reset(token)


_SHARED: ContextVar[dict[tuple[int, str, str | None], tuple[pd.DataFrame, pd.DataFrame]] | None] = ContextVar(
    "shared_final_points", default=None
)
"""Tables with their final points, by identity of the table, metric and cost; a table in it keeps its identity."""


def final_points(table: pd.DataFrame, metric: str, cost: str | None = None) -> pd.DataFrame:
    """The points of final checkpoints that have `metric` and, if given, a measured `cost`.

    The column `guidance_at_boundary` is added. It is true if the guidance of a point is the lowest or the highest that was
    tried for its size, solver and number of steps: if such a point is the best, the optimum may lie outside the grid. Two cases
    are no boundary: guidance 0, because no lower value exists, and guidance 1 as the only value, which is sampling without
    guidance. A guidance search records in the column `race_at_boundary` whether it ended at a boundary.

    Raises:
        ConfigError: no point qualifies, the scores cannot be compared, or two points have the same configuration.
    """
    shared = _SHARED.get()
    if shared is None:
        return _with_measured_cost(_select_final_points(table, metric), cost)
    key_of_all, key = (id(table), metric, None), (id(table), metric, cost)
    if key_of_all not in shared:
        shared[key_of_all] = (table, _select_final_points(table, metric))
    if key not in shared:
        shared[key] = (table, _with_measured_cost(shared[key_of_all][1], cost))
    return shared[key][1].copy(deep=False)


def _with_measured_cost(rows: pd.DataFrame, cost: str | None) -> pd.DataFrame:
    if cost is None:
        return rows
    if not is_measured(rows, cost_of(cost).name):
        raise ConfigError(format_unmeasured(cost))
    return rows[rows[cost].notna()]


def _select_final_points(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    rows = with_metric(table, metric)
    rows = rows[rows["is_final"].astype(bool)]
    if rows.empty:
        raise ConfigError(f"no final checkpoint has {metric} yet: let `isocost run` finish training and sweep")
    rows = rows.assign(**{column: None for column in GUIDANCE_COLUMNS if column not in rows.columns})
    columns = list(CONFIGURATION_COLUMNS)
    duplicates = rows[rows.duplicated(columns, keep=False)].sort_values(["point"])
    if not duplicates.empty:
        row = duplicates.iloc[0]
        is_equal = (duplicates[columns] == row[columns]) | (duplicates[columns].isna() & row[columns].isna())
        points = duplicates[is_equal.all(axis=1)]["point"]
        raise ConfigError(f"{format_row(row)}: points {', '.join(points)} have this same configuration; keep one of them")
    tried = rows.groupby([*CELL_COLUMNS, *GUIDANCE_COLUMNS], dropna=False)["guidance"]
    lowest_of_cell = rows.groupby(list(CELL_COLUMNS))["guidance"].transform("min")
    is_lowest = (rows["guidance"] == np.minimum(tried.transform("min"), lowest_of_cell)) & (rows["guidance"] != 0)
    is_highest = rows["guidance"] == tried.transform("max")
    is_unguided = (rows["guidance"] == 1) & (tried.transform("nunique") == 1)
    at_boundary = (is_lowest | is_highest) & ~is_unguided
    if "race_at_boundary" in rows.columns:
        is_searched = rows["race_at_boundary"].notna()
        at_boundary = (at_boundary & ~is_searched) | rows["race_at_boundary"].eq(True)
    return rows.assign(guidance_at_boundary=at_boundary)


def classifier_free(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows without a guide, an interval and a schedule: guidance as in arXiv 2404.01367, or none."""
    columns = [column for column in GUIDANCE_COLUMNS if column in rows.columns]
    return rows[rows[columns].isna().all(axis=1)]


def standard_errors(rows: pd.DataFrame, metric: str) -> NDArray[np.float64]:
    """Standard error of every score, from the width of its 95 % interval under a normal distribution.

    Returns:
        [rows]; NaN for a score without an interval.
    """
    low, high = (rows[f"{metric}_{end}"].to_numpy(dtype=float) for end in ("low", "high"))
    return np.asarray((high - low) / INTERVAL_WIDTH, dtype=np.float64)


def rank_points(rows: pd.DataFrame, metric: str, cost: str = "normalized_cost") -> pd.DataFrame:
    """Sort `rows` from best to worst by `metric`.

    Ties are resolved by lower cost, then fewer parameters, fewer steps, lower guidance, solver name and point.
    """
    return rows.iloc[_ranks(rows, metric, cost)]


def _ranks(rows: pd.DataFrame, metric: str, cost: str = "normalized_cost") -> NDArray[np.intp]:
    """Positions of `rows` from best to worst; values that are missing come last."""
    sign = 1.0 if metric_of(metric).better == "lower" else -1.0
    keys = [cost, "num_parameters", "num_steps", "guidance"]
    numbers = [sign * rows[metric].to_numpy(dtype=float), *(rows[key].to_numpy(dtype=float) for key in keys)]
    texts = [np.unique(rows[key].to_numpy(dtype=str), return_inverse=True)[1] for key in ("solver", "point")]
    return np.lexsort([*reversed(texts), *reversed(numbers)])


def best_per_group(rows: pd.DataFrame, metric: str, by: Sequence[str]) -> pd.DataFrame:
    """The best row of every group of the columns `by`, ordered by size, solver and steps."""
    order = _ranks(rows, metric)
    is_first = ~rows[list(by)].iloc[order].duplicated()
    best = rows.iloc[order[is_first.to_numpy()]]
    return best.sort_values(["num_parameters", "size", "solver", "num_steps"]).reset_index(drop=True)


def is_within_budget(costs: pd.Series, budget: float) -> pd.Series:
    """Whether each cost is at most the budget, with a tolerance for floating-point rounding."""
    return costs <= budget * (1 + ROUNDING)


def with_cost_columns(table: pd.DataFrame) -> pd.DataFrame:
    """The table with NaN in the columns of costs that an earlier release did not write.

    The column `gflop` of version 0.1 is the denoiser's part of `gflop`.
    """
    if "gflop" in table.columns and "gflop_denoiser" not in table.columns:
        table = table.rename(columns={"gflop": "gflop_denoiser"})
    missing = [cost for cost in COSTS if cost not in table.columns]
    return table.assign(**dict.fromkeys(missing, np.nan)) if missing else table


REPORT_DATA = "report_data"
"""Folder in an output folder with the data of its report that is not in the tables (`isocost.report.report_data`)."""
RESAMPLES = "resamples.safetensors"
"""File with the bootstrap resamples of a page's points by its metric, in the folder of its data."""


def report_metric(out: str | Path, table: pd.DataFrame, task: str = "text2image") -> str:
    """The metric that ranks the points in the last report of an output folder; without its data, `leading_metric`."""
    file = Path(out) / REPORT_DATA / task / "page.json"
    if not file.is_file():
        return leading_metric(table)
    return str(json.loads(file.read_text(encoding="utf-8"))["metric"])


def leading_metric(table: pd.DataFrame) -> str:
    """The metric that a query of a table takes by default: squared MMD on EfficientNet-lite0, FID, KID, or another distance.

    Raises:
        ConfigError: the table has no metric.
    """
    distances = [name for name in METRICS if not METRICS[name].higher_is_better]
    for name in dict.fromkeys((*_LEADING_METRICS, *distances, *METRICS)):
        if name in table.columns and table[name].notna().any():
            return name
    raise ConfigError("no point has a score; let `isocost run` finish the sweep")


_LEADING_METRICS = ("mmd_efficientnet", "fid", "kid")


def table_file(out: str | Path, task: str = "text2image", suffix: str = "parquet") -> Path:
    """Path of the table that a report writes for a task: `table.parquet`, `table-superres.parquet`."""
    return Path(out) / f"table{'' if task == 'text2image' else f'-{task}'}.{suffix}"


def read_table(out: str | Path, task: str = "text2image") -> pd.DataFrame:
    """Read the points of a task from the table that the last report of an output folder wrote.

    Raises:
        ConfigError: the folder has no such table, or it is damaged.
    """
    file = table_file(out, task)
    if not file.is_file():
        raise ConfigError(f"{out}: no {file.name}; `isocost run` and `isocost report` write it")
    try:
        # text as plain Python objects: rows are selected thousands of times, which Arrow's strings make several times slower
        with pd.option_context("future.infer_string", False):
            return with_cost_columns(pd.read_parquet(file))
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"{file}: cannot be read ({reason}); `isocost report STUDY --out {out}` writes it again") from error
