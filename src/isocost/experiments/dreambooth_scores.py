"""Scores over the images of several subjects together, and what tuning changed, with intervals that resample images.

Shapes: N images of all subjects, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isocost.analysis.formatting import format_score
from isocost.evaluation.confidence_intervals import Interval, mean_interval
from isocost.evaluation.feature_store import SampleFeatures, read_measured
from isocost.evaluation.paired import paired_differences
from isocost.evaluation.reference_set import ReferenceSet
from isocost.metrics.image_similarity import cosine, mean_cosine_to_set
from isocost.metrics.registry import SUBJECT, metrics_of
from isocost.metrics.vit import CLIPFeatureExtractor
from isocost.utils.artifact_store import Store


@dataclass(frozen=True)
class SubjectScores:
    """Of points of one setting, one of each subject, in the order of `references`."""

    store: Store
    references: tuple[ReferenceSet, ...]
    metrics: tuple[str, ...]
    num_bootstrap: int
    seed: int

    def by_image(self, points: Sequence[str]) -> dict[str, np.ndarray]:
        """What images have one by one, float64 [N] by metric."""
        told: dict[str, list[np.ndarray]] = {}
        for point, reference in zip(points, self.references, strict=True):
            measured = self._measured(point, reference)
            for name, features in measured.features.items():
                if name in SUBJECT and "subject_similarity" in self.metrics:
                    told.setdefault(SUBJECT[name], []).append(mean_cosine_to_set(features, reference.features[name]))
                if isinstance(reference.extractors[name], CLIPFeatureExtractor) and "prompt_similarity" in self.metrics:
                    (metric,) = metrics_of("prompt_similarity", name)
                    prompts = reference.prompt_features(name)[measured.ids]
                    told.setdefault(metric, []).append(cosine(features, prompts))
            if measured.alignment is not None:
                told.setdefault("alignment", []).append(measured.alignment)
        return {metric: np.concatenate(values) for metric, values in told.items()}

    def means(self, points: Sequence[str]) -> dict[str, float]:
        """The columns of a table's row: mean and ends of its interval."""
        means: dict[str, float] = {}
        for metric, values in self.by_image(points).items():
            interval = self._mean(values)
            means |= {metric: interval.value, f"{metric}_low": interval.low, f"{metric}_high": interval.high}
        return means

    def difference_between(self, ours: Sequence[str], theirs: Sequence[str]) -> dict[str, str]:
        """Paired differences, image by image."""
        one, other = self.by_image(ours), self.by_image(theirs)
        return {metric: _worded(self._mean(values - other[metric])) for metric, values in one.items()}

    def changes(self, tuned: Sequence[str], untuned: str, reference: ReferenceSet, metrics: tuple[str, ...]) -> dict[str, str]:
        """What each tuning changed in the scores on a study's own captions, one subject after the other."""
        before = self._measured(untuned, reference)
        told: dict[str, list[str]] = {}
        for point in tuned:
            found = paired_differences(self._measured(point, reference), before, reference, metrics)
            for metric, interval in found.items():
                told.setdefault(metric, []).append(_worded(interval))
        return {metric: "; ".join(words) for metric, words in told.items()}

    def among_themselves(self) -> dict[str, float]:
        """Likeness of the subjects' own images to each other: what a perfect model would have."""
        told: dict[str, list[float]] = {}
        for reference in self.references:
            for name, features in reference.features.items():
                if name in SUBJECT:
                    count = len(features)
                    with_itself = mean_cosine_to_set(features, features).mean()
                    told.setdefault(SUBJECT[name], []).append(float((with_itself * count - 1) / (count - 1)))
        return {metric: float(np.mean(values)) for metric, values in told.items()}

    def _measured(self, point: str, reference: ReferenceSet) -> SampleFeatures:
        return read_measured(self.store.folder("point", point), tuple(reference.extractors))

    def _mean(self, values: np.ndarray) -> Interval:
        return mean_interval(values, num_bootstrap=self.num_bootstrap, seed=self.seed)


def _worded(interval: Interval) -> str:
    return format_score(interval.value, interval.low, interval.high)
