"""Distribute a network over the processes of a training: replicated (accelerate's DDP), sharded (PyTorch's FSDP2) or neither.

Weights, moments and averages are handled as shards of this process: plain tensors that hold known rows of the full parameter.
In a replicated network a shard is the full parameter; in a sharded network every process holds other rows of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate

from isocost.config.training import TrainSpec
from isocost.data.latent_cache import ProcessInfo
from isocost.errors import ConfigError

FSDP_BLOCKS = ("ResnetBlock2D", "Transformer2DModel", "BasicTransformerBlock")
"""Modules of diffusers' networks whose weights FSDP2 gathers and frees together."""


@dataclass(frozen=True)
class ParamShard:
    """Rows [start, stop) of a parameter that this process holds.

    Attributes:
        shape: of the full parameter.
        data: the rows, a plain tensor that shares the parameter's memory.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    data: Tensor


def process_info() -> ProcessInfo:
    """Return rank and number of the processes that torchrun or `accelerate launch` started; a single process otherwise."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ProcessInfo()
    state = PartialState(cpu=on_cpu())
    return ProcessInfo(state.process_index, state.num_processes, state.wait_for_everyone)


def on_cpu() -> bool:
    """Whether there is no accelerator: accelerate connects processes on CPUs only with an explicit `cpu=True`."""
    return not torch.accelerator.is_available()


def process_rows(spec: TrainSpec, accelerator: Accelerator) -> range:
    """Return the rows of each batch that this process takes.

    Raises:
        ConfigError: the batch size is not divisible by the number of processes.
    """
    batch_size, num_processes = spec.batch_size, accelerator.num_processes
    if batch_size % num_processes:
        lower = batch_size - batch_size % num_processes
        raise ConfigError(
            f"train.batch_size={batch_size} is not divisible by {num_processes} processes: take {lower or num_processes} or "
            f"{lower + num_processes}, or another number of processes"
        )
    rows_per_process = batch_size // num_processes
    return range(accelerator.process_index * rows_per_process, (accelerator.process_index + 1) * rows_per_process)


class DistributedModel:
    """A network prepared for training on the device of this process, replicated or sharded."""

    def __init__(self, network: nn.Module, spec: TrainSpec, accelerator: Accelerator) -> None:
        """
        Args:
            network: the network to train. For a sharded training it may be on the meta device in all processes but the first.
        """
        self.accelerator = accelerator
        self.is_sharded = spec.sharding == "fsdp" and accelerator.num_processes > 1
        self.network = network.train()
        if spec.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()  # type: ignore[operator]
        if self.is_sharded:
            self._shard(spec)
            self.forward: nn.Module = self.network
        else:
            self.network.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            if spec.compile:
                self.network.compile(dynamic=False)
            self.forward = accelerator.prepare_model(self.network)

    def _shard(self, spec: TrainSpec) -> None:
        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        is_first = self.accelerator.process_index == 0
        full_params = [parameter.detach() for parameter in self.network.parameters()] if is_first else None
        buffers = [buffer.clone() for buffer in self.network.buffers()]
        self.network.to("meta")
        for module in fsdp_blocks(self.network):
            if spec.compile:
                module.compile(dynamic=False)
            fully_shard(module, mesh=mesh)
        fully_shard(self.network, mesh=mesh)
        self.network.to_empty(device=self.accelerator.device)
        for index, buffer in enumerate(self.network.buffers()):
            if is_first:
                buffer.copy_(buffers[index])
            dist.broadcast(buffer, src=0)
        for index, parameter in enumerate(self.network.parameters()):
            full = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.accelerator.device)
            if full_params is not None:
                full.copy_(full_params[index])
                full_params[index] = torch.empty(0)  # frees its memory
            dist.broadcast(full, src=0)
            shard = _param_shard("", parameter)
            shard.data.copy_(full[shard.start : shard.stop] if parameter.ndim else full)

    def no_sync_unless(self, is_last: bool) -> AbstractContextManager[None]:
        """Context for forward and backward of a microbatch: processes exchange gradients only after the last microbatch."""
        if isinstance(self.network, FSDPModule):
            self.network.set_requires_gradient_sync(is_last)
            return nullcontext()
        return nullcontext() if is_last else self.accelerator.no_sync(self.forward)

    def reshard(self) -> None:
        """Free the full weights that a forward pass without a backward pass left gathered."""
        for module in self.network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @property
    def trainable_params(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name, in the order of the network."""
        return {name: parameter for name, parameter in self.network.named_parameters() if parameter.requires_grad}

    def param_shards(self) -> list[ParamShard]:
        """Return this process's shards of the trainable parameters."""
        return [_param_shard(name, parameter) for name, parameter in self.trainable_params.items()]

    def gather(self, values: list[Tensor]) -> Iterator[Tensor]:
        """Yield full tensors on the CPU, one at a time. All processes must iterate to the end.

        Args:
            values: this process's rows of each tensor, in the layout of `param_shards()`.
        """
        for parameter, value in zip(self.trainable_params.values(), values, strict=True):
            if isinstance(parameter, DTensor):
                mesh, placements, shape = parameter.device_mesh, parameter.placements, parameter.shape
                strides = torch.empty(shape, device="meta").stride()
                full = DTensor.from_local(value, mesh, placements, run_check=False, shape=shape, stride=strides)
                yield full.redistribute(placements=[Replicate()]).to_local().cpu()
            else:
                yield value.cpu()

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scale the gradients to a total norm of at most `max_norm`; returns the norm. Does not wait for the device."""
        grads = [_local(p.grad) for p in self.network.parameters() if p.grad is not None]
        total = torch.stack(torch._foreach_norm([grad for grad in grads if grad.numel()])).square().sum()
        if self.is_sharded:
            dist.all_reduce(total)
        norm = total.sqrt()
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm


def fsdp_blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules of `network` whose class is in `FSDP_BLOCKS`."""
    for module in network.children():
        if type(module).__name__ in FSDP_BLOCKS:
            yield module
        else:
            yield from fsdp_blocks(module)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _param_shard(name: str, parameter: Tensor) -> ParamShard:
    shape = tuple(parameter.shape)
    data = _local(parameter.detach())
    if not isinstance(parameter, DTensor):
        return ParamShard(name, shape, 0, shape[0] if shape else 1, data)
    num_rows = -(-shape[0] // parameter.device_mesh.size())
    start = min(parameter.device_mesh.get_local_rank() * num_rows, shape[0])
    return ParamShard(name, shape, start, min(start + num_rows, shape[0]), data)
