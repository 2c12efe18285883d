"""Shapes and textures of the scenes as functions of the position: signed distances, and covered fractions of a pixel.

x runs right, y runs down; both broadcast. Shapes fill the box -1 .. 1; textures are in units of 1/32 of the image size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def cover(distance: Floats, pixel: float) -> Floats:
    """Return the fraction of a pixel that is inside an edge.

    Args:
        distance: signed distance of the pixel's centre from the edge, negative inside.
        pixel: size of a pixel, in the unit of `distance`.
    """
    return np.clip(0.5 - distance / pixel, 0, 1)


# Signed distances within the box -1 .. 1, negative inside. They are exact at the edges, where anti-aliasing uses them.


def _circle(x: Floats, y: Floats) -> Floats:
    return np.hypot(x, y) - 1


def _square(x: Floats, y: Floats) -> Floats:
    return np.maximum(abs(x), abs(y)) - 0.94


def _triangle(x: Floats, y: Floats) -> Floats:
    """Tip at (0, -1), base from (-1, 0.9) to (1, 0.9)."""
    slant = (1.9 * abs(x) - y - 1) / math.hypot(1.9, 1)
    return np.maximum(slant, y - 0.9)


def _diamond(x: Floats, y: Floats) -> Floats:
    return (abs(x) + abs(y) - 1) / math.sqrt(2)


def _star(x: Floats, y: Floats) -> Floats:
    """Five tips; by symmetry a single line from a tip to the next notch, in the sector folded about that tip."""
    tip, notch, y = 1.06, 0.52, y - 0.09
    sector = math.tau / 5
    angle = abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    length = np.hypot(x, y)
    notch_x, notch_y = notch * math.cos(sector / 2), notch * math.sin(sector / 2)
    normal_x, normal_y = notch_y, tip - notch_x
    distance = (length * np.cos(angle) - tip) * normal_x + length * np.sin(angle) * normal_y
    return distance / math.hypot(normal_x, normal_y)


def _cross(x: Floats, y: Floats) -> Floats:
    x, y = abs(x), abs(y)
    return np.maximum(np.maximum(x, y) - 1, np.minimum(x, y) - 0.34)


def _ring(x: Floats, y: Floats) -> Floats:
    return abs(np.hypot(x, y) - 0.75) - 0.25


def _heart(x: Floats, y: Floats) -> Floats:
    """Two lobes over a right angle, scaled to width 2 (Inigo Quilez, "2D distance functions")."""
    scale = 1.65
    x, y = abs(x) / scale, 0.57 - y / scale
    lobe = np.hypot(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    corner = np.maximum(x + y, 0) / 2
    nearest = np.minimum(np.hypot(x, y - 1), np.hypot(x - corner, y - corner))
    return np.where(x + y > 1, lobe, nearest * np.sign(x - y)) * scale


DISTANCES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
}

# Textures: fraction of each pixel in the texture's colour, relative to the object's centre.

RIM = 0.5  # width of an outline in the object's own colour


def _striped(x: Floats, y: Floats, pixel: float) -> Floats:
    return cover(_distance_to_multiple(y, 4.0) - 1.0, pixel) + 0 * x


def _dotted(x: Floats, y: Floats, pixel: float) -> Floats:
    return cover(np.hypot(_distance_to_multiple(x, 4.0), _distance_to_multiple(y, 4.0)) - 1.15, pixel)


def _checkered(x: Floats, y: Floats, pixel: float) -> Floats:
    period = 6.0
    odd_x, odd_y = (cover(_distance_to_multiple(value - period / 4, period) - period / 4, pixel) for value in (x, y))
    return odd_x * (1 - odd_y) + odd_y * (1 - odd_x)


def _distance_to_multiple(value: Floats, period: float) -> Floats:
    """Distance to the nearest multiple of `period`."""
    return abs(value - period * np.rint(value / period))


TEXTURE_COVERS: dict[str, Callable[[Floats, Floats, float], Floats]] = {
    "striped": _striped,
    "dotted": _dotted,
    "checkered": _checkered,
}
