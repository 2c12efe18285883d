"""The data behind the figures of what was tuned from the family: against its pretraining, and students against the undistilled.

What stands in a size's name behind its first word tells how it came about: "2.6M", "2.6M from scratch", "2.6M untuned",
"2.6M codi".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from isocost.analysis.distillation import VARIANTS, teacher_of
from isocost.analysis.formatting import format_configuration, format_metric, format_score
from isocost.analysis.pareto import metric_of
from isocost.analysis.results_table import best_in_each, final_points
from isocost.errors import ConfigError
from isocost.report.plot_data import Curves, frontiers_side_by_side, series_of, wants_log
from isocost.report.plot_style import kind_style

UNDISTILLED = "undistilled"
DISTILLED = "Does distillation change the frontier?"
MIN_SPAN = 4.0
"""Ratio of the greatest to the least score from which an axis of scores is logarithmic."""
FOLLOWS = {
    "superres": ("Does super-resolution follow pretraining?", {"": "pretrained", "from scratch": "from scratch"}),
    "dreambooth": ("Does DreamBooth follow pretraining?", {"": "tuned", "untuned": "untuned"}),
}
"""Task -> the question, and the label of each line by what stands behind the size's name."""


@dataclass(frozen=True)
class Pretrained:
    """The checkpoints that an experiment of `task` (a key of `FOLLOWS`) started from: their points, and what leads there."""

    task: str
    table: pd.DataFrame
    metric: str


def pretraining_curves(table: pd.DataFrame, metric: str, pretrained: Pretrained, floor: float | None = None) -> Curves:
    """A task's quality of every size against the text-to-image quality of the checkpoint it started from, each at its best.

    A line for every way to start; a size that did not start from the checkpoint (from scratch) or was not tuned stands at the
    same place, so that the lines tell what pretraining did and what size did. `setting` counts the pairs of sizes whose order
    is the same in both, by the scores as they are. Sizes are matched by width.

    Raises:
        ConfigError: a table has no finished point, or fewer than two sizes were scored in both.
    """
    question, labels = FOLLOWS[pretrained.task]
    before = best_in_each(final_points(pretrained.table, pretrained.metric), pretrained.metric, ["width"])
    by_width = {int(row["width"]): row for row in before.to_dict("records")}
    best = best_in_each(final_points(table, metric), metric, ["size"])
    best = best[best["width"].isin(list(by_width))]
    x = [float(by_width[width][pretrained.metric]) for width in best["width"]]
    kinds = best["size"].str.partition(" ")[2]
    best = best.assign(_pretrained=x, _kind=kinds, _name=best["size"].str.partition(" ")[0]).sort_values("_pretrained")
    started = best[best["_kind"] == ""]
    if len(started) < 2:
        raise ConfigError("fewer than two sizes were scored both as pretrained and as tuned, so nothing can follow anything")
    about, words = metric_of(pretrained.metric), format_metric(pretrained.metric)
    lines = []
    for at, (kind, label) in enumerate(labels.items()):
        own = best[best["_kind"] == kind]
        if own.empty:
            continue
        line = series_of(label, own, "_pretrained", metric, f"pretrained: {words} {{}}", *kind_style(at))
        notes = tuple(
            f"{note}\npretrained: {_words(by_width[int(width)], pretrained.metric)}"
            for note, width in zip(line.notes, own["width"], strict=True)
        )
        lines.append(replace(line, notes=notes, names=tuple(own["_name"]) if kind == "" else ()))
    same, pairs = _agreement(started["_pretrained"], started[metric], about.better == metric_of(metric).better)
    is_log = about.better == "lower" and min(x) > 0 and max(x) > MIN_SPAN * min(x)
    return Curves(
        question=question,
        setting=f"a size at its best settings; {same} of {pairs} pairs of sizes keep their order",
        x_label=f"text-to-image {about.axis}",
        y_label=metric_of(metric).axis,
        series=tuple(lines),
        frontier=None,
        floor=floor,
        log_y=wants_log(best, metric, floor),
        bars=True,
        log_x=is_log,
    )


def distillation_curves(table: pd.DataFrame, metric: str, cost: str, floor: float | None = None) -> Curves:
    """The frontier of the undistilled sizes together, and of every kind of student: the best score within each cost.

    Raises:
        ConfigError: there is no student, or no undistilled point, that carries the metric and the cost.
    """
    kinds = table["size"].map(lambda size: teacher_of(str(size))[1])
    present = [kind for kind in ("", *VARIANTS) if (kinds == kind).any()]
    if present == [""] or "" not in present:
        raise ConfigError("students and undistilled were not both scored, so no frontier can change")
    groups = {kind or UNDISTILLED: table[kinds == kind] for kind in ("", *VARIANTS)}
    return frontiers_side_by_side(groups, metric, cost, DISTILLED, final_points(table, metric, cost), floor)


def _words(row: Mapping[Any, Any], metric: str) -> str:
    words = format_configuration(row["size"], row["num_steps"], row["guidance"], row["solver"])
    score = format_score(*(float(row[column]) for column in (metric, f"{metric}_low", f"{metric}_high")))
    return f"{words}, {format_metric(metric)} {score}"


def _agreement(first: pd.Series, second: pd.Series, is_same_way: bool) -> tuple[int, int]:
    """How many pairs of sizes stand in the same order in both, and of how many."""
    sign = 1.0 if is_same_way else -1.0
    pairs = list(combinations(zip(first.astype(float), second.astype(float) * sign, strict=True), 2))
    return sum(bool(np.sign(a - c) == np.sign(b - d) != 0) for (a, b), (c, d) in pairs), len(pairs)
