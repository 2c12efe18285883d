"""The verdicts for the paper's claims: rows of the page, and `claims.md`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import pandas as pd

from isocost.analysis.claims import ClaimVerdict, Tables, TaskResults
from isocost.analysis.costs import COSTS
from isocost.analysis.formatting import format_metric
from isocost.analysis.results_table import sizes_in_order, with_metric
from isocost.report.markdown import escape_markdown

RULES = """\
Each case compares two scores. It agrees or contradicts if their 95 % intervals do not overlap, and is open if they do. If sizes
were also trained with other seeds, the scores of two sizes must differ by more than the variance between training seeds. A
claim holds if at least one case agrees, none contradicts, and at most as many are open as agree. It does not hold if more cases
contradict than agree, and at least as many contradict as are open. Otherwise it is undecided."""


@dataclass(frozen=True)
class ClaimRow:
    """A claim and its verdict under all costs that share this verdict.

    Attributes:
        costs: labels of these costs; empty if the claim does not depend on cost.
        counts: the numbers of cases that agree, contradict and are open; listed for each cost if they differ between costs.
        cases: some cases under the first of these costs.
    """

    section: int
    statement: str
    costs: str
    verdict: str
    counts: str
    cases: tuple[str, ...]


def claim_rows(verdicts: Sequence[ClaimVerdict]) -> list[ClaimRow]:
    """Return one row for every claim and verdict; costs with the same verdict share a row."""
    rows = []
    for (section, statement), group in groupby(verdicts, lambda verdict: (verdict.section, verdict.statement)):
        by_verdict: dict[str, list[ClaimVerdict]] = {}
        for claim in group:
            by_verdict.setdefault(claim.verdict, []).append(claim)
        for verdict, claims in by_verdict.items():
            costs = ", ".join(COSTS[claim.cost].label for claim in claims if claim.cost)
            by_counts: dict[str, list[str]] = {}
            for claim in claims:
                by_counts.setdefault(claim.counts, []).append(COSTS[claim.cost].label if claim.cost else "")
            parts = [
                counts if len(by_counts) == 1 else f"{', '.join(labels)}: {counts}" for counts, labels in by_counts.items()
            ]
            rows.append(ClaimRow(section, statement, costs, verdict, "; ".join(parts), claims[0].examples))
    return rows


def markdown_claims(study_name: str, verdicts: Sequence[ClaimVerdict], tables: Tables) -> str:
    """Return `claims.md`: the rules, every claim with its verdict and evidence, and the scored points of each task."""
    lines = [f"# The paper's claims, checked on {escape_markdown(study_name)}", ""]
    lines += ["These claims are from arXiv 2404.01367. They are checked on the points of this study.", "", RULES, ""]
    lines += ["| experiment | claim | at equal | verdict | evidence |", "|--:|---|---|---|---|"]
    for row in claim_rows(verdicts):
        evidence = f"{row.counts}: {'; '.join(row.cases)}" if row.cases else row.counts
        cells = (
            str(row.section),
            escape_markdown(row.statement),
            escape_markdown(row.costs),
            f"**{row.verdict}**",
            escape_markdown(evidence),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## The points behind the scores", ""]
    lines += [f"- {escape_markdown(task)}: {escape_markdown(describe_points(results))}" for task, results in tables.items()]
    return "\n".join(lines) + "\n"


def describe_points(results: TaskResults) -> str:
    """Return sizes, images per point, metric, protocol, seed and choice of guidance of the points that have the metric."""
    rows = with_metric(results.table, results.metric)
    first, sizes = rows.iloc[0], ", ".join(sizes_in_order(rows))
    parts = [f"{len(rows):,} points of {sizes}", f"{first['num_images']:,} images per point"]
    parts.append(f"by {format_metric(results.metric)}, protocol {first['protocol']}, seed {first['seed']}")
    parts.append(f"guidance {_describe_guidance(rows)}")
    parts.append(
        "one training seed per size: the intervals do not include the variance between training seeds"
        if results.seed_variance is None
        else str(results.seed_variance)
    )
    return "; ".join(parts)


def _describe_guidance(rows: pd.DataFrame) -> str:
    is_raced = rows["guidance_low"].notna() if "guidance_low" in rows.columns else pd.Series(False, index=rows.index)
    if is_raced.any():
        return "chosen by a race with few images, the winner scored again with fresh seeds"
    if rows["guidance"].nunique() == 1:
        return f"{rows['guidance'].iloc[0]:g} for all points"
    return "the best of a grid by the same scores, so the best scores are slightly optimistic"
