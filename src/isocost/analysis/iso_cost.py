"""Compare two groups of points at equal cost: the best point of each within a budget, and the difference of their scores.

A group is a value of a column of the table: a size, a student or its teacher (`distillation.py`), a study
(`study_comparison.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import pandas as pd

from isocost.analysis.formatting import format_row, format_score
from isocost.analysis.results_table import is_within_budget
from isocost.evaluation.confidence_intervals import Interval, independent_difference
from isocost.evaluation.metric_registry import metric_of

UNPAIRED_NOTE = " (not paired)"
"""Marks the difference of independent scores, whose interval is wider than that of a paired difference."""


class PairedDifferences(Protocol):
    """A source of paired differences, such as `isocost.evaluation.paired.PairedComparer`."""

    def difference(self, first: str, second: str, metric: str) -> Interval | None:
        """The score of the first point minus that of the second.

        Returns:
            None if the metric has no paired interval, or the features of a point are not available.
        """


@dataclass(frozen=True)
class RecordedDifferences:
    """Paired differences that were computed before. A report is written again with them, without the features of its points.

    Attributes:
        differences: (first point, second point, metric) -> score of the first minus score of the second.
    """

    differences: Mapping[tuple[str, str, str], Interval] = field(default_factory=dict)

    def difference(self, first: str, second: str, metric: str) -> Interval | None:
        """The score of the first point minus that of the second; None if it was not recorded."""
        return self.differences.get((first, second, metric))

    @property
    def rows(self) -> list[list[str | float]]:
        """The differences as plain data: first point, second point, metric, value, low, high."""
        return [[*key, interval.value, interval.low, interval.high] for key, interval in self.differences.items()]

    @classmethod
    def from_rows(cls, rows: Iterable[Sequence[Any]]) -> RecordedDifferences:
        """The differences of `rows`."""
        return cls({(first, second, metric): Interval(*ends) for first, second, metric, *ends in rows})


@dataclass(frozen=True)
class Comparison:
    """Two groups at one budget, each represented by its best point within the budget.

    Attributes:
        one: name of the first group.
        other: name of the second group.
        one_configuration: the best point of the first group; None if none fits.
        other_configuration: the best point of the second group; None if none fits.
        difference: score of `one` minus score of `other`; `low` and `high` are the ends of its 95 % interval.
        verdict: whether `one` is "better", "worse" or "undecided", or the reason why there is no difference.
        is_paired: whether the interval is that of a paired difference; otherwise the scores are treated as independent.
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
    rows: pd.DataFrame,
    metric: str,
    pairs: PairedDifferences,
    cost: str,
    budget: float,
    one: str,
    other: str,
    by: str = "size",
) -> Comparison:
    """Compare the best points of two groups with cost <= budget.

    Args:
        rows: competing points, best first (`isocost.analysis.results_table.rank_points`).
        one: name of the first group, a value of the column `by`.
        other: name of the second group.
        by: column that holds the groups.
    """
    within = rows[is_within_budget(rows[cost], budget)]
    first, second = (within[within[by] == name].head(1).to_dict("records") for name in (one, other))
    result = Comparison(
        cost=cost,
        budget=budget,
        one=one,
        other=other,
        one_configuration=_format_configuration(first[0], by) if first else None,
        other_configuration=_format_configuration(second[0], by) if second else None,
        difference=None,
        low=None,
        high=None,
        verdict=f"no point of {other if first else one} fits",
    )
    if not first or not second:
        return result
    difference, is_paired = difference_between(first[0], second[0], metric, pairs)
    if difference is not None:
        result = replace(result, difference=difference.value, low=difference.low, high=difference.high)
    return replace(result, verdict=classify(difference, metric), is_paired=is_paired)


def difference_between(
    first: Mapping[Any, Any], second: Mapping[Any, Any], metric: str, pairs: PairedDifferences
) -> tuple[Interval | None, bool]:
    """The score of the first row minus that of the second.

    Returns:
        The difference, and whether it is paired. If there is no paired interval, the scores are treated as independent; the
        difference is None if one of the scores has no interval.
    """
    paired = pairs.difference(str(first["point"]), str(second["point"]), metric)
    if paired is not None:
        return paired, True
    scores = [Interval(*(float(row[f"{metric}{suffix}"]) for suffix in ("", "_low", "_high"))) for row in (first, second)]
    if any(math.isnan(end) for score in scores for end in (score.low, score.high)):
        return None, False
    return independent_difference(*scores), False


def classify(difference: Interval | None, metric: str) -> str:
    """Whether the first of two scores is "better" or "worse", or "undecided" if the interval of the difference contains 0."""
    if difference is None or difference.low <= 0 <= difference.high:
        return "undecided"
    return "better" if (difference.value < 0) == (metric_of(metric).better == "lower") else "worse"


def format_difference(difference: Interval | None, is_paired: bool) -> str:
    """A difference with its interval: "-0.35 [-0.55, -0.18] (not paired)"."""
    if difference is None:
        return "this metric has no interval"
    return format_score(difference.value, difference.low, difference.high) + ("" if is_paired else UNPAIRED_NOTE)


def _format_configuration(row: Mapping[Any, Any], by: str) -> str:
    if by == "size":
        return f"{row['num_steps']} steps, guidance {row['guidance']:g}"
    return format_row(row)
