"""Read images with captions from a folder, tar shards, a data set of `datasets` or the built-in synthetic scenes.

A source is read in a fixed order, so the position of an image is its id. A sample that cannot be read is yielded as an
`UnreadableSample` with its name and the reason; it is never dropped silently. Ignored files are counted in a
warning.

Shapes: R resolution, A number of labels.
"""

from __future__ import annotations

import glob
import hashlib
import lzma
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from isocost.config.data import FolderSource, HubSource, ScenesSource, SourceSpec, WebdatasetSource
from isocost.data.caption_files import (
    CAPTION_LIST,
    HUB_CAPTION_LISTS,
    caption_problem,
    decode_text,
    parse_captions,
    read_caption_lists,
)
from isocost.data.image_files import (
    FIRST_SUFFIXES,
    IMAGE_SUFFIXES,
    FolderContent,
    UnreadableImage,
    center_square,
    is_image_name,
    list_folder,
    printable,
    read_rgb,
    system_part,
)
from isocost.data.synthetic import scenes
from isocost.errors import ConfigError
from isocost.utils.json_text import parse_json
from isocost.utils.warn_once import warn_once

READING_VERSION = 2
"""Part of the fingerprint of a folder from which version 1 read other images or captions."""
SIDECAR_SUFFIXES = (".txt", ".json", ".caption")
"""Suffixes of caption files; `.caption` is the one of sd-scripts."""
PARQUET_ROWS = 64
"""Rows of a Parquet file that are in memory at a time."""
NUM_TEST_BYTES = 26
"""`subset: test` takes the images whose name hash has a first byte below this number: 26 of 256, about 10 %."""


@dataclass(frozen=True)
class Sample:
    """An image, uint8 [R, R, 3], with its captions and its labels, int64 [A]; labels are None if the source has none.

    `is_enlarged` is true if its shorter side had fewer than R pixels.
    """

    name: str
    image: np.ndarray
    captions: tuple[str, ...]
    labels: np.ndarray | None = None
    is_enlarged: bool = False


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
    num_enlarged = 0
    for position, raw in enumerate(subset):
        if source.limit is not None and position >= source.limit:
            break
        if isinstance(raw, UnreadableSample):
            yield raw
        elif is_needed(position):
            decoded = _decode(raw, resolution)
            num_enlarged += isinstance(decoded, Sample) and decoded.is_enlarged
            yield decoded
        else:
            yield SkippedSample(raw.name, raw.captions)
    if num_enlarged:
        images = "1 image is" if num_enlarged == 1 else f"{num_enlarged} images are"
        warn_once(f"{source.path}: {images} smaller than data.resolution, {resolution} pixels, and enlarged to it")


def name_hash(name: str) -> bytes:
    """Hash the name of an image. The test subset has the lowest hashes; sorting by hash gives a pseudo-random order."""
    return hashlib.sha256(printable(name).encode()).digest()


def _in_subset(raw: _Raw | UnreadableSample, source: FolderSource | WebdatasetSource | HubSource) -> bool:
    """Whether the subset has an image, by a hash of its name. A tar shard that cannot be read is reported in every subset."""
    if source.subset == "all" or (source.kind == "webdataset" and "/" not in raw.name):
        return True
    return (name_hash(raw.name)[0] < NUM_TEST_BYTES) == (source.subset == "test")


def source_fingerprint(source: SourceSpec) -> str:
    """Hash the content of a source: names and bytes of its files. For a Hub id it is the id itself.

    Raises:
        ConfigError: the files are missing, or the caption list of a folder is broken.
    """
    if isinstance(source, ScenesSource):
        return f"scenes-v{scenes.VERSION}"
    if isinstance(source, HubSource) and not Path(source.path).exists():
        return f"hub:{source.path}"
    sha = hashlib.sha256()
    for file in _files_of(source):
        name = file.relative_to(source.path) if Path(source.path).is_dir() else file.name
        sha.update(str(name).encode("utf-8", "surrogateescape"))
        try:
            with file.open("rb") as stream:
                for block in iter(lambda: stream.read(1 << 20), b""):
                    sha.update(block)
        except OSError:  # the reader reports the file as an unreadable sample
            sha.update(b"unreadable")
    if isinstance(source, FolderSource) and _is_read_otherwise_than_by_version_1(source):
        sha.update(f"reading-{READING_VERSION}".encode())
    return sha.hexdigest()[:16]


def _is_read_otherwise_than_by_version_1(source: FolderSource) -> bool:
    """Whether version 1 read other images or captions from the same files. It did so in five cases.

    It took the last of several lines about one image, it ignored the suffixes outside `FIRST_SUFFIXES`, it refused links to
    files outside the folder, and it read no caption list but `captions.jsonl` of the folder itself, and no `.caption`
    or `.TXT` files.
    """
    root = Path(source.path)
    if not root.is_dir():
        return False
    content = _folder_content(source)
    if any(file.parent != root for file in _lists_in(content)) or _has_list_beside_sidecars(content):
        return True
    if any(sidecar.suffix not in (".txt", ".json") for sidecar in _sidecars(content).values()):
        return True
    first_list = root / CAPTION_LIST
    listed = read_caption_lists(root, [first_list] if first_list.is_file() else [])
    new = [file for file in content.images if file.suffix.lower() not in FIRST_SUFFIXES]
    links = [file for file in content.images if file.is_symlink() and str(file.relative_to(root)) in listed.captions]
    return (
        listed.has_repeated_files
        or any(str(file.relative_to(root)) not in listed.captions for file in new)
        or any(not file.resolve().is_relative_to(root.resolve()) for file in links)
    )


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
    if not os.path.exists(path):
        raise ConfigError(
            f"{source.path}: no such file or folder; paths in a study are relative to the folder in which isocost is started"
        )
    if isinstance(source, FolderSource):
        return [path] if path.is_file() else _folder_content(source).files
    files = [path] if path.is_file() else list_folder(path).files
    if path.is_dir():
        word = re.compile(rf"(?<![A-Za-z]){re.escape(source.split)}(?![A-Za-z])")
        files = [file for file in files if file.suffix == ".parquet" and word.search(file.stem)]
        if not files:
            raise ConfigError(f"{source.path}: no Parquet file has the split '{source.split}' in its name; set `split`")
    return files


def _folder_content(source: FolderSource) -> FolderContent:
    content = list_folder(Path(source.path))
    if not content.images:
        supported, note = ", ".join(sorted(IMAGE_SUFFIXES)), content.note()
        raise ConfigError(f"{source.path}: the folder has no images; supported are {supported}{note and f'; {note}'}")
    return content


def _raw_folder(source: FolderSource) -> Iterator[_Raw | UnreadableSample]:
    root = Path(source.path)
    if not os.path.isdir(root):
        raise ConfigError(f"{source.path}: no such folder of images; set `path` to an existing folder")
    content = _folder_content(source)
    if note := content.note():
        warn_once(f"{source.path}: {note}")
    yield from _images_with_captions(root, content)


def _lists_in(content: FolderContent, names: Sequence[str] = (CAPTION_LIST, *HUB_CAPTION_LISTS)) -> list[Path]:
    """The caption lists of a folder and its subfolders."""
    return [file for file in content.files if file.name in names]


def _has_list_beside_sidecars(content: FolderContent) -> bool:
    """Whether some images have caption files, and others a line in a list of the imagefolder layout."""
    return bool(_lists_in(content, HUB_CAPTION_LISTS)) and bool(_sidecars(content))


def _images_with_captions(root: Path, content: FolderContent) -> Iterator[_Raw | UnreadableSample]:
    """The images of a folder, and those that only a caption list names.

    A `captions.jsonl` is for all images of its folder and the folders below. An image without one has a caption file, or a line
    in a list of the imagefolder layout.
    """
    own_files, hub_files = _lists_in(content, (CAPTION_LIST,)), _lists_in(content, HUB_CAPTION_LISTS)
    own, hub = (read_caption_lists(root, files).captions for files in (own_files, hub_files))
    sidecars = _sidecars(content)
    images = {str(file.relative_to(root)): file for file in content.images}
    names = images.keys() | own.keys() | hub.keys()
    is_listed = any(file.parent == root for file in own_files) or (bool(hub_files) and not sidecars)
    for name in sorted(names) if is_listed else sorted(names, key=PurePosixPath):
        if name in own:
            yield _listed_image(root, name, own[name], CAPTION_LIST)
        elif _governs(own_files, root / name):
            yield UnreadableSample(printable(name), f"{CAPTION_LIST} has no line for it")
        elif name in images and images[name] in sidecars:
            yield from _with_file_name(root, images[name], sidecars[images[name]])
        elif name in hub:
            yield _listed_image(root, name, hub[name], hub_files[0].name)
        elif _governs(hub_files, root / name):
            yield UnreadableSample(printable(name), f"{hub_files[0].name} has no line for it")
        else:
            lists = ", ".join((CAPTION_LIST, *HUB_CAPTION_LISTS))
            yield UnreadableSample(
                printable(name), f"no caption: there is none of {lists}, and no .txt, .json or .caption file of the same name"
            )


def _governs(lists: Sequence[Path], image: Path) -> bool:
    """Whether one of the caption lists is in the folder of an image or in a folder above it."""
    return any(image.is_relative_to(file.parent) for file in lists)


def _sidecars(content: FolderContent) -> dict[Path, Path]:
    """The caption file of every image that has one."""
    by_name: dict[tuple[Path, str], Path] = {}
    for file in sorted(content.files, reverse=True):  # of x.TXT and x.txt the latter, as in version 1
        if file.suffix.lower() in SIDECAR_SUFFIXES and by_name.get((file.with_suffix(""), file.suffix.lower())) is None:
            by_name[file.with_suffix(""), file.suffix.lower()] = file
    candidates = {image: [(image.with_suffix(""), suffix) for suffix in SIDECAR_SUFFIXES] for image in content.images}
    return {
        image: by_name[found[0]] for image, keys in candidates.items() if (found := [key for key in keys if key in by_name])
    }


def _with_file_name(root: Path, file: Path, sidecar: Path) -> Iterator[_Raw | UnreadableSample]:
    """An image with a caption file."""
    name = printable(str(file.relative_to(root)))
    data, text = _read_bytes(file), _read_bytes(sidecar)
    if isinstance(data, str):
        yield UnreadableSample(name, data)
    elif isinstance(text, str):
        yield UnreadableSample(name, f"caption file {printable(sidecar.name)}: {text}")
    else:
        yield _with_sidecar(name, data, sidecar.name, text)


def _listed_image(root: Path, name: str, captions: tuple[str, ...], list_name: str) -> _Raw | UnreadableSample:
    """An image with a line in a caption list."""
    data = _read_listed(root, name, list_name)
    if isinstance(data, str):
        return UnreadableSample(printable(name), data)
    if problem := caption_problem(captions):
        return UnreadableSample(printable(name), problem)
    return _Raw(printable(name), data, captions)


def _read_listed(root: Path, name: str, list_name: str) -> bytes | str:
    """The content of a file that a caption list names, or the reason why it is not read. Links may lead outside the folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in re.split(r"[/\\]", name):
        return f"{list_name} names a file outside its folder; give a path in the folder without `..`"
    if (part := system_part(path)) is not None:
        return f"{list_name} names it, but files in {printable(part)} are ignored"
    return _read_bytes(root / name, f"{list_name} names it, but the image file is missing")


def _read_bytes(file: Path, missing: str = "the file is missing") -> bytes | str:
    """The content of a file, or the reason why it cannot be read."""
    try:
        if file.is_symlink() and not file.exists():
            return "a link whose target is missing; fetch the target (`git annex get`, `dvc pull`) or remove the link"
        return file.read_bytes() if file.is_file() else missing
    except (OSError, ValueError) as error:
        return f"the file cannot be read: {error.strerror if isinstance(error, OSError) else 'not a file name'}"


def _raw_webdataset(source: WebdatasetSource) -> Iterator[_Raw | UnreadableSample]:
    ignored: Counter[str] = Counter()
    for shard in _files_of(source):
        try:
            with tarfile.open(shard) as archive:
                yield from _raw_tar(printable(shard.name), archive, ignored)
        except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            yield UnreadableSample(printable(shard.name), f"tar shard cannot be read: {' '.join(str(error).split())}")
    if note := FolderContent([], ignored=ignored).note():
        warn_once(f"{source.path}: {note}")


@dataclass
class _Group:
    """The members of a tar shard with the same key, which is the name up to its first dot (webdataset's rule).

    Attributes:
        members: name and content of images and captions by suffix, which is the rest of the name.
        images: names of all image members.
        repeated: a suffix that two members have.
        suffixes: the suffixes of all members.
    """

    key: str = ""
    members: dict[str, tuple[str, bytes | None]] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)
    repeated: str = ""
    num_members: int = 0
    suffixes: set[str] = field(default_factory=set)


def _raw_tar(shard: str, archive: tarfile.TarFile, ignored: Counter[str]) -> Iterator[_Raw | UnreadableSample]:
    group = _Group()
    for member in archive:
        path = PurePosixPath(member.name)
        if not (member.isfile() or member.islnk() or member.issym()):
            continue
        if (part := system_part(path)) is not None:
            ignored.update([part] if is_image_name(path) else [])
            continue
        if not path.suffix:
            ignored.update(["names without a suffix"])
            continue
        folder, _, last = member.name.rpartition("/")
        stem, _, suffix = last.partition(".")
        key, suffix = f"{folder}/{stem}" if folder else stem, f".{suffix.lower()}"
        if key != group.key:
            yield from _from_group(shard, group)
            group = _Group(key)
        group.num_members += 1
        group.suffixes.add(suffix)
        group.images += [member.name] if is_image_name(path) else []
        if suffix in group.members:
            group.repeated = suffix
        elif suffix in IMAGE_SUFFIXES or suffix in SIDECAR_SUFFIXES:
            group.members[suffix] = (member.name, _read_member(archive, member))
    yield from _from_group(shard, group)


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    """The content of a member, or of the member that a link leads to; None if the shard does not have that member."""
    try:
        stream = archive.extractfile(member)
    except KeyError:
        return None
    return None if stream is None else stream.read()


def _from_group(shard: str, group: _Group) -> Iterator[_Raw | UnreadableSample]:
    """The sample of a key. A key without a sample gives one unreadable sample for each of its images, at least one."""
    if not group.num_members:
        return
    name = printable(f"{shard}/{group.key}")
    images = [suffix for suffix in group.members if suffix in FIRST_SUFFIXES] or [
        suffix for suffix in group.members if suffix in IMAGE_SUFFIXES
    ]
    sidecars = [suffix for suffix in (".json", ".txt", ".caption") if suffix in group.members]
    if group.repeated:
        reason = f"two members of the key end in {printable(group.repeated)}; keep one"
    elif images and sidecars:
        (_, data), (sidecar_name, sidecar) = group.members[images[0]], group.members[sidecars[0]]
        if data is not None and sidecar is not None:
            yield _with_sidecar(name, data, sidecar_name, sidecar)
            return
        reason = "a link to a member that the shard does not have"
    elif len(group.images) > max(1, len(images)):
        reason = (
            f"the key of a member ends at the first dot of its name, so {len(group.images)} images have the key "
            f"{printable(group.key)}; rename the members without dots before the suffix"
        )
    else:
        ends = ", ".join(printable(suffix) for suffix in sorted(group.suffixes))
        reason = (
            "needs an image and a .json or .txt of the same name up to the first dot, next to each other in the shard; "
            f"the members end in {ends}"
        )
    if len(group.images) > 1:
        yield from (UnreadableSample(printable(f"{shard}/{image}"), reason) for image in group.images)
    else:
        yield UnreadableSample(name, reason)


def _raw_hub(source: HubSource) -> Iterator[_Raw | UnreadableSample]:
    columns = [source.image_column, source.caption_column] + ([source.label_column] if source.label_column else [])
    rows = _parquet_rows(source, columns) if Path(source.path).exists() else _rows_of_the_hub(source, columns)
    for position, row in enumerate(rows):
        name, image = f"{source.split}/{position}", row[source.image_column]
        data = image.get("bytes") if isinstance(image, dict) else None
        captions = row[source.caption_column]
        captions = [captions] if isinstance(captions, str) else captions
        label = row[source.label_column] if source.label_column else None
        if not data or not isinstance(data, bytes):
            yield UnreadableSample(name, "no image bytes in the image column")
        elif problem := caption_problem(captions if isinstance(captions, list) else None):
            yield UnreadableSample(name, problem)
        elif source.label_column and not (isinstance(label, int) and abs(label) < 2**63):
            yield UnreadableSample(name, "no label" if label is None else f"its label is no integer: {str(label)[:40]}")
        else:
            yield _Raw(name, data, tuple(captions), None if label is None else int(label))


def _parquet_rows(source: HubSource, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of local Parquet files. `datasets` would copy them to its cache and, after a change, might read the old copy."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files, num_rows = _files_of(source), 0
    for file in files:
        try:
            with pq.ParquetFile(file) as opened:
                _check_columns(f"{file}", columns, opened.schema_arrow.names)
                num_rows += opened.metadata.num_rows
                for batch in opened.iter_batches(PARQUET_ROWS, columns=columns):
                    yield from batch.to_pylist()
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ConfigError(
                f"{file}: cannot be read as Parquet; set `path` to Parquet files: {' '.join(str(error).split())[:200]}"
            ) from error
    if not num_rows:
        raise ConfigError(f"{source.path}: its Parquet files have no rows; set `path` to files with images")


def _rows_of_the_hub(source: HubSource, columns: list[str]) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        table = datasets.load_dataset(source.path, split=source.split)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{source.path}: neither a local path nor a data set that can be loaded from the Hub: {reason}"
        ) from error
    _check_columns(source.path, columns, table.column_names)
    if isinstance(table.features[source.image_column], datasets.Image):
        table = table.cast_column(source.image_column, datasets.Image(decode=False))
    yield from table.select_columns(columns)


def _check_columns(where: str, needed: Sequence[str], existing: Sequence[str]) -> None:
    missing = [column for column in needed if column not in existing]
    if missing:
        raise ConfigError(f"{where}: no column '{missing[0]}'; its columns are: {', '.join(existing)}")


# --- one image ------------------------------------------------------------------------------------------------------


def _with_sidecar(name: str, data: bytes, sidecar_name: str, sidecar: bytes) -> _Raw | UnreadableSample:
    try:
        text = decode_text(sidecar)
        captions = parse_captions(parse_json(text)) if sidecar_name.lower().endswith(".json") else (text.strip(),)
    except ValueError as error:
        reason = " ".join(str(error).split())[:120]
        return UnreadableSample(name, f"caption file {printable(sidecar_name)} cannot be read: {reason}")
    problem = caption_problem(captions)
    return (
        UnreadableSample(name, f"caption file {printable(sidecar_name)}: {problem}") if problem else _Raw(name, data, captions)
    )


def _decode(raw: _Raw, resolution: int) -> Sample | UnreadableSample:
    try:
        rgb = read_rgb(raw.data)
        image = center_square(rgb, resolution)
    except UnreadableImage as error:
        return UnreadableSample(raw.name, f"image cannot be read: {error}")
    labels = None if raw.label is None else np.array([raw.label], dtype=np.int64)
    return Sample(raw.name, image, raw.captions, labels, min(rgb.size) < resolution)
