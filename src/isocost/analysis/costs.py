"""The cost axes of a results table."""

from __future__ import annotations

from dataclasses import dataclass

from isocost.analysis.formatting import format_number
from isocost.errors import RequestError


@dataclass(frozen=True)
class Cost:
    """A way to count what one picture costs to sample."""

    name: str
    label: str
    axis: str
    unit: str

    def amount(self, value: float) -> str:
        """`value` in words: "12 units of paper cost"."""
        return f"{format_number(value)} {self.unit}"


COSTS = {
    cost.name: cost
    for cost in (
        Cost("paper_cost", "paper cost", "paper cost (normalised cost × steps)", "units of paper cost"),
        Cost("nfe", "evaluations", "network evaluations per picture", "network evaluations per picture"),
        Cost("gflop", "GFLOP", "GFLOP per picture (denoiser, all passes)", "GFLOP per picture"),
        Cost("ms_per_picture", "milliseconds", "ms per picture (measured, by throughput)", "ms per picture"),
    )
}


def cost_of(name: str) -> Cost:
    """The cost called `name`; RequestError with the known names where there is none."""
    if name not in COSTS:
        raise RequestError(f"no cost is called {name!r}; known: {', '.join(COSTS)}")
    return COSTS[name]
