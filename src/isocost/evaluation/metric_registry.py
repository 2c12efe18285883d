"""The registry of metrics: the names that `protocol.metrics` takes, and the columns of the results table that they fill.

A registered metric is computed on the features of every extractor that it fits. "FID" and "KID" are names for Inception
features only; on other features the same distances are named after those features.

The functions import their mathematics when they run, so that a results table can be read without loading torch.

Shapes: N images, M reference images, D features, R bootstrap resamples; row 0 of [1 + R] is the score itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from isocost.errors import ConfigError
from isocost.metrics.feature_extractors import EXTRACTORS, RegisteredExtractor
from isocost.utils.registry import Registry

if TYPE_CHECKING:
    import numpy as np

    from isocost.evaluation.confidence_intervals import Interval
    from isocost.evaluation.reference_set import ReferenceSet
    from isocost.metrics.arrays import Array
    from isocost.metrics.precision_recall import PRDC

Better = Literal["lower", "higher"]
PRECISION_NEIGHBOUR, DENSITY_NEIGHBOUR = 3, 5
"""As published: arXiv 1904.06991 (section 3.1), arXiv 2002.09797 (section 5)."""


@dataclass(frozen=True)
class Metric:
    """One column of scores: its name, its label, its direction and the title of its axis."""

    name: str
    label: str
    higher_is_better: bool
    axis: str

    @property
    def better(self) -> Better:
        """The direction as a word."""
        return "higher" if self.higher_is_better else "lower"


@dataclass(frozen=True)
class MetricInputs:
    """The inputs of a metric.

    Attributes:
        features: float32 [N, D], the features of the generated images.
        extractor: name of the feature extractor that made them.
        sample_indices: int64 [N], which prompt and noise each image has; None if images were not sampled here.
        reference: the protocol with the real images' features, the prompts and the resampling seed.
    """

    features: np.ndarray
    extractor: str
    sample_indices: np.ndarray | None
    reference: ReferenceSet

    @cached_property
    def frechet_influence(self) -> tuple[float, Array, Array]:
        """The Fréchet distance and the influence of each image on it (`isocost.metrics.frechet`)."""
        from isocost.metrics.frechet import frechet_influence

        return frechet_influence(self.features, self.reference.features[self.extractor], self.reference.moments(self.extractor))

    @cached_property
    def sliced_wasserstein_influence(self) -> tuple[float, Array, Array]:
        """The sliced Wasserstein distance and the influence of each image on it (`isocost.metrics.sliced_wasserstein`)."""
        from isocost.metrics.sliced_wasserstein import sliced_wasserstein

        distance = sliced_wasserstein(self.features, self.reference.features[self.extractor])
        return distance.value, distance.influence, distance.reference_influence


PerImage = Callable[[MetricInputs], "np.ndarray | tuple[np.ndarray, ...]"]
MakeIntervals = Callable[[MetricInputs], "tuple[Interval, ...]"]
MakeResamples = Callable[[MetricInputs, "np.ndarray"], "Array"]
MakeInfluences = Callable[[MetricInputs], "tuple[float, Array, Array]"]


@dataclass(frozen=True)
class RegisteredMetric:
    """A metric by the name that `protocol.metrics` takes.

    Attributes:
        name: as in `protocol.metrics`.
        columns: extractor -> the columns that the metric fills on its features; empty where it does not fit.
        intervals: inputs -> one value with its 95 % interval per column; None: the percentiles of the resamples.
        resamples: inputs and counts int [1 + R, N] -> the score of every bootstrap resample, [1 + R] or, for C columns,
            [C, 1 + R]. Paired differences follow from them. None: it has none, and no paired differences.
    """

    name: str
    columns: Callable[[RegisteredExtractor], tuple[Metric, ...]]
    intervals: MakeIntervals | None
    resamples: MakeResamples | None


METRIC_GROUPS: Registry[RegisteredMetric] = Registry("metric")


def register_metric(
    name: str,
    *,
    label: str | tuple[str, ...],
    higher_is_better: bool,
    note: str = "",
    columns: tuple[str, ...] | None = None,
    extractors: Callable[[RegisteredExtractor], bool] = lambda extractor: True,
    names: Callable[[RegisteredExtractor], tuple[tuple[str, str], ...] | None] = lambda extractor: None,
    interval: MakeIntervals | Literal["mean", "resamples"] = "mean",
    resamples: MakeResamples | Literal["mean"] | None = "mean",
) -> Callable[[PerImage], PerImage]:
    """Register the decorated function as a metric.

    The function maps `MetricInputs` to one value per image, float64 [N], or to a tuple of such arrays, one per column. Their
    mean is the score; its interval, its bootstrap resamples and paired differences follow from them. A metric of whole sets
    (a distance between distributions) gives `resamples`, and `interval` unless "resamples" is right.

    Args:
        name: as in `protocol.metrics`; the column is NAME_EXTRACTOR.
        label: name in figures; one per column.
        higher_is_better: direction.
        note: what an axis adds in brackets: "cosine".
        columns: first parts of the column names where there are several; `name` by default.
        extractors: which extractors the metric fits; all by default.
        names: extractor -> (column, label) pairs in place of the usual names; None for the usual ones.
        interval: "mean", a function to one interval per column, or "resamples" for the percentiles of the resamples.
        resamples: "mean", a function to [1 + R] values ([C, 1 + R] for C columns), or None: then the guidance search cannot use
            the metric, and it has no paired differences.

    Returns:
        A decorator.

    Raises:
        ConfigError: the name is taken.
    """
    labels = (label,) if isinstance(label, str) else label
    direction = "higher is better" if higher_is_better else "lower is better"
    bracket = f"{note}, {direction}" if note else direction

    def columns_of(extractor: RegisteredExtractor) -> tuple[Metric, ...]:
        if not extractors(extractor):
            return ()
        prefixes = columns or (name,)
        usual = tuple((f"{prefix}_{extractor.column}", text) for prefix, text in zip(prefixes, labels, strict=True))
        return tuple(
            Metric(
                column,
                text if text == extractor.label else f"{text}, {extractor.label} features",
                higher_is_better,
                f"{text}, {extractor.label} ({bracket})",
            )
            for column, text in names(extractor) or usual
        )

    def register(per_image: PerImage) -> PerImage:
        METRIC_GROUPS.add(
            name,
            RegisteredMetric(
                name,
                columns_of,
                _mean_intervals(per_image) if interval == "mean" else None if interval == "resamples" else interval,
                _mean_resamples(per_image) if resamples == "mean" else resamples,
            ),
        )
        return per_image

    return register


SAMPLE_METRICS: Registry[Metric] = Registry("metric")
"""Metrics that need no features of an extractor."""
PER_IMAGE_METRICS = ("alignment", "psnr", "ssim", "lpips")
"""Those of them that every image has a value of."""
for _metric in (
    Metric(
        "alignment",
        "prompt alignment, fraction of attributes that a classifier recognises",
        True,
        "prompt alignment (fraction, higher is better)",
    ),
    Metric("psnr", "peak signal-to-noise ratio", True, "PSNR (dB, higher is better)"),
    Metric("ssim", "structural similarity", True, "SSIM (higher is better)"),
    Metric("lpips", "LPIPS, AlexNet", False, "LPIPS, AlexNet (lower is better)"),
    Metric("lpips_vgg", "LPIPS, VGG16", False, "LPIPS, VGG16 (lower is better)"),
    Metric("clip_i", "CLIP-I, similarity to the subject's photographs", True, "CLIP-I (cosine, higher is better)"),
    Metric("clip_t", "CLIP-T, similarity to the prompt", True, "CLIP-T (cosine, higher is better)"),
    Metric("dino", "DINO, similarity to the subject's photographs", True, "DINO (cosine, higher is better)"),
):
    SAMPLE_METRICS.add(_metric.name, _metric)


class _Columns(Mapping[str, Metric]):
    """Every column that the registered metrics can fill: EfficientNet-lite0's distances first, then by extractor."""

    def __init__(self) -> None:
        self._columns: dict[str, Metric] = {}
        self._changes: tuple[int, ...] = ()

    def _all(self) -> dict[str, Metric]:
        changes = tuple(registry.num_changes for registry in (METRIC_GROUPS, SAMPLE_METRICS, EXTRACTORS))
        if changes != self._changes:
            self._columns, self._changes = self._compute(), changes
        return self._columns

    @staticmethod
    def _compute() -> dict[str, Metric]:
        first = EXTRACTORS["efficientnet-lite0"]
        columns: dict[str, Metric] = {}
        for metrics in (
            *(METRIC_GROUPS[name].columns(first) for name in ("mmd", "frechet")),
            tuple(SAMPLE_METRICS.values()),
            *(group.columns(extractor) for extractor in EXTRACTORS.values() for group in METRIC_GROUPS.values()),
        ):
            columns |= {metric.name: metric for metric in metrics}
        return columns

    def __getitem__(self, name: str) -> Metric:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


METRICS: Mapping[str, Metric] = _Columns()
"""Column name -> metric, in the order of reports."""


def metric_of(name: str) -> Metric:
    """The metric of the column `name`.

    Raises:
        ConfigError: there is none; the line names the nearest.
    """
    known = METRICS._all() if isinstance(METRICS, _Columns) else dict(METRICS)
    if name not in known:
        nearest = get_close_matches(name, known, n=4, cutoff=0) or list(known)[:4]
        raise ConfigError(f"unknown metric {name!r}; the nearest of {len(known)} names: {', '.join(nearest)}")
    return known[name]


def metric_columns(group: str, extractor: str) -> tuple[str, ...]:
    """Names of the columns that the metric `group` (of `protocol.metrics`) fills on the features of `extractor`; maybe none."""
    return tuple(metric.name for metric in METRIC_GROUPS[group].columns(EXTRACTORS[extractor]))


def check_metrics(groups: Sequence[str], extractors: Sequence[str]) -> None:
    """Check the names of a protocol's metrics and extractors, and that every metric fits one of the extractors.

    Raises:
        ConfigError: a name is unknown, or a metric fits none of the extractors.
    """
    for name in extractors:
        EXTRACTORS.check(name, "protocol.features")
    for group in groups:
        METRIC_GROUPS.check(group, "protocol.metrics")
        if not any(metric_columns(group, name) for name in extractors):
            fitting = [name for name in EXTRACTORS if metric_columns(group, name)]
            raise ConfigError(f"protocol.metrics: {group} needs one of protocol.features: {', '.join(fitting)}")


# --- scores that are means of values per image ------------------------------------------------------------------------


def _columns_of_values(per_image: PerImage, inputs: MetricInputs) -> tuple[np.ndarray, ...]:
    values = per_image(inputs)
    return values if isinstance(values, tuple) else (values,)


def _mean_intervals(per_image: PerImage) -> MakeIntervals:
    def intervals(inputs: MetricInputs) -> tuple[Interval, ...]:
        return tuple(mean_of(values, inputs.reference) for values in _columns_of_values(per_image, inputs))

    return intervals


def _mean_resamples(per_image: PerImage) -> MakeResamples:
    def resamples(inputs: MetricInputs, counts: np.ndarray) -> Array:
        import numpy as np

        from isocost.evaluation.confidence_intervals import mean_resamples

        columns = [mean_resamples(values, counts) for values in _columns_of_values(per_image, inputs)]
        return columns[0] if len(columns) == 1 else np.stack(columns)

    return resamples


def mean_of(values: np.ndarray, reference: ReferenceSet) -> Interval:
    """The mean of float64 [N] with its bootstrap interval under the protocol's seed."""
    from isocost.evaluation.confidence_intervals import mean_interval

    return mean_interval(values, num_bootstrap=reference.protocol.num_bootstrap, seed=reference.protocol.seed)


# --- the metrics that come with isocost -------------------------------------------------------------------------------


def _only_for_sets(inputs: MetricInputs) -> Any:
    raise AssertionError("a distance between sets has no value per image")


def _register_kernel_distance(
    name: str, kernel_name: Literal["POLYNOMIAL", "GAUSSIAN"], label: str, note: str, **options: Any
) -> None:
    def kernel() -> Any:
        from isocost.metrics import mmd

        return getattr(mmd, kernel_name)

    def resamples(inputs: MetricInputs, counts: np.ndarray) -> Array:
        from isocost.evaluation.confidence_intervals import kernel_resamples

        return kernel_resamples(inputs.features, counts, inputs.reference.kernel(inputs.extractor, kernel()))

    register_metric(
        name,
        label=label,
        note=note,
        higher_is_better=False,
        interval="resamples",
        resamples=resamples,
        **options,
    )(_only_for_sets)


def _register_influence_distance(name: str, label: str, distance: MakeInfluences, **options: Any) -> None:
    """Register a distance whose interval and resamples follow, to first order, from the influence of every image.

    Args:
        name, label: see `register_metric`.
        distance: inputs -> its value, and the influences of the images [N] and of the reference images [M].
        options: of `register_metric`.
    """

    def intervals(inputs: MetricInputs) -> tuple[Interval, ...]:
        from isocost.evaluation.confidence_intervals import influence_interval

        return (influence_interval(*distance(inputs)),)

    def resamples(inputs: MetricInputs, counts: np.ndarray) -> Array:
        from isocost.evaluation.confidence_intervals import influence_resamples, reference_counts

        value, influence, reference_influence = distance(inputs)
        protocol = inputs.reference.protocol
        real = reference_counts(len(reference_influence), protocol.num_bootstrap, protocol.seed)
        return influence_resamples(value, influence, reference_influence, counts, real)

    register_metric(
        name,
        label=label,
        note="biased up by about 1/N",
        higher_is_better=False,
        interval=intervals,
        resamples=resamples,
        **options,
    )(_only_for_sets)


def _frechet_infinity_intervals(inputs: MetricInputs) -> tuple[Interval, ...]:
    from isocost.evaluation.confidence_intervals import frechet_infinity_interval

    reference, name = inputs.reference, inputs.extractor
    moments, seed = reference.moments(name), reference.protocol.seed
    return (frechet_infinity_interval(inputs.features, reference.features[name], reference_moments=moments, seed=seed),)


def _inception_score_intervals(inputs: MetricInputs) -> tuple[Interval, ...]:
    from isocost.evaluation.confidence_intervals import inception_score_interval

    protocol = inputs.reference.protocol
    logits = inputs.reference.logits(inputs.extractor, inputs.features)
    return (inception_score_interval(logits, num_bootstrap=protocol.num_bootstrap, seed=protocol.seed),)


def _prdc(inputs: MetricInputs, neighbour: int) -> PRDC:
    from isocost.metrics.precision_recall import compute_prdc

    reference, name = inputs.reference, inputs.extractor
    radii = reference.radii(name, neighbour)
    return compute_prdc(inputs.features, reference.features[name], k=neighbour, real_radii=radii)


def _on_inception(column: str, label: str) -> Callable[[RegisteredExtractor], tuple[tuple[str, str], ...] | None]:
    return lambda extractor: ((column, label),) if extractor.name == "inception" else None


def _cmmd_names(extractor: RegisteredExtractor) -> tuple[tuple[str, str], ...] | None:
    return (("cmmd", "CMMD"),) if extractor.name == "clip-vit-l-14-336" else None


def _classifier_score_names(extractor: RegisteredExtractor) -> tuple[tuple[str, str], ...] | None:
    if extractor.name == "inception":
        return (("inception_score", "Inception score"),)
    return ((f"classifier_score_{extractor.column}", "classifier score"),)


def _prompt_similarity_names(extractor: RegisteredExtractor) -> tuple[tuple[str, str], ...] | None:
    if extractor.is_preference_model:
        return ((extractor.column, extractor.label),)
    return ((f"clip_score_{extractor.column.removeprefix('clip_')}", "CLIP score"),)


SUBJECT_COLUMNS = {"dino-vit-s-16": "dino", "clip-vit-b-32": "clip_i", "efficientnet-lite0": "subject_efficientnet"}
"""DreamBooth's similarity to the subject's images (arXiv 2208.12242, section 4.2), and a stand-in that needs no download."""


def _subject_names(extractor: RegisteredExtractor) -> tuple[tuple[str, str], ...] | None:
    return ((SUBJECT_COLUMNS[extractor.name], "similarity to the subject"),)


_register_kernel_distance("mmd", "POLYNOMIAL", "squared MMD", "unbiased MMD²", names=_on_inception("kid", "KID"))
_register_influence_distance(
    "frechet", "Fréchet distance", lambda inputs: inputs.frechet_influence, names=_on_inception("fid", "FID")
)
register_metric(
    "frechet_infinity",
    label="Fréchet distance at infinite N",
    higher_is_better=False,
    note="extrapolated",
    names=_on_inception("fid_infinity", "FID at infinite N"),
    interval=_frechet_infinity_intervals,
    resamples=None,
)(_only_for_sets)
_register_influence_distance(
    "sliced_wasserstein",
    "sliced Wasserstein distance",
    lambda inputs: inputs.sliced_wasserstein_influence,
    names=_on_inception("mind", "MIND"),
)


@register_metric(
    "precision_recall",
    label=("precision", "recall"),
    columns=("precision", "recall"),
    higher_is_better=True,
    note="fraction of images",
    resamples=None,
)
def _precision_recall(inputs: MetricInputs) -> tuple[np.ndarray, ...]:
    values = _prdc(inputs, PRECISION_NEIGHBOUR)
    return values.precision, values.recall


@register_metric(
    "density_coverage",
    label=("density", "coverage"),
    columns=("density", "coverage"),
    higher_is_better=True,
    note="fraction of images",
    resamples=None,
)
def _density_coverage(inputs: MetricInputs) -> tuple[np.ndarray, ...]:
    values = _prdc(inputs, DENSITY_NEIGHBOUR)
    return values.density, values.coverage


register_metric(
    "inception_score",
    label="Inception score",
    higher_is_better=True,
    extractors=lambda extractor: extractor.classifies,
    names=_classifier_score_names,
    interval=_inception_score_intervals,
    resamples=None,
)(_only_for_sets)
_register_kernel_distance(
    "cmmd",
    "GAUSSIAN",
    "CMMD",
    "unbiased MMD² x 1000",
    extractors=lambda extractor: extractor.embeds_text and not extractor.is_preference_model,
    names=_cmmd_names,
)


@register_metric(
    "prompt_similarity",
    label="CLIP score",
    higher_is_better=True,
    note="cosine",
    extractors=lambda extractor: extractor.embeds_text,
    names=_prompt_similarity_names,
)
def _prompt_similarity(inputs: MetricInputs) -> np.ndarray:
    from isocost.metrics.image_similarity import cosine

    prompts, indices = inputs.reference.prompt_features(inputs.extractor), inputs.sample_indices
    values = cosine(inputs.features, prompts if indices is None else prompts[indices])
    is_preference_model = EXTRACTORS[inputs.extractor].is_preference_model
    return values * (inputs.reference.clip(inputs.extractor).scale if is_preference_model else 1.0)


@register_metric(
    "subject_similarity",
    label="similarity to the subject",
    higher_is_better=True,
    note="cosine",
    extractors=lambda extractor: extractor.name in SUBJECT_COLUMNS,
    names=_subject_names,
    resamples=None,
)
def _subject_similarity(inputs: MetricInputs) -> np.ndarray:
    from isocost.metrics.image_similarity import mean_cosine_to_set

    return mean_cosine_to_set(inputs.features, inputs.reference.features[inputs.extractor])
