"""From pictures to scores: features as pictures come, then every distance with its interval.

Shapes: N pictures, M reference pictures, R resolution, D features.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from isocost.errors import WorkError
from isocost.evaluation.confidence_intervals import (
    Interval,
    frechet_infinity_interval,
    frechet_interval,
    inception_score_interval,
    kernel_interval,
    mean_interval,
)
from isocost.evaluation.feature_batches import Blocks, Function
from isocost.evaluation.feature_store import Measured
from isocost.evaluation.reference_set import Reference
from isocost.metrics.image_similarity import cosine, mean_cosine_to_set
from isocost.metrics.mmd import GAUSSIAN, POLYNOMIAL
from isocost.metrics.precision_recall import Reach, reach
from isocost.metrics.registry import PREFERENCE, metrics_of

FRECHET_LEAST_SHARE = 2
"""A Frechet distance from fewer pictures than this times the feature width is flagged."""
_PROBE = "probe"
PRECISION_NEIGHBOUR, DENSITY_NEIGHBOUR = 3, 5
"""As published: arXiv 1904.06991 (section 3.1), arXiv 2002.09797 (section 5)."""


class Measuring:
    """Takes pictures in any portions and order; `measured` gives what is kept of them in the order of picture ids."""

    def __init__(self, reference: Reference) -> None:
        self._labels = reference.labels if reference.probe is not None else None
        functions: dict[str, Function] = dict(reference.extractors)
        if reference.probe is not None and self._labels is not None:
            functions[_PROBE] = reference.probe.predict
        self._blocks = Blocks(functions)
        self._originals, self._pairs = reference.originals, Blocks(reference.pairs)

    def add(self, picture_ids: list[int], pictures: Tensor) -> None:
        """uint8 [N, 3, R, R] with their ids, which index the reference's captions and labels.

        Raises:
            WorkError: a picture id came twice.
        """
        for picture_id, picture in zip(picture_ids, pictures, strict=True):
            self._blocks.add(picture_id, picture)
            if self._originals is not None:
                self._pairs.add(picture_id, torch.cat([picture, self._originals[picture_id]]))

    def measured(self) -> Measured:
        """Everything added so far; whose pictures came when, and with which others, changes no bit of it."""
        ids, made = self._blocks.results()
        read = made.pop(_PROBE, None)
        alignment = None
        if read is not None and self._labels is not None:
            asked = self._labels[ids]
            found = (read == asked) & (asked >= 0)
            alignment = (found.sum(1).double() / (asked >= 0).sum(1)).numpy()
        _, compared = self._pairs.results()
        pairs = {name: values.double().numpy() for name, values in compared.items()}
        return Measured({name: rows.numpy() for name, rows in made.items()}, alignment, np.asarray(ids), pairs)


def score(measured: Measured, reference: Reference, distances: tuple[str, ...]) -> dict[str, Interval]:
    """Every asked-for score by its metric name, each with a 95 % interval; a distance is taken on all features it fits.

    The kernel distances are unbiased at any N. The Frechet distance is biased up by about c/N (arXiv 1911.07023): compare at
    equal N only, see `frechet_is_flagged`, or ask for `frechet_infinity`.

    Raises:
        WorkError: a picture equals its original, and a score of pairs has no end.
    """
    scores: dict[str, Interval] = {}
    for name, features in measured.features.items():
        for distance in distances:
            metrics = metrics_of(distance, name)
            if metrics:
                found = _intervals(distance, name, features, measured.ids, reference)
                scores.update(zip(metrics, found, strict=True))
    if measured.alignment is not None:
        scores["alignment"] = _mean(measured.alignment, reference)
    for name, values in measured.pairs.items():
        if equal := int(np.isinf(values).sum()):
            raise WorkError(f"{equal} pictures equal their originals, and their {name} has no end: take {name} out of pairs")
        scores[name] = _mean(values, reference)
    return scores


def wanted(reference: Reference, distances: Iterable[str]) -> set[str]:
    """Names of all the scores that `score` gives a point."""
    names = {metric for distance in distances for name in reference.extractors for metric in metrics_of(distance, name)}
    return names | set(reference.pairs) | ({"alignment"} if reference.probe is not None else set())


def is_flagged(num_pictures: int, reference: Reference, distances: Iterable[str]) -> bool:
    """True where a point carries a Frechet distance from too few pictures."""
    widths = [extractor.width for extractor in reference.extractors.values()]
    return "frechet" in distances and any(frechet_is_flagged(num_pictures, width) for width in widths)


def frechet_is_flagged(num_pictures: int, feature_width: int) -> bool:
    """True where a Frechet distance rests on too few pictures to be more than a comparison at equal N."""
    return num_pictures < FRECHET_LEAST_SHARE * feature_width


def _intervals(
    distance: str, name: str, features: np.ndarray, ids: np.ndarray | None, reference: Reference
) -> tuple[Interval, ...]:
    """The intervals of one distance on one extractor's features, in the order of its metric names."""
    real, seed = reference.features[name], reference.protocol.seed
    if distance in ("kernel", "cmmd"):
        kernel = POLYNOMIAL if distance == "kernel" else GAUSSIAN
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
    if distance == "subject":
        return (_mean(mean_cosine_to_set(features, real), reference),)
    assert distance == "caption", distance
    captions = reference.caption_features(name)
    told = cosine(features, captions if ids is None else captions[ids])
    return (_mean(told * (reference.clip(name).scale if name in PREFERENCE else 1.0), reference),)


def _reach(features: np.ndarray, name: str, neighbour: int, reference: Reference) -> Reach:
    return reach(features, reference.features[name], neighbour=neighbour, radii_of_real=reference.radii(name, neighbour))


def _mean(values: np.ndarray, reference: Reference) -> Interval:
    return mean_interval(values, num_bootstrap=reference.protocol.num_bootstrap, seed=reference.protocol.seed)
