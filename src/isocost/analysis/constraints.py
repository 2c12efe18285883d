"""What a recommendation must keep: budgets of several kinds, the memory, and requirements of other metrics.

A budget is kept by what costs at most so much, a requirement by a score that is at or better than the bound, by the metric's own
direction; the score itself counts, not the end of its interval. What was not measured keeps nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from isocost.analysis.costs import COSTS, cost_of
from isocost.analysis.formatting import ROUNDING, format_configuration, format_metric, format_number, format_score
from isocost.analysis.pareto import metric_of
from isocost.analysis.results_table import fits
from isocost.errors import ConfigError

MS_PER_HOUR = 3.6e6
MIB_PER_GIB = 1024
IMAGES_PER_HOUR, MEMORY_GIB = "images_per_hour", "memory_gib"
MEMORY_COLUMN = "peak_memory_mib"
BUDGETS = (*COSTS, IMAGES_PER_HOUR, MEMORY_GIB)
"""Names of budgets: the four costs; images an hour, at least; GiB of device memory at the peak."""


@dataclass(frozen=True)
class Constraint:
    """A bound on a column of the table: at most so much where `is_most`, else at least.

    `words` say it in a sentence: "5 ms per image", "caption alignment of at least 0.9".
    """

    column: str
    bound: float
    is_most: bool
    is_requirement: bool
    words: str

    def holds(self, rows: pd.DataFrame) -> pd.Series:
        """Whether each row keeps it, forgiving the last digits of floating point; False where it was not measured."""
        if self.is_most and self.bound > 0:
            return fits(rows[self.column], self.bound)
        slack = ROUNDING * abs(self.bound) * (1 if self.is_most else -1)
        bound = self.bound + slack
        return rows[self.column] <= bound if self.is_most else rows[self.column] >= bound

    def excess(self, rows: pd.DataFrame) -> pd.Series:
        """By how much each row misses it, 0 where it holds: a budget's in shares of the bound, a requirement's of the rows' range."""
        over = rows[self.column] - self.bound
        over = (over if self.is_most else -over).clip(lower=0)
        spread = float(rows[self.column].max() - rows[self.column].min())
        scale = (spread if spread > 0 else 1.0) if self.is_requirement else self.bound
        return (over / scale).where(~self.holds(rows), 0.0).fillna(np.inf)

    def shown(self, row: pd.Series) -> str:
        """What a row has of it, in words."""
        value = float(row[self.column])
        if self.is_requirement:
            low, high = (float(row[f"{self.column}_{side}"]) for side in ("low", "high"))
            return f"{format_metric(self.column)} {format_score(value, low, high)}"
        if self.column == MEMORY_COLUMN:
            return f"{format_number(value / MIB_PER_GIB)} GiB at the peak"
        return cost_of(self.column).amount(value)


@dataclass(frozen=True)
class ConstraintStatus:
    """A limit beside what the recommended configuration has: its value, and for a score the 95 % interval."""

    name: str
    bound: float
    is_most: bool
    value: float
    low: float | None
    high: float | None


def budget(name: str, bound: float) -> Constraint:
    """A budget of one of `BUDGETS`.

    Raises:
        ConfigError: no budget is called so, or the bound is not a positive number.
    """
    if name not in BUDGETS:
        raise ConfigError(f"no budget is called {name!r}; known: {', '.join(BUDGETS)}")
    if not (math.isfinite(bound) and bound > 0):
        raise ConfigError(f"a budget is a positive number, not {bound:g}")
    if name == MEMORY_GIB:
        return Constraint(MEMORY_COLUMN, bound * MIB_PER_GIB, True, False, f"{format_number(bound)} GiB of memory")
    if name == IMAGES_PER_HOUR:
        ms = MS_PER_HOUR / bound
        words = f"{format_number(ms)} ms per image ({format_number(bound)} images per hour)"
        return Constraint("ms_per_image", ms, True, False, words)
    return Constraint(name, float(bound), True, False, cost_of(name).amount(bound))


def requirement(metric: str, bound: float) -> Constraint:
    """A requirement of a metric: at or better than `bound`, at most it where lower is better.

    Raises:
        ConfigError: no metric is called so, or the bound is not a number.
    """
    is_most = metric_of(metric).better == "lower"
    if not math.isfinite(bound):
        raise ConfigError(f"a requirement is a number, not {bound:g} for {metric}")
    words = f"{format_metric(metric)} of at {'most' if is_most else 'least'} {bound:g}"
    return Constraint(metric, float(bound), is_most, True, words)


def constraints_of(cost: str, bound: float, also: Mapping[str, float], requirements: Mapping[str, float]) -> list[Constraint]:
    """All limits, the budget that leads first.

    Raises:
        ConfigError: one is wrong, two bound the same column, or memory stands alone.
    """
    if cost == MEMORY_GIB:
        raise ConfigError(f"a memory budget stands beside one of cost, which breaks ties: {', '.join(BUDGETS[:-1])}")
    budgets = [budget(cost, bound), *(budget(name, value) for name, value in also.items())]
    first: dict[str, Constraint] = {}
    for one in budgets:
        if one.column in first:
            raise ConfigError(f"two budgets of one kind, {first[one.column].words} and {one.words}: give one of them")
        first[one.column] = one
    return [*budgets, *(requirement(name, value) for name, value in requirements.items())]


def check_measured(rows: pd.DataFrame, limits: Sequence[Constraint]) -> None:
    """Raise ConfigError where no row was measured by what a limit bounds."""
    for limit in limits:
        if limit.column in rows.columns and rows[limit.column].notna().any():
            continue
        if limit.is_requirement:
            raise ConfigError(
                f"no point carries {limit.column}: run the sweep with a protocol that scores it, or leave that requirement out"
            )
        if limit.column == MEMORY_COLUMN:
            raise ConfigError(
                f"no point has a measured peak memory (column {MEMORY_COLUMN}): sweep on a device that reports it, "
                "or leave the memory budget out"
            )
        raise ConfigError(f"no point carries a measured {limit.column}; choose another cost of {', '.join(COSTS)}")


def feasible(rows: pd.DataFrame, limits: Sequence[Constraint]) -> pd.Series:
    """Whether each row keeps every limit."""
    held = pd.Series(True, index=rows.index)
    for limit in limits:
        held &= limit.holds(rows)
    return held


def constraint_status(row: pd.Series, limits: Sequence[Constraint]) -> tuple[ConstraintStatus, ...]:
    """Every limit beside what a row has."""
    told = []
    for limit in limits:
        ends = (
            [float(row[f"{limit.column}_{side}"]) for side in ("low", "high")] if limit.is_requirement else [math.nan, math.nan]
        )
        low, high = (None if math.isnan(end) else end for end in ends)
        told.append(ConstraintStatus(limit.column, limit.bound, limit.is_most, float(row[limit.column]), low, high))
    return tuple(told)


def format_text(limits: Sequence[Constraint]) -> str:
    """ "within 5 ms per image and 8 GiB of memory, with caption alignment of at least 0.9"."""
    budgets, requirements = _split(limits)
    told = f"within {_joined(budgets)}"
    return f"{told}, with {_joined(requirements)}" if requirements else told


def explain_infeasible(rows: pd.DataFrame, limits: Sequence[Constraint]) -> str:
    """One line on rows of which none keeps all limits: which of them it is, the nearest row, and what would do.

    Args:
        rows: best first; ties between near ones go to the better.
    """
    budgets, requirements = _split(limits)
    for limit in budgets:
        if not limit.holds(rows).any():
            row = rows.iloc[int(np.nanargmin(rows[limit.column].to_numpy(dtype=float)))]
            least = "the least takes" if limit.column == MEMORY_COLUMN else "the cheapest point costs"
            return f"a budget of {limit.words} is below every point; {least} {limit.shown(row)} ({_configuration(row)})"
    for some in (budgets, *([one] for one in requirements), requirements):
        if not feasible(rows, some).any():
            verb = "meets" if some and some[0].is_requirement else "keeps"
            together = " together" if len(some) > 1 else ""
            return f"no point {verb} {_joined(some)}{together}; the nearest is {_nearest(rows, some)}"
    inside = rows[feasible(rows, budgets)]
    told = (
        f"no point {format_text(budgets)} meets {_joined(requirements)}; the nearest there is {_nearest(inside, requirements)}"
    )
    measured = rows[feasible(rows, requirements) & rows[[limit.column for limit in budgets]].notna().all(axis=1)]
    if measured.empty:
        return told
    cheapest = measured.sort_values(budgets[0].column, kind="stable").iloc[0]
    takes = _joined_words([limit.shown(cheapest) for limit in budgets])
    return f"{told}; the cheapest point that does is {_configuration(cheapest)}, at {takes}"


def _nearest(rows: pd.DataFrame, limits: Sequence[Constraint]) -> str:
    """The row whose worst excess is the least, with what it has of the limits."""
    excess = pd.concat([limit.excess(rows) for limit in limits], axis=1).max(axis=1)
    row = rows.iloc[int(np.argmin(excess.to_numpy(dtype=float)))]
    return f"{_configuration(row)}, with {_joined_words([limit.shown(row) for limit in limits])}"


def _split(limits: Sequence[Constraint]) -> tuple[list[Constraint], list[Constraint]]:
    return [limit for limit in limits if not limit.is_requirement], [limit for limit in limits if limit.is_requirement]


def _joined(limits: Sequence[Constraint]) -> str:
    return _joined_words([limit.words for limit in limits])


def _joined_words(words: Sequence[str]) -> str:
    return " and ".join(words)


def _configuration(row: pd.Series) -> str:
    return format_configuration(str(row["size"]), int(row["num_steps"]), float(row["guidance"]), str(row["solver"]))
