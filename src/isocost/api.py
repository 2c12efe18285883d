"""The Python interface for scripts and notebooks: studies, results, checkpoints, scores and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isocost.config.study import StudySpec
from isocost.config.study_yaml import load_study
from isocost.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch
    from matplotlib.figure import Figure
    from PIL import Image
    from torch import Tensor

    from isocost.analysis.recommend import Recommendation
    from isocost.evaluation.confidence_intervals import Interval
    from isocost.sampling.sample import Model


@dataclass(frozen=True)
class StudyResult:
    """A finished study: its results table and its report.

    Attributes:
        out: the output folder.
        results: one row per scored point. `size`, `solver`, `num_steps`, `guidance` name the configuration; `nfe`, `gflop`,
            `normalized_cost`, `ms_per_image` (throughput at full batches) and `latency_ms` (one image alone; NaN until
            `isocost remeasure` measures it) are its costs per image; every metric has a column and the bounds of its 95 %
            interval in METRIC_low and METRIC_high.
        page: the HTML report.
        summary: the answer as Markdown.
    """

    out: Path
    results: pd.DataFrame
    page: Path
    summary: str

    def recommend(self, **budgets: Any) -> Recommendation:
        """The best configuration within the budgets, by paired decisions; see `isocost.recommend`."""
        from isocost.analysis.results_table import report_metric

        metric = budgets.pop("metric", None) or report_metric(self.out, self.results)
        resamples = read_resamples(self.out, metric)
        return recommend(self.results, metric=metric, out=str(self.out), **{"resamples": resamples, **budgets})

    def plot(self, name: str, **options: Any) -> Figure:
        """Draw a figure of the results; see `isocost.plot`."""
        return plot(name, self.results, **options)

    def _repr_markdown_(self) -> str:
        return self.summary


Study = StudySpec


def run(
    study: StudySpec | str | Path,
    out: str | Path | None = None,
    *,
    device: torch.device | str | None = None,
    figure_formats: Sequence[str] = ("png",),
) -> StudyResult:
    """Train, sweep, score and report a study. Finished work in the output folder is skipped, so the same call continues a run.

    Args:
        study: a study, or the path of its YAML file.
        out: the output folder; runs/NAME by default.
        device: where networks run: "cuda:1"; by default CUDA if there is any, else the CPU.
        figure_formats: files of each figure next to the page: `"png"`, `"pdf"` for print, both, or none.

    Raises:
        ConfigError: the study cannot be run as it is, or conflicts with the contents of the folder.
        RunError: the data or a training failed; finished work is kept.
    """
    from isocost.report.build import run as run_study
    from isocost.utils.device import use_device

    spec = study if isinstance(study, StudySpec) else load_study(study)
    folder = Path(out) if out is not None else Path("runs") / spec.name
    with use_device(device):
        report = run_study(spec, folder, figure_formats)
    return StudyResult(folder, report.table, report.page, report.summary)


def read_results(out: str | Path, task: str = "text2image") -> pd.DataFrame:
    """The results table of an output folder, as its last report left it; `StudyResult.results` describes the columns.

    Raises:
        ConfigError: the folder has no table of this task.
    """
    from isocost.analysis.results_table import read_table

    return read_table(out, task)


def read_resamples(out: str | Path, metric: str | None = None) -> dict[str, np.ndarray]:
    """The scores of an output folder's points in every bootstrap resample, for paired decisions.

    Args:
        out: an output folder or an archive.
        metric: the column of the scores; by default that of the last report.

    Returns:
        Point -> float64 [1 + R], where the first value is the score itself; empty if the folder has no resamples of the metric.
    """
    from isocost.analysis.results_table import read_table, report_metric
    from isocost.pipeline.resamples import read_resamples as read

    return read(Path(out), report_metric(out, read_table(out)) if metric is None else metric)


def recommend(
    results: pd.DataFrame,
    *,
    metric: str | None = None,
    require: Mapping[str, float] | None = None,
    out: str = "OUT",
    resamples: Mapping[str, np.ndarray] | None = None,
    prices: str | Path | None = None,
    **budgets: float,
) -> Recommendation:
    """The best configuration by `metric` within all budgets; the first budget breaks ties.

    Args:
        results: a results table.
        metric: the column that decides; by default squared MMD on EfficientNet-lite0, FID, KID, or the first distance.
        require: metric -> value that the configuration must reach, in the metric's direction.
        out: the output folder for the command in the answer.
        resamples: `read_resamples(out, metric)`: the choice between two sizes is then decided by their paired difference.
        prices: with `usd`, a file with US dollars per hour of each device, or "shipped"; by default the prices of the report,
            else the shipped ones.
        **budgets: `nfe`, `gflop`, `gflop_denoiser`, `ms`, `joules` or `normalized_cost` per image, `usd` per 1,000 images,
            `latency_ms`, `images_per_hour`, `memory_gib`.

    Raises:
        ConfigError: no budget is given, a name is unknown, or no point fits; the line names the nearest point.
    """
    from isocost.analysis.costs import COSTS
    from isocost.analysis.prices import with_usd
    from isocost.analysis.recommend import recommend as choose
    from isocost.analysis.results_table import leading_metric

    names = {cost.keyword: cost.name for cost in COSTS.values()}
    names |= {"images_per_hour": "images_per_hour", "memory_gib": "memory_gib"}
    unknown = [name for name in budgets if name not in names]
    if unknown or not budgets:
        problem = f"unknown budget {unknown[0]!r}" if unknown else "no budget"
        raise ConfigError(f"recommend: {problem}; give one or more of {', '.join(names)}, such as nfe=16")
    named = {names[name]: float(value) for name, value in budgets.items()}
    lead = next((name for name in named if name != "memory_gib"), None)
    if lead is None:
        raise ConfigError("recommend: memory_gib needs a second budget, such as nfe=16")
    others = {name: value for name, value in named.items() if name != lead}
    if "usd" in budgets:
        results, _ = with_usd(results, None if prices is None else str(prices))
    elif prices is not None:
        raise ConfigError("recommend: prices go with a budget in US dollars: give usd= too, or leave them out")
    leading = leading_metric(results) if metric is None else metric
    return choose(results, lead, named[lead], leading, out, also=others, requirements=require, resamples=resamples)


def load_checkpoint(
    checkpoint: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "fp32",
    vae_dtype: torch.dtype | str = "fp32",
    vae_tile_size: int | None = None,
    vae_slicing: bool = False,
    offload: bool = False,
) -> Model:
    """Load a checkpoint once, for any number of calls of `sample`.

    Args:
        checkpoint: a checkpoint folder of a study, a folder of a diffusers pipeline, or a Hub id (OWNER/NAME[@REVISION]),
            with ` + LORA[:SCALE]` or without.
        device: where it runs; by default CUDA if there is any, else the CPU.
        dtype: of the denoiser: "fp32" or "bf16", or the torch dtype.
        vae_dtype: of the autoencoder, as `dtype`.
        vae_tile_size: decode in overlapping tiles of this many pixels, a multiple of 64 (VAE tiling).
        vae_slicing: decode one image at a time (VAE slicing).
        offload: in every call of `sample`, load each part for its stage and release it after it.

    Raises:
        ConfigError: the checkpoint cannot be read, or does not support a setting.
    """
    from isocost.sampling.sample import Model

    return Model(
        checkpoint,
        device=device,
        dtype=dtype,
        vae_dtype=vae_dtype,
        vae_tile_size=vae_tile_size,
        vae_slicing=vae_slicing,
        offload=offload,
    )


def score(
    images: str | Path | np.ndarray | Tensor | Sequence[Image.Image],
    reference: str | Path | np.ndarray | Tensor | Sequence[Image.Image],
    metrics: Sequence[str] = ("mmd",),
    *,
    features: Sequence[str] = ("efficientnet-lite0",),
    feature_size: int = 64,
    weights: Mapping[str, str] | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Interval]:
    """Score images against reference images, each metric with its 95 % interval.

    Args:
        images: a folder, uint8 [N, H, W, 3] (NumPy), uint8 [N, 3, H, W] (torch), or PIL images.
        reference: the same.
        metrics: names of `list_metrics()`.
        features: names of `list_extractors()`.
        feature_size: height and width in pixels at which EfficientNet-lite0 sees the images.
        weights: sources of weights by extractor name, in place of the published ones.
        device: where the extractors run.

    Returns:
        Column name ("mmd_efficientnet", "fid") -> `Interval` with `value`, `low`, `high`.

    Raises:
        ConfigError: a name is unknown, an input is missing or of the wrong type, or there are too few images.
    """
    from isocost.evaluation.score_images import score_images
    from isocost.utils.device import use_device

    with use_device(device):
        return score_images(images, reference, metrics, features, feature_size, weights or {})


def list_solvers() -> list[str]:
    """Names of the solvers."""
    from isocost.diffusion.solvers import SOLVERS

    return list(SOLVERS)


def list_metrics() -> list[str]:
    """Names of the metrics that `protocol.metrics` and `score` take."""
    from isocost.evaluation.metric_registry import METRIC_GROUPS

    return list(METRIC_GROUPS)


def list_extractors() -> list[str]:
    """Names of the feature extractors that `protocol.features` and `score` take."""
    from isocost.metrics.feature_extractors import EXTRACTORS

    return list(EXTRACTORS)


def list_plots() -> list[str]:
    """Names of the figures that `plot` draws from a results table."""
    from isocost.report.figures import TABLE_PLOTS

    return list(TABLE_PLOTS)


def plot(name: str, results: pd.DataFrame, metric: str | None = None, **options: Any) -> Figure:
    """Draw a figure of a results table.

    Args:
        name: one of `list_plots()`.
        results: a results table.
        metric: the column to draw; by default as in `recommend`.
        **options: of the figure's function in `isocost.report.figures`: `cost="gflop"`.

    Raises:
        ConfigError: the name is unknown, or the table lacks what the figure shows.
    """
    from isocost.analysis.results_table import leading_metric
    from isocost.report.figures import TABLE_PLOTS

    if name not in TABLE_PLOTS:
        raise ConfigError(f"unknown plot {name!r}; known: {', '.join(TABLE_PLOTS)}")
    return TABLE_PLOTS[name](results, leading_metric(results) if metric is None else metric, **options)
