"""An image larger than a network's own, in overlapping tiles that fade into each other.

Shapes: N tiles, R their side in pixels, H x W the whole image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """Squares of `side` pixels that cover `height` x `width`; `corners` are their tops and lefts."""

    height: int
    width: int
    side: int
    corners: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, height: int, width: int, side: int, overlap: int, unit: int) -> Tiling:
        """Tiles that overlap by at least `overlap` pixels, their corners at multiples of `unit`.

        Height and width are `side` or more, and multiples of `unit` like it.
        """
        assert all(length % unit == 0 for length in (height, width, side))
        assert min(height, width) >= side > overlap >= 0
        tops, lefts = (_starts(length, side, overlap, unit) for length in (height, width))
        return cls(height, width, side, tuple((top, left) for top in tops for left in lefts))

    def cut(self, whole: Tensor, per_pixel: int = 1) -> Tensor:
        """[C, H / p, W / p] -> [N, C, R / p, R / p]; `per_pixel` p is how many pixels an element of `whole` spans."""
        reach = self.side // per_pixel
        places = [(top // per_pixel, left // per_pixel) for top, left in self.corners]
        return torch.stack([whole[:, top : top + reach, left : left + reach] for top, left in places])

    def join(self, tiles: Sequence[Tensor]) -> Tensor:
        """uint8 [N, C, R, R] -> uint8 [C, H, W]: the mean where tiles overlap, each weighing less towards its borders."""
        ramp = torch.minimum(torch.arange(1, self.side + 1), torch.arange(self.side, 0, -1)).double()
        weight = ramp[:, None] * ramp[None, :]
        total = torch.zeros(tiles[0].shape[0], self.height, self.width, dtype=torch.float64)
        weights = torch.zeros(self.height, self.width, dtype=torch.float64)
        for tile, (top, left) in zip(tiles, self.corners, strict=True):
            square = (slice(top, top + self.side), slice(left, left + self.side))
            total[:, square[0], square[1]] += weight * tile.double()
            weights[square] += weight
        return (total / weights).round().clamp(0, 255).to(torch.uint8)


def _starts(length: int, side: int, overlap: int, unit: int) -> list[int]:
    """The first at 0, the last at `length - side`, evenly between as far as `unit` allows."""
    last, stride = (length - side) // unit, max(1, (side - overlap) // unit)
    number = -(-last // stride) + 1
    return sorted({round(i * last / max(1, number - 1)) * unit for i in range(number)})
