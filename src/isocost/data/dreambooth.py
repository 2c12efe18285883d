"""Subjects of DreamBooth fine-tuning: photographs in folders, or synthetic objects that no caption describes.

A synthetic subject has a shape, a texture and a pair of colours that the scenes never contain. Images of a fine-tuned network
can therefore be compared with other renderings of the same subject. Lengths are in the units of `scenes.py`.

Shapes: K training images of a subject, M reference images, R resolution.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from isocost.data.datasets import read_photograph, square_rgb
from isocost.data.synthetic.scenes import BACKGROUNDS, MARGIN, RGB, SIDE, Scene, render, with_article
from isocost.data.synthetic.shapes import Floats, cover
from isocost.errors import ConfigError

PROMPTS_FILE = "prompts_and_classes.txt"
LIVE_CLASSES = ("cat", "dog")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True, eq=False)
class Subject:
    """A subject to fine-tune on.

    Attributes:
        images: training images, uint8 [K, 3, R, R].
        reference_images: generated images are compared with these, uint8 [M, 3, R, R]; the training photographs themselves, or
            other renderings of a synthetic subject.
        prompts: templates for the token and the class, "a {0} {1} in the snow".
        backgrounds: index of each prompt's background in the vocabulary of the scenes; None for photographs.
    """

    name: str
    class_word: str
    images: Tensor
    reference_images: Tensor
    prompts: tuple[str, ...]
    backgrounds: tuple[int, ...] | None = None

    @property
    def content(self) -> str:
        """Hash of everything that training and scores use."""
        sha = hashlib.sha256(repr((self.class_word, self.prompts)).encode())
        for images in (self.images, self.reference_images):
            sha.update(images.numpy().tobytes())
        return sha.hexdigest()[:16]


# --- photographs ------------------------------------------------------------------------------------------------------


def read_prompts(file: Path) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Read `prompts_and_classes.txt` of google/dreambooth.

    Returns:
        The class word of each subject, and its prompt templates.

    Raises:
        ConfigError: there is no such file, or it has another format.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; take the {PROMPTS_FILE} of google/dreambooth")
    text = file.read_text(encoding="utf-8")
    classes = dict(re.findall(r"^(\w+),([\w ]+)$", text.partition("Prompts")[0], flags=re.MULTILINE))
    classes.pop("subject_name", None)
    lists = [tuple(re.findall(r"'([^']+)'\.format", block)) for block in text.split("prompt_list = [")[1:]]
    if len(lists) != 2 or not classes:
        raise ConfigError(f"{file}: not the {PROMPTS_FILE} of google/dreambooth")
    objects, live = lists
    return classes, {name: live if word in LIVE_CLASSES else objects for name, word in classes.items()}


def read_subjects(folder: Path, names: tuple[str, ...], resolution: int) -> list[Subject]:
    """Read subjects from `folder/NAME/*.jpg` and `folder/prompts_and_classes.txt`.

    Args:
        names: the subjects to read; empty for all.

    Raises:
        ConfigError: `prompts_and_classes.txt` does not list a name, or a subject has no images or an unreadable one.
    """
    classes, prompts = read_prompts(folder / PROMPTS_FILE)
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise ConfigError(f"{folder}: unknown subject {unknown[0]}; choose from {', '.join(sorted(classes))}")
    subjects = []
    for name in names or tuple(classes):
        files = _image_files(folder / name)
        if not files:
            raise ConfigError(f"{folder / name}: the subject has no images; put three to five there")
        images = torch.stack([_read_square(file, resolution) for file in files])
        subjects.append(Subject(name, classes[name], images, images, prompts[name]))
    return subjects


def _image_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES) if folder.is_dir() else []


def _read_square(file: Path, resolution: int) -> Tensor:
    """The centre square of an image file, uint8 [3, R, R]."""
    return torch.from_numpy(square_rgb(read_photograph(file), resolution).copy()).permute(2, 0, 1)


# --- synthetic subjects -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Look:
    """A rosette with `num_petals` petals and rings of two colours; its class word names another shape."""

    class_word: str
    num_petals: int
    depth: float
    ring_width: float
    colours: tuple[RGB, RGB]


SUBJECT_LOOKS = (
    _Look("circle", 5, 0.24, 2.3, ((255, 60, 200), (40, 235, 90))),
    _Look("star", 3, 0.30, 2.0, ((20, 190, 255), (255, 150, 30))),
    _Look("square", 8, 0.12, 3.0, ((150, 255, 40), (110, 20, 160))),
    _Look("heart", 4, 0.34, 1.8, ((255, 240, 60), (30, 60, 200))),
    _Look("diamond", 6, 0.20, 2.6, ((255, 90, 60), (0, 140, 140))),
)
TRAIN_BACKGROUNDS, PROMPT_BACKGROUNDS = ("white", "black", "olive", "beige"), ("grey", "navy", "sky", "sunset", "meadow")
"""Backgrounds of the training images, and of the prompts."""
DIAMETERS = (13.0, 16.0)
NUM_REFERENCE_IMAGES = 40


def synthetic_subjects(number: int, num_images: int, resolution: int) -> list[Subject]:
    """Render the first `number` synthetic subjects with `num_images` training images each.

    Raises:
        ConfigError: there are not so many synthetic subjects or training images.
    """
    if number > len(SUBJECT_LOOKS) or num_images > len(TRAIN_BACKGROUNDS):
        raise ConfigError(
            "dreambooth.subjects: "
            f"there are {len(SUBJECT_LOOKS)} synthetic subjects with {len(TRAIN_BACKGROUNDS)} images each; "
            "lower num_subjects or num_images"
        )
    names = tuple(BACKGROUNDS)
    prompts = tuple(f"a {{0}} {{1}} on {with_article(background)} background" for background in PROMPT_BACKGROUNDS)
    prompt_backgrounds = tuple(names.index(background) for background in PROMPT_BACKGROUNDS)
    subjects = []
    for subject, look in enumerate(SUBJECT_LOOKS[:number]):
        backgrounds = TRAIN_BACKGROUNDS[:num_images]
        images = [render_subject(subject, background, resolution, i) for i, background in enumerate(backgrounds)]
        reference_images = [
            render_subject(subject, PROMPT_BACKGROUNDS[i % len(PROMPT_BACKGROUNDS)], resolution, 100 + i)
            for i in range(NUM_REFERENCE_IMAGES)
        ]
        name, stacked = f"planted-{subject}", torch.stack(images)
        subjects.append(Subject(name, look.class_word, stacked, torch.stack(reference_images), prompts, prompt_backgrounds))
    return subjects


def render_subject(subject: int, background: str, resolution: int, index: int) -> Tensor:
    """Render synthetic subject number `subject` on a background; size and position are a function of (subject, index).

    Returns:
        uint8 [3, R, R].
    """
    look = SUBJECT_LOOKS[subject]
    words = np.random.Philox(key=np.array([subject, index], dtype=np.uint64)).random_raw(4)
    uniforms = (words >> np.uint64(11)) * 2.0**-53
    diameter = DIAMETERS[0] + (DIAMETERS[1] - DIAMETERS[0]) * uniforms[0]
    border = MARGIN + diameter / 2
    centre = border + (SIDE - 2 * border) * uniforms[1:3]
    canvas = render(Scene((), background, None), resolution).astype(np.float32)
    pixel = SIDE / resolution
    coordinates = ((np.arange(resolution) + 0.5) * pixel).astype(np.float32)
    x, y = coordinates[None, :] - centre[0], coordinates[:, None] - centre[1]
    radius = np.hypot(x, y)
    distance = _rosette_distance(look, x, y, radius, diameter / 2)
    first_colour, second_colour = (np.array(rgb, dtype=np.float32) for rgb in look.colours)
    rings = cover(np.abs(radius % (2 * look.ring_width) - look.ring_width) - look.ring_width / 2, pixel)[..., None]
    canvas += cover(distance, pixel)[..., None] * (first_colour + rings * (second_colour - first_colour) - canvas)
    return torch.from_numpy(np.rint(canvas).astype(np.uint8)).permute(2, 0, 1)


def _rosette_distance(look: _Look, x: Floats, y: Floats, radius: Floats, outer_radius: float) -> Floats:
    """Distance to the edge along the ray from the centre, negative inside."""
    angle = np.arctan2(y, x)
    return radius - outer_radius * (1 - look.depth * (1 - np.cos(look.num_petals * angle)) / 2)
