"""Read images with captions from a folder, tar shards, a data set of `datasets` or the built-in synthetic scenes.

A source is read in a fixed order, so the position of an image is its id. A sample that cannot be read is yielded as an
`UnreadableSample` with its name and the reason; it is never dropped silently.

Shapes: R resolution, A number of labels.
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
NUM_TEST_BYTES = 26
"""`subset: test` takes the images whose name hash has a first byte below this number: 26 of 256, about 10 %."""


@dataclass(frozen=True)
class Sample:
    """An image, uint8 [R, R, 3], with its captions and its labels, int64 [A]; labels are None if the source has none."""

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
    """An image that was not decoded because the caller does not need it, with its captions."""

    name: str
    captions: tuple[str, ...]


def read_source(
    source: SourceSpec, resolution: int, is_needed: Callable[[int], bool] = lambda position: True
) -> Iterator[Sample | UnreadableSample | SkippedSample]:
    """Read a source in its fixed order; images are cropped to the centre square and resized to `resolution`.

    Args:
        is_needed: whether the image at a position must be decoded; other images are yielded as `SkippedSample`.

    Raises:
        ConfigError: the source itself is missing, or its caption file is broken.
    """
    if isinstance(source, ScenesSource):
        yield from _read_scenes(source, resolution, is_needed)
        return
    readers = {"folder": _raw_folder, "webdataset": _raw_webdataset, "hub": _raw_hub}
    subset = (raw for raw in readers[source.kind](source) if _in_subset(raw, source))  # type: ignore[operator]
    for position, raw in enumerate(subset):
        if source.limit is not None and position >= source.limit:
            return
        if isinstance(raw, UnreadableSample):
            yield raw
        else:
            yield _decode(raw, resolution) if is_needed(position) else SkippedSample(raw.name, raw.captions)


def name_hash(name: str) -> bytes:
    """Hash the name of an image. The test subset has the lowest hashes; sorting by hash gives a pseudo-random order."""
    return hashlib.sha256(name.encode()).digest()


def _in_subset(raw: _Raw | UnreadableSample, source: FolderSource | WebdatasetSource | HubSource) -> bool:
    """Whether the subset has an image, by a hash of its name. A tar shard that cannot be read is reported in every subset."""
    if source.subset == "all" or (source.kind == "webdataset" and "/" not in raw.name):
        return True
    return (name_hash(raw.name)[0] < NUM_TEST_BYTES) == (source.subset == "test")


def source_fingerprint(source: SourceSpec) -> str:
    """Hash the content of a source: names and bytes of its files. For a Hub id it is the id itself.

    Raises:
        ConfigError: the files are missing.
    """
    if isinstance(source, ScenesSource):
        return f"scenes-v{scenes.VERSION}"
    if isinstance(source, HubSource) and not Path(source.path).exists():
        return f"hub:{source.path}"
    sha = hashlib.sha256()
    for file in _files_of(source):
        name = file.relative_to(source.path) if Path(source.path).is_dir() else file.name
        sha.update(str(name).encode())
        with file.open("rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                sha.update(block)
    return sha.hexdigest()[:16]


def num_classes(source: SourceSpec) -> tuple[int, ...] | None:
    """Return the number of classes of each label of a source; None if it is not known before reading."""
    return tuple(scenes.ATTRIBUTES.values()) if isinstance(source, ScenesSource) else None


# --- the readers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Raw:
    name: str
    data: bytes
    captions: tuple[str, ...]
    label: int | None = None


def _read_scenes(source: ScenesSource, resolution: int, is_needed: Callable[[int], bool]) -> Iterator[Sample | SkippedSample]:
    for position, index in enumerate(range(source.first, source.first + source.num_images)):
        scene, name = scenes.scene(source.seed, index), f"scene-{source.seed}-{index}"
        captions = scenes.captions(scene)[:1]
        if is_needed(position):
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
        raise ConfigError(
            f"{source.path}: no such file or folder; paths in a study are relative to the folder in which isocost is started"
        )
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    if isinstance(source, HubSource) and path.is_dir():
        word = re.compile(rf"(?<![A-Za-z]){re.escape(source.split)}(?![A-Za-z])")
        files = [file for file in files if file.suffix == ".parquet" and word.search(file.stem)]
        if not files:
            raise ConfigError(f"{source.path}: no Parquet file has the split '{source.split}' in its name; set `split`")
    if isinstance(source, FolderSource) and not any(file.suffix.lower() in IMAGE_SUFFIXES for file in files):
        raise ConfigError(f"{source.path}: the folder has no images; supported are {', '.join(sorted(IMAGE_SUFFIXES))}")
    return files


def _raw_folder(source: FolderSource) -> Iterator[_Raw | UnreadableSample]:
    root = Path(source.path)
    if not root.is_dir():
        raise ConfigError(f"{source.path}: no such folder of images; set `path` to an existing folder")
    images = [file for file in _files_of(source) if file.suffix.lower() in IMAGE_SUFFIXES]
    captions_file = root / "captions.jsonl"
    if captions_file.is_file():
        captions = _read_captions_file(captions_file)
        unlisted = {str(file.relative_to(root)) for file in images} - captions.keys()
        for name in sorted(captions.keys() | unlisted):
            file = root / name
            if name in unlisted:
                yield UnreadableSample(name, "captions.jsonl has no line for it")
            elif not file.resolve().is_relative_to(root.resolve()):
                yield UnreadableSample(name, "captions.jsonl names a file outside its folder")
            elif not file.is_file():
                yield UnreadableSample(name, "captions.jsonl names it, but the image file is missing")
            elif not _captions_nonempty(captions[name]):
                yield UnreadableSample(name, "empty caption")
            else:
                yield _Raw(name, file.read_bytes(), captions[name])
        return
    for file in images:
        name = str(file.relative_to(root))
        sidecars = [sidecar for suffix in (".txt", ".json") if (sidecar := file.with_suffix(suffix)).is_file()]
        if not sidecars:
            yield UnreadableSample(name, "no caption: there is no captions.jsonl, and no .txt or .json file of the same name")
            continue
        yield _with_sidecar(name, file.read_bytes(), sidecars[0].name, sidecars[0].read_bytes())


def _read_captions_file(file: Path) -> dict[str, tuple[str, ...]]:
    captions: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(file.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8"))
            captions[str(entry["file"])] = _parse_captions(entry)
        except (ValueError, KeyError, TypeError) as error:
            remedy = 'each line must be {"file": NAME, "caption": TEXT} or {"file": NAME, "captions": [TEXT, ...]}'
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
            raise ConfigError(
                f"{source.path}: cannot be read as Parquet; set `path` to Parquet files: {' '.join(str(error).split())[:200]}"
            ) from error
    else:
        try:
            table = datasets.load_dataset(source.path, split=source.split)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"{source.path}: neither a local path nor a data set that can be loaded from the Hub: {reason}"
            ) from error
    columns = [source.image_column, source.caption_column] + ([source.label_column] if source.label_column else [])
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise ConfigError(f"{source.path}: no column '{missing[0]}'; its columns are: {', '.join(table.column_names)}")
    if isinstance(table.features[source.image_column], datasets.Image):
        table = table.cast_column(source.image_column, datasets.Image(decode=False))
    for position, row in enumerate(table.select_columns(columns)):
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
        captions = _parse_captions(json.loads(text) if sidecar_name.endswith(".json") else {"caption": text.strip()})
    except (ValueError, KeyError, TypeError) as error:
        return UnreadableSample(name, f"caption file {sidecar_name} cannot be read: {' '.join(str(error).split())}")
    return (
        _Raw(name, data, captions)
        if _captions_nonempty(captions)
        else UnreadableSample(name, f"caption file {sidecar_name} is empty")
    )


def _parse_captions(entry: dict[str, Any]) -> tuple[str, ...]:
    value = entry["captions"] if "captions" in entry else entry["caption"]
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise TypeError("captions must be a text or a list of texts")
    return tuple(captions)


def _captions_nonempty(captions: tuple[str, ...]) -> bool:
    return bool(captions) and all(caption.strip() for caption in captions)


def _decode(raw: _Raw, resolution: int) -> Sample | UnreadableSample:
    try:
        with Image.open(io.BytesIO(raw.data)) as opened:
            image = square_rgb(opened, resolution)
    except UnidentifiedImageError:
        return UnreadableSample(raw.name, "image cannot be read: unknown format")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return UnreadableSample(raw.name, f"image cannot be read: {' '.join(str(error).split())[:120]}")
    labels = None if raw.label is None else np.array([raw.label], dtype=np.int64)
    return Sample(raw.name, image, raw.captions, labels)


_EXIF_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _apply_exif_orientation(opened: Image.Image) -> Image.Image:
    """Turn an image by its EXIF orientation; a broken EXIF block is ignored."""
    try:
        transpose = _EXIF_ORIENTATIONS.get(opened.getexif().get(0x0112, 1))
    except (ValueError, TypeError, SyntaxError, OSError, KeyError, struct.error):
        transpose = None
    return opened if transpose is None else opened.transpose(transpose)


def square_rgb(opened: Image.Image, resolution: int) -> np.ndarray:
    """Crop an image to its centre square, composite it onto white and resize it (Lanczos) to uint8 [R, R, 3]."""
    opened = _apply_exif_orientation(opened)
    if opened.mode.startswith("I;16"):
        opened = Image.fromarray((np.asarray(opened) / 257).round().astype(np.uint8))
    if opened.mode in ("RGBA", "LA", "PA") or "transparency" in opened.info:
        rgba = opened.convert("RGBA")
        opened = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    rgb = opened.convert("RGB")
    size = min(rgb.size)
    left, top = (rgb.width - size) // 2, (rgb.height - size) // 2
    rgb = rgb.crop((left, top, left + size, top + size))
    if size != resolution:
        rgb = rgb.resize((resolution, resolution), Image.Resampling.LANCZOS)
    return np.asarray(rgb)


def read_photograph(file: Path) -> Image.Image:
    """Read an image that the user names as RGB, turned by its EXIF orientation.

    Raises:
        ConfigError: there is no such file, or it cannot be read.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: no such image; give the path of an image file")
    try:
        with Image.open(file) as image:
            return _apply_exif_orientation(image).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{file}: the image cannot be read ({error}); remove or replace it") from error
