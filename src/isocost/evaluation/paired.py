"""How much one set of images scores above another, image i of both made from the same noise, caption or original.

Shapes: N images, D features.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from isocost.evaluation.confidence_intervals import Interval, mean_interval, paired_frechet_difference, paired_kernel_difference
from isocost.evaluation.feature_store import SampleFeatures, read_measured
from isocost.evaluation.reference_set import ReferenceSet
from isocost.metrics.mmd import GAUSSIAN, POLYNOMIAL
from isocost.metrics.registry import metrics_of
from isocost.utils.artifact_store import Store

PAIRED_DISTANCES = ("mmd", "cmmd", "frechet")


def paired_differences(
    first: SampleFeatures, second: SampleFeatures, reference: ReferenceSet, metrics: tuple[str, ...]
) -> dict[str, Interval]:
    """Score of `first` less that of `second` by metric, with 95 % intervals in which what they share cancels.

    Of the distances those that have a paired interval (`PAIRED_DISTANCES`), and every score that images have one by one.

    Raises:
        ValueError: the two do not hold the same image ids.
    """
    one, two = first.ids, second.ids
    if one is not None and two is not None and not np.array_equal(one, two):
        raise ValueError("paired differences take the same images on both sides")
    told: dict[str, Interval] = {}
    for name, features in first.features.items():
        for distance in (each for each in metrics if each in PAIRED_DISTANCES):
            for metric in metrics_of(distance, name):
                told[metric] = _difference(distance, name, features, second.features[name], reference)
    by_image = {name: (values, second.paired_metrics[name]) for name, values in first.paired_metrics.items()}
    if first.alignment is not None and second.alignment is not None:
        by_image["alignment"] = (first.alignment, second.alignment)
    of = reference.protocol
    for metric, (ours, theirs) in by_image.items():
        told[metric] = mean_interval(ours - theirs, num_bootstrap=of.num_bootstrap, seed=of.seed)
    return told


@dataclass
class PairedComparer:
    """Differences between points under one protocol, from the features that output folders keep of them."""

    stores: tuple[Store, ...]
    reference: ReferenceSet
    metrics: tuple[str, ...]
    _kept: dict[str, SampleFeatures] = field(default_factory=dict)

    def has(self, point: str) -> bool:
        """Whether a point's features are here: `isocost archive` leaves them where they were made."""
        return any(store.has("point", point) for store in self.stores)

    def measured(self, point: str) -> SampleFeatures:
        """What is kept of a point, by its digest."""
        if point not in self._kept:
            home = next((store for store in self.stores if store.has("point", point)), self.stores[0])
            folder = home.folder("point", point)
            self._kept[point] = read_measured(folder, tuple(self.reference.extractors))
        return self._kept[point]

    def of(self, first: SampleFeatures, second: SampleFeatures) -> dict[str, Interval]:
        """First less second, by metric."""
        return paired_differences(first, second, self.reference, self.metrics)

    def of_points(self, first: str, second: str, metric: str) -> Interval | None:
        """First less second in one metric; None where it has no paired interval, or a point's features are not here."""
        if not (self.has(first) and self.has(second)):
            return None
        return self.of(self.measured(first), self.measured(second)).get(metric)


def _difference(distance: str, name: str, first: np.ndarray, second: np.ndarray, reference: ReferenceSet) -> Interval:
    if distance == "frechet":
        return paired_frechet_difference(first, second, reference.features[name], reference_moments=reference.moments(name))
    return paired_kernel_difference(first, second, reference.kernel(name, POLYNOMIAL if distance == "mmd" else GAUSSIAN))
