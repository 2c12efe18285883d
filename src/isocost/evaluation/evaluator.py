"""Score generated images: features are computed while the images arrive, then every metric with its interval.

Shapes: N images, M reference images, R resolution, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from isocost.errors import RunError
from isocost.evaluation.confidence_intervals import Interval, generated_counts, mean_resamples, percentile_interval
from isocost.evaluation.feature_batches import BatchFunction, FixedBatchRunner
from isocost.evaluation.feature_store import SampleFeatures
from isocost.evaluation.metric_registry import METRIC_GROUPS, MetricInputs, RegisteredMetric, metric_columns
from isocost.evaluation.reference_set import ReferenceSet
from isocost.metrics.arrays import Array

FRECHET_MIN_FRACTION = 2
"""A Frechet distance from fewer images than this times the feature width is flagged."""
_CLASSIFIER = "attribute_classifier"


class FeatureCollector:
    """Collects images in any order and grouping; `features` returns their features in the order of image ids.

    Args:
        reference: the protocol.
        extractors: names of the feature extractors to use; None for all of the protocol.
    """

    def __init__(self, reference: ReferenceSet, extractors: Sequence[str] | None = None) -> None:
        self._labels = reference.labels if reference.attribute_classifier is not None else None
        names = reference.extractors if extractors is None else extractors
        functions: dict[str, BatchFunction] = {name: reference.extractors[name] for name in names}
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
    return Scorer(samples, reference, metrics).intervals()


@dataclass
class Scorer:
    """Scores of generated images with their intervals and bootstrap resamples.

    Resamples of two points of equally many images draw the same image ids and the same reference images. The noise that the
    points share therefore cancels in the difference of their resamples (`evaluation/paired.py`).

    Attributes:
        samples: features, alignment and paired metrics of the images.
        reference: the protocol with the real images' features.
        metrics: names of `protocol.metrics`.
        num_images: number of sampled images; those that are not finite have no features. Default: the number of rows.
    """

    samples: SampleFeatures
    reference: ReferenceSet
    metrics: tuple[str, ...]
    num_images: int | None = None
    _resamples: dict[str, Array] = field(default_factory=dict, init=False, repr=False)
    _counts: dict[int, Array] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def _measured(self) -> list[tuple[RegisteredMetric, MetricInputs, tuple[str, ...]]]:
        """The metrics on the features of each extractor, with the columns that they fill."""
        samples = self.samples
        inputs = [MetricInputs(rows, name, samples.ids, self.reference) for name, rows in samples.features.items()]
        measured = [
            (METRIC_GROUPS[name], item, metric_columns(name, item.extractor)) for item in inputs for name in self.metrics
        ]
        return [(metric, item, columns) for metric, item, columns in measured if columns]

    @cached_property
    def _per_image(self) -> dict[str, np.ndarray]:
        """Scores that every image has, float64 [N] by column name."""
        values = dict(self.samples.paired_metrics)
        for name, column in values.items():
            if num_equal := int(np.isinf(column).sum()):
                raise RunError(
                    f"{num_equal} images are identical to their originals, so their {name} is infinite: remove {name} from "
                    "protocol.paired_metrics"
                )
        return values if self.samples.alignment is None else {"alignment": self.samples.alignment, **values}

    def intervals(self) -> dict[str, Interval]:
        """Return the scores with their 95 % intervals by column name.

        Raises:
            RunError: an image equals its original, so its PSNR is infinite.
        """
        scores: dict[str, Interval] = {}
        for metric, inputs, columns in self._measured:
            if metric.intervals is None:
                scores.update({name: percentile_interval(self._resampled(metric, inputs, columns)[name]) for name in columns})
            else:
                scores.update(zip(columns, metric.intervals(inputs), strict=True))
        return scores | {name: percentile_interval(self._resampled_mean(name)) for name in self._per_image}

    def resamples(self) -> dict[str, Array]:
        """Return the score of every bootstrap resample, float64 [1 + R] by column name; row 0 is the score itself.

        Metrics without resamples are left out.

        Raises:
            RunError: an image equals its original, so its PSNR is infinite.
        """
        resampled: dict[str, Array] = {}
        for metric, inputs, columns in self._measured:
            if metric.resamples is not None:
                resampled |= self._resampled(metric, inputs, columns)
        return resampled | {name: self._resampled_mean(name) for name in self._per_image}

    def _resampled(self, metric: RegisteredMetric, inputs: MetricInputs, columns: tuple[str, ...]) -> dict[str, Array]:
        if columns[0] not in self._resamples:
            assert metric.resamples is not None, "without resamples a metric has intervals of its own"
            values = np.atleast_2d(metric.resamples(inputs, self._counts_of(len(inputs.features))))
            self._resamples.update(zip(columns, values, strict=True))
        return {name: self._resamples[name] for name in columns}

    def _resampled_mean(self, name: str) -> Array:
        if name not in self._resamples:
            values = self._per_image[name]
            self._resamples[name] = mean_resamples(values, self._counts_of(len(values)))
        return self._resamples[name]

    def _counts_of(self, num_rows: int) -> Array:
        """How often each resample contains each row, [1 + R, N]."""
        if num_rows not in self._counts:
            num_images, protocol, ids = self.num_images or num_rows, self.reference.protocol, self.samples.ids
            counts = generated_counts(num_images, protocol.num_bootstrap, protocol.seed)
            self._counts[num_rows] = counts if num_rows == num_images or ids is None else counts[:, ids]
        return self._counts[num_rows]


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
