"""Images in blocks of one shape, so that numbers do not depend on who hands them over, in what portions and order.

What a network makes of an image depends in its last bits on how many rows the call has and on which of them the image is
(oneDNN on AVX-512, cuBLAS). So every call has BLOCK rows, and an image's row is its place modulo BLOCK.

Shapes: C x H x W an image; a function maps uint8 [BLOCK, C, H, W] to [BLOCK, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from isocost.errors import RunError

FEATURE_BATCH = 32
MAX_BUFFERED = 1024
"""Images held back for their block to fill up; beyond it blocks run with rows that are free."""

Function = Callable[[Tensor], Tensor]
_Shape = tuple[int, ...]


class FixedBatchRunner:
    """Functions of images, computed as images come.

    Each image has a place: its id, or its number in the order of ids. Block k holds places k BLOCK to (k + 1) BLOCK - 1 and
    runs when it is full. Where places stay empty, or images have several sizes, the rest share blocks, each in its own row;
    free rows are black.
    """

    def __init__(self, functions: Mapping[str, Function]) -> None:
        self._functions = dict(functions)
        self._waiting: dict[_Shape, dict[int, Tensor]] = {}
        self._num_waiting = 0
        self._made: dict[int, dict[str, Tensor]] = {}

    def add(self, place: int, image: Tensor) -> None:
        """Hand over uint8 [C, H, W].

        Raises:
            RunError: there is an image at this place.
        """
        waiting = self._waiting.setdefault(tuple(image.shape), {})
        if place in self._made or any(place in some for some in self._waiting.values()):
            raise RunError(f"image {place} came twice")
        waiting[place] = image
        self._num_waiting += 1
        first = place - place % FEATURE_BATCH
        block = range(first, first + FEATURE_BATCH)
        if all(one in waiting for one in block):
            self._run(waiting, block)
        elif self._num_waiting > MAX_BUFFERED:
            fullest, rows = max(((some, _rows(some)) for some in self._waiting.values()), key=lambda pair: len(pair[1]))
            self._run(fullest, rows)

    def results(self) -> tuple[list[int], dict[str, Tensor]]:
        """The places, rising, and what each function made of their images, [N, ...] on the CPU."""
        for waiting in self._waiting.values():
            while waiting:
                self._run(waiting, _rows(waiting))
        places = sorted(self._made)
        if not places:
            return [], {}
        return places, {name: torch.stack([self._made[place][name] for place in places]) for name in self._functions}

    def _run(self, waiting: dict[int, Tensor], places: Iterable[int]) -> None:
        """One call of each function on images that wait, no two of them of one row."""
        images = {place: waiting.pop(place) for place in places}
        self._num_waiting -= len(images)
        some = next(iter(images.values()))
        block = some.new_zeros(FEATURE_BATCH, *some.shape)
        for place, image in images.items():
            block[place % FEATURE_BATCH] = image
        made = {name: function(block).cpu() for name, function in self._functions.items()}
        for place in images:
            self._made[place] = {name: values[place % FEATURE_BATCH] for name, values in made.items()}


def _rows(waiting: Mapping[int, Tensor]) -> list[int]:
    """For each row the first place that waits for it."""
    first: dict[int, int] = {}
    for place in sorted(waiting):
        first.setdefault(place % FEATURE_BATCH, place)
    return list(first.values())
