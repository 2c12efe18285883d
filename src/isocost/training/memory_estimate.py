"""Memory that a training takes in each process, known without taking it.

Weights, gradients, moments and averages are counted; what forward and backward hold at their peak is found by running both on
tensors without numbers (PyTorch's fake tensors), with the kernels that the device would choose.

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
from isocost.training.distributed import blocks_of

FLOAT = 4
ADAM_MOMENTS = 2


@dataclass(frozen=True)
class Memory:
    """Bytes of one process. `state` is what stays between steps, `step` what a step adds to it at its peak."""

    state: int
    step: int

    @property
    def total(self) -> int:
        return self.state + self.step


def training_memory(model: ModelSpec, spec: TrainSpec, microbatch: int, num_tokens: int, num_processes: int = 1) -> Memory:
    """Memory of each of `num_processes` processes that take `microbatch` rows through the network at once."""
    shares = num_processes if spec.sharding == "fsdp" else 1
    about = _one_pass(model, microbatch, num_tokens, spec.gradient_checkpointing, spec.dtype, shares)
    state = state_bytes(spec, about.num_parameters, num_processes)
    # Under FSDP2 the root's own weights stay gathered through a step; beside them stand a block with its gradients and the
    # buffers of its all-gather and reduce-scatter.
    gathered = FLOAT * (2 * about.root_parameters + 4 * about.largest_block) if shares > 1 else 0
    return Memory(state, gathered + about.peak)


def state_bytes(spec: TrainSpec, num_parameters: int, num_processes: int = 1) -> int:
    """Weights, moments and averages of one process: in memory, and of its share of a state on disk."""
    copies = 1 + ADAM_MOMENTS + len(spec.half_lives)
    return FLOAT * num_parameters * copies // (num_processes if spec.sharding == "fsdp" else 1)


@dataclass(frozen=True)
class _Pass:
    num_parameters: int
    root_parameters: int
    largest_block: int
    peak: int


@lru_cache(maxsize=64)
def _one_pass(model: ModelSpec, rows: int, num_tokens: int, checkpointing: bool, dtype: str, shares: int) -> _Pass:
    with FakeTensorMode():
        network = build_network(model).train()
        if checkpointing:
            network.enable_gradient_checkpointing()
        x = torch.empty(rows, model.latent_channels + model.extra_input_channels, model.latent_size, model.latent_size)
        states = torch.empty(rows, num_tokens, model.cross_attention_dim)
        with ActivationTracker(shares, list(network.parameters())) as live:
            for parameter in network.parameters():
                parameter.register_post_accumulate_grad_hook(live.on_grad)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                loss = network(x, torch.zeros(rows), states).sample.float().square().mean()
            loss.backward()
        blocks = [sum(p.numel() for p in block.parameters()) for block in blocks_of(network)]
        total = sum(parameter.numel() for parameter in network.parameters())
    return _Pass(total, total - sum(blocks), max(blocks), live.peak)


class ActivationTracker(TorchDispatchMode):
    """Bytes of the storages that are made and still held, and the most there ever were; of gradients one of `shares`."""

    def __init__(self, shares: int, apart: list[nn.Parameter]) -> None:
        """`apart` is not counted, nor are views of it."""
        super().__init__()
        self.shares = shares
        self.live = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in apart}

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known:
                    self.known.add(key)
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._free, key, size)
        return made

    def on_grad(self, parameter: Tensor) -> None:
        """Let a whole gradient go and count this process's share of it, which stays until the step ends."""
        self.live += FLOAT * parameter.numel() // self.shares
        parameter.grad = None

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size
