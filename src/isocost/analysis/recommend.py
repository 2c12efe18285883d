"""Recommend a sampling configuration for budgets and requirements, with its uncertainty and the command to sample with it."""

from __future__ import annotations

import json
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
    explain_infeasible,
    feasible,
    format_constraints,
    make_constraints,
)
from isocost.analysis.costs import COSTS, cost_of
from isocost.analysis.formatting import format_metric, format_score
from isocost.analysis.paired_decisions import Resamples
from isocost.analysis.pareto import BudgetChoice, Configuration, best_at_budgets
from isocost.analysis.results_table import final_points, rank_points
from isocost.analysis.timings import TIME_COLUMN, format_sweep_timings
from isocost.errors import ConfigError
from isocost.evaluation.confidence_intervals import Interval
from isocost.evaluation.metric_registry import metric_of

SOLVER_OPTIONS = {"eta": "--eta", "offset": "--steps-offset"}
"""Options of `isocost sample` for the parts of a solver's label."""

MAX_NAMED_IMAGES = 1_000_000


@dataclass(frozen=True)
class Recommendation:
    """The recommended sampling configuration for a set of constraints. Its `dataclasses.asdict` is plain data for JSON.

    Attributes:
        budget: bound of the first budget.
        cost: cost of the first budget, which breaks ties.
        value: the score; `interval` is its 95 % interval, None without one.
        runner_up: the best configuration of another size; None if none meets the constraints.
        decided: whether the paired difference of the two sizes, or without resamples their separate intervals, decide; True if
            there is no runner-up.
        difference: the paired difference between the two sizes, value and 95 % interval; None without resamples.
        reason: the recommendation as a sentence.
        limits: every budget and requirement, with the value of the configuration.
        command: a command line that samples with the configuration.
    """

    budget: float
    cost: str
    metric: str
    configuration: Configuration
    value: float
    interval: tuple[float, float] | None
    runner_up: Configuration | None
    decided: bool
    difference: Interval | None
    reason: str
    notes: tuple[str, ...]
    limits: tuple[ConstraintStatus, ...]
    command: str


@dataclass(frozen=True)
class RecommendationText:
    """The recommendation for one budget as a sentence, split into parts for separate formatting; `str` joins them."""

    lead: str
    best: str
    score: str
    verdict: str
    notes: tuple[str, ...]
    decided: bool

    def __str__(self) -> str:
        best = ", ".join(part for part in (self.best, self.score) if part)
        return f"{self.lead}: {best}; {self.verdict}."


def recommend(
    table: pd.DataFrame,
    cost: str,
    budget: float,
    metric: str = "mmd_efficientnet",
    out: str = "OUT",
    *,
    also: Mapping[str, float] | None = None,
    requirements: Mapping[str, float] | None = None,
    resamples: Resamples | None = None,
) -> Recommendation:
    """Choose the best configuration by `metric` among those that meet every budget and every requirement.

    Args:
        table: points, with the columns in `isocost.analysis.results_table`.
        cost: the first budget: a name of `isocost.analysis.constraints.BUDGETS` except `memory_gib`. Its cost breaks ties.
        budget: maximum cost of one image, or minimum number of images per hour.
        metric: the metric to optimise.
        out: output folder of the study, for the command line.
        also: further budgets, name -> value; `memory_gib` needs the column `peak_memory_mib`.
        requirements: metric -> value that the score must equal or better.
        resamples: resamples of the points by `metric`, for a paired decision.

    Raises:
        ConfigError: no point meets all constraints (the message names the nearest one), or a constraint is invalid.
    """
    constraints = make_constraints(cost, budget, also or {}, requirements or {})
    lead = constraints[0]
    rows = rank_points(final_points(table, metric, lead.column), metric, lead.column)
    check_measured(rows, constraints)
    is_feasible = feasible(rows, constraints)
    if not is_feasible.any():
        raise ConfigError(explain_infeasible(rows, constraints))
    allowed = set(rows.loc[is_feasible, "point"])
    (choice,) = best_at_budgets(table, lead.column, metric, [lead.bound], allowed, resamples)
    best = choice.best
    assert best is not None, "at least one point is feasible"
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
        difference=None if choice.decision is None else choice.decision.difference,
        reason=_format_reason(choice, best, format_constraints(constraints)),
        notes=(
            *_notes(choice, best, _other_budgets_bind(rows, constraints)),
            *_constraint_notes(final_points(table, metric), row, constraints),
        ),
        limits=constraint_status(row, constraints),
        command=sample_command(best, out, str(row["task"]) if "task" in row and not pd.isna(row["task"]) else "text2image"),
    )


def describe_choice(choice: BudgetChoice, noun: str = "size") -> RecommendationText:
    """The text for one budget: the best configuration, its score, the runner-up, and whether the choice is decided.

    Args:
        choice: the choice.
        noun: the word for one network, "size" in a family and "checkpoint" among published ones.
    """
    lead = f"For {cost_of(choice.cost).format_amount(choice.budget)}"
    if choice.best is None:
        return RecommendationText(lead, "nothing fits", "", _format_cheapest(choice), (), decided=False)
    score = f"{format_metric(choice.metric)} {choice.best.score}"
    if choice.runner_up is None:
        verdict = f"no other {noun} fits"
    else:
        tail = f"; {format_verdict(choice)}" if choice.undecided or choice.decision is not None else ""
        verdict = f"runner-up {choice.runner_up} with {choice.runner_up.score}{tail}"
    notes = _notes(choice, choice.best, noun=noun)
    return RecommendationText(lead, str(choice.best), score, verdict, notes, decided=not choice.undecided)


def sample_command(configuration: Configuration, out: str = "OUT", task: str = "text2image") -> str:
    """A command line that samples images with `configuration`, with every setting that changes the images.

    The prompt is left as TEXT, and the files of super-resolution as IMAGE and LARGER.png.
    """
    parts, options = configuration.solver.split("/"), list[str]()
    while parts[-1].partition("=")[0] in SOLVER_OPTIONS:
        options.insert(0, parts.pop())
    name, timestep_spacing = "/".join(parts[:-1]), parts[-1]
    verb, inputs = ("upscale", ["IMAGE", "LARGER.png"]) if task.startswith("superres") else ("sample", ["--prompt", "TEXT"])
    command = ["isocost", verb, f"{out.rstrip('/')}/artefacts/checkpoint/{configuration.checkpoint}"]
    command += ["--steps", str(configuration.num_steps)]
    command += ["--guidance", _exact(configuration.guidance)] if configuration.guidance_schedule is None else []
    command += _guidance_options(configuration, out)
    is_list = timestep_spacing.replace("-", "").isdecimal()
    spacing = ["--timesteps", timestep_spacing.replace("-", ",")] if is_list else ["--timestep-spacing", timestep_spacing]
    command += ["--solver", name, *spacing]
    for option in options:
        key, _, value = option.partition("=")
        command += [SOLVER_OPTIONS[key], value]
    command += ["--dtype", configuration.dtype] if configuration.dtype != "fp32" else []
    command += ["--compile"] if configuration.compiled else []
    command += ["--vae-dtype", configuration.vae_dtype] if configuration.vae_dtype != "fp32" else []
    command += ["--vae-tile-size", str(configuration.vae_tile_size)] if configuration.vae_tile_size is not None else []
    command += ["--vae-slicing"] if configuration.vae_slicing else []
    command += ["--seed", str(configuration.seed)] if configuration.seed else []
    return shlex.join([*command, *inputs])


def _guidance_options(configuration: Configuration, out: str) -> list[str]:
    """Options for a guide, an interval and a schedule."""
    options = []
    if configuration.guide_checkpoint is not None:
        options += ["--guide", f"{out.rstrip('/')}/artefacts/checkpoint/{configuration.guide_checkpoint}"]
        options += ["--guide-null-prompt"] if configuration.guide_null_prompt else []
    if configuration.guidance_interval is not None:
        ends = json.loads(configuration.guidance_interval)
        options += ["--guidance-interval", ":".join("" if end is None else _exact(end) for end in ends)]
    if configuration.guidance_schedule is not None:
        points = json.loads(configuration.guidance_schedule)
        options += ["--guidance-schedule", ",".join(f"{_exact(level)}:{_exact(weight)}" for level, weight in points)]
    return options


def _exact(number: float) -> str:
    """The shortest text that is read as the same number: "2", not "2.0"."""
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)


def _format_reason(choice: BudgetChoice, best: Configuration, constraints: str) -> str:
    extreme = "lowest" if metric_of(choice.metric).better == "lower" else "highest"
    points = f"the {choice.num_points} points" if choice.num_points > 1 else "the only point"
    text = f"{best} has the {extreme} {format_metric(choice.metric)}, {best.score}, of {points} {constraints}"
    runner_up = choice.runner_up
    if runner_up is None:
        return f"{text}; no other size fits."
    return f"{text}; the best configuration of another size, {runner_up}, has {runner_up.score}: {format_verdict(choice)}."


def format_verdict(choice: BudgetChoice) -> str:
    """Whether the best size is decided, and why: "decided, paired difference -0.16 [-0.22, -0.1]"."""
    best, runner_up, decision = choice.best, choice.runner_up, choice.decision
    if best is None or runner_up is None:
        return ""
    if decision is not None:
        difference = decision.difference
        text = f"paired difference {format_score(difference.value, difference.low, difference.high)}"
        if decision.is_decided:
            return f"decided, {text}"
        if decision.num_images is not None:
            return f"undecided, {text}; {_format_images(decision.num_images)}"
        is_better = (difference.value < 0) == (metric_of(choice.metric).better == "lower")
        excludes_zero = difference.low > 0 or difference.high < 0
        return f"undecided{' among all budgets together' if is_better and excludes_zero else ''}, {text}"
    if not choice.undecided:
        return "decided, the intervals do not overlap"
    has_intervals = None not in (best.low, best.high, runner_up.low, runner_up.high)
    return "undecided, the intervals overlap" if has_intervals else "undecided, an interval is missing"


def _format_images(num_images: int) -> str:
    if num_images > MAX_NAMED_IMAGES:
        return f"more than {MAX_NAMED_IMAGES:,} images per point would be needed"
    rounded = math.ceil(num_images / (unit := 10 ** max(len(str(num_images)) - 2, 0))) * unit
    return f"about {rounded:,} images per point would decide it"


def _notes(choice: BudgetChoice, best: Configuration, other_budgets_bind: bool = False, noun: str = "size") -> tuple[str, ...]:
    notes = []
    if choice.beyond_data and not other_budgets_bind:
        highest = cost_of(choice.cost).format_amount(choice.most_expensive.cost)
        remedy = f"more steps or a larger {noun} may be better"
        notes.append(f"the budget is beyond the data, whose most expensive point costs {highest}: {remedy}")
    if best.guidance_at_boundary:
        remedy = "widen the grid to be sure of the optimum"
        notes.append(f"guidance {best.guidance:g} is at the boundary of the values tried there: {remedy}")
    if best.replaced_scheduler:
        notes.append(
            f"{best.solver} is in place of the checkpoint's own {best.replaced_scheduler}, which isocost does not reproduce"
        )
    return tuple(notes)


def _other_budgets_bind(rows: pd.DataFrame, constraints: Sequence[Constraint]) -> bool:
    """Whether a budget other than the first excludes a point; a larger first budget then need not allow more."""
    return not bool(feasible(rows, [constraint for constraint in constraints[1:] if not constraint.is_requirement]).all())


def _constraint_notes(rows: pd.DataFrame, row: pd.Series, constraints: Sequence[Constraint]) -> list[str]:
    notes = []
    timed_by_sweep = format_sweep_timings(rows)
    for constraint in constraints:
        column, bound = constraint.column, constraint.bound
        num_unmeasured = int(rows[column].isna().sum())
        if num_unmeasured:
            excluded = "1 point is" if num_unmeasured == 1 else f"{num_unmeasured} points are"
            state = "is not known" if column in COSTS and COSTS[column].counted_by else "was not measured"
            notes.append(f"{excluded} left out because {column} {state}")
        if column == TIME_COLUMN and timed_by_sweep:
            notes.append(timed_by_sweep)
        if constraint.is_requirement:
            end = float(row[f"{column}_{'high' if constraint.is_upper_bound else 'low'}"])
            if math.isnan(end):
                notes.append(f"{format_metric(column)} has no interval, so the requirement may be met by chance")
            elif (end > bound) if constraint.is_upper_bound else (end < bound):
                side = "above" if constraint.is_upper_bound else "below"
                notes.append(f"the interval of its {constraint.format_value(row)} reaches {side} the requirement of {bound:g}")
    return notes


def _format_cheapest(choice: BudgetChoice) -> str:
    return f"the cheapest point costs {cost_of(choice.cost).format_amount(choice.cheapest.cost)} ({choice.cheapest})"
