"""The queue of requests that wait for slots, and the rule that fixes the position of a pass in a network call.

On most processors a batched product rounds a row depending on its position in the batch. Therefore the position of a pass is
a function of the sample index and of the pass. Then the bits of an image do not depend on the other images in the call.

Shape letters: B slots of a call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from isocost.diffusion.philox import INITIAL_NOISE, philox_normal
from isocost.sampling.request import Conditioning, ConditioningPass, PerSampleFn, SampleRequest


def slot_position(request: SampleRequest, conditioning_pass: ConditioningPass, batch_size: int) -> int:
    """Position of a pass in its call, 0 to B - 1: consecutive images are neighbours; unconditional passes are B / 2 further."""
    return (request.sample_index + (batch_size // 2 if conditioning_pass.unconditional else 0)) % batch_size


@dataclass(frozen=True, eq=False, slots=True)
class QueuedRequest:
    """A request that waits.

    Attributes:
        initial_noise: [C, H, W].
        passes: the network passes of an evaluation.
        positions: of the passes in a call.
        arrival_index: number of the request in the stream.
    """

    request: SampleRequest
    initial_noise: Tensor
    passes: tuple[ConditioningPass, ...]
    positions: tuple[int, ...]
    arrival_index: int


class RequestQueue:
    """The waiting requests of a stream, in B queues.

    Queue k holds the requests whose first network pass must be at position k of a network call.

    Args:
        requests: the stream, read lazily.
        conditioning: gives the passes of a request.
        latent_shape: (C, H, W).
        batch_size: B.
        max_waiting: the largest number of requests that may wait.
        device: of the initial noise.
        initial_noise: sample indices -> initial noise [R, C, H, W]; by default it is drawn from (seed, sample index).
    """

    def __init__(
        self,
        requests: Iterator[SampleRequest],
        conditioning: Conditioning,
        latent_shape: tuple[int, int, int],
        batch_size: int,
        max_waiting: int,
        device: torch.device,
        initial_noise: PerSampleFn | None = None,
    ) -> None:
        self.conditioning, self.latent_shape, self.batch_size, self.device = conditioning, latent_shape, batch_size, device
        self.queues: list[deque[QueuedRequest]] = [deque() for _ in range(batch_size)]
        self.max_waiting, self.initial_noise = max_waiting, initial_noise
        self._requests = requests
        self._num_read = self._num_waiting = 0

    def pop_fitting(self, num_free: list[int], may_start: Callable[[QueuedRequest], bool]) -> Iterator[QueuedRequest]:
        """Yield requests that fit the free slots; the one that arrived first comes first if several fit.

        Args:
            num_free: [B], number of free slots at each position. It is decremented for each yielded request.
            may_start: whether a request may start now. It is called again after each yielded request.
        """

        def fits(queued: QueuedRequest) -> bool:
            first, last = queued.positions[0], queued.positions[-1]
            needs_two_at_first = len(queued.positions) == 2 and first == last
            return num_free[first] > needs_two_at_first and num_free[last] > 0 and may_start(queued)

        while any(num_free):
            free_queues = (queue for free, queue in zip(num_free, self.queues, strict=True) if free)
            candidates = [queued for queue in free_queues if (queued := next(filter(fits, queue), None)) is not None]
            for queued in sorted(candidates, key=lambda candidate: candidate.arrival_index):
                if fits(queued):
                    self.queues[queued.positions[0]].remove(queued)
                    self._num_waiting -= 1
                    for position in queued.positions:
                        num_free[position] -= 1
                    yield queued
            if not candidates and not self._read():
                return

    def _read(self) -> bool:
        """Read up to B requests and draw their initial noise in one call. False at the end of the stream or if full."""
        chunk = list(islice(self._requests, min(self.batch_size, self.max_waiting - self._num_waiting)))
        if not chunk:
            return False
        seeds = torch.tensor([request.seed for request in chunk])
        sample_indices = torch.tensor([request.sample_index for request in chunk])
        if self.initial_noise is None:
            noise = philox_normal(seeds, sample_indices, INITIAL_NOISE, self.latent_shape, self.device)
        else:
            noise = self.initial_noise(sample_indices).to(self.device)
        for request, start in zip(chunk, noise, strict=True):
            passes = self.conditioning.passes(request)
            positions = tuple(slot_position(request, item, self.batch_size) for item in passes)
            self.queues[positions[0]].append(QueuedRequest(request, start, passes, positions, self._num_read))
            self._num_read += 1
        self._num_waiting += len(chunk)
        return True
