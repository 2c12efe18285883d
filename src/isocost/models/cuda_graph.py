"""A network's forward pass on a CUDA device as a recorded graph of kernels (CUDA graph), played back in one launch.

A small network's kernels take less time than launching them one by one. The kernels, and so the bits, are those of a plain
call; inputs are copied to where they were when the graph was recorded, so shapes must recur.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

WARM_UPS = 3
"""Plain passes before one is recorded: libraries choose kernels and take workspaces in the first ones."""

Shape = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


class CudaGraphModule:
    """A network's forward pass without gradients, played back; a set of shapes that is new takes a few passes to record."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.recorded: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __call__(self, *inputs: Tensor, **named: Tensor) -> UNet2DConditionOutput:
        """The network's output for tensors on its device; the caller's to keep."""
        tensors = [*inputs, *named.values()]
        shapes = (*map(_shape, tensors), *named)
        if shapes not in self.recorded:
            self.recorded[shapes] = self._record(tensors, len(inputs), tuple(named))
        graph, places, output = self.recorded[shapes]
        torch._foreach_copy_(places, tensors)
        graph.replay()
        return UNet2DConditionOutput(sample=output.clone())

    def _record(
        self, tensors: list[Tensor], num_inputs: int, names: tuple[str, ...]
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        places = [tensor.clone() for tensor in tensors]
        named = dict(zip(names, places[num_inputs:], strict=True))
        here, beside = torch.cuda.current_stream(), torch.cuda.Stream()
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                self.network(*places[:num_inputs], **named)
        here.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # Other threads decode and measure meanwhile; what they call is none of this graph's business.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = self.network(*places[:num_inputs], **named).sample
        return graph, places, output


def _shape(tensor: Tensor) -> Shape:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype
