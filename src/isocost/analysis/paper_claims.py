"""The claims of "Bigger is not Always Better" (arXiv 2404.01367), each as a function from a study's tables to cases.

The claims are stated as in the paper, so a study can contradict them. "Best" means the best over solvers, steps and guidance,
within the restriction of the case. Every function raises ConfigError, with the missing data, if the tables lack the points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pandas as pd

from isocost.analysis.claims import (
    Claim,
    Evidence,
    Tables,
    TaskResults,
    compare_scores,
    format_metric_score,
    results_of,
    vote_of,
)
from isocost.analysis.costs import COSTS
from isocost.analysis.distillation import STUDENT_STEPS, measure_accelerations, split_student_name
from isocost.analysis.formatting import format_number, format_steps
from isocost.analysis.results_table import best_per_group, final_points, is_within_budget, rank_points, sizes_in_order
from isocost.analysis.scaling_laws import points_over_compute
from isocost.errors import ConfigError

FEW_STEPS = 10
"""Up to this number of steps the paper's solvers differ most (figure 8)."""
SUPERRES_STEPS = 20
"""Up to this number of steps small sizes win in super-resolution (section 4.6)."""
SOLVERS = ("ddpm", "ddim", "dpmsolver++2m")
"""The paper's order with few steps, from worst to best."""
COMPUTE_RATIO = 2.0
"""Two trainings are compared by compute if their compute differs by at least this factor."""
PAPER_ACCELERATION = 5.0
"""Acceleration by the paper's distillation to four steps."""
Row = dict[Any, Any]


# --- experiment 1: training compute ---


def more_images(tables: Tables, _: str) -> list[Evidence]:
    """For every size, compare the score of its last training snapshot with the score of its first."""
    results = results_of(tables, "text2image")
    return [
        _case(last, first, results, f"{size}: {last['images_seen']:,} images ", f"{first['images_seen']:,} images ")
        for size, (first, *_, last) in _snapshots_by_size(results)
    ]


def compute_decides(tables: Tables, _: str) -> list[Evidence]:
    """Snapshots of different sizes, one trained with at least twice the other's compute: whether more compute is better."""
    return _more_compute(results_of(tables, "text2image"))


def larger_is_better(tables: Tables, _: str) -> list[Evidence]:
    """Neighbouring sizes, trained on the same images, at one sampling setting: whether the larger is better."""
    results = results_of(tables, "text2image")
    last = [(size, snapshots[-1]) for size, snapshots in _snapshots_by_size(results, min_snapshots=1)]
    return [
        _case(large, small, results, f"{large_name} ", f"{small_name} ")
        for (small_name, small), (large_name, large) in pairwise(last)
        if large["images_seen"] == small["images_seen"]
    ]


# --- experiment 2: downstream ---


def superres_follows_size(tables: Tables, _: str) -> list[Evidence]:
    """The largest size against each smaller size after all its training: whether the largest is better at equal compute.

    The largest size is taken at its last snapshot with no more fine-tuning compute, or at its first snapshot if all have more.
    """
    results = _pretrained(results_of(tables, "superres"))
    *smaller, (largest, largest_snapshots) = _snapshots_by_size(results, min_snapshots=1)
    cases = []
    for size, snapshots in smaller:
        small = snapshots[-1]
        cheaper = [snapshot for snapshot in largest_snapshots if snapshot["training_gflop"] <= small["training_gflop"]]
        large = cheaper[-1] if cheaper else largest_snapshots[0]
        text = f"{largest} after {large['images_seen']:,} images "
        cases.append(_case(large, small, results, text, f"{size} at its end "))
    return cases


def lpips_follows_compute(tables: Tables, _: str) -> list[Evidence]:
    """Snapshots of different sizes: whether more fine-tuning compute gives the better LPIPS."""
    results = _pretrained(results_of(tables, "superres"))
    return _more_compute(TaskResults(results.table, "lpips"))


def dreambooth_follows_size(tables: Tables, _: str) -> list[Evidence]:
    """Neighbouring fine-tuned sizes, each at its best: whether the larger is better."""
    results = _pretrained(results_of(tables, "dreambooth"))
    best = best_per_group(final_points(results.table, results.metric), results.metric, ["size"]).to_dict("records")
    return [_case(large, small, results, f"{large['size']} ", f"{small['size']} ") for small, large in pairwise(best)]


# --- experiment 3: sampling cost ---


def small_wins(tables: Tables, cost: str) -> list[Evidence]:
    """The best smaller size against the largest, at the costs of the lower half of the largest size's numbers of steps."""
    results = results_of(tables, "text2image")
    rows = final_points(results.table, results.metric, cost)
    budgets = _budgets(rows, cost)
    return list(_smaller_against_largest(rows, results, cost, budgets[: math.ceil(len(budgets) / 2)]))


def large_wins_in_the_end(tables: Tables, _: str) -> list[Evidence]:
    """The largest size at its best against every smaller size at its best, at any cost."""
    results = results_of(tables, "text2image")
    best = best_per_group(final_points(results.table, results.metric), results.metric, ["size"])
    *smaller, large = best.to_dict("records")
    return [_case(large, small, results, f"{large['size']} ", f"{small['size']} ") for small in smaller]


def guidance_falls_with_size(tables: Tables, _: str) -> list[Evidence]:
    """The best guidance of the largest size against that of the smallest, by solver and number of steps."""
    results = results_of(tables, "text2image")
    rows = final_points(results.table, results.metric)
    sizes = sizes_in_order(rows)
    return _guidance_cases(rows, results.metric, ["solver", "num_steps"], "size", sizes[0], sizes[-1])


def guidance_falls_with_steps(tables: Tables, _: str) -> list[Evidence]:
    """The best guidance with the most steps against that with the fewest, at least two, by size and solver.

    Raises:
        ConfigError: fewer than two numbers of steps were tried.
    """
    results = results_of(tables, "text2image")
    rows = final_points(results.table, results.metric)
    rows = rows[rows["num_steps"] > 1]
    if rows["num_steps"].nunique() < 2:
        raise ConfigError("fewer than two numbers of steps above 1 were tried")
    steps = sorted(rows["num_steps"].unique())
    return _guidance_cases(rows, results.metric, ["size", "solver"], "num_steps", steps[0], steps[-1])


# --- experiment 4: solvers ---


def better_solvers_need_fewer_steps(tables: Tables, _: str) -> list[Evidence]:
    """Neighbours in DDPM, DDIM, DPM-Solver++: whether the later one is better, by size and number of steps.

    Raises:
        ConfigError: fewer than two of them were tried.
    """
    results = results_of(tables, "text2image")
    rows = final_points(results.table, results.metric)
    rows = rows.assign(_solver=rows["solver"].str.partition("/")[0])
    rows = rows[rows["num_steps"].between(2, FEW_STEPS) & rows["_solver"].isin(SOLVERS)]
    best = best_per_group(rows, results.metric, ["size", "_solver", "num_steps"])
    cases = []
    for (size, num_steps), group in best.groupby(["size", "num_steps"], sort=False):
        by_solver = {row["_solver"]: row for row in group.to_dict("records")}
        present = [solver for solver in SOLVERS if solver in by_solver]
        for worse, better in pairwise(present):
            text = f"{size}, {num_steps} steps: {better} "
            cases.append(_case(by_solver[better], by_solver[worse], results, text, f"{worse} "))
    if not cases:
        raise ConfigError(f"fewer than two of {', '.join(SOLVERS)} were tried with 2 to {FEW_STEPS} steps")
    return cases


def small_wins_under_every_solver(tables: Tables, cost: str) -> list[Evidence]:
    """As `small_wins`, with the points of one solver at a time."""
    results = results_of(tables, "text2image")
    rows = final_points(results.table, results.metric, cost)
    cases = []
    for solver, group in rows.groupby("solver"):
        budgets = _budgets(group, cost)
        lower_half = budgets[: math.ceil(len(budgets) / 2)]
        cases += list(_smaller_against_largest(group, results, cost, lower_half, f"{solver}, "))
    return cases


# --- experiment 5: sampling cost downstream ---


def small_wins_in_superres(tables: Tables, cost: str) -> list[Evidence]:
    """As `small_wins`, in super-resolution, at the costs of the largest size with up to twenty steps."""
    results = _pretrained(results_of(tables, "superres"))
    rows = final_points(results.table, results.metric, cost)
    budgets = _budgets(rows[rows["num_steps"] <= SUPERRES_STEPS], cost)
    return list(_smaller_against_largest(rows, results, cost, budgets))


def large_wins_in_superres(tables: Tables, cost: str) -> list[Evidence]:
    """In super-resolution, at the costs of the largest size with more than twenty steps: whether it beats the smaller sizes.

    Raises:
        ConfigError: no such number of steps was tried.
    """
    results = _pretrained(results_of(tables, "superres"))
    rows = final_points(results.table, results.metric, cost)
    many_steps = rows[rows["num_steps"] > SUPERRES_STEPS]
    if many_steps.empty:
        raise ConfigError(f"no number of steps above {SUPERRES_STEPS} was tried")
    return list(_smaller_against_largest(rows, results, cost, _budgets(many_steps, cost), expected="worse"))


# --- experiment 6: distillation ---


def students_beat_their_teachers(tables: Tables, cost: str) -> list[Evidence]:
    """A student against the undistilled model of its own size, within the cost of the student at four steps."""
    return _student_cases(tables, cost, lambda student, size: split_student_name(student)[0] == size, "better")


def small_undistilled_equals_large_student(tables: Tables, cost: str) -> list[Evidence]:
    """Every larger student against the smallest undistilled model, within the student's cost at four steps.

    A case agrees if the student is worse.

    Raises:
        ConfigError: the table has no undistilled size.
    """
    results = results_of(tables, "distill")
    smallest = next((size for size in sizes_in_order(results.table) if not split_student_name(size)[1]), None)
    if smallest is None:
        raise ConfigError("no undistilled size was scored together with the students")
    return _student_cases(tables, cost, lambda student, size: size == smallest != split_student_name(student)[0], "worse")


def students_save_steps(tables: Tables, _: str) -> list[Evidence]:
    """The teacher's steps that one student step replaces, at four steps: whether it is at least half of the paper's number."""
    results = results_of(tables, "distill")
    cases = []
    for acceleration in measure_accelerations(results.table, results.metric):
        if acceleration.num_steps != STUDENT_STEPS:
            continue
        low, high = acceleration.low / acceleration.num_steps, acceleration.high / acceleration.num_steps
        threshold = PAPER_ACCELERATION / 2
        outcome = "better" if low >= threshold else "worse" if high < threshold else "undecided"
        cases.append(Evidence(vote_of(outcome), f"{acceleration.student}, {acceleration}"))
    return cases


CLAIMS = (
    Claim(1, "More training gives better images, at every size", more_images),
    Claim(1, "Training compute, not size, determines quality", compute_decides),
    Claim(1, "Of two sizes trained on the same images the larger is better", larger_is_better),
    Claim(2, "Super-resolution follows size: a small one does not catch up with more fine-tuning", superres_follows_size),
    Claim(2, "LPIPS of super-resolution follows fine-tuning compute, not size", lpips_follows_compute),
    Claim(2, "DreamBooth is better from larger sizes", dreambooth_follows_size),
    Claim(3, "With little sampling cost a smaller size is better than the largest", small_wins, True),
    Claim(3, "With any sampling cost allowed the largest size is the best", large_wins_in_the_end),
    Claim(3, "The best guidance falls with size", guidance_falls_with_size),
    Claim(3, "The best guidance falls with the number of steps", guidance_falls_with_steps),
    Claim(4, "With few steps DPM-Solver++ is better than DDIM, and DDIM is better than DDPM", better_solvers_need_fewer_steps),
    Claim(4, "With every solver a smaller size is better at little cost", small_wins_under_every_solver, True),
    Claim(5, "In super-resolution a smaller size is better at the cost of up to 20 steps", small_wins_in_superres, True),
    Claim(5, "In super-resolution the largest size is better above the cost of 20 steps", large_wins_in_superres, True),
    Claim(6, "A student is better than the undistilled model of its size at equal cost", students_beat_their_teachers, True),
    Claim(6, "The smallest undistilled model is no worse than larger students", small_undistilled_equals_large_student, True),
    Claim(6, "Distillation to 4 steps replaces about 5 times as many steps, or at least half of that", students_save_steps),
)
"""All claims, in the paper's order."""


# --- shared helpers ---


def _case(
    first: Row, second: Row, results: TaskResults, first_text: str, second_text: str, expected: str = "better"
) -> Evidence:
    """The case whether the first row is better ("worse" if `expected`) than the second; a text precedes each score."""
    first_score, second_score = (format_metric_score(row, results.metric) for row in (first, second))
    outcome = compare_scores(first, second, results.metric, results.seed_variance)
    return Evidence(vote_of(outcome, expected), f"{first_text}{first_score}, {second_text}{second_score}")


def _snapshots_by_size(results: TaskResults, min_snapshots: int = 2) -> list[tuple[str, list[Row]]]:
    """Every size with its snapshots at one sampling setting, by compute; sizes with fewer than `min_snapshots` are left out."""
    points = points_over_compute(results.table, results.metric)
    by_size = {size: points[points["size"] == size].to_dict("records") for size in sizes_in_order(points)}
    complete = [(size, snapshots) for size, snapshots in by_size.items() if len(snapshots) >= min_snapshots]
    if not complete:
        raise ConfigError("no size was scored at two snapshots of its training: add train.snapshots")
    return complete


def _more_compute(results: TaskResults) -> list[Evidence]:
    """Pairs of snapshots of different sizes whose training compute differs by `COMPUTE_RATIO` or more."""
    by_size = _snapshots_by_size(results, min_snapshots=1)
    snapshots = [(size, snapshot) for size, size_snapshots in by_size for snapshot in size_snapshots]
    cases = []
    for size, snapshot in snapshots:
        for cheaper_size, cheaper in snapshots:
            if size != cheaper_size and snapshot["training_gflop"] >= COMPUTE_RATIO * cheaper["training_gflop"]:
                texts = [
                    f"{name} at {format_number(row['training_gflop'])} GFLOP "
                    for name, row in ((size, snapshot), (cheaper_size, cheaper))
                ]
                cases.append(_case(snapshot, cheaper, results, *texts))
    return cases


def _pretrained(results: TaskResults) -> TaskResults:
    """Only fine-tuned sizes that started from a checkpoint; the names of all others have a second word."""
    return TaskResults(results.table[~results.table["size"].str.contains(" ", regex=False)], results.metric)


def _budgets(rows: pd.DataFrame, cost: str) -> list[float]:
    """The lowest cost of the largest size at each of its numbers of steps."""
    largest = rows[rows["size"] == sizes_in_order(rows)[-1]] if len(rows) else rows
    return sorted({float(value) for value in largest.groupby("num_steps")[cost].min()})


def _smaller_against_largest(
    rows: pd.DataFrame, results: TaskResults, cost: str, budgets: list[float], title: str = "", expected: str = "better"
) -> Iterator[Evidence]:
    """The best smaller size against the largest within each budget."""
    largest = sizes_in_order(rows)[-1]
    ordered = rank_points(rows, results.metric, cost)
    for budget in budgets:
        within = ordered[is_within_budget(ordered[cost], budget)]
        is_largest = within["size"].eq(largest)
        smaller, large = (group.head(1).to_dict("records") for group in (within[~is_largest], within[is_largest]))
        if smaller and large:
            text = f"{title}{COSTS[cost].format_amount(budget)}: {smaller[0]['size']} "
            yield _case(smaller[0], large[0], results, text, f"{largest} ", expected)


def _guidance_cases(rows: pd.DataFrame, metric: str, by: list[str], along: str, first: Any, last: Any) -> list[Evidence]:
    """Groups that differ in the column `along` only: whether the best guidance at `last` is below that at `first`."""
    if first == last:
        raise ConfigError(f"only one {along} to compare")
    cases = []
    for key, group in rows.groupby(by):
        intervals = [_best_guidance(group[group[along] == value], metric) for value in (first, last)]
        if any(interval is None for interval in intervals):
            continue
        (low, high, value), (last_low, last_high, last_value) = intervals  # type: ignore[misc]
        outcome = "better" if last_high < low else "worse" if last_low > high else "undecided"
        where = ", ".join(_format_coordinate(name, part) for name, part in zip(by, key, strict=True))
        ends = ((first, value, low, high), (last, last_value, last_low, last_high))
        texts = [f"{_format_guidance(*interval)} for {_format_coordinate(along, end)}" for end, *interval in ends]
        cases.append(Evidence(vote_of(outcome), f"{where}: {', '.join(texts)}"))
    if not cases:
        raise ConfigError(f"no points have several guidance values both at {along} = {first} and at {along} = {last}")
    return cases


def _format_coordinate(column: str, value: Any) -> str:
    return format_steps(value) if column == "num_steps" else str(value)


def _format_guidance(value: float, low: float, high: float) -> str:
    """A best guidance with its interval: "2 [1.5, 3]", or "12 or more" if the interval is open."""
    if math.isinf(low) or math.isinf(high):
        directions = [word for word, end in (("less", low), ("more", high)) if math.isinf(end)]
        return f"{value:g} or {' or '.join(directions)}"
    return f"{value:g} [{low:g}, {high:g}]"


def _best_guidance(rows: pd.DataFrame, metric: str) -> tuple[float, float, float] | None:
    """Lower end, upper end and value of the best guidance; None if guidance was not chosen.

    The interval is that of the guidance search, or the values of a grid whose scores cannot be distinguished from the best. It
    is open on a side if the best value is the last one that was tried there.
    """
    if rows.empty:
        return None
    best = rank_points(rows, metric).iloc[0]
    if "guidance_low" in rows.columns and pd.notna(best["guidance_low"]):
        low, high = float(best["guidance_low"]), float(best["guidance_high"])
    elif rows["guidance"].nunique() < 2:
        return None
    else:
        best_row = best.to_dict()
        near = [row["guidance"] for row in rows.to_dict("records") if compare_scores(best_row, row, metric) == "undecided"]
        low, high = float(min(near)), float(max(near))
    if best["guidance_at_boundary"]:
        is_above_others, is_below_others = best["guidance"] > rows["guidance"].min(), best["guidance"] < rows["guidance"].max()
        low, high = low if is_above_others else -math.inf, high if is_below_others else math.inf
    return low, high, float(best["guidance"])


def _student_cases(tables: Tables, cost: str, is_pair: Callable[[str, str], bool], expected: str) -> list[Evidence]:
    """Students against the sizes that `is_pair` (student, size) selects, within the student's cost at `STUDENT_STEPS` steps."""
    results = results_of(tables, "distill")
    rows = rank_points(final_points(results.table, results.metric, cost), results.metric, cost)
    sizes = sizes_in_order(rows)
    cases = []
    for student in (size for size in sizes if split_student_name(size)[1]):
        costs = rows[(rows["size"] == student) & (rows["num_steps"] == STUDENT_STEPS)][cost]
        if costs.empty:
            continue
        budget = float(costs.min())
        within = rows[is_within_budget(rows[cost], budget)]
        student_best = within[within["size"] == student].iloc[0].to_dict()
        for rival in (size for size in sizes if is_pair(student, size)):
            rival_best = within[within["size"] == rival].head(1).to_dict("records")
            if rival_best:
                text = f"{COSTS[cost].format_amount(budget)}: {student} "
                cases.append(_case(student_best, rival_best[0], results, text, f"{rival} ", expected))
    return cases
