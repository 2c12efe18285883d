"""The cost axes of a results table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from isocost.analysis.formatting import format_number
from isocost.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Cost:
    """A measure of the cost of sampling one image.

    Attributes:
        name: the column of the results table.
        keyword: the budget of `isocost.recommend`; the option is `--budget-KEYWORD` with hyphens.
        label: short name for headings.
        axis: title of a figure's axis.
        unit: the unit after a number, in running text.
        measured_by: how to measure a cost that a sweep does not measure; "" for the others. Reports do not mention such a cost
            until a point has it.
        counted_by: how to add a cost that is counted, not measured, to a table that lacks it; "" for the others.
        is_part: it is a part of another cost. Budgets and figures take it by name; reports show the other.
    """

    name: str
    keyword: str
    label: str
    axis: str
    unit: str
    measured_by: str = ""
    counted_by: str = ""
    is_part: bool = False

    def format_amount(self, value: float) -> str:
        """`value` with its unit: "12 units of normalized cost"."""
        return f"{format_number(value)} {self.unit}"


REMEASURE = "`isocost remeasure STUDY`"
"""The command that measures times properly."""

COSTS = {
    cost.name: cost
    for cost in (
        Cost(
            "normalized_cost",
            "normalized_cost",
            "normalized cost",
            "normalized cost per image (per step × steps)",
            "units of normalized cost",
        ),
        Cost("nfe", "nfe", "evaluations", "network evaluations per image", "network evaluations per image"),
        Cost(
            "gflop",
            "gflop",
            "GFLOP",
            "GFLOP per image (prompt, all passes, decoder)",
            "GFLOP per image",
            counted_by="`isocost report OUT` adds it; a table of version 0.1 has only gflop_denoiser",
        ),
        Cost("ms_per_image", "ms", "milliseconds", "ms per image (measured, by throughput)", "ms per image"),
        Cost(
            "latency_ms",
            "latency_ms",
            "latency",
            "latency of one image in ms (measured, batch 1)",
            "ms of latency",
            measured_by=f"{REMEASURE} measures it, and `isocost report STUDY` adds it to the table",
        ),
        Cost(
            "joules_per_image",
            "joules",
            "joules",
            "energy per image in J (measured, full batches)",
            "J per image",
            measured_by=f"{REMEASURE} measures it on a GPU that reports its energy, and `isocost report STUDY` adds it",
        ),
        Cost(
            "usd_per_1000",
            "usd",
            "US dollars",
            "US dollars per 1,000 images (measured time × price)",
            "US dollars per 1,000 images",
            measured_by="set `report.prices` in the study and run `isocost report STUDY`, or give `recommend` --prices FILE",
        ),
        Cost(
            "gflop_denoiser",
            "gflop_denoiser",
            "GFLOP of the denoiser",
            "GFLOP per image (all passes of the denoiser)",
            "GFLOP of the denoiser per image",
            is_part=True,
        ),
    )
}
REPORT_COSTS = tuple(name for name, cost in COSTS.items() if not cost.is_part)
"""The costs that a report shows."""


def cost_of(name: str) -> Cost:
    """Look up a cost by its name.

    Raises:
        ConfigError: there is no such cost; the message lists the known names.
    """
    if name not in COSTS:
        raise ConfigError(f"no cost is called {name!r}; known: {', '.join(COSTS)}")
    return COSTS[name]


def is_measured(table: pd.DataFrame, name: str) -> bool:
    """Whether any row of the table has a value of the cost."""
    return name in table.columns and bool(table[name].notna().any())


def expected_costs(table: pd.DataFrame) -> list[str]:
    """The costs that a report of the table shows or misses: all but those measured on request that no row has."""
    return [name for name in REPORT_COSTS if not COSTS[name].measured_by or is_measured(table, name)]


def format_unmeasured(name: str, points: str = "point") -> str:
    """The message for a table in which no point has the cost, with the remedy."""
    others = ", ".join(other for other, cost in COSTS.items() if other != name and not cost.measured_by)
    remedy = cost_of(name).measured_by or cost_of(name).counted_by or f"choose another cost of {others}"
    return f"no {points} has a {'known' if cost_of(name).counted_by else 'measured'} {name}; {remedy}"
