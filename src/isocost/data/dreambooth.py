"""Subjects that a network is to learn from a few images: photographs in folders, or objects that no caption can name.

A planted subject has a shape, a texture and a pair of colours that the scenes never draw, so what a network tuned on it makes
can be compared with other drawings of the same thing. Lengths are those of `scenes.py`.

Shapes: K images of a subject, M others of it to compare with, R resolution.
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
    """One subject.

    Attributes:
        images: what is learned from, uint8 [K, 3, R, R].
        others: what generated images are compared with, uint8 [M, 3, R, R]: the same photographs, or other drawings.
        prompts: with places for the token and the class, "a {0} {1} in the snow".
        backgrounds: number of each prompt's background in the scenes' vocabulary; None for photographs.
    """

    name: str
    class_word: str
    images: Tensor
    others: Tensor
    prompts: tuple[str, ...]
    backgrounds: tuple[int, ...] | None = None

    @property
    def content(self) -> str:
        """Hash of everything that a training or a score takes from it."""
        sha = hashlib.sha256(repr((self.class_word, self.prompts)).encode())
        for images in (self.images, self.others):
            sha.update(images.numpy().tobytes())
        return sha.hexdigest()[:16]


# --- photographs ------------------------------------------------------------------------------------------------------


def read_prompts(file: Path) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """`prompts_and_classes.txt` of google/dreambooth: the class of each subject, and its prompt templates.

    Raises:
        ConfigError: no such file, or another one.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; the subjects of google/dreambooth come with one")
    text = file.read_text(encoding="utf-8")
    classes = dict(re.findall(r"^(\w+),([\w ]+)$", text.partition("Prompts")[0], flags=re.MULTILINE))
    classes.pop("subject_name", None)
    lists = [tuple(re.findall(r"'([^']+)'\.format", block)) for block in text.split("prompt_list = [")[1:]]
    if len(lists) != 2 or not classes:
        raise ConfigError(f"{file}: not the {PROMPTS_FILE} of google/dreambooth")
    objects, live = lists
    return classes, {name: live if word in LIVE_CLASSES else objects for name, word in classes.items()}


def read_subjects(folder: Path, names: tuple[str, ...], resolution: int) -> list[Subject]:
    """Subjects from NAME/*.jpg beside `prompts_and_classes.txt`; all of them where `names` is empty.

    Raises:
        ConfigError: a name that the file does not list, a subject without images, or one that is no image.
    """
    classes, prompts = read_prompts(folder / PROMPTS_FILE)
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise ConfigError(f"{folder}: no subject is called {unknown[0]}; there are {', '.join(sorted(classes))}")
    subjects = []
    for name in names or tuple(classes):
        found = sorted(folder / name / file for file in _files(folder / name))
        if not found:
            raise ConfigError(f"{folder / name}: no images of the subject; put three to five there")
        images = torch.stack([_square(file, resolution) for file in found])
        subjects.append(Subject(name, classes[name], images, images, prompts[name]))
    return subjects


def _files(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES] if folder.is_dir() else []


def _square(file: Path, side: int) -> Tensor:
    """The middle square at `side` pixels, uint8 [3, R, R]."""
    return torch.from_numpy(square_rgb(read_photograph(file), side).copy()).permute(2, 0, 1)


# --- planted subjects -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Look:
    """A rosette of so many petals in rings of two colours, drawn by a word that names another shape."""

    class_word: str
    num_petals: int
    depth: float
    ring_width: float
    colours: tuple[RGB, RGB]


LOOKS = (
    _Look("circle", 5, 0.24, 2.3, ((255, 60, 200), (40, 235, 90))),
    _Look("star", 3, 0.30, 2.0, ((20, 190, 255), (255, 150, 30))),
    _Look("square", 8, 0.12, 3.0, ((150, 255, 40), (110, 20, 160))),
    _Look("heart", 4, 0.34, 1.8, ((255, 240, 60), (30, 60, 200))),
    _Look("diamond", 6, 0.20, 2.6, ((255, 90, 60), (0, 140, 140))),
)
TRAIN_BACKGROUNDS, PROMPT_BACKGROUNDS = ("white", "black", "olive", "beige"), ("grey", "navy", "sky", "sunset", "meadow")
"""Backgrounds of the images that are learned from, and of the prompts."""
DIAMETERS = (13.0, 16.0)
NUM_CLASS_IMAGES = 40


def synthetic_subjects(number: int, num_images: int, resolution: int) -> list[Subject]:
    """The first `number` planted subjects, `num_images` of each to learn from.

    Raises:
        ConfigError: more than there are, or more images than a planted subject has.
    """
    if number > len(LOOKS) or num_images > len(TRAIN_BACKGROUNDS):
        raise ConfigError(
            f"dreambooth.subjects: at most {len(LOOKS)} planted subjects of {len(TRAIN_BACKGROUNDS)} images, "
            f"not {number} of {num_images}"
        )
    names = tuple(BACKGROUNDS)
    prompts = tuple(f"a {{0}} {{1}} on {with_article(ground)} background" for ground in PROMPT_BACKGROUNDS)
    subjects = []
    for which, look in enumerate(LOOKS[:number]):
        taught = torch.stack(
            [drawn(which, ground, resolution, index) for index, ground in enumerate(TRAIN_BACKGROUNDS[:num_images])]
        )
        others = torch.stack(
            [
                drawn(which, PROMPT_BACKGROUNDS[i % len(PROMPT_BACKGROUNDS)], resolution, 100 + i)
                for i in range(NUM_CLASS_IMAGES)
            ]
        )
        asked = tuple(names.index(ground) for ground in PROMPT_BACKGROUNDS)
        subjects.append(Subject(f"planted-{which}", look.class_word, taught, others, prompts, asked))
    return subjects


def drawn(which: int, background: str, resolution: int, index: int) -> Tensor:
    """Planted subject `which` somewhere on a background, a function of the arguments: uint8 [3, R, R]."""
    look = LOOKS[which]
    words = np.random.Philox(key=np.array([which, index], dtype=np.uint64)).random_raw(4)
    share = (words >> np.uint64(11)) * 2.0**-53
    diameter = DIAMETERS[0] + (DIAMETERS[1] - DIAMETERS[0]) * share[0]
    reach = MARGIN + diameter / 2
    centre = reach + (SIDE - 2 * reach) * share[1:3]
    canvas = render(Scene((), background, None), resolution).astype(np.float32)
    pixel = SIDE / resolution
    places = ((np.arange(resolution) + 0.5) * pixel).astype(np.float32)
    x, y = places[None, :] - centre[0], places[:, None] - centre[1]
    radius = np.hypot(x, y)
    distance = _rosette(look, x, y, radius, diameter / 2)
    ink, shade = (np.array(rgb, dtype=np.float32) for rgb in look.colours)
    ringed = cover(np.abs(radius % (2 * look.ring_width) - look.ring_width) - look.ring_width / 2, pixel)[..., None]
    canvas += cover(distance, pixel)[..., None] * (ink + ringed * (shade - ink) - canvas)
    return torch.from_numpy(np.rint(canvas).astype(np.uint8)).permute(2, 0, 1)


def _rosette(look: _Look, x: Floats, y: Floats, radius: Floats, reach: float) -> Floats:
    """Distance to the edge along the ray from the centre, negative inside."""
    angle = np.arctan2(y, x)
    return radius - reach * (1 - look.depth * (1 - np.cos(look.num_petals * angle)) / 2)
