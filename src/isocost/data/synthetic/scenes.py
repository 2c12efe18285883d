"""Synthetic scenes: simple objects with captions that describe them completely, each a pure function of (seed, index).

A scene has one group of equal objects, or two groups side by side or one above the other, on a named background. Small
text-to-image models fail at counting, at relations and at binding colours to shapes; 32 x 32 pixels are enough to check all
three. Objects are signed distance functions with analytic anti-aliasing, so a scene shows the same at every resolution. Random
numbers are the raw words of Philox with key (seed, index) (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
2011), which do not change between versions of numpy.

Lengths are in units of 1/32 of the image size, which is a pixel at resolution 32. x runs right, y runs down.
Shapes: R resolution, N objects in a group, W size of an object's window in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from isocost.data.synthetic.shapes import DISTANCES, RIM, TEXTURE_COVERS, Floats, cover
from isocost.errors import ConfigError

T = TypeVar("T")
RGB = tuple[int, int, int]

VERSION = 1  # increased whenever a change gives other images, captions or labels for the same (seed, index)

# --- the vocabulary ---------------------------------------------------------------------------------------------------

COUNTS = ("one", "two", "three", "four")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted", "checkered")
SLENDER = ("star", "cross", "ring")  # shapes too narrow for a texture
RELATIONS = ("left of", "right of", "above", "below")
LAYOUTS = ("one group", "side by side", "stacked")
ABSENT = "none"

COLOURS: dict[str, tuple[RGB, RGB]] = {  # the colour, and the colour of a texture on it
    "red": ((218, 30, 36), (255, 190, 180)),
    "orange": ((250, 130, 15), (140, 45, 0)),
    "yellow": ((255, 221, 40), (150, 95, 0)),
    "green": ((30, 150, 55), (180, 250, 170)),
    "turquoise": ((50, 210, 205), (0, 90, 100)),
    "blue": ((35, 75, 225), (175, 210, 255)),
    "purple": ((130, 40, 175), (225, 180, 255)),
    "pink": ((255, 130, 190), (150, 20, 90)),
    "brown": ((120, 65, 25), (235, 190, 145)),
    "white": ((255, 255, 255), (120, 120, 120)),
    "black": ((10, 10, 10), (150, 150, 150)),
}


@dataclass(frozen=True)
class Background:
    """A vertical gradient.

    Attributes:
        stops: (height, RGB), with height from 0 at the top to 1 at the bottom.
        hides: object colours with too little contrast to this background.
    """

    stops: tuple[tuple[float, RGB], ...]
    hides: frozenset[str]


def _plain(rgb: RGB, *hides: str) -> Background:
    return Background(((0.0, rgb),), frozenset(hides))


BACKGROUNDS: dict[str, Background] = {
    "white": _plain((250, 250, 250), "white", "yellow"),
    "grey": _plain((165, 165, 165), "turquoise", "white"),
    "black": _plain((12, 12, 12), "black", "brown"),
    "navy": _plain((15, 25, 80), "black", "blue", "purple", "brown"),
    "olive": _plain((95, 100, 25), "green", "brown", "black"),
    "beige": _plain((232, 212, 175), "white", "yellow", "pink"),
    "sky": Background(((0.0, (70, 155, 240)), (1.0, (205, 235, 255))), frozenset({"white", "blue", "turquoise"})),
    "sunset": Background(
        ((0.0, (85, 45, 120)), (0.5, (225, 95, 105)), (1.0, (255, 185, 90))),
        frozenset({"red", "orange", "yellow", "purple", "pink", "brown"}),
    ),
    "meadow": Background(
        ((0.0, (165, 215, 250)), (0.58, (165, 215, 250)), (0.62, (130, 200, 90)), (1.0, (95, 170, 60))),
        frozenset({"green", "turquoise", "white", "yellow"}),
    ),
}

# --- the scene --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Equal objects: their attributes, and the centres (x, y) of their boxes of size `diameter`."""

    shape: str
    colour: str
    size: str
    texture: str
    diameter: float
    centres: tuple[tuple[float, float], ...]

    @property
    def count(self) -> int:
        """Number of objects, 1 to 4."""
        return len(self.centres)


@dataclass(frozen=True)
class Scene:
    """One group, or two groups with the relation of the first to the second ("left of"; None for a single group)."""

    groups: tuple[Group, ...]
    background: str
    relation: str | None

    def by_position(self) -> tuple[Group, ...]:
        """The groups from left to right, or from top to bottom: an order that is visible in the image."""
        return self.groups if self.relation in (None, "left of", "above") else self.groups[::-1]


SIDE = 32.0
MARGIN = 0.4
GAP = 1.6  # minimum distance between the boxes of two objects
JITTER = 2.0  # maximum distance of an object from its position in the pattern, along each axis
SHIFT = 2.0  # maximum distance of a group from the common line of both groups, perpendicular to the axis of their relation
DIAMETERS = {"small": (6.4, 6.55), "large": (11.6, 12.4)}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

Pattern = tuple[tuple[float, float], ...]
PATTERNS: dict[int, tuple[Pattern, ...]] = {  # (column, row) of each object; the distance of two is at least a column or row
    1: (((0, 0),),),
    2: (((0, 0), (1, 0)), ((0, 0), (0, 1)), ((0, 0), (1, 1)), ((1, 0), (0, 1))),
    3: (
        ((0, 0), (1, 0), (2, 0)),
        ((0, 0), (0, 1), (0, 2)),
        ((0.5, 0), (0, 1), (1, 1)),
        ((0, 0), (1, 0), (0.5, 1)),
        ((0, 0), (1, 0.5), (0, 1)),
        ((1, 0), (0, 0.5), (1, 1)),
    ),
    4: (
        ((0, 0), (1, 0), (0, 1), (1, 1)),
        ((0, 0), (1, 0), (2, 0), (3, 0)),
        ((0, 0), (0, 1), (0, 2), (0, 3)),
        ((1, 0), (0, 1), (2, 1), (1, 2)),
    ),
}


class _Draws:
    """The sequence of random numbers of a scene."""

    NUM_WORDS = 64

    def __init__(self, seed: int, index: int) -> None:
        words = np.random.Philox(key=np.array([seed, index], dtype=np.uint64)).random_raw(self.NUM_WORDS)
        self._uniforms = iter(((words >> np.uint64(11)) * 2.0**-53).tolist())

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._uniforms)

    def choice(self, options: Sequence[T]) -> T:
        return options[int(next(self._uniforms) * len(options))]


def scene(seed: int, index: int) -> Scene:
    """Return scene `index` of `seed`: a pure function, the same on every machine.

    Raises:
        ConfigError: `seed` or `index` is not between 0 and 2^64 - 1.
    """
    for name, value in (("seed", seed), ("index", index)):
        if not 0 <= value < 2**64:
            raise ConfigError(f"scenes: {name}={value} must be between 0 and 2^64 - 1")
    draws = _Draws(seed, index)
    background = draws.choice(tuple(BACKGROUNDS))
    colours = visible_colours(background)
    if draws.choice((False, True)):
        return Scene((_one_group(draws, colours),), background, None)
    relation = draws.choice(RELATIONS)
    groups = _two_groups(draws, colours, axis=0 if relation in ("left of", "right of") else 1)
    return Scene(groups if relation in ("left of", "above") else groups[::-1], background, relation)


def visible_colours(background: str) -> tuple[str, ...]:
    """Return the object colours that contrast with a background."""
    return tuple(colour for colour in COLOURS if colour not in BACKGROUNDS[background].hides)


def readable_textures(shape: str, size: str) -> tuple[str, ...]:
    """Return the textures that are visible at 32 x 32 pixels: small and slender objects are always plain."""
    return TEXTURES if size == "large" and shape not in SLENDER else TEXTURES[:1]


def max_count(size: str, num_groups: int) -> int:
    """Return the maximum number of objects in a group; next to another group only two large objects fit."""
    return 2 if size == "large" and num_groups == 2 else 4


def num_attribute_combinations() -> int:
    """Count the scenes with different captions; positions of objects do not count."""

    def num_looks(num_groups: int) -> int:
        return sum(len(readable_textures(shape, size)) * max_count(size, num_groups) for shape in SHAPES for size in SIZES)

    num_colours = [len(visible_colours(background)) for background in BACKGROUNDS]
    num_one_group = sum(num_colours) * num_looks(1)
    num_two_groups = sum(n * (n - 1) for n in num_colours) * num_looks(2) ** 2 * (len(LAYOUTS) - 1)
    return num_one_group + num_two_groups


@dataclass(frozen=True)
class _Block:
    """A group before its placement: object centres relative to the block's centre, and the block's extent along x and y."""

    look: tuple[str, str, str, str]
    diameter: float
    offsets: tuple[tuple[float, float], ...]
    extent: tuple[float, float]

    def at(self, centre: tuple[float, float]) -> Group:
        centres = tuple((centre[0] + x, centre[1] + y) for x, y in self.offsets)
        return Group(*self.look, diameter=self.diameter, centres=centres)


def _one_group(draws: _Draws, colours: tuple[str, ...]) -> Group:
    available = SIDE - 2 * MARGIN
    block = _block(draws, colours, 1, (available, available))
    x, y = (SIDE / 2 + draws.uniform(-0.5, 0.5) * (available - extent) for extent in block.extent)
    return block.at((x, y))


def _two_groups(draws: _Draws, colours: tuple[str, ...], axis: int) -> tuple[Group, Group]:
    """Two groups of different colours, the left or upper one first."""
    available = SIDE - 2 * MARGIN
    half = (available - GAP) / 2
    block_limits = (half, available) if axis == 0 else (available, half)
    first = _block(draws, colours, 2, block_limits)
    second = _block(draws, tuple(colour for colour in colours if colour != first.look[1]), 2, block_limits)

    # Along the axis at least a third of the free length is between the groups. Across the axis both are near a common line.
    free = available - GAP - first.extent[axis] - second.extent[axis]
    outside = free * draws.uniform(0, 2 / 3)
    before = draws.uniform(0, outside)
    along = (MARGIN + before + first.extent[axis] / 2, SIDE - MARGIN - (outside - before) - second.extent[axis] / 2)
    slack = [(available - block.extent[1 - axis]) / 2 for block in (first, second)]
    line = draws.uniform(-min(slack), min(slack))
    across = [SIDE / 2 + min(max(line + draws.uniform(-SHIFT, SHIFT), -limit), limit) for limit in slack]
    centres = [(a, c) if axis == 0 else (c, a) for a, c in zip(along, across, strict=True)]
    return first.at(centres[0]), second.at(centres[1])


def _block(draws: _Draws, colours: tuple[str, ...], num_groups: int, limits: tuple[float, float]) -> _Block:
    """Draw a group whose extent along x and y is within `limits`."""
    shape, size = draws.choice(SHAPES), draws.choice(SIZES)
    look = (shape, draws.choice(colours), size, draws.choice(readable_textures(shape, size)))
    count = draws.choice(range(1, max_count(size, num_groups) + 1))
    diameter = draws.uniform(*DIAMETERS[size])
    pattern = draws.choice([pattern for pattern in PATTERNS[count] if _fits(pattern, diameter, limits)])
    columns, width = _jittered_positions([column for column, _ in pattern], diameter, limits[0], draws)
    rows, height = _jittered_positions([row for _, row in pattern], diameter, limits[1], draws)
    return _Block(look, diameter, tuple(zip(columns, rows, strict=True)), (width, height))


def _fits(pattern: Pattern, diameter: float, limits: tuple[float, float]) -> bool:
    spans = (max(cells) for cells in zip(*pattern, strict=True))
    return all(diameter + span * (diameter + GAP) <= limit for span, limit in zip(spans, limits, strict=True))


def _jittered_positions(cells: list[float], diameter: float, limit: float, draws: _Draws) -> tuple[list[float], float]:
    """Place objects into cells along one axis, with jitter.

    Args:
        cells: column or row of each object; cells have equal length and a gap between them.

    Returns:
        Positions relative to the centre of the block, and the extent of the block.
    """
    span = max(cells)
    jitter = min(JITTER, (limit - diameter - span * (diameter + GAP)) / (2 * (span + 1)))
    length = diameter + 2 * jitter
    positions = [(cell - span / 2) * (length + GAP) + draws.uniform(-jitter, jitter) for cell in cells]
    return positions, length + span * (length + GAP)


# --- drawing ----------------------------------------------------------------------------------------------------------


def render(scene: Scene, resolution: int) -> NDArray[np.uint8]:
    """Draw a scene, anti-aliased.

    Returns:
        [R, R, 3] uint8 RGB.

    Raises:
        ConfigError: the resolution is below 8 pixels.
    """
    if resolution < 8:
        raise ConfigError(
            f"scenes: resolution={resolution} is too small to draw; use 8 or more (textures are visible from 32 on)"
        )
    canvas = _backdrop(scene.background, resolution).copy()
    for group in scene.groups:
        _draw(canvas, group)
    return np.rint(canvas).astype(np.uint8)


@lru_cache(maxsize=32)
def _backdrop(background: str, resolution: int) -> Floats:
    """The background without objects, [R, R, 3]."""
    heights, colours = zip(*BACKGROUNDS[background].stops, strict=True)
    rows = (np.arange(resolution) + 0.5) / resolution
    column = np.stack([np.interp(rows, heights, channel) for channel in zip(*colours, strict=True)], axis=-1)
    return np.broadcast_to(column[:, None], (resolution, resolution, 3)).astype(np.float32)


def _draw(canvas: Floats, group: Group) -> None:
    """Draw the objects of a group onto the canvas [R, R, 3], in place."""
    resolution = len(canvas)
    pixel = SIDE / resolution
    window_size = min(int(np.ceil(group.diameter / pixel)) + 2, resolution)
    centres = np.array(group.centres)
    corners = np.clip(np.floor((centres - group.diameter / 2) / pixel).astype(int) - 1, 0, resolution - window_size)  # [N, 2]
    offsets = (corners[:, :, None] + np.arange(window_size) + 0.5) * pixel - centres[:, :, None]  # [N, 2, W]
    offsets = offsets.astype(np.float32)
    x, y = offsets[:, 0, None, :], offsets[:, 1, :, None]

    radius = group.diameter / 2
    distance = DISTANCES[group.shape](x / radius, y / radius) * radius  # [N, W, W]
    alphas = cover(distance, pixel)[..., None]
    colour, texture_colour = (np.array(rgb, dtype=np.float32) for rgb in COLOURS[group.colour])
    if group.texture == "plain":
        pixels = np.broadcast_to(colour, (*distance.shape, 3))
    else:
        texture = TEXTURE_COVERS[group.texture](x, y, pixel) * cover(distance + RIM, pixel)
        pixels = colour + texture[..., None] * (texture_colour - colour)
    for (left, top), alpha, rgb in zip(corners.tolist(), alphas, pixels, strict=True):
        window = canvas[top : top + window_size, left : left + window_size]
        window += alpha * (rgb - window)


# --- captions ---------------------------------------------------------------------------------------------------------


def captions(scene: Scene) -> tuple[str, str, str]:
    """Return three complete descriptions of a scene: from the first group, from the second group, and from the background."""
    background = with_article(f"{scene.background} background")
    names = [_describe_group(group) for group in scene.groups]
    if scene.relation is None:
        (name,) = names
        verb = "is" if scene.groups[0].count == 1 else "are"
        return f"{name} on {background}", f"there {verb} {name} on {background}", f"{background} with {name}"
    first, second = names
    inverse = INVERSE[scene.relation]
    return (
        f"{first} {_to_the(scene.relation)} {second} on {background}",
        f"{second} {_to_the(inverse)} {first} on {background}",
        f"{background} with {first} {scene.relation} {second}",
    )


def with_article(noun: str) -> str:
    """Return `noun` with the article "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """Return the plural of a shape's name."""
    return noun + ("es" if noun.endswith("s") else "s")


def _describe_group(group: Group) -> str:
    look = f"{group.size} {group.texture} {group.colour}"
    return (
        with_article(f"{look} {group.shape}") if group.count == 1 else f"{COUNTS[group.count - 1]} {look} {plural(group.shape)}"
    )


def _to_the(relation: str) -> str:
    return f"to the {relation}" if relation.endswith(" of") else relation


# --- labels -----------------------------------------------------------------------------------------------------------

_GROUP_CLASSES = {"count": COUNTS, "shape": SHAPES, "colour": tuple(COLOURS), "size": SIZES, "texture": TEXTURES}

CLASSES: dict[str, tuple[str, ...]] = {
    "background": tuple(BACKGROUNDS),
    "layout": LAYOUTS,
    **{f"first_{name}": classes for name, classes in _GROUP_CLASSES.items()},
    **{f"second_{name}": (*classes, ABSENT) for name, classes in _GROUP_CLASSES.items()},
}
"""Class names of each attribute. The first group is the left or upper one; the second may be absent."""

ATTRIBUTES: dict[str, int] = {name: len(classes) for name, classes in CLASSES.items()}
"""Number of classes of each attribute in the order of `attribute_labels`: the heads of an attribute classifier."""


def attribute_labels(scene: Scene) -> NDArray[np.int64]:
    """Return the class of each attribute of a scene.

    Returns:
        int64 [len(ATTRIBUTES)], indices into the classes of `CLASSES`, in its order.
    """
    layout = LAYOUTS[0] if scene.relation is None else LAYOUTS[1 if scene.relation.endswith(" of") else 2]
    class_names = {"background": scene.background, "layout": layout}
    for rank, group in zip(("first", "second"), (*scene.by_position(), None), strict=False):
        for name in _GROUP_CLASSES:
            class_names[f"{rank}_{name}"] = _class_name(group, name)
    return np.array([classes.index(class_names[name]) for name, classes in CLASSES.items()], dtype=np.int64)


def _class_name(group: Group | None, name: str) -> str:
    if group is None:
        return ABSENT
    return COUNTS[group.count - 1] if name == "count" else getattr(group, name)
