"""Several studies on one axis, as a figure and as Markdown (`isocost.analysis.study_comparison`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from isocost.analysis.costs import cost_of
from isocost.analysis.formatting import format_metric, format_number
from isocost.analysis.pareto import metric_of
from isocost.analysis.study_comparison import Ranking, headline
from isocost.report.markdown import escaped
from isocost.report.matplotlib_backend import draw_curves, save
from isocost.report.plot_data import Curves, frontiers_side_by_side
from isocost.utils.artifact_store import write_atomically

FIGURE = "quality_vs_cost_by_study"


def frontier_curves(table: pd.DataFrame, metric: str, cost: str) -> Curves:
    """The frontier of every study of a united table."""
    groups = {str(study): table[table["study"] == study] for study in dict.fromkeys(table["study"])}
    return frontiers_side_by_side(groups, metric, cost, "Which study is best at equal cost?", table, None)


def markdown_comparison(table: pd.DataFrame, told: Sequence[Ranking]) -> str:
    """A row a budget: the best of every study, the leader less the next with its interval, the verdict."""
    studies = list(dict.fromkeys(str(study) for study in table["study"]))
    metric, cost, first = told[0].metric, cost_of(told[0].cost), table.iloc[0]
    heads = [f"{cost.label}, at most", *studies, "leader less the next", "verdict"]
    lines = [
        f"**{escaped(' and '.join(studies))}**: {escaped(headline(told))}",
        "",
        "| " + " | ".join(escaped(head) for head in heads) + " |",
        "|--:|" + "---|" * (len(heads) - 1),
    ]
    for standing in told:
        configurations = {one.other: one.other_configuration for one in standing.against}
        configurations[standing.leader] = standing.against[0].one_configuration
        cells = [
            f"{standing.scores[study]}: {configurations[study]}" if study in standing.scores else "nothing fits"
            for study in studies
        ]
        nearest = standing.against[0]
        is_apart = "decided" if standing.is_decided else "undecided"
        verdict = f"{standing.leader}, {is_apart}" if standing.is_contested else f"{standing.leader} alone"
        difference = "" if nearest.difference is None else str(nearest).rpartition(":")[0]
        cells = [format_number(standing.budget), *cells, difference, verdict]
        lines.append("| " + " | ".join(escaped(cell) for cell in cells) + " |")
    lines += [
        "",
        f"By {escaped(format_metric(metric))} ({metric_of(metric).better} is better), 95 % intervals, {len(table)} points, "
        f"{first['num_images']:,} images a point; protocol {escaped(str(first['protocol']))}, seed {first['seed']}. One "
        "training each: its luck is in no interval.",
    ]
    return "\n".join(lines) + "\n"


def write_comparison(out: Path, table: pd.DataFrame, told: Sequence[Ranking]) -> list[Path]:
    """Write the Markdown and the figure, as PNG and PDF, into a folder; returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    cost, metric = told[0].cost, told[0].metric
    markdown, name = out / f"comparison-{cost}.md", f"{FIGURE}-{cost}"
    write_atomically(markdown, markdown_comparison(table, told))
    save(draw_curves(frontier_curves(table, metric, cost)), out, name)
    return [markdown, out / f"{name}.png", out / f"{name}.pdf"]
