"""Differences between the scores of two sets of images. Image i of both has the same noise, caption or original.

The resamples of both sets draw the same image ids and the same reference images, so that the noise which the sets share
cancels in the difference of their resamples. The results database stores the resamples of every point: differences need
neither images nor features.

Shapes: N images, D features, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from isocost.evaluation.confidence_intervals import Interval, percentile_interval
from isocost.evaluation.evaluator import Scorer
from isocost.evaluation.feature_store import SampleFeatures, read_sample_features
from isocost.evaluation.reference_set import ReferenceSet
from isocost.metrics.arrays import Array
from isocost.utils.artifact_store import Store


def paired_differences(
    first: SampleFeatures, second: SampleFeatures, reference: ReferenceSet, metrics: tuple[str, ...]
) -> dict[str, Interval]:
    """Score of `first` minus score of `second`, with 95 % intervals in which their shared noise cancels.

    Covers the metrics that have resamples and every score that is a mean of values per image.

    Returns:
        Column name -> difference.

    Raises:
        ValueError: the two do not hold the same sample indices.
    """
    if first.ids is not None and second.ids is not None and not np.array_equal(first.ids, second.ids):
        raise ValueError("paired differences need the same sample indices on both sides")
    ours, theirs = (Scorer(samples, reference, metrics).resamples() for samples in (first, second))
    return {name: resampled_difference(ours[name], theirs[name]) for name in ours if name in theirs}


def resampled_difference(first: Array, second: Array) -> Interval:
    """The first score minus the second, from the paired resamples [1 + R] of both."""
    return percentile_interval(first - second)


@dataclass(frozen=True)
class PointResamples:
    """The scores of a point in every bootstrap resample.

    Attributes:
        protocol: id of the protocol.
        num_images: number of sampled images.
        by_metric: float64 [1 + R] by column name; row 0 is the score itself.
    """

    protocol: str
    num_images: int
    by_metric: Mapping[str, Array]

    def minus(self, other: PointResamples) -> dict[str, Interval]:
        """Return the differences by metric; empty if the two are not paired: another protocol, or another number of images."""
        if (self.protocol, self.num_images) != (other.protocol, other.num_images):
            return {}
        shared = [name for name in self.by_metric if name in other.by_metric]
        return {name: resampled_difference(self.by_metric[name], other.by_metric[name]) for name in shared}


ReadResamples = Callable[[str], PointResamples | None]
"""Reads the stored resamples of a point, by its digest; None if it has none."""


@dataclass
class PairedComparer:
    """Paired differences between points.

    Attributes:
        stored: read the resamples of points from results databases.
        stores: output folders with the features of points whose resamples are not stored, as before version 0.2.
        reference: makes the reference set, which features need.
        metrics: names of `protocol.metrics`.
    """

    stored: tuple[ReadResamples, ...]
    stores: tuple[Store, ...]
    reference: Callable[[], ReferenceSet]
    metrics: tuple[str, ...]
    _resamples: dict[str, PointResamples | None] = field(default_factory=dict, init=False, repr=False)

    def resamples_of(self, point: str) -> PointResamples | None:
        """Return the resamples of a point, by its digest; None if neither its resamples nor its features are stored."""
        stored = self._stored(point)
        return self._from_features(point) if stored is None else stored

    def _stored(self, point: str) -> PointResamples | None:
        if point not in self._resamples:
            self._resamples[point] = next((found for read in self.stored if (found := read(point)) is not None), None)
        return self._resamples[point]

    def _store_of(self, point: str) -> Store | None:
        return next((store for store in self.stores if store.has("point", point)), None)

    def _from_features(self, point: str) -> PointResamples | None:
        store = self._store_of(point)
        if store is None:
            return None
        manifest, reference = store.manifest("point", point), self._reference
        samples = read_sample_features(store.open("point", point), tuple(reference.extractors))
        num_images = int(manifest["spec"]["num_images"])
        resamples = Scorer(samples, reference, self.metrics, num_images).resamples()
        self._resamples[point] = PointResamples(manifest["protocol"], num_images, resamples)
        return self._resamples[point]

    @cached_property
    def _reference(self) -> ReferenceSet:
        return self.reference()

    def differences(self, first: str, second: str) -> dict[str, Interval]:
        """Return the scores of the first point minus those of the second by metric; empty if the two are not paired."""
        if any(self._stored(point) is None and self._store_of(point) is None for point in (first, second)):
            return {}
        ours, theirs = self.resamples_of(first), self.resamples_of(second)
        return {} if ours is None or theirs is None else ours.minus(theirs)

    def difference(self, first: str, second: str, metric: str) -> Interval | None:
        """Return the score of the first point minus that of the second; None if the two are not paired in this metric."""
        return self.differences(first, second).get(metric)
