"""Reference statistics: features of real images with their ids and captions, made once, kept with hashes.

A folder of statistics holds the features of every extractor in shards, `images.jsonl` with id and captions of each row,
for protocols of pairs the images themselves, and a manifest that says what made it.

Shapes: M reference images, D features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from isocost.errors import ConfigError
from isocost.evaluation.feature_batches import FixedBatchRunner
from isocost.evaluation.feature_store import read_features, write_features
from isocost.evaluation.image_sources import SourceImage, image_files, iter_images
from isocost.evaluation.protocol_presets import Crops, ProtocolPreset
from isocost.metrics.extractor_base import FeatureExtractor
from isocost.utils.artifact_store import MANIFEST, publish, read_manifest

KIND = "statistics"
ROWS_FILE, IMAGES_FOLDER = "images.jsonl", "images"
ONE_EXTRACTOR_FILE = "features.safetensors"


@dataclass(frozen=True)
class FeatureSet:
    """What was taken of a set of images, one row each.

    Attributes:
        ids: of the rows, in order.
        captions: of the rows; empty tuples where there are none.
        features: float32 [M, D] by extractor.
        content: 16 hex digits over the pixels, whatever the order.
    """

    ids: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]
    features: dict[str, np.ndarray]
    content: str

    def __len__(self) -> int:
        return len(self.ids)


def take(
    images: Iterable[SourceImage], extractors: dict[str, FeatureExtractor], ids: Sequence[str] | None = None
) -> FeatureSet:
    """Features of images as they come, in the order of `ids`, or as they come where None.

    Images whose id is not among `ids` are passed over. With `ids`, the order of arrival changes no bit.

    Raises:
        ConfigError: an id is missing, or came twice.
    """
    name_hash = None if ids is None else {key: place for place, key in enumerate(ids)}
    rows: dict[int, tuple[str, tuple[str, ...], str]] = {}
    blocks = FixedBatchRunner(extractors)
    for image in images:
        place = len(rows) if name_hash is None else name_hash.get(image.key)
        if place is None:
            continue
        if place in rows:
            raise ConfigError(f"{image.name}: id {image.key} came twice; the other is {rows[place][0]}")
        pixels = image.pixels.contiguous()
        blocks.add(place, pixels)
        sha256 = hashlib.sha256(str(tuple(pixels.shape)).encode() + pixels.numpy().tobytes()).hexdigest()
        rows[place] = image.name, image.prompts, sha256
    if ids is not None and len(rows) < len(ids):
        missing = [key for place, key in enumerate(ids) if place not in rows]
        raise ConfigError(f"{len(missing)} of {len(ids)} images are missing; the first is id {missing[0]}")
    order, features = blocks.results()
    return FeatureSet(
        tuple(ids) if ids is not None else tuple(rows[place][0] for place in order),
        tuple(rows[place][1] for place in order),
        {name: made.numpy() for name, made in features.items()},
        hashlib.sha256("".join(sorted(sha256 for *_, sha256 in rows.values())).encode()).hexdigest()[:16],
    )


def reference_images(place: str, named: ProtocolPreset, ids: Sequence[str] | None = None) -> Iterator[SourceImage]:
    """The reference images of a protocol: whole ones as centre squares at its resolution (those of `ids`), or its crops."""
    folder = Path(place)
    if (folder / IMAGES_FOLDER).is_dir() and (folder / MANIFEST).is_file():
        place = str(folder / IMAGES_FOLDER)
    elif named.crops is not None:
        return _cropped(folder, named.crops)
    return iter_images(place, side=named.resolution, exact=False, ids=ids)


def build_statistics(
    place: str, out: Path, named: ProtocolPreset, extractors: dict[str, FeatureExtractor], ids: Sequence[str] | None
) -> FeatureSet:
    """Take the reference images of `place` once and write a folder of statistics at `out`; there whole or not at all.

    Raises:
        ConfigError: `out` is there already, or the images are not what the protocol asks for.
    """
    if out.exists():
        raise ConfigError(f"{out}: is there already; give a new folder")
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)

    def feature_dtype() -> Iterator[SourceImage]:
        for image in reference_images(place, named, ids):
            if named.compares == "pairs":
                (partial / IMAGES_FOLDER).mkdir(exist_ok=True)
                pixels = image.pixels.permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(partial / IMAGES_FOLDER / f"{image.key:0>5}.png")
            yield image

    taken = take(feature_dtype(), extractors, ids)
    check_num_images(f"{place}", len(taken), named.num_reference)
    write_features(partial, taken.features)
    lines = [
        json.dumps({"id": key, "prompts": said}, ensure_ascii=False) for key, said in zip(taken.ids, taken.prompts, strict=True)
    ]
    (partial / ROWS_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    manifest = {
        "kind": KIND,
        "protocol": named.title,
        "extractors": {name: extractor.id for name, extractor in extractors.items()},
        "num_images": len(taken),
        "resolution": named.resolution,
        "content": taken.content,
    }
    publish(partial, out, manifest)
    return taken


def read_statistics(folder: Path, extractors: dict[str, FeatureExtractor]) -> FeatureSet | None:
    """What `build_statistics` wrote, or features that a study keeps; None where the folder holds neither.

    Raises:
        ConfigError: they were made by other extractors than those asked for.
    """
    folder = folder.parent if folder.name == ONE_EXTRACTOR_FILE else folder
    if (folder / ONE_EXTRACTOR_FILE).is_file():
        return _read_one(folder, extractors)
    if not (folder / ROWS_FILE).is_file() or not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder)
    for name, extractor in extractors.items():
        _check_same_extractor(folder, manifest["extractors"].get(name), extractor)
    rows = [json.loads(line) for line in (folder / ROWS_FILE).read_text(encoding="utf-8").splitlines()]
    return FeatureSet(
        tuple(row["id"] for row in rows),
        tuple(tuple(row["prompts"]) for row in rows),
        read_features(folder, tuple(extractors)),
        manifest["content"],
    )


def check_num_images(where: str, found: int, demanded: int | None, least: int = 0) -> None:
    """Raise ConfigError where there are not exactly `demanded` images, or fewer than `least`."""
    if demanded is not None and found != demanded:
        raise ConfigError(f"{where}: {found} images; this protocol takes {demanded}")
    if found < least:
        raise ConfigError(f"{where}: {found} images; a distance takes at least {least}")


def _read_one(folder: Path, extractors: dict[str, FeatureExtractor]) -> FeatureSet:
    from isocost.evaluation.reference_set import read_features as read_one

    made_by = read_manifest(folder).get("extractor") if (folder / MANIFEST).is_file() else None
    for extractor in extractors.values():
        _check_same_extractor(folder, made_by, extractor)
    features = read_one(folder)
    content = hashlib.sha256(features.tobytes()).hexdigest()[:16]
    ids = tuple(map(str, range(len(features))))
    return FeatureSet(ids, ((),) * len(ids), dict.fromkeys(extractors, features), content)


def _check_same_extractor(folder: Path, made_by: str | None, extractor: FeatureExtractor) -> None:
    if made_by != extractor.id:
        raise ConfigError(f"{folder}: features of another extractor ({made_by}); this protocol needs {extractor.id}")


def _cropped(folder: Path, crops: Crops) -> Iterator[SourceImage]:
    files = image_files(folder)
    check_num_images(str(folder), len(files), crops.num_sources)
    for place, file in enumerate(files):
        with Image.open(file) as opened:
            whole = np.asarray(opened.convert("RGB"))
        if min(whole.shape[:2]) < crops.side:
            raise ConfigError(f"{file}: {whole.shape[1]} x {whole.shape[0]} pixels; crops of {crops.side} do not fit")
        for number in range(place, crops.num, crops.num_sources):
            top, left = crops.corner(number, *whole.shape[:2])
            square = whole[top : top + crops.side, left : left + crops.side]
            yield SourceImage(str(number), f"{file.name}[{number}]", torch.from_numpy(square.copy()).permute(2, 0, 1))
