"""Rows that wait for their places, and which place of a network call a pass may take.

On most processors a batched product rounds a row as its position in the batch has it. So every pass of a picture stands at
one position of the call, a function of the picture's id and of the pass: then a picture's bits do not depend on its company.

Shape letters: B places of a call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from isocost.diffusion.philox import START_NOISE, normal_noise
from isocost.sampling.request import ByPicture, Conditions, Pass, Row


def position(row: Row, one: Pass, bucket_size: int) -> int:
    """The position of a pass in its call: consecutive pictures side by side, unconditional passes half a call further."""
    return (row.picture_id + (bucket_size // 2 if one.unconditional else 0)) % bucket_size


@dataclass(frozen=True, eq=False, slots=True)
class WaitingRow:
    """A row with its start noise [C, H, W], its passes, their positions, and its turn in the stream."""

    row: Row
    start: Tensor
    passes: tuple[Pass, ...]
    positions: tuple[int, ...]
    turn: int


class Waiting:
    """Rows of a stream, a queue a position of their first pass; at most `most` of them are read ahead of their turn."""

    def __init__(
        self,
        rows: Iterator[Row],
        conditions: Conditions,
        latent_shape: tuple[int, int, int],
        bucket_size: int,
        most: int,
        device: torch.device,
        starts: ByPicture | None = None,
    ) -> None:
        self.conditions, self.latent_shape, self.bucket_size, self.device = conditions, latent_shape, bucket_size, device
        self.queues: list[deque[WaitingRow]] = [deque() for _ in range(bucket_size)]
        self.most, self.starts = most, starts
        self._rows = rows
        self._num_read = self._num_waiting = 0

    def take(self, vacant: list[int], may_start: Callable[[WaitingRow], bool]) -> Iterator[WaitingRow]:
        """Rows that fit `vacant` [B], the vacant places at each position, in the order of the stream where there is a choice.

        `vacant` counts down as rows are taken. `may_start` is asked again after each row.
        """

        def fits(waiting: WaitingRow) -> bool:
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
        chunk = list(islice(self._rows, min(self.bucket_size, self.most - self._num_waiting)))
        if not chunk:
            return False
        seeds = torch.tensor([row.seed for row in chunk])
        picture_ids = torch.tensor([row.picture_id for row in chunk])
        if self.starts is None:
            noise = normal_noise(seeds, picture_ids, START_NOISE, self.latent_shape, self.device)
        else:
            noise = self.starts(picture_ids).to(self.device)
        for row, start in zip(chunk, noise, strict=True):
            passes = self.conditions.passes(row)
            positions = tuple(position(row, one, self.bucket_size) for one in passes)
            self.queues[positions[0]].append(WaitingRow(row, start, passes, positions, self._num_read))
            self._num_read += 1
        self._num_waiting += len(chunk)
        return True
