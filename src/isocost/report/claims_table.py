"""The paper's findings on a study's points, as rows of the page and as `claims.md`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import pandas as pd

from isocost.analysis.claims import ClaimVerdict, Tables, TaskResults
from isocost.analysis.costs import COSTS
from isocost.analysis.formatting import format_metric
from isocost.analysis.results_table import sizes_in_order, with_metric
from isocost.report.markdown import escaped

RULES = """\
A case compares two scores. It agrees or contradicts where their 95 % intervals are apart, and is open where they overlap; where
sizes were trained again from other seeds, scores of two sizes have to differ by more than that luck as well. A finding holds
where some case agrees, none contradicts, and no more are open than agree; it does not hold where most of the decided cases
contradict, and no fewer than are open; else it is undecided."""


@dataclass(frozen=True)
class Row:
    """A finding and what is said of it under the costs that agree about it: counts by cost, cases in words of the first."""

    section: int
    statement: str
    costs: str
    verdict: str
    counts: str
    cases: tuple[str, ...]


def verdict_rows(verdicts: Sequence[ClaimVerdict]) -> list[Row]:
    """One row for every finding and verdict; costs under which the verdict is the same share it."""
    rows = []
    for (section, statement), group in groupby(verdicts, lambda one: (one.section, one.statement)):
        alike: dict[str, list[ClaimVerdict]] = {}
        for one in group:
            alike.setdefault(one.verdict, []).append(one)
        for verdict, some in alike.items():
            costs = ", ".join(COSTS[one.cost].label for one in some if one.cost)
            by_counts: dict[str, list[str]] = {}
            for one in some:
                by_counts.setdefault(one.counts, []).append(COSTS[one.cost].label if one.cost else "")
            told = [counts if len(by_counts) == 1 else f"{', '.join(of)}: {counts}" for counts, of in by_counts.items()]
            rows.append(Row(section, statement, costs, verdict, "; ".join(told), some[0].told))
    return rows


def markdown_verdicts(study_name: str, verdicts: Sequence[ClaimVerdict], tables: Tables) -> str:
    """`claims.md`: every finding with its evidence, the rules, and what the scores rest on, by task."""
    lines = [f"# What the paper found, and {escaped(study_name)}", ""]
    lines += ["Statements of arXiv 2404.01367, put to this study's points.", "", RULES, ""]
    lines += ["| experiment | finding | at equal | verdict | evidence |", "|--:|---|---|---|---|"]
    for row in verdict_rows(verdicts):
        evidence = f"{row.counts}: {'; '.join(row.cases)}" if row.cases else row.counts
        cells = (str(row.section), escaped(row.statement), escaped(row.costs), f"**{row.verdict}**", escaped(evidence))
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## What it rests on", ""]
    lines += [f"- {escaped(task)}: {escaped(basis(points))}" for task, points in tables.items()]
    return "\n".join(lines) + "\n"


def basis(points: TaskResults) -> str:
    """Images a point, sizes, metric, protocol, seed, and how guidance was chosen, of the points that carry the metric."""
    rows = with_metric(points.table, points.metric)
    first, sizes = rows.iloc[0], ", ".join(sizes_in_order(rows))
    told = [f"{len(rows):,} points of {sizes}", f"{first['num_images']:,} images a point"]
    told.append(f"by {format_metric(points.metric)}, protocol {first['protocol']}, seed {first['seed']}")
    told.append(f"guidance {_choice(rows)}")
    told.append(
        "one training seed a size: its luck is not in the intervals"
        if points.seed_variance is None
        else str(points.seed_variance)
    )
    return "; ".join(told)


def _choice(rows: pd.DataFrame) -> str:
    raced = rows["guidance_low"].notna() if "guidance_low" in rows.columns else pd.Series(False, index=rows.index)
    if raced.any():
        return "raced for with few images, the winner scored again with fresh seeds"
    if rows["guidance"].nunique() == 1:
        return f"{rows['guidance'].iloc[0]:g} throughout"
    return "the best of a grid by the same scores, which flatters the best"
