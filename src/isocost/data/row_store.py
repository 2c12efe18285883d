"""Tables of fixed-shape rows in safetensors shards, on a disk or in an object store, read row by row.

All rows of a table have the same shape, so the position of row n in its shard is known. A local shard is mapped into memory,
from a remote one only the needed byte ranges are read. Each row has a CRC-32 that is checked whenever the row is read.

Shapes: S rows per shard, B rows to read.
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

_NUMPY_DTYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32}
_CRC = "crc32"


class ShardStore:
    """A folder on a local disk or in any object store that fsspec supports (`s3://bucket/caches`)."""

    def __init__(self, url: str | Path) -> None:
        self.url = str(url).rstrip("/")
        self.filesystem, self.root = fsspec.core.url_to_fs(self.url)
        self.is_local = isinstance(self.filesystem, fsspec.implementations.local.LocalFileSystem)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, or None if there is no such file."""
        return int(self.filesystem.size(self.path(name))) if self.filesystem.exists(self.path(name)) else None

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file of the folder."""
        self.filesystem.invalidate_cache()
        entries = self.filesystem.ls(self.root, detail=True) if self.filesystem.exists(self.root) else []
        return {str(entry["name"]).rsplit("/", 1)[-1]: int(entry["size"]) for entry in entries if entry["type"] == "file"}

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically: a local file is flushed and renamed; object stores write objects atomically themselves."""
        if not self.is_local:
            self.filesystem.makedirs(self.root, exist_ok=True)
            with self.filesystem.open(self.path(name), "wb") as file:
                file.write(data)
            return
        folder = Path(self.root)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{name}.{os.getpid()}"
        try:
            with temporary.open("wb") as local:
                local.write(data)
                local.flush()
                os.fsync(local.fileno())
            temporary.replace(folder / name)
        finally:
            temporary.unlink(missing_ok=True)

    def read(self, name: str) -> bytes:
        return self.filesystem.cat_file(self.path(name))


@dataclass(frozen=True)
class _Column:
    name: str
    dtype: Any
    shape: tuple[int, ...]
    start: int
    row_bytes: int
    num_rows: int


def write_shard(store: ShardStore, name: str, columns: Mapping[str, Tensor]) -> int:
    """Write a shard of columns [S, ...] with a checksum of each row; returns the bytes of the file."""
    crcs = []
    for row in range(len(next(iter(columns.values())))):
        crc = 0
        for column in sorted(columns):
            crc = zlib.crc32(raw_bytes(columns[column][row]), crc)
        crcs.append(crc)
    data = save({**{key: value.contiguous() for key, value in columns.items()}, _CRC: torch.tensor(crcs)})
    store.write(name, data)
    return len(data)


class RowTable:
    """A table whose shards are open for reading.

    Raises:
        RunError: a shard is missing, or its size differs from the index.
    """

    def __init__(self, store: ShardStore, files: Sequence[Mapping[str, Any]], shard_size: int) -> None:
        """
        Args:
            files: {"name", "bytes"} of every shard in order.
            shard_size: rows of every shard but the last.
        """
        self.store, self.files, self.shard_size = store, list(files), shard_size
        self._maps: dict[int, np.memmap] = {}
        self._headers: dict[int, list[_Column]] = {}
        sizes = store.sizes()
        for file in self.files:
            name, expected = file["name"], file["bytes"]
            if sizes.get(name, 0) != expected:
                problem = "is missing" if name not in sizes else f"has {sizes[name]} bytes"
                raise RunError(f"{store.url}/{name}: the shard {problem}, the index expects {expected} bytes; {self._remedy}")

    @property
    def _index_remedy(self) -> str:
        return f"remove {self.store.url}/isocost.json, and the same command writes it again"

    @property
    def _remedy(self) -> str:
        return f"remove {self.store.url}/isocost.json and this shard, and the same command writes them again"

    def rows(self, indices: Tensor, **columns_needed: str) -> dict[str, Tensor]:
        """Read rows int64 [B] of the table: a tensor [B, ...] for every column, in the order of `indices`.

        Args:
            indices: numbers of the rows.
            columns_needed: columns that the table must have, with numpy's letter for the kind of their type, "f" or "i".

        Raises:
            RunError: a row does not match its checksum, a column is missing, or a file or the index is damaged.
        """
        row_indices = indices.numpy()
        shards, rows_in_shard = row_indices // self.shard_size, row_indices % self.shard_size
        result: dict[str, np.ndarray] = {}
        for shard in np.unique(shards):
            positions = np.flatnonzero(shards == shard)
            if not 0 <= shard < len(self.files):
                raise RunError(
                    f"{self.store.url}: the index has no shard for row {row_indices[positions[0]]}; {self._index_remedy}"
                )
            columns = self._columns(int(shard))
            self._check_columns(int(shard), columns, int(rows_in_shard[positions].max()), columns_needed)
            blocks = self._blocks(int(shard), columns, rows_in_shard[positions])
            for position, row in zip(positions, blocks, strict=True):
                self._check(int(shard), columns, row)
                for column, block in zip(columns, row, strict=True):
                    if column.name == _CRC:
                        continue
                    if column.name not in result:
                        result[column.name] = np.empty((len(row_indices), *column.shape), column.dtype)
                    result[column.name][position] = np.frombuffer(block, column.dtype).reshape(column.shape)
        return {name: torch.from_numpy(values) for name, values in result.items()}

    def _check_columns(self, shard: int, columns: list[_Column], last_row: int, needed: Mapping[str, str]) -> None:
        """Raise RunError if a shard lacks a row or a column."""
        kinds = {column.name: np.dtype(column.dtype).kind for column in columns}
        problem = ""
        if last_row >= min(column.num_rows for column in columns):
            problem = f"the shard has no row {last_row}"
        elif wrong := next((name for name, kind in needed.items() if kinds.get(name) != kind), None):
            problem = f"the column {wrong} is missing or has another type"
        if problem:
            raise RunError(f"{self.store.url}/{self.files[shard]['name']}: the file is damaged ({problem}); {self._remedy}")

    def _check(self, shard: int, columns: list[_Column], row: list[Any]) -> None:
        crc, expected = 0, None
        for column, block in zip(columns, row, strict=True):
            if column.name == _CRC:
                expected = int(np.frombuffer(block, np.int64)[0])
            else:
                crc = zlib.crc32(block, crc)
        if crc != expected:
            raise RunError(
                f"{self.store.url}/{self.files[shard]['name']}: a row does not match its checksum, so the file is damaged; "
                f"{self._remedy}"
            )

    def _blocks(self, shard: int, columns: list[_Column], rows: np.ndarray) -> list[list[Any]]:
        """Raw bytes of rows of a shard: for each row, the bytes of every column."""
        starts = [column.start + int(row) * column.row_bytes for row in rows for column in columns]
        ends = [start + column.row_bytes for start, column in zip(starts, columns * len(rows), strict=True)]
        if self.store.is_local:
            mapped = self._map(shard)
            flat: list[Any] = [mapped[start:end] for start, end in zip(starts, ends, strict=True)]
        else:
            flat = self.store.filesystem.cat_ranges([self.store.path(self.files[shard]["name"])] * len(starts), starts, ends)
        return [flat[start : start + len(columns)] for start in range(0, len(flat), len(columns))]

    def _map(self, shard: int) -> np.memmap:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self.store.path(self.files[shard]["name"]), np.uint8, mode="r")
        return self._maps[shard]

    def _columns(self, shard: int) -> list[_Column]:
        if shard not in self._headers:
            path = self.store.path(self.files[shard]["name"])
            self._headers[shard] = self._read_header(shard, path)
        return self._headers[shard]

    def _read_header(self, shard: int, path: str) -> list[_Column]:
        try:
            length = int.from_bytes(self.store.filesystem.cat_file(path, 0, 8), "little")
            header = json.loads(self.store.filesystem.cat_file(path, 8, 8 + length))
            columns = []
            for name in sorted(key for key in header if key != "__metadata__"):
                entry = header[name]
                start, end = entry["data_offsets"]
                num_rows, *shape = entry["shape"]
                if not all(type(number) is int for number in (start, end, num_rows, *shape)) or start < 0:
                    raise ValueError(f"the column {name} has a size or position that is no number")
                if 8 + length + end > self.files[shard]["bytes"]:
                    raise ValueError(f"the column {name} ends after the file")
                column = _Column(
                    name, _NUMPY_DTYPES[entry["dtype"]], tuple(shape), 8 + length + start, (end - start) // num_rows, num_rows
                )
                if column.row_bytes != np.dtype(column.dtype).itemsize * int(np.prod(shape)):
                    raise ValueError(f"the column {name} has another size than its header")
                columns.append(column)
            if not columns:
                raise ValueError("it has no columns")
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise RunError(
                f"{self.store.url}/{self.files[shard]['name']}: the file is damaged ({error}); {self._remedy}"
            ) from error
        return columns

    @cached_property
    def num_bytes(self) -> int:
        """Total bytes of all shards."""
        return sum(int(file["bytes"]) for file in self.files)
