"""Read safetensors files of artefacts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from isocost.errors import RunError
from isocost.utils.artifact_store import remedy

T = TypeVar("T")


def read_tensors(file: Path, *names: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read all tensors of a file of an artefact.

    Args:
        file: a safetensors file in the folder of an artefact.
        names: tensors that it must have.
        device: where to load them.

    Raises:
        RunError: the file is missing, truncated or damaged, or a tensor is missing; the message names the remedy.
    """
    tensors: dict[str, Tensor] = _read(file, lambda: load_file(file, device=str(device)))
    missing = [name for name in names if name not in tensors]
    if missing:
        raise RunError(f"{file}: has no tensor {missing[0]}, so it is damaged; {remedy(file.parent)}")
    return tensors


def read_metadata(file: Path) -> dict[str, str]:
    """Read the metadata of a file of an artefact.

    Raises:
        RunError: the file is missing, truncated or damaged.
    """

    def read() -> dict[str, str]:
        with safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {})

    return _read(file, read)


def _read(file: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except FileNotFoundError as error:
        raise RunError(f"{file}: missing; {remedy(file.parent)}") from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise RunError(f"{file}: damaged ({reason}); {remedy(file.parent)}") from error
