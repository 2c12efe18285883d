"""Readers of captions: text in any Unicode encoding, caption lists of a folder, caption tables."""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from isocost.data.image_files import printable
from isocost.errors import ConfigError
from isocost.utils.json_text import parse_json

CAPTION_LIST = "captions.jsonl"
"""isocost's own caption list of a folder."""
HUB_CAPTION_LISTS = ("metadata.jsonl", "metadata.csv")
"""Caption lists of `datasets`' imagefolder layout."""
LINE_REMEDY = 'each line must be {"file": NAME, "caption": TEXT} or {"file": NAME, "captions": [TEXT, ...]}'
HUB_LINE_REMEDY = 'each line must be {"file_name": NAME, "text": TEXT}'
TABLE_CAPTION_COLUMNS = ("text", "caption", "captions")
_FILE_KEYS, _CAPTION_KEYS = ("file", "file_name"), ("captions", "caption", "text")
_BYTE_ORDER_MARKS = (
    *((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")),
    *((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"), (codecs.BOM_UTF8, "utf-8-sig")),
)


def decode_text(data: bytes) -> str:
    """Decode UTF-8, or UTF-16 or UTF-32 with a byte order mark, which is removed.

    Raises:
        ValueError: the bytes have another encoding; the message has the number of the line.
    """
    encoding = next((encoding for mark, encoding in _BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        name = encoding.removesuffix("-sig").upper()
        raise ValueError(f"line {line}: byte 0x{error.object[error.start]:02x} is not {name}; save it as UTF-8") from error


def parse_captions(entry: Any) -> tuple[str, ...]:
    """The captions of a JSON object: the value of `captions`, `caption` or `text`, a string or a list of strings.

    Raises:
        ValueError: there are none, or they have another type.
    """
    keys = [key for key in _CAPTION_KEYS if key in entry] if isinstance(entry, dict) else []
    if not keys:
        raise ValueError("not a JSON object with caption or captions")
    captions = [entry[keys[0]]] if isinstance(entry[keys[0]], str) else entry[keys[0]]
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError("captions must be a string or a list of strings")
    return tuple(captions)


def caption_problem(captions: Sequence[Any] | None) -> str | None:
    """The reason why the captions of an image cannot be used; None if they can."""
    if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
        return "no caption, or an empty caption"
    for caption in captions:
        if printable(caption) != caption:
            return f"a caption has a lone surrogate: {printable(caption)[:80]}"
    return None


# --- caption lists of a folder --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionList:
    """The lines of captions.jsonl, metadata.jsonl or metadata.csv.

    Attributes:
        captions: by file name. The captions of several lines with the same file are combined, without duplicates.
        has_repeated_files: several lines with different captions have the same file.
    """

    captions: dict[str, tuple[str, ...]]
    has_repeated_files: bool


def read_caption_lists(root: Path, files: Sequence[Path]) -> CaptionList:
    """Read the caption lists of a folder and its subfolders. Names are relative to `root`; lines about one file add up.

    Raises:
        ConfigError: a line is broken, or a file cannot be read.
    """
    captions: dict[str, tuple[str, ...]] = {}
    has_repeated_files = False
    for file in files:
        folder = PurePosixPath(file.parent.relative_to(root).as_posix())
        for name, added in _lines_of(file):
            joined = str(folder / name)
            earlier = captions.get(joined)
            if earlier is not None:
                added = (*earlier, *(caption for caption in added if caption not in earlier))
                has_repeated_files = has_repeated_files or added != earlier
            captions[joined] = added
    return CaptionList(captions, has_repeated_files)


def _lines_of(file: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield file name and captions of every line of a caption list."""
    if file.suffix == ".csv":
        for row in read_caption_table(file, _FILE_KEYS[::-1], TABLE_CAPTION_COLUMNS):
            yield row.id, (row.caption,)
        return
    remedy = LINE_REMEDY if file.name == CAPTION_LIST else HUB_LINE_REMEDY
    for number, line in enumerate(_json_lines(file), start=1):
        if not line.strip():
            continue
        try:
            entry = parse_json(decode_text(line))
            names = [entry[key] for key in _FILE_KEYS if key in entry] if isinstance(entry, dict) else []
            if not names or not isinstance(names[0], str | int | float):
                raise ValueError("no file name")
            yield str(names[0]), parse_captions(entry)
        except ValueError as error:
            reason = re.sub(r"^line 1: ", "", " ".join(str(error).split()))[:120]
            raise ConfigError(f"{printable(str(file))}: line {number} is broken ({reason}); {remedy}") from error


def _json_lines(file: Path) -> list[bytes]:
    """The lines of a file in UTF-8. Only a newline ends a line, because JSON strings may contain other separators."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{printable(str(file))}: cannot be read ({error.strerror}); check its permissions") from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            data = decode_text(data).encode("utf-8", "surrogatepass")
        except ValueError as error:
            raise ConfigError(f"{printable(str(file))}: {error}") from error
    return data.removeprefix(codecs.BOM_UTF8).split(b"\n")


# --- tables ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TableRow:
    """A row of a caption table, with the number of its last line."""

    line: int
    id: str
    caption: str


def read_caption_table(file: Path, id_columns: Sequence[str], caption_columns: Sequence[str]) -> list[TableRow]:
    """Read two columns of a table with a header, separated by commas, semicolons or tabs.

    Args:
        id_columns: names of the column of ids; the first one that exists is read.
        caption_columns: the same for the column of captions.

    Raises:
        ConfigError: there is no such file, its encoding is not Unicode, a column is missing or appears twice, or a row has too
            few or too many values.
    """
    if not os.path.isfile(file):
        raise ConfigError(f"{file}: no such file")
    try:
        text = decode_text(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: the table cannot be read ({error})") from error
    rows, columns = _reader(text, id_columns, caption_columns)
    repeated = next((name for name in (*id_columns, *caption_columns) if columns.count(name) > 1), None)
    if repeated is not None:
        raise ConfigError(f"{file}: the column {repeated} appears twice; keep one of the two")
    indices = [
        next((columns.index(name) for name in names if name in columns), None) for names in (id_columns, caption_columns)
    ]
    if indices[0] is None or indices[1] is None:
        raise ConfigError(
            f"{file}: needs a column {' or '.join(id_columns)} and a column {' or '.join(caption_columns)}; it has {columns}"
        )
    table = []
    try:
        for row in rows:
            if row and (len(row) < len(columns) or any(row[len(columns) :])):
                raise ConfigError(
                    f"{file}: line {rows.line_num + 1} has {len(row)} values for {len(columns)} columns; "
                    "complete the row, and put captions with a separator in double quotes"
                )
            if row:
                table.append(TableRow(rows.line_num + 1, row[indices[0]].strip(), row[indices[1]]))
    except csv.Error as error:
        raise ConfigError(f"{file}: line {rows.line_num + 1} is not a table row ({error}); save it as CSV again") from error
    return table


def _reader(text: str, id_columns: Sequence[str], caption_columns: Sequence[str]) -> tuple[Any, list[str]]:
    """A reader of the rows after the header, and the header's columns; the separator is the first that yields both columns."""
    header = text.partition("\n")[0]
    for delimiter in ",;\t":
        columns = [column.strip(' "') for column in header.rstrip("\r").split(delimiter)]
        if {*id_columns} & {*columns} and {*caption_columns} & {*columns}:
            break
    else:
        delimiter, columns = ",", header.rstrip("\r").split(",")
    rows = csv.reader(io.StringIO(text[len(header) + 1 :], newline=""), delimiter=delimiter)
    return rows, columns
