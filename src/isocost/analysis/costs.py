"""The cost axes of a results table."""

from __future__ import annotations

from dataclasses import dataclass

from isocost.analysis.formatting import format_number
from isocost.errors import ConfigError


@dataclass(frozen=True)
class Cost:
    """A measure of the cost of sampling one image.

    Attributes:
        name: the column of the results table.
        label: short name for headings.
        axis: title of a figure's axis.
        unit: the unit after a number, in running text.
    """

    name: str
    label: str
    axis: str
    unit: str

    def format_amount(self, value: float) -> str:
        """`value` with its unit: "12 units of normalized cost"."""
        return f"{format_number(value)} {self.unit}"


COSTS = {
    cost.name: cost
    for cost in (
        Cost("normalized_cost", "normalized cost", "normalized cost per image (per step × steps)", "units of normalized cost"),
        Cost("nfe", "evaluations", "network evaluations per image", "network evaluations per image"),
        Cost("gflop", "GFLOP", "GFLOP per image (denoiser, all passes)", "GFLOP per image"),
        Cost("ms_per_image", "milliseconds", "ms per image (measured, by throughput)", "ms per image"),
    )
}


def cost_of(name: str) -> Cost:
    """Look up a cost by its name.

    Raises:
        ConfigError: there is no such cost; the message lists the known names.
    """
    if name not in COSTS:
        raise ConfigError(f"no cost is called {name!r}; known: {', '.join(COSTS)}")
    return COSTS[name]
