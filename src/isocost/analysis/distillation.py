"""Few-step students against the undistilled: at the same steps, in steps saved, and at equal cost.

A student is a row of the table whose size ends in how it was distilled ("2.6M consistency"); its teacher is the row of the rest
("2.6M"). Every choice of guidance is made anew for each number of steps, for both alike (arXiv 2404.01367, section 4.7).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np
import pandas as pd

from isocost.analysis.costs import COSTS
from isocost.analysis.formatting import format_number
from isocost.analysis.iso_cost import Pairs, best_at_budget, difference_between, format_text, verdict
from isocost.analysis.pareto import metric_of
from isocost.analysis.results_table import best_in_each, final_points, rank_points, sizes_in_order
from isocost.config.finetune import DistillVariant

VARIANTS = get_args(DistillVariant)
STUDENT_STEPS = 4
"""The paper's students take four."""


@dataclass(frozen=True)
class Acceleration:
    """How many of the undistilled's steps one of the student's is worth.

    `low` and `high` take both intervals at their ends, so they are wider than 95 %. Infinite where no number of steps that was
    tried is enough; `fewest_tried` bounds from above what the teacher matches with all that were tried.
    """

    student: str
    num_steps: int
    steps_to_match: float
    low: float
    high: float
    fewest_tried: float

    def __str__(self) -> str:
        factor, low, high = (self._times(value) for value in (self.steps_to_match, self.low, self.high))
        return f"{_steps(self.num_steps)}: {factor} [{low}, {high}]"

    def _times(self, value: float) -> str:
        if math.isinf(value):
            return "more than was tried"
        return f"{'at most ' if value == self.fewest_tried else ''}{format_number(value / self.num_steps)}x"


def teacher_of(size: str) -> tuple[str, str]:
    """The undistilled size and how it was distilled: ("2.6M", "codi"); the latter empty where it was not."""
    rest, _, last = size.rpartition(" ")
    return (rest, last) if last in VARIANTS else (size, "")


def against_teacher(table: pd.DataFrame, metric: str, pairs: Pairs) -> dict[str, list[str]]:
    """By student: at each of its numbers of steps, its score less its teacher's, each at its best guidance, and the verdict."""
    best = best_in_each(final_points(table, metric), metric, ["size", "num_steps"])
    points = {(str(row["size"]), int(row["num_steps"])): row for row in best.to_dict("records")}
    told: dict[str, list[str]] = {}
    for size in sizes_in_order(best):
        teacher, variant = teacher_of(size)
        if not variant:
            continue
        for num_steps in sorted(steps for each, steps in points if each == size):
            if (teacher, num_steps) in points:
                difference, is_paired = difference_between(points[size, num_steps], points[teacher, num_steps], metric, pairs)
                said = f"{format_text(difference, is_paired)}, {verdict(difference, metric)}"
            else:
                said = f"its teacher was not scored there: add {num_steps} to sweep.num_steps"
            told.setdefault(size, []).append(f"{_steps(num_steps)}: {said}")
    return told


def acceleration(table: pd.DataFrame, metric: str) -> list[Acceleration]:
    """For every student and number of steps, the steps at which its teacher's curve reaches the student's score.

    The teacher's curve is its best score within so many steps, a line over the logarithm of the steps between those tried.
    """
    rows = best_in_each(final_points(table, metric), metric, ["size", "num_steps"])
    sign = 1.0 if metric_of(metric).better == "lower" else -1.0
    curves = {size: group.sort_values("num_steps") for size, group in rows.groupby("size")}
    found = []
    for size in sizes_in_order(rows):
        teacher, variant = teacher_of(size)
        if not variant or teacher not in curves:
            continue
        steps = curves[teacher]["num_steps"].to_numpy(float)
        value, good, bad = (
            np.minimum.accumulate(sign * curves[teacher][column].to_numpy(float)) for column in _columns(metric, sign)
        )
        for row in curves[size].to_dict("records"):
            own, own_good, own_bad = (sign * row[column] for column in _columns(metric, sign))
            found.append(
                Acceleration(
                    size,
                    int(row["num_steps"]),
                    steps_to_reach(steps, value, own),
                    steps_to_reach(steps, good, own_bad),
                    steps_to_reach(steps, bad, own_good),
                    float(steps[0]),
                )
            )
    return found


def accelerations(table: pd.DataFrame, metric: str) -> dict[str, list[str]]:
    """`acceleration` in words, by student."""
    told: dict[str, list[str]] = {}
    for one in acceleration(table, metric):
        told.setdefault(one.student, []).append(str(one))
    return told


def steps_to_reach(steps: np.ndarray, values: np.ndarray, wanted: float) -> float:
    """Steps at which a falling curve reaches a value; below the first the first, infinite where it never does."""
    reached = np.flatnonzero(values <= wanted)
    if not len(reached):
        return math.inf
    at = int(reached[0])
    if at == 0 or values[at - 1] == values[at]:
        return float(steps[at])
    share = (values[at - 1] - wanted) / (values[at - 1] - values[at])
    return float(np.exp(np.log(steps[at - 1]) + share * (np.log(steps[at]) - np.log(steps[at - 1]))))


def comparisons(table: pd.DataFrame, metric: str, pairs: Pairs, num_steps: int = STUDENT_STEPS) -> pd.DataFrame:
    """Every pair at equal cost as a table of `Comparison`, with the columns `variant` and `claim` in front.

    A budget is what a student costs at `num_steps`. Claims: "own size" sets a student against its teacher at the student's
    budget; the others set a smaller size against a larger one at the larger student's budget: "small student, large student",
    "small undistilled, large undistilled", "small undistilled, large student" (the paper's surprise) and "small student, large
    undistilled".
    """
    told = []
    for cost in COSTS:
        if table.loc[table["is_final"].astype(bool), cost].isna().all():
            continue
        rows = rank_points(final_points(table, metric, cost), metric, cost)
        for variant in VARIANTS:
            for claim, one, other, budget in _claims(rows, cost, variant, num_steps):
                compared = best_at_budget(rows, metric, pairs, cost, budget, one, other)
                told.append({"variant": variant, "claim": claim, **asdict(compared), "text": str(compared)})
    return pd.DataFrame(told)


def at_equal_cost(table: pd.DataFrame, metric: str, pairs: Pairs) -> dict[str, Any]:
    """`comparisons` in words: for each variant the paper's two claims, then every pair under every cost."""
    found = comparisons(table, metric, pairs)
    if found.empty:
        return {}
    told: dict[str, Any] = {}
    for variant, of_variant in found.groupby("variant", sort=False):
        told[f"{variant}: does it hold?"] = {
            f"{sentence}, under {COSTS[str(cost)].label}": _share(of_cost[of_cost["claim"] == claim], wanted)
            for cost, of_cost in of_variant.groupby("cost", sort=False)
            for claim, wanted, sentence in SENTENCES
        }
        for cost, of_cost in of_variant.groupby("cost", sort=False):
            told[f"{variant}: at equal {COSTS[str(cost)].label}"] = {
                f"{row['one']} less {row['other']}, {COSTS[str(cost)].amount(row['budget'])}": row["text"]
                for row in of_cost.to_dict("records")
            }
    return told


SENTENCES = (
    ("own size", {"better"}, "a student beats the undistilled of its own size at equal cost"),
    (
        "small undistilled, large student",
        {"better", "undecided"},
        "no larger student is shown better than an undistilled smaller size",
    ),
)
"""Claim, the verdicts that agree with it, and the sentence."""


def _claims(rows: pd.DataFrame, cost: str, variant: str, num_steps: int) -> Iterator[tuple[str, str, str, float]]:
    sizes = sizes_in_order(rows)
    teachers = [size for size in sizes if not teacher_of(size)[1] and f"{size} {variant}" in sizes]
    least = rows[rows["num_steps"] == num_steps].groupby("size")[cost].min()
    budgets = {str(size): float(value) for size, value in least.items()}
    for number, large in enumerate(teachers):
        student = f"{large} {variant}"
        if student not in budgets:
            continue
        yield "own size", student, large, budgets[student]
        for small in teachers[:number]:
            yield "small student, large student", f"{small} {variant}", student, budgets[student]
            yield "small undistilled, large undistilled", small, large, budgets[student]
            yield "small undistilled, large student", small, student, budgets[student]
            yield "small student, large undistilled", f"{small} {variant}", large, budgets[student]


def _share(claims: pd.DataFrame, wanted: set[str]) -> str:
    judged = claims[claims["difference"].notna()]
    if judged.empty:
        return "nothing to compare within the budget"
    if wanted == {"better"} and (judged["verdict"] == "undecided").any():
        open_ = int((judged["verdict"] == "undecided").sum())
        return f"holds for {int((judged['verdict'] == 'better').sum())} of {len(judged)}, undecided for {open_}"
    agree = int(judged["verdict"].isin(wanted).sum())
    return f"{'holds' if agree == len(judged) else 'does not hold'}: {agree} of {len(judged)} pairs agree"


def _columns(metric: str, sign: float) -> tuple[str, str, str]:
    """Value, and the ends of its interval, the better one first."""
    ends = (f"{metric}_low", f"{metric}_high")
    return (metric, *(ends if sign > 0 else ends[::-1]))


def _steps(number: int) -> str:
    return "1 step" if number == 1 else f"{number} steps"
