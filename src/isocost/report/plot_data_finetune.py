"""The data of the figures for fine-tuned models: quality against pretraining, and students against undistilled models.

The text after the first word of a size's name shows how the model was made: "2.6M", "2.6M from scratch", "2.6M untuned",
"2.6M codi".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from isocost.analysis.distillation import VARIANTS, split_student_name
from isocost.analysis.formatting import format_metric, format_row, format_score
from isocost.analysis.pareto import metric_of
from isocost.analysis.results_table import best_per_group, final_points
from isocost.errors import ConfigError
from isocost.report.plot_data import Curves, frontier_comparison, make_series, needs_log_scale
from isocost.report.plot_style import kind_style

UNDISTILLED = "undistilled"
DISTILLATION_QUESTION = "Does distillation change the frontier?"
MIN_LOG_RATIO = 4.0
"""Ratio of the largest to the smallest score above which the axis of pretrained scores is logarithmic."""
PRETRAINING_QUESTIONS = {
    "superres": ("Does super-resolution follow pretraining?", {"": "pretrained", "from scratch": "from scratch"}),
    "dreambooth": ("Does DreamBooth follow pretraining?", {"": "tuned", "untuned": "untuned"}),
}
"""Task -> title of the figure, and the label of each line by the text behind the size's name."""


@dataclass(frozen=True)
class Pretrained:
    """The points of the checkpoints that the runs of a task started from.

    Attributes:
        task: a key of `PRETRAINING_QUESTIONS`.
        metric: the leading metric of these points.
    """

    task: str
    table: pd.DataFrame
    metric: str


def pretraining_curves(table: pd.DataFrame, metric: str, pretrained: Pretrained, floor: float | None = None) -> Curves:
    """Return a task's quality of every size against the text-to-image quality of its pretrained checkpoint, both at their best.

    There is one line per kind of start. A size trained from scratch or not tuned has the x of the pretrained checkpoint of the
    same width, so that the lines separate the effect of pretraining from the effect of size. `setting` counts the pairs of
    sizes with the same order in both scores; intervals are not used.

    Raises:
        ConfigError: a table has no final point, or fewer than two sizes were scored in both.
    """
    question, labels = PRETRAINING_QUESTIONS[pretrained.task]
    before = best_per_group(final_points(pretrained.table, pretrained.metric), pretrained.metric, ["width"])
    pretrained_rows = {int(row["width"]): row for row in before.to_dict("records")}
    best = best_per_group(final_points(table, metric), metric, ["size"])
    best = best[best["width"].isin(list(pretrained_rows))]
    x = [float(pretrained_rows[width][pretrained.metric]) for width in best["width"]]
    kinds = best["size"].str.partition(" ")[2]
    best = best.assign(_pretrained=x, _kind=kinds, _name=best["size"].str.partition(" ")[0]).sort_values("_pretrained")
    finetuned = best[best["_kind"] == ""]
    if len(finetuned) < 2:
        raise ConfigError("fewer than two sizes have scores before and after fine-tuning, so their order cannot be compared")
    about, metric_label = metric_of(pretrained.metric), format_metric(pretrained.metric)
    lines = []
    for index, (kind, label) in enumerate(labels.items()):
        kind_rows = best[best["_kind"] == kind]
        if kind_rows.empty:
            continue
        line = make_series(label, kind_rows, "_pretrained", metric, f"pretrained: {metric_label} {{}}", *kind_style(index))
        notes = tuple(
            f"{note}\npretrained: {_format_point(pretrained_rows[int(width)], pretrained.metric)}"
            for note, width in zip(line.notes, kind_rows["width"], strict=True)
        )
        lines.append(replace(line, notes=notes, point_labels=tuple(kind_rows["_name"]) if kind == "" else ()))
    same, pairs = _count_same_order(finetuned["_pretrained"], finetuned[metric], about.better == metric_of(metric).better)
    is_log = about.better == "lower" and min(x) > 0 and max(x) > MIN_LOG_RATIO * min(x)
    return Curves(
        question=question,
        setting=f"every size at its best settings; {same} of {pairs} pairs of sizes keep their order",
        x_label=f"text-to-image {about.axis}",
        y_label=metric_of(metric).axis,
        series=tuple(lines),
        frontier=None,
        floor=floor,
        log_y=needs_log_scale(best, metric, floor),
        has_error_bars=True,
        log_x=is_log,
    )


def distillation_curves(table: pd.DataFrame, metric: str, cost: str, floor: float | None = None) -> Curves:
    """Return one frontier over all undistilled sizes and one per kind of student: the best score within each cost.

    Raises:
        ConfigError: no student, or no undistilled point, has the metric and the cost.
    """
    kinds = table["size"].map(lambda size: split_student_name(str(size))[1])
    present = [kind for kind in ("", *VARIANTS) if (kinds == kind).any()]
    if present == [""] or "" not in present:
        raise ConfigError("students and undistilled models were not both scored, so their frontiers cannot be compared")
    groups = {kind or UNDISTILLED: table[kinds == kind] for kind in ("", *VARIANTS)}
    return frontier_comparison(groups, metric, cost, DISTILLATION_QUESTION, final_points(table, metric, cost), floor)


def _format_point(row: Mapping[Any, Any], metric: str) -> str:
    configuration = format_row(row)
    score = format_score(*(float(row[column]) for column in (metric, f"{metric}_low", f"{metric}_high")))
    return f"{configuration}, {format_metric(metric)} {score}"


def _count_same_order(first: pd.Series, second: pd.Series, is_same_direction: bool) -> tuple[int, int]:
    """Return the number of pairs with the same strict order in both series, and the number of all pairs."""
    sign = 1.0 if is_same_direction else -1.0
    pairs = list(combinations(zip(first.astype(float), second.astype(float) * sign, strict=True), 2))
    return sum(bool(np.sign(a - c) == np.sign(b - d) != 0) for (a, b), (c, d) in pairs), len(pairs)
