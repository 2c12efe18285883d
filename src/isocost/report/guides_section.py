"""The report's section on guide networks, as plain text for the page and for Markdown."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from isocost.analysis.costs import COSTS, cost_of
from isocost.analysis.formatting import format_metric, format_number, format_steps
from isocost.analysis.guides import (
    WAYS,
    BestGuide,
    GuideComparison,
    best_guides,
    compare_guides,
    disagreements,
    guide_costs,
    summarise,
)
from isocost.analysis.iso_cost import PairedDifferences

NOTHING_FITS = "nothing fits"


@dataclass(frozen=True)
class GuideRow:
    """One cost of the table of frontiers.

    Attributes:
        budget: the cost, as text.
        best: score and configuration of the best point of each way of guidance; "" without a point.
        difference: the best point with a guide minus the best point without one, with its interval; "" without one.
        verdict: "better", "worse", "no difference is shown", or the reason why there is none.
        other_metrics: the difference of the same two points by each other metric.
    """

    budget: str
    best: tuple[tuple[str, str], ...]
    difference: str
    verdict: str
    other_metrics: tuple[str, ...]

    @property
    def is_decided(self) -> bool:
        """Whether the interval of the difference excludes 0."""
        return self.verdict in ("better", "worse")


@dataclass(frozen=True)
class GuideTable:
    """The frontiers under one cost.

    Attributes:
        cost: label of the cost.
        unit: unit of the cost.
        summary: the verdicts at all costs, in sentences.
        by_other_metrics: the same by each other metric, for the same points, and where the metrics disagree.
        ways: the ways of guidance that have points.
        rows: one per budget.
    """

    cost: str
    unit: str
    summary: str
    by_other_metrics: tuple[str, ...]
    ways: tuple[str, ...]
    rows: tuple[GuideRow, ...]


@dataclass(frozen=True)
class GuideSection:
    """All texts of the section.

    Attributes:
        tables: one per cost; the first one leads.
        best: the best guide of every network at every number of steps, under the first cost.
        summary_by_network: the same in one sentence per network.
    """

    tables: tuple[GuideTable, ...]
    best: tuple[BestGuide, ...]
    summary_by_network: tuple[str, ...]


def guide_section(table: pd.DataFrame, metric: str, pairs: PairedDifferences) -> GuideSection:
    """Return the texts of the section.

    Args:
        table: points with guides, as in `isocost.analysis.results_table`.
        metric: the metric that ranks the points.
        pairs: paired differences between points; where it has none, the scores are treated as independent.

    Raises:
        ConfigError: points with a guide and points without one cannot be compared.
    """
    costs = guide_costs(table)
    best = best_guides(table, metric, costs[0], pairs)
    return GuideSection(
        tuple(_table(compare_guides(table, metric, cost, pairs), metric, cost) for cost in costs),
        tuple(best),
        tuple(_summarise_network(size, best) for size in dict.fromkeys(entry.size for entry in best)),
    )


def _table(comparisons: list[GuideComparison], metric: str, cost: str) -> GuideTable:
    ways = tuple(way for way in WAYS if any(way in comparison.best for comparison in comparisons))
    others = dict.fromkeys(name for comparison in comparisons for name in comparison.other_metrics)
    names = (metric, *others)
    notes = [summarise(comparisons, name) for name in others]
    contradicting: dict[tuple[float, str, str], list[str]] = {}
    for budget, verdict, other, other_verdict in disagreements(comparisons):
        contradicting.setdefault((budget, verdict, other_verdict), []).append(format_metric(other, names))
    notes += [
        f"The metrics disagree at {cost_of(cost).format_amount(budget)}: the guide is {verdict} by "
        f"{format_metric(metric, names)}, {other_verdict} by {_and(labels)}."
        for (budget, verdict, other_verdict), labels in contradicting.items()
    ]
    return GuideTable(
        cost=COSTS[cost].label,
        unit=cost_of(cost).unit,
        summary=summarise(comparisons),
        by_other_metrics=tuple(notes),
        ways=ways,
        rows=tuple(_row(comparison, ways) for comparison in comparisons),
    )


def _and(labels: list[str]) -> str:
    return " and ".join(part for part in (", ".join(labels[:-1]), labels[-1]) if part)


def _row(comparison: GuideComparison, ways: tuple[str, ...]) -> GuideRow:
    return GuideRow(
        budget=format_number(comparison.budget),
        best=tuple(comparison.best.get(way, (NOTHING_FITS, "")) for way in ways),
        difference="" if comparison.difference is None else comparison.difference.amount,
        verdict=comparison.verdict,
        other_metrics=tuple(
            f"{format_metric(name, [comparison.metric, *comparison.other_metrics])} {difference}"
            for name, difference in comparison.other_metrics.items()
        ),
    )


def _summarise_network(size: str, best: list[BestGuide]) -> str:
    """The best guides of one network: "2.6M: 0.8M@12000 at 2, 4 steps; 0.8M at 8 steps"."""
    steps: dict[str, list[int]] = {}
    for entry in best:
        if entry.size == size:
            steps.setdefault(entry.guide, []).append(entry.num_steps)
    parts = [
        f"{guide} at {', '.join(map(str, numbers[:-1]))}{', ' if len(numbers) > 1 else ''}{format_steps(numbers[-1])}"
        for guide, numbers in steps.items()
    ]
    return f"{size}: {'; '.join(parts)}"
