"""Differences between the scores of two sets of images. Image i of both has the same noise, caption or original.

Shapes: N images, D features.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from isocost.evaluation.confidence_intervals import Interval
from isocost.evaluation.feature_store import SampleFeatures, read_sample_features
from isocost.evaluation.metric_registry import METRIC_GROUPS, MetricInputs, mean_of, metric_columns
from isocost.evaluation.reference_set import ReferenceSet
from isocost.utils.artifact_store import Store


def paired_differences(
    first: SampleFeatures, second: SampleFeatures, reference: ReferenceSet, metrics: tuple[str, ...]
) -> dict[str, Interval]:
    """Score of `first` minus score of `second`, with 95 % intervals in which their shared noise cancels.

    Covers the metrics that have a paired difference and every score that is a mean of values per image.

    Returns:
        Column name -> difference.

    Raises:
        ValueError: the two do not hold the same sample indices.
    """
    if first.ids is not None and second.ids is not None and not np.array_equal(first.ids, second.ids):
        raise ValueError("paired differences need the same sample indices on both sides")
    differences: dict[str, Interval] = {}
    for extractor, features in first.features.items():
        inputs = MetricInputs(features, extractor, first.ids, reference)
        others = MetricInputs(second.features[extractor], extractor, second.ids, reference)
        for name in metrics:
            difference = METRIC_GROUPS[name].difference
            if difference is not None:
                differences |= {column: difference(inputs, others) for column in metric_columns(name, extractor)}
    per_image = {name: (values, second.paired_metrics[name]) for name, values in first.paired_metrics.items()}
    if first.alignment is not None and second.alignment is not None:
        per_image["alignment"] = (first.alignment, second.alignment)
    return differences | {name: mean_of(ours - theirs, reference) for name, (ours, theirs) in per_image.items()}


@dataclass
class PairedComparer:
    """Paired differences between points under one protocol, from the stored features of output folders."""

    stores: tuple[Store, ...]
    reference: ReferenceSet
    metrics: tuple[str, ...]
    _features: dict[str, SampleFeatures] = field(default_factory=dict)

    def has_features(self, point: str) -> bool:
        """Whether one of the output folders has the features of a point. An archive does not contain them."""
        return any(store.has("point", point) for store in self.stores)

    def features_of(self, point: str) -> SampleFeatures:
        """The features of a point, by its digest."""
        if point not in self._features:
            store = next((store for store in self.stores if store.has("point", point)), self.stores[0])
            folder = store.open("point", point)
            self._features[point] = read_sample_features(folder, tuple(self.reference.extractors))
        return self._features[point]

    def differences(self, first: SampleFeatures, second: SampleFeatures) -> dict[str, Interval]:
        """The scores of `first` minus those of `second`, by metric."""
        return paired_differences(first, second, self.reference, self.metrics)

    def difference(self, first: str, second: str, metric: str) -> Interval | None:
        """The score of the first point minus that of the second.

        Returns:
            None if the metric has no paired interval, or the features of a point are not stored.
        """
        if not (self.has_features(first) and self.has_features(second)):
            return None
        return self.differences(self.features_of(first), self.features_of(second)).get(metric)
