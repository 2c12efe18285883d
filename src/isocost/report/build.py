"""From an output folder to the report: the study's own points out of the results database, images out of the artefacts.

`isocost.report.drawn` writes what comes of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from isocost.analysis.costs import COSTS
from isocost.analysis.frontier_ci import format_bands
from isocost.analysis.joint_scaling_law import predict_held_out
from isocost.analysis.pareto import default_budgets
from isocost.analysis.power_laws import MIN_SNAPSHOTS
from isocost.analysis.results_table import best_in_each, final_points
from isocost.analysis.scaling_laws import normalized_training_compute, scaling
from isocost.analysis.timings import format_untimed, timed_on_one_device
from isocost.config.study import StudySpec
from isocost.config.study_yaml import dump_study
from isocost.config.types import TaskName
from isocost.errors import ConfigError
from isocost.experiments.base import Experiment
from isocost.pipeline.pipeline import Pipeline
from isocost.report.html import STUDY_YAML
from isocost.report.markdown import BUDGET_COST
from isocost.report.plot_data import COMPUTE_AXES, FLOOR_LABEL
from isocost.report.plot_data_finetune import FOLLOWS, Pretrained
from isocost.report.report_data import Page, Report, ReportData, draw, task_folder
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
FORETOLD_COSTS, FORETOLD_REDRAWS = ("normalized_cost", "gflop"), 100
RECONSTRUCTION_FLOORS = {"photographs": "the subjects' own images"}
BASELINES = {
    "decoded": "real images after the autoencoder",
    "real": "real images as they are",
    "photographs": "the subjects' images among themselves",
    "bicubic": "low-resolution images enlarged (bicubic)",
}


def run(study: StudySpec, out: str | Path) -> Report:
    """Train, sweep, score and report a study in the folder `out`; what exists there is skipped.

    Raises:
        ConfigError: the study cannot be done as it is asked for, or conflicts with what the folder holds.
        RunError: the data or the training failed; what is done stays.
    """
    pipeline = Pipeline(study, out)
    pipeline.run()
    return report(pipeline)


def report(pipeline: Pipeline) -> Report:
    """Write the reports of what the results database holds of this study: `report/`, and `report/TASK/` for what was tuned.

    Raises:
        ConfigError: no point of the study is scored yet.
    """
    tables = {name: study_table(pipeline, experiment) for name, experiment in pipeline.experiments.items()}
    with_metric = [name for name, table in tables.items() if (table["task"].fillna("text2image") == name).any()]
    if not with_metric:
        raise ConfigError(f"{pipeline.out}: no point of this study is scored yet; `isocost run` makes them")
    drawings = {
        name: _drawing(pipeline, name, tables[name], _addresses(name, with_metric), _started_from(pipeline, name, tables))
        for name in with_metric
    }
    return draw(pipeline.out, drawings)


def _addresses(task: TaskName, with_metric: list[TaskName]) -> dict[str, str]:
    """Title and address of the other tasks' pages, as seen from this one's."""
    up = "" if task == "text2image" else "../"
    return {TITLES[name]: f"{up}{task_folder(name)}index.html" for name in with_metric if name != task}


def _started_from(pipeline: Pipeline, task: TaskName, tables: Mapping[TaskName, pd.DataFrame]) -> Pretrained | None:
    """The family's points at the checkpoints that the task started from, where it is one that is set against them."""
    if task not in FOLLOWS or "text2image" not in tables:
        return None
    starts = {run.parent.name for run in pipeline.experiments[task].runs if run.parent is not None}
    table, family = tables["text2image"], pipeline.experiments["text2image"]
    table = table[table["checkpoint"].isin(starts)]
    return None if table.empty else Pretrained(task, table, family.metric)


def study_table(pipeline: Pipeline, experiment: Experiment) -> pd.DataFrame:
    """The results database's points that belong to the experiment as it stands now; `is_final` marks those of last checkpoints."""
    final_points = {run.final for run in experiment.runs}
    wanted = {point.digest for run in experiment.runs for point in pipeline.points(run)}
    if experiment.baseline is not None:
        others = {run.final for run in experiment.baseline.runs}
        points = (point for run in experiment.baseline.runs for point in pipeline.points(run))
        wanted |= {point.digest for point in points if point.spec.checkpoint in others}
        final_points |= others
    table = pipeline.results_db.table()
    table = table[table["point"].isin(wanted)]
    batch_size = experiment.runs[0].spec.batch_size
    return (
        timed_on_one_device(table)
        .assign(
            is_final=table["checkpoint"].isin(final_points),
            normalized_training_compute=normalized_training_compute(table["training_gflop"], batch_size),
        )
        .reset_index(drop=True)
    )


def _drawing(
    pipeline: Pipeline, task: TaskName, table: pd.DataFrame, others: dict[str, str], pretrained: Pretrained | None
) -> ReportData:
    """One experiment's page and table."""
    study, experiment = pipeline.study, pipeline.experiments[task]
    table, samples = experiment.summarise(table, SavedImages(pipeline.store, table["point"]))
    baselines = experiment.baselines
    page = Page(
        study_name=study.name if task == "text2image" else f"{study.name}, {TITLES[task]}",
        metric=experiment.metric,
        provenance=_provenance(pipeline, experiment, table),
        reconstruction_floors=next(iter(baselines.values())),
        prompts=experiment.sample_labels,
        budgets=(list(study.report.budgets) if task == "text2image" else []) or default_budgets(table, BUDGET_COST),
        strips=_strips(experiment, table, samples),
        others=others,
        findings=experiment.findings(table),
        floor_label=RECONSTRUCTION_FLOORS.get(next(iter(baselines)), FLOOR_LABEL),
        levels={"bicubic": baselines["bicubic"]} if "bicubic" in baselines else None,
        absent=[title for title in TITLES.values() if title not in others and title != TITLES[task]],
        pretrained=pretrained,
    )
    return page, table, samples


def _strips(experiment: Experiment, table: pd.DataFrame, samples: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What is given first, then every size at its best, then the truth."""
    told = {title: images.permute(0, 2, 3, 1).numpy() for title, images in experiment.strips().items()}
    if not told:
        return {}
    best = best_in_each(final_points(table, experiment.metric), experiment.metric, ["size"])
    made = {row["size"]: samples[row["point"]] for row in best.to_dict("records") if row["point"] in samples}
    *given, (last, truth) = told.items()
    return {**dict(given), **made, last: truth}


def _laws(experiment: Experiment, table: pd.DataFrame) -> dict[str, Any]:
    """What quality against compute says, by axis and curve."""
    batch_size, metric = experiment.runs[0].spec.batch_size, experiment.metric
    told: dict[str, Any] = {}
    for axis, (words, _) in COMPUTE_AXES.items():
        try:
            fitted = scaling(table, metric, batch_size, axis)
        except ConfigError as error:
            told[words] = str(error)
            continue
        laws = [*fitted.sizes, *([] if fitted.family is None else [fitted.family])]
        told[words] = {law.name: str(law) for law in laws} or f"no curve has {MIN_SNAPSHOTS} marks"
    return told


def _is_one_line(table: pd.DataFrame) -> bool:
    """Whether the sizes are one family, not students or variants beside it: crossings order them by their parameters."""
    return set(table["task"].fillna("text2image")) == {"text2image"}


def _bands(experiment: Experiment, table: pd.DataFrame) -> dict[str, Any] | str:
    """Where the best size changes under every cost, and how sure that is."""
    try:
        return format_bands(table, experiment.metric)
    except ConfigError as error:
        return str(error)


def _predicted_frontier(experiment: Experiment, table: pd.DataFrame) -> dict[str, str] | str:
    """What the law of the other sizes says of the largest one's frontier, under the paper's cost and a true one."""
    try:
        return {
            COSTS[cost].label: str(predict_held_out(table, experiment.metric, cost, FORETOLD_REDRAWS))
            for cost in FORETOLD_COSTS
        }
    except ConfigError as error:
        return str(error)


class SavedImages(Mapping[str, np.ndarray]):
    """The images that points kept, uint8 [K, R, R, 3] by digest, each read when it is asked for."""

    def __init__(self, store: Store, points: Iterable[str]) -> None:
        """Those of `points` that are in the store."""
        self.store = store
        self.points = dict.fromkeys(point for point in points if store.has("point", point))

    def __getitem__(self, point: str) -> np.ndarray:
        if point not in self.points:
            raise KeyError(point)
        return read_images(self.store.folder("point", point))

    def __iter__(self) -> Iterator[str]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)


def _provenance(pipeline: Pipeline, experiment: Experiment, table: pd.DataFrame) -> dict[str, Any]:
    assets = pipeline.assets
    skipped = [event for event in pipeline.results_db.events() if event["stage"].startswith("data.")]
    has_too_few_samples = int(table["has_too_few_samples"].sum())
    facts: dict[str, Any] = {
        "protocol": experiment.protocol_summary,
        "autoencoder": {"digest": assets.autoencoder_digest, "latent shape": " x ".join(map(str, assets.latent_shape))},
        **{BASELINES[title]: _rounded(scores) for title, scores in experiment.baselines.items()},
        "quality against training compute": _laws(experiment, table),
        **({"best size by budget": _bands(experiment, table)} if _is_one_line(table) else {}),
        **({"the largest size's frontier, foretold": _predicted_frontier(experiment, table)} if _is_one_line(table) else {}),
        **({"milliseconds": untimed} if (untimed := format_untimed(table)) else {}),
        "images skipped": len(skipped),
        "has_too_few_samples": f"{has_too_few_samples} points: Fréchet distance from fewer images than twice its features, compare at equal N only"
        if has_too_few_samples
        else "no point",
        "made with": dict(provenance()),
        STUDY_YAML: dump_study(pipeline.study),
    }
    return facts


def _rounded(scores: Mapping[str, float]) -> dict[str, str]:
    return {metric: f"{value:.4g}" for metric, value in scores.items()}
