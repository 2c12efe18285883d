"""What a recommendation must keep: budgets of several kinds, the memory, and floors of other metrics.

A budget is kept by what costs at most so much, a floor by a score that is at or better than the bound, by the metric's own
direction; the score itself counts, not the end of its interval. What was not measured keeps nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from isocost.analysis.costs import COSTS, cost_of
from isocost.analysis.formatting import ROUNDING, configuration_words, format_number, format_score, metric_words
from isocost.analysis.pareto import metric_of
from isocost.analysis.results_table import fits
from isocost.errors import RequestError

MS_AN_HOUR = 3.6e6
MIB_A_GIB = 1024
PICTURES_PER_HOUR, MEMORY_GIB = "pictures_per_hour", "memory_gib"
MEMORY_COLUMN = "peak_memory_mib"
BUDGETS = (*COSTS, PICTURES_PER_HOUR, MEMORY_GIB)
"""Names of budgets: the four costs; pictures an hour, at least; GiB of device memory at the peak."""


@dataclass(frozen=True)
class Limit:
    """A bound on a column of the table: at most so much where `is_most`, else at least.

    `words` say it in a sentence: "5 ms per picture", "caption alignment of at least 0.9".
    """

    column: str
    bound: float
    is_most: bool
    is_floor: bool
    words: str

    def holds(self, rows: pd.DataFrame) -> pd.Series:
        """Whether each row keeps it, forgiving the last digits of floating point; False where it was not measured."""
        if self.is_most and self.bound > 0:
            return fits(rows[self.column], self.bound)
        slack = ROUNDING * abs(self.bound) * (1 if self.is_most else -1)
        bound = self.bound + slack
        return rows[self.column] <= bound if self.is_most else rows[self.column] >= bound

    def excess(self, rows: pd.DataFrame) -> pd.Series:
        """By how much each row misses it, 0 where it holds: a budget's in shares of the bound, a floor's of the rows' range."""
        over = rows[self.column] - self.bound
        over = (over if self.is_most else -over).clip(lower=0)
        spread = float(rows[self.column].max() - rows[self.column].min())
        scale = (spread if spread > 0 else 1.0) if self.is_floor else self.bound
        return (over / scale).where(~self.holds(rows), 0.0).fillna(np.inf)

    def shown(self, row: pd.Series) -> str:
        """What a row has of it, in words."""
        value = float(row[self.column])
        if self.is_floor:
            low, high = (float(row[f"{self.column}_{side}"]) for side in ("low", "high"))
            return f"{metric_words(self.column)} {format_score(value, low, high)}"
        if self.column == MEMORY_COLUMN:
            return f"{format_number(value / MIB_A_GIB)} GiB at the peak"
        return cost_of(self.column).amount(value)


@dataclass(frozen=True)
class Kept:
    """A limit beside what the recommended configuration has: its value, and for a score the 95 % interval."""

    name: str
    bound: float
    is_most: bool
    value: float
    low: float | None
    high: float | None


def budget(name: str, bound: float) -> Limit:
    """A budget of one of `BUDGETS`.

    Raises:
        RequestError: no budget is called so, or the bound is not a positive number.
    """
    if name not in BUDGETS:
        raise RequestError(f"no budget is called {name!r}; known: {', '.join(BUDGETS)}")
    if not (math.isfinite(bound) and bound > 0):
        raise RequestError(f"a budget is a positive number, not {bound:g}")
    if name == MEMORY_GIB:
        return Limit(MEMORY_COLUMN, bound * MIB_A_GIB, True, False, f"{format_number(bound)} GiB of memory")
    if name == PICTURES_PER_HOUR:
        ms = MS_AN_HOUR / bound
        words = f"{format_number(ms)} ms per picture ({format_number(bound)} pictures per hour)"
        return Limit("ms_per_picture", ms, True, False, words)
    return Limit(name, float(bound), True, False, cost_of(name).amount(bound))


def floor(metric: str, bound: float) -> Limit:
    """A floor of a metric: at or better than `bound`, at most it where lower is better.

    Raises:
        RequestError: no metric is called so, or the bound is not a number.
    """
    is_most = metric_of(metric).better == "lower"
    if not math.isfinite(bound):
        raise RequestError(f"a floor is a number, not {bound:g} for {metric}")
    words = f"{metric_words(metric)} of at {'most' if is_most else 'least'} {bound:g}"
    return Limit(metric, float(bound), is_most, True, words)


def limits_of(cost: str, bound: float, also: Mapping[str, float], floors: Mapping[str, float]) -> list[Limit]:
    """All limits, the budget that leads first.

    Raises:
        RequestError: one is wrong, two bound the same column, or memory stands alone.
    """
    if cost == MEMORY_GIB:
        raise RequestError(f"a memory budget stands beside one of cost, which breaks ties: {', '.join(BUDGETS[:-1])}")
    budgets = [budget(cost, bound), *(budget(name, value) for name, value in also.items())]
    first: dict[str, Limit] = {}
    for one in budgets:
        if one.column in first:
            raise RequestError(f"two budgets of one kind, {first[one.column].words} and {one.words}: give one of them")
        first[one.column] = one
    return [*budgets, *(floor(name, value) for name, value in floors.items())]


def check_measured(rows: pd.DataFrame, limits: Sequence[Limit]) -> None:
    """Raise RequestError where no row was measured by what a limit bounds."""
    for limit in limits:
        if limit.column in rows.columns and rows[limit.column].notna().any():
            continue
        if limit.is_floor:
            raise RequestError(
                f"no point carries {limit.column}: run the sweep with a protocol that scores it, or leave that floor out"
            )
        if limit.column == MEMORY_COLUMN:
            raise RequestError(
                f"no point has a measured peak memory (column {MEMORY_COLUMN}): sweep on a device that reports it, "
                "or leave the memory budget out"
            )
        raise RequestError(f"no point carries a measured {limit.column}; choose another cost of {', '.join(COSTS)}")


def holding(rows: pd.DataFrame, limits: Sequence[Limit]) -> pd.Series:
    """Whether each row keeps every limit."""
    held = pd.Series(True, index=rows.index)
    for limit in limits:
        held &= limit.holds(rows)
    return held


def kept(row: pd.Series, limits: Sequence[Limit]) -> tuple[Kept, ...]:
    """Every limit beside what a row has."""
    told = []
    for limit in limits:
        ends = [float(row[f"{limit.column}_{side}"]) for side in ("low", "high")] if limit.is_floor else [math.nan, math.nan]
        low, high = (None if math.isnan(end) else end for end in ends)
        told.append(Kept(limit.column, limit.bound, limit.is_most, float(row[limit.column]), low, high))
    return tuple(told)


def in_words(limits: Sequence[Limit]) -> str:
    """ "within 5 ms per picture and 8 GiB of memory, with caption alignment of at least 0.9"."""
    budgets, floors = _apart(limits)
    told = f"within {_joined(budgets)}"
    return f"{told}, with {_joined(floors)}" if floors else told


def why_nothing(rows: pd.DataFrame, limits: Sequence[Limit]) -> str:
    """One line on rows of which none keeps all limits: which of them it is, the nearest row, and what would do.

    Args:
        rows: best first; ties between near ones go to the better.
    """
    budgets, floors = _apart(limits)
    for limit in budgets:
        if not limit.holds(rows).any():
            row = rows.iloc[int(np.nanargmin(rows[limit.column].to_numpy(dtype=float)))]
            least = "the least takes" if limit.column == MEMORY_COLUMN else "the cheapest point costs"
            return f"a budget of {limit.words} is below every point; {least} {limit.shown(row)} ({_configuration(row)})"
    for some in (budgets, *([one] for one in floors), floors):
        if not holding(rows, some).any():
            verb = "meets" if some and some[0].is_floor else "keeps"
            together = " together" if len(some) > 1 else ""
            return f"no point {verb} {_joined(some)}{together}; the nearest is {_nearest(rows, some)}"
    inside = rows[holding(rows, budgets)]
    told = f"no point {in_words(budgets)} meets {_joined(floors)}; the nearest there is {_nearest(inside, floors)}"
    measured = rows[holding(rows, floors) & rows[[limit.column for limit in budgets]].notna().all(axis=1)]
    if measured.empty:
        return told
    cheapest = measured.sort_values(budgets[0].column, kind="stable").iloc[0]
    takes = _joined_words([limit.shown(cheapest) for limit in budgets])
    return f"{told}; the cheapest point that does is {_configuration(cheapest)}, at {takes}"


def _nearest(rows: pd.DataFrame, limits: Sequence[Limit]) -> str:
    """The row whose worst excess is the least, with what it has of the limits."""
    excess = pd.concat([limit.excess(rows) for limit in limits], axis=1).max(axis=1)
    row = rows.iloc[int(np.argmin(excess.to_numpy(dtype=float)))]
    return f"{_configuration(row)}, with {_joined_words([limit.shown(row) for limit in limits])}"


def _apart(limits: Sequence[Limit]) -> tuple[list[Limit], list[Limit]]:
    return [limit for limit in limits if not limit.is_floor], [limit for limit in limits if limit.is_floor]


def _joined(limits: Sequence[Limit]) -> str:
    return _joined_words([limit.words for limit in limits])


def _joined_words(words: Sequence[str]) -> str:
    return " and ".join(words)


def _configuration(row: pd.Series) -> str:
    return configuration_words(str(row["size"]), int(row["num_steps"]), float(row["guidance"]), str(row["sampler"]))
