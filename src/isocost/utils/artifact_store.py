"""Artefacts on disk: `artefacts/<kind>/<digest>/`, there whole or not at all.

A stage writes into a folder beside the final one; when it is done the manifest is written last, everything is flushed,
and one rename publishes it. A killed stage leaves only a folder under `artefacts/.partial/`, which the next run removes.
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
        """Where the artefact stands, or would stand."""
        return self.root / kind / name

    def has(self, kind: str, name: str) -> bool:
        """True when the artefact is there whole."""
        return (self.folder(kind, name) / MANIFEST).is_file()

    def manifest(self, kind: str, name: str) -> dict[str, Any]:
        """What made the artefact, and what it reports of itself."""
        return read_manifest(self.folder(kind, name))

    def is_empty(self) -> bool:
        """True where no artefact and no training state stands."""
        return not any(self.root.glob(f"[!.]*/*/{MANIFEST}")) and not any(self.root.glob("run/*/state-*"))

    @contextmanager
    def create(self, kind: str, name: str, manifest: dict[str, Any]) -> Iterator[Path]:
        """A folder to write an artefact into; published when the block ends well. `manifest` may be filled meanwhile."""
        partial = self.root / ".partial" / f"{kind}-{name}.{platform.node()}.{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        publish(partial, self.folder(kind, name), {"kind": kind, "digest": name, **manifest})

    def remove(self, kind: str, name: str) -> None:
        """Remove an artefact in one step: it is whole, and then it is not there."""
        folder = self.folder(kind, name)
        retired = self.root / ".partial" / f"{kind}-{name}.old.{platform.node()}.{os.getpid()}"
        retired.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(retired)
        shutil.rmtree(retired)

    def remove_partial(self) -> None:
        """Remove what killed processes of this machine left unfinished."""
        for folder in (self.root / ".partial").glob("*"):
            _, host, pid = folder.name.rsplit(".", 2)
            if host == platform.node() and not is_alive(int(pid)):
                shutil.rmtree(folder)


def publish(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest last, flush every file to disk, and rename `partial` to `final` in one step."""
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
    """Copy an artefact of another output folder; it is there whole or not at all."""
    partial = partial_root / f"copy-{folder.name}.{platform.node()}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder, partial)
    for file in [*partial.rglob("*"), partial]:
        _flush(file)
    final.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(final)
    _flush(final.parent)


def free_disk(path: Path) -> int:
    """Bytes free on the disk on which `path` lies, or would lie."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def read_manifest(folder: Path) -> dict[str, Any]:
    """The `isocost.json` of an artefact or checkpoint folder."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """JSON text, readable, with a final newline."""
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
    """Whether a process of this machine runs; True where that cannot be told."""
    return Path(f"/proc/{pid}").exists() if Path("/proc").is_dir() else True
