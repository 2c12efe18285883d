"""From budgets and requirements to a decision in words: what to sample with, how sure that is, and the command that does it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from isocost.analysis.constraints import (
    Constraint,
    ConstraintStatus,
    check_measured,
    constraint_status,
    constraints_of,
    explain_infeasible,
    feasible,
    format_text,
)
from isocost.analysis.costs import cost_of
from isocost.analysis.formatting import format_metric
from isocost.analysis.pareto import BudgetChoice, Configuration, best_at_budgets, intervals_overlap, metric_of
from isocost.analysis.results_table import final_points, rank_points
from isocost.errors import ConfigError


@dataclass(frozen=True)
class Recommendation:
    """What to sample with for a budget. `dataclasses.asdict` of it is plain data for JSON.

    `interval` is the 95 % interval of `value` (None where none was made), `runner_up` the best configuration of another size,
    `decided` whether their intervals are apart (True where no other size fits), `limits` every budget and requirement beside what
    the configuration has, `command` the line that samples so. `cost` and `budget` are those of the budget that leads.
    """

    budget: float
    cost: str
    metric: str
    configuration: Configuration
    value: float
    interval: tuple[float, float] | None
    runner_up: Configuration | None
    decided: bool
    reason: str
    notes: tuple[str, ...]
    limits: tuple[ConstraintStatus, ...]
    command: str


@dataclass(frozen=True)
class Answer:
    """One sentence for one budget, in the parts that a page may set apart; `str` joins them."""

    lead: str
    best: str
    score: str
    verdict: str
    notes: tuple[str, ...]
    decided: bool

    def __str__(self) -> str:
        told = ", ".join(part for part in (self.best, self.score) if part)
        return f"{self.lead}: {told}; {self.verdict}."


def recommend(
    table: pd.DataFrame,
    cost: str,
    budget: float,
    metric: str = "mmd_efficientnet",
    out: str = "OUT",
    *,
    also: Mapping[str, float] | None = None,
    requirements: Mapping[str, float] | None = None,
) -> Recommendation:
    """The best configuration by `metric` among those that keep every budget and meet every requirement.

    Args:
        table: points as in `isocost.analysis.frontier`.
        cost: a name of `isocost.analysis.limits.BUDGETS`, memory apart: a cost, or `images_per_hour`. Its cost breaks ties.
        budget: most that one image may cost, or least number of images an hour.
        metric: a name of `METRICS` that leads.
        out: output folder of the study, for the command line.
        also: further budgets that must hold, by name; `memory_gib` among them needs a column `peak_memory_mib`.
        requirements: metric -> value that must be met, at or better than it by the metric's direction.

    Raises:
        ConfigError: no point keeps all of it (the message names the nearest), or the table answers no such question.
    """
    limits = constraints_of(cost, budget, also or {}, requirements or {})
    lead = limits[0]
    rows = rank_points(final_points(table, metric, lead.column), metric, lead.column)
    check_measured(rows, limits)
    held = feasible(rows, limits)
    if not held.any():
        raise ConfigError(explain_infeasible(rows, limits))
    (choice,) = best_at_budgets(table, lead.column, metric, [lead.bound], points=set(rows.loc[held, "point"]))
    best = choice.best
    assert best is not None, "some point keeps every limit"
    row = rows[rows["point"] == best.point].iloc[0]
    return Recommendation(
        budget=choice.budget,
        cost=lead.column,
        metric=metric,
        configuration=best,
        value=best.value,
        interval=None if best.low is None or best.high is None else (best.low, best.high),
        runner_up=choice.runner_up,
        decided=not choice.undecided,
        reason=_reason(choice, best, format_text(limits)),
        notes=(*_notes(choice, best, _others_bind(rows, limits)), *_limit_notes(rows, row, limits)),
        limits=constraint_status(row, limits),
        command=sample_command(best, out, str(row["task"]) if "task" in row and not pd.isna(row["task"]) else "text2image"),
    )


def answer(choice: BudgetChoice) -> Answer:
    """The sentence for one budget: the best configuration, its score, the best of another size, and whether that decides."""
    lead = f"For {cost_of(choice.cost).amount(choice.budget)}"
    if choice.best is None:
        return Answer(lead, "nothing fits", "", _cheapest(choice), (), decided=False)
    score = f"{format_metric(choice.metric)} {choice.best.score}"
    if choice.runner_up is None:
        verdict = "no other size fits"
    else:
        tail = f", so {_undecided_because(choice.best, choice.runner_up)}" if choice.undecided else ""
        verdict = f"runner-up {choice.runner_up} with {choice.runner_up.score}{tail}"
    return Answer(lead, str(choice.best), score, verdict, _notes(choice, choice.best), decided=not choice.undecided)


def sample_command(configuration: Configuration, out: str = "OUT", task: str = "text2image") -> str:
    """The line that draws images with `configuration`; prompt and files are left as words in capitals."""
    name, timestep_spacing, *extras = configuration.solver.split("/")
    verb, given = ("upscale", ["IMAGE", "LARGER.png"]) if task.startswith("superres") else ("sample", ["--prompt", "TEXT"])
    line = ["isocost", verb, f"{out.rstrip('/')}/artefacts/checkpoint/{configuration.checkpoint}"]
    line += ["--steps", str(configuration.num_steps), "--guidance", f"{configuration.guidance:g}"]
    line += ["--solver", name, "--timestep-spacing", timestep_spacing]
    for extra in extras:
        key, _, value = extra.partition("=")
        line += [f"--{key}", value]
    return shlex.join([*line, *given])


def _reason(choice: BudgetChoice, best: Configuration, within: str) -> str:
    extreme = "lowest" if metric_of(choice.metric).better == "lower" else "highest"
    among = f"of the {choice.num_points} points" if choice.num_points > 1 else "of the only point"
    told = f"{best} has the {extreme} {format_metric(choice.metric)}, {best.score}, {among} {within}"
    other = choice.runner_up
    if other is None:
        return f"{told}; no other size fits."
    verdict = _undecided_because(best, other) if choice.undecided else "the intervals are apart"
    return f"{told}; the best of another size, {other}, reaches {other.score}: {verdict}."


def _undecided_because(best: Configuration, other: Configuration) -> str:
    overlap = intervals_overlap(best, other) and None not in (best.low, best.high, other.low, other.high)
    return "undecided, the intervals overlap" if overlap else "undecided, an interval is missing"


def _notes(choice: BudgetChoice, best: Configuration, others_bind: bool = False) -> tuple[str, ...]:
    notes = []
    if choice.beyond_data and not others_bind:
        dearest = cost_of(choice.cost).amount(choice.dearest.cost)
        remedy = "more steps or a larger size may do better"
        notes.append(f"the budget lies beyond the data, whose dearest point costs {dearest}: {remedy}")
    if best.guidance_at_boundary:
        remedy = "widen the grid to be sure of the optimum"
        notes.append(f"guidance {best.guidance:g} is at the edge of the values tried there: {remedy}")
    return tuple(notes)


def _others_bind(rows: pd.DataFrame, limits: Sequence[Constraint]) -> bool:
    """Whether a budget beside the first keeps some point out, so that a larger first one buys nothing by itself."""
    return not bool(feasible(rows, [limit for limit in limits[1:] if not limit.is_requirement]).all())


def _limit_notes(rows: pd.DataFrame, row: pd.Series, limits: Sequence[Constraint]) -> list[str]:
    notes = []
    for limit in limits:
        unmeasured = int(rows[limit.column].isna().sum())
        if unmeasured:
            some = "1 point is" if unmeasured == 1 else f"{unmeasured} points are"
            notes.append(f"{some} left out, without a measured {limit.column}")
        if limit.is_requirement:
            end = float(row[f"{limit.column}_{'high' if limit.is_most else 'low'}"])
            if math.isnan(end):
                notes.append(f"{format_metric(limit.column)} has no interval, so the requirement may be met by luck")
            elif (end > limit.bound) if limit.is_most else (end < limit.bound):
                side = "above" if limit.is_most else "below"
                notes.append(f"the interval of its {limit.shown(row)} reaches {side} the requirement of {limit.bound:g}")
    return notes


def _cheapest(choice: BudgetChoice) -> str:
    return f"the cheapest point costs {cost_of(choice.cost).amount(choice.cheapest.cost)} ({choice.cheapest})"
