"""From pictures to scores: features as pictures come, then every distance with its interval.

Shapes: N pictures, R resolution, D features.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from isocost.score.intervals import Interval, frechet_interval, kernel_interval, mean_interval
from isocost.score.reference import Reference

FRECHET_LEAST_SHARE = 2
"""A Frechet distance from fewer pictures than this times the feature width is flagged."""


@dataclass
class Measured:
    """What is kept of a point's pictures: features float32 [N, D] and the share of labels found in each, float64 [N]."""

    features: np.ndarray
    alignment: np.ndarray | None


@dataclass
class Measuring:
    """Takes pictures in any order and any batches; `measured` gives them back in the order of picture ids."""

    reference: Reference
    _ids: list[int] = field(default_factory=list)
    _features: list[Tensor] = field(default_factory=list)
    _alignment: list[np.ndarray] = field(default_factory=list)

    def add(self, picture_ids: list[int], pictures: Tensor) -> None:
        """uint8 [N, 3, R, R] with their ids, which index the reference's captions and labels."""
        self._ids.extend(picture_ids)
        self._features.append(self.reference.extractor(pictures).cpu())
        if self.reference.probe is not None and self.reference.labels is not None:
            self._alignment.append(self.reference.probe.alignment(pictures, self.reference.labels[picture_ids]))

    def measured(self) -> Measured:
        """Everything added so far, sorted by picture id, so that sums do not depend on the order of arrival."""
        order = np.argsort(self._ids, kind="stable")
        alignment = np.concatenate(self._alignment)[order] if self._alignment else None
        return Measured(torch.cat(self._features).numpy()[order], alignment)


def score(measured: Measured, reference: Reference, distances: tuple[str, ...]) -> dict[str, Interval]:
    """Every asked-for score by its metric name, each with a 95 % interval.

    The kernel distance is unbiased at any N. The Frechet distance is biased up by about c/N (arXiv 1911.07023): compare at
    equal N only, and see `frechet_is_flagged`.
    """
    protocol = reference.protocol
    scores: dict[str, Interval] = {}
    if "kernel" in distances:
        scores["kernel_efficientnet"] = kernel_interval(measured.features, reference.kernel)
    if "frechet" in distances:
        scores["frechet_efficientnet"] = frechet_interval(
            measured.features, reference.features, reference_moments=reference.moments
        )
    if measured.alignment is not None:
        scores["alignment"] = mean_interval(measured.alignment, num_bootstrap=protocol.num_bootstrap, seed=protocol.seed)
    return scores


def frechet_is_flagged(num_pictures: int, feature_width: int) -> bool:
    """True where a Frechet distance rests on too few pictures to be more than a comparison at equal N."""
    return num_pictures < FRECHET_LEAST_SHARE * feature_width
