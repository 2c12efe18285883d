"""The embedded images: simple objects with captions that say what is to be seen, each a pure function of (seed, index).

A scene is one group of equal objects, or two groups side by side or one above the other, on a named background. Counting,
relations and which colour belongs to which shape are what small text-to-image models get wrong, and all of it can be read off
32 x 32 pixels. The objects are signed distance functions with analytic anti-aliasing, so a scene is the same image at every
resolution, drawn finer. Randomness is Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with
key (seed, index) and its raw words only, whose values do not change between versions of numpy.

Lengths are in units of 1/32 of the image's side: a pixel at resolution 32. x runs right, y runs down.
Shapes: R resolution, N objects in a group, W side of an object's window in pixels.
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

VERSION = 1  # raised when a change gives other images, captions or labels for the same (seed, index)

# --- the vocabulary ---------------------------------------------------------------------------------------------------

COUNTS = ("one", "two", "three", "four")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted", "checkered")
SLENDER = ("star", "cross", "ring")  # shapes without room for a texture
RELATIONS = ("left of", "right of", "above", "below")
LAYOUTS = ("one group", "side by side", "stacked")
ABSENT = "none"

COLOURS: dict[str, tuple[RGB, RGB]] = {  # the colour, and the shade that draws the texture on it
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
    """Colour stops (height from 0 at the top to 1 at the bottom, RGB) and the object colours that would be lost on them."""

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
    """Equal objects: what they look like, and where their boxes of side `diameter` are centred, in 1/32 of the side."""

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
    """One group, or two with the relation of the first to the second ("left of"; None where there is one)."""

    groups: tuple[Group, ...]
    background: str
    relation: str | None

    def by_position(self) -> tuple[Group, ...]:
        """The groups from left to right, or from top to bottom: an order that can be read off the image."""
        return self.groups if self.relation in (None, "left of", "above") else self.groups[::-1]


SIDE = 32.0
MARGIN = 0.4
GAP = 1.6  # least distance between the boxes of two objects
JITTER = 2.0  # greatest distance of an object from its place in the pattern, along each axis
SHIFT = 2.0  # greatest distance of a group, across the axis of its relation, from the line both stand on
DIAMETERS = {"small": (6.4, 6.55), "large": (11.6, 12.4)}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

Pattern = tuple[tuple[float, float], ...]
PATTERNS: dict[int, tuple[Pattern, ...]] = {  # places in columns and rows; any two are a whole column or row apart
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
    """Random numbers of one scene, in order."""

    NUM_WORDS = 64

    def __init__(self, seed: int, index: int) -> None:
        words = np.random.Philox(key=np.array([seed, index], dtype=np.uint64)).random_raw(self.NUM_WORDS)
        self._uniforms = iter(((words >> np.uint64(11)) * 2.0**-53).tolist())

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._uniforms)

    def pick(self, options: Sequence[T]) -> T:
        return options[int(next(self._uniforms) * len(options))]


def scene(seed: int, index: int) -> Scene:
    """Scene `index` of `seed`: the same on every machine, in any order.

    Raises:
        ConfigError: `seed` or `index` does not lie in 0 .. 2^64 - 1.
    """
    for name, value in (("seed", seed), ("index", index)):
        if not 0 <= value < 2**64:
            raise ConfigError(f"scenes: {name}={value} must lie between 0 and 2^64 - 1; choose one there")
    draws = _Draws(seed, index)
    background = draws.pick(tuple(BACKGROUNDS))
    colours = visible_colours(background)
    if draws.pick((False, True)):
        return Scene((_one_group(draws, colours),), background, None)
    relation = draws.pick(RELATIONS)
    groups = _two_groups(draws, colours, axis=0 if relation in ("left of", "right of") else 1)
    return Scene(groups if relation in ("left of", "above") else groups[::-1], background, relation)


def visible_colours(background: str) -> tuple[str, ...]:
    """Object colours that contrast with a background."""
    return tuple(colour for colour in COLOURS if colour not in BACKGROUNDS[background].hides)


def readable_textures(shape: str, size: str) -> tuple[str, ...]:
    """Textures that can be made out at 32 x 32: small and slender objects are plain."""
    return TEXTURES if size == "large" and shape not in SLENDER else TEXTURES[:1]


def greatest_count(size: str, num_groups: int) -> int:
    """How many objects a group may have: beside another group there is room for two large ones."""
    return 2 if size == "large" and num_groups == 2 else 4


def num_attribute_combinations() -> int:
    """Number of scenes that differ in what their captions say, not only in where the objects stand."""

    def num_looks(num_groups: int) -> int:
        return sum(len(readable_textures(shape, size)) * greatest_count(size, num_groups) for shape in SHAPES for size in SIZES)

    num_colours = [len(visible_colours(background)) for background in BACKGROUNDS]
    one = sum(num_colours) * num_looks(1)
    two = sum(n * (n - 1) for n in num_colours) * num_looks(2) ** 2 * (len(LAYOUTS) - 1)
    return one + two


@dataclass(frozen=True)
class _Block:
    """A group before it has its place: centres about the block's own centre, and the block's extent along x and y."""

    look: tuple[str, str, str, str]
    diameter: float
    offsets: tuple[tuple[float, float], ...]
    extent: tuple[float, float]

    def at(self, centre: tuple[float, float]) -> Group:
        centres = tuple((centre[0] + x, centre[1] + y) for x, y in self.offsets)
        return Group(*self.look, diameter=self.diameter, centres=centres)


def _one_group(draws: _Draws, colours: tuple[str, ...]) -> Group:
    room = SIDE - 2 * MARGIN
    block = _block(draws, colours, 1, (room, room))
    x, y = (SIDE / 2 + draws.between(-0.5, 0.5) * (room - extent) for extent in block.extent)
    return block.at((x, y))


def _two_groups(draws: _Draws, colours: tuple[str, ...], axis: int) -> tuple[Group, Group]:
    """Two groups of different colours, the left or upper one first."""
    room = SIDE - 2 * MARGIN
    half = (room - GAP) / 2
    memory_fits = (half, room) if axis == 0 else (room, half)
    first = _block(draws, colours, 2, memory_fits)
    second = _block(draws, tuple(colour for colour in colours if colour != first.look[1]), 2, memory_fits)

    # Along the axis at least a third of the free length stays between the groups; across it they stand near one line.
    free = room - GAP - first.extent[axis] - second.extent[axis]
    outside = free * draws.between(0, 2 / 3)
    before = draws.between(0, outside)
    along = (MARGIN + before + first.extent[axis] / 2, SIDE - MARGIN - (outside - before) - second.extent[axis] / 2)
    slack = [(room - block.extent[1 - axis]) / 2 for block in (first, second)]
    line = draws.between(-min(slack), min(slack))
    across = [SIDE / 2 + min(max(line + draws.between(-SHIFT, SHIFT), -most), most) for most in slack]
    places = [(a, c) if axis == 0 else (c, a) for a, c in zip(along, across, strict=True)]
    return first.at(places[0]), second.at(places[1])


def _block(draws: _Draws, colours: tuple[str, ...], num_groups: int, room: tuple[float, float]) -> _Block:
    shape, size = draws.pick(SHAPES), draws.pick(SIZES)
    look = (shape, draws.pick(colours), size, draws.pick(readable_textures(shape, size)))
    count = draws.pick(range(1, greatest_count(size, num_groups) + 1))
    diameter = draws.between(*DIAMETERS[size])
    pattern = draws.pick([pattern for pattern in PATTERNS[count] if _fits(pattern, diameter, room)])
    columns, width = _places([place[0] for place in pattern], diameter, room[0], draws)
    rows, height = _places([place[1] for place in pattern], diameter, room[1], draws)
    return _Block(look, diameter, tuple(zip(columns, rows, strict=True)), (width, height))


def _fits(pattern: Pattern, diameter: float, room: tuple[float, float]) -> bool:
    spans = (max(steps) for steps in zip(*pattern, strict=True))
    return all(diameter + span * (diameter + GAP) <= length for span, length in zip(spans, room, strict=True))


def _places(steps: list[float], diameter: float, room: float, draws: _Draws) -> tuple[list[float], float]:
    """Jittered positions along one axis about the middle, and the length they take up: cells of equal side, a gap apart."""
    span = max(steps)
    jitter = min(JITTER, (room - diameter - span * (diameter + GAP)) / (2 * (span + 1)))
    cell = diameter + 2 * jitter
    positions = [(step - span / 2) * (cell + GAP) + draws.between(-jitter, jitter) for step in steps]
    return positions, cell + span * (cell + GAP)


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
            f"scenes: resolution={resolution} is too small to draw; use 8 or more (32 or more to read the textures)"
        )
    canvas = _backdrop(scene.background, resolution).copy()
    for group in scene.groups:
        _draw(canvas, group)
    return np.rint(canvas).astype(np.uint8)


@lru_cache(maxsize=32)
def _backdrop(background: str, resolution: int) -> Floats:
    """[R, R, 3] the background alone."""
    heights, colours = zip(*BACKGROUNDS[background].stops, strict=True)
    rows = (np.arange(resolution) + 0.5) / resolution
    column = np.stack([np.interp(rows, heights, channel) for channel in zip(*colours, strict=True)], axis=-1)
    return np.broadcast_to(column[:, None], (resolution, resolution, 3)).astype(np.float32)


def _draw(canvas: Floats, group: Group) -> None:
    """Lay the objects of a group over the canvas [R, R, 3], in place."""
    resolution = len(canvas)
    pixel = SIDE / resolution
    side = min(int(np.ceil(group.diameter / pixel)) + 2, resolution)
    centres = np.array(group.centres)
    corners = np.clip(np.floor((centres - group.diameter / 2) / pixel).astype(int) - 1, 0, resolution - side)  # [N, 2]
    inside = (corners[:, :, None] + np.arange(side) + 0.5) * pixel - centres[:, :, None]  # [N, 2, W]
    inside = inside.astype(np.float32)
    x, y = inside[:, 0, None, :], inside[:, 1, :, None]

    radius = group.diameter / 2
    distance = DISTANCES[group.shape](x / radius, y / radius) * radius  # [N, W, W]
    inside_share = cover(distance, pixel)[..., None]
    ink, shade = (np.array(rgb, dtype=np.float32) for rgb in COLOURS[group.colour])
    if group.texture == "plain":
        paint = np.broadcast_to(ink, (*distance.shape, 3))
    else:
        shaded = TEXTURE_COVERS[group.texture](x, y, pixel) * cover(distance + RIM, pixel)
        paint = ink + shaded[..., None] * (shade - ink)
    for (left, top), alpha, colour in zip(corners.tolist(), inside_share, paint, strict=True):
        window = canvas[top : top + side, left : left + side]
        window += alpha * (colour - window)


# --- captions ---------------------------------------------------------------------------------------------------------


def captions(scene: Scene) -> tuple[str, str, str]:
    """Three ways to say all that is to be seen: as it comes, from the other group's side, and from the background."""
    ground = with_article(f"{scene.background} background")
    names = [_name(group) for group in scene.groups]
    if scene.relation is None:
        (name,) = names
        verb = "is" if scene.groups[0].count == 1 else "are"
        return f"{name} on {ground}", f"there {verb} {name} on {ground}", f"{ground} with {name}"
    here, there = names
    inverse = INVERSE[scene.relation]
    return (
        f"{here} {_to_the(scene.relation)} {there} on {ground}",
        f"{there} {_to_the(inverse)} {here} on {ground}",
        f"{ground} with {here} {scene.relation} {there}",
    )


def with_article(noun: str) -> str:
    """`noun` after "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """The plural of a shape's name."""
    return noun + ("es" if noun.endswith("s") else "s")


def _name(group: Group) -> str:
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
"""Names of the classes of each attribute. The first group is the left or upper one; the second may be absent."""

ATTRIBUTES: dict[str, int] = {name: len(classes) for name, classes in CLASSES.items()}
"""Number of classes of each attribute, in the order of `attribute_labels`: the heads of a probe."""


def attribute_labels(scene: Scene) -> NDArray[np.int64]:
    """What is to be seen, as class numbers.

    Returns:
        [len(ATTRIBUTES)] int64, indices into `CLASSES` in its order.
    """
    layout = LAYOUTS[0] if scene.relation is None else LAYOUTS[1 if scene.relation.endswith(" of") else 2]
    words = {"background": scene.background, "layout": layout}
    for rank, group in zip(("first", "second"), (*scene.by_position(), None), strict=False):
        for name in _GROUP_CLASSES:
            words[f"{rank}_{name}"] = _word(group, name)
    return np.array([classes.index(words[name]) for name, classes in CLASSES.items()], dtype=np.int64)


def _word(group: Group | None, name: str) -> str:
    if group is None:
        return ABSENT
    return COUNTS[group.count - 1] if name == "count" else getattr(group, name)
