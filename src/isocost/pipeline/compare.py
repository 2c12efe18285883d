"""Compare the output folders of several studies: one common table, and paired differences where they can be had."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from isocost.analysis.results_table import read_table, report_metric
from isocost.analysis.study_comparison import Ranking, concat_studies, rankings
from isocost.errors import ConfigError
from isocost.evaluation.paired import PairedComparer
from isocost.pipeline.compatibility import STUDY_FILE, read_study_file
from isocost.pipeline.pipeline import RESULTS_DB_FILE, Pipeline
from isocost.sweep.results_db import ResultsDB
from isocost.utils.artifact_store import Store


@dataclass(frozen=True)
class Compared:
    """The common table of the studies, and their ranking at each budget."""

    table: pd.DataFrame
    rankings: list[Ranking]


def compare(
    outs: Sequence[str | Path],
    metric: str | None = None,
    cost: str = "gflop",
    budgets: Sequence[float] = (),
    task: str = "text2image",
) -> Compared:
    """Compare the tables that the last reports of several output folders wrote.

    Differences of text2image are paired where the results databases have the resamples of both points, or the folders their
    features: under one protocol, image i has the same prompt and seed in all studies. Otherwise the differences are those of
    independent scores, and are marked so.

    Args:
        outs: two or more output folders, each with a table.
        metric: the metric to rank by; by default that of the first folder's report.
        cost: a name of `isocost.analysis.costs.COSTS`.
        budgets: values of that cost; spread over the points where empty.

    Raises:
        ConfigError: a folder has no table, a folder is given twice, or the numbers cannot be compared.
    """
    folders = [Path(out) for out in outs]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("an output folder was given twice: give each only once")
    names = _study_names(folders)
    tables = {name: read_table(folder, task) for name, folder in zip(names, folders, strict=True)}
    leading = report_metric(folders[0], tables[names[0]], task) if metric is None else metric
    table = concat_studies(tables, leading)
    with ExitStack() as opened:
        return Compared(table, rankings(table, leading, cost, _comparer(folders, task, opened), budgets))


class _Unpaired:
    def difference(self, first: str, second: str, metric: str) -> None:
        return None


def _comparer(folders: Sequence[Path], task: str, opened: ExitStack) -> PairedComparer | _Unpaired:
    """Paired differences, from stored resamples, or from features by the reference set of the first folder."""
    if task != "text2image":
        return _Unpaired()
    files = [folder / RESULTS_DB_FILE for folder in folders]
    databases = [ResultsDB(file, keep_tables=True, read_only=True) for file in files if file.is_file()]
    stored = tuple(opened.enter_context(database).resamples for database in databases)
    study = read_study_file(folders[0])
    return PairedComparer(
        stored,
        tuple(Store(folder) for folder in folders),
        lambda: Pipeline(study, folders[0]).assets.reference,
        study.protocol.metrics,
    )


def _study_names(folders: Sequence[Path]) -> list[str]:
    """The names of the studies, or of the folders if two studies have the same name."""
    names = []
    for folder in folders:
        if not (folder / STUDY_FILE).is_file():
            raise ConfigError(f"{folder}: no {STUDY_FILE}, so it is not the output folder of a study")
        names.append(read_study_file(folder).name)
    if len(set(names)) == len(names):
        return names
    folder_names = [folder.resolve().name for folder in folders]
    return folder_names if len(set(folder_names)) == len(folder_names) else [str(folder) for folder in folders]
