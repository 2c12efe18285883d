"""DreamBooth scores over the images of all subjects, and their changes, with intervals from a bootstrap over images.

Shapes: N images of all subjects, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isocost.analysis.formatting import format_score
from isocost.evaluation.confidence_intervals import Interval, mean_interval
from isocost.evaluation.feature_store import SampleFeatures, read_sample_features
from isocost.evaluation.metric_registry import SUBJECT_COLUMNS, metric_columns
from isocost.evaluation.paired import paired_differences
from isocost.evaluation.reference_set import ReferenceSet
from isocost.metrics.image_similarity import cosine, mean_cosine_to_set
from isocost.metrics.vit import CLIPFeatureExtractor
from isocost.utils.artifact_store import Store


@dataclass(frozen=True)
class SubjectScores:
    """Scores of points with the same setting, one point per subject in the order of `references`.

    Attributes:
        store: artefacts of the output folder.
        references: reference set of every subject.
        metrics: metrics of the protocol.
        num_bootstrap: bootstrap resamples of the intervals.
        seed: seed of the resamples.
    """

    store: Store
    references: tuple[ReferenceSet, ...]
    metrics: tuple[str, ...]
    num_bootstrap: int
    seed: int

    def by_image(self, points: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the scores of every image, float64 [N] by metric."""
        scores: dict[str, list[np.ndarray]] = {}
        for point, reference in zip(points, self.references, strict=True):
            samples = self._features(point, reference)
            for name, features in samples.features.items():
                if name in SUBJECT_COLUMNS and "subject_similarity" in self.metrics:
                    scores.setdefault(SUBJECT_COLUMNS[name], []).append(mean_cosine_to_set(features, reference.features[name]))
                if isinstance(reference.extractors[name], CLIPFeatureExtractor) and "prompt_similarity" in self.metrics:
                    (metric,) = metric_columns("prompt_similarity", name)
                    prompts = reference.prompt_features(name)[samples.ids]
                    scores.setdefault(metric, []).append(cosine(features, prompts))
            if samples.alignment is not None:
                scores.setdefault("alignment", []).append(samples.alignment)
        return {metric: np.concatenate(values) for metric, values in scores.items()}

    def means(self, points: Sequence[str]) -> dict[str, float]:
        """Return the mean of every metric and the ends of its interval, as columns of the results table."""
        means: dict[str, float] = {}
        for metric, values in self.by_image(points).items():
            interval = self._mean(values)
            means |= {metric: interval.value, f"{metric}_low": interval.low, f"{metric}_high": interval.high}
        return means

    def format_difference(self, ours: Sequence[str], theirs: Sequence[str]) -> dict[str, str]:
        """Format the mean paired difference ours - theirs over images, by metric."""
        our_scores, their_scores = self.by_image(ours), self.by_image(theirs)
        return {metric: _format_interval(self._mean(values - their_scores[metric])) for metric, values in our_scores.items()}

    def format_changes(
        self, tuned: Sequence[str], untuned: str, reference: ReferenceSet, metrics: tuple[str, ...]
    ) -> dict[str, str]:
        """Format the change of the scores on the study's own prompts, one subject after the other, by metric.

        Args:
            tuned: one point per subject.
            untuned: the point of their common parent.
            reference: the study's reference set.
            metrics: metrics to compare.
        """
        before = self._features(untuned, reference)
        changes: dict[str, list[str]] = {}
        for point in tuned:
            differences = paired_differences(self._features(point, reference), before, reference, metrics)
            for metric, interval in differences.items():
                changes.setdefault(metric, []).append(_format_interval(interval))
        return {metric: "; ".join(texts) for metric, texts in changes.items()}

    def reference_similarity(self) -> dict[str, float]:
        """Return the similarity of the subjects' reference images to each other, the score of a perfect model."""
        similarities: dict[str, list[float]] = {}
        for reference in self.references:
            for name, features in reference.features.items():
                if name in SUBJECT_COLUMNS:
                    count = len(features)
                    with_itself = mean_cosine_to_set(features, features).mean()
                    similarities.setdefault(SUBJECT_COLUMNS[name], []).append(float((with_itself * count - 1) / (count - 1)))
        return {metric: float(np.mean(values)) for metric, values in similarities.items()}

    def _features(self, point: str, reference: ReferenceSet) -> SampleFeatures:
        return read_sample_features(self.store.open("point", point), tuple(reference.extractors))

    def _mean(self, values: np.ndarray) -> Interval:
        return mean_interval(values, num_bootstrap=self.num_bootstrap, seed=self.seed)


def _format_interval(interval: Interval) -> str:
    return format_score(interval.value, interval.low, interval.high)
