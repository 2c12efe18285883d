"""The comparison of several studies as a figure and as Markdown (`isocost.analysis.study_comparison`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from isocost.analysis.costs import cost_of
from isocost.analysis.formatting import format_metric, format_number
from isocost.analysis.pareto import metric_of
from isocost.analysis.study_comparison import Ranking, headline
from isocost.report.markdown import escape_markdown
from isocost.report.matplotlib_backend import draw_curves, save
from isocost.report.plot_data import Curves, frontier_comparison
from isocost.utils.artifact_store import write_atomically

FIGURE = "quality_vs_cost_by_study"


def frontier_curves(table: pd.DataFrame, metric: str, cost: str) -> Curves:
    """Return the frontier of every study of a combined table."""
    groups = {str(study): table[table["study"] == study] for study in dict.fromkeys(table["study"])}
    return frontier_comparison(groups, metric, cost, "Which study is best at equal cost?", table, None)


def markdown_comparison(table: pd.DataFrame, rankings: Sequence[Ranking]) -> str:
    """Return a Markdown table with one row per budget: the best of every study, the leader minus the next, the verdict.

    Args:
        table: the combined points of the studies.
        rankings: one per budget, all of the same metric and cost.
    """
    studies = list(dict.fromkeys(str(study) for study in table["study"]))
    metric, cost, first = rankings[0].metric, cost_of(rankings[0].cost), table.iloc[0]
    heads = [f"{cost.label}, at most", *studies, "leader minus the next", "verdict"]
    lines = [
        f"**{escape_markdown(' and '.join(studies))}**: {escape_markdown(headline(rankings))}",
        "",
        "| " + " | ".join(escape_markdown(head) for head in heads) + " |",
        "|--:|" + "---|" * (len(heads) - 1),
    ]
    for ranking in rankings:
        configurations = {comparison.other: comparison.other_configuration for comparison in ranking.against}
        configurations[ranking.leader] = ranking.against[0].one_configuration
        cells = [
            f"{ranking.scores[study]}: {configurations[study]}" if study in ranking.scores else "nothing fits"
            for study in studies
        ]
        nearest = ranking.against[0]
        decision = "decided" if ranking.is_decided else "undecided"
        verdict = f"{ranking.leader}, {decision}" if ranking.is_contested else f"only {ranking.leader} fits"
        difference = "" if nearest.difference is None else str(nearest).rpartition(":")[0]
        cells = [format_number(ranking.budget), *cells, difference, verdict]
        lines.append("| " + " | ".join(escape_markdown(cell) for cell in cells) + " |")
    lines += [
        "",
        f"By {escape_markdown(format_metric(metric))} ({metric_of(metric).better} is better), 95 % intervals, {len(table)} "
        f"points, {first['num_images']:,} images per point; protocol {escape_markdown(str(first['protocol']))}, "
        f"seed {first['seed']}. Each network was trained once, so the intervals do not include the variance between training "
        "seeds.",
    ]
    return "\n".join(lines) + "\n"


def write_comparison(out: Path, table: pd.DataFrame, rankings: Sequence[Ranking]) -> list[Path]:
    """Write the Markdown and the figure (PNG and PDF) into a folder and return the files."""
    out.mkdir(parents=True, exist_ok=True)
    cost, metric = rankings[0].cost, rankings[0].metric
    markdown, name = out / f"comparison-{cost}.md", f"{FIGURE}-{cost}"
    write_atomically(markdown, markdown_comparison(table, rankings))
    save(draw_curves(frontier_curves(table, metric, cost)), out, name)
    return [markdown, out / f"{name}.png", out / f"{name}.pdf"]
