"""Collects the report of an output folder: points from the results database, images from the artefacts.

`isocost.report.report_data` writes the report.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from isocost.analysis.costs import COSTS
from isocost.analysis.frontier_ci import format_best_sizes
from isocost.analysis.guides import has_guides
from isocost.analysis.iso_cost import RecordedDifferences
from isocost.analysis.joint_scaling_law import predict_held_out
from isocost.analysis.paired_decisions import Resamples
from isocost.analysis.pareto import best_at_budgets, default_budgets
from isocost.analysis.power_laws import MIN_POINTS
from isocost.analysis.results_table import best_per_group, final_points
from isocost.analysis.scaling_laws import fit_scaling_laws
from isocost.analysis.timings import TIME_LABELS, format_excluded_timings
from isocost.config.study import StudySpec
from isocost.config.study_yaml import dump_study
from isocost.config.types import TaskName
from isocost.errors import ConfigError
from isocost.evaluation.confidence_intervals import Interval
from isocost.evaluation.paired import PairedComparer
from isocost.experiments.base import Experiment
from isocost.models.checkpoint import checkpoint_name
from isocost.pipeline.pipeline import Pipeline
from isocost.pipeline.study_table import study_table
from isocost.report.chart_panels import try_make
from isocost.report.guides_section import guide_section
from isocost.report.html import STUDY_YAML
from isocost.report.plot_data import COMPUTE_AXES, FLOOR_LABEL
from isocost.report.plot_data_finetune import PRETRAINING_QUESTIONS, Pretrained
from isocost.report.report_data import Page, Report, ReportData, render, task_folder
from isocost.report.scope import TRAINED, Scope, checkpoint_scope
from isocost.sweep.image_shards import read_images
from isocost.utils.artifact_store import Store
from isocost.utils.environment import provenance

TITLES: dict[TaskName, str] = {
    "text2image": "text-to-image",
    "seed-replicates": "other training seeds",
    "distill": "distillation",
    "superres": "super-resolution",
    "superres-distill": "super-resolution, distilled",
    "dreambooth": "DreamBooth",
}
PREDICTION_COSTS, PREDICTION_REPLICATES = ("normalized_cost", "gflop_denoiser"), 100
FLOOR_LABELS = {"photographs": "the subjects' own images"}
BASELINES = {
    "decoded": "real images after the autoencoder",
    "real": "real images without the autoencoder",
    "photographs": "the subjects' images against each other",
    "bicubic": "low-resolution images enlarged (bicubic)",
}


def run(study: StudySpec, out: str | Path, figure_formats: Sequence[str] = ("png",)) -> Report:
    """Train, sweep, score and report a study in the folder `out`; finished stages are skipped.

    Raises:
        ConfigError: the study cannot run as it is, or conflicts with the contents of the folder.
        RunError: the data or the training failed; finished work is kept.
    """
    pipeline = Pipeline(study, out)
    pipeline.run()
    return report(pipeline, figure_formats)


def report(pipeline: Pipeline, figure_formats: Sequence[str] = ("png",)) -> Report:
    """Write the reports of the scored points of this study: `report/`, and `report/TASK/` for the other tasks.

    Args:
        pipeline: a study whose points are scored.
        figure_formats: some of `isocost.report.matplotlib_backend.FORMATS`; none writes only the pages and tables.

    Raises:
        ConfigError: no point of the study is scored yet.
    """
    tables = {name: study_table(pipeline, experiment) for name, experiment in pipeline.experiments.items()}
    scored_tasks = [name for name, table in tables.items() if (table["task"].fillna("text2image") == name).any()]
    if not scored_tasks:
        raise ConfigError(f"{pipeline.out}: no point of this study is scored yet; start `isocost run`")
    reports = {
        name: _report_data(
            pipeline, name, tables[name], _other_pages(name, scored_tasks), _pretrained_points(pipeline, name, tables)
        )
        for name in scored_tasks
    }
    return render(pipeline.out, reports, figure_formats)


def _other_pages(task: TaskName, scored_tasks: list[TaskName]) -> dict[str, str]:
    """Return the titles of the other tasks' pages and their addresses relative to the page of `task`."""
    up = "" if task == "text2image" else "../"
    return {TITLES[name]: f"{up}{task_folder(name)}index.html" for name in scored_tasks if name != task}


def _pretrained_points(pipeline: Pipeline, task: TaskName, tables: Mapping[TaskName, pd.DataFrame]) -> Pretrained | None:
    """Return the points of the checkpoints that the task started from, if its report compares it with them."""
    if task not in PRETRAINING_QUESTIONS or "text2image" not in tables:
        return None
    parents = {checkpoint_name(run.parent) for run in pipeline.experiments[task].runs if run.parent is not None}
    table, family = tables["text2image"], pipeline.experiments["text2image"]
    table = table[table["checkpoint"].isin(parents)]
    return None if table.empty else Pretrained(task, table, family.metric)


def _report_data(
    pipeline: Pipeline, task: TaskName, table: pd.DataFrame, other_pages: dict[str, str], pretrained: Pretrained | None
) -> ReportData:
    study, experiment = pipeline.study, pipeline.experiments[task]
    table, samples = experiment.summarise(table, SavedImages(pipeline.store, table["point"]))
    baselines = experiment.baselines
    scope = checkpoint_scope(table) if study.checkpoints else TRAINED
    missing = [title for title in TITLES.values() if title not in other_pages and title != TITLES[task]]
    final_digests = table.loc[table["is_final"].astype(bool), "point"]
    resamples = pipeline.results_db.resamples_of_metric(experiment.metric, final_digests)
    page = Page(
        study_name=study.name if task == "text2image" else f"{study.name}, {TITLES[task]}",
        metric=experiment.metric,
        provenance=_provenance(pipeline, experiment, table, scope, resamples),
        reconstruction_floors=next(iter(baselines.values())),
        prompts=experiment.sample_labels,
        budgets=(list(study.report.budgets) if task == "text2image" else []) or default_budgets(table, scope.budget_cost),
        comparison_rows=_comparison_rows(experiment, table, samples),
        other_pages=other_pages,
        findings=experiment.findings(table) | _decisions(pipeline, experiment, table, resamples),
        floor_label=FLOOR_LABELS.get(next(iter(baselines)), FLOOR_LABEL),
        reference_lines={"bicubic": baselines["bicubic"]} if "bicubic" in baselines else None,
        missing_experiments=missing if scope.trained else [],
        pretrained=pretrained,
        scope=scope,
        differences=_guide_differences(pipeline, experiment, table),
        resamples=resamples,
    )
    return page, table, samples


def _decisions(pipeline: Pipeline, experiment: Experiment, table: pd.DataFrame, resamples: Resamples) -> dict[str, Any]:
    """Return what fresh images said about budgets (`isocost run --until-decided`), if the answer names these points today."""
    texts = []
    for decision in pipeline.results_db.decisions(experiment.metric):
        if {decision["first"], decision["second"]} <= set(table["point"]):
            (choice,) = best_at_budgets(table, decision["cost"], experiment.metric, [decision["budget"]], resamples=resamples)
            named = [None if part is None else part.point for part in (choice.best, choice.runner_up)]
            texts += [decision["text"]] if named == [decision["first"], decision["second"]] else []
    return {"Decided with fresh images": texts} if texts else {}


def _comparison_rows(experiment: Experiment, table: pd.DataFrame, samples: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return images uint8 [K, R, R, 3] by title: the inputs first, then the best of every size, then the targets."""
    row_images = {title: images.permute(0, 2, 3, 1).numpy() for title, images in experiment.comparison_rows().items()}
    if not row_images:
        return {}
    best = best_per_group(final_points(table, experiment.metric), experiment.metric, ["size"])
    outputs = {row["size"]: samples[row["point"]] for row in best.to_dict("records") if row["point"] in samples}
    *inputs, (target_title, targets) = row_images.items()
    return {**dict(inputs), **outputs, target_title: targets}


def _scaling_laws(experiment: Experiment, table: pd.DataFrame) -> dict[str, Any]:
    """Return the laws of quality against training compute as text, by axis and curve."""
    batch_size, metric = experiment.runs[0].spec.batch_size, experiment.metric
    texts: dict[str, Any] = {}
    for axis, (label, _) in COMPUTE_AXES.items():
        try:
            fitted = fit_scaling_laws(table, metric, batch_size, axis)
        except ConfigError as error:
            texts[label] = str(error)
            continue
        laws = [*fitted.sizes, *([] if fitted.family is None else [fitted.family])]
        texts[label] = {law.name: str(law) for law in laws} or f"no curve has {MIN_POINTS} snapshots"
    return texts


def _has_one_family(table: pd.DataFrame) -> bool:
    """Whether all sizes are one family without students or variants, so that their order by parameters has a meaning."""
    return set(table["task"].fillna("text2image")) == {"text2image"}


def _best_size_by_budget(experiment: Experiment, table: pd.DataFrame, resamples: Resamples) -> dict[str, Any] | str:
    """Return the budgets at which the best size changes, with confidence bands, under every cost."""
    try:
        return format_best_sizes(table, experiment.metric, resamples)
    except ConfigError as error:
        return str(error)


def _predicted_frontier(experiment: Experiment, table: pd.DataFrame) -> dict[str, str] | str:
    """Return the prediction of the largest size's frontier by a law of the other sizes, under `PREDICTION_COSTS`."""
    try:
        return {
            COSTS[cost].label: str(predict_held_out(table, experiment.metric, cost, PREDICTION_REPLICATES))
            for cost in PREDICTION_COSTS
        }
    except ConfigError as error:
        return str(error)


def _guide_differences(pipeline: Pipeline, experiment: Experiment, table: pd.DataFrame) -> list[list[str | float]]:
    """Return the paired differences that the section on guides shows; none without guides or without stored features."""
    if not has_guides(table):
        return []
    comparer = experiment.comparer()
    if comparer is None:
        return []
    recorder = _DifferenceRecorder(comparer)
    try_make(guide_section, table, experiment.metric, recorder)
    return RecordedDifferences(recorder.differences).rows


class _DifferenceRecorder:
    """Computes paired differences, and records those by all metrics of every pair of points that was requested."""

    def __init__(self, comparer: PairedComparer) -> None:
        self.comparer = comparer
        self.differences: dict[tuple[str, str, str], Interval] = {}
        self._compared: set[tuple[str, str]] = set()

    def difference(self, first: str, second: str, metric: str) -> Interval | None:
        if (first, second) not in self._compared:
            self._compared.add((first, second))
            for name, interval in self.comparer.differences(first, second).items():
                self.differences[first, second, name] = interval
        return self.differences.get((first, second, metric))


class SavedImages(Mapping[str, np.ndarray]):
    """The saved images of points, uint8 [K, R, R, 3] by digest; they are read when they are used."""

    def __init__(self, store: Store, points: Iterable[str]) -> None:
        self.store = store
        self.points = dict.fromkeys(point for point in points if store.has("point", point))

    def __getitem__(self, point: str) -> np.ndarray:
        if point not in self.points:
            raise KeyError(point)
        return read_images(self.store.open("point", point))

    def __iter__(self) -> Iterator[str]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)


def _provenance(
    pipeline: Pipeline, experiment: Experiment, table: pd.DataFrame, scope: Scope, resamples: Resamples
) -> dict[str, Any]:
    assets = pipeline.assets
    skipped = [event for event in pipeline.results_db.events() if event["stage"].startswith("data.")]
    num_flagged = int(table["has_too_few_samples"].sum())
    too_few_images = "points have fewer images than twice the number of features; compare only equal numbers of images"
    is_family = scope.trained and _has_one_family(table)
    return {
        "protocol": experiment.protocol_summary,
        "autoencoder": {"digest": assets.autoencoder_digest, "latent shape": " x ".join(map(str, assets.latent_shape))},
        **{BASELINES[title]: _rounded(scores) for title, scores in experiment.baselines.items()},
        **({"quality against training compute": _scaling_laws(experiment, table)} if scope.trained else {}),
        **({"best size by budget": _best_size_by_budget(experiment, table, resamples)} if is_family else {}),
        **({"predicted frontier of the largest size": _predicted_frontier(experiment, table)} if is_family else {}),
        **{label: note for column, label in TIME_LABELS.items() if (note := format_excluded_timings(table, column))},
        "images skipped": len(skipped),
        "Fréchet distance with too few images": f"{num_flagged} {too_few_images}" if num_flagged else "no point",
        "software and hardware": dict(provenance()),
        STUDY_YAML: dump_study(pipeline.study),
    }


def _rounded(scores: Mapping[str, float]) -> dict[str, str]:
    return {metric: f"{value:.4g}" for metric, value in scores.items()}
