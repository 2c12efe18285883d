"""Score generated images: features are computed while the images arrive, then every metric with its interval.

Shapes: N images, M reference images, R resolution, D features.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from isocost.errors import RunError
from isocost.evaluation.confidence_intervals import Interval
from isocost.evaluation.feature_batches import BatchFunction, FixedBatchRunner
from isocost.evaluation.feature_store import SampleFeatures
from isocost.evaluation.metric_registry import METRIC_GROUPS, MetricInputs, mean_of, metric_columns
from isocost.evaluation.reference_set import ReferenceSet

FRECHET_MIN_FRACTION = 2
"""A Frechet distance from fewer images than this times the feature width is flagged."""
_CLASSIFIER = "attribute_classifier"


class FeatureCollector:
    """Collects images in any order and grouping; `features` returns their features in the order of image ids."""

    def __init__(self, reference: ReferenceSet) -> None:
        self._labels = reference.labels if reference.attribute_classifier is not None else None
        functions: dict[str, BatchFunction] = dict(reference.extractors)
        if reference.attribute_classifier is not None and self._labels is not None:
            functions[_CLASSIFIER] = reference.attribute_classifier.predict
        self._blocks = FixedBatchRunner(functions)
        self._originals, self._pairs = reference.originals, FixedBatchRunner(reference.paired_metrics)

    def add(self, sample_indices: list[int], images: Tensor) -> None:
        """uint8 [N, 3, R, R] with their ids, which index the reference's captions and labels.

        Raises:
            RunError: an image id came twice.
        """
        for sample_index, image in zip(sample_indices, images, strict=True):
            self._blocks.add(sample_index, image)
            if self._originals is not None:
                self._pairs.add(sample_index, torch.cat([image, self._originals[sample_index]]))

    def features(self) -> SampleFeatures:
        """Features and scores of the images added so far. The order and grouping of the `add` calls changes no bit of them."""
        ids, outputs = self._blocks.results()
        predicted = outputs.pop(_CLASSIFIER, None)
        alignment = None
        if predicted is not None and self._labels is not None:
            labels = self._labels[ids]
            is_correct = (predicted == labels) & (labels >= 0)
            alignment = (is_correct.sum(1).double() / (labels >= 0).sum(1)).numpy()
        _, similarities = self._pairs.results()
        pairs = {name: values.double().numpy() for name, values in similarities.items()}
        return SampleFeatures({name: rows.numpy() for name, rows in outputs.items()}, alignment, np.asarray(ids), pairs)


def score(samples: SampleFeatures, reference: ReferenceSet, metrics: tuple[str, ...]) -> dict[str, Interval]:
    """Score generated images.

    Args:
        samples: features, alignment and paired metrics of the images.
        reference: the protocol with the real images' features.
        metrics: names of `protocol.metrics`; each is computed on the features of every extractor that it fits. The squared MMD
            is unbiased at any N. The Fréchet distance is biased up by about c/N (arXiv 1911.07023): compare it at equal N
            only (`frechet_is_biased`), or use `frechet_infinity`.

    Returns:
        Column name -> score with its 95 % interval.

    Raises:
        RunError: an image equals its original, so its PSNR is infinite.
    """
    scores: dict[str, Interval] = {}
    for extractor, features in samples.features.items():
        inputs = MetricInputs(features, extractor, samples.ids, reference)
        for group in metrics:
            if columns := metric_columns(group, extractor):
                scores.update(zip(columns, METRIC_GROUPS[group].intervals(inputs), strict=True))
    if samples.alignment is not None:
        scores["alignment"] = mean_of(samples.alignment, reference)
    for name, values in samples.paired_metrics.items():
        if num_equal := int(np.isinf(values).sum()):
            raise RunError(
                f"{num_equal} images are identical to their originals, so their {name} is infinite: remove {name} from "
                "protocol.paired_metrics"
            )
        scores[name] = mean_of(values, reference)
    return scores


def metric_names(reference: ReferenceSet, metrics: Iterable[str]) -> set[str]:
    """Names of all columns that `score` fills."""
    names = {column for group in metrics for extractor in reference.extractors for column in metric_columns(group, extractor)}
    return names | set(reference.paired_metrics) | ({"alignment"} if reference.attribute_classifier is not None else set())


def has_too_few_samples(num_images: int, reference: ReferenceSet, metrics: Iterable[str]) -> bool:
    """Whether a point has a Fréchet distance from too few images."""
    widths = [extractor.feature_dim for extractor in reference.extractors.values()]
    return "frechet" in metrics and any(frechet_is_biased(num_images, width) for width in widths)


def frechet_is_biased(num_images: int, feature_width: int) -> bool:
    """Whether there are so few images that Fréchet distances may only be compared at equal N."""
    return num_images < FRECHET_MIN_FRACTION * feature_width
