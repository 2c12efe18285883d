"""One against another at equal cost: the best of each within a budget, the difference of their scores, and what it says.

What is compared is a value of a column of the table: two sizes, a student and its teacher (`distillation.py`), two studies
(`study_comparison.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import pandas as pd

from isocost.analysis.formatting import format_configuration, format_score
from isocost.analysis.pareto import metric_of
from isocost.analysis.results_table import fits
from isocost.evaluation.confidence_intervals import Interval, independent_difference

UNPAIRED_NOTE = " (not paired)"
"""Said of a difference of independent scores, a wider interval: features lie elsewhere, or the metric has no pairs."""


class Pairs(Protocol):
    """Where paired differences come from (`isocost.score.differences.Pairing`)."""

    def of_points(self, first: str, second: str, metric: str) -> Interval | None:
        """First less second in a metric; None where it has no paired interval, or the points' features are not here."""


@dataclass(frozen=True)
class Comparison:
    """One against other at a budget of some cost, each at its best within it.

    `difference` is one less other with its 95 % interval, and `verdict` what that says of one: better, worse or undecided; a
    configuration is None where nothing fits. The interval is paired where it can be, else that of independent scores.
    """

    cost: str
    budget: float
    one: str
    other: str
    one_configuration: str | None
    other_configuration: str | None
    difference: float | None
    low: float | None
    high: float | None
    verdict: str
    is_paired: bool = True

    def __str__(self) -> str:
        if self.difference is None:
            return self.verdict
        return f"{format_score(self.difference, self.low, self.high)}{'' if self.is_paired else UNPAIRED_NOTE}: {self.verdict}"


def best_at_budget(
    rows: pd.DataFrame, metric: str, pairs: Pairs, cost: str, budget: float, one: str, other: str, by: str = "size"
) -> Comparison:
    """`one` against `other`, two values of the column `by`, each at its best with cost <= budget.

    Args:
        rows: competing points, best first (`isocost.analysis.frontier.rank_points`).
    """
    within = rows[fits(rows[cost], budget)]
    first, second = (within[within[by] == value].head(1).to_dict("records") for value in (one, other))
    words = [_configuration(row[0], by) if row else None for row in (first, second)]
    if not first or not second:
        missing = one if not first else other
        return Comparison(cost, budget, one, other, words[0], words[1], None, None, None, f"no point of {missing} fits")
    found, is_paired = difference_between(first[0], second[0], metric, pairs)
    value, low, high = (None, None, None) if found is None else (found.value, found.low, found.high)
    return Comparison(cost, budget, one, other, words[0], words[1], value, low, high, verdict(found, metric), is_paired)


def difference_between(
    one: Mapping[Any, Any], other: Mapping[Any, Any], metric: str, pairs: Pairs
) -> tuple[Interval | None, bool]:
    """One row's score less the other's, and whether that is paired; None where a score has no interval either."""
    paired = pairs.of_points(str(one["point"]), str(other["point"]), metric)
    if paired is not None:
        return paired, True
    alone = [Interval(*(float(row[f"{metric}{end}"]) for end in ("", "_low", "_high"))) for row in (one, other)]
    if any(math.isnan(end) for each in alone for end in (each.low, each.high)):
        return None, False
    return independent_difference(*alone), False


def verdict(difference: Interval | None, metric: str) -> str:
    """What a difference of scores says of the first: "better", "worse", or "undecided" where its interval holds 0."""
    if difference is None or difference.low <= 0 <= difference.high:
        return "undecided"
    return "better" if (difference.value < 0) == (metric_of(metric).better == "lower") else "worse"


def format_text(difference: Interval | None, is_paired: bool) -> str:
    """A difference with its interval."""
    if difference is None:
        return "this metric has no interval"
    return format_score(difference.value, difference.low, difference.high) + ("" if is_paired else UNPAIRED_NOTE)


def _configuration(row: Mapping[Any, Any], by: str) -> str:
    if by == "size":
        return f"{row['num_steps']} steps, guidance {row['guidance']:g}"
    return format_configuration(row["size"], row["num_steps"], row["guidance"], row["solver"])
