"""From pictures to scores: features as pictures come, then every distance with its interval.

Shapes: N pictures, M reference pictures, R resolution, D features.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from isocost.errors import WorkError
from isocost.metrics.distances import GAUSSIAN, POLYNOMIAL
from isocost.metrics.likeness import cosine
from isocost.metrics.names import PREFERENCE, metrics_of
from isocost.metrics.neighbours import reach
from isocost.score.intervals import (
    Interval,
    frechet_infinity_interval,
    frechet_interval,
    inception_score_interval,
    kernel_interval,
    mean_interval,
)
from isocost.score.kept import Measured
from isocost.score.reference import Reference

FRECHET_LEAST_SHARE = 2
"""A Frechet distance from fewer pictures than this times the feature width is flagged."""
PRECISION_NEIGHBOUR, DENSITY_NEIGHBOUR = 3, 5
"""As published: arXiv 1904.06991 (section 3.1), arXiv 2002.09797 (section 5)."""


@dataclass
class Measuring:
    """Takes pictures in any order and any batches; `measured` gives them back in the order of picture ids."""

    reference: Reference
    _ids: list[int] = field(default_factory=list)
    _features: dict[str, list[Tensor]] = field(default_factory=dict)
    _alignment: list[np.ndarray] = field(default_factory=list)

    def add(self, picture_ids: list[int], pictures: Tensor) -> None:
        """uint8 [N, 3, R, R] with their ids, which index the reference's captions and labels."""
        self._ids.extend(picture_ids)
        for name, extractor in self.reference.extractors.items():
            self._features.setdefault(name, []).append(extractor(pictures).cpu())
        if self.reference.probe is not None and self.reference.labels is not None:
            self._alignment.append(self.reference.probe.alignment(pictures, self.reference.labels[picture_ids]))

    def measured(self) -> Measured:
        """Everything added so far, sorted by picture id, so that sums do not depend on the order of arrival.

        Raises:
            WorkError: a picture id came twice.
        """
        order = np.argsort(self._ids, kind="stable")
        ids = np.asarray(self._ids)[order]
        if len(np.unique(ids)) < len(ids):
            raise WorkError(f"picture {ids[:-1][ids[:-1] == ids[1:]][0]} was measured twice")
        alignment = np.concatenate(self._alignment)[order] if self._alignment else None
        return Measured({name: torch.cat(parts).numpy()[order] for name, parts in self._features.items()}, alignment)


def gather(parts: Iterable[Measuring]) -> Measured:
    """What several workers measured, as one: the same numbers whoever measured which picture."""
    first, *others = parts
    whole = Measuring(first.reference)
    for part in (first, *others):
        whole._ids.extend(part._ids)
        whole._alignment.extend(part._alignment)
        for name, features in part._features.items():
            whole._features.setdefault(name, []).extend(features)
    return whole.measured()


def score(measured: Measured, reference: Reference, distances: tuple[str, ...]) -> dict[str, Interval]:
    """Every asked-for score by its metric name, each with a 95 % interval; a distance is taken on all features it fits.

    The kernel distances are unbiased at any N. The Frechet distance is biased up by about c/N (arXiv 1911.07023): compare at
    equal N only, see `frechet_is_flagged`, or ask for `frechet_infinity`.
    """
    scores: dict[str, Interval] = {}
    for name, features in measured.features.items():
        for distance in distances:
            metrics = metrics_of(distance, name)
            if metrics:
                found = _intervals(distance, name, features, reference)
                scores.update(zip(metrics, found, strict=True))
    if measured.alignment is not None:
        scores["alignment"] = _mean(measured.alignment, reference)
    return scores


def wanted(reference: Reference, distances: Iterable[str]) -> set[str]:
    """Names of all the scores that `score` gives a point."""
    names = {metric for distance in distances for name in reference.extractors for metric in metrics_of(distance, name)}
    return names | ({"alignment"} if reference.probe is not None else set())


def is_flagged(num_pictures: int, reference: Reference, distances: Iterable[str]) -> bool:
    """True where a point carries a Frechet distance from too few pictures."""
    widths = [extractor.width for extractor in reference.extractors.values()]
    return "frechet" in distances and any(frechet_is_flagged(num_pictures, width) for width in widths)


def frechet_is_flagged(num_pictures: int, feature_width: int) -> bool:
    """True where a Frechet distance rests on too few pictures to be more than a comparison at equal N."""
    return num_pictures < FRECHET_LEAST_SHARE * feature_width


def _intervals(distance: str, name: str, features: np.ndarray, reference: Reference) -> tuple[Interval, ...]:
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
        found = reach(features, real, neighbour=PRECISION_NEIGHBOUR)
        return _mean(found.precision, reference), _mean(found.recall, reference)
    if distance == "density_coverage":
        found = reach(features, real, neighbour=DENSITY_NEIGHBOUR)
        return _mean(found.density, reference), _mean(found.coverage, reference)
    if distance == "inception_score":
        logits = reference.inception.logits(features)
        return (inception_score_interval(logits, num_bootstrap=reference.protocol.num_bootstrap, seed=seed),)
    assert distance == "caption", distance
    told = cosine(features, reference.caption_features(name))
    return (_mean(told * (reference.clip(name).scale if name in PREFERENCE else 1.0), reference),)


def _mean(values: np.ndarray, reference: Reference) -> Interval:
    return mean_interval(values, num_bootstrap=reference.protocol.num_bootstrap, seed=reference.protocol.seed)
