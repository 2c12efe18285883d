"""From images to scores: features as images come, then every distance with its interval.

Shapes: N images, M reference images, R resolution, D features.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from isocost.errors import RunError
from isocost.evaluation.confidence_intervals import (
    Interval,
    frechet_infinity_interval,
    frechet_interval,
    inception_score_interval,
    kernel_interval,
    mean_interval,
)
from isocost.evaluation.feature_batches import FixedBatchRunner, Function
from isocost.evaluation.feature_store import SampleFeatures
from isocost.evaluation.reference_set import ReferenceSet
from isocost.metrics.image_similarity import cosine, mean_cosine_to_set
from isocost.metrics.mmd import GAUSSIAN, POLYNOMIAL
from isocost.metrics.precision_recall import PRDC, compute_prdc
from isocost.metrics.registry import PREFERENCE, metrics_of

FRECHET_MIN_FRACTION = 2
"""A Frechet distance from fewer images than this times the feature width is flagged."""
_PROBE = "probe"
PRECISION_NEIGHBOUR, DENSITY_NEIGHBOUR = 3, 5
"""As published: arXiv 1904.06991 (section 3.1), arXiv 2002.09797 (section 5)."""


class FeatureCollector:
    """Takes images in any portions and order; `measured` gives what is kept of them in the order of image ids."""

    def __init__(self, reference: ReferenceSet) -> None:
        self._labels = reference.labels if reference.probe is not None else None
        functions: dict[str, Function] = dict(reference.extractors)
        if reference.probe is not None and self._labels is not None:
            functions[_PROBE] = reference.probe.predict
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

    def measured(self) -> SampleFeatures:
        """Everything added so far; whose images came when, and with which others, changes no bit of it."""
        ids, made = self._blocks.results()
        read = made.pop(_PROBE, None)
        alignment = None
        if read is not None and self._labels is not None:
            asked = self._labels[ids]
            found = (read == asked) & (asked >= 0)
            alignment = (found.sum(1).double() / (asked >= 0).sum(1)).numpy()
        _, compared = self._pairs.results()
        pairs = {name: values.double().numpy() for name, values in compared.items()}
        return SampleFeatures({name: rows.numpy() for name, rows in made.items()}, alignment, np.asarray(ids), pairs)


def score(measured: SampleFeatures, reference: ReferenceSet, metrics: tuple[str, ...]) -> dict[str, Interval]:
    """Every asked-for score by its metric name, each with a 95 % interval; a distance is taken on all features it fits.

    The squared MMD are unbiased at any N. The Frechet distance is biased up by about c/N (arXiv 1911.07023): compare at
    equal N only, see `frechet_is_biased`, or ask for `frechet_infinity`.

    Raises:
        RunError: an image equals its original, and a score of pairs has no end.
    """
    scores: dict[str, Interval] = {}
    for name, features in measured.features.items():
        for distance in metrics:
            metric_names = metrics_of(distance, name)
            if metric_names:
                found = _intervals(distance, name, features, measured.ids, reference)
                scores.update(zip(metric_names, found, strict=True))
    if measured.alignment is not None:
        scores["alignment"] = _mean(measured.alignment, reference)
    for name, values in measured.paired_metrics.items():
        if equal := int(np.isinf(values).sum()):
            raise RunError(
                f"{equal} images equal their originals, and their {name} has no end: take {name} out of paired_metrics"
            )
        scores[name] = _mean(values, reference)
    return scores


def wanted(reference: ReferenceSet, metrics: Iterable[str]) -> set[str]:
    """Names of all the scores that `score` gives a point."""
    names = {metric for distance in metrics for name in reference.extractors for metric in metrics_of(distance, name)}
    return names | set(reference.paired_metrics) | ({"alignment"} if reference.probe is not None else set())


def has_too_few_samples(num_images: int, reference: ReferenceSet, metrics: Iterable[str]) -> bool:
    """True where a point carries a Frechet distance from too few images."""
    widths = [extractor.width for extractor in reference.extractors.values()]
    return "frechet" in metrics and any(frechet_is_biased(num_images, width) for width in widths)


def frechet_is_biased(num_images: int, feature_width: int) -> bool:
    """True where a Frechet distance rests on too few images to be more than a comparison at equal N."""
    return num_images < FRECHET_MIN_FRACTION * feature_width


def _intervals(
    distance: str, name: str, features: np.ndarray, ids: np.ndarray | None, reference: ReferenceSet
) -> tuple[Interval, ...]:
    """The intervals of one distance on one extractor's features, in the order of its metric names."""
    real, seed = reference.features[name], reference.protocol.seed
    if distance in ("mmd", "cmmd"):
        kernel = POLYNOMIAL if distance == "mmd" else GAUSSIAN
        return (kernel_interval(features, reference.kernel(name, kernel)),)
    if distance == "frechet":
        return (frechet_interval(features, real, reference_moments=reference.moments(name)),)
    if distance == "frechet_infinity":
        return (frechet_infinity_interval(features, real, reference_moments=reference.moments(name), seed=seed),)
    if distance == "precision_recall":
        found = _reach(features, name, PRECISION_NEIGHBOUR, reference)
        return _mean(found.precision, reference), _mean(found.recall, reference)
    if distance == "density_coverage":
        found = _reach(features, name, DENSITY_NEIGHBOUR, reference)
        return _mean(found.density, reference), _mean(found.coverage, reference)
    if distance == "inception_score":
        logits = reference.logits(name, features)
        return (inception_score_interval(logits, num_bootstrap=reference.protocol.num_bootstrap, seed=seed),)
    if distance == "subject_similarity":
        return (_mean(mean_cosine_to_set(features, real), reference),)
    assert distance == "prompt_similarity", distance
    prompts = reference.prompt_features(name)
    told = cosine(features, prompts if ids is None else prompts[ids])
    return (_mean(told * (reference.clip(name).scale if name in PREFERENCE else 1.0), reference),)


def _reach(features: np.ndarray, name: str, neighbour: int, reference: ReferenceSet) -> PRDC:
    return compute_prdc(features, reference.features[name], neighbour=neighbour, radii_of_real=reference.radii(name, neighbour))


def _mean(values: np.ndarray, reference: ReferenceSet) -> Interval:
    return mean_interval(values, num_bootstrap=reference.protocol.num_bootstrap, seed=reference.protocol.seed)
