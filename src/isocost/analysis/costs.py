"""The cost axes of a results table."""

from __future__ import annotations

from dataclasses import dataclass

from isocost.analysis.formatting import format_number
from isocost.errors import ConfigError


@dataclass(frozen=True)
class Cost:
    """A way to count what one image costs to sample."""

    name: str
    label: str
    axis: str
    unit: str

    def amount(self, value: float) -> str:
        """`value` in words: "12 units of normalized cost"."""
        return f"{format_number(value)} {self.unit}"


COSTS = {
    cost.name: cost
    for cost in (
        Cost("normalized_cost", "normalized cost", "normalized cost (normalized cost × steps)", "units of normalized cost"),
        Cost("nfe", "evaluations", "network evaluations per image", "network evaluations per image"),
        Cost("gflop", "GFLOP", "GFLOP per image (denoiser, all passes)", "GFLOP per image"),
        Cost("ms_per_image", "milliseconds", "ms per image (measured, by throughput)", "ms per image"),
    )
}


def cost_of(name: str) -> Cost:
    """The cost called `name`; ConfigError with the known names where there is none."""
    if name not in COSTS:
        raise ConfigError(f"no cost is called {name!r}; known: {', '.join(COSTS)}")
    return COSTS[name]
