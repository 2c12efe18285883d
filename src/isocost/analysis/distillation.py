"""Compare few-step students with undistilled models: at equal steps, by the steps they save, and at equal cost.

The size name of a student is that of its teacher and the distillation variant: "2.6M consistency" for the teacher "2.6M".
Guidance is chosen separately for each number of steps, for students and teachers alike (arXiv 2404.01367, section 4.7).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np
import pandas as pd

from isocost.analysis.costs import COSTS, REPORT_COSTS, is_measured
from isocost.analysis.formatting import format_number, format_steps
from isocost.analysis.iso_cost import PairedDifferences, best_at_budget, classify, difference_between, format_difference
from isocost.analysis.results_table import best_per_group, final_points, rank_points, sizes_in_order
from isocost.config.finetune import DistillVariant
from isocost.evaluation.metric_registry import metric_of

VARIANTS = get_args(DistillVariant)
STUDENT_STEPS = 4
"""The paper's students take four steps."""


@dataclass(frozen=True)
class Acceleration:
    """The number of steps that the teacher needs to match a student.

    Attributes:
        num_steps: of the student.
        steps_to_match: of the teacher; infinite if it does not match the student with any number of steps that was tried.
        low: lower end of an interval that combines the ends of both scores' intervals, so it is wider than 95 %.
        high: upper end.
        fewest_tried: the teacher's lowest number of steps. A value equal to it is only an upper bound.
    """

    student: str
    num_steps: int
    steps_to_match: float
    low: float
    high: float
    fewest_tried: float

    def __str__(self) -> str:
        factor, low, high = (self._format_factor(value) for value in (self.steps_to_match, self.low, self.high))
        return f"{format_steps(self.num_steps)}: {factor} [{low}, {high}]"

    def _format_factor(self, value: float) -> str:
        if math.isinf(value):
            return "not reached"
        return f"{'at most ' if value == self.fewest_tried else ''}{format_number(value / self.num_steps)}x"


def split_student_name(size: str) -> tuple[str, str]:
    """Split the name of a size into that of the undistilled size and the distillation variant, "" for an undistilled size.

    "2.6M codi" gives ("2.6M", "codi").
    """
    teacher, _, variant = size.rpartition(" ")
    return (teacher, variant) if variant in VARIANTS else (size, "")


def format_teacher_differences(table: pd.DataFrame, metric: str, pairs: PairedDifferences) -> dict[str, list[str]]:
    """Differences between students and their teachers at equal steps, each at its best guidance, with verdicts.

    Returns:
        Student -> one text for each of its numbers of steps.
    """
    best = best_per_group(final_points(table, metric), metric, ["size", "num_steps"])
    points = {(str(row["size"]), int(row["num_steps"])): row for row in best.to_dict("records")}
    texts: dict[str, list[str]] = {}
    for size in sizes_in_order(best):
        teacher, variant = split_student_name(size)
        if not variant:
            continue
        for num_steps in sorted(steps for name, steps in points if name == size):
            if (teacher, num_steps) in points:
                difference, is_paired = difference_between(points[size, num_steps], points[teacher, num_steps], metric, pairs)
                text = f"{format_difference(difference, is_paired)}, {classify(difference, metric)}"
            else:
                text = f"the teacher was not scored with as many steps: add {num_steps} to sweep.num_steps"
            texts.setdefault(size, []).append(f"{format_steps(num_steps)}: {text}")
    return texts


def measure_accelerations(table: pd.DataFrame, metric: str) -> list[Acceleration]:
    """For every student and number of steps, the number of steps at which its teacher's curve reaches the student's score.

    The teacher's curve is its best score with at most n steps, interpolated linearly over the logarithm of n.
    """
    rows = best_per_group(final_points(table, metric), metric, ["size", "num_steps"])
    sign = 1.0 if metric_of(metric).better == "lower" else -1.0
    curves = {size: group.sort_values("num_steps") for size, group in rows.groupby("size")}
    results = []
    for size in sizes_in_order(rows):
        teacher, variant = split_student_name(size)
        if not variant or teacher not in curves:
            continue
        steps = curves[teacher]["num_steps"].to_numpy(float)
        value, optimistic, pessimistic = (
            np.minimum.accumulate(sign * curves[teacher][column].to_numpy(float)) for column in _score_columns(metric, sign)
        )
        for row in curves[size].to_dict("records"):
            student_value, student_optimistic, student_pessimistic = (
                sign * row[column] for column in _score_columns(metric, sign)
            )
            results.append(
                Acceleration(
                    size,
                    int(row["num_steps"]),
                    steps_to_reach(steps, value, student_value),
                    steps_to_reach(steps, optimistic, student_pessimistic),
                    steps_to_reach(steps, pessimistic, student_optimistic),
                    float(steps[0]),
                )
            )
    return results


def format_accelerations(table: pd.DataFrame, metric: str) -> dict[str, list[str]]:
    """The result of `measure_accelerations` as text: student -> one text for each of its numbers of steps."""
    texts: dict[str, list[str]] = {}
    for acceleration in measure_accelerations(table, metric):
        texts.setdefault(acceleration.student, []).append(str(acceleration))
    return texts


def steps_to_reach(steps: np.ndarray, values: np.ndarray, target: float) -> float:
    """The number of steps at which a falling curve reaches a target value.

    Args:
        steps: rising, [K].
        values: of the curve, falling, [K].

    Returns:
        The first of `steps` if the curve starts at or below the target; infinity if it never reaches the target.
    """
    reached = np.flatnonzero(values <= target)
    if not len(reached):
        return math.inf
    index = int(reached[0])
    if index == 0 or values[index - 1] == values[index]:
        return float(steps[index])
    fraction = (values[index - 1] - target) / (values[index - 1] - values[index])
    return float(np.exp(np.log(steps[index - 1]) + fraction * (np.log(steps[index]) - np.log(steps[index - 1]))))


def comparisons(table: pd.DataFrame, metric: str, pairs: PairedDifferences, num_steps: int = STUDENT_STEPS) -> pd.DataFrame:
    """Compare every pair of models at equal cost.

    The budget of a comparison is the cost of a student at `num_steps` steps.

    Returns:
        One row per `Comparison`, with its fields as columns, `variant` and `claim` in front and its text in `text`. The claim
        "own size" compares a student with its teacher at the student's budget. The others compare a smaller size with a larger
        one at the larger student's budget: "small student, large student", "small undistilled, large undistilled", "small
        undistilled, large student" (the surprising result of the paper) and "small student, large undistilled".
    """
    results = []
    for cost in REPORT_COSTS:
        if not is_measured(table[table["is_final"].astype(bool)], cost):
            continue
        rows = rank_points(final_points(table, metric, cost), metric, cost)
        for variant in VARIANTS:
            for claim, first, second, budget in _pairs_to_compare(rows, cost, variant, num_steps):
                comparison = best_at_budget(rows, metric, pairs, cost, budget, first, second)
                results.append({"variant": variant, "claim": claim, **asdict(comparison), "text": str(comparison)})
    return pd.DataFrame(results)


def format_equal_cost(table: pd.DataFrame, metric: str, pairs: PairedDifferences) -> dict[str, Any]:
    """The result of `comparisons` as text: for each variant the paper's two claims, then every pair under every cost."""
    results = comparisons(table, metric, pairs)
    if results.empty:
        return {}
    texts: dict[str, Any] = {}
    for variant, of_variant in results.groupby("variant", sort=False):
        texts[f"{variant}: the paper's claims"] = {
            f"{statement}, under {COSTS[str(cost)].label}": _format_support(of_cost[of_cost["claim"] == claim], expected)
            for cost, of_cost in of_variant.groupby("cost", sort=False)
            for claim, expected, statement in PAPER_CLAIMS
        }
        for cost, of_cost in of_variant.groupby("cost", sort=False):
            texts[f"{variant}: at equal {COSTS[str(cost)].label}"] = {
                f"{row['one']} minus {row['other']}, {COSTS[str(cost)].format_amount(row['budget'])}": row["text"]
                for row in of_cost.to_dict("records")
            }
    return texts


PAPER_CLAIMS = (
    ("own size", {"better"}, "a student is better than the undistilled model of its own size at equal cost"),
    (
        "small undistilled, large student",
        {"better", "undecided"},
        "no larger student is decidedly better than an undistilled smaller model",
    ),
)
"""The claim in the table of `comparisons`, the verdicts that agree with it, and its statement."""


def _pairs_to_compare(rows: pd.DataFrame, cost: str, variant: str, num_steps: int) -> Iterator[tuple[str, str, str, float]]:
    """Claim, the two sizes and the budget of every comparison."""
    sizes = sizes_in_order(rows)
    teachers = [size for size in sizes if not split_student_name(size)[1] and f"{size} {variant}" in sizes]
    lowest = rows[rows["num_steps"] == num_steps].groupby("size")[cost].min()
    budgets = {str(size): float(value) for size, value in lowest.items()}
    for index, large in enumerate(teachers):
        student = f"{large} {variant}"
        if student not in budgets:
            continue
        yield "own size", student, large, budgets[student]
        for small in teachers[:index]:
            yield "small student, large student", f"{small} {variant}", student, budgets[student]
            yield "small undistilled, large undistilled", small, large, budgets[student]
            yield "small undistilled, large student", small, student, budgets[student]
            yield "small student, large undistilled", f"{small} {variant}", large, budgets[student]


def _format_support(pairs: pd.DataFrame, expected: set[str]) -> str:
    """How many of the pairs have one of the expected verdicts."""
    compared = pairs[pairs["difference"].notna()]
    if compared.empty:
        return "nothing to compare within the budget"
    if expected == {"better"} and (compared["verdict"] == "undecided").any():
        num_undecided = int((compared["verdict"] == "undecided").sum())
        num_better = int((compared["verdict"] == "better").sum())
        return f"holds for {num_better} of {len(compared)} pairs, undecided for {num_undecided}"
    num_agree = int(compared["verdict"].isin(expected).sum())
    return f"{'holds' if num_agree == len(compared) else 'does not hold'}: {num_agree} of {len(compared)} pairs agree"


def _score_columns(metric: str, sign: float) -> tuple[str, str, str]:
    """Columns of the score and of the ends of its interval, the better end first."""
    ends = (f"{metric}_low", f"{metric}_high")
    return (metric, *(ends if sign > 0 else ends[::-1]))
