"""Merge output folders of one study, and archive the small part of a folder that is worth keeping.

`merge` combines the work of machines without a shared disk. An archive, merged into a new folder, continues the study anywhere.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, get_args

from isocost.analysis.results_table import REPORT_DATA, table_file
from isocost.config.base import parse_spec
from isocost.config.study import StudySpec
from isocost.config.study_yaml import dump_study
from isocost.config.types import TaskName
from isocost.errors import ConfigError
from isocost.models.checkpoint import read_info
from isocost.pipeline.compatibility import (
    DATA_FILE,
    STUDY_FILE,
    check_compatible,
    read_content,
    read_study_file,
)
from isocost.pipeline.pipeline import RESULTS_DB_FILE
from isocost.sweep.results_db import ResultsDB
from isocost.training.state_checkpoint import newest_state_images
from isocost.utils.artifact_store import (
    MANIFEST,
    Store,
    copy_artefact,
    copy_folder,
    replace_folder,
    replacing,
    write_atomically,
)
from isocost.utils.output_paths import check_output_folder, check_separate, private_folder

logger = logging.getLogger(__name__)

MERGEABLE_LISTS = (
    ("family", "widths"),
    ("train", "snapshots"),
    ("train", "snapshots_gflop"),
    ("sweep", "num_steps"),
    ("sweep", "guidance"),
    ("sweep", "solvers"),
)
"""Lists of the study that may differ between two folders; the merged study has all values."""

ARCHIVED_KINDS = ("autoencoder", "autoencoder-quality", "checkpoint", "attribute-classifier", "reconstruction-floor")
"""Kinds of artefacts that are small and expensive to make again."""

SHARED_KINDS = (*ARCHIVED_KINDS, "cache", "features", "low-resolution")
"""Kinds of artefacts that another study can use; it finds those that fit by their digests."""


def archive(
    out: str | Path, folder: str | Path, checkpoint_mib: float | None = None, tasks: Collection[TaskName] | None = None
) -> dict[str, int]:
    """Copy the small part of an output folder into `folder`: study, results database, autoencoder, checkpoints, report data.

    Scored points stay in the results database, also those of checkpoints that are not copied, and are not sampled again. The
    data of the last report is copied, so that `isocost report FOLDER` can write it again. Other images, features, latents and
    training states are not copied. `merge` into a new folder continues from there without repeating a finished training,
    guidance search or point.

    Args:
        out: the output folder.
        folder: a new folder, or an archive of the same study.
        checkpoint_mib: copy only the last checkpoint of each training, and only those of this size in MiB or less.
        tasks: copy only checkpoints of these tasks.

    Returns:
        The number of artefacts and bytes in `folder` afterwards.

    Raises:
        ConfigError: `out` is not the output folder of a study, or `folder` is `out` itself, lies in it, contains it, or holds
            anything else than an archive of the same study.
    """
    source, target = Path(out), check_output_folder(folder)
    study = _load_study(source)
    check_separate(target, source)
    _prepare_target(target, [source], "the archive of a study")
    study = _merge_specs(read_study_file(target), study)
    excluded = _excluded(source, checkpoint_mib, tasks)
    with (
        ResultsDB(target / RESULTS_DB_FILE) as archived_db,
        ResultsDB(source / RESULTS_DB_FILE, keep_tables=True) as results_db,
    ):
        archived_db.import_from(results_db)
    for kind in ARCHIVED_KINDS:
        for artefact in Store(source).artefacts(kind):
            if artefact not in excluded:
                _copy_if_absent(artefact, target)
    _copy_report_data(source, target)
    write_atomically(target / STUDY_FILE, dump_study(study))
    return {"artefacts": len(list(target.glob("artefacts/[!.]*/*"))), "bytes": _num_bytes(target)}


def merge(out: str | Path, others: list[Path]) -> dict[str, int]:
    """Copy the artefacts and points that `out` lacks from other output folders of the same study.

    Artefacts are named by their digest, so equal names mean equal content. The merged study has the sizes, snapshots, steps,
    guidance values and solvers of all folders.

    Returns:
        The number of artefacts and points copied.

    Raises:
        ConfigError: a folder is not the output folder of a study, its study conflicts with that of `out`, or `out` is one of
            the others, lies in one, contains one, or holds something else.
    """
    target = check_output_folder(out)
    studies = [_load_study(other) for other in others]
    check_separate(target, *others)
    _prepare_target(target, others, "the output folder of a study")
    merged_study = read_study_file(target)
    for study in studies:
        merged_study = _merge_specs(merged_study, study)
    num_copied = {"artefacts": 0, "points": 0}
    with ResultsDB(target / RESULTS_DB_FILE) as results_db:
        for other in others:
            logger.info(f"copying artefacts and points of {other}")
            for folder in sorted((other / "artefacts").glob("[!.]*/*")):
                if (folder / MANIFEST).is_file() or newest_state_images(folder):
                    num_copied["artefacts"] += _copy_if_absent(folder, target)
            if not (target / REPORT_DATA).exists():
                _copy_report_data(other, target)
            with ResultsDB(other / RESULTS_DB_FILE, keep_tables=True) as other_db:
                num_copied["points"] += results_db.import_from(other_db)
    write_atomically(target / STUDY_FILE, dump_study(merged_study))
    return num_copied


def take_artefacts(out: str | Path, others: list[Path]) -> int:
    """Copy artefacts that several studies can share, such as autoencoders and checkpoints, from other output folders.

    Points, guidance searches and training states are not copied. The study of `out` uses only those that match its settings.

    Args:
        out: a new output folder, or an existing output folder of any study.
        others: output folders of any studies.

    Returns:
        The number of artefacts copied.

    Raises:
        ConfigError: a folder has no artefacts, or `out` is one of the others, lies in one, contains one, or holds something
            else.
    """
    target, num_copied = check_output_folder(out), 0
    without_artefacts = [other for other in others if not (other / "artefacts").is_dir()]
    if without_artefacts:
        raise ConfigError(f"{without_artefacts[0]}: no artefacts there, so it is not the output folder of a study")
    check_separate(target, *others)
    is_study_folder = (target / STUDY_FILE).is_file() or (target / "artefacts").is_dir()
    if target.is_dir() and any(target.iterdir()) and not is_study_folder:
        raise ConfigError(f"{target}: neither empty nor the output folder of a study; give a new folder")
    for other in others:
        logger.info(f"copying artefacts of {other}")
        for kind in SHARED_KINDS:
            for folder in Store(other).artefacts(kind):
                num_copied += _copy_if_absent(folder, target)
    return num_copied


def _prepare_target(target: Path, sources: Sequence[Path], description: str) -> None:
    """Check a folder to copy studies into; create it with the first study if it is missing or empty.

    Raises:
        ConfigError: the folder holds another study, or anything else than `description`.
    """
    if (target / STUDY_FILE).is_file():
        for source in sources:
            check_compatible(_load_study(source), Store(target), read_content(source))
    elif target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"{target}: neither empty nor {description}; give a new folder")
    else:
        target.mkdir(parents=True, exist_ok=True)
        write_atomically(target / STUDY_FILE, dump_study(_load_study(sources[0])))
    _copy_data_content(sources[0], target)


def _copy_if_absent(artefact: Path, target: Path) -> bool:
    """Copy an artefact into an output folder that lacks it; False if it exists there."""
    final = target / "artefacts" / artefact.parent.name / artefact.name
    if final.exists():
        return False
    copy_artefact(artefact, final, target / "artefacts" / ".partial")
    return True


def _excluded(out: Path, checkpoint_mib: float | None, tasks: Collection[TaskName] | None) -> set[Path]:
    """Folders of the checkpoints that are not archived: those of other tasks, too large, or not the last of their training."""
    infos = {folder: read_info(folder) for folder in Store(out).artefacts("checkpoint")}
    last: dict[str, int] = {}
    for info in infos.values():
        last[info.run] = max(info.images_seen, last.get(info.run, 0))
    excluded = {folder for folder, info in infos.items() if tasks is not None and info.task not in tasks}
    if checkpoint_mib is not None:
        excluded |= {folder for folder, info in infos.items() if info.run and info.images_seen < last[info.run]}
        excluded |= {folder for folder in infos if _num_bytes(folder) > checkpoint_mib * 2**20}
    return excluded


def _num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _copy_report_data(source: Path, target: Path) -> None:
    """Copy the data and tables of the last report, in place of those that `target` has of an earlier one."""
    if not (source / REPORT_DATA).is_dir():
        return
    with private_folder(target / REPORT_DATA) as partial:
        copy_folder(source / REPORT_DATA, partial / REPORT_DATA)
        for file in (table_file(source, task) for task in get_args(TaskName)):
            if file.is_file():
                with replacing(target / file.name) as temporary:
                    shutil.copyfile(file, temporary)
        replace_folder(partial / REPORT_DATA, target / REPORT_DATA)


def _copy_data_content(source: Path, target: Path) -> None:
    """Copy the digests of the data, unless `target` has them: its study keeps its paths."""
    if (source / DATA_FILE).is_file() and not (target / DATA_FILE).exists():
        shutil.copyfile(source / DATA_FILE, target / DATA_FILE)


def _load_study(folder: Path) -> StudySpec:
    """Read the study of an output folder to copy from.

    Raises:
        ConfigError: the folder is not the output folder of a study.
    """
    if not (folder / STUDY_FILE).is_file() or not (folder / RESULTS_DB_FILE).is_file():
        raise ConfigError(f"{folder}: not the output folder of a study, which has {STUDY_FILE} and {RESULTS_DB_FILE}")
    return read_study_file(folder)


def _merge_specs(first: StudySpec, second: StudySpec) -> StudySpec:
    """The study with the mergeable lists of both; a study of pretrained checkpoints has no family and no training."""
    merged: dict[str, Any] = first.model_dump(mode="json")
    added: dict[str, Any] = second.model_dump(mode="json")
    for part, key in MERGEABLE_LISTS:
        if merged[part] is not None and added[part] is not None:
            merged[part][key] += [value for value in added[part][key] if value not in merged[part][key]]
    if merged["train"] is not None and added["train"] is not None:
        merged["train"]["num_images"] = max(merged["train"]["num_images"], added["train"]["num_images"])
    merged["checkpoints"] += [path for path in added["checkpoints"] if path not in merged["checkpoints"]]
    for part in ("seed_replicates", "superres", "dreambooth", "distill"):
        merged[part] = merged[part] or added[part]
    return parse_spec(StudySpec, merged, "the merged study")
