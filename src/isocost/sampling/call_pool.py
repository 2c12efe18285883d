"""Network calls of one fixed shape, several at once on a CPU.

Small networks do not gain from more threads in each operation; they gain from one call a core. On a CPU every call has one
thread, a lone one too: more of them add in another order, and the bits would depend on the number of lanes. Where memory
runs out a call is split in halves from then on.

Shape letters: P places of all lanes, B places of a call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isocost.errors import RunError
from isocost.utils.progress import say


class CallPool:
    """`num_parallel_calls` calls of `batch_size` places. `call_size` is the bucket size until memory runs out."""

    def __init__(self, num_parallel_calls: int, batch_size: int, device: torch.device) -> None:
        self.num_places = num_parallel_calls * batch_size
        self.call_size = batch_size
        self._pool = single_thread_executor(num_parallel_calls) if device.type == "cpu" else None

    def run(
        self,
        denoise: Callable[..., Tensor],
        arguments: tuple[Tensor, ...],
        busy: NDArray[np.bool_],
    ) -> Tensor:
        """`denoise(*arguments)` over all P places, call by call; [P, ...]. A call whose places all stand empty is left out.

        Raises:
            RunError: a call of one place runs out of memory.
        """
        while True:
            try:
                return self._run(denoise, arguments, busy)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                if self.call_size == 1:
                    raise RunError(
                        "one network pass does not fit into memory; take a smaller network or precision bf16"
                    ) from error
                self.call_size = -(-self.call_size // 2)
                say(f"out of memory: network calls of {self.call_size} places from here on, recorded with the points")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _run(self, denoise: Callable[..., Tensor], arguments: tuple[Tensor, ...], busy: NDArray[np.bool_]) -> Tensor:
        size = self.call_size
        initial_noise = [start for start in range(0, self.num_places, size) if busy[start : start + size].any()]

        def call(start: int) -> Tensor:
            with torch.inference_mode():
                return denoise(*(_rows(argument, start, size) for argument in arguments))

        outputs = (
            list(self._pool.map(call, initial_noise)) if self._pool is not None else [call(start) for start in initial_noise]
        )
        if len(initial_noise) == 1 and size == self.num_places:
            return outputs[0]
        whole = outputs[0].new_zeros(self.num_places, *outputs[0].shape[1:])
        for start, output in zip(initial_noise, outputs, strict=True):
            whole[start : start + size] = output[: self.num_places - start]
        return whole


def _rows(values: Tensor, start: int, size: int) -> Tensor:
    """`size` rows from `start`; where fewer are left the last one fills up, so that the shape stays."""
    part = values[start : start + size]
    return part if len(part) == size else torch.cat([part, part[-1:].expand(size - len(part), *part.shape[1:])])


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def single_thread_executor(num_threads: int) -> ThreadPoolExecutor:
    """A pool whose threads have started: torch's setting is of the whole process until each has taken its own."""
    threads_here = torch.get_num_threads()
    started = Barrier(num_threads)

    def start() -> None:
        torch.set_num_threads(1)
        if torch.backends.mkl.is_available():
            # torch hands MKL a number for all threads; this one is the thread's own.
            ctypes.CDLL(torch._C.__file__).MKL_Set_Num_Threads_Local(1)
        started.wait()

    pool = ThreadPoolExecutor(num_threads, "lane", initializer=start)
    list(pool.map(lambda _: None, range(num_threads)))
    torch.set_num_threads(threads_here)
    return pool
