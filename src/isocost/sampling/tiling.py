"""Overlapping tiles of an image that is larger than the network's resolution, and their blending.

Shapes: N tiles, R their size in pixels, H x W the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """Squares that cover an image; all lengths are in pixels.

    Attributes:
        height, width: of the image.
        size: R.
        corners: (top, left) of each tile.
    """

    height: int
    width: int
    size: int
    corners: tuple[tuple[int, int], ...]

    @classmethod
    def from_size(cls, height: int, width: int, size: int, overlap: int, unit: int) -> Tiling:
        """Cover `height` x `width` pixels with tiles.

        Args:
            height, width: at least `size`, and multiples of `unit`.
            size: R, a multiple of `unit`.
            overlap: smallest overlap of two neighbouring tiles.
            unit: the corners are multiples of it.
        """
        assert all(length % unit == 0 for length in (height, width, size))
        assert min(height, width) >= size > overlap >= 0
        tops, lefts = (_tile_offsets(length, size, overlap, unit) for length in (height, width))
        return cls(height, width, size, tuple((top, left) for top in tops for left in lefts))

    def cut(self, image: Tensor, per_pixel: int = 1) -> Tensor:
        """[C, H / p, W / p] -> [N, C, R / p, R / p], where an element of `image` covers `per_pixel` = p pixels per axis."""
        size = self.size // per_pixel
        corners = [(top // per_pixel, left // per_pixel) for top, left in self.corners]
        return torch.stack([image[:, top : top + size, left : left + size] for top, left in corners])

    def join(self, tiles: Sequence[Tensor]) -> Tensor:
        """uint8 [N, C, R, R] -> uint8 [C, H, W]: a weighted mean where tiles overlap; weights fall towards the borders."""
        ramp = torch.minimum(torch.arange(1, self.size + 1), torch.arange(self.size, 0, -1)).double()
        weight = ramp[:, None] * ramp[None, :]
        total = torch.zeros(tiles[0].shape[0], self.height, self.width, dtype=torch.float64)
        weights = torch.zeros(self.height, self.width, dtype=torch.float64)
        for tile, (top, left) in zip(tiles, self.corners, strict=True):
            rows, columns = slice(top, top + self.size), slice(left, left + self.size)
            total[:, rows, columns] += weight * tile.double()
            weights[rows, columns] += weight
        return (total / weights).round().clamp(0, 255).to(torch.uint8)


def _tile_offsets(length: int, size: int, overlap: int, unit: int) -> list[int]:
    """Offsets from 0 to `length - size`, as even as multiples of `unit` allow."""
    last, stride = (length - size) // unit, max(1, (size - overlap) // unit)
    number = -(-last // stride) + 1
    return sorted({round(i * last / max(1, number - 1)) * unit for i in range(number)})
