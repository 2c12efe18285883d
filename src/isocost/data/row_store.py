"""Tables of fixed-shape rows in safetensors shards, on a disk or in an object store, read row by row.

Because every row has one shape, the place of row n is known: a local shard is mapped into memory, a remote one answers
to ranges of bytes, and nothing else is read. Each row carries its CRC-32 and is checked whenever it is read.

Shapes: S rows a shard, B rows asked for.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from isocost.errors import RunError
from isocost.models.streaming_safetensors import raw_bytes

_NUMPY = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32}
_CRC = "crc32"


class ShardStore:
    """A folder, local or of any store that fsspec knows (`s3://bucket/caches`)."""

    def __init__(self, url: str | Path) -> None:
        self.url = str(url).rstrip("/")
        self.files, self.root = fsspec.core.url_to_fs(self.url)
        self.is_local = isinstance(self.files, fsspec.implementations.local.LocalFileSystem)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where it is not there."""
        return int(self.files.size(self.path(name))) if self.files.exists(self.path(name)) else None

    def sizes(self) -> dict[str, int]:
        """Bytes of every file of the folder."""
        self.files.invalidate_cache()
        listed = self.files.ls(self.root, detail=True) if self.files.exists(self.root) else []
        return {str(entry["name"]).rsplit("/", 1)[-1]: int(entry["size"]) for entry in listed if entry["type"] == "file"}

    def write(self, name: str, data: bytes) -> None:
        """A file that is there whole or not at all: local ones are flushed and renamed, stores put objects whole."""
        if not self.is_local:
            self.files.makedirs(self.root, exist_ok=True)
            with self.files.open(self.path(name), "wb") as file:
                file.write(data)
            return
        folder = Path(self.root)
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / f".{name}.{os.getpid()}"
        try:
            with beside.open("wb") as local:
                local.write(data)
                local.flush()
                os.fsync(local.fileno())
            beside.replace(folder / name)
        finally:
            beside.unlink(missing_ok=True)

    def read(self, name: str) -> bytes:
        return self.files.cat_file(self.path(name))


@dataclass(frozen=True)
class _Column:
    name: str
    dtype: Any
    shape: tuple[int, ...]
    start: int
    row_bytes: int


def write_shard(place: ShardStore, name: str, columns: Mapping[str, Tensor]) -> int:
    """Write the rows of one shard, columns [S, ...], with a checksum of each row; returns its bytes."""
    crcs = []
    for row in range(len(next(iter(columns.values())))):
        crc = 0
        for column in sorted(columns):
            crc = zlib.crc32(raw_bytes(columns[column][row]), crc)
        crcs.append(crc)
    data = save({**{key: value.contiguous() for key, value in columns.items()}, _CRC: torch.tensor(crcs)})
    place.write(name, data)
    return len(data)


class RowTable:
    """The shards of one table opened for reading.

    Raises:
        RunError: a shard is missing or has another size than the index says.
    """

    def __init__(self, place: ShardStore, files: Sequence[Mapping[str, Any]], shard_size: int) -> None:
        """`files`: {"name", "bytes"} of every shard in order, all of `shard_size` rows but the last."""
        self.place, self.files, self.shard_size = place, list(files), shard_size
        self._maps: dict[int, np.memmap] = {}
        self._headers: dict[int, list[_Column]] = {}
        found = place.sizes()
        for file in self.files:
            name, expected = file["name"], file["bytes"]
            if found.get(name, 0) != expected:
                held = "is not there" if name not in found else f"holds {found[name]} bytes"
                raise RunError(f"{place.url}/{name}: the shard {held}, its index says {expected} bytes; {self._remedy}")

    @property
    def _remedy(self) -> str:
        return f"remove {self.place.url}/isocost.json and this shard, and the same command writes it anew"

    def rows(self, numbers: Tensor) -> dict[str, Tensor]:
        """The rows int64 [B] of the table: a tensor [B, ...] for every column, in the order asked for.

        Raises:
            RunError: a row is not what was written.
        """
        places = numbers.numpy()
        shards, inside = places // self.shard_size, places % self.shard_size
        made: dict[str, np.ndarray] = {}
        for shard in np.unique(shards):
            where = np.flatnonzero(shards == shard)
            columns = self._columns(int(shard))
            blocks = self._blocks(int(shard), columns, inside[where])
            for at, row in zip(where, blocks, strict=True):
                self._check(int(shard), columns, row)
                for column, block in zip(columns, row, strict=True):
                    if column.name == _CRC:
                        continue
                    if column.name not in made:
                        made[column.name] = np.empty((len(places), *column.shape), column.dtype)
                    made[column.name][at] = np.frombuffer(block, column.dtype).reshape(column.shape)
        return {name: torch.from_numpy(values) for name, values in made.items()}

    def _check(self, shard: int, columns: list[_Column], row: list[Any]) -> None:
        crc, expected = 0, None
        for column, block in zip(columns, row, strict=True):
            if column.name == _CRC:
                expected = int(np.frombuffer(block, np.int64)[0])
            else:
                crc = zlib.crc32(block, crc)
        if crc != expected:
            raise RunError(
                f"{self.place.url}/{self.files[shard]['name']}: a row does not match its checksum: it was damaged after it was"
                f" written; {self._remedy}"
            )

    def _blocks(self, shard: int, columns: list[_Column], rows: np.ndarray) -> list[list[Any]]:
        """Bytes of every column of the given rows, row by row."""
        starts = [column.start + int(row) * column.row_bytes for row in rows for column in columns]
        ends = [start + column.row_bytes for start, column in zip(starts, columns * len(rows), strict=True)]
        if self.place.is_local:
            whole = self._map(shard)
            flat: list[Any] = [whole[start:end] for start, end in zip(starts, ends, strict=True)]
        else:
            flat = self.place.files.cat_ranges([self.place.path(self.files[shard]["name"])] * len(starts), starts, ends)
        return [flat[at : at + len(columns)] for at in range(0, len(flat), len(columns))]

    def _map(self, shard: int) -> np.memmap:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self.place.path(self.files[shard]["name"]), np.uint8, mode="r")
        return self._maps[shard]

    def _columns(self, shard: int) -> list[_Column]:
        if shard not in self._headers:
            path = self.place.path(self.files[shard]["name"])
            length = int.from_bytes(self.place.files.cat_file(path, 0, 8), "little")
            header = json.loads(self.place.files.cat_file(path, 8, 8 + length))
            columns = []
            for name in sorted(key for key in header if key != "__metadata__"):
                about = header[name]
                start, end = about["data_offsets"]
                num_rows, *shape = about["shape"]
                kind = _NUMPY[about["dtype"]]
                columns.append(_Column(name, kind, tuple(shape), 8 + length + start, (end - start) // num_rows))
            self._headers[shard] = columns
        return self._headers[shard]

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(int(file["bytes"]) for file in self.files)
