"""Readers of images with ids: folders, array files, tar shards, Hub data sets, embedded scenes.

Shapes: N images, H x W pixels, R resolution.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from isocost.config.data import HubSource, ScenesSource, SourceSpec, WebdatasetSource
from isocost.data.datasets import Sample, UnreadableSample, read_source
from isocost.data.image_files import center_square, is_image_name, list_images, printable, read_image_file
from isocost.errors import ConfigError

HUB, SCENES = "hub:", "scenes:"
SCENES_SEED = 1
ARRAY_SUFFIXES = (".npy", ".npz")


@dataclass(frozen=True)
class SourceImage:
    """An image of a source.

    Attributes:
        id: `image_id` of its name.
        name: its file or sample, for messages.
        pixels: uint8 [3, H, W].
        prompts: its captions; empty if it has none.
    """

    id: str
    name: str
    pixels: Tensor
    prompts: tuple[str, ...] = ()


def image_id(name: str) -> str:
    """The id of an image: the stem of its file name, or, if the stem is a number or a COCO name, its number without zeros.

    COCO_val2014_000000203564.jpg, 000000203564.png and 203564 are the same image; airport_348.jpg has the id airport_348.
    """
    stem = printable(name.rsplit("/", 1)[-1])
    stem = stem.rpartition(".")[0] if is_image_name(stem) else stem
    number = re.fullmatch(r"(?:COCO_\w+_)?(\d+)", stem)
    return str(int(number[1])) if number else stem


def is_dataset(source: str) -> bool:
    """Whether a source is read like training data: tar shards, a Hub data set, or the embedded scenes."""
    return source.startswith((HUB, SCENES)) or source.endswith(".tar")


def iter_samples(source: str, resolution: int) -> Iterator[Sample]:
    """Iterate over tar shards, a Hub data set or the scenes; images are centre squares, resized to `resolution` pixels.

    Raises:
        ConfigError: a sample cannot be read.
    """
    for item in read_source(_source_spec(source), resolution):
        if isinstance(item, UnreadableSample):
            raise ConfigError(f"{source}: {item.name}: {item.reason}")
        assert isinstance(item, Sample), "no sample is skipped"
        yield item


def iter_images(source: str, *, resolution: int | None, exact: bool, ids: Sequence[str] | None = None) -> Iterator[SourceImage]:
    """Iterate over the images of a source in a fixed order.

    Args:
        source: a folder, a .npy or .npz file, tar shards, `hub:NAME:SPLIT` or `scenes:NUMBER`.
        resolution: height and width in pixels; None leaves each image at its own size.
        exact: an image of a folder or array file must be RGB and have that resolution already. Otherwise it is converted to
            RGB on white, cropped to its centre square and resized (Lanczos).
        ids: of a folder, only the images with these ids, in their order.

    Raises:
        ConfigError: the source is missing, or an image cannot be read or does not meet `exact`.
    """
    if is_dataset(source):
        if resolution is None:
            raise ConfigError(f"{source}: a protocol without a resolution needs a folder or an array file")
        for sample in iter_samples(source, resolution):
            pixels = torch.from_numpy(sample.image.copy()).permute(2, 0, 1)
            yield SourceImage(image_id(sample.name), sample.name, pixels, sample.captions)
    elif source.endswith(ARRAY_SUFFIXES):
        yield from _iter_array(Path(source), resolution if exact else None)
    else:
        files = list_images(Path(source))
        if ids is not None:
            position = {key: number for number, key in enumerate(ids)}
            selected = (file for file in files if image_id(file.name) in position)
            files = sorted(selected, key=lambda file: position[image_id(file.name)])
        for file in files:
            yield SourceImage(image_id(file.name), printable(str(file)), _read_image(file, resolution, exact))


def images_by_id(source: str, *, resolution: int | None, exact: bool) -> dict[str, Callable[[], SourceImage]]:
    """Functions that read the images of a folder or array file, by image id; arguments as of `iter_images`.

    Raises:
        ConfigError: the source is missing, or two images have the same id.
    """
    if source.endswith(ARRAY_SUFFIXES):
        return {image.id: partial(_identity, image) for image in _iter_array(Path(source), resolution if exact else None)}
    files: dict[str, Path] = {}
    for file in list_images(Path(source)):
        key = image_id(file.name)
        if key in files:
            raise ConfigError(f"{file}: id {key} appears twice; the other image is {files[key]}")
        files[key] = file
    return {key: partial(_open_image, key, file, resolution, exact) for key, file in files.items()}


def _source_spec(source: str) -> SourceSpec:
    if source.startswith(SCENES):
        count = source.removeprefix(SCENES)
        if not count.isdigit() or int(count) < 1:
            raise ConfigError(f"{source}: give scenes:NUMBER, such as scenes:2000")
        return ScenesSource(kind="scenes", num_images=int(count), seed=SCENES_SEED)
    if source.startswith(HUB):
        path, *options = source.removeprefix(HUB).split(":")
        columns = dict(zip(("split", "image_column", "caption_column"), options, strict=False))
        return HubSource(kind="hub", path=path, **columns)
    return WebdatasetSource(kind="webdataset", path=source)


def _identity(image: SourceImage) -> SourceImage:
    return image


def _open_image(key: str, file: Path, resolution: int | None, exact: bool) -> SourceImage:
    return SourceImage(key, printable(str(file)), _read_image(file, resolution, exact))


def _read_image(file: Path, resolution: int | None, exact: bool) -> Tensor:
    rgb = read_image_file(file, partial(_check_image, file, resolution) if exact else None)
    return torch.from_numpy(center_square(rgb, resolution).copy()).permute(2, 0, 1)


def _check_image(file: Path, resolution: int | None, opened: Image.Image) -> None:
    if opened.mode != "RGB":
        kind = {"L": "is grey", "RGBA": "is RGBA, with transparency", "P": "has a palette"}.get(
            opened.mode, f"is {opened.mode}"
        )
        raise ConfigError(f"{file}: {kind}; this protocol needs RGB images: composite it onto a background and save it as RGB")
    if resolution is not None and opened.size != (resolution, resolution):
        raise ConfigError(_size_message(file, opened.width, opened.height, resolution))


def _size_message(file: Path, width: int, height: int, resolution: int) -> str:
    return f"{file}: {width} x {height} pixels; this protocol needs {resolution} x {resolution} and does not resize"


def _iter_array(file: Path, resolution: int | None) -> Iterator[SourceImage]:
    """The images uint8 [N, H, W, 3] of a .npy file, or of the only such array in a .npz file; their ids are their positions."""
    images = _load_array(file)
    if images.dtype.kind == "f":
        bad = int((~np.isfinite(images)).reshape(len(images), -1).any(1).sum())
        problem = f"{bad} images contain NaN or infinite pixels" if bad else "pixels are floating point"
        raise ConfigError(f"{file}: {problem}; give integers 0..255, uint8 [N, H, W, 3]")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        kind = {1: "grey", 4: "RGBA"}.get(images.shape[-1], "not RGB") if images.ndim == 4 else "not four-dimensional"
        raise ConfigError(f"{file}: {images.dtype} {list(images.shape)} ({kind}); give images as uint8 [N, H, W, 3]")
    if resolution is not None and images.shape[1:3] != (resolution, resolution):
        height, width = images.shape[1:3]
        raise ConfigError(_size_message(file, width, height, resolution))
    for index, image in enumerate(images):
        yield SourceImage(str(index), f"{file.name}[{index}]", torch.from_numpy(image.copy()).permute(2, 0, 1))


def _load_array(file: Path) -> np.ndarray:
    if not os.path.isfile(file):
        raise ConfigError(f"{file}: no such image file")
    try:
        loaded: Any = np.load(file, allow_pickle=False, mmap_mode="r")  # a .npy file is read image by image
        return loaded if isinstance(loaded, np.ndarray) else _only_images(file, loaded)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{file}: contains pickled objects, which are refused; save uint8 [N, H, W, 3]") from error
    except (OSError, EOFError, IndexError, KeyError) as error:
        raise ConfigError(f"{file}: truncated or not an array file ({' '.join(str(error).split())[:80]})") from error


def _only_images(file: Path, arrays: Any) -> np.ndarray:
    """The array of images in a .npz file, which may also have labels or statistics; else its first array.

    Raises:
        ConfigError: several arrays are images.
    """
    images = {name: array for name in arrays.files if (array := arrays[name]).ndim == 4}
    if len(images) > 1:
        raise ConfigError(f"{file}: {len(images)} arrays can be images ({', '.join(images)}); save one of them as .npy")
    return next(iter(images.values())) if images else arrays[arrays.files[0]]
