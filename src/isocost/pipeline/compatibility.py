"""Check that a study may continue in an output folder, and record the content of the folder's data sources."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from isocost.config.data import FileSource
from isocost.config.study import StudySpec
from isocost.config.study_yaml import load_study
from isocost.data.datasets import source_fingerprint
from isocost.errors import ConfigError
from isocost.models.components import component_content
from isocost.utils.artifact_store import Store, write_atomically

STUDY_FILE = "study.yaml"
DATA_FILE = "data.json"
"""Digests of the content of the data sources, the autoencoder and the text encoder. They show that files have only moved."""
DATA_PARTS = ("train", "reference")
COMPONENT_PARTS = ("autoencoder", "text_encoder")


class Component(NamedTuple):
    """An autoencoder or text encoder in a folder.

    Attributes:
        path: its first path in the study, which names the artefacts.
        content: digest of its files.
    """

    path: str
    content: str


@dataclass(frozen=True)
class RecordedContent:
    """The content of the files that a study reads, by part."""

    data: Mapping[str, str] = field(default_factory=dict)
    components: Mapping[str, Component] = field(default_factory=dict)


def write_content(out: Path, recorded: RecordedContent) -> None:
    """Write the digests of the files that a study reads into its output folder."""
    components = {part: component._asdict() for part, component in recorded.components.items()}
    write_atomically(out / DATA_FILE, json.dumps({**recorded.data, **components}, indent=1) + "\n")


def read_content(out: Path) -> RecordedContent:
    """Read the file that `write_content` wrote; nothing where it is absent, as in older folders.

    Raises:
        ConfigError: the file is damaged.
    """
    file = out / DATA_FILE
    if not file.is_file():
        return RecordedContent()
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
        data = {part: str(contents[part]) for part in DATA_PARTS if part in contents}
        components = {
            part: Component(str(contents[part]["path"]), str(contents[part]["content"]))
            for part in COMPONENT_PARTS
            if part in contents
        }
        return RecordedContent(data, components)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
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


def find_components(
    study: StudySpec, out: Path, former: StudySpec | None, recorded: Mapping[str, Component]
) -> dict[str, Component]:
    """The autoencoder and text encoder of a study that are folders, with the paths that name their artefacts.

    Args:
        study: the study.
        out: its output folder.
        former: the study that made the artefacts of the folder; None if there are none, or if its file is missing.
        recorded: the components of these artefacts, by part.

    Raises:
        ConfigError: the files at a path have changed since the artefacts were made.
    """
    components = {}
    for part in COMPONENT_PARTS:
        path, content = _component(study, part)
        known = recorded.get(part)
        if path is None:
            continue
        if content is None:
            former_path = None if former is None else getattr(getattr(former, part), "path", None)
            if known is not None and path in (known.path, former_path):
                components[part] = known  # the folder is not on this machine
            continue
        if known is None and former is not None:  # of a version without the record
            former_path, former_content = _component(former, part)
            if former_path is not None and former_content is not None:
                known = Component(former_path, former_content)
        if known is not None and known.path == path and known.content != content:
            raise ConfigError(
                f"{part}.path = {path}: its files have changed since the artefacts of {out} were made; restore them, or give "
                "another --out"
            )
        components[part] = known if known is not None and known.content == content else Component(path, content)
    return components


def _component(study: StudySpec, part: str) -> tuple[str | None, str | None]:
    """Path of an autoencoder or text encoder, and the digest of its files if it is a folder."""
    spec = getattr(study, part)
    path: str | None = getattr(spec, "path", None)
    return path, None if path is None or study.checkpoints else component_content(path, spec.subfolder)


def check_compatible(study: StudySpec, store: Store, contents: RecordedContent | None = None) -> dict[str, Component]:
    """Check that a study may continue in its output folder. Sizes, steps, guidance, solvers, snapshots and images may be added.

    The files of a data source, of the autoencoder and of the text encoder may have moved to another path if their names and
    bytes are the same.

    Args:
        study: the study that continues.
        store: artefacts of the output folder.
        contents: digests of its files, if another output folder has recorded them; files are read for the others.

    Returns:
        The autoencoder and text encoder of the study, see `find_components`.

    Raises:
        ConfigError: the folder holds artefacts of a study that this one cannot continue.
    """
    has_artefacts = not store.is_empty()
    before = read_study_file(store.out) if has_artefacts and (store.out / STUDY_FILE).is_file() else None
    recorded = read_content(store.out) if has_artefacts else RecordedContent()
    if contents is None:
        components = find_components(study, store.out, before, recorded.components)
    else:
        components = dict(contents.components)
    if before is None:
        return components
    old_fields, new_fields = before.immutable_fields(), study.immutable_fields()
    reason = ""
    for part in DATA_PARTS:
        if _only_path_differs(getattr(before.data, part), getattr(study.data, part)):
            different = _content_difference(before, study, part, recorded.data, {} if contents is None else contents.data)
            if different is None:
                new_fields["data"][part]["path"] = old_fields["data"][part]["path"]
            reason = reason or different or ""
    for part in COMPONENT_PARTS:
        for fields, known in ((old_fields[part], recorded.components), (new_fields[part], components)):
            if fields is not None and part in known:
                fields["path"] = known[part].path
        if part in recorded.components and part in components and recorded.components[part] != components[part]:
            reason = reason or ", whose files differ"
    shared = [name for name in old_fields if name in new_fields]  # fine-tuning sections may be added later
    difference = _first_difference({name: old_fields[name] for name in shared}, {name: new_fields[name] for name in shared})
    if difference is not None:
        key, old, new = difference
        is_path = key in {f"data.{part}.path" for part in DATA_PARTS} | {f"{part}.path" for part in COMPONENT_PARTS}
        raise ConfigError(
            f"{store.out}: its artefacts were made with {key} = {old}, but the study has {new}{reason if is_path else ''}; "
            f"set {key} back to {old}, or give another --out"
        )
    return components


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
