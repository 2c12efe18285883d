"""Images from wherever people keep them, with their ids: a folder, an array file, tar shards, a Hub set, the scenes.

Shapes: N images, H x W pixels, R resolution.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from isocost.config.data import HubSource, ScenesSource, SourceSpec, WebdatasetSource
from isocost.data.datasets import IMAGE_SUFFIXES, Sample, UnreadableSample, read_source, square_rgb
from isocost.errors import ConfigError

HUB, SCENES = "hub:", "scenes:"
SCENES_SEED = 1
ARRAY_SUFFIXES = (".npy", ".npz")


@dataclass(frozen=True)
class SourceImage:
    """One image uint8 [3, H, W], its id (`image_id` its name), its name, and its captions where it has any."""

    key: str
    name: str
    pixels: Tensor
    prompts: tuple[str, ...] = ()


def image_id(name: str) -> str:
    """An image's id: its file's stem; of a stem that ends in a long number, that number without leading zeros.

    COCO_val2014_000000203564.jpg, 000000203564.png and 203564 are one image; airport_348.jpg stays airport_348.
    """
    stem = name.rsplit("/", 1)[-1]
    stem = re.sub(r"\.(jpe?g|png|webp|bmp)$", "", stem, flags=re.IGNORECASE)
    number = re.fullmatch(r"(?:COCO_\w+_)?(\d+)", stem)
    return str(int(number[1])) if number else stem


def is_source(place: str) -> bool:
    """Whether a place is read by the readers of training data: tar shards, a Hub set, the embedded scenes."""
    return place.startswith((HUB, SCENES)) or place.endswith(".tar")


def iter_samples(place: str, resolution: int) -> Iterator[Sample]:
    """The samples of tar shards, a Hub set or the scenes, cropped to the centre square and resized to `resolution`.

    Raises:
        ConfigError: something of it cannot be read.
    """
    for item in read_source(_source(place), resolution):
        if isinstance(item, UnreadableSample):
            raise ConfigError(f"{place}: {item.name}: {item.reason}")
        assert isinstance(item, Sample), "every image is wanted"
        yield item


def iter_images(place: str, *, side: int | None, exact: bool, ids: Sequence[str] | None = None) -> Iterator[SourceImage]:
    """The images of a place in one fixed order; of a folder those of `ids` alone, in their order, where given.

    Where `exact`, each must be RGB of `side` x `side`, as a generator makes them; otherwise each is its centre square,
    in RGB on white, at its own size (`side` None) or resized to `side` (Lanczos).

    Raises:
        ConfigError: the place is missing, or an image cannot be read or is not what `exact` asks for.
    """
    if is_source(place):
        if side is None:
            raise ConfigError(f"{place}: a protocol without a resolution takes folders and array files")
        for sample in iter_samples(place, side):
            pixels = torch.from_numpy(sample.image.copy()).permute(2, 0, 1)
            yield SourceImage(image_id(sample.name), sample.name, pixels, sample.captions)
    elif place.endswith(ARRAY_SUFFIXES):
        yield from _of_array(Path(place), side if exact else None)
    else:
        files = image_files(Path(place))
        if ids is not None:
            name_hash = {key: number for number, key in enumerate(ids)}
            wanted = (file for file in files if image_id(file.name) in name_hash)
            files = sorted(wanted, key=lambda file: name_hash[image_id(file.name)])
        for file in files:
            yield SourceImage(image_id(file.name), str(file), _read(file, side, exact))


def images_by_key(place: str, *, side: int | None, exact: bool) -> dict[str, Callable[[], SourceImage]]:
    """The images of a folder or array file by id, each read when it is called for.

    Raises:
        ConfigError: the place is missing, or two images have one id.
    """
    if place.endswith(ARRAY_SUFFIXES):
        return {image.key: partial(_identity, image) for image in _of_array(Path(place), side if exact else None)}
    by_key: dict[str, Path] = {}
    for file in image_files(Path(place)):
        key = image_id(file.name)
        if key in by_key:
            raise ConfigError(f"{file}: id {key} came twice; the other is {by_key[key]}")
        by_key[key] = file
    return {key: partial(_open, key, file, side, exact) for key, file in by_key.items()}


def image_files(folder: Path) -> list[Path]:
    """Every image below a folder, by name.

    Raises:
        ConfigError: there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder of images")
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)


def _source(place: str) -> SourceSpec:
    if place.startswith(SCENES):
        count = place.removeprefix(SCENES)
        if not count.isdigit() or int(count) < 1:
            raise ConfigError(f"{place}: give scenes:NUMBER, such as scenes:2000")
        return ScenesSource(kind="scenes", num_images=int(count), seed=SCENES_SEED)
    if place.startswith(HUB):
        path, *rest = place.removeprefix(HUB).split(":")
        columns = dict(zip(("split", "image_column", "caption_column"), rest, strict=False))
        return HubSource(kind="hub", path=path, **columns)
    return WebdatasetSource(kind="webdataset", path=place)


def _identity(image: SourceImage) -> SourceImage:
    return image


def _open(key: str, file: Path, side: int | None, exact: bool) -> SourceImage:
    return SourceImage(key, str(file), _read(file, side, exact))


def _read(file: Path, side: int | None, exact: bool) -> Tensor:
    try:
        with Image.open(file) as opened:
            if exact:
                _check_image(file, opened, side)
            image = square_rgb(opened, side or min(opened.size))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{file}: cannot be read as an image: {' '.join(str(error).split())[:120]}") from error
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


def _check_image(file: Path, opened: Image.Image, side: int | None) -> None:
    if opened.mode != "RGB":
        kind = {"L": "grey", "RGBA": "RGBA, with transparency", "P": "of a palette"}.get(opened.mode, opened.mode)
        raise ConfigError(f"{file}: is {kind}; this protocol takes RGB images: save it as RGB on the ground it stands on")
    if side is not None and opened.size != (side, side):
        raise ConfigError(f"{file}: {opened.width} x {opened.height} pixels; this protocol takes {side} x {side}, not resized")


def _of_array(file: Path, side: int | None) -> Iterator[SourceImage]:
    """uint8 [N, H, W, 3] of a .npy, or of the first array of a .npz; an image's id is its place."""
    images = _load_array(file)
    if images.dtype.kind == "f":
        bad = int((~np.isfinite(images)).reshape(len(images), -1).any(1).sum())
        what = f"{bad} images hold NaN or infinite pixels" if bad else "pixels are floating point"
        raise ConfigError(f"{file}: {what}; give whole levels, uint8 [N, H, W, 3]")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        kind = {1: "grey", 4: "RGBA"}.get(images.shape[-1], "not RGB") if images.ndim == 4 else "no stack of images"
        raise ConfigError(f"{file}: {images.dtype} {list(images.shape)} ({kind}); images are uint8 [N, H, W, 3]")
    if side is not None and images.shape[1:3] != (side, side):
        height, width = images.shape[1:3]
        raise ConfigError(f"{file}: {width} x {height} pixels; this protocol takes {side} x {side}, not resized")
    for place, image in enumerate(images):
        yield SourceImage(str(place), f"{file.name}[{place}]", torch.from_numpy(image.copy()).permute(2, 0, 1))


def _load_array(file: Path) -> np.ndarray:
    if not file.is_file():
        raise ConfigError(f"{file}: no such file of images")
    try:
        loaded: Any = np.load(file, allow_pickle=False)
        return loaded if isinstance(loaded, np.ndarray) else loaded[loaded.files[0]]
    except ValueError as error:
        raise ConfigError(f"{file}: holds pickled objects, which are refused; save uint8 [N, H, W, 3]") from error
    except (OSError, EOFError, IndexError, KeyError) as error:
        raise ConfigError(f"{file}: cut short or not an array file ({' '.join(str(error).split())[:80]})") from error
