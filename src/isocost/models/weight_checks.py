"""Checks of loaded weights, the same for every part of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isocost.errors import ConfigError


def check_loaded(network: nn.Module, loading_info: Mapping[str, Any], source: str | Path) -> None:
    """Check a network after `from_pretrained(..., output_loading_info=True)`.

    Args:
        network: the loaded network.
        loading_info: the second value that `from_pretrained` returned.
        source: folder or Hub id, for messages.

    Raises:
        ConfigError: a weight is missing, has another shape, or is NaN or infinite.
    """
    problems = sorted(loading_info["missing_keys"]) + [str(key) for key in loading_info.get("mismatched_keys", ())]
    if problems:
        raise ConfigError(f"{source}: {len(problems)} weights are missing or have another shape; the first is {problems[0]}")
    check_finite(network.state_dict(), source)


def check_finite(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Check the values of weights.

    Raises:
        ConfigError: a weight is NaN or infinite.
    """
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())]
    if bad:
        raise ConfigError(
            f"{source}: {len(bad)} of {len(tensors)} weights contain NaN or inf, the first is {bad[0]}; "
            "download the file again, or use another one"
        )
