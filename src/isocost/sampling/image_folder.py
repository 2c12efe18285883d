"""A folder of images that a model makes from prompts, a part at a time, so that a stopped run goes on.

A model is a checkpoint, a published pipeline, or a Python function of the user, `python:MODULE:FUNCTION`, which may call any
engine.

Shapes: N images, H x W pixels.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from isocost.config.sampling import ImageSettings
from isocost.errors import ConfigError
from isocost.models.checkpoint import open_checkpoint
from isocost.sampling.sample import Model
from isocost.utils.artifact_store import write_atomically
from isocost.utils.output_paths import check_output_folder, private_folder
from isocost.utils.progress import progress_bar

PYTHON = "python:"
PART_SIZE = 64
"""Images that are made in one call and written together."""

MakeImages = Callable[[Sequence[str], int], np.ndarray]
"""Prompts of N images and the index of the first image -> uint8 [N, H, W, 3]."""


@dataclass(frozen=True)
class ImageMaker:
    """A model with its settings.

    Attributes:
        identity: everything that its images depend on, as plain data: the checkpoint's digest or the function's name.
        load: returns the function that makes images; nothing is loaded before.
    """

    identity: Mapping[str, Any]
    load: Callable[[], MakeImages]


def checkpoint_maker(checkpoint: str, settings: ImageSettings) -> ImageMaker:
    """Images of a checkpoint or a published pipeline. Image i has the noise of sample index i.

    Raises:
        ConfigError: the checkpoint cannot be read.
    """
    source = open_checkpoint(checkpoint)

    def load() -> MakeImages:
        vae = settings.vae
        model = Model(
            checkpoint,
            dtype=settings.dtype,
            compiled=settings.compiled,
            vae_dtype=vae.dtype,
            vae_tile_size=vae.tile_size,
            vae_slicing=vae.slicing,
        )
        guide = None if settings.guide is None else Model(settings.guide, device=model.device, dtype=model.dtype)

        def make(prompts: Sequence[str], first_index: int) -> np.ndarray:
            samples = model.sample(
                prompts,
                solver=settings.solver,
                num_steps=settings.num_steps,
                guidance=settings.guidance,
                seed=settings.seed,
                negative_prompt=settings.negative_prompt,
                guide=guide,
                guide_null_prompt=settings.guide_null_prompt,
                guidance_interval=settings.guidance_interval,
                guidance_schedule=settings.guidance_schedule,
                first_index=first_index,
                batch_size=settings.batch_size,
            )
            return samples.array[:, 0]

        return make

    guide_digest = {} if settings.guide is None else {"guide_checkpoint": open_checkpoint(settings.guide).digest}
    return ImageMaker({"checkpoint": source.digest, **guide_digest, **settings.canonical()}, load)


def python_maker(name: str, settings: Mapping[str, Any]) -> ImageMaker:
    """Images of a Python function: `function(prompts, seeds, **settings)`, one image for each prompt and seed.

    It returns PIL images, or an array uint8 [N, H, W, 3]. The folder where isocost was started is on the import path.

    Args:
        name: python:MODULE:FUNCTION.
        settings: passed on to the function; `seed` is added to the index of each image.

    Raises:
        ConfigError: the name does not have this form; when it is loaded, that the function cannot be imported.
    """
    module, separator, function = name.removeprefix(PYTHON).partition(":")
    if not (module and separator and function):
        raise ConfigError(f"{name}: give python:MODULE:FUNCTION, such as python:my_engine:generate")
    others = {key: value for key, value in settings.items() if key != "seed"}
    first_seed = int(settings.get("seed", 0))

    def load() -> MakeImages:
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.insert(0, here)
        try:
            call = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{name}: cannot be imported ({' '.join(str(error).split())})") from error

        def make(prompts: Sequence[str], first_index: int) -> np.ndarray:
            seeds = [first_seed + first_index + position for position in range(len(prompts))]
            return _as_array(name, call(list(prompts), seeds, **others), len(prompts))

        return make

    return ImageMaker({"function": name, "settings": dict(others), "seed": first_seed}, load)


def _as_array(name: str, images: Any, number: int) -> np.ndarray:
    """The result of a function as uint8 [N, H, W, 3].

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(images, Sequence) and all(isinstance(image, Image.Image) for image in images):
        if len({image.size for image in images}) > 1:
            raise ConfigError(f"{name}: returned images of several sizes in one call; return images of one size")
        images = np.stack([np.asarray(image.convert("RGB")) for image in images]) if images else np.zeros(0)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        actual = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ConfigError(f"{name}: returned {actual}; return PIL images, or uint8 [N, H, W, 3]")
    if len(images) != number:
        raise ConfigError(f"{name}: returned {len(images)} images for {number} prompts; return one for each")
    return images


def write_images(maker: ImageMaker, prompts: Mapping[str, str], folder: Path, title: str) -> None:
    """Make the images of prompts that the folder does not have yet.

    Args:
        maker: the model.
        prompts: image id -> prompt, in the order of the image indices.
        folder: takes ID.png for every image; FOLDER.json takes the model, its settings and the prompts.
        title: names the stage in the progress.

    Raises:
        ConfigError: the folder has images of another model, other settings or other prompts; or a setting is not supported.
    """
    identity = json.loads(json.dumps({"model": dict(maker.identity), "prompts": list(prompts.items())}))
    check_output_folder(folder)
    record = folder.with_name(f"{folder.name}.json")
    if record.is_file():
        if json.loads(record.read_text(encoding="utf-8")) != identity:
            raise ConfigError(f"{folder}: has images of another model, other settings or prompts; give a new folder (--out)")
    elif folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: holds other files; give a new folder (--out)")
    ids = list(prompts)
    parts = [ids[start : start + PART_SIZE] for start in range(0, len(ids), PART_SIZE)]
    missing = [number for number, part in enumerate(parts) if any(not (folder / f"{key}.png").is_file() for key in part)]
    if not missing:
        return
    make = maker.load()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(record, json.dumps(identity, indent=1))
    done = len(ids) - sum(len(parts[number]) for number in missing)
    with progress_bar(title, len(ids), "images", done) as report:
        for number in missing:
            images = make([prompts[key] for key in parts[number]], number * PART_SIZE)
            with private_folder(folder) as partial:
                for key, image in zip(parts[number], images, strict=True):
                    Image.fromarray(image).save(partial / f"{key}.png")
                for key in parts[number]:
                    (partial / f"{key}.png").replace(folder / f"{key}.png")
            done += len(parts[number])
            report(done, "")
