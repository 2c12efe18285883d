"""A folder of images that a model makes from prompts, a part at a time, so that a stopped run goes on.

A model is a checkpoint, a published pipeline, or a Python function of the user, `python:MODULE:FUNCTION`, which may call any
engine.

Shapes: N images, H x W pixels.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from isocost.config.sampling import ImageSettings
from isocost.config.types import Seed
from isocost.diffusion.solvers import solver_coefficients
from isocost.errors import ConfigError, RunError
from isocost.models.checkpoint import CheckpointSource, open_checkpoint
from isocost.sampling.generate import schedule_of
from isocost.sampling.guides import check_other_checkpoint
from isocost.sampling.request import passes_per_evaluation
from isocost.sampling.sample import Model
from isocost.utils.artifact_store import write_atomically
from isocost.utils.environment import provenance
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
        identity: everything that its images depend on, as plain data: the checkpoint's digest or the function's source, the
            settings, the versions of the libraries, and the device.
        check: raises ConfigError if the model does not support the settings; nothing is loaded.
        load: returns the function that makes images.
    """

    identity: Mapping[str, Any]
    check: Callable[[], None]
    load: Callable[[], MakeImages]


def _environment() -> dict[str, str]:
    """The versions and the device that bits of images depend on."""
    facts = provenance()
    return {name: facts[name] for name in ("isocost_version", "torch_version", "diffusers_version", "device") if name in facts}


# --- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint_maker(checkpoint: str, settings: ImageSettings) -> ImageMaker:
    """Images of a checkpoint or a published pipeline. Image i has the noise of sample index i.

    Raises:
        ConfigError: the checkpoint or its guide cannot be read.
    """
    source = open_checkpoint(checkpoint)
    guide_source = None if settings.guide is None else open_checkpoint(settings.guide)
    guide_digest = {} if guide_source is None else {"guide_checkpoint": guide_source.digest}

    def check() -> None:
        _check_settings(checkpoint, settings, source)
        if guide_source is not None and settings.guide is not None:
            check_other_checkpoint(source, guide_source, settings.guide)

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
        passes = passes_per_evaluation(settings.guidance, model.info.model.embeds_guidance) if guide is None else 1
        slots = None if settings.images_per_call is None else settings.images_per_call * passes

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
                batch_size=slots,
            )
            return samples.array[:, 0]

        return make

    identity = {"checkpoint": source.digest, **guide_digest, **settings.canonical(), "environment": _environment()}
    return ImageMaker(identity, check, load)


def _check_settings(checkpoint: str, settings: ImageSettings, source: CheckpointSource) -> None:
    """Check the settings against the metadata of a checkpoint.

    Raises:
        ConfigError: the checkpoint is for super-resolution, or does not support the solver, the steps or the tiles.
    """
    info = source.info
    if info.scale is not None:
        raise ConfigError(f"{checkpoint}: is a super-resolution model; give one that makes images from prompts")
    solver = info.resolve_solver(settings.solver)
    solver_coefficients(solver, solver.steps_or(settings.num_steps, info.num_steps), schedule_of(info))
    settings.vae.check_resolution(info.resolution, "vae.tile_size")


# --- Python functions -------------------------------------------------------------------------------------------------


def python_maker(name: str, settings: Mapping[str, Any]) -> ImageMaker:
    """Images of a Python function: `function(prompts, seeds, **settings)`, one image for each prompt and seed.

    It returns PIL images, or an array uint8 [N, H, W, 3]. The folder where isocost was started is on the import path. The file
    of its module belongs to the identity of the images, so that an edited function makes new images; files that it imports do
    not.

    Args:
        name: python:MODULE:FUNCTION.
        settings: passed on to the function; `seed` is added to the index of each image.

    Raises:
        ConfigError: the name does not have this form, there is no such module, or `seed` is no seed.
    """
    module, separator, function = name.removeprefix(PYTHON).partition(":")
    if not (module and separator and function):
        raise ConfigError(f"{name}: give python:MODULE:FUNCTION, such as python:my_engine:generate")
    others = {key: value for key, value in settings.items() if key != "seed"}
    try:
        first_seed = TypeAdapter(Seed).validate_python(settings.get("seed", 0), strict=True)
    except ValidationError as error:
        raise ConfigError(f"{name}: seed = {settings['seed']!r}: give a whole number, 0 or more") from error
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    source = _module_hash(name, module)

    def load_function() -> Callable[..., Any]:
        try:
            call = getattr(importlib.import_module(module), function)
        except Exception as error:
            raise ConfigError(f"{name}: cannot be imported ({_one_line(error)})") from error
        if not callable(call):
            raise ConfigError(f"{name}: is {type(call).__name__}, not a function")
        try:
            inspect.signature(call).bind([], [], **others)
        except TypeError as error:
            raise ConfigError(f"{name}: does not take prompts, seeds and these settings ({error})") from error
        return call

    def load() -> MakeImages:
        call = load_function()

        def make(prompts: Sequence[str], first_index: int) -> np.ndarray:
            seeds = [first_seed + first_index + position for position in range(len(prompts))]
            try:
                images = call(list(prompts), seeds, **others)
            except Exception as error:
                raise RunError(f"{name}: failed ({_one_line(error)}); the images made so far are kept") from error
            return _as_array(name, images, len(prompts))

        return make

    def check() -> None:
        load_function()

    identity = {"function": name, "source": source, "settings": others, "seed": first_seed, "environment": _environment()}
    return ImageMaker(identity, check, load)


def _module_hash(name: str, module: str) -> str:
    """SHA-256 of the file of a module, 16 hex digits; the parents of a dotted name are imported.

    Raises:
        ConfigError: there is no such module, or it is not one file.
    """
    importlib.invalidate_caches()
    try:
        spec = importlib.util.find_spec(module)
    except Exception as error:
        raise ConfigError(f"{name}: cannot be imported ({_one_line(error)})") from error
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise ConfigError(f"{name}: cannot be imported (No module named {module!r})")
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()[:16]


def _one_line(error: BaseException) -> str:
    """Type and message of an error, with the last line of code that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    source = f", {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{source}"


def _as_array(name: str, images: Any, number: int) -> np.ndarray:
    """The result of a function as uint8 [N, H, W, 3].

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(images, list | tuple) and images and all(isinstance(image, Image.Image) for image in images):
        if modes := {image.mode for image in images} - {"RGB", "L"}:
            raise ConfigError(
                f"{name}: returned images in mode {min(modes)}; convert them to RGB, on a background of your choice"
            )
        if len({image.size for image in images}) > 1:
            raise ConfigError(f"{name}: returned images of several sizes in one call; return images of one size")
        images = np.stack([np.asarray(image.convert("RGB")) for image in images])
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        actual = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ConfigError(f"{name}: returned {actual}; return PIL images, or uint8 [N, H, W, 3]")
    if len(images) != number or images.size == 0:
        raise ConfigError(f"{name}: returned {list(images.shape)} for {number} prompts; return one image for each")
    return images


# --- the folder -------------------------------------------------------------------------------------------------------


def _identity(maker: ImageMaker, prompts: Mapping[str, str]) -> Any:
    return json.loads(json.dumps({"model": dict(maker.identity), "prompts": list(prompts.items())}))


def _record(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def check_image_folder(maker: ImageMaker, prompts: Mapping[str, str], folder: Path) -> None:
    """Check that a folder is new, or has images of this model and these prompts.

    Raises:
        ConfigError: it has images of another model, other settings, other prompts or other versions; or holds other files.
    """
    check_output_folder(folder)
    if not (folder.is_dir() and any(folder.iterdir())):
        return  # a record without images is that of an attempt that failed
    record = _record(folder)
    if not record.is_file():
        raise ConfigError(f"{folder}: holds other files; give a new folder (--out)")
    try:
        recorded = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{record}: is damaged; remove it and {folder}, or give a new folder (--out)") from error
    if recorded == (expected := _identity(maker, prompts)):
        return
    old, new = (value.get("model", {}) if isinstance(value, dict) else {} for value in (recorded, expected))
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)] or ["prompts"]
    raise ConfigError(
        f"{folder}: has images of another model, other settings or prompts (changed: {', '.join(changed)}); "
        "give a new folder (--out)"
    )


def write_images(maker: ImageMaker, prompts: Mapping[str, str], folder: Path, title: str) -> None:
    """Make the images of prompts that the folder does not have yet.

    Args:
        maker: the model.
        prompts: image id -> prompt, in the order of the image indices.
        folder: takes ID.png for every image; FOLDER.json takes the model, its settings and the prompts.
        title: names the stage in the progress.

    Raises:
        ConfigError: see `check_image_folder`; or a setting is not supported.
        RunError: a Python function failed.
    """
    check_image_folder(maker, prompts, folder)
    ids = list(prompts)
    parts = [ids[start : start + PART_SIZE] for start in range(0, len(ids), PART_SIZE)]
    missing = [number for number, part in enumerate(parts) if any(not (folder / f"{key}.png").is_file() for key in part)]
    if not missing:
        return
    make = maker.load()
    done = len(ids) - sum(len(parts[number]) for number in missing)
    with progress_bar(title, len(ids), "images", done) as report:
        for number in missing:
            images = make([prompts[key] for key in parts[number]], number * PART_SIZE)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(_record(folder), json.dumps(_identity(maker, prompts), indent=1))
            with private_folder(folder) as partial:
                for key, image in zip(parts[number], images, strict=True):
                    Image.fromarray(image).save(partial / f"{key}.png")
                for key in parts[number]:
                    (partial / f"{key}.png").replace(folder / f"{key}.png")
            done += len(parts[number])
            report(done, "")
