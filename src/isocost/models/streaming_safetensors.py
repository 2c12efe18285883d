"""Write safetensors files one tensor at a time, so that the tensors need not fit into memory together.

The format: 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, then the values in that order.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}

TensorLayout = list[tuple[str, torch.dtype, tuple[int, ...]]]
"""Name, type and shape of every tensor of a file, in file order."""


def write_streamed(
    path: Path, layout: TensorLayout, tensors: Iterable[Tensor], metadata: dict[str, str] | None = None
) -> dict[str, int]:
    """Write a safetensors file and flush it to disk.

    Args:
        path: file to write.
        layout: name, type and shape of every tensor.
        tensors: the tensors in the order of `layout`, from any device.
        metadata: the `__metadata__` field of the header.

    Returns:
        {"bytes", "crc32"} of the file.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, dtype, shape in layout:
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    total, crc = 0, 0
    with path.open("wb") as file:
        for block in (len(text).to_bytes(8, "little"), text):
            crc = zlib.crc32(block, crc)
            total += file.write(block)
        for (name, dtype, shape), tensor in zip(layout, tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, tuple(shape)), name
            values = raw_bytes(tensor)
            crc = zlib.crc32(values, crc)
            total += file.write(values)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": total, "crc32": crc}


def raw_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor as bytes in C order."""
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def file_crc32(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc
