"""Rows that wait for their places, and which place of a network call a pass may take.

On most processors a batched product rounds a row as its position in the batch has it. So every pass of an image stands at
one position of the call, a function of the image's id and of the pass: then an image's bits do not depend on its company.

Shape letters: B places of a call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from isocost.diffusion.philox import INITIAL_NOISE, philox_normal
from isocost.sampling.request import Conditioning, Pass, PerSampleFn, SampleRequest


def slot_position(row: SampleRequest, one: Pass, batch_size: int) -> int:
    """The position of a pass in its call: consecutive images side by side, unconditional passes half a call further."""
    return (row.sample_index + (batch_size // 2 if one.unconditional else 0)) % batch_size


@dataclass(frozen=True, eq=False, slots=True)
class QueuedRequest:
    """A row with its start noise [C, H, W], its passes, their positions, and its turn in the stream."""

    row: SampleRequest
    start: Tensor
    passes: tuple[Pass, ...]
    positions: tuple[int, ...]
    turn: int


class RequestQueue:
    """Rows of a stream, a queue a position of their first pass; at most `most` of them are read ahead of their turn."""

    def __init__(
        self,
        rows: Iterator[SampleRequest],
        conditions: Conditioning,
        latent_shape: tuple[int, int, int],
        batch_size: int,
        most: int,
        device: torch.device,
        initial_noise: PerSampleFn | None = None,
    ) -> None:
        self.conditions, self.latent_shape, self.batch_size, self.device = conditions, latent_shape, batch_size, device
        self.queues: list[deque[QueuedRequest]] = [deque() for _ in range(batch_size)]
        self.most, self.initial_noise = most, initial_noise
        self._rows = rows
        self._num_read = self._num_waiting = 0

    def take(self, vacant: list[int], may_start: Callable[[QueuedRequest], bool]) -> Iterator[QueuedRequest]:
        """Rows that fit `vacant` [B], the vacant places at each position, in the order of the stream where there is a choice.

        `vacant` counts down as rows are taken. `may_start` is asked again after each row.
        """

        def fits(waiting: QueuedRequest) -> bool:
            first, last = waiting.positions[0], waiting.positions[-1]
            both_at_one = len(waiting.positions) == 2 and first == last
            return vacant[first] > both_at_one and vacant[last] > 0 and may_start(waiting)

        while any(vacant):
            at_vacant = (queue for free, queue in zip(vacant, self.queues, strict=True) if free)
            candidates = [row for queue in at_vacant if (row := next(filter(fits, queue), None)) is not None]
            for waiting in sorted(candidates, key=lambda row: row.turn):
                if fits(waiting):
                    self.queues[waiting.positions[0]].remove(waiting)
                    self._num_waiting -= 1
                    for one in waiting.positions:
                        vacant[one] -= 1
                    yield waiting
            if not candidates and not self._read():
                return

    def _read(self) -> bool:
        """Read as many rows as a call has places; their start noise is drawn at once. False where there are no more."""
        chunk = list(islice(self._rows, min(self.batch_size, self.most - self._num_waiting)))
        if not chunk:
            return False
        seeds = torch.tensor([row.seed for row in chunk])
        sample_indices = torch.tensor([row.sample_index for row in chunk])
        if self.initial_noise is None:
            noise = philox_normal(seeds, sample_indices, INITIAL_NOISE, self.latent_shape, self.device)
        else:
            noise = self.initial_noise(sample_indices).to(self.device)
        for row, start in zip(chunk, noise, strict=True):
            passes = self.conditions.passes(row)
            positions = tuple(slot_position(row, one, self.batch_size) for one in passes)
            self.queues[positions[0]].append(QueuedRequest(row, start, passes, positions, self._num_read))
            self._num_read += 1
        self._num_waiting += len(chunk)
        return True
