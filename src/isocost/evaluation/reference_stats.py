"""Reference statistics: features of real images with ids and captions, computed once and saved in a folder.

The folder contains the features of every extractor in shards; `images.jsonl` with id and captions of each row; the images
themselves, for protocols that compare pairs; and a manifest with the protocol, the extractors and a content hash.

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

from isocost.data.image_files import list_images, read_image_file
from isocost.errors import ConfigError, RunError
from isocost.evaluation.feature_batches import FixedBatchRunner
from isocost.evaluation.feature_store import read_features, write_features
from isocost.evaluation.image_sources import SourceImage, iter_images
from isocost.evaluation.protocol_presets import Crops, ProtocolPreset
from isocost.metrics.extractor_base import FeatureExtractor
from isocost.utils.artifact_store import MANIFEST, publish, read_manifest, remedy, verified_manifest
from isocost.utils.output_paths import check_output_folder, check_separate, private_folder

KIND = "statistics"
IMAGE_LIST_FILE, IMAGES_FOLDER = "images.jsonl", "images"
STUDY_FEATURES_FILE = "features.safetensors"
"""Reference features that a study saves, of one extractor."""


@dataclass(frozen=True)
class FeatureSet:
    """Features of a set of images.

    Attributes:
        ids: image id of each row.
        prompts: captions of each row; empty tuples if there are none.
        features: float32 [M, D] by extractor name.
        content: hash of the pixels, 16 hex digits; independent of the order of the images.
        sizes: the different heights and widths of the images; None if they are not known.
    """

    ids: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]
    features: dict[str, np.ndarray]
    content: str
    sizes: frozenset[tuple[int, int]] | None = None

    def __len__(self) -> int:
        return len(self.ids)


def extract_features(
    images: Iterable[SourceImage], extractors: dict[str, FeatureExtractor], ids: Sequence[str] | None = None
) -> FeatureSet:
    """Compute the features of images.

    Args:
        images: in any order; with `ids`, the order of arrival changes no bit of the result.
        extractors: by name.
        ids: the images to use, in the order of the rows; other images are ignored. None uses all images as they arrive.

    Raises:
        ConfigError: an id is missing or appears twice.
    """
    index_of_id = None if ids is None else {key: index for index, key in enumerate(ids)}
    infos: dict[int, tuple[str, tuple[str, ...], str]] = {}
    sizes: set[tuple[int, int]] = set()
    runner = FixedBatchRunner(extractors)
    for image in images:
        index = len(infos) if index_of_id is None else index_of_id.get(image.id)
        if index is None:
            continue
        if index in infos:
            raise ConfigError(f"{image.name}: id {image.id} appears twice; the other image is {infos[index][0]}")
        pixels = image.pixels.contiguous()
        runner.add(index, pixels)
        sha256 = hashlib.sha256(str(tuple(pixels.shape)).encode() + pixels.numpy().tobytes()).hexdigest()
        infos[index] = image.name, image.prompts, sha256
        sizes.add((pixels.shape[1], pixels.shape[2]))
    if ids is not None and len(infos) < len(ids):
        missing = [key for index, key in enumerate(ids) if index not in infos]
        raise ConfigError(f"{len(missing)} of {len(ids)} images are missing; the first is id {missing[0]}")
    order, features = runner.results()
    return FeatureSet(
        tuple(ids) if ids is not None else tuple(infos[index][0] for index in order),
        tuple(infos[index][1] for index in order),
        {name: values.numpy() for name, values in features.items()},
        hashlib.sha256("".join(sorted(sha256 for *_, sha256 in infos.values())).encode()).hexdigest()[:16],
        frozenset(sizes),
    )


def reference_images(source: str, preset: ProtocolPreset, ids: Sequence[str] | None = None) -> Iterator[SourceImage]:
    """Iterate over the reference images of a protocol.

    They are the images that a statistics folder saved, the protocol's crops, or centre squares at its resolution (with
    `ids`, only those images).

    Raises:
        ConfigError: the source is missing, or its images cannot be read or do not fit the protocol.
    """
    folder = Path(source)
    if (folder / IMAGES_FOLDER).is_dir() and (folder / MANIFEST).is_file():
        source = str(folder / IMAGES_FOLDER)
    elif preset.crops is not None:
        return _iter_crops(folder, preset.crops)
    return iter_images(source, resolution=preset.resolution, exact=False, ids=ids)


def build_statistics(
    source: str, out: Path, preset: ProtocolPreset, extractors: dict[str, FeatureExtractor], ids: Sequence[str] | None
) -> FeatureSet:
    """Compute the statistics of the reference images in `source` and publish them as the folder `out` in one step.

    Raises:
        ConfigError: `out` exists already or cannot be created, or the images do not fit the protocol.
        RunError: the written features do not fit the images, or another attempt made `out` at the same time.
    """
    if out.exists():
        raise ConfigError(f"{out}: exists already; give a new folder")
    check_output_folder(out)
    check_separate(out, source)
    with private_folder(out) as partial:
        return _build(source, partial, out, preset, extractors, ids)


def _build(
    source: str,
    partial: Path,
    out: Path,
    preset: ProtocolPreset,
    extractors: dict[str, FeatureExtractor],
    ids: Sequence[str] | None,
) -> FeatureSet:
    """Compute the statistics in the folder `partial`, check them, and move it to `out`."""

    def iter_and_save() -> Iterator[SourceImage]:
        for image in reference_images(source, preset, ids):
            if preset.compares == "pairs":
                (partial / IMAGES_FOLDER).mkdir(exist_ok=True)
                pixels = image.pixels.permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(partial / IMAGES_FOLDER / f"{image.id:0>5}.png")
            yield image

    feature_set = extract_features(iter_and_save(), extractors, ids)
    check_num_images(source, len(feature_set), preset.num_reference)
    write_features(partial, feature_set.features)
    lines = [
        json.dumps({"id": key, "prompts": prompts}, ensure_ascii=False)
        for key, prompts in zip(feature_set.ids, feature_set.prompts, strict=True)
    ]
    (partial / IMAGE_LIST_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    manifest = {
        "kind": KIND,
        "protocol": preset.title,
        "extractors": {name: extractor.id for name, extractor in extractors.items()},
        "num_images": len(feature_set),
        "resolution": preset.resolution,
        "content": feature_set.content,
    }
    _check_rows(partial, read_features(partial, tuple(extractors)), len(feature_set))
    publish(partial, out, manifest, replace=False)
    return feature_set


def read_statistics(folder: Path, extractors: dict[str, FeatureExtractor]) -> FeatureSet | None:
    """Read the output of `build_statistics`, or the reference features that a study saved; None if the folder has neither.

    Raises:
        ConfigError: other extractors made the features.
        RunError: a file is damaged, or the features do not fit the list of images.
    """
    folder = folder.parent if folder.name == STUDY_FEATURES_FILE else folder
    kind = read_manifest(folder).get("kind") if (folder / MANIFEST).is_file() else None
    if kind == "features" or (folder / STUDY_FEATURES_FILE).is_file():
        return _read_study_features(folder, extractors)
    if kind != KIND:
        return None
    manifest = verified_manifest(folder)
    for name, extractor in extractors.items():
        _check_same_extractor(folder, manifest["extractors"].get(name), extractor)
    try:
        rows = [json.loads(line) for line in (folder / IMAGE_LIST_FILE).read_text(encoding="utf-8").splitlines()]
        ids, prompts = tuple(str(row["id"]) for row in rows), tuple(tuple(row["prompts"]) for row in rows)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{folder / IMAGE_LIST_FILE}: damaged; {remedy(folder)}") from error
    features = read_features(folder, tuple(extractors))
    _check_rows(folder, features, manifest["num_images"])
    if len(ids) != manifest["num_images"]:
        raise RunError(f"{folder / IMAGE_LIST_FILE}: {len(ids)} rows for {manifest['num_images']} images; {remedy(folder)}")
    return FeatureSet(ids, prompts, features, manifest["content"])


def check_num_images(source: str, num_images: int, required: int | None, minimum: int = 0) -> None:
    """Raise ConfigError if there are not exactly `required` images (None: any number), or fewer than `minimum`."""
    if required is not None and num_images != required:
        raise ConfigError(f"{source}: {num_images} images; this protocol needs {required}")
    if num_images < minimum:
        raise ConfigError(f"{source}: {num_images} images; a metric needs at least {minimum}")


def _check_rows(folder: Path, features: dict[str, np.ndarray], num_images: int) -> None:
    """Raise RunError if the features of a folder are not those of its images, one row each."""
    for name, matrix in features.items():
        if len(matrix) != num_images:
            raise RunError(f"{folder}: {len(matrix)} rows of {name} features for {num_images} images; {remedy(folder)}")


def _read_study_features(folder: Path, extractors: dict[str, FeatureExtractor]) -> FeatureSet:
    from isocost.evaluation.reference_set import read_features as read_study_features

    made_by = verified_manifest(folder).get("extractor") if (folder / MANIFEST).is_file() else None
    for extractor in extractors.values():
        _check_same_extractor(folder, made_by, extractor)
    features = read_study_features(folder)
    content = hashlib.sha256(features.tobytes()).hexdigest()[:16]
    ids = tuple(map(str, range(len(features))))
    return FeatureSet(ids, ((),) * len(ids), dict.fromkeys(extractors, features), content)


def _check_same_extractor(folder: Path, made_by: str | None, extractor: FeatureExtractor) -> None:
    if made_by != extractor.id:
        raise ConfigError(f"{folder}: features of another extractor ({made_by}); this protocol needs {extractor.id}")


def _iter_crops(folder: Path, crops: Crops) -> Iterator[SourceImage]:
    files = list_images(folder)
    check_num_images(str(folder), len(files), crops.num_sources)
    for file_index, file in enumerate(files):
        image = np.asarray(read_image_file(file))
        if min(image.shape[:2]) < crops.side:
            raise ConfigError(f"{file}: {image.shape[1]} x {image.shape[0]} pixels; crops of {crops.side} do not fit")
        for number in range(file_index, crops.num, crops.num_sources):
            top, left = crops.corner(number, *image.shape[:2])
            crop = image[top : top + crops.side, left : left + crops.side]
            yield SourceImage(str(number), f"{file.name}[{number}]", torch.from_numpy(crop.copy()).permute(2, 0, 1))
