"""The paper's findings on a study's points, as rows of the page and as `verdicts.md`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import pandas as pd

from isocost.analysis.frontier import COSTS, metric_words, scored, sizes_in_order
from isocost.analysis.verdicts import Points, Tables, Verdict
from isocost.report.summary import escaped

RULES = """\
A case compares two scores. It agrees or contradicts where their 95 % intervals are apart, and is open where they overlap. A
finding holds where some case agrees, none contradicts, and no more are open than agree; it does not hold where most of the
decided cases contradict, and no fewer than are open; else it is undecided."""


def verdict_rows(verdicts: Sequence[Verdict]) -> list[dict[str, str | int]]:
    """Section, statement, cost, verdict and evidence; costs under which the same is said, by the same cases, share a row."""
    rows: list[dict[str, str | int]] = []
    for (section, statement), group in groupby(verdicts, lambda one: (one.section, one.statement)):
        told: dict[tuple[str, str], list[str]] = {}
        for one in group:
            cost = COSTS[one.cost].label if one.cost else ""
            told.setdefault((one.verdict, one.evidence), []).append(cost)
        rows += [
            {"section": section, "statement": statement, "cost": ", ".join(costs), "verdict": verdict, "evidence": evidence}
            for (verdict, evidence), costs in told.items()
        ]
    return rows


def markdown_verdicts(study_name: str, verdicts: Sequence[Verdict], tables: Tables) -> str:
    """`verdicts.md`: every finding with its evidence, the rules, and what the scores rest on, by task."""
    lines = [f"# What the paper found, and {escaped(study_name)}", ""]
    lines += ["Statements of arXiv 2404.01367, put to this study's points.", "", RULES, ""]
    lines += ["| experiment | finding | at equal | verdict | evidence |", "|--:|---|---|---|---|"]
    for row in verdict_rows(verdicts):
        cells = (str(row["section"]), *(escaped(str(row[name])) for name in ("statement", "cost")), f"**{row['verdict']}**")
        lines.append(f"| {' | '.join((*cells, escaped(str(row['evidence']))))} |")
    lines += ["", "## What it rests on", ""]
    lines += [f"- {escaped(task)}: {escaped(basis(points))}" for task, points in tables.items()]
    return "\n".join(lines) + "\n"


def basis(points: Points) -> str:
    """Pictures a point, sizes, metric, protocol, seed, and how guidance was chosen, of the points that carry the metric."""
    rows = scored(points.table, points.metric)
    first, sizes = rows.iloc[0], ", ".join(sizes_in_order(rows))
    told = [f"{len(rows):,} points of {sizes}", f"{first['num_pictures']:,} pictures a point"]
    told.append(f"by {metric_words(points.metric)}, protocol {first['protocol']}, seed {first['seed']}")
    told.append(f"guidance {_choice(rows)}")
    told.append("one training seed a size: its luck is not in the intervals")
    return "; ".join(told)


def _choice(rows: pd.DataFrame) -> str:
    raced = rows["guidance_low"].notna() if "guidance_low" in rows.columns else pd.Series(False, index=rows.index)
    if raced.any():
        return "raced for with few pictures, the winner scored again with fresh seeds"
    if rows["guidance"].nunique() == 1:
        return f"{rows['guidance'].iloc[0]:g} throughout"
    return "the best of a grid by the same scores, which flatters the best"
