"""A score for every bootstrap resample: what intervals of differences, of fitted curves and of choices are made from.

Resamples of two sets of the same images draw the same ids, so they are paired row by row.

Shapes: N images, D features, R resamples; row 0 of [1 + R] is the score itself.
"""

from __future__ import annotations

from typing import get_args

import numpy as np

from isocost.config.evaluation import ExtractorName
from isocost.errors import ConfigError
from isocost.evaluation.confidence_intervals import (
    frechet_resamples,
    generated_counts,
    kernel_resamples,
    mean_resamples,
    reference_counts,
)
from isocost.evaluation.feature_store import SampleFeatures
from isocost.evaluation.reference_set import ReferenceSet
from isocost.metrics.arrays import Array
from isocost.metrics.image_similarity import cosine
from isocost.metrics.mmd import GAUSSIAN, POLYNOMIAL
from isocost.metrics.registry import PREFERENCE, metric_of, metrics_of

PER_IMAGE_METRICS = ("alignment", "psnr", "ssim", "lpips")
_DISTANCES = {
    metric: (distance, name)
    for name in get_args(ExtractorName)
    for distance in ("mmd", "cmmd", "frechet", "prompt_similarity")
    for metric in metrics_of(distance, name)
}
"""Distance and extractor of the metrics that have resamples, beside those that images have one by one."""


def check_resampled(metric: str) -> None:
    """Raise ConfigError where a metric has no resamples."""
    metric_of(metric)
    if metric not in PER_IMAGE_METRICS and metric not in _DISTANCES:
        known = ", ".join((*PER_IMAGE_METRICS, *list(_DISTANCES)[:4]))
        raise ConfigError(f"{metric}: has no paired resamples, so nothing can be raced by it; take one of {known}, ...")


def resamples(measured: SampleFeatures, num_images: int, metric: str, reference: ReferenceSet) -> Array:
    """The metric of images 0 to `num_images` - 1 for every resample, [1 + R]; images that were not kept are left out.

    The Frechet distance is taken to first order, see `frechet_resamples`.

    Raises:
        ConfigError: the metric has no resamples, or the images were not measured for it.
    """
    of = reference.protocol
    ids = np.arange(num_images) if measured.ids is None else measured.ids[measured.ids < num_images]
    counts = generated_counts(num_images, of.num_bootstrap, of.seed)[:, ids]
    by_image = {"alignment": measured.alignment, **measured.paired_metrics}
    if (values := by_image.get(metric)) is not None:
        return mean_resamples(values[: len(ids)], counts)
    check_resampled(metric)
    distance, name = _DISTANCES.get(metric, ("", ""))
    if name not in measured.features:
        raise ConfigError(
            f"{metric}: the protocol does not measure it; see protocol.features, protocol.alignment and paired_metrics"
        )
    features = measured.features[name][: len(ids)]
    if distance == "frechet":
        real = reference.features[name]
        drawn = reference_counts(len(real), of.num_bootstrap, of.seed)
        return frechet_resamples(features, counts, real, reference.moments(name), drawn)
    if distance == "prompt_similarity":
        told = cosine(features, reference.prompt_features(name)[ids])
        return mean_resamples(told * (reference.clip(name).scale if name in PREFERENCE else 1.0), counts)
    return kernel_resamples(features, counts, reference.kernel(name, POLYNOMIAL if distance == "mmd" else GAUSSIAN))
