"""Whether a variant of a model makes other images than its base, and whether they are worse.

A cache, a data type, a compiled kernel or another server changes images. That they differ says nothing about their quality. So
two questions are answered apart, from images of the same prompts and noise: how much do the images differ, by pair, and is the
score of the variant worse, by the paired difference of the protocol's scores?

Shapes: N image pairs, D features, R bootstrap resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from isocost.config.evaluation import MIN_IMAGES, PairedMetricName, ProtocolSpec
from isocost.errors import ConfigError
from isocost.evaluation.confidence_intervals import Interval, mean_interval
from isocost.evaluation.evaluator import Scorer
from isocost.evaluation.feature_batches import BatchFunction, FixedBatchRunner
from isocost.evaluation.feature_store import SampleFeatures
from isocost.evaluation.image_sources import SourceImage, images_by_id
from isocost.evaluation.metric_registry import metric_of
from isocost.evaluation.reference_set import ReferenceSet
from isocost.metrics.arrays import Array
from isocost.metrics.image_similarity import SSIM_WINDOW

Verdict = Literal["not worse", "worse", "undecided"]
IMAGE_METRICS: tuple[PairedMetricName, ...] = ("lpips", "psnr", "ssim")
NUM_BOOTSTRAP = 1000
LEVEL = 0.05
"""Probability that any metric calls a variant worse that is not, or not worse that is."""
POWER_QUANTILE = float(norm.ppf(0.8))
"""A named number of pairs decides with this power."""
MAX_IMAGES = 10_000_000
ReadImage = Callable[[], SourceImage]


@dataclass(frozen=True)
class ImagePairs:
    """Images of both sides with the same ids.

    Attributes:
        ids: of the N pairs, in order.
        base, variant: read an image by its id.
    """

    ids: tuple[str, ...]
    base: Mapping[str, ReadImage]
    variant: Mapping[str, ReadImage]

    @classmethod
    def read(cls, base: str, variant: str, resolution: int | None = None) -> ImagePairs:
        """Pair the images of two folders, or of two array files, by their ids.

        Args:
            base, variant: the sources.
            resolution: height and width that a protocol requires; the images are then RGB too. None takes any images.

        Raises:
            ConfigError: a source is missing, has no images or two of one id, or an id has only one image.
        """
        sides = [images_by_id(source, resolution=resolution, exact=resolution is not None) for source in (base, variant)]
        for name, side in zip((base, variant), sides, strict=True):
            if not side:
                raise ConfigError(f"{name}: has no images")
        for source, own, other in ((base, *sides), (variant, *reversed(sides))):
            if missing := sorted(set(other) - set(own), key=_id_order):
                first = f"{len(missing)} images of the other side are missing; the first is {missing[0]}"
                raise ConfigError(f"{source}: {first}: use the same names")
        return cls(tuple(sorted(sides[0], key=_id_order)), *sides)

    def in_order(self, ids: Sequence[str], source: str) -> ImagePairs:
        """The same pairs in the order of `ids`.

        Raises:
            ConfigError: the ids are not those of the pairs.
        """
        if set(ids) != set(self.ids):
            raise ConfigError(f"the images do not have the ids of {source}")
        return ImagePairs(tuple(ids), self.base, self.variant)

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield index, base and variant of every pair, uint8 [3, H, W].

        Raises:
            ConfigError: the images of a pair differ in size.
        """
        for index, key in enumerate(self.ids):
            base, variant = self.base[key](), self.variant[key]()
            if base.pixels.numel() == 0:
                raise ConfigError(f"{base.name}: has no pixels")
            if base.pixels.shape != variant.pixels.shape:
                sizes = [f"{image.pixels.shape[2]} x {image.pixels.shape[1]}" for image in (variant, base)]
                raise ConfigError(
                    f"{variant.name}: {sizes[0]} pixels, but {base.name} has {sizes[1]}: the images of a pair need one size"
                )
            yield index, base.pixels, variant.pixels


def _id_order(key: str) -> tuple[int, str]:
    return len(key), key


@dataclass(frozen=True)
class ImageDifferences:
    """How much the images of two sides differ.

    Attributes:
        num_images: number of pairs.
        num_equal: pairs without any difference.
        max_grey_levels: largest difference of a pixel of all pairs, 0 to 255.
        mean_grey_levels: mean difference of all pixels.
        similarity: "lpips" and "ssim" as means over all pairs, "psnr" (dB) over the pairs that differ; with 95 % intervals.
        most_different: ids of the pairs that differ most, by LPIPS if it was computed, else by SSIM or the grey levels.
    """

    num_images: int
    num_equal: int
    max_grey_levels: int
    mean_grey_levels: float
    similarity: dict[str, Interval]
    most_different: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """ "identical"; "same": at most one grey level apart anywhere; else "different"."""
        if self.num_equal == self.num_images:
            return "identical"
        return "same" if self.max_grey_levels <= 1 else "different"


@dataclass(frozen=True)
class ScoreDifference:
    """The score of the variant against that of the base, by one metric.

    Attributes:
        metric: column name.
        base, variant: scores with their 95 % intervals.
        difference: variant minus base, paired; its interval allows for the number of metrics that are judged.
        tolerance: how much worse the variant may be, in units of the metric; not negative.
        num_images: estimated number of pairs that decide an undecided verdict in four of five cases; None if it is decided, or
            if no number would. More pairs do not lower the error from the reference images, so the true number can be higher.
    """

    metric: str
    base: Interval
    variant: Interval
    difference: Interval
    tolerance: float
    num_images: int | None = None

    @property
    def loss(self) -> Interval:
        """How much worse the variant is: the difference in the direction of the metric."""
        if metric_of(self.metric).better == "lower":
            return self.difference
        return Interval(-self.difference.value, -self.difference.high, -self.difference.low, self.difference.confidence)

    @property
    def verdict(self) -> Verdict:
        """ "worse" if the whole interval is beyond the tolerance, "not worse" if the whole interval is within it."""
        if self.loss.low > self.tolerance:
            return "worse"
        return "not worse" if self.loss.high <= self.tolerance else "undecided"


@dataclass(frozen=True)
class Drift:
    """The comparison of a variant with its base.

    Attributes:
        images: how much the images differ.
        scores: one per metric; empty without reference images.
        protocol: id of the protocol; empty without reference images.
        num_reference: number of reference images.
        not_judged: columns of the protocol that have no paired differences, such as precision.
    """

    images: ImageDifferences
    scores: tuple[ScoreDifference, ...]
    protocol: str = ""
    num_reference: int = 0
    not_judged: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict | None:
        """ "worse" if any metric says so, "not worse" if all metrics do; None without reference images."""
        verdicts = {score.verdict for score in self.scores}
        if not verdicts:
            return "not worse" if self.images.verdict == "identical" else None
        return "worse" if "worse" in verdicts else "undecided" if "undecided" in verdicts else "not worse"


@dataclass(frozen=True)
class FeaturePairs:
    """Differences by pair, and the features of both sides.

    Attributes:
        images: how much the images differ.
        base, variant: features of the N images of each side, in the order of the pairs.
    """

    images: ImageDifferences
    base: SampleFeatures
    variant: SampleFeatures


def measure_pairs(
    pairs: ImagePairs,
    extractors: Mapping[str, Callable[[Tensor], Tensor]],
    image_metrics: Mapping[str, BatchFunction],
    num_most_different: int = 8,
) -> FeaturePairs:
    """Compare the images of every pair and compute their features.

    Args:
        pairs: the images.
        extractors: feature extractors by name; none to compare images only.
        image_metrics: functions of pairs by name, of `IMAGE_METRICS` (`paired_image_metric`).
        num_most_different: number of pairs to name.

    Raises:
        ConfigError: images of a pair differ in size or are too small for SSIM.
    """
    runner = FixedBatchRunner(image_metrics)
    sides = [FixedBatchRunner(extractors) for _ in range(2)]
    largest, means = np.zeros(len(pairs.ids), np.int64), np.zeros(len(pairs.ids))
    for index, base, variant in pairs:
        if "ssim" in image_metrics and min(base.shape[1:]) < SSIM_WINDOW:
            raise ConfigError(
                f"image {pairs.ids[index]}: SSIM needs {SSIM_WINDOW} x {SSIM_WINDOW} pixels; leave it out (--image-metric)"
            )
        difference = (base.int() - variant.int()).abs()
        largest[index], means[index] = int(difference.max()), float(difference.double().mean())
        if image_metrics:
            runner.add(index, torch.cat([variant, base]))
        for side, pixels in zip(sides, (base, variant), strict=True):
            if extractors:
                side.add(index, pixels.contiguous())
    _, similarity = runner.results()
    values = {name: column.double().numpy() for name, column in similarity.items()}
    ranking = values["lpips"] if "lpips" in values else -values["ssim"] if "ssim" in values else means
    worst = [index for index in np.argsort(-ranking, kind="stable")[:num_most_different] if largest[index]]
    images = ImageDifferences(
        num_images=len(pairs.ids),
        num_equal=int((largest == 0).sum()),
        max_grey_levels=int(largest.max()),
        mean_grey_levels=float(means.mean()),
        similarity={
            name: mean_interval(finite) for name, column in values.items() if len(finite := column[np.isfinite(column)])
        },
        most_different=tuple(pairs.ids[index] for index in worst),
    )
    rows = np.arange(len(pairs.ids))
    features = [SampleFeatures({name: part.numpy() for name, part in side.results()[1].items()}, ids=rows) for side in sides]
    return FeaturePairs(images, *features)


@dataclass
class ScoreComparison:
    """Scores of two sides under one protocol.

    Attributes:
        base, variant: features of the images of each side.
        reference: the protocol with the real images' features.
        metrics: names of `protocol.metrics`.
    """

    base: SampleFeatures
    variant: SampleFeatures
    reference: ReferenceSet
    metrics: tuple[str, ...]

    @cached_property
    def _scorers(self) -> tuple[Scorer, Scorer]:
        return Scorer(self.base, self.reference, self.metrics), Scorer(self.variant, self.reference, self.metrics)

    @property
    def not_judged(self) -> tuple[str, ...]:
        """Columns of the protocol without bootstrap resamples, and so without paired differences."""
        base, _ = self._scorers
        return tuple(name for name in base.intervals() if name not in base.resamples())

    def differences(self, tolerance: float) -> tuple[ScoreDifference, ...]:
        """Compare the scores by every metric that has bootstrap resamples.

        Args:
            tolerance: fraction of the base's score by which the variant may be worse.
        """
        base, variant = self._scorers
        base_scores, variant_scores = base.intervals(), variant.intervals()
        base_resamples, variant_resamples = base.resamples(), variant.resamples()
        num_images = len(next(iter(self.base.features.values())))
        return tuple(
            score_difference(
                name,
                (base_scores[name], base_resamples[name]),
                (variant_scores[name], variant_resamples[name]),
                tolerance=tolerance,
                num_metrics=len(base_resamples),
                num_images=num_images,
            )
            for name in base_resamples
        )


def score_difference(
    metric: str,
    base: tuple[Interval, Array],
    variant: tuple[Interval, Array],
    *,
    tolerance: float,
    num_metrics: int,
    num_images: int,
) -> ScoreDifference:
    """The paired difference of two scores.

    Its interval is normal with the spread of the paired resamples, at the level 5 % divided by the number of metrics
    (Bonferroni), so that at most 5 % of equal variants are called worse by any of them.

    Args:
        metric: column name.
        base, variant: the score with its interval, and its bootstrap resamples [1 + R].
        tolerance: fraction of the base's score.
        num_metrics: how many metrics are judged together.
        num_images: number of pairs.
    """
    resamples = variant[1] - base[1]
    value, error = float(resamples[0]), float(resamples[1:].std(ddof=1))
    confidence = 1 - LEVEL / num_metrics
    quantile = float(norm.ppf((1 + confidence) / 2))
    difference = Interval(value, value - quantile * error, value + quantile * error, confidence)
    found = ScoreDifference(metric, base[0], variant[0], difference, tolerance * abs(base[0].value))
    distance = abs(found.loss.value - found.tolerance)
    if found.verdict != "undecided" or distance == 0:
        return found
    enough = math.ceil(min(num_images * ((quantile + POWER_QUANTILE) * error / distance) ** 2, MAX_IMAGES + 1))
    return found if enough > MAX_IMAGES else replace(found, num_images=enough)


def check_can_score(num_images: int, num_reference: int) -> None:
    """Check that there are enough images for intervals.

    Raises:
        ConfigError: there are too few.
    """
    for kind, number in (("pairs", num_images), ("reference images", num_reference)):
        if number < MIN_IMAGES:
            raise ConfigError(
                f"{number} {kind}: a score needs at least {MIN_IMAGES}; leave out --reference to compare images only"
            )


def bootstrap_spec(spec: ProtocolSpec, num_images: int) -> ProtocolSpec:
    """The metrics of a protocol for `num_images` pairs, with enough resamples for paired differences."""
    return spec.model_copy(update={"num_images": num_images, "num_bootstrap": max(NUM_BOOTSTRAP, spec.num_bootstrap)})
