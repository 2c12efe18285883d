"""Read safetensors files of artefacts."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from isocost.errors import RunError
from isocost.utils.artifact_store import remedy


def read_tensors(file: Path, *names: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read all tensors of a file of an artefact.

    Args:
        file: a safetensors file in the folder of an artefact.
        names: tensors that it must have.
        device: where to load them.

    Raises:
        RunError: the file is missing, truncated or damaged, or a tensor is missing; the message names the remedy.
    """
    try:
        tensors = load_file(file, device=str(device))
    except FileNotFoundError as error:
        raise RunError(f"{file}: missing; {remedy(file.parent)}") from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise RunError(f"{file}: damaged ({reason}); {remedy(file.parent)}") from error
    missing = [name for name in names if name not in tensors]
    if missing:
        raise RunError(f"{file}: has no tensor {missing[0]}, so it is damaged; {remedy(file.parent)}")
    return tensors
