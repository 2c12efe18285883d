"""Record a training step on a CUDA device as a CUDA graph and replay it in a single launch.

The kernels of a small network take less time than their separate launches, most of all in the backward pass and the optimizer.
The batch and the learning rate change from step to step; they are copied into the memory that the graph was recorded with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor

from isocost.training.objectives import Batch

NUM_WARMUP_PASSES = 3
"""Ordinary passes before the step is recorded: libraries choose kernels and allocate workspaces in the first passes."""


class CudaGraphStep:
    """Loss, gradients, gradient clipping and optimizer step of a batch, replayed from a CUDA graph.

    From now on the optimizer's moments must stay in the same memory, so a training state must be restored before.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        compute_gradients: Callable[[Batch], Tensor],
        optimizer_step: Callable[[Batch], Tensor],
        batch: Batch,
    ) -> None:
        """
        Args:
            compute_gradients: computes fresh gradients of a batch; returns the loss.
            optimizer_step: the whole step on a batch; returns the loss.
            batch: an example; all later batches have its shapes.
        """
        self.lr = torch.zeros((), device=batch.noisy.device)
        for group in optimizer.param_groups:
            group["lr"], group["capturable"] = self.lr, True
        _init_moments(optimizer)
        self.batch = replace(batch, **{column.name: getattr(batch, column.name).clone() for column in fields(batch)})
        current_stream, warmup_stream = torch.cuda.current_stream(), torch.cuda.Stream()
        warmup_stream.wait_stream(current_stream)
        with torch.cuda.stream(warmup_stream):
            for _ in range(NUM_WARMUP_PASSES):
                compute_gradients(self.batch)
        current_stream.wait_stream(warmup_stream)
        optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = optimizer_step(self.batch)

    def __call__(self, batch: Batch, lr: float) -> Tensor:
        """Take a step on a batch at a learning rate; returns the loss, a scalar on the device."""
        for column in fields(batch):
            getattr(self.batch, column.name).copy_(getattr(batch, column.name), non_blocking=True)
        self.lr.fill_(lr)
        self.graph.replay()
        return self.loss.clone()


def _init_moments(optimizer: torch.optim.Optimizer) -> None:
    """Create zero moments if there are none yet: moments created while recording would be reset in every replay."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if optimizer.state:
        return
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # the learning rate is 0
    for parameter in parameters:
        for value in optimizer.state[parameter].values():
            value.zero_()
