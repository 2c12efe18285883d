"""Training states and EMA: what a training needs to go on exactly where it stood.

A state is a folder `state-<images>/` of safetensors, published whole; the one before goes only after the new one is durable.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isocost.errors import WorkError
from isocost.store import publish

_RAMP = 0.1


class Ema:
    """Exponential moving average of a network's parameters, with the half-life in images.

    While few images were seen the half-life is a tenth of them (the ramp-up of EDM2, arXiv 2312.02696, with 0.1).
    """

    def __init__(self, network: nn.Module, half_life_images: int) -> None:
        self.parameters = [parameter.detach().clone() for parameter in network.parameters()]
        self.half_life_images = half_life_images

    def update(self, network: nn.Module, images_seen: int, batch_size: int) -> None:
        """Move towards the network's weights after a step of `batch_size` images."""
        half_life = max(min(self.half_life_images, images_seen * _RAMP), 1e-8)
        torch._foreach_lerp_(self.parameters, [p.detach() for p in network.parameters()], 1 - 0.5 ** (batch_size / half_life))

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        """Put the averaged weights into a network of the same architecture."""
        torch._foreach_copy_(list(network.parameters()), self.parameters)


def save_state(run: Path, images_seen: int, network: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer) -> None:
    """Make a state durable, then remove the older ones."""
    partial = run / f".state-{images_seen}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, partial / "network.safetensors")
    save_file({str(i): tensor.contiguous() for i, tensor in enumerate(ema.parameters)}, partial / "ema.safetensors")
    save_file(_flatten(optimizer), partial / "optimizer.safetensors")
    final = _state_folder(run, images_seen)
    publish(partial, final, {"kind": "state", "images_seen": images_seen})
    for other in run.glob("state-*"):
        if other != final:
            shutil.rmtree(other)


def load_state(run: Path, network: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer) -> int:
    """Restore the newest whole state into the given objects; returns the images seen, 0 where there is no state.

    Raises:
        WorkError: a published state does not read back.
    """
    for leftover in run.glob(".state-*"):
        shutil.rmtree(leftover)
    states = sorted(run.glob("state-*"))
    if not states:
        return 0
    newest = states[-1]
    try:
        network.load_state_dict(load_file(newest / "network.safetensors"))
        averaged = load_file(newest / "ema.safetensors")
        torch._foreach_copy_(ema.parameters, [averaged[str(i)] for i in range(len(averaged))])
        _unflatten(optimizer, load_file(newest / "optimizer.safetensors"))
        images_seen = json.loads((newest / "isocost.json").read_text())["images_seen"]
    except (OSError, RuntimeError, KeyError, ValueError, SafetensorError) as error:
        raise WorkError(
            f"{newest}: the training state does not read back ({error}); remove it to train from the start"
        ) from error
    return int(images_seen)


def newest_state(run: Path) -> int:
    """Images seen at the newest whole state in the folder `run`; 0 where there is none."""
    states = sorted(run.glob("state-*"))
    return int(states[-1].name.removeprefix("state-")) if states else 0


def _state_folder(run: Path, images_seen: int) -> Path:
    return run / f"state-{images_seen:012d}"


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    states = optimizer.state_dict()["state"]
    return {f"{number}.{key}": tensor.contiguous() for number, state in states.items() for key, tensor in state.items()}


def _unflatten(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    # A fused optimizer walks parameter and state in memory order, so a state must be laid out as its parameter is.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    plain = optimizer.state_dict()
    plain["state"] = {}
    for name, tensor in tensors.items():
        number, key = name.split(".")
        parameter = parameters[int(number)]
        alike = torch.empty_like(parameter).copy_(tensor) if tensor.shape == parameter.shape else tensor
        plain["state"].setdefault(int(number), {})[key] = alike.detach()
    optimizer.load_state_dict(plain)
