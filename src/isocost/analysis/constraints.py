"""Constraints on a recommendation: budgets of cost and memory, and requirements on scores.

A point meets a budget if its cost is at most the budget. It meets a requirement if its score is equal to or better than the
bound, in the direction of the metric; the score counts, not its interval. A point without a measurement does not meet a
constraint on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from isocost.analysis.costs import COSTS, cost_of, format_unmeasured
from isocost.analysis.formatting import ROUNDING, format_metric, format_number, format_row, format_score
from isocost.analysis.results_table import is_within_budget
from isocost.errors import ConfigError
from isocost.evaluation.metric_registry import metric_of

MS_PER_HOUR = 3.6e6
MIB_PER_GIB = 1024
IMAGES_PER_HOUR, MEMORY_GIB = "images_per_hour", "memory_gib"
MEMORY_COLUMN = "peak_memory_mib"
BUDGETS = (*COSTS, IMAGES_PER_HOUR, MEMORY_GIB)
"""Names of budgets: the costs, a minimum of images per hour, and a maximum of peak device memory in GiB."""


@dataclass(frozen=True)
class Constraint:
    """A bound on a column of the table.

    Attributes:
        is_upper_bound: whether the bound is a maximum; otherwise it is a minimum.
        is_requirement: whether the column is a score; otherwise it is a cost or the memory.
        text: the constraint as a phrase: "5 ms per image", "prompt alignment of at least 0.9".
    """

    column: str
    bound: float
    is_upper_bound: bool
    is_requirement: bool
    text: str

    def holds(self, rows: pd.DataFrame) -> pd.Series:
        """Whether each row meets the constraint, with a tolerance for floating-point rounding; False without a measurement."""
        if self.is_upper_bound and self.bound > 0:
            return is_within_budget(rows[self.column], self.bound)
        slack = ROUNDING * abs(self.bound) * (1 if self.is_upper_bound else -1)
        bound = self.bound + slack
        return rows[self.column] <= bound if self.is_upper_bound else rows[self.column] >= bound

    def excess(self, rows: pd.DataFrame) -> pd.Series:
        """How far each row is beyond the bound. It is 0 if the row meets the constraint, and inf without a measurement.

        Returns:
            [rows]. The distance to a bound on cost or memory is divided by the bound. The distance to a bound on a score is
            divided by the range of the scores in `rows`.
        """
        over = rows[self.column] - self.bound
        over = (over if self.is_upper_bound else -over).clip(lower=0)
        value_range = float(rows[self.column].max() - rows[self.column].min())
        scale = (value_range if value_range > 0 else 1.0) if self.is_requirement else self.bound
        return (over / scale).where(~self.holds(rows), 0.0).fillna(np.inf)

    def format_value(self, row: pd.Series) -> str:
        """The value of the bounded column in a row, with its unit or the name of the metric."""
        value = float(row[self.column])
        if self.is_requirement:
            low, high = (float(row[f"{self.column}_{end}"]) for end in ("low", "high"))
            return f"{format_metric(self.column)} {format_score(value, low, high)}"
        if self.column == MEMORY_COLUMN:
            return f"{format_number(value / MIB_PER_GIB)} GiB of peak memory"
        return cost_of(self.column).format_amount(value)


@dataclass(frozen=True)
class ConstraintStatus:
    """A constraint and the value of the recommended configuration.

    Attributes:
        name: the bounded column.
        is_upper_bound: whether the bound is a maximum; otherwise it is a minimum.
        value: the configuration's value.
        low: lower end of the 95 % interval of a score; None for a cost, or without an interval.
        high: upper end.
    """

    name: str
    bound: float
    is_upper_bound: bool
    value: float
    low: float | None
    high: float | None


def budget(name: str, bound: float) -> Constraint:
    """Make the constraint of a budget.

    Args:
        name: one of `BUDGETS`.
        bound: in the unit of that budget.

    Raises:
        ConfigError: the name is unknown, or the bound is not a positive number.
    """
    if name not in BUDGETS:
        raise ConfigError(f"no budget is called {name!r}; known: {', '.join(BUDGETS)}")
    if not (math.isfinite(bound) and bound > 0):
        raise ConfigError(f"a budget must be a positive number, not {bound:g}")
    if name == MEMORY_GIB:
        return Constraint(MEMORY_COLUMN, bound * MIB_PER_GIB, True, False, f"{format_number(bound)} GiB of memory")
    if name == IMAGES_PER_HOUR:
        ms = MS_PER_HOUR / bound
        text = f"{format_number(ms)} ms per image ({format_number(bound)} images per hour)"
        return Constraint("ms_per_image", ms, True, False, text)
    return Constraint(name, float(bound), True, False, cost_of(name).format_amount(bound))


def requirement(metric: str, bound: float) -> Constraint:
    """Make the constraint that a score is `bound` or better: at most `bound` if lower is better, else at least.

    Raises:
        ConfigError: the metric is unknown, or the bound is not a number.
    """
    is_upper_bound = metric_of(metric).better == "lower"
    if not math.isfinite(bound):
        raise ConfigError(f"a requirement must be a number, not {bound:g} for {metric}")
    text = f"{format_metric(metric)} of at {'most' if is_upper_bound else 'least'} {bound:g}"
    return Constraint(metric, float(bound), is_upper_bound, True, text)


def make_constraints(cost: str, bound: float, also: Mapping[str, float], requirements: Mapping[str, float]) -> list[Constraint]:
    """All constraints of a recommendation, the first budget in front.

    Args:
        cost: name of the first budget, whose cost breaks ties.
        bound: value of the first budget.
        also: further budgets, name -> value.
        requirements: metric -> value.

    Raises:
        ConfigError: a budget or requirement is invalid, two bound the same column, or memory is the first budget.
    """
    if cost == MEMORY_GIB:
        raise ConfigError(f"a memory budget needs a cost budget as well, which breaks ties: {', '.join(BUDGETS[:-1])}")
    budgets = [budget(cost, bound), *(budget(name, value) for name, value in also.items())]
    by_column: dict[str, Constraint] = {}
    for constraint in budgets:
        column = constraint.column
        if column in by_column:
            raise ConfigError(f"two budgets of one kind, {by_column[column].text} and {constraint.text}: give one of them")
        by_column[column] = constraint
    return [*budgets, *(requirement(name, value) for name, value in requirements.items())]


def check_measured(rows: pd.DataFrame, constraints: Sequence[Constraint]) -> None:
    """Check that at least one row has a value in every bounded column.

    Raises:
        ConfigError: a column has no value.
    """
    for constraint in constraints:
        column = constraint.column
        if column in rows.columns and rows[column].notna().any():
            continue
        if constraint.is_requirement:
            raise ConfigError(
                f"no point has {column}: run the sweep with a protocol that computes it, or leave this requirement out"
            )
        if column == MEMORY_COLUMN:
            raise ConfigError(
                f"no point has a measured peak memory (column {MEMORY_COLUMN}): sweep on a device that reports it, "
                "or leave the memory budget out"
            )
        raise ConfigError(format_unmeasured(column))


def feasible(rows: pd.DataFrame, constraints: Sequence[Constraint]) -> pd.Series:
    """Whether each row meets every constraint."""
    meets_all = pd.Series(True, index=rows.index)
    for constraint in constraints:
        meets_all &= constraint.holds(rows)
    return meets_all


def constraint_status(row: pd.Series, constraints: Sequence[Constraint]) -> tuple[ConstraintStatus, ...]:
    """Every constraint with the value of a row."""
    statuses = []
    for constraint in constraints:
        column = constraint.column
        ends = [float(row[f"{column}_{end}"]) for end in ("low", "high")] if constraint.is_requirement else [math.nan, math.nan]
        low, high = (None if math.isnan(end) else end for end in ends)
        statuses.append(ConstraintStatus(column, constraint.bound, constraint.is_upper_bound, float(row[column]), low, high))
    return tuple(statuses)


def format_constraints(constraints: Sequence[Constraint]) -> str:
    """A phrase: "within 5 ms per image and 8 GiB of memory, with prompt alignment of at least 0.9"."""
    budgets, requirements = _split(constraints)
    text = f"within {_format_all(budgets)}"
    return f"{text}, with {_format_all(requirements)}" if requirements else text


def explain_infeasible(rows: pd.DataFrame, constraints: Sequence[Constraint]) -> str:
    """One line for the case that no row meets all constraints: the constraint that fails, the nearest row, a remedy.

    Args:
        rows: best first; of equally near rows the first is named.
    """
    budgets, requirements = _split(constraints)
    for constraint in budgets:
        if not constraint.holds(rows).any():
            row = rows.iloc[int(np.nanargmin(rows[constraint.column].to_numpy(dtype=float)))]
            lowest = "the smallest point needs" if constraint.column == MEMORY_COLUMN else "the cheapest point costs"
            return (
                f"a budget of {constraint.text} is below every point; "
                f"{lowest} {constraint.format_value(row)} ({_format_configuration(row)})"
            )
    for group in (budgets, *([constraint] for constraint in requirements), requirements):
        if not feasible(rows, group).any():
            verb = "meets" if group and group[0].is_requirement else "fits"
            together = " together" if len(group) > 1 else ""
            return f"no point {verb} {_format_all(group)}{together}; the nearest is {_format_nearest(rows, group)}"
    affordable = rows[feasible(rows, budgets)]
    message = (
        f"no point {format_constraints(budgets)} meets {_format_all(requirements)}; "
        f"the nearest affordable point is {_format_nearest(affordable, requirements)}"
    )
    measured = rows[feasible(rows, requirements) & rows[[constraint.column for constraint in budgets]].notna().all(axis=1)]
    if measured.empty:
        return message
    cheapest = measured.sort_values(budgets[0].column, kind="stable").iloc[0]
    costs = " and ".join(constraint.format_value(cheapest) for constraint in budgets)
    every = "every requirement" if len(requirements) > 1 else "the requirement"
    return f"{message}; the cheapest point that meets {every} is {_format_configuration(cheapest)}, at {costs}"


def _format_nearest(rows: pd.DataFrame, constraints: Sequence[Constraint]) -> str:
    """The row whose largest excess is the smallest, with its values of the bounded columns."""
    excess = pd.concat([constraint.excess(rows) for constraint in constraints], axis=1).max(axis=1)
    row = rows.iloc[int(np.argmin(excess.to_numpy(dtype=float)))]
    values = " and ".join(constraint.format_value(row) for constraint in constraints)
    return f"{_format_configuration(row)}, with {values}"


def _split(constraints: Sequence[Constraint]) -> tuple[list[Constraint], list[Constraint]]:
    """Budgets, and requirements."""
    budgets = [constraint for constraint in constraints if not constraint.is_requirement]
    return budgets, [constraint for constraint in constraints if constraint.is_requirement]


def _format_all(constraints: Sequence[Constraint]) -> str:
    return " and ".join(constraint.text for constraint in constraints)


def _format_configuration(row: pd.Series) -> str:
    return format_row(row)
