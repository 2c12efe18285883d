"""Output folders of several studies compared: their tables united, their differences paired where both keep their features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from isocost.analysis.results_table import read_table
from isocost.analysis.study_comparison import Ranking, concat_studies, rankings
from isocost.config.study_yaml import load_study
from isocost.errors import ConfigError
from isocost.evaluation.paired import PairedComparer
from isocost.pipeline.pipeline import STUDY_FILE, Pipeline
from isocost.utils.artifact_store import Store


@dataclass(frozen=True)
class Compared:
    """The united table, and how the studies stand at each budget."""

    table: pd.DataFrame
    rankings: list[Ranking]


def compare(
    outs: Sequence[str | Path],
    metric: str = "mmd_efficientnet",
    cost: str = "gflop",
    budgets: Sequence[float] = (),
    task: str = "text2image",
) -> Compared:
    """Output folders on one axis, each as its last report left it.

    Differences of text2image are paired where every folder still has its points' features, since under one protocol image i
    has the same caption and seed in all studies; else they are those of independent scores, and say so.

    Args:
        outs: output folders, two or more, each with a table.
        cost: a name of `isocost.analysis.frontier.COSTS`.
        budgets: of that cost; spread over the points where empty.

    Raises:
        ConfigError: a folder has no table, two are the same, or their numbers cannot be compared.
    """
    folders = [Path(out) for out in outs]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("an output folder was given twice: give each once")
    names = _names(folders)
    table = concat_studies({name: read_table(folder, task) for name, folder in zip(names, folders, strict=True)}, metric)
    return Compared(table, rankings(table, metric, cost, _pairs(folders, task), budgets))


class _Unpaired:
    def of_points(self, first: str, second: str, metric: str) -> None:
        return None


def _pairs(folders: Sequence[Path], task: str) -> PairedComparer | _Unpaired:
    """Paired differences where every folder keeps features of points, by the reference of the first."""
    stores = tuple(Store(folder) for folder in folders)
    if task != "text2image" or not all(any((store.root / "point").glob("[!.]*")) for store in stores):
        return _Unpaired()
    pipeline = Pipeline(load_study(folders[0] / STUDY_FILE), folders[0])
    return PairedComparer(stores, pipeline.assets.reference, pipeline.study.protocol.metrics)


def _names(folders: Sequence[Path]) -> list[str]:
    """The studies' names; a folder's own where two studies share one."""
    names = []
    for folder in folders:
        file = folder / STUDY_FILE
        if not file.is_file():
            raise ConfigError(f"{folder}: no {STUDY_FILE}, so it is no output folder of a study")
        names.append(load_study(file).name)
    if len(set(names)) == len(names):
        return names
    by_folder = [folder.resolve().name for folder in folders]
    return by_folder if len(set(by_folder)) == len(by_folder) else [str(folder) for folder in folders]
