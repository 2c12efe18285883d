"""Images with captions, from wherever they lie: folder, tar shards, a `datasets` data set, or the embedded scenes.

A source is read in one fixed order, so the position of an image is its id. What cannot be read is yielded as `Bad` with
its name and reason, never dropped in silence; the caller counts.

Shapes: H = W resolution, pixels.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import io
import json
import lzma
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from isocost.config.data import FolderSource, HubSource, ScenesSource, SourceSpec, WebdatasetSource
from isocost.data.synthetic import scenes
from isocost.errors import ConfigError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
TEST_OF_256 = 26
"""First bytes of a name's hash that `subset: test` takes: one in ten."""


@dataclass(frozen=True)
class Sample:
    """One image uint8 [H, W, 3] with its captions, and its labels int64 [A] where the source knows attributes."""

    name: str
    image: np.ndarray
    captions: tuple[str, ...]
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class UnreadableSample:
    """An image or caption that could not be read."""

    name: str
    reason: str


@dataclass(frozen=True)
class SkippedSample:
    """An image that was not asked for, with its captions."""

    name: str
    captions: tuple[str, ...]


def read_source(
    source: SourceSpec, resolution: int, wanted: Callable[[int], bool] = lambda position: True
) -> Iterator[Sample | UnreadableSample | SkippedSample]:
    """Read a source in its fixed order; images are cropped to the centre square and resized to `resolution`.

    Images at positions that are not `wanted` are not decoded.

    Raises:
        ConfigError: the source itself is missing or its caption file is broken.
    """
    if isinstance(source, ScenesSource):
        yield from _read_scenes(source, resolution, wanted)
        return
    readers = {"folder": _raw_folder, "webdataset": _raw_webdataset, "hub": _raw_hub}
    kept = (raw for raw in readers[source.kind](source) if _in_split(raw, source))  # type: ignore[operator]
    for position, raw in enumerate(kept):
        if source.limit is not None and position >= source.limit:
            return
        if isinstance(raw, UnreadableSample):
            yield raw
        else:
            yield _decode(raw, resolution) if wanted(position) else SkippedSample(raw.name, raw.captions)


def name_hash(name: str) -> bytes:
    """Where an image stands among all by a hash of its name: what is held out comes first, in an order that is none."""
    return hashlib.sha256(name.encode()).digest()


def _in_split(raw: _Raw | UnreadableSample, source: FolderSource | WebdatasetSource | HubSource) -> bool:
    """Whether an image is in the source's part, by its name alone; a shard that cannot be read is missing from every part."""
    if source.subset == "all" or (source.kind == "webdataset" and "/" not in raw.name):
        return True
    return (name_hash(raw.name)[0] < TEST_OF_256) == (source.subset == "test")


def source_fingerprint(source: SourceSpec) -> str:
    """Content hash of what a source holds: names and bytes of its files; for a Hub id its name and split.

    Raises:
        ConfigError: the files are missing.
    """
    if isinstance(source, ScenesSource):
        return f"scenes-v{scenes.VERSION}"
    if isinstance(source, HubSource) and not Path(source.path).exists():
        return f"hub:{source.path}"
    sha = hashlib.sha256()
    for file in _files_of(source):
        inside = file.relative_to(source.path) if Path(source.path).is_dir() else file.name
        sha.update(str(inside).encode())
        with file.open("rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                sha.update(block)
    return sha.hexdigest()[:16]


def num_classes(source: SourceSpec) -> tuple[int, ...] | None:
    """Number of values of each attribute head that the source's labels have; None where it has no labels known ahead."""
    return tuple(scenes.ATTRIBUTES.values()) if isinstance(source, ScenesSource) else None


# --- the readers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Raw:
    name: str
    data: bytes
    captions: tuple[str, ...]
    label: int | None = None


def _read_scenes(source: ScenesSource, resolution: int, wanted: Callable[[int], bool]) -> Iterator[Sample | SkippedSample]:
    for position, index in enumerate(range(source.first, source.first + source.num_images)):
        scene, name = scenes.scene(source.seed, index), f"scene-{source.seed}-{index}"
        captions = scenes.captions(scene)[:1]
        if wanted(position):
            yield Sample(name, scenes.render(scene, resolution), captions, scenes.attribute_labels(scene))
        else:
            yield SkippedSample(name, captions)


def _files_of(source: FolderSource | WebdatasetSource | HubSource) -> list[Path]:
    path = Path(source.path)
    if isinstance(source, WebdatasetSource):
        files = sorted(file for match in glob.glob(source.path) if (file := Path(match)).is_file()) or (
            [path] if path.is_file() else []
        )
        if not files:
            raise ConfigError(f"{source.path}: no such tar shard; give a path or a glob like data/train-*.tar")
        return files
    if not path.exists():
        raise ConfigError(f"{source.path}: no such file or folder; paths in a study are relative to where isocost is started")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    if isinstance(source, HubSource) and path.is_dir():
        word = re.compile(rf"(?<![A-Za-z]){re.escape(source.split)}(?![A-Za-z])")
        files = [file for file in files if file.suffix == ".parquet" and word.search(file.stem)]
        if not files:
            raise ConfigError(f"{source.path}: no Parquet file whose name holds the split '{source.split}'")
    if isinstance(source, FolderSource) and not any(file.suffix.lower() in IMAGE_SUFFIXES for file in files):
        raise ConfigError(f"{source.path}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def _raw_folder(source: FolderSource) -> Iterator[_Raw | UnreadableSample]:
    root = Path(source.path)
    if not root.is_dir():
        raise ConfigError(f"{source.path}: no such folder of images")
    images = [file for file in _files_of(source) if file.suffix.lower() in IMAGE_SUFFIXES]
    listed = root / "captions.jsonl"
    if listed.is_file():
        captions = _caption_lines(listed)
        unlisted = {str(file.relative_to(root)) for file in images} - captions.keys()
        for name in sorted(captions.keys() | unlisted):
            file = root / name
            if name in unlisted:
                yield UnreadableSample(name, "no line in captions.jsonl")
            elif not file.resolve().is_relative_to(root.resolve()):
                yield UnreadableSample(name, "captions.jsonl names a file outside its folder")
            elif not file.is_file():
                yield UnreadableSample(name, "named in captions.jsonl but not there")
            elif not _captions_nonempty(captions[name]):
                yield UnreadableSample(name, "empty caption")
            else:
                yield _Raw(name, file.read_bytes(), captions[name])
        return
    for file in images:
        name = str(file.relative_to(root))
        sidecars = [side for suffix in (".txt", ".json") if (side := file.with_suffix(suffix)).is_file()]
        if not sidecars:
            yield UnreadableSample(name, "no caption: neither captions.jsonl nor a .txt or .json beside it")
            continue
        yield _with_sidecar(name, file.read_bytes(), sidecars[0].name, sidecars[0].read_bytes())


def _caption_lines(file: Path) -> dict[str, tuple[str, ...]]:
    captions: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(file.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8"))
            captions[str(entry["file"])] = _captions_of(entry)
        except (ValueError, KeyError, TypeError) as error:
            remedy = 'each line is {"file": NAME, "caption": TEXT} or {"file": NAME, "captions": [TEXT, ...]}'
            raise ConfigError(f"{file}: line {number} is broken; {remedy}") from error
    return captions


def _raw_webdataset(source: WebdatasetSource) -> Iterator[_Raw | UnreadableSample]:
    for shard in _files_of(source):
        try:
            with tarfile.open(shard) as archive:
                yield from _raw_tar(shard.name, archive)
        except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            yield UnreadableSample(shard.name, f"tar shard cannot be read: {' '.join(str(error).split())}")


def _raw_tar(shard: str, archive: tarfile.TarFile) -> Iterator[_Raw | UnreadableSample]:
    group: dict[str, tuple[str, bytes]] = {}
    current = ""
    for member in archive:
        if not member.isfile():
            continue
        folder, _, last = member.name.rpartition("/")
        stem, _, suffix = last.partition(".")
        stem = f"{folder}/{stem}" if folder else stem
        if stem != current and group:
            yield _from_group(f"{shard}/{current}", group)
            group = {}
        current = stem
        stream = archive.extractfile(member)
        if stream is not None:
            group[f".{suffix.lower()}"] = (member.name, stream.read())
    if group:
        yield _from_group(f"{shard}/{current}", group)


def _from_group(name: str, group: dict[str, tuple[str, bytes]]) -> _Raw | UnreadableSample:
    images = [suffix for suffix in group if suffix in IMAGE_SUFFIXES]
    sidecars = [suffix for suffix in (".json", ".txt") if suffix in group]
    if not images or not sidecars:
        return UnreadableSample(name, "needs an image and a .json or .txt of the same name")
    return _with_sidecar(name, group[images[0]][1], *group[sidecars[0]])


def _raw_hub(source: HubSource) -> Iterator[_Raw | UnreadableSample]:
    import datasets
    import pyarrow as pa

    path = Path(source.path)
    if path.exists():
        files = [str(file) for file in _files_of(source)]
        try:
            table = datasets.load_dataset("parquet", data_files={source.split: files}, split=source.split)
        except (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
            raise ConfigError(f"{source.path}: not readable as Parquet: {' '.join(str(error).split())[:200]}") from error
    else:
        try:
            table = datasets.load_dataset(source.path, split=source.split)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"{source.path}: neither a local path nor a data set that loads from the Hub: {reason}"
            ) from error
    wanted = [source.image_column, source.caption_column] + ([source.label_column] if source.label_column else [])
    missing = [column for column in wanted if column not in table.column_names]
    if missing:
        raise ConfigError(f"{source.path}: no column '{missing[0]}'; there are: {', '.join(table.column_names)}")
    if isinstance(table.features[source.image_column], datasets.Image):
        table = table.cast_column(source.image_column, datasets.Image(decode=False))
    for position, row in enumerate(table.select_columns(wanted)):
        name, image = f"{source.split}/{position}", row[source.image_column]
        data = image.get("bytes") if isinstance(image, dict) else None
        captions = row[source.caption_column]
        captions = [captions] if isinstance(captions, str) else captions
        label = row[source.label_column] if source.label_column else None
        if not data:
            yield UnreadableSample(name, "no image bytes in the image column")
        elif not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
            yield UnreadableSample(name, "no caption, or an empty one")
        elif source.label_column and label is None:
            yield UnreadableSample(name, "no label")
        else:
            yield _Raw(name, data, tuple(captions), None if label is None else int(label))


# --- one image ------------------------------------------------------------------------------------------------------


def _with_sidecar(name: str, data: bytes, sidecar_name: str, sidecar: bytes) -> _Raw | UnreadableSample:
    try:
        text = sidecar.decode("utf-8-sig")
        captions = _captions_of(json.loads(text)) if sidecar_name.endswith(".json") else _captions_of({"caption": text.strip()})
    except (ValueError, KeyError, TypeError) as error:
        return UnreadableSample(name, f"caption file {sidecar_name} cannot be read: {' '.join(str(error).split())}")
    return (
        _Raw(name, data, captions)
        if _captions_nonempty(captions)
        else UnreadableSample(name, f"caption file {sidecar_name} is empty")
    )


def _captions_of(entry: dict[str, Any]) -> tuple[str, ...]:
    found = entry["captions"] if "captions" in entry else entry["caption"]
    captions = [found] if isinstance(found, str) else found
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise TypeError("captions are a text or a list of texts")
    return tuple(captions)


def _captions_nonempty(captions: tuple[str, ...]) -> bool:
    return bool(captions) and all(caption.strip() for caption in captions)


def _decode(raw: _Raw, resolution: int) -> Sample | UnreadableSample:
    try:
        with Image.open(io.BytesIO(raw.data)) as opened:
            image = square_rgb(opened, resolution)
    except UnidentifiedImageError:
        return UnreadableSample(raw.name, "image cannot be read: no known format")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return UnreadableSample(raw.name, f"image cannot be read: {' '.join(str(error).split())[:120]}")
    labels = None if raw.label is None else np.array([raw.label], dtype=np.int64)
    return Sample(raw.name, image, raw.captions, labels)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _apply_exif_orientation(opened: Image.Image) -> Image.Image:
    """Turned by its EXIF orientation; a broken EXIF block is not worth losing the image."""
    try:
        turn = _TURNS.get(opened.getexif().get(0x0112, 1))
    except (ValueError, TypeError, SyntaxError, OSError, KeyError, struct.error):
        turn = None
    return opened if turn is None else opened.transpose(turn)


def square_rgb(opened: Image.Image, resolution: int) -> np.ndarray:
    """Centre square of an image, on white where it is transparent, as uint8 [resolution, resolution, 3] (Lanczos)."""
    opened = _apply_exif_orientation(opened)
    if opened.mode.startswith("I;16"):
        opened = Image.fromarray((np.asarray(opened) / 257).round().astype(np.uint8))
    if opened.mode in ("RGBA", "LA", "PA") or "transparency" in opened.info:
        rgba = opened.convert("RGBA")
        opened = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    rgb = opened.convert("RGB")
    side = min(rgb.size)
    left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
    rgb = rgb.crop((left, top, left + side, top + side))
    if side != resolution:
        rgb = rgb.resize((resolution, resolution), Image.Resampling.LANCZOS)
    return np.asarray(rgb)


def read_photograph(file: Path) -> Image.Image:
    """An image that a person names, RGB, turned as its EXIF says.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: no such image")
    try:
        with Image.open(file) as image:
            return _apply_exif_orientation(image).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{file}: no image can be read from it ({error}); take it out, or give another") from error
