"""The findings of "Bigger is not Always Better" (arXiv 2404.01367), each as a question to a study's own points.

They are put as the paper states them, so that a study can contradict them. Sizes in the words of a case go by their names; a
"best" is the best over solvers, steps and guidance within what the case allows. Each raises ConfigError where the tables
cannot say, with what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pandas as pd

from isocost.analysis.claims import Claim, Evidence, Tables, TaskResults, compare, format_metric_score, points_of, says
from isocost.analysis.costs import COSTS
from isocost.analysis.distillation import STUDENT_STEPS, acceleration, teacher_of
from isocost.analysis.formatting import format_number
from isocost.analysis.results_table import best_in_each, final_points, fits, rank_points, sizes_in_order
from isocost.analysis.scaling_laws import compute_curves
from isocost.errors import ConfigError

FEW_STEPS = 10
"""Up to which the paper's solvers differ most (figure 8)."""
SUPERRES_STEPS = 20
"""Up to which small sizes win in super-resolution (section 4.6)."""
SOLVERS = ("ddpm", "ddim", "dpmsolver++2m")
"""In the paper's order with few steps, from worst to best."""
MORE_COMPUTE = 2.0
"""Ratio from which one training took more compute than another."""
SPEED_UP = 5.0
"""Of the paper's distillation to four steps."""
Row = dict[Any, Any]


# --- experiment 1: training compute ---


def more_images(tables: Tables, _: str) -> list[Evidence]:
    """Every size: its last mark against its first."""
    points = points_of(tables, "text2image")
    return [
        _case(last, first, points, f"{size}: {last['images_seen']:,} images ", f"{first['images_seen']:,} images ")
        for size, (first, *_, last) in _marks(points)
    ]


def compute_decides(tables: Tables, _: str) -> list[Evidence]:
    """Marks of different sizes, one trained with at least twice the compute of the other: whether more compute is better."""
    return _more_compute(points_of(tables, "text2image"))


def larger_is_better(tables: Tables, _: str) -> list[Evidence]:
    """Neighbouring sizes, trained on the same images, at one setting."""
    points = points_of(tables, "text2image")
    last = [(size, snapshots[-1]) for size, snapshots in _marks(points, least=1)]
    return [
        _case(large, small, points, f"{name} ", f"{other} ")
        for (other, small), (name, large) in pairwise(last)
        if large["images_seen"] == small["images_seen"]
    ]


# --- experiment 2: downstream ---


def superres_follows_size(tables: Tables, _: str) -> list[Evidence]:
    """A smaller size at the end of its fine-tuning against the largest at no more compute, or at its first mark."""
    points = _pretrained(points_of(tables, "superres"))
    *smaller, (name, snapshots) = _marks(points, least=1)
    cases = []
    for size, own in smaller:
        small = own[-1]
        cheaper = [snapshot for snapshot in snapshots if snapshot["training_gflop"] <= small["training_gflop"]]
        large = cheaper[-1] if cheaper else snapshots[0]
        cases.append(_case(large, small, points, f"{name} after {large['images_seen']:,} images ", f"{size} at its end "))
    return cases


def lpips_follows_compute(tables: Tables, _: str) -> list[Evidence]:
    """Marks of different sizes: whether more fine-tuning compute gives the better LPIPS."""
    points = _pretrained(points_of(tables, "superres"))
    return _more_compute(TaskResults(points.table, "lpips"))


def dreambooth_follows_size(tables: Tables, _: str) -> list[Evidence]:
    """Neighbouring tuned sizes, each at its best."""
    points = _pretrained(points_of(tables, "dreambooth"))
    best = best_in_each(final_points(points.table, points.metric), points.metric, ["size"]).to_dict("records")
    return [_case(large, small, points, f"{large['size']} ", f"{small['size']} ") for small, large in pairwise(best)]


# --- experiment 3: sampling cost ---


def small_wins(tables: Tables, cost: str) -> list[Evidence]:
    """The best smaller size against the largest, at the costs of the lower half of the largest's numbers of steps."""
    points = points_of(tables, "text2image")
    rows = final_points(points.table, points.metric, cost)
    budgets = _budgets(rows, cost)
    return list(_smaller_against_largest(rows, points, cost, budgets[: math.ceil(len(budgets) / 2)]))


def large_wins_in_the_end(tables: Tables, _: str) -> list[Evidence]:
    """The largest at its best against every smaller size at its best, whatever that costs."""
    points = points_of(tables, "text2image")
    *smaller, large = best_in_each(final_points(points.table, points.metric), points.metric, ["size"]).to_dict("records")
    return [_case(large, small, points, f"{large['size']} ", f"{small['size']} ") for small in smaller]


def guidance_falls_with_size(tables: Tables, _: str) -> list[Evidence]:
    """The best guidance of the largest against that of the smallest, by solver and number of steps."""
    points = points_of(tables, "text2image")
    rows = final_points(points.table, points.metric)
    sizes = sizes_in_order(rows)
    return _guidance_cases(rows, points.metric, ["solver", "num_steps"], "size", sizes[0], sizes[-1])


def guidance_falls_with_steps(tables: Tables, _: str) -> list[Evidence]:
    """The best guidance with the most steps against that with the fewest from two on, by size and solver.

    Raises:
        ConfigError: one number of steps was tried.
    """
    points = points_of(tables, "text2image")
    rows = final_points(points.table, points.metric)
    rows = rows[rows["num_steps"] > 1]
    if rows["num_steps"].nunique() < 2:
        raise ConfigError("one number of steps from two on was tried")
    steps = sorted(rows["num_steps"].unique())
    return _guidance_cases(rows, points.metric, ["size", "solver"], "num_steps", steps[0], steps[-1])


# --- experiment 4: solvers ---


def better_solvers_need_fewer_steps(tables: Tables, _: str) -> list[Evidence]:
    """Neighbours in DDPM, DDIM, DPM-Solver++: whether the later one is better, by size and number of steps.

    Raises:
        ConfigError: fewer than two of them were tried.
    """
    points = points_of(tables, "text2image")
    rows = final_points(points.table, points.metric)
    rows = rows.assign(_kind=rows["solver"].str.partition("/")[0])
    rows = rows[rows["num_steps"].between(2, FEW_STEPS) & rows["_kind"].isin(SOLVERS)]
    best = best_in_each(rows, points.metric, ["size", "_kind", "num_steps"])
    cases = []
    for (size, steps), group in best.groupby(["size", "num_steps"], sort=False):
        by_kind = {row["_kind"]: row for row in group.to_dict("records")}
        present = [kind for kind in SOLVERS if kind in by_kind]
        for worse, better in pairwise(present):
            words = f"{size}, {steps} steps: {better} "
            cases.append(_case(by_kind[better], by_kind[worse], points, words, f"{worse} "))
    if not cases:
        raise ConfigError(f"fewer than two of {', '.join(SOLVERS)} were tried with 2 to {FEW_STEPS} steps")
    return cases


def small_wins_under_every_solver(tables: Tables, cost: str) -> list[Evidence]:
    """As `small_wins`, with the points of one solver at a time."""
    points = points_of(tables, "text2image")
    rows = final_points(points.table, points.metric, cost)
    cases = []
    for solver, own in rows.groupby("solver"):
        budgets = _budgets(own, cost)
        few = budgets[: math.ceil(len(budgets) / 2)]
        cases += list(_smaller_against_largest(own, points, cost, few, f"{solver}, "))
    return cases


# --- experiment 5: sampling cost downstream ---


def small_wins_in_superres(tables: Tables, cost: str) -> list[Evidence]:
    """As `small_wins`, in super-resolution, at the costs of the largest with up to twenty steps."""
    points = _pretrained(points_of(tables, "superres"))
    rows = final_points(points.table, points.metric, cost)
    few = _budgets(rows[rows["num_steps"] <= SUPERRES_STEPS], cost)
    return list(_smaller_against_largest(rows, points, cost, few))


def large_wins_in_superres(tables: Tables, cost: str) -> list[Evidence]:
    """In super-resolution, at the costs of the largest with more than twenty steps: whether it beats every smaller size.

    Raises:
        ConfigError: no such number of steps was tried.
    """
    points = _pretrained(points_of(tables, "superres"))
    rows = final_points(points.table, points.metric, cost)
    many = rows[rows["num_steps"] > SUPERRES_STEPS]
    if many.empty:
        raise ConfigError(f"no number of steps above {SUPERRES_STEPS} was tried")
    return list(_smaller_against_largest(rows, points, cost, _budgets(many, cost), wanted="worse"))


# --- experiment 6: distillation ---


def students_beat_their_teachers(tables: Tables, cost: str) -> list[Evidence]:
    """A student against the undistilled of its own size, within what the student costs at four steps."""
    return _students(tables, cost, lambda student, other: teacher_of(student)[0] == other, "better")


def small_undistilled_equals_large_student(tables: Tables, cost: str) -> list[Evidence]:
    """The smallest undistilled size against every larger student, within what that costs at four steps: whether it is worse.

    Raises:
        ConfigError: no undistilled size stands beside the students.
    """
    points = points_of(tables, "distill")
    smallest = next((size for size in sizes_in_order(points.table) if not teacher_of(size)[1]), None)
    if smallest is None:
        raise ConfigError("no undistilled size stands beside the students")
    return _students(tables, cost, lambda student, other: other == smallest != teacher_of(student)[0], "worse")


def students_save_steps(tables: Tables, _: str) -> list[Evidence]:
    """How many of its teacher's steps one of a student's is worth, at four steps: whether half of the paper's or more."""
    points = points_of(tables, "distill")
    cases = []
    for one in acceleration(points.table, points.metric):
        if one.num_steps != STUDENT_STEPS:
            continue
        low, high = one.low / one.num_steps, one.high / one.num_steps
        outcome = "better" if low >= SPEED_UP / 2 else "worse" if high < SPEED_UP / 2 else "undecided"
        cases.append(Evidence(says(outcome), f"{one.student}, {one}"))
    return cases


FINDINGS = (
    Claim(1, "More training gives better images, at every size", more_images),
    Claim(1, "Training compute decides quality, whichever size it is spent on", compute_decides),
    Claim(1, "Of sizes trained on the same images the larger is better", larger_is_better),
    Claim(2, "Super-resolution follows size: a small one does not catch up with more fine-tuning", superres_follows_size),
    Claim(2, "LPIPS of super-resolution follows fine-tuning compute, whatever the size", lpips_follows_compute),
    Claim(2, "DreamBooth is better from larger sizes", dreambooth_follows_size),
    Claim(3, "With little sampling cost a smaller size is better than the largest", small_wins, True),
    Claim(3, "With any sampling cost allowed the largest size is the best", large_wins_in_the_end),
    Claim(3, "The best guidance falls with size", guidance_falls_with_size),
    Claim(3, "The best guidance falls with the number of steps", guidance_falls_with_steps),
    Claim(4, "With few steps DPM-Solver++ is better than DDIM, and DDIM than DDPM", better_solvers_need_fewer_steps),
    Claim(4, "Under every solver a smaller size is better at little cost", small_wins_under_every_solver, True),
    Claim(5, "In super-resolution a smaller size is better at up to 20 steps' cost", small_wins_in_superres, True),
    Claim(5, "In super-resolution the largest is better beyond 20 steps' cost", large_wins_in_superres, True),
    Claim(6, "A student is better than the undistilled of its size at equal cost", students_beat_their_teachers, True),
    Claim(6, "The smallest undistilled is no worse than larger students", small_undistilled_equals_large_student, True),
    Claim(6, "Distillation to 4 steps is worth about 5 times as many, or half of that at least", students_save_steps),
)
"""In the paper's order."""


# --- what they share ---


def _case(one: Row, other: Row, points: TaskResults, name: str, other_name: str, wanted: str = "better") -> Evidence:
    words = f"{name}{format_metric_score(one, points.metric)}, {other_name}{format_metric_score(other, points.metric)}"
    return Evidence(says(compare(one, other, points.metric, points.seed_variance), wanted), words)


def _marks(points: TaskResults, least: int = 2) -> list[tuple[str, list[Row]]]:
    """Every size with its snapshots at one setting, by compute; sizes with fewer than `least` are left out."""
    curves = compute_curves(points.table, points.metric, 1)
    by_size = {size: curves[curves["size"] == size].to_dict("records") for size in sizes_in_order(curves)}
    told = [(size, snapshots) for size, snapshots in by_size.items() if len(snapshots) >= least]
    if not told:
        raise ConfigError("no size was scored at two snapshots of its training: add train.snapshots")
    return told


def _more_compute(points: TaskResults) -> list[Evidence]:
    snapshots = [(size, snapshot) for size, own in _marks(points, least=1) for snapshot in own]
    cases = []
    for size, snapshot in snapshots:
        for other_size, other in snapshots:
            if size != other_size and snapshot["training_gflop"] >= MORE_COMPUTE * other["training_gflop"]:
                words = [
                    f"{name} at {format_number(row['training_gflop'])} GFLOP "
                    for name, row in ((size, snapshot), (other_size, other))
                ]
                cases.append(_case(snapshot, other, points, *words))
    return cases


def _pretrained(points: TaskResults) -> TaskResults:
    """Without what started from scratch or was not tuned, whose names have a second word."""
    return TaskResults(points.table[~points.table["size"].str.contains(" ", regex=False)], points.metric)


def _budgets(rows: pd.DataFrame, cost: str) -> list[float]:
    """What the largest size costs at each of its numbers of steps, at the cheapest."""
    largest = rows[rows["size"] == sizes_in_order(rows)[-1]] if len(rows) else rows
    return sorted({float(value) for value in largest.groupby("num_steps")[cost].min()})


def _smaller_against_largest(
    rows: pd.DataFrame, points: TaskResults, cost: str, budgets: list[float], title: str = "", wanted: str = "better"
) -> Iterator[Evidence]:
    largest = sizes_in_order(rows)[-1]
    ordered = rank_points(rows, points.metric, cost)
    for budget in budgets:
        within = ordered[fits(ordered[cost], budget)]
        others, own = (within[within["size"].eq(largest) == is_own].head(1).to_dict("records") for is_own in (False, True))
        if others and own:
            name = f"{title}{COSTS[cost].amount(budget)}: {others[0]['size']} "
            yield _case(others[0], own[0], points, name, f"{largest} ", wanted)


def _guidance_cases(rows: pd.DataFrame, metric: str, by: list[str], along: str, first: Any, last: Any) -> list[Evidence]:
    """Cells that differ in `along` alone: whether the best guidance at `last` is below that at `first`."""
    if first == last:
        raise ConfigError(f"only one {along} to compare")
    cases = []
    for key, group in rows.groupby(by):
        found = [_best_guidance(group[group[along] == value], metric) for value in (first, last)]
        if any(one is None for one in found):
            continue
        (low, high, value), (other_low, other_high, other) = found  # type: ignore[misc]
        outcome = "better" if other_high < low else "worse" if other_low > high else "undecided"
        where = ", ".join(_named(name, part) for name, part in zip(by, key, strict=True))
        ends = ((first, value, low, high), (last, other, other_low, other_high))
        words = f"{where}: {', '.join(f'{_guidance_words(*told)} for {_named(along, end)}' for end, *told in ends)}"
        cases.append(Evidence(says(outcome), words))
    if not cases:
        raise ConfigError("guidance was not chosen anew on both sides of any comparison")
    return cases


def _named(column: str, value: Any) -> str:
    if column != "num_steps":
        return str(value)
    return "1 step" if value == 1 else f"{value} steps"


def _guidance_words(value: float, low: float, high: float) -> str:
    if math.isinf(low) or math.isinf(high):
        further = [word for word, end in (("less", low), ("more", high)) if math.isinf(end)]
        return f"{value:g} or {' or '.join(further)}"
    return f"{value:g} [{low:g}, {high:g}]"


def _best_guidance(rows: pd.DataFrame, metric: str) -> tuple[float, float, float] | None:
    """Low and high end and the best guidance: the race's interval, or what in a grid is not told apart from the best.

    Open on the side where the best lies at the end of what was tried.
    """
    if rows.empty:
        return None
    best = rank_points(rows, metric).iloc[0]
    if "guidance_low" in rows.columns and pd.notna(best["guidance_low"]):
        low, high = float(best["guidance_low"]), float(best["guidance_high"])
    elif rows["guidance"].nunique() < 2:
        return None
    else:
        near = [row["guidance"] for row in rows.to_dict("records") if compare(best.to_dict(), row, metric) == "undecided"]
        low, high = float(min(near)), float(max(near))
    if best["guidance_at_boundary"]:
        is_above_others, is_below_others = best["guidance"] > rows["guidance"].min(), best["guidance"] < rows["guidance"].max()
        low, high = low if is_above_others else -math.inf, high if is_below_others else math.inf
    return low, high, float(best["guidance"])


def _students(tables: Tables, cost: str, is_pair: Callable[[str, str], bool], wanted: str) -> list[Evidence]:
    points = points_of(tables, "distill")
    rows = rank_points(final_points(points.table, points.metric, cost), points.metric, cost)
    sizes = sizes_in_order(rows)
    cases = []
    for student in (size for size in sizes if teacher_of(size)[1]):
        at_four = rows[(rows["size"] == student) & (rows["num_steps"] == STUDENT_STEPS)][cost]
        if at_four.empty:
            continue
        within = rows[fits(rows[cost], float(at_four.min()))]
        own = within[within["size"] == student].iloc[0].to_dict()
        for other in (size for size in sizes if is_pair(student, size)):
            rival = within[within["size"] == other].head(1).to_dict("records")
            if rival:
                name = f"{COSTS[cost].amount(float(at_four.min()))}: {student} "
                cases.append(_case(own, rival[0], points, name, f"{other} ", wanted))
    return cases
