"""The report as Markdown, short enough for a pull request or a chat.

Names of sizes, solvers and studies come from users' files: `escape_markdown` keeps them plain text in Markdown and HTML.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from isocost.analysis.costs import COSTS, cost_of, expected_costs, is_measured
from isocost.analysis.formatting import format_metric, format_number, format_row, format_score
from isocost.analysis.guides import has_guides
from isocost.analysis.iso_cost import PairedDifferences, RecordedDifferences
from isocost.analysis.paired_decisions import Resamples
from isocost.analysis.pareto import BudgetChoice, best_at_budgets, default_budgets, metric_of, pareto
from isocost.analysis.recommend import describe_choice, format_verdict, sample_command
from isocost.analysis.results_table import final_points, replaced_schedulers, sizes_in_order, with_metric
from isocost.errors import ConfigError
from isocost.report.guides_section import guide_section
from isocost.report.plot_data_guides import FRONTIER_QUESTION
from isocost.report.scope import TRAINED, Scope

MAX_ROWS = 8
"""Rows of the frontier table."""
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
ZERO_WIDTH_SPACE = "&#8203;"
"""Breaks mentions (@name), issue numbers (#12) and addresses, so that no person is notified and nothing becomes a link."""


def markdown_summary(
    table: pd.DataFrame,
    metric: str,
    study_name: str,
    budgets: Sequence[float] = (),
    floor: float | None = None,
    floor_label: str = "",
    missing_experiments: Sequence[str] = (),
    scope: Scope = TRAINED,
    pairs: PairedDifferences | None = None,
    resamples: Resamples | None = None,
) -> str:
    """Return the best configuration at each budget, the frontier, the data behind it, what is not included, and next commands.

    A table with guide networks has a part about their effect, too.

    Args:
        table: points, as in `isocost.analysis.results_table`.
        metric: the metric that ranks the points.
        study_name: the heading.
        budgets: budgets of `scope.budget_cost`; spread over the data if empty.
        floor: the best possible value of `metric`.
        floor_label: name of `floor`.
        missing_experiments: titles of experiments that the study does not have.
        scope: whether the study trained the networks, and the cost of the budgets.
        pairs: paired differences for the section on guides; without them the scores are treated as independent.
        resamples: resamples of the points by `metric`, for paired decisions between sizes.

    Raises:
        ConfigError: the points cannot be compared (they differ in protocol, number of images or seed).
    """
    rows, cost = with_metric(table, metric), scope.budget_cost
    try:
        named_budgets = list(budgets) or default_budgets(table, cost)
        choices = best_at_budgets(table, cost, metric, named_budgets, resamples=resamples)
    except ConfigError as error:
        choices, lines = [], [f"**{escape_markdown(study_name)}**: No answer yet: {escape_markdown(str(error))}."]
    else:
        title = f"**{escape_markdown(study_name)}**: {escape_markdown(headline(choices, scope.noun))}"
        lines = [title, "", *_format_choices(choices, metric, scope)]
        lines += ["", *_format_frontier(table, metric, scope)]
    if has_guides(table):
        lines += ["", *_format_guides(table, metric, pairs or RecordedDifferences())]
    first = rows.iloc[0]
    ranking = f"By {escape_markdown(format_metric(metric))} ({metric_of(metric).better} is better) with 95 % intervals"
    floor_text = "" if floor is None else f"; {escape_markdown(floor_label)}: {format_number(floor)}"
    extent = f"{_format_count(len(rows), 'point')} of {_format_count(len(sizes_in_order(rows)), scope.noun)}"
    extent += f", {first['num_images']:,} images per point"
    protocol = f"protocol {escape_markdown(str(first['protocol']))}, seed {first['seed']}"
    lines += ["", f"{ranking}{floor_text}. {extent}; {protocol}.", *_format_notes(choices, scope)]
    if replaced := replaced_schedulers(table):
        lines += ["", f"Nearest solver in place of the checkpoint's own scheduler: {escape_markdown('; '.join(replaced))}."]
    not_included = _not_included(table, metric, missing_experiments, scope)
    lines += ["", f"Not included: {'; '.join(not_included)}."] if not_included else []
    best = next((choice.best for choice in reversed(choices) if choice.best is not None), None)
    commands = "Write this report again: `isocost report OUT/study.yaml --out OUT`"
    if best is not None:
        task = rows["task"].iloc[0] if "task" in rows.columns and isinstance(rows["task"].iloc[0], str) else "text2image"
        commands += f"; sample with the best configuration of the largest budget: {_code(sample_command(best, 'OUT', task))}"
    return "\n".join([*lines, "", commands]) + "\n"


def headline(choices: Sequence[BudgetChoice], noun: str = "size") -> str:
    """Return one sentence about all budgets: whether the best size changes, and how many choices are decided.

    A choice is decided by the paired difference of the two sizes. Without resamples it is decided if the best and the
    second-best size both have intervals, and these do not overlap.

    Args:
        choices: one per budget.
        noun: the word for one network, "size" in a family and "checkpoint" among published ones.
    """
    choices_with_best = [(choice, choice.best) for choice in choices if choice.best is not None]
    if not choices_with_best:
        return "No point fits any budget."
    (first, smallest), (last, largest) = choices_with_best[0], choices_with_best[-1]
    sizes = {best.size for _, best in choices_with_best}
    if all(choice.runner_up is None for choice, _ in choices_with_best):
        sentence = f"Only {smallest.size} fits the budgets"
    elif len(sizes) == 1:
        sentence = f"{smallest.size} is the best {noun} at every budget"
    elif smallest.size == largest.size:
        order = ", ".join(dict.fromkeys(best.size for _, best in choices_with_best))
        sentence = f"The best {noun} changes with the budget: {order}"
    else:
        start, end = format_number(first.budget), cost_of(last.cost).format_amount(last.budget)
        sentence = f"The best {noun} moves from {smallest.size} at {start} to {largest.size} at {end}"
    contested = [choice for choice, _ in choices_with_best if choice.runner_up is not None]
    num_decided = sum(not choice.undecided for choice in contested)
    if not contested:
        return f"{sentence}."
    return f"{sentence}; {num_decided} of {len(contested)} choices between {noun}s are decided."


def escape_markdown(text: str) -> str:
    """Return `text` as one line that Markdown and HTML show as plain text, in paragraphs and in table cells."""
    line = re.sub(r"[\\`*_\[\]|~$]", r"\\\g<0>", " ".join(text.split()))
    line = re.sub(r"[&<>]", lambda match: ENTITIES[match.group()], line)
    return re.sub(r"[@#](?=\w)|www(?=\.)|:(?=//)", rf"\g<0>{ZERO_WIDTH_SPACE}", line)


def _format_choices(choices: Sequence[BudgetChoice], metric: str, scope: Scope) -> list[str]:
    lines = [_table_row("at most", "best", format_metric(metric), f"best of another {scope.noun}", ""), "|--:|---|---|---|---|"]
    for choice in choices:
        best, runner_up = choice.best, choice.runner_up
        best_cells = ("nothing fits", "") if best is None else (escape_markdown(str(best)), best.score)
        runner_up_cell = "none fits" if runner_up is None else f"{escape_markdown(str(runner_up))}: {runner_up.score}"
        verdict = "" if runner_up is None else "undecided" if choice.undecided else "decided"
        if choice.decision is not None:
            verdict = format_verdict(choice)
        lines.append(_table_row(format_number(choice.budget), *best_cells, runner_up_cell, verdict))
    return [f"Budgets in {cost_of(scope.budget_cost).unit}:", "", *lines]


def _format_frontier(table: pd.DataFrame, metric: str, scope: Scope) -> list[str]:
    """Return a table of the frontier: all of its points, or `MAX_ROWS` of them with both ends."""
    frontier = pareto(table, scope.budget_cost, metric)
    indices = sorted({round(index) for index in np.linspace(0, len(frontier) - 1, min(len(frontier), MAX_ROWS)).tolist()})
    rows = frontier.iloc[indices]
    costs = [name for name in scope.costs if is_measured(rows, name)]
    count = f"{len(rows)} of {len(frontier)} points" if len(rows) < len(frontier) else _format_count(len(frontier), "point")
    titles = [*(COSTS[name].label for name in costs), "configuration", format_metric(metric)]
    lines = [f"Frontier, {count}:", "", _table_row(*titles), "|" + "--:|" * len(costs) + "---|---|"]
    for row in rows.to_dict("records"):
        label = escape_markdown(format_row(row))
        numbers = ["" if pd.isna(row[name]) else format_number(row[name]) for name in costs]
        score = format_score(*(float(row[f"{metric}{end}"]) for end in ("", "_low", "_high")))
        lines.append(_table_row(*numbers, label, score))
    return lines


def _format_guides(table: pd.DataFrame, metric: str, pairs: PairedDifferences) -> list[str]:
    """Return the verdict on guides, the frontiers of all ways of guidance, and the best guide of every network."""
    title = f"**{FRONTIER_QUESTION}**"
    try:
        section = guide_section(table, metric, pairs)
    except ConfigError as error:
        return [f"{title} No answer yet: {escape_markdown(str(error))}."]
    first, *others = section.tables
    lines = [f"{title} {escape_markdown(first.summary)}", ""]
    titles = [f"{first.cost}, at most", *first.ways, "with a guide minus without", "verdict", "by other metrics"]
    lines += [_table_row(*titles), "|--:|" + "---|" * (len(titles) - 1)]
    for row in first.rows:
        cells = [": ".join(part for part in best if part) for best in row.best]
        cells = [row.budget, *cells, row.difference, row.verdict, "; ".join(row.other_metrics)]
        lines.append(_table_row(*(escape_markdown(cell) for cell in cells)))
    notes = [*first.by_other_metrics, *(table.summary for table in others)]
    notes.append(f"Best guide: {'; '.join(section.summary_by_network)}.")
    return [*lines, *(line for note in notes for line in ("", escape_markdown(note)))]


def _format_notes(choices: Sequence[BudgetChoice], scope: Scope) -> list[str]:
    notes = dict.fromkeys(note for choice in choices for note in describe_choice(choice, scope.noun).notes)
    return ["", f"Note: {'; '.join(escape_markdown(note) for note in notes)}."] if notes else []


def _not_included(table: pd.DataFrame, metric: str, missing_experiments: Sequence[str], scope: Scope) -> list[str]:
    """Return everything that a reader might expect in the results, but is not there."""
    rows = with_metric(table, metric)
    finished = rows[rows["is_final"].astype(bool)]
    missing = [escape_markdown(title) for title in missing_experiments]
    if waiting := [size for size in sizes_in_order(table) if size not in set(finished["size"])]:
        subject = "final checkpoints of " if scope.trained else ""
        missing.append(f"{subject}{', '.join(escape_markdown(size) for size in waiting)} are not scored yet")
    if not finished.empty:
        missing += [f"{COSTS[name].label} not measured" for name in expected_costs(finished) if not is_measured(finished, name)]
        competing = final_points(table, metric)
        for column, label in (("solver", "solver"), ("guidance", "guidance value"), ("num_steps", "number of steps")):
            if competing[column].nunique() == 1:
                missing.append(f"only one {label} was tried ({escape_markdown(str(competing[column].iloc[0]))})")
        if competing[[f"{metric}_low", f"{metric}_high"]].isna().any(axis=None):
            missing.append("some scores have no interval")
    if scope.trained and rows["is_final"].all():
        missing.append("no checkpoint before the last was scored")
    return missing


def _format_count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _table_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _code(line: str) -> str:
    """Return `line` as a code span, with enough backticks around it that none in `line` ends the span."""
    line = " ".join(line.split())
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if "`" in line else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"
