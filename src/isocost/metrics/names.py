"""The names of the metrics: what a column of the ledger holds, how a figure labels it, and which way is better.

The kernel and Frechet distances here are never called KID or FID: those names belong to Inception features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from isocost.errors import RequestError


@dataclass(frozen=True)
class Metric:
    """One metric: its key, its words, its direction and the title of its axis."""

    name: str
    label: str
    better: Literal["lower", "higher"]
    axis: str


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "kernel_efficientnet",
            "kernel distance, EfficientNet-lite0 features",
            "lower",
            "kernel distance, EfficientNet-lite0 (unbiased MMD², lower is better)",
        ),
        Metric(
            "frechet_efficientnet",
            "Fréchet distance, EfficientNet-lite0 features",
            "lower",
            "Fréchet distance, EfficientNet-lite0 (biased up by about 1/N, lower is better)",
        ),
        Metric(
            "alignment",
            "caption alignment, share of attributes a classifier reads back",
            "higher",
            "caption alignment (share, higher is better)",
        ),
        Metric("psnr", "peak signal-to-noise ratio", "higher", "PSNR (dB, higher is better)"),
        Metric("lpips", "LPIPS, AlexNet", "lower", "LPIPS, AlexNet (lower is better)"),
    )
}


def metric_of(name: str) -> Metric:
    """The metric called `name`; RequestError with the known names where there is none."""
    if name not in METRICS:
        raise RequestError(f"no metric is called {name!r}; known: {', '.join(METRICS)}")
    return METRICS[name]
