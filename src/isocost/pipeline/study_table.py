"""The results table of one experiment of a study, from the results database and the study."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import pandas as pd

from isocost.analysis.costs import is_measured
from isocost.analysis.prices import with_usd
from isocost.analysis.scaling_laws import normalized_training_compute
from isocost.analysis.timings import TIME_COLUMN, keep_one_timing_device
from isocost.experiments.base import Experiment
from isocost.pipeline.gflop_parts import COMPONENT_COLUMNS, with_gflop_parts
from isocost.pipeline.pipeline import Pipeline

logger = logging.getLogger(__name__)


def study_table(pipeline: Pipeline, experiment: Experiment) -> pd.DataFrame:
    """Return the points in the results database that belong to the experiment; `is_final` is true for final checkpoints."""
    final_checkpoints = {run.final for run in experiment.runs}
    digests = {point.digest for run in experiment.runs for point in pipeline.points(run)}
    if experiment.baseline is not None:
        baseline_finals = {run.final for run in experiment.baseline.runs}
        points = (point for run in experiment.baseline.runs for point in pipeline.points(run))
        digests |= {point.digest for point in points if point.spec.checkpoint in baseline_finals}
        final_checkpoints |= baseline_finals
    table = pipeline.results_db.table()
    recorded = table[table["point"].isin(digests)]
    table = with_gflop_parts(recorded, experiment.components)
    is_new = recorded["gflop"].isna() & table["gflop"].notna()
    rows = table.loc[is_new, ["point", *COMPONENT_COLUMNS]].to_dict("records")
    pipeline.results_db.set_component_gflop({row["point"]: {name: row[name] for name in COMPONENT_COLUMNS} for row in rows})
    table = _with_labels(table, [experiment] if experiment.baseline is None else [experiment, experiment.baseline])
    if replaced := experiment.replaced_schedulers():
        keys = zip(table["checkpoint"], table["solver"], strict=True)
        table = table.assign(replaced_scheduler=[replaced.get(key, "") for key in keys])
    batch_size = experiment.runs[0].spec.batch_size
    table = keep_one_timing_device(table)
    if (file := pipeline.study.report.prices) is not None and is_measured(table, TIME_COLUMN):
        table, note = with_usd(table, file, skips_unknown=True)
        logger.info(f"US dollars: {note}")
    return table.assign(
        is_final=table["checkpoint"].isin(final_checkpoints),
        normalized_training_compute=normalized_training_compute(table["training_gflop"], batch_size),
    ).reset_index(drop=True)


def _with_labels(table: pd.DataFrame, experiments: Iterable[Experiment]) -> pd.DataFrame:
    """Label the points as the study does; another study with the same results database may label them differently."""
    labels = {
        checkpoint: experiment.labels(run)
        for experiment in experiments
        for run in experiment.runs
        for checkpoint in run.checkpoints.values()
    }
    columns = {column for by_column in labels.values() for column in by_column}
    for column in columns:
        values = zip(table["checkpoint"], table[column], strict=True)
        table = table.assign(**{column: [labels.get(checkpoint, {}).get(column, value) for checkpoint, value in values]})
    return table
