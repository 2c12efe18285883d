"""Record the forward pass of a network on a CUDA device as a CUDA graph, and replay it in one launch.

Kernels of a small network take less time than their launches. The graph runs the same kernels as a plain call, so results are
equal to the bit. Inputs are copied into the buffers that were used while recording, so shapes must recur.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

WARM_UPS = 3
"""Plain passes before the recorded one: libraries choose kernels and allocate workspaces in the first passes."""

Shape = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Size, strides and type of a tensor."""


class CudaGraphModule:
    """A network whose forward pass, without gradients, is replayed; each new set of input shapes is recorded first."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.recorded: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __call__(self, *inputs: Tensor, **named: Tensor) -> UNet2DConditionOutput:
        """Output of the network for tensors on its device; the result is a copy that the caller owns."""
        tensors = [*inputs, *named.values()]
        shapes = (*map(_shape, tensors), *named)
        if shapes not in self.recorded:
            self.recorded[shapes] = self._record(tensors, len(inputs), tuple(named))
        graph, buffers, output = self.recorded[shapes]
        torch._foreach_copy_(buffers, tensors)
        graph.replay()
        return UNet2DConditionOutput(sample=output.clone())

    def _record(
        self, tensors: list[Tensor], num_inputs: int, names: tuple[str, ...]
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        buffers = [tensor.clone() for tensor in tensors]
        named = dict(zip(names, buffers[num_inputs:], strict=True))
        current_stream, warm_up_stream = torch.cuda.current_stream(), torch.cuda.Stream()
        warm_up_stream.wait_stream(current_stream)
        with torch.cuda.stream(warm_up_stream):
            for _ in range(WARM_UPS):
                self.network(*buffers[:num_inputs], **named)
        current_stream.wait_stream(warm_up_stream)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads decode and score images meanwhile, and their CUDA calls must not abort the capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = self.network(*buffers[:num_inputs], **named).sample
        return graph, buffers, output


def _shape(tensor: Tensor) -> Shape:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype
