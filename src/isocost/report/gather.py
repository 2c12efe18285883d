"""From an output folder to the report: the study's own points out of the ledger, pictures out of the artefacts.

Writes `table.parquet`, `table.csv` and `report/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from isocost.analysis.frontier import BudgetChoice, best_at_budgets, default_budgets
from isocost.analysis.scaling import LEAST_MARKS, paper_compute, scaling
from isocost.errors import RequestError
from isocost.pipeline import Pipeline
from isocost.provenance import provenance
from isocost.report.marks import COMPUTE_AXES
from isocost.report.page import STUDY_YAML, markdown_summary, write_report
from isocost.store import write_atomically
from isocost.study import StudySpec
from isocost.study_file import dump_study
from isocost.sweep.workers import read_pictures

BUDGET_COST = "paper_cost"


@dataclass(frozen=True)
class Report:
    """What a report says, beside its page: the table of points and the choice at each budget of paper cost."""

    page: Path
    table: pd.DataFrame
    choices: list[BudgetChoice]


def run(study: StudySpec, out: str | Path) -> Report:
    """Train, sweep, score and report a study in the folder `out`; what exists there is skipped.

    Raises:
        RequestError: the study cannot be done as it is asked for, or conflicts with what the folder holds.
        WorkError: the data or the training failed; what is done stays.
    """
    pipeline = Pipeline(study, out)
    pipeline.run()
    return report(pipeline)


def report(pipeline: Pipeline) -> Report:
    """Write the report of what the ledger holds of this study.

    Raises:
        RequestError: no point of the study is scored yet.
    """
    study, out = pipeline.study, pipeline.out
    reference = pipeline.materials.reference
    table = study_table(pipeline)
    table.to_parquet(out / "table.parquet", index=False)
    table.to_csv(out / "table.csv", index=False)
    floors = pipeline.materials.floors()
    budgets = list(study.report.budgets) or default_budgets(table, BUDGET_COST)
    page = write_report(
        out / "report",
        study.name,
        table,
        study.report.metric,
        _provenance(pipeline, table, floors),
        floors["decoded"],
        _samples(pipeline, table),
        [reference.captions[i] for i in pipeline.materials.kept],
        budgets,
    )
    write_atomically(out / "report" / "summary.md", markdown_summary(table, study.report.metric, study.name, budgets))
    return Report(page, table, best_at_budgets(table, BUDGET_COST, study.report.metric, budgets))


def study_table(pipeline: Pipeline) -> pd.DataFrame:
    """The ledger's points that belong to the study as it stands now; `is_final` marks those of the last checkpoint."""
    protocol = pipeline.materials.protocol
    wanted = {point.digest for run in pipeline.runs for some in pipeline.points(run, protocol).values() for point in some}
    table = pipeline.ledger.table()
    table = table[table["point"].isin(wanted)]
    if table.empty:
        raise RequestError(f"{pipeline.out}: no point of this study is scored yet; `isocost run` makes them")
    finals = {run.final for run in pipeline.runs}
    batch_size = pipeline.study.train.batch_size
    return table.assign(
        is_final=table["checkpoint"].isin(finals), paper_compute=paper_compute(table["training_gflop"], batch_size)
    ).reset_index(drop=True)


def _laws(pipeline: Pipeline, table: pd.DataFrame) -> dict[str, Any]:
    """What quality against compute says, by axis and curve."""
    batch_size, metric = pipeline.study.train.batch_size, pipeline.study.report.metric
    told: dict[str, Any] = {}
    for axis, (words, _) in COMPUTE_AXES.items():
        fitted = scaling(table, metric, batch_size, axis)
        laws = [*fitted.sizes, *([] if fitted.family is None else [fitted.family])]
        told[words] = {law.name: str(law) for law in laws} or f"no curve has {LEAST_MARKS} marks"
    return told


def _samples(pipeline: Pipeline, table: pd.DataFrame) -> dict[str, np.ndarray]:
    store = pipeline.store
    return {point: read_pictures(store.folder("point", point)) for point in table["point"] if store.has("point", point)}


def _provenance(pipeline: Pipeline, table: pd.DataFrame, floors: dict[str, dict[str, float]]) -> dict[str, Any]:
    materials = pipeline.materials
    skipped = [event for event in pipeline.ledger.events() if event["stage"].startswith("data.")]
    flagged = int(table["flagged"].sum())
    facts: dict[str, Any] = {
        "protocol": materials.protocol.sentence(),
        "codec": {"digest": materials.codec_digest, "latent shape": " x ".join(map(str, materials.latent_shape))},
        "real pictures after the codec": _rounded(floors["decoded"]),
        "real pictures as they are": _rounded(floors["real"]),
        "quality against training compute": _laws(pipeline, table),
        "pictures skipped": len(skipped),
        "flagged": f"{flagged} points: Fréchet distance from fewer pictures than twice its features, compare at equal N only"
        if flagged
        else "no point",
        "made with": dict(provenance()),
        STUDY_YAML: dump_study(pipeline.study),
    }
    return facts


def _rounded(scores: dict[str, float]) -> dict[str, str]:
    return {metric: f"{value:.4g}" for metric, value in scores.items()}
