"""Artefacts on disk: folders `artefacts/<kind>/<digest>/`, each either complete or absent.

A stage writes into a temporary folder. At its end the manifest is written, all files are flushed to disk, and one rename moves
the folder into place. A killed stage leaves only a folder under `artefacts/.partial/`, which the next run removes.

The manifest has the SHA-256 of every file and of its own content. They are compared when a process first reads the artefact.
Manifests of older versions have no checksums, and are read without the comparison.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from isocost.errors import RunError
from isocost.utils.environment import provenance
from isocost.utils.file_hash import file_sha256
from isocost.utils.host import host_name
from isocost.utils.output_paths import remove_leftovers

MANIFEST = "isocost.json"
FILE_CHECKSUMS, OWN_CHECKSUM = "files_sha256", "manifest_sha256"


class Manifest(dict[str, Any]):
    """The content of a manifest. A missing field is a RunError that names the file and the remedy."""

    def __init__(self, file: Path, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.file = file

    def __missing__(self, key: str) -> Any:
        raise RunError(f"{self.file}: has no field {key}, so it is damaged; {remedy(self.file.parent)}")


class Store:
    """The artefacts of one output folder."""

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        self.root = self.out / "artefacts"

    def folder(self, kind: str, name: str) -> Path:
        """The folder of an artefact, whether it exists or not."""
        return self.root / kind / name

    def has(self, kind: str, name: str) -> bool:
        """Whether the artefact exists."""
        return (self.folder(kind, name) / MANIFEST).is_file()

    def open(self, kind: str, name: str) -> Path:
        """The folder of an artefact that exists, to read its files.

        Raises:
            RunError: a file is missing or damaged.
        """
        folder = self.folder(kind, name)
        verified_manifest(folder)
        return folder

    def artefacts(self, kind: str) -> list[Path]:
        """The folders of all artefacts of a kind. Other files and folders are ignored."""
        folders = (self.root / kind).glob("[!.]*") if (self.root / kind).is_dir() else ()
        return sorted(folder for folder in folders if (folder / MANIFEST).is_file())

    def manifest(self, kind: str, name: str) -> Manifest:
        """The manifest of an artefact: how it was made, and its facts.

        Raises:
            RunError: it is damaged.
        """
        return read_manifest(self.folder(kind, name))

    def is_empty(self) -> bool:
        """Whether the store has neither artefacts nor training states."""
        return not any(self.root.glob(f"[!.]*/*/{MANIFEST}")) and not any(self.root.glob("run/*/state-*"))

    @contextmanager
    def create(self, kind: str, name: str, manifest: dict[str, Any]) -> Iterator[Path]:
        """Create an artefact: yields a folder to write into, which is published when the block ends without an error.

        Args:
            kind: kind of the artefact.
            name: digest of its spec.
            manifest: its facts; the block may add more.
        """
        partial = self.root / ".partial" / f"{kind}-{name}.{host_name()}.{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            publish(partial, self.folder(kind, name), {"kind": kind, "digest": name, **manifest})
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def remove(self, kind: str, name: str) -> None:
        """Remove an artefact in one step, so that no part of it is ever left in its place."""
        folder = self.folder(kind, name)
        retired = self.root / ".partial" / f"{kind}-{name}.old.{host_name()}.{os.getpid()}"
        retired.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(retired)
        shutil.rmtree(retired)

    def remove_partial(self) -> None:
        """Remove the temporary files and folders of killed processes; files that the user put there stay."""
        remove_leftovers(self.root / ".partial", r"[a-z0-9-]+(\.old)?\.")
        for folder in (self.out, self.out / "report"):
            remove_leftovers(
                folder, r"\.(status\.json|study\.yaml|table.*\.(csv|parquet)|claims\.md|summary\.md|index\.html)\."
            )


def publish(partial: Path, final: Path, manifest: dict[str, Any], *, replace: bool = True, with_checksums: bool = True) -> None:
    """Write the manifest, flush every file to disk, and rename the folder `partial` to `final` in one step.

    Args:
        partial: the complete folder without its manifest.
        final: the folder of the artefact.
        manifest: facts of the artefact.
        replace: whether an earlier folder at `final` is replaced.
        with_checksums: False for files that have checksums of their own.

    Raises:
        RunError: `final` exists and must not be replaced.
    """
    stamp = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "provenance": provenance()}
    content = {**manifest, **stamp}
    if with_checksums:
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        content[FILE_CHECKSUMS] = {file.relative_to(partial).as_posix(): file_sha256(file) for file in files}
        content[OWN_CHECKSUM] = _checksum_of(content)
    write_json(partial / MANIFEST, content)
    for file in [*partial.rglob("*"), partial]:
        _flush(file)
    final.parent.mkdir(parents=True, exist_ok=True)
    if not replace:
        try:
            partial.rename(final)
        except OSError as error:
            if not final.exists():
                raise
            raise RunError(f"{final}: another process has written it in the meantime; nothing was changed there") from error
    else:
        replace_folder(partial, final)
    _flush(final.parent)


def replace_folder(partial: Path, final: Path) -> None:
    """Rename the folder `partial` to `final`, in place of an earlier folder there."""
    if not final.exists():
        partial.rename(final)
        return
    retired = partial.with_name(f"old-{partial.name}")
    final.rename(retired)
    partial.rename(final)
    shutil.rmtree(retired)


def copy_artefact(folder: Path, final: Path, partial_root: Path) -> None:
    """Copy an artefact from another output folder to `final`. `final` never holds an incomplete artefact.

    Raises:
        RunError: a file of the artefact is missing or damaged.
    """
    if (folder / MANIFEST).is_file():
        verified_manifest(folder)
    partial = partial_root / f"copy-{folder.name}.{host_name()}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        copy_folder(folder, partial)
        for file in [*partial.rglob("*"), partial]:
            _flush(file)
        final.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _flush(final.parent)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder; the owner can write the copy even if the source is read-only."""
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    for path in [target, *target.rglob("*")]:
        if path.is_dir():
            path.chmod(path.stat().st_mode | stat.S_IRWXU)


def free_disk(path: Path) -> int:
    """Free bytes of the disk of `path`, which need not exist yet."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def remedy(folder: Path) -> str:
    """The remedy for a damaged artefact, as the end of a message."""
    return f"remove {folder}, and the next run of its study makes it again"


def read_manifest(folder: Path) -> Manifest:
    """The `isocost.json` of an artefact or checkpoint folder.

    Raises:
        RunError: it is missing, is not a JSON object, or does not match its own checksum.
    """
    file = folder / MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        own_checksum = _checksum_of(content) if isinstance(content, dict) else None
    except FileNotFoundError as error:
        raise RunError(f"{file}: missing; {remedy(folder)}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file}: damaged, it is not JSON; {remedy(folder)}") from error
    if not isinstance(content, dict):
        raise RunError(f"{file}: damaged, it is not a JSON object; {remedy(folder)}")
    has_checksums = {FILE_CHECKSUMS, OWN_CHECKSUM} & content.keys()
    if has_checksums and content.get(OWN_CHECKSUM) != own_checksum:
        raise RunError(
            f"{file}: damaged, it does not match its checksum; {remedy(folder)} "
            f"(if you have changed it yourself, remove its entries {FILE_CHECKSUMS} and {OWN_CHECKSUM})"
        )
    return Manifest(file, content)


def verified_manifest(folder: Path) -> Manifest:
    """The manifest of an artefact whose files all match the checksums in it. A process verifies each file only once.

    Raises:
        RunError: the manifest or a file is missing or damaged; the message names it and the remedy.
    """
    manifest = read_manifest(folder)
    checksums = manifest.get(FILE_CHECKSUMS, {})
    if not isinstance(checksums, dict):
        raise RunError(f"{manifest.file}: damaged, its checksums are not a mapping; {remedy(folder)}")
    for name, checksum in checksums.items():
        if not (folder / name).is_file():
            raise RunError(f"{folder / name}: missing; {remedy(folder)}")
        if file_sha256(folder / name) != checksum:
            raise RunError(f"{folder / name}: damaged, it does not match its checksum; {remedy(folder)}")
    return manifest


def _checksum_of(content: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its own checksum."""
    plain = json.loads(json.dumps({key: value for key, value in content.items() if key != OWN_CHECKSUM}))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that replaces `path` in one step at the end of the block; after an error `path` is as before."""
    temporary = path.with_name(f".{path.name}.{host_name()}.{os.getpid()}")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
