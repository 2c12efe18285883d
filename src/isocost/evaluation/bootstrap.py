"""A score for every bootstrap resample: what intervals of differences, of fitted curves and of choices are made from.

Resamples of two sets of the same pictures draw the same ids, so they are paired row by row.

Shapes: N pictures, D features, R resamples; row 0 of [1 + R] is the score itself.
"""

from __future__ import annotations

from typing import get_args

import numpy as np

from isocost.config.evaluation import FeatureName
from isocost.errors import RequestError
from isocost.evaluation.confidence_intervals import (
    frechet_resamples,
    generated_counts,
    kernel_resamples,
    mean_resamples,
    reference_counts,
)
from isocost.evaluation.feature_store import Measured
from isocost.evaluation.reference_set import Reference
from isocost.metrics.arrays import Array
from isocost.metrics.image_similarity import cosine
from isocost.metrics.mmd import GAUSSIAN, POLYNOMIAL
from isocost.metrics.registry import PREFERENCE, metric_of, metrics_of

BY_PICTURE = ("alignment", "psnr", "ssim", "lpips")
_DISTANCES = {
    metric: (distance, name)
    for name in get_args(FeatureName)
    for distance in ("kernel", "cmmd", "frechet", "caption")
    for metric in metrics_of(distance, name)
}
"""Distance and extractor of the metrics that have resamples, beside those that pictures have one by one."""


def check_resampled(metric: str) -> None:
    """Raise RequestError where a metric has no resamples."""
    metric_of(metric)
    if metric not in BY_PICTURE and metric not in _DISTANCES:
        known = ", ".join((*BY_PICTURE, *list(_DISTANCES)[:4]))
        raise RequestError(f"{metric}: has no paired resamples, so nothing can be raced by it; take one of {known}, ...")


def resamples(measured: Measured, num_pictures: int, metric: str, reference: Reference) -> Array:
    """The metric of pictures 0 to `num_pictures` - 1 for every resample, [1 + R]; pictures that were not kept are left out.

    The Frechet distance is taken to first order, see `frechet_resamples`.

    Raises:
        RequestError: the metric has no resamples, or the pictures were not measured for it.
    """
    of = reference.protocol
    ids = np.arange(num_pictures) if measured.ids is None else measured.ids[measured.ids < num_pictures]
    counts = generated_counts(num_pictures, of.num_bootstrap, of.seed)[:, ids]
    by_picture = {"alignment": measured.alignment, **measured.pairs}
    if (values := by_picture.get(metric)) is not None:
        return mean_resamples(values[: len(ids)], counts)
    check_resampled(metric)
    distance, name = _DISTANCES.get(metric, ("", ""))
    if name not in measured.features:
        raise RequestError(f"{metric}: the protocol does not measure it; see protocol.features, protocol.alignment and pairs")
    features = measured.features[name][: len(ids)]
    if distance == "frechet":
        real = reference.features[name]
        drawn = reference_counts(len(real), of.num_bootstrap, of.seed)
        return frechet_resamples(features, counts, real, reference.moments(name), drawn)
    if distance == "caption":
        told = cosine(features, reference.caption_features(name)[ids])
        return mean_resamples(told * (reference.clip(name).scale if name in PREFERENCE else 1.0), counts)
    return kernel_resamples(features, counts, reference.kernel(name, POLYNOMIAL if distance == "kernel" else GAUSSIAN))
