"""The queue of requests that wait for slots, and the rule that fixes the position of a pass in a network call.

On most processors a batched product rounds a row depending on its position in the batch. Therefore the position of a pass is
a function of the sample index and of the pass. Then the bits of an image do not depend on the other images in the call.

Shape letters: B slots of a call.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from isocost.diffusion.philox import INITIAL_NOISE, philox_normal
from isocost.sampling.request import Conditioning, ConditioningPass, PerSampleFn, SampleRequest, check_request


def slot_position(request: SampleRequest, conditioning_pass: ConditioningPass, batch_size: int) -> int:
    """Position of a pass in its call, 0 to B - 1: consecutive images are neighbours; unconditional passes are B / 2 further.

    A guide has calls of its own, with the same rule.
    """
    return (request.sample_index + (batch_size // 2 if conditioning_pass.unconditional else 0)) % batch_size


@dataclass(frozen=True, eq=False, slots=True)
class QueuedRequest:
    """A request that waits.

    Attributes:
        initial_noise: [C, H, W].
        passes: the network passes of the first evaluation.
        positions: of these passes in their calls.
        arrival_index: number of the request in the stream.
    """

    request: SampleRequest
    initial_noise: Tensor
    passes: tuple[ConditioningPass, ...]
    positions: tuple[int, ...]
    arrival_index: int

    def slots(self) -> list[tuple[str | None, int]]:
        """The network and the position of each pass."""
        return [(item.guide, position) for item, position in zip(self.passes, self.positions, strict=True)]


FreeSlots = dict[str | None, list[int]]
"""Number of free slots at each position of a call, by guide; None is the main network."""


class RequestQueue:
    """The waiting requests of a stream, in B queues.

    Queue k holds the requests whose first network pass must be at position k of a call of the main network.

    Args:
        requests: the stream, read lazily.
        main: conditioning of the main network; it gives the passes of a request.
        guides: conditioning of the guides by name.
        latent_shape: (C, H, W).
        batch_size: B.
        max_waiting: the largest number of requests that may wait.
        device: of the initial noise.
        initial_noise: sample indices -> initial noise [R, C, H, W]; by default it is drawn from (seed, sample index).
    """

    def __init__(
        self,
        requests: Iterator[SampleRequest],
        main: Conditioning,
        guides: Mapping[str, Conditioning],
        latent_shape: tuple[int, int, int],
        batch_size: int,
        max_waiting: int,
        device: torch.device,
        initial_noise: PerSampleFn | None = None,
    ) -> None:
        self.main, self.guides = main, guides
        self.latent_shape, self.batch_size, self.device = latent_shape, batch_size, device
        self.queues: list[deque[QueuedRequest]] = [deque() for _ in range(batch_size)]
        self.max_waiting, self.initial_noise = max_waiting, initial_noise
        self._requests = requests
        self._num_read = self._num_waiting = 0

    def pop_fitting(self, num_free: FreeSlots, may_start: Callable[[QueuedRequest], bool]) -> Iterator[QueuedRequest]:
        """Yield requests that fit the free slots; the one that arrived first comes first if several fit.

        Args:
            num_free: number of free slots at each position, by network. It is decremented for each yielded request.
            may_start: whether a request may start now. It is called again after each yielded request.
        """

        def fits(queued: QueuedRequest) -> bool:
            needed = Counter(queued.slots())
            return all(num_free[guide][position] >= number for (guide, position), number in needed.items()) and may_start(
                queued
            )

        while any(num_free[None]):
            free_queues = (queue for free, queue in zip(num_free[None], self.queues, strict=True) if free)
            candidates = [queued for queue in free_queues if (queued := next(filter(fits, queue), None)) is not None]
            for queued in sorted(candidates, key=lambda candidate: candidate.arrival_index):
                if fits(queued):
                    self.queues[queued.positions[0]].remove(queued)
                    self._num_waiting -= 1
                    for guide, position in queued.slots():
                        num_free[guide][position] -= 1
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
            check_request(request, self.main, self.guides)
            passes = self.main.passes(request, request.weights[0])
            positions = tuple(slot_position(request, item, self.batch_size) for item in passes)
            self.queues[positions[0]].append(QueuedRequest(request, start, passes, positions, self._num_read))
            self._num_read += 1
        self._num_waiting += len(chunk)
        return True
