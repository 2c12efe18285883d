"""A step of training on a CUDA device as a recorded graph of kernels (CUDA graph), played back in one launch.

A small network's kernels take less time than launching them one by one, most of all backwards and in the optimizer. What
changes from step to step - the batch, the learning rate - is copied to where it was when the step was recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor

from isocost.training.objectives import Batch

WARM_UPS = 3
"""Plain passes before the step is recorded: libraries choose kernels and take workspaces in the first ones."""


class CudaGraphStep:
    """Loss, gradients, clipping and the optimizer's step of a batch, played back.

    The optimizer's moments must stay where they are from now on: a state that is to be restored is restored before.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        gradients: Callable[[Batch], Tensor],
        learn: Callable[[Batch], Tensor],
        batch: Batch,
    ) -> None:
        """
        Args:
            gradients: from a batch to fresh gradients; returns the loss.
            learn: the whole step; returns the loss.
            batch: of the shapes that all batches have.
        """
        self.rate = torch.zeros((), device=batch.noisy.device)
        for group in optimizer.param_groups:
            group["lr"], group["capturable"] = self.rate, True
        _make_moments(optimizer)
        self.batch = replace(batch, **{column.name: getattr(batch, column.name).clone() for column in fields(batch)})
        here, beside = torch.cuda.current_stream(), torch.cuda.Stream()
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                gradients(self.batch)
        here.wait_stream(beside)
        optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = learn(self.batch)

    def __call__(self, batch: Batch, rate: float) -> Tensor:
        """One step on a batch at a learning rate; returns the loss, on the device."""
        for column in fields(batch):
            getattr(self.batch, column.name).copy_(getattr(batch, column.name), non_blocking=True)
        self.rate.fill_(rate)
        self.graph.replay()
        return self.loss.clone()


def _make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Moments of zero where there are none yet: those that were made while recording would be made anew in every step."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if optimizer.state:
        return
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # the learning rate is 0
    for parameter in parameters:
        for value in optimizer.state[parameter].values():
            value.zero_()
