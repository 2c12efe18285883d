"""Estimate the memory that a training takes in each process, without allocating it.

Weights, gradients, moments and averages are counted. The peak of forward and backward is found by running both on tensors
without data (PyTorch's fake tensors), with the kernels that the device would choose.

Shapes: B rows of a microbatch, C latent channels, L latent side, T tokens, D width of the prompt embeddings.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from isocost.config.model import ModelSpec
from isocost.config.training import TrainSpec
from isocost.models.factory import build_network
from isocost.training.distributed import fsdp_blocks

FLOAT = 4
ADAM_MOMENTS = 2


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one process: `state` stays allocated between steps, `step` is the peak of what a step adds."""

    state: int
    step: int

    @property
    def total(self) -> int:
        return self.state + self.step


def training_memory(
    model: ModelSpec, spec: TrainSpec, microbatch: int, num_tokens: int, num_processes: int = 1
) -> TrainingMemory:
    """Estimate the memory of each of `num_processes` processes that take `microbatch` rows through the network at once."""
    num_shards = num_processes if spec.sharding == "fsdp" else 1
    traced = _trace_pass(model, microbatch, num_tokens, spec.gradient_checkpointing, spec.dtype, num_shards)
    state = state_bytes(spec, traced.num_parameters, num_processes)
    # Under FSDP2 the root's own weights stay gathered through a step. One block adds its weights, its gradients and the buffers
    # of its all-gather and reduce-scatter.
    gathered = FLOAT * (2 * traced.root_parameters + 4 * traced.largest_block) if num_shards > 1 else 0
    return TrainingMemory(state, gathered + traced.peak_bytes)


def state_bytes(spec: TrainSpec, num_parameters: int, num_processes: int = 1) -> int:
    """Bytes of weights, moments and averages of one process, in memory and in its part of a training state on disk."""
    copies = 1 + ADAM_MOMENTS + len(spec.half_lives)
    return FLOAT * num_parameters * copies // (num_processes if spec.sharding == "fsdp" else 1)


@dataclass(frozen=True)
class _TracedPass:
    num_parameters: int
    root_parameters: int
    largest_block: int
    peak_bytes: int


@lru_cache(maxsize=64)
def _trace_pass(model: ModelSpec, rows: int, num_tokens: int, checkpointing: bool, dtype: str, num_shards: int) -> _TracedPass:
    with FakeTensorMode():
        network = build_network(model).train()
        if checkpointing:
            network.enable_gradient_checkpointing()
        x = torch.empty(rows, model.latent_channels + model.extra_input_channels, model.latent_size, model.latent_size)
        prompt_embeds = torch.empty(rows, num_tokens, model.cross_attention_dim)
        with ActivationTracker(num_shards, list(network.parameters())) as tracker:
            for parameter in network.parameters():
                parameter.register_post_accumulate_grad_hook(tracker.on_grad)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                loss = network(x, torch.zeros(rows), prompt_embeds).sample.float().square().mean()
            loss.backward()
        blocks = [sum(p.numel() for p in block.parameters()) for block in fsdp_blocks(network)]
        total = sum(parameter.numel() for parameter in network.parameters())
    return _TracedPass(total, total - sum(blocks), max(blocks), tracker.peak_bytes)


class ActivationTracker(TorchDispatchMode):
    """Track the bytes of live tensor storages and their peak."""

    def __init__(self, num_shards: int, excluded: list[nn.Parameter]) -> None:
        """
        Args:
            num_shards: processes over which gradients are sharded; one shard of each gradient is counted.
            excluded: tensors that are not counted, nor are their views.
        """
        super().__init__()
        self.num_shards = num_shards
        self.live_bytes = self.peak_bytes = 0
        self.tracked = {tensor.untyped_storage()._cdata for tensor in excluded}

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.tracked:
                    self.tracked.add(key)
                    self.live_bytes += size
                    self.peak_bytes = max(self.peak_bytes, self.live_bytes)
                    weakref.finalize(storage, self._free, key, size)
        return result

    def on_grad(self, parameter: Tensor) -> None:
        """Free a full gradient and count this process's shard of it, which stays until the step ends."""
        self.live_bytes += FLOAT * parameter.numel() // self.num_shards
        parameter.grad = None

    def _free(self, key: int, size: int) -> None:
        self.tracked.discard(key)
        self.live_bytes -= size
