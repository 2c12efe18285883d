"""How many images a process takes through the network at once: as many as fit, which changes the result by rounding only.

Shapes: B rows of this process.
"""

from __future__ import annotations

import gc

import torch
import torch.distributed as dist

from isocost.config.training import TrainSpec
from isocost.errors import ConfigError
from isocost.training.distributed import DistributedModel
from isocost.training.objectives import Objective

MEMORY_FRACTION = 0.5
"""Of the memory that is free on a CPU, what the activations of a microbatch may take."""


def largest_microbatch(parallel: DistributedModel, spec: TrainSpec, task: Objective, rows: range, dtype: torch.dtype) -> int:
    """The rows of a microbatch: `spec.microbatch`, or the largest divisor of this process's rows that fits.

    On an accelerator it is tried, forward and backward, halving where memory runs out. On a CPU, where a process that takes
    too much is killed, one row is measured and as many are taken as fit into half of what is free.

    Raises:
        ConfigError: `spec.microbatch` does not divide the rows, or not one row fits.
    """
    num_rows = len(rows)
    if spec.microbatch != "auto":
        if num_rows % spec.microbatch:
            raise ConfigError(f"train.microbatch={spec.microbatch} does not divide the {num_rows} images of each process")
        return spec.microbatch
    divisors = [size for size in range(num_rows, 0, -1) if num_rows % size == 0]
    if parallel.accelerator.device.type == "cpu":
        return _agreed(parallel, _by_free_memory(parallel, spec, task, rows, dtype, divisors))
    for size in divisors:
        if _agreed(parallel, int(_fits(parallel, spec, task, rows, dtype, size))):
            return size
    raise ConfigError("not one image fits into the device's memory: gradient_checkpointing: true, or sharding: fsdp")


def _fits(parallel: DistributedModel, spec: TrainSpec, task: Objective, rows: range, dtype: torch.dtype, size: int) -> bool:
    try:
        _try(parallel, spec, task, range(rows.start, rows.start + size), dtype)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        parallel.network.zero_grad(set_to_none=True)
        gc.collect()
        torch.accelerator.empty_cache()


def _try(parallel: DistributedModel, spec: TrainSpec, task: Objective, rows: range, dtype: torch.dtype) -> None:
    device = parallel.accelerator.device
    batch = task.batch(0, rows, device, dtype)
    with parallel.no_sync_unless(parallel.is_sharded), torch.compiler.set_stance("force_eager"):
        with torch.autocast(device.type, torch.bfloat16, enabled=spec.dtype == "bf16"):
            loss = task.loss(parallel.forward, batch)
        loss.backward()


def _by_free_memory(
    parallel: DistributedModel, spec: TrainSpec, task: Objective, rows: range, dtype: torch.dtype, divisors: list[int]
) -> int:
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = task.batch(0, range(rows.start, rows.start + 1), parallel.accelerator.device, dtype)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.compiler.set_stance("force_eager"):
        task.loss(parallel.network, batch)
    parallel.reshard()
    for parameter in parallel.network.parameters():
        saved.pop(parameter.untyped_storage().data_ptr() if not parallel.is_sharded else 0, None)
    room = MEMORY_FRACTION * free_bytes() / parallel.accelerator.num_processes
    return next((size for size in divisors if size * sum(saved.values()) <= room), 1)


def free_bytes() -> int:
    """Memory that this machine could still give, bytes."""
    import psutil

    return int(psutil.virtual_memory().available)


def _agreed(parallel: DistributedModel, size: int) -> int:
    """The least over all processes."""
    if parallel.accelerator.num_processes == 1:
        return size
    least = torch.tensor(size, device=parallel.accelerator.device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)
