"""Choose the microbatch: how many images a process takes through the network at once. It changes results only by rounding."""

from __future__ import annotations

import gc

import torch
import torch.distributed as dist

from isocost.config.training import TrainSpec
from isocost.errors import ConfigError
from isocost.training.distributed import DistributedModel
from isocost.training.objectives import Objective

MEMORY_FRACTION = 0.5
"""Fraction of the free memory that the activations of a microbatch may take on a CPU."""


def largest_microbatch(model: DistributedModel, spec: TrainSpec, objective: Objective, rows: range, dtype: torch.dtype) -> int:
    """Return the microbatch size: `spec.microbatch`, or the largest divisor of this process's rows that fits into memory.

    On an accelerator, forward and backward are tried with each divisor from the largest on. On a CPU, where a process that
    takes too much memory is killed, one row is measured and as many rows are taken as fit into half of the free memory.

    Args:
        rows: this process's rows of the batch.
        dtype: of the network's weights.

    Raises:
        ConfigError: `spec.microbatch` does not divide the rows, or not even one row fits.
    """
    num_rows = len(rows)
    if spec.microbatch != "auto":
        if num_rows % spec.microbatch:
            raise ConfigError(
                f"train.microbatch={spec.microbatch} does not divide the {num_rows} images of each process; take a divisor"
            )
        return spec.microbatch
    divisors = [size for size in range(num_rows, 0, -1) if num_rows % size == 0]
    if model.accelerator.device.type == "cpu":
        return _min_over_processes(model, _largest_for_free_memory(model, spec, objective, rows, dtype, divisors))
    for size in divisors:
        if _min_over_processes(model, int(_fits(model, spec, objective, rows, dtype, size))):
            return size
    raise ConfigError(
        "not even one image fits into the memory of the device; set train.gradient_checkpointing: true or train.sharding: fsdp"
    )


def _fits(model: DistributedModel, spec: TrainSpec, objective: Objective, rows: range, dtype: torch.dtype, size: int) -> bool:
    try:
        _forward_backward(model, spec, objective, range(rows.start, rows.start + size), dtype)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        model.network.zero_grad(set_to_none=True)
        gc.collect()
        torch.accelerator.empty_cache()


def _forward_backward(model: DistributedModel, spec: TrainSpec, objective: Objective, rows: range, dtype: torch.dtype) -> None:
    device = model.accelerator.device
    batch = objective.batch(0, rows, device, dtype)
    with model.no_sync_unless(model.is_sharded), torch.compiler.set_stance("force_eager"):
        with torch.autocast(device.type, torch.bfloat16, enabled=spec.dtype == "bf16"):
            loss = objective.loss(model.forward, batch)
        loss.backward()


def _largest_for_free_memory(
    model: DistributedModel, spec: TrainSpec, objective: Objective, rows: range, dtype: torch.dtype, divisors: list[int]
) -> int:
    saved_bytes: dict[int, int] = {}  # by storage

    def record(tensor: torch.Tensor) -> torch.Tensor:
        saved_bytes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = objective.batch(0, range(rows.start, rows.start + 1), model.accelerator.device, dtype)
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor), torch.compiler.set_stance("force_eager"):
        objective.loss(model.network, batch)
    model.reshard()
    for parameter in model.network.parameters():
        saved_bytes.pop(parameter.untyped_storage().data_ptr() if not model.is_sharded else 0, None)
    available = MEMORY_FRACTION * free_bytes() / model.accelerator.num_processes
    return next((size for size in divisors if size * sum(saved_bytes.values()) <= available), 1)


def free_bytes() -> int:
    """Free memory of this machine, bytes."""
    import psutil

    return int(psutil.virtual_memory().available)


def _min_over_processes(model: DistributedModel, value: int) -> int:
    if model.accelerator.num_processes == 1:
        return value
    minimum = torch.tensor(value, device=model.accelerator.device)
    dist.all_reduce(minimum, dist.ReduceOp.MIN)
    return int(minimum)
