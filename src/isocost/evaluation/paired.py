"""How much one set of pictures scores above another, picture i of both made from the same noise, caption or original.

Shapes: N pictures, D features.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from isocost.evaluation.confidence_intervals import Interval, mean_interval, paired_frechet_difference, paired_kernel_difference
from isocost.evaluation.feature_store import Measured, read_measured
from isocost.evaluation.reference_set import Reference
from isocost.metrics.mmd import GAUSSIAN, POLYNOMIAL
from isocost.metrics.registry import metrics_of
from isocost.utils.artifact_store import Store

PAIRED_DISTANCES = ("kernel", "cmmd", "frechet")


def paired_differences(
    first: Measured, second: Measured, reference: Reference, distances: tuple[str, ...]
) -> dict[str, Interval]:
    """Score of `first` less that of `second` by metric, with 95 % intervals in which what they share cancels.

    Of the distances those that have a paired interval (`PAIRED_DISTANCES`), and every score that pictures have one by one.

    Raises:
        ValueError: the two do not hold the same picture ids.
    """
    one, two = first.ids, second.ids
    if one is not None and two is not None and not np.array_equal(one, two):
        raise ValueError("paired differences take the same pictures on both sides")
    told: dict[str, Interval] = {}
    for name, features in first.features.items():
        for distance in (each for each in distances if each in PAIRED_DISTANCES):
            for metric in metrics_of(distance, name):
                told[metric] = _difference(distance, name, features, second.features[name], reference)
    by_picture = {name: (values, second.pairs[name]) for name, values in first.pairs.items()}
    if first.alignment is not None and second.alignment is not None:
        by_picture["alignment"] = (first.alignment, second.alignment)
    of = reference.protocol
    for metric, (ours, theirs) in by_picture.items():
        told[metric] = mean_interval(ours - theirs, num_bootstrap=of.num_bootstrap, seed=of.seed)
    return told


@dataclass
class Pairing:
    """Differences between points under one protocol, from the features that output folders keep of them."""

    stores: tuple[Store, ...]
    reference: Reference
    distances: tuple[str, ...]
    _kept: dict[str, Measured] = field(default_factory=dict)

    def has(self, point: str) -> bool:
        """Whether a point's features are here: `isocost keep` leaves them where they were made."""
        return any(store.has("point", point) for store in self.stores)

    def measured(self, point: str) -> Measured:
        """What is kept of a point, by its digest."""
        if point not in self._kept:
            home = next((store for store in self.stores if store.has("point", point)), self.stores[0])
            folder = home.folder("point", point)
            self._kept[point] = read_measured(folder, tuple(self.reference.extractors))
        return self._kept[point]

    def of(self, first: Measured, second: Measured) -> dict[str, Interval]:
        """First less second, by metric."""
        return paired_differences(first, second, self.reference, self.distances)

    def of_points(self, first: str, second: str, metric: str) -> Interval | None:
        """First less second in one metric; None where it has no paired interval, or a point's features are not here."""
        if not (self.has(first) and self.has(second)):
            return None
        return self.of(self.measured(first), self.measured(second)).get(metric)


def _difference(distance: str, name: str, first: np.ndarray, second: np.ndarray, reference: Reference) -> Interval:
    if distance == "frechet":
        return paired_frechet_difference(first, second, reference.features[name], reference_moments=reference.moments(name))
    return paired_kernel_difference(first, second, reference.kernel(name, POLYNOMIAL if distance == "kernel" else GAUSSIAN))
