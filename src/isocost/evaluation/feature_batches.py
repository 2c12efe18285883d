"""Runs images through networks in batches of one shape, so that no result depends on the order or grouping of the images.

The last bits of a network's output for an image depend on the number of rows in the call and on the row of the image
(oneDNN on AVX-512, cuBLAS). Every call therefore has FEATURE_BATCH rows, and an image has the row `index % FEATURE_BATCH`.

Shapes: an image is [C, H, W]; a function maps uint8 [FEATURE_BATCH, C, H, W] to [FEATURE_BATCH, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from isocost.errors import RunError

FEATURE_BATCH = 32
MAX_BUFFERED = 1024
"""Images that wait for their batch to fill; with more of them, a batch runs with unused rows."""

BatchFunction = Callable[[Tensor], Tensor]
_Shape = tuple[int, ...]


class FixedBatchRunner:
    """Computes functions of images while the images arrive.

    Every image has an index: its id, or its position in the order of ids. Batch k holds the indices k FEATURE_BATCH to
    (k + 1) FEATURE_BATCH - 1 and runs when it is full. If indices are missing, or images have several sizes, the remaining
    images share batches, each in its own row; unused rows are black.
    """

    def __init__(self, functions: Mapping[str, BatchFunction]) -> None:
        self._functions = dict(functions)
        self._buffers: dict[_Shape, dict[int, Tensor]] = {}
        self._num_buffered = 0
        self._outputs: dict[int, dict[str, Tensor]] = {}

    def add(self, index: int, image: Tensor) -> None:
        """Add the image uint8 [C, H, W] with this index.

        Raises:
            RunError: this index already has an image.
        """
        buffer = self._buffers.setdefault(tuple(image.shape), {})
        if index in self._outputs or any(index in buffered for buffered in self._buffers.values()):
            raise RunError(f"image {index} was added twice")
        buffer[index] = image
        self._num_buffered += 1
        start = index - index % FEATURE_BATCH
        batch = range(start, start + FEATURE_BATCH)
        if all(batch_index in buffer for batch_index in batch):
            self._run(buffer, batch)
        elif self._num_buffered > MAX_BUFFERED:
            candidates = ((buffered, _one_index_per_row(buffered)) for buffered in self._buffers.values())
            fullest, indices = max(candidates, key=lambda candidate: len(candidate[1]))
            self._run(fullest, indices)

    def results(self) -> tuple[list[int], dict[str, Tensor]]:
        """The indices in ascending order, and the output of each function for their images, [N, ...] on the CPU."""
        for buffer in self._buffers.values():
            while buffer:
                self._run(buffer, _one_index_per_row(buffer))
        indices = sorted(self._outputs)
        if not indices:
            return [], {}
        return indices, {name: torch.stack([self._outputs[index][name] for index in indices]) for name in self._functions}

    def _run(self, buffer: dict[int, Tensor], indices: Iterable[int]) -> None:
        """Call each function once on buffered images, of which no two have the same row."""
        images = {index: buffer.pop(index) for index in indices}
        self._num_buffered -= len(images)
        any_image = next(iter(images.values()))
        batch = any_image.new_zeros(FEATURE_BATCH, *any_image.shape)
        for index, image in images.items():
            batch[index % FEATURE_BATCH] = image
        outputs = {name: function(batch).cpu() for name, function in self._functions.items()}
        for index in images:
            self._outputs[index] = {name: values[index % FEATURE_BATCH] for name, values in outputs.items()}


def _one_index_per_row(buffer: Mapping[int, Tensor]) -> list[int]:
    """For each row the smallest buffered index that belongs to it."""
    index_of_row: dict[int, int] = {}
    for index in sorted(buffer):
        index_of_row.setdefault(index % FEATURE_BATCH, index)
    return list(index_of_row.values())
