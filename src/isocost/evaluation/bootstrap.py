"""A score for every bootstrap resample: the basis of intervals for differences, fitted curves and choices.

Resamples of two sets with the same sample indices draw the same indices, so they are paired row by row.

Shapes: N images, R resamples; row 0 of [1 + R] is the score itself.
"""

from __future__ import annotations

import numpy as np

from isocost.errors import ConfigError
from isocost.evaluation.confidence_intervals import generated_counts, mean_resamples
from isocost.evaluation.feature_store import SampleFeatures
from isocost.evaluation.metric_registry import METRIC_GROUPS, PER_IMAGE_METRICS, MetricInputs, metric_columns, metric_of
from isocost.evaluation.reference_set import ReferenceSet
from isocost.metrics.arrays import Array
from isocost.metrics.feature_extractors import EXTRACTORS


def _resampled_columns() -> dict[str, tuple[str, str]]:
    """Column -> (metric, extractor) for the metrics on features that have resamples."""
    return {
        column: (name, extractor)
        for extractor in EXTRACTORS
        for name, group in METRIC_GROUPS.items()
        if group.resamples is not None
        for column in metric_columns(name, extractor)
    }


def check_resampled(metric: str) -> None:
    """
    Raises:
        ConfigError: the metric is unknown or has no resamples, so the guidance search cannot use it.
    """
    metric_of(metric)
    columns = _resampled_columns()
    if metric not in PER_IMAGE_METRICS and metric not in columns:
        known = ", ".join((*PER_IMAGE_METRICS, *list(columns)[:4]))
        raise ConfigError(
            f"{metric}: has no paired resamples, so paired decisions and the guidance search cannot use it; take "
            f"one of {known}, ..."
        )


def extractors_of(metric: str, reference: ReferenceSet) -> tuple[str, ...]:
    """The feature extractors that the resamples of the column `metric` need: one, or none for a score that every image has.

    Raises:
        ConfigError: the metric has no resamples, or the protocol does not measure it.
    """
    check_resampled(metric)
    if metric in PER_IMAGE_METRICS:
        return ()
    extractor = _resampled_columns()[metric][1]
    if extractor not in reference.extractors:
        raise _not_measured(metric)
    return (extractor,)


def _not_measured(metric: str) -> ConfigError:
    return ConfigError(
        f"{metric}: the protocol does not measure it; see protocol.features, protocol.alignment and protocol.paired_metrics"
    )


def resamples(samples: SampleFeatures, num_images: int, metric: str, reference: ReferenceSet) -> Array:
    """The score of images 0 to `num_images` - 1 for every bootstrap resample.

    Images whose pixels were not finite have no features and are left out. The Fréchet distance is resampled to first order
    (`influence_resamples`).

    Returns:
        float64 [1 + R].

    Raises:
        ConfigError: the metric has no resamples, or the protocol does not measure it.
    """
    protocol = reference.protocol
    indices = np.arange(num_images) if samples.ids is None else samples.ids[samples.ids < num_images]
    counts = generated_counts(num_images, protocol.num_bootstrap, protocol.seed)[:, indices]
    per_image = {"alignment": samples.alignment, **samples.paired_metrics}
    if (values := per_image.get(metric)) is not None:
        return mean_resamples(values[: len(indices)], counts)
    check_resampled(metric)
    group, extractor = _resampled_columns().get(metric, ("", ""))
    if extractor not in samples.features:
        raise _not_measured(metric)
    make_resamples = METRIC_GROUPS[group].resamples
    assert make_resamples is not None, "only metrics with resamples are listed"
    features = samples.features[extractor][: len(indices)]
    values = np.atleast_2d(make_resamples(MetricInputs(features, extractor, indices, reference), counts))
    return values[metric_columns(group, extractor).index(metric)]
