"""Pictures from wherever people keep them, with their ids: a folder, an array file, tar shards, a Hub set, the scenes.

Shapes: N pictures, H x W pixels, R resolution.
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
from isocost.data.datasets import PICTURE_SUFFIXES, Bad, Sample, read_source, square_rgb
from isocost.errors import RequestError

HUB, SCENES = "hub:", "scenes:"
SCENES_SEED = 1
ARRAY_SUFFIXES = (".npy", ".npz")


@dataclass(frozen=True)
class Picture:
    """One picture uint8 [3, H, W], its id (`key_of` its name), its name, and its captions where it has any."""

    key: str
    name: str
    pixels: Tensor
    captions: tuple[str, ...] = ()


def key_of(name: str) -> str:
    """A picture's id: its file's stem; of a stem that ends in a long number, that number without leading zeros.

    COCO_val2014_000000203564.jpg, 000000203564.png and 203564 are one picture; airport_348.jpg stays airport_348.
    """
    stem = name.rsplit("/", 1)[-1]
    stem = re.sub(r"\.(jpe?g|png|webp|bmp)$", "", stem, flags=re.IGNORECASE)
    number = re.fullmatch(r"(?:COCO_\w+_)?(\d+)", stem)
    return str(int(number[1])) if number else stem


def is_source(place: str) -> bool:
    """Whether a place is read by the readers of training data: tar shards, a Hub set, the embedded scenes."""
    return place.startswith((HUB, SCENES)) or place.endswith(".tar")


def samples_of(place: str, resolution: int) -> Iterator[Sample]:
    """The samples of tar shards, a Hub set or the scenes, cropped to the centre square and resized to `resolution`.

    Raises:
        RequestError: something of it cannot be read.
    """
    for item in read_source(_source(place), resolution):
        if isinstance(item, Bad):
            raise RequestError(f"{place}: {item.name}: {item.reason}")
        assert isinstance(item, Sample), "every picture is wanted"
        yield item


def pictures_of(place: str, *, side: int | None, exact: bool, ids: Sequence[str] | None = None) -> Iterator[Picture]:
    """The pictures of a place in one fixed order; of a folder those of `ids` alone, in their order, where given.

    Where `exact`, each must be RGB of `side` x `side`, as a generator makes them; otherwise each is its centre square,
    in RGB on white, at its own size (`side` None) or resized to `side` (Lanczos).

    Raises:
        RequestError: the place is missing, or a picture cannot be read or is not what `exact` asks for.
    """
    if is_source(place):
        if side is None:
            raise RequestError(f"{place}: a protocol without a resolution takes folders and array files")
        for sample in samples_of(place, side):
            pixels = torch.from_numpy(sample.picture.copy()).permute(2, 0, 1)
            yield Picture(key_of(sample.name), sample.name, pixels, sample.captions)
    elif place.endswith(ARRAY_SUFFIXES):
        yield from _of_array(Path(place), side if exact else None)
    else:
        files = picture_files(Path(place))
        if ids is not None:
            place_of = {key: number for number, key in enumerate(ids)}
            wanted = (file for file in files if key_of(file.name) in place_of)
            files = sorted(wanted, key=lambda file: place_of[key_of(file.name)])
        for file in files:
            yield Picture(key_of(file.name), str(file), _read(file, side, exact))


def pictures_by_key(place: str, *, side: int | None, exact: bool) -> dict[str, Callable[[], Picture]]:
    """The pictures of a folder or array file by id, each read when it is called for.

    Raises:
        RequestError: the place is missing, or two pictures have one id.
    """
    if place.endswith(ARRAY_SUFFIXES):
        return {picture.key: partial(_itself, picture) for picture in _of_array(Path(place), side if exact else None)}
    by_key: dict[str, Path] = {}
    for file in picture_files(Path(place)):
        key = key_of(file.name)
        if key in by_key:
            raise RequestError(f"{file}: id {key} came twice; the other is {by_key[key]}")
        by_key[key] = file
    return {key: partial(_open, key, file, side, exact) for key, file in by_key.items()}


def picture_files(folder: Path) -> list[Path]:
    """Every picture below a folder, by name.

    Raises:
        RequestError: there is no such folder.
    """
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder of pictures")
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES)


def _source(place: str) -> SourceSpec:
    if place.startswith(SCENES):
        count = place.removeprefix(SCENES)
        if not count.isdigit() or int(count) < 1:
            raise RequestError(f"{place}: give scenes:NUMBER, such as scenes:2000")
        return ScenesSource(kind="scenes", num_pictures=int(count), seed=SCENES_SEED)
    if place.startswith(HUB):
        path, *rest = place.removeprefix(HUB).split(":")
        columns = dict(zip(("split", "image_column", "caption_column"), rest, strict=False))
        return HubSource(kind="hub", path=path, **columns)
    return WebdatasetSource(kind="webdataset", path=place)


def _itself(picture: Picture) -> Picture:
    return picture


def _open(key: str, file: Path, side: int | None, exact: bool) -> Picture:
    return Picture(key, str(file), _read(file, side, exact))


def _read(file: Path, side: int | None, exact: bool) -> Tensor:
    try:
        with Image.open(file) as opened:
            if exact:
                _demand(file, opened, side)
            picture = square_rgb(opened, side or min(opened.size))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{file}: cannot be read as a picture: {' '.join(str(error).split())[:120]}") from error
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)


def _demand(file: Path, opened: Image.Image, side: int | None) -> None:
    if opened.mode != "RGB":
        kind = {"L": "grey", "RGBA": "RGBA, with transparency", "P": "of a palette"}.get(opened.mode, opened.mode)
        raise RequestError(f"{file}: is {kind}; this protocol takes RGB pictures: save it as RGB on the ground it stands on")
    if side is not None and opened.size != (side, side):
        raise RequestError(f"{file}: {opened.width} x {opened.height} pixels; this protocol takes {side} x {side}, not resized")


def _of_array(file: Path, side: int | None) -> Iterator[Picture]:
    """uint8 [N, H, W, 3] of a .npy, or of the first array of a .npz; a picture's id is its place."""
    pictures = _load_array(file)
    if pictures.dtype.kind == "f":
        bad = int((~np.isfinite(pictures)).reshape(len(pictures), -1).any(1).sum())
        what = f"{bad} pictures hold NaN or infinite pixels" if bad else "pixels are floating point"
        raise RequestError(f"{file}: {what}; give whole levels, uint8 [N, H, W, 3]")
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
        kind = {1: "grey", 4: "RGBA"}.get(pictures.shape[-1], "not RGB") if pictures.ndim == 4 else "no stack of pictures"
        raise RequestError(f"{file}: {pictures.dtype} {list(pictures.shape)} ({kind}); pictures are uint8 [N, H, W, 3]")
    if side is not None and pictures.shape[1:3] != (side, side):
        height, width = pictures.shape[1:3]
        raise RequestError(f"{file}: {width} x {height} pixels; this protocol takes {side} x {side}, not resized")
    for place, picture in enumerate(pictures):
        yield Picture(str(place), f"{file.name}[{place}]", torch.from_numpy(picture.copy()).permute(2, 0, 1))


def _load_array(file: Path) -> np.ndarray:
    if not file.is_file():
        raise RequestError(f"{file}: no such file of pictures")
    try:
        loaded: Any = np.load(file, allow_pickle=False)
        return loaded if isinstance(loaded, np.ndarray) else loaded[loaded.files[0]]
    except ValueError as error:
        raise RequestError(f"{file}: holds pickled objects, which are refused; save uint8 [N, H, W, 3]") from error
    except (OSError, EOFError, IndexError, KeyError) as error:
        raise RequestError(f"{file}: cut short or not an array file ({' '.join(str(error).split())[:80]})") from error
