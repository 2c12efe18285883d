"""From a budget to a decision in words: what to sample with, how sure that is, and the command that does it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

import pandas as pd

from isocost.analysis.frontier import (
    BudgetChoice,
    Configuration,
    best_at_budgets,
    cost_of,
    intervals_overlap,
    metric_of,
    metric_words,
)
from isocost.errors import RequestError


@dataclass(frozen=True)
class Recommendation:
    """What to sample with for a budget. `dataclasses.asdict` of it is plain data for JSON.

    `interval` is the 95 % interval of `value` (None where none was made), `runner_up` the best configuration of another size,
    `decided` whether their intervals are apart (True where no other size fits), `command` the line that samples so.
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
    table: pd.DataFrame, cost: str, budget: float, metric: str = "kernel_efficientnet", out: str = "OUT"
) -> Recommendation:
    """The best configuration with cost <= budget.

    Args:
        table: points as in `isocost.analysis.frontier`.
        cost: a name of `COSTS`; its unit is the budget's.
        budget: most that one picture may cost.
        metric: a name of `METRICS`.
        out: output folder of the study, for the command line.

    Raises:
        RequestError: the budget lies below every point (the message names the cheapest), or the table answers no such question.
    """
    (choice,) = best_at_budgets(table, cost, metric, [budget])
    best = choice.best
    if best is None:
        raise RequestError(_nothing_fits(choice))
    return Recommendation(
        budget=choice.budget,
        cost=cost,
        metric=metric,
        configuration=best,
        value=best.value,
        interval=None if best.low is None or best.high is None else (best.low, best.high),
        runner_up=choice.runner_up,
        decided=not choice.undecided,
        reason=_reason(choice, best),
        notes=_notes(choice, best),
        command=sample_command(best, out, str(table["task"].iloc[0]) if "task" in table else "text2image"),
    )


def answer(choice: BudgetChoice) -> Answer:
    """The sentence for one budget: the best configuration, its score, the best of another size, and whether that decides."""
    lead = f"For {cost_of(choice.cost).amount(choice.budget)}"
    if choice.best is None:
        return Answer(lead, "nothing fits", "", _cheapest(choice), (), decided=False)
    score = f"{metric_words(choice.metric)} {choice.best.score}"
    if choice.runner_up is None:
        verdict = "no other size fits"
    else:
        tail = f", so {_undecided_because(choice.best, choice.runner_up)}" if choice.undecided else ""
        verdict = f"runner-up {choice.runner_up} with {choice.runner_up.score}{tail}"
    return Answer(lead, str(choice.best), score, verdict, _notes(choice, choice.best), decided=not choice.undecided)


def sample_command(configuration: Configuration, out: str = "OUT", task: str = "text2image") -> str:
    """The line that draws pictures with `configuration`; prompt and files are left as words in capitals."""
    name, spacing, *extras = configuration.sampler.split("/")
    verb, given = ("upscale", ["PICTURE", "LARGER.png"]) if task == "superres" else ("sample", ["--prompt", "TEXT"])
    line = ["isocost", verb, f"{out.rstrip('/')}/artefacts/checkpoint/{configuration.checkpoint}"]
    line += ["--steps", str(configuration.num_steps), "--guidance", f"{configuration.guidance:g}"]
    line += ["--sampler", name, "--spacing", spacing]
    for extra in extras:
        key, _, value = extra.partition("=")
        line += [f"--{key}", value]
    return shlex.join([*line, *given])


def _reason(choice: BudgetChoice, best: Configuration) -> str:
    extreme = "lowest" if metric_of(choice.metric).better == "lower" else "highest"
    among = f"of the {choice.num_points} points" if choice.num_points > 1 else "of the only point"
    budget = cost_of(choice.cost).amount(choice.budget)
    told = f"{best} has the {extreme} {metric_words(choice.metric)}, {best.score}, {among} within {budget}"
    other = choice.runner_up
    if other is None:
        return f"{told}; no other size fits."
    verdict = _undecided_because(best, other) if choice.undecided else "the intervals are apart"
    return f"{told}; the best of another size, {other}, reaches {other.score}: {verdict}."


def _undecided_because(best: Configuration, other: Configuration) -> str:
    overlap = intervals_overlap(best, other) and None not in (best.low, best.high, other.low, other.high)
    return "undecided, the intervals overlap" if overlap else "undecided, an interval is missing"


def _notes(choice: BudgetChoice, best: Configuration) -> tuple[str, ...]:
    notes = []
    if choice.beyond_data:
        dearest = cost_of(choice.cost).amount(choice.dearest.cost)
        remedy = "more steps or a larger size may do better"
        notes.append(f"the budget lies beyond the data, whose dearest point costs {dearest}: {remedy}")
    if best.guidance_at_edge:
        remedy = "widen the grid to be sure of the optimum"
        notes.append(f"guidance {best.guidance:g} is at the edge of the values tried there: {remedy}")
    return tuple(notes)


def _nothing_fits(choice: BudgetChoice) -> str:
    budget = cost_of(choice.cost).amount(choice.budget)
    return f"a budget of {budget} is below every point; {_cheapest(choice)}"


def _cheapest(choice: BudgetChoice) -> str:
    return f"the cheapest point costs {cost_of(choice.cost).amount(choice.cheapest.cost)} ({choice.cheapest})"
