"""Subjects of DreamBooth fine-tuning: photographs in folders, or synthetic objects that no caption describes.

A synthetic subject has a shape, a texture and a pair of colours that the scenes never contain. Images of a fine-tuned network
can therefore be compared with other renderings of the same subject. Lengths are in the units of `scenes.py`.

Shapes: K training images of a subject, M reference images, R resolution.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import string
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from isocost.data.caption_files import decode_text
from isocost.data.image_files import center_square, list_images, read_image_file
from isocost.data.synthetic.scenes import BACKGROUNDS, MARGIN, RGB, SIDE, Scene, render, with_article
from isocost.data.synthetic.shapes import Floats, cover
from isocost.errors import ConfigError

PROMPTS_FILE = "prompts_and_classes.txt"
LIST_END = r"""^\s*\]|[)'",]\s*\]\s*$"""
LIVE_CLASSES = ("cat", "dog")


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
        ConfigError: there is no such file, or a line of it cannot be read; the message names the line.
    """
    if not os.path.isfile(file):
        raise ConfigError(f"{file}: no such file; take the {PROMPTS_FILE} of google/dreambooth")
    try:
        lines = unicodedata.normalize("NFC", decode_text(file.read_bytes())).replace("\r\n", "\n").split("\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from error
    end = next((number for number, line in enumerate(lines) if line.startswith("Prompts")), None)
    starts = [number for number, line in enumerate(lines) if re.match(r"\s*prompt_list\s*=\s*\[", line)]
    if end is None or len(starts) != 2 or starts[0] < end:
        raise ConfigError(f"{file}: not the {PROMPTS_FILE} of google/dreambooth")
    classes = _read_classes(file, lines[:end])
    objects, live = (_read_templates(file, lines, start) for start in starts)
    prompts = {name: live if word in LIVE_CLASSES else objects for name, word in classes.items()}
    without = [name for name, templates in prompts.items() if not templates]
    if without:
        raise ConfigError(f"{file}: the prompt list of subject {without[0]} is empty; add prompts")
    return classes, prompts


def _read_classes(file: Path, lines: list[str]) -> dict[str, str]:
    """The class word of each subject, from lines "SUBJECT,CLASS"; headings are ignored."""
    classes: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not re.search(r"\w", line) or re.fullmatch(r"Classes|subject_name\s*,\s*class", line.strip()):
            continue
        name, _, word = (part.strip() for part in line.partition(","))
        if not name or not word or "," in word or name.startswith(".") or re.search(r"[/\\\0]", name):
            raise ConfigError(
                f"{file}: line {number} is not SUBJECT,CLASS: {line.strip()[:80]!r}; the subject names a subfolder"
            )
        if name in classes:
            raise ConfigError(f"{file}: line {number}: subject {name} appears twice; remove one of its lines")
        classes[name] = word
    if not classes:
        raise ConfigError(f"{file}: not the {PROMPTS_FILE} of google/dreambooth; it has no line SUBJECT,CLASS")
    return classes


def _read_templates(file: Path, lines: list[str], start: int) -> tuple[str, ...]:
    """The templates of a Python list of `'TEMPLATE'.format(unique_token, class_token)`; the list is parsed, never executed."""
    remedy = "write 'a {0} {1} in the snow'.format(unique_token, class_token)"
    end = next((number for number in range(start, len(lines)) if re.search(LIST_END, lines[number])), None)
    if end is None:
        raise ConfigError(f"{file}: line {start + 1}: the list of prompts has no closing bracket")
    text = "\n".join([lines[start].partition("=")[2].lstrip(), *lines[start + 1 : end + 1]])
    try:
        parsed = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        number = start + (getattr(error, "lineno", None) or 1)
        raise ConfigError(f"{file}: line {number} is not a prompt: {lines[number - 1].strip()[:80]!r}; {remedy}") from error
    templates = []
    for node in parsed.elts if isinstance(parsed, ast.List) else [parsed]:
        template = _template_of(node)
        if template is None:
            number = start + node.lineno
            raise ConfigError(f"{file}: line {number} is not a prompt: {lines[number - 1].strip()[:80]!r}; {remedy}")
        templates.append(template)
    return tuple(templates)


def _template_of(node: ast.expr) -> str | None:
    """The text of `'TEXT'.format(unique_token, class_token)` or of `'TEXT'`; None if it is not a template for both words."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        names = [argument.id for argument in node.args if isinstance(argument, ast.Name)]
        if len(names) != 2 or len(node.args) != 2 or node.keywords or names[0] == "class_token":
            return None
        node = node.func.value
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        return None
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(node.value) if name is not None]
        node.value.format("token", "class")
    except (ValueError, IndexError, KeyError, AttributeError):
        return None
    return node.value if fields and {*fields} <= {"", "0", "1"} else None


def read_subjects(folder: Path, names: tuple[str, ...], resolution: int) -> list[Subject]:
    """Read subjects from `folder/NAME/*.jpg` and `folder/prompts_and_classes.txt`.

    Args:
        names: the subjects to read; empty for all.

    Raises:
        ConfigError: `prompts_and_classes.txt` does not list a name, a name is given twice, or a subject has no images or an
            unreadable one.
    """
    classes, prompts = read_prompts(folder / PROMPTS_FILE)
    names = tuple(unicodedata.normalize("NFC", name) for name in names)
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise ConfigError(f"{folder}: unknown subject {unknown[0]}; choose from {', '.join(sorted(classes))}")
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ConfigError(f"dreambooth.subjects.names: {repeated[0]} appears twice; give each subject once")
    subjects = []
    for name in names or tuple(classes):
        files = _image_files(_subject_folder(folder, name))
        if not files:
            raise ConfigError(f"{folder / name}: the subject has no images; put three to five there")
        images = torch.stack([_read_square(file, resolution) for file in files])
        subjects.append(Subject(name, classes[name], images, images, prompts[name]))
    return subjects


def _subject_folder(folder: Path, name: str) -> Path:
    """The folder of a subject; its accents may be composed or, as on macOS, decomposed."""
    if (folder / name).is_dir():
        return folder / name
    same = (entry for entry in sorted(folder.iterdir()) if unicodedata.normalize("NFC", entry.name) == name)
    return next(same, folder / name)


def _image_files(folder: Path) -> list[Path]:
    return [file for file in list_images(folder) if file.parent == folder] if folder.is_dir() else []


def _read_square(file: Path, resolution: int) -> Tensor:
    """The centre square of an image file, uint8 [3, R, R]."""
    return torch.from_numpy(center_square(read_image_file(file), resolution).copy()).permute(2, 0, 1)


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
