"""One network over the processes of a training: alone, replicated (DDP by accelerate) or sharded (PyTorch's FSDP2).

Weights, moments and averages are handled as this process's pieces, plain tensors; a piece knows which rows of the whole
it is. A replicated network is one piece, a sharded one as many as there are processes.
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

BLOCKS = ("ResnetBlock2D", "Transformer2DModel", "BasicTransformerBlock")
"""Modules of diffusers' networks whose weights are gathered and let go together under FSDP2."""


@dataclass(frozen=True)
class ParamShard:
    """This process's rows [start, stop) of a parameter of shape `shape`; `data` is a plain tensor that shares its memory."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    data: Tensor


def process_info() -> ProcessInfo:
    """This process among those that torchrun or `accelerate launch` started; alone where neither did."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ProcessInfo()
    state = PartialState(cpu=on_cpu())
    return ProcessInfo(state.process_index, state.num_processes, state.wait_for_everyone)


def on_cpu() -> bool:
    """Whether there is no accelerator; accelerate joins processes on CPUs only where it is told so."""
    return not torch.accelerator.is_available()


def rows_of(spec: TrainSpec, accelerator: Accelerator) -> range:
    """This process's rows of each batch.

    Raises:
        ConfigError: the batch does not divide by the number of processes.
    """
    size, number = spec.batch_size, accelerator.num_processes
    if size % number:
        below = size - size % number
        raise ConfigError(
            f"train.batch_size={size} does not divide by {number} processes: take {below or number} or {below + number}, or "
            "another number of processes"
        )
    share = size // number
    return range(accelerator.process_index * share, (accelerator.process_index + 1) * share)


class DistributedModel:
    """A network ready for training on this process's device, and what the loop asks of it."""

    def __init__(self, network: nn.Module, spec: TrainSpec, accelerator: Accelerator) -> None:
        """`network` may lie on the meta device on every process but the first, where it is sharded."""
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
        whole = [parameter.detach() for parameter in self.network.parameters()] if is_first else None
        buffers = [buffer.clone() for buffer in self.network.buffers()]
        self.network.to("meta")
        for module in blocks_of(self.network):
            if spec.compile:
                module.compile(dynamic=False)
            fully_shard(module, mesh=mesh)
        fully_shard(self.network, mesh=mesh)
        self.network.to_empty(device=self.accelerator.device)
        for number, buffer in enumerate(self.network.buffers()):
            if is_first:
                buffer.copy_(buffers[number])
            dist.broadcast(buffer, src=0)
        for number, parameter in enumerate(self.network.parameters()):
            full = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.accelerator.device)
            if whole is not None:
                full.copy_(whole[number])
                whole[number] = torch.empty(0)
            dist.broadcast(full, src=0)
            piece = _piece("", parameter)
            piece.data.copy_(full[piece.start : piece.stop] if parameter.ndim else full)

    def no_sync_unless(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a microbatch: gradients travel between processes after the last one only."""
        if isinstance(self.network, FSDPModule):
            self.network.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(self.forward)

    def reshard(self) -> None:
        """Let go of weights that a forward pass without its backward left gathered."""
        for module in self.network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @property
    def trainable_params(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name, in the order of the network; others stay as they were given."""
        return {name: parameter for name, parameter in self.network.named_parameters() if parameter.requires_grad}

    def pieces(self) -> list[ParamShard]:
        """This process's pieces of the parameters that learn."""
        return [_piece(name, parameter) for name, parameter in self.trainable_params.items()]

    def gather(self, values: list[Tensor]) -> Iterator[Tensor]:
        """Whole tensors on the CPU, one by one, from pieces laid out as `pieces()`; every process must go through all."""
        for parameter, value in zip(self.trainable_params.values(), values, strict=True):
            if isinstance(parameter, DTensor):
                mesh, placements, shape = parameter.device_mesh, parameter.placements, parameter.shape
                strides = torch.empty(shape, device="meta").stride()
                whole = DTensor.from_local(value, mesh, placements, run_check=False, shape=shape, stride=strides)
                yield whole.redistribute(placements=[Replicate()]).to_local().cpu()
            else:
                yield value.cpu()

    def clip(self, max_norm: float) -> Tensor:
        """Scale gradients to a total norm of at most `max_norm`, without waiting for the device; returns the norm."""
        grads = [_local(p.grad) for p in self.network.parameters() if p.grad is not None]
        total = torch.stack(torch._foreach_norm([grad for grad in grads if grad.numel()])).square().sum()
        if self.is_sharded:
            dist.all_reduce(total)
        norm = total.sqrt()
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm


def blocks_of(network: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules of `network` that are one of `BLOCKS`."""
    for module in network.children():
        if type(module).__name__ in BLOCKS:
            yield module
        else:
            yield from blocks_of(module)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _piece(name: str, parameter: Tensor) -> ParamShard:
    shape = tuple(parameter.shape)
    data = _local(parameter.detach())
    if not isinstance(parameter, DTensor):
        return ParamShard(name, shape, 0, shape[0] if shape else 1, data)
    share = -(-shape[0] // parameter.device_mesh.size())
    start = min(parameter.device_mesh.get_local_rank() * share, shape[0])
    return ParamShard(name, shape, start, min(start + share, shape[0]), data)
