"""Check that a study may continue in an output folder, and record the content of the folder's data sources."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isocost.config.data import FileSource
from isocost.config.study import StudySpec
from isocost.config.study_yaml import load_study
from isocost.data.datasets import source_fingerprint
from isocost.errors import ConfigError
from isocost.utils.artifact_store import Store, write_atomically

STUDY_FILE = "study.yaml"
DATA_FILE = "data.json"
"""Digests of the content of `data.train` and `data.reference`. They show that images have only been moved."""
DATA_PARTS = ("train", "reference")


def write_data_content(out: Path, contents: Mapping[str, str]) -> None:
    """Write the digest of the content of every data source, by part, into an output folder."""
    write_atomically(out / DATA_FILE, json.dumps(dict(contents), indent=1) + "\n")


def read_data_content(out: Path) -> dict[str, str]:
    """Read the file that `write_data_content` wrote; empty if it is missing, as in older folders.

    Raises:
        ConfigError: the file is damaged.
    """
    file = out / DATA_FILE
    if not file.is_file():
        return {}
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
        return {part: str(contents[part]) for part in DATA_PARTS if part in contents}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{file}: damaged ({error}); remove it, and the next run writes it again") from error


def read_study_file(out: Path) -> StudySpec:
    """Read the study that a run wrote into its output folder.

    Raises:
        ConfigError: the file is damaged, or was written by a version with other keys.
    """
    file = out / STUDY_FILE
    try:
        return load_study(file)
    except ConfigError as error:
        raise ConfigError(f"{error}; or remove {STUDY_FILE}: `isocost run STUDY --out {out}` writes it again") from error


def check_compatible(study: StudySpec, store: Store, contents: Mapping[str, str] | None = None) -> None:
    """Check that a study may continue in its output folder. Sizes, steps, guidance, solvers, snapshots and images may be added.

    The files of a data source may have moved to another path if their names and bytes are the same.

    Args:
        study: the study that continues.
        store: artefacts of the output folder.
        contents: digests of the content of its data sources by part, if they are known; files are read for the others.

    Raises:
        ConfigError: the folder holds artefacts of a study that this one cannot continue.
    """
    file = store.out / STUDY_FILE
    if not file.is_file() or store.is_empty():
        return
    before = read_study_file(store.out)
    old_fields, new_fields = before.immutable_fields(), study.immutable_fields()
    reason = ""
    for part in DATA_PARTS:
        if _only_path_differs(getattr(before.data, part), getattr(study.data, part)):
            different = _content_difference(before, study, part, read_data_content(store.out), contents or {})
            if different is None:
                new_fields["data"][part]["path"] = old_fields["data"][part]["path"]
            reason = reason or different or ""
    shared = [name for name in old_fields if name in new_fields]  # fine-tuning sections may be added later
    difference = _first_difference({name: old_fields[name] for name in shared}, {name: new_fields[name] for name in shared})
    if difference is not None:
        key, old, new = difference
        is_path = key in {f"data.{part}.path" for part in DATA_PARTS}
        raise ConfigError(
            f"{store.out}: its artefacts were made with {key} = {old}, but the study has {new}{reason if is_path else ''}; "
            f"set {key} back to {old}, or give another --out"
        )


def _only_path_differs(old: Any, new: Any) -> bool:
    is_file_source = isinstance(old, FileSource) and type(old) is type(new)
    return is_file_source and old.path != new.path and old == new.model_copy(update={"path": old.path})


def _content_difference(
    before: StudySpec, study: StudySpec, part: str, recorded: Mapping[str, str], contents: Mapping[str, str]
) -> str | None:
    """None if the sources of both studies have the same content, else the reason why they count as different."""
    old_content = recorded.get(part)
    if old_content is None:
        try:
            old_content = source_fingerprint(getattr(before.data, part))
        except (ConfigError, OSError):
            return f", and {DATA_FILE} and the files at the former path are missing, so the two cannot be compared"
    new_content = contents.get(part) or source_fingerprint(getattr(study.data, part))
    return None if new_content == old_content else ", whose files differ"


def _first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """Dotted key, old value and new value of the first field that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            difference = _first_difference(old.get(name), new.get(name), f"{key}.{name}" if key else name)
            if difference is not None:
                return difference
        return None
    return None if old == new else (key, old, new)
