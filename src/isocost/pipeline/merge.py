"""Output folders of one study made one, and the small part of one that is worth keeping for good.

What machines without a common disk have done is united. What is kept of a study goes on anywhere, united with a new folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args

import yaml

from isocost.analysis.results_table import REPORT_DATA, table_file
from isocost.config.base import parse_spec
from isocost.config.study import StudySpec
from isocost.config.study_yaml import dump_study
from isocost.config.types import TaskName
from isocost.errors import ConfigError
from isocost.models.checkpoint import read_info
from isocost.pipeline.pipeline import RESULTS_DB_FILE, STUDY_FILE, check_compatible
from isocost.sweep.results_db import ResultsDB
from isocost.utils.artifact_store import MANIFEST, Store, copy_artefact, write_atomically
from isocost.utils.progress import say

MERGEABLE_LISTS = (
    ("family", "widths"),
    ("train", "snapshots"),
    ("train", "snapshots_gflop"),
    ("sweep", "num_steps"),
    ("sweep", "guidance"),
    ("sweep", "solvers"),
)
"""What two folders of one study may have more of than the other."""

ARCHIVED_KINDS = ("autoencoder", "autoencoder-quality", "checkpoint", "attribute-classifier", "reconstruction-floor")
"""Artefacts that are small and cost much to make again."""

SHARED_KINDS = (*ARCHIVED_KINDS, "cache", "features", "low-resolution")
"""Artefacts that another study can go on from: its own digests find those that fit, whatever the rest of it says."""


def archive(
    out: str | Path, folder: str | Path, checkpoint_mib: float | None = None, tasks: Collection[TaskName] | None = None
) -> dict[str, int]:
    """Copy into `folder` what of `out` is worth keeping: study, results database, autoencoder, checkpoints, what they were compared with.

    With `checkpoint_mib` only last checkpoints come, of at most so many MiB each: what others start from; with `tasks` only
    those of these tasks. Points of those left behind stay, and are not made again.

    What the last report was drawn from comes too, so that `isocost report FOLDER` draws it again. Other images, features,
    latents and training states stay behind; `merge` with a new folder goes on from there without making any finished training,
    race or point again. Returns how many artefacts and bytes `folder` holds afterwards.

    Raises:
        ConfigError: `out` is no study's output folder, or `folder` keeps another study.
    """
    source, target = Path(out), Path(folder)
    study = _study(source)
    if (target / STUDY_FILE).is_file():
        check_compatible(study, Store(target))
        study = _merge_specs(_study(target), study)
    elif target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target}: neither empty nor what is kept of a study")
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / STUDY_FILE, dump_study(study))
    left_behind = _excluded(source, checkpoint_mib, tasks)
    with ResultsDB(target / RESULTS_DB_FILE) as saved_indices, ResultsDB(source / RESULTS_DB_FILE) as results_db:
        saved_indices.import_from(results_db)
    for kind in ARCHIVED_KINDS:
        for artefact in sorted((source / "artefacts" / kind).glob("[!.]*")):
            if artefact not in left_behind and (artefact / MANIFEST).is_file():
                _take(artefact, target)
    _keep_drawn(source, target)
    return {"artefacts": len(list(target.glob("artefacts/[!.]*/*"))), "bytes": _num_bytes(target)}


def merge(out: str | Path, others: list[Path]) -> dict[str, int]:
    """Copy into `out` what the other folders have and it lacks; returns how many artefacts and points came.

    Artefacts are named by what they are, so the same name is the same thing. The study asks afterwards for what any of them
    asked for.

    Raises:
        ConfigError: a folder is none of a study, or its study conflicts with that of `out`.
    """
    studies = [_study(other) for other in others]
    target, store = Path(out), Store(out)
    if not (target / STUDY_FILE).is_file():
        if target.exists() and any(target.iterdir()):
            raise ConfigError(f"{target}: neither empty nor a study's output folder")
        target.mkdir(parents=True, exist_ok=True)
        write_atomically(target / STUDY_FILE, dump_study(studies[0]))
        ResultsDB(target / RESULTS_DB_FILE)
    concat_studies = _study(target)
    for study in studies:
        check_compatible(study, store)
        concat_studies = _merge_specs(concat_studies, study)
    results_db, came = ResultsDB(target / RESULTS_DB_FILE), {"artefacts": 0, "points": 0}
    for other in others:
        say(f"taking over what {other} has")
        for folder in sorted((other / "artefacts").glob("[!.]*/*")):
            if (folder / MANIFEST).is_file() or any(folder.glob("state-*")):
                came["artefacts"] += _take(folder, target)
        if not (target / REPORT_DATA).exists():
            _keep_drawn(other, target)
        came["points"] += results_db.import_from(ResultsDB(other / RESULTS_DB_FILE))
    write_atomically(target / STUDY_FILE, dump_study(concat_studies))
    return came


def take_artefacts(out: str | Path, others: list[Path]) -> int:
    """Copy into `out`, a new output folder or one of any study, what a study can go on from: autoencoders, latents, checkpoints.

    Points, races and training states stay behind. What does not fit the study that runs there is not used. Returns how many
    came.

    Raises:
        ConfigError: a folder has no artefacts.
    """
    target, came = Path(out), 0
    bare = [other for other in others if not (other / "artefacts").is_dir()]
    if bare:
        raise ConfigError(f"{bare[0]}: no artefacts there, so it is no output folder of a study")
    for other in others:
        say(f"taking artefacts of {other}")
        for folder in (each for kind in SHARED_KINDS for each in sorted((other / "artefacts" / kind).glob("[!.]*"))):
            if (folder / MANIFEST).is_file():
                came += _take(folder, target)
    return came


def _take(artefact: Path, target: Path) -> bool:
    """Copy an artefact into an output folder that lacks it; whether it came."""
    final = target / "artefacts" / artefact.parent.name / artefact.name
    if final.exists():
        return False
    copy_artefact(artefact, final, target / "artefacts" / ".partial")
    return True


def _excluded(out: Path, checkpoint_mib: float | None, tasks: Collection[TaskName] | None) -> set[Path]:
    """Checkpoints of an output folder that are of other tasks, or not the last of their training, or larger."""
    infos = {folder: read_info(folder) for folder in (out / "artefacts" / "checkpoint").glob("[!.]*")}
    last: dict[str, int] = {}
    for info in infos.values():
        last[info.run] = max(info.images_seen, last.get(info.run, 0))
    left = {folder for folder, info in infos.items() if tasks is not None and info.task not in tasks}
    if checkpoint_mib is not None:
        left |= {folder for folder, info in infos.items() if info.run and info.images_seen < last[info.run]}
        left |= {folder for folder in infos if _num_bytes(folder) > checkpoint_mib * 2**20}
    return left


def _num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _keep_drawn(source: Path, target: Path) -> None:
    """Copy what the last report of an output folder was drawn from, in place of what `target` has of an earlier one."""
    if not (source / REPORT_DATA).is_dir():
        return
    shutil.rmtree(target / REPORT_DATA, ignore_errors=True)
    shutil.copytree(source / REPORT_DATA, target / REPORT_DATA)
    for file in (table_file(source, task) for task in get_args(TaskName)):
        if file.is_file():
            shutil.copy(file, target / file.name)


def _study(folder: Path) -> StudySpec:
    file = folder / STUDY_FILE
    if not file.is_file() or not (folder / RESULTS_DB_FILE).is_file():
        raise ConfigError(f"{folder}: no output folder of a study (needs {STUDY_FILE} and {RESULTS_DB_FILE})")
    return parse_spec(StudySpec, yaml.safe_load(file.read_text(encoding="utf-8")), str(file))


def _merge_specs(one: StudySpec, other: StudySpec) -> StudySpec:
    plain: dict[str, Any] = one.model_dump(mode="json")
    theirs: dict[str, Any] = other.model_dump(mode="json")
    for part, key in MERGEABLE_LISTS:
        both = plain[part][key]
        plain[part][key] = both + [value for value in theirs[part][key] if value not in both]
    plain["train"]["num_images"] = max(plain["train"]["num_images"], theirs["train"]["num_images"])
    for part in ("seed_replicates", "superres", "dreambooth", "distill"):
        plain[part] = plain[part] or theirs[part]
    return parse_spec(StudySpec, plain, "the united study")
