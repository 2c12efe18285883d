"""Network calls of one fixed shape, several in parallel on a CPU.

A small network gains nothing from more threads per operation; it gains from one call per core. On a CPU every call has one
thread, also a single call: with more threads torch adds in another order, so the bits would depend on the number of parallel
calls. When memory runs out, all later calls have half the size.

Shape letters: P slots of all parallel calls, B slots of a call.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isocost.errors import RunError
from isocost.utils.device import is_out_of_memory

logger = logging.getLogger(__name__)


class CallPool:
    """`num_parallel_calls` calls of `batch_size` slots. `call_size` equals `batch_size` until memory runs out.

    With `skips_empty_slots` a call has only the slots that work for a request, so its shape changes from tick to tick.
    """

    def __init__(self, num_parallel_calls: int, batch_size: int, device: torch.device, skips_empty_slots: bool = False) -> None:
        self.skips_empty_slots = skips_empty_slots
        self.num_calls = num_parallel_calls
        self.num_slots = num_parallel_calls * batch_size
        self.call_size = batch_size
        self._pool = single_thread_executor(num_parallel_calls) if device.type == "cpu" else None

    def run(
        self,
        denoise: Callable[..., Tensor],
        arguments: tuple[Tensor, ...],
        busy: NDArray[np.bool_],
    ) -> Tensor:
        """Run `denoise(*arguments)` over all P slots, call by call. A call with only empty slots is skipped.

        Args:
            denoise: the network.
            arguments: tensors [P, ...].
            busy: [P], whether a slot works for a request.

        Returns:
            [P, ...].

        Raises:
            RunError: a call of one slot runs out of memory.
        """
        while True:
            try:
                return self._run(denoise, arguments, busy)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.call_size == 1:
                    raise RunError("one network pass does not fit into memory; use a smaller network or dtype bf16") from error
                self.call_size = -(-self.call_size // 2)
                logger.warning(
                    f"out of memory: network calls have {self.call_size} slots from now on; the points record this number"
                )
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _run(self, denoise: Callable[..., Tensor], arguments: tuple[Tensor, ...], busy: NDArray[np.bool_]) -> Tensor:
        size = self.call_size
        starts = [start for start in range(0, self.num_slots, size) if busy[start : start + size].any()]
        if self.skips_empty_slots and not busy.all():
            return self._run_busy_slots(denoise, arguments, busy, starts)

        def call(start: int) -> Tensor:
            with torch.inference_mode():
                return denoise(*(_padded_slice(argument, start, size) for argument in arguments))

        outputs = list(self._pool.map(call, starts)) if self._pool is not None else [call(start) for start in starts]
        if len(starts) == 1 and size == self.num_slots:
            return outputs[0]
        merged = outputs[0].new_zeros(self.num_slots, *outputs[0].shape[1:])
        for start, output in zip(starts, outputs, strict=True):
            merged[start : start + size] = output[: self.num_slots - start]
        return merged

    def _run_busy_slots(
        self, denoise: Callable[..., Tensor], arguments: tuple[Tensor, ...], busy: NDArray[np.bool_], starts: list[int]
    ) -> Tensor:
        """As `_run`, without the empty slots of each call."""
        device = arguments[0].device
        chosen = [torch.from_numpy(start + np.flatnonzero(busy[start : start + self.call_size])).to(device) for start in starts]

        def call(slots: Tensor) -> Tensor:
            with torch.inference_mode():
                return denoise(*(argument[slots] for argument in arguments))

        outputs = list(self._pool.map(call, chosen)) if self._pool is not None else [call(slots) for slots in chosen]
        merged = outputs[0].new_zeros(self.num_slots, *outputs[0].shape[1:])
        for slots, output in zip(chosen, outputs, strict=True):
            merged[slots] = output
        return merged


def _padded_slice(values: Tensor, start: int, size: int) -> Tensor:
    """`size` rows from `start`; the last row is repeated if fewer are left, so that the shape never changes."""
    rows = values[start : start + size]
    return rows if len(rows) == size else torch.cat([rows, rows[-1:].expand(size - len(rows), *rows.shape[1:])])


def single_thread_executor(num_threads: int) -> ThreadPoolExecutor:
    """A pool of threads in which torch computes with one thread each.

    All threads have started when it returns: torch's setting is global until each thread has copied it.
    """
    caller_num_threads = torch.get_num_threads()
    started = Barrier(num_threads)

    def start() -> None:
        torch.set_num_threads(1)
        if torch.backends.mkl.is_available():
            # torch passes one number to MKL for all threads; this call sets the number of this thread only.
            ctypes.CDLL(torch._C.__file__).MKL_Set_Num_Threads_Local(1)
        started.wait()

    pool = ThreadPoolExecutor(num_threads, "network-call", initializer=start)
    list(pool.map(lambda _: None, range(num_threads)))
    torch.set_num_threads(caller_num_threads)
    return pool
