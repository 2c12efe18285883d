"""The answer as Markdown for a pull request or a chat: short enough to paste, whole enough to stand alone.

Names of sizes, solvers and studies come from people's files: `escaped` keeps them text in Markdown, HTML and tables.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from isocost.analysis.costs import COSTS, cost_of
from isocost.analysis.formatting import format_configuration, format_metric, format_number, format_score
from isocost.analysis.pareto import BudgetChoice, best_at_budgets, default_budgets, metric_of, pareto
from isocost.analysis.recommend import answer, sample_command
from isocost.analysis.results_table import final_points, sizes_in_order, with_metric
from isocost.errors import ConfigError

BUDGET_COST = "normalized_cost"
MAX_ROWS = 8
"""Of the frontier."""
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
SPACE = "&#8203;"
"""No width: after it no name is called and no address becomes a link."""


def markdown_summary(
    table: pd.DataFrame,
    metric: str,
    study_name: str,
    budgets: Sequence[float] = (),
    floor: float | None = None,
    floor_label: str = "",
    absent: Sequence[str] = (),
) -> str:
    """The best configuration at each budget, the frontier, what it rests on, what was not done, and how to go on.

    Args:
        table: points, as in `isocost.analysis.frontier`.
        metric: what decides.
        study_name: the heading.
        budgets: budgets of normalized cost; spread over the data where empty.
        floor: value of `metric` of what `floor_label` names: the best that can be hoped for.
        absent: titles of experiments that were not done.

    Raises:
        ConfigError: the points cannot be compared (they differ in protocol, number of images or seed).
    """
    rows = with_metric(table, metric)
    try:
        asked = list(budgets) or default_budgets(table, BUDGET_COST)
        choices = best_at_budgets(table, BUDGET_COST, metric, asked)
    except ConfigError as error:
        choices, told = [], [f"**{escaped(study_name)}**: No answer yet: {escaped(str(error))}."]
    else:
        told = [f"**{escaped(study_name)}**: {escaped(headline(choices))}", "", *_answers(choices, metric)]
        told += ["", *_frontier(table, metric)]
    first = rows.iloc[0]
    by = f"By {escaped(format_metric(metric))} ({metric_of(metric).better} is better) with 95 % intervals"
    known = "" if floor is None else f"; {escaped(floor_label)}: {format_number(floor)}"
    extent = f"{_count(len(rows), 'point')} of {_count(len(sizes_in_order(rows)), 'size')}"
    extent += f", {first['num_images']:,} images a point"
    protocol = f"protocol {escaped(str(first['protocol']))}, seed {first['seed']}"
    told += ["", f"{by}{known}. {extent}; {protocol}.", *_beware(choices)]
    undone = _not_done(table, metric, absent)
    told += ["", f"Not done: {'; '.join(undone)}."] if undone else []
    best = next((choice.best for choice in reversed(choices) if choice.best is not None), None)
    again = "Again: `isocost report OUT/study.yaml --out OUT`"
    if best is not None:
        task = rows["task"].iloc[0] if "task" in rows.columns and isinstance(rows["task"].iloc[0], str) else "text2image"
        again += f"; images of the last answer: {_code(sample_command(best, 'OUT', task))}"
    return "\n".join([*told, "", again]) + "\n"


def headline(choices: Sequence[BudgetChoice]) -> str:
    """What the budgets say together: whether the best size moves, and how many of the choices are decided."""
    told = [(choice, choice.best) for choice in choices if choice.best is not None]
    if not told:
        return "No budget takes in any point."
    (first, smallest), (last, largest) = told[0], told[-1]
    sizes = {best.size for _, best in told}
    if all(choice.runner_up is None for choice, _ in told):
        said = f"No size but {smallest.size} fits the budgets here"
    elif len(sizes) == 1:
        said = f"{smallest.size} is the best size at every budget here"
    elif smallest.size == largest.size:
        said = f"The best size changes with the budget: {', '.join(dict.fromkeys(best.size for _, best in told))}"
    else:
        start, end = format_number(first.budget), cost_of(last.cost).amount(last.budget)
        said = f"The best size moves from {smallest.size} at {start} to {largest.size} at {end}"
    contested = [choice for choice, _ in told if choice.runner_up is not None]
    decided = sum(not choice.undecided for choice in contested)
    return f"{said}; {decided} of {len(contested)} choices between sizes are decided." if contested else f"{said}."


def escaped(text: str) -> str:
    """`text` as one line of plain text for Markdown and HTML, in running text or in a cell of a table."""
    line = re.sub(r"[\\`*_\[\]|~$]", r"\\\g<0>", " ".join(text.split()))
    line = re.sub(r"[&<>]", lambda found: ENTITIES[found.group()], line)
    return re.sub(r"[@#](?=\w)|www(?=\.)|:(?=//)", rf"\g<0>{SPACE}", line)


def _answers(choices: Sequence[BudgetChoice], metric: str) -> list[str]:
    lines = [_row("at most", "best", format_metric(metric), "best of another size", ""), "|--:|---|---|---|---|"]
    for choice in choices:
        best, other = choice.best, choice.runner_up
        cells = [format_number(choice.budget), *(("nothing fits", "") if best is None else (escaped(str(best)), best.score))]
        verdict = "" if other is None else "undecided" if choice.undecided else "decided"
        lines.append(_row(*cells, "none fits" if other is None else f"{escaped(str(other))}: {other.score}", verdict))
    return [f"Budgets in {cost_of(BUDGET_COST).unit}:", "", *lines]


def _frontier(table: pd.DataFrame, metric: str) -> list[str]:
    """The points that nothing cheaper matches, the two ends and some between them where they are many."""
    every = pareto(table, BUDGET_COST, metric)
    places = sorted({round(place) for place in np.linspace(0, len(every) - 1, min(len(every), MAX_ROWS)).tolist()})
    rows = every.iloc[places]
    costs = [name for name in COSTS if rows[name].notna().any()]
    count = f"{len(rows)} of {len(every)} points" if len(rows) < len(every) else _count(len(every), "point")
    titles = [*(COSTS[name].label for name in costs), "configuration", format_metric(metric)]
    lines = [f"Frontier, {count}:", "", _row(*titles), "|" + "--:|" * len(costs) + "---|---|"]
    for row in rows.to_dict("records"):
        words = escaped(format_configuration(row["size"], row["num_steps"], row["guidance"], row["solver"]))
        numbers = ["" if pd.isna(row[name]) else format_number(row[name]) for name in costs]
        lines.append(_row(*numbers, words, format_score(*(float(row[f"{metric}{end}"]) for end in ("", "_low", "_high")))))
    return lines


def _beware(choices: Sequence[BudgetChoice]) -> list[str]:
    notes = dict.fromkeys(note for choice in choices for note in answer(choice).notes)
    return ["", f"Beware: {'; '.join(escaped(note) for note in notes)}."] if notes else []


def _not_done(table: pd.DataFrame, metric: str, absent: Sequence[str]) -> list[str]:
    """What a reader might take for done."""
    rows = with_metric(table, metric)
    finished = rows[rows["is_final"].astype(bool)]
    undone = [escaped(title) for title in absent]
    if waiting := [size for size in sizes_in_order(table) if size not in set(finished["size"])]:
        undone.append(f"last checkpoints of {', '.join(escaped(size) for size in waiting)} are not scored")
    if not finished.empty:
        undone += [f"{cost.label} not measured" for cost in COSTS.values() if finished[cost.name].isna().all()]
        competing = final_points(table, metric)
        for column, words in (("solver", "one solver"), ("guidance", "one guidance"), ("num_steps", "one number of steps")):
            if competing[column].nunique() == 1:
                undone.append(f"{words} tried ({escaped(str(competing[column].iloc[0]))})")
        if competing[[f"{metric}_low", f"{metric}_high"]].isna().any(axis=None):
            undone.append("some scores have no interval")
    if rows["is_final"].all():
        undone.append("no checkpoint before the last was scored")
    return undone


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _code(line: str) -> str:
    """A code span that no character of `line` ends."""
    line = " ".join(line.split())
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if "`" in line else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"
