"""Memory of networks, counted on the meta device, which needs no memory and no weights.

The count is that of the tensors that exist at the same time. Work memory inside an operation (of a convolution, for example),
the cache of an allocator and the libraries themselves are not in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _FusedAttention(TorchFunctionMode):
    """Attention as one operation, as on every device that samples: the meta device has a matrix of all pairs in between."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        names = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        query, value = names["query"], names["value"]
        return query.new_empty(*query.shape[:-1], value.shape[-1])


class _LiveBytes(TorchDispatchMode):
    """Sums the bytes of the tensors that operations return, until nothing refers to them any more."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        self.peak = max(self.peak, self.live)
        return output

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._storages:
            return
        self._storages.add(storage._cdata)
        self.live += storage.nbytes()
        weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, storage: int, num_bytes: int) -> None:
        self._storages.discard(storage)
        self.live -= num_bytes


def activation_bytes(network: nn.Module, function: Callable[..., Any], *arguments: Tensor, **options: Any) -> int:
    """Largest sum of bytes of the tensors that exist during a call, without the weights and the arguments.

    Args:
        network: the network on the meta device, whose weights are not counted.
        function: runs the network.
        *arguments: on the meta device.
        **options: further arguments, on the meta device where they are tensors.
    """
    given = [value for value in (*arguments, *options.values()) if isinstance(value, Tensor)]
    counter = _LiveBytes([*network.parameters(), *network.buffers(), *given])
    with torch.no_grad(), torch.device("meta"), _FusedAttention(), counter:
        function(*arguments, **options)
    return counter.peak


def weight_bytes(network: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the parameters of a network in a dtype."""
    return sum(parameter.numel() for parameter in network.parameters()) * dtype.itemsize
