"""Checks of loaded weights, the same for every part of a checkpoint."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isocost.errors import ConfigError

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Floating-point types in the header of a safetensors file."""
_CHUNK_BYTES = 2**22


def check_loaded(
    network: nn.Module, loading_info: Mapping[str, Any], source: str | Path, files: Sequence[Path] | None = None
) -> None:
    """Check a network after `from_pretrained(..., output_loading_info=True)`.

    Args:
        network: the loaded network.
        loading_info: the second value that `from_pretrained` returned.
        source: folder or Hub id, for messages.
        files: the safetensors files that the network was read from. Their values are then read piece by piece. The weights of
            a network are pages of its file until they are used, so parts that are never used never take memory.

    Raises:
        ConfigError: a weight is missing, has another shape, or is NaN or infinite.
    """
    problems = sorted(loading_info["missing_keys"]) + [str(key) for key in loading_info.get("mismatched_keys", ())]
    if problems:
        raise ConfigError(f"{source}: {len(problems)} weights are missing or have another shape; the first is {problems[0]}")
    if files is None:
        check_finite(network.state_dict(), source)
    else:
        unused = set(loading_info.get("unexpected_keys", ()))
        finite = {name: is_finite for file in files for name, is_finite in _finite_weights(file) if name not in unused}
        _refuse_nonfinite([name for name, is_finite in finite.items() if not is_finite], len(finite), source)


def _finite_weights(file: Path) -> Iterator[tuple[str, bool]]:
    """Names of the weights of a complete safetensors file, and whether all their values are finite."""
    buffer = bytearray(_CHUNK_BYTES)
    with file.open("rb", buffering=0) as opened:
        (header_bytes,) = struct.unpack("<Q", opened.read(8))
        header: dict[str, Any] = json.loads(opened.read(header_bytes))
        header.pop("__metadata__", None)
        for name, tensor in sorted(header.items(), key=lambda item: int(item[1]["data_offsets"][0])):
            start, stop = tensor["data_offsets"]
            dtype = _FLOATS.get(tensor["dtype"])
            opened.seek(8 + header_bytes + start)
            is_finite = True
            left = stop - start if dtype is not None else 0
            while left and is_finite and dtype is not None:
                num_bytes = min(left, _CHUNK_BYTES)
                _read_into(opened, memoryview(buffer)[:num_bytes])
                values = torch.frombuffer(buffer, dtype=dtype, count=num_bytes // dtype.itemsize)
                is_finite = bool(torch.isfinite(values).all())
                left -= num_bytes
            yield name, is_finite


def _read_into(file: Any, view: memoryview) -> None:
    while len(view):
        num_bytes = file.readinto(view)
        if not num_bytes:
            raise ConfigError(f"{file.name}: truncated while it was read; get the file again")
        view = view[num_bytes:]


def check_finite(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Check the values of weights.

    Raises:
        ConfigError: a weight is NaN or infinite.
    """
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())]
    _refuse_nonfinite(bad, len(tensors), source)


def _refuse_nonfinite(bad: Sequence[str], num_weights: int, source: str | Path) -> None:
    if bad:
        raise ConfigError(
            f"{source}: {len(bad)} of {num_weights} weights contain NaN or inf, the first is {bad[0]}; "
            "download the file again, or use another one"
        )
