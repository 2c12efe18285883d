"""Artefacts on disk: folders `artefacts/<kind>/<digest>/`, each either complete or absent.

A stage writes into a temporary folder. At its end the manifest is written, all files are flushed to disk, and one rename moves
the folder into place. A killed stage leaves only a folder under `artefacts/.partial/`, which the next run removes.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from isocost.utils.environment import provenance

MANIFEST = "isocost.json"


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

    def manifest(self, kind: str, name: str) -> dict[str, Any]:
        """The manifest of an artefact: how it was made, and its facts."""
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
        partial = self.root / ".partial" / f"{kind}-{name}.{platform.node()}.{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        publish(partial, self.folder(kind, name), {"kind": kind, "digest": name, **manifest})

    def remove(self, kind: str, name: str) -> None:
        """Remove an artefact in one step, so that no part of it is ever left in its place."""
        folder = self.folder(kind, name)
        retired = self.root / ".partial" / f"{kind}-{name}.old.{platform.node()}.{os.getpid()}"
        retired.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(retired)
        shutil.rmtree(retired)

    def remove_partial(self) -> None:
        """Remove the temporary folders of killed processes of this machine."""
        for folder in (self.root / ".partial").glob("*"):
            _, host, pid = folder.name.rsplit(".", 2)
            if host == platform.node() and not is_alive(int(pid)):
                shutil.rmtree(folder)


def publish(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, flush every file to disk, and rename the folder `partial` to `final` in one step."""
    stamp = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "provenance": provenance()}
    write_json(partial / MANIFEST, {**manifest, **stamp})
    for file in [*partial.rglob("*"), partial]:
        _flush(file)
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        retired = partial.with_name(partial.name.replace(".", ".old.", 1))
        final.rename(retired)
        partial.rename(final)
        shutil.rmtree(retired)
    else:
        partial.rename(final)
    _flush(final.parent)


def copy_artefact(folder: Path, final: Path, partial_root: Path) -> None:
    """Copy an artefact from another output folder to `final`. `final` never holds an incomplete artefact."""
    partial = partial_root / f"copy-{folder.name}.{platform.node()}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder, partial)
    for file in [*partial.rglob("*"), partial]:
        _flush(file)
    final.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(final)
    _flush(final.parent)


def free_disk(path: Path) -> int:
    """Free bytes of the disk of `path`, which need not exist yet."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def read_manifest(folder: Path) -> dict[str, Any]:
    """The `isocost.json` of an artefact or checkpoint folder."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    _flush(temporary)
    temporary.replace(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; True on systems that do not show it."""
    return Path(f"/proc/{pid}").exists() if Path("/proc").is_dir() else True
