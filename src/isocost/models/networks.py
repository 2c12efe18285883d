"""A network of any kind by its spec."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeAlias

import torch
from diffusers import UNet2DConditionModel

from isocost.models.adapted import AdaptedUNet
from isocost.models.unet import build_unet, plain_config
from isocost.stages import ModelSpec

Network: TypeAlias = UNet2DConditionModel | AdaptedUNet


def build_network(spec: ModelSpec, device: str | torch.device = "cpu") -> Network:
    """Random weights; on device "meta" it takes no memory.

    Raises:
        RequestError: the width or the latent side does not fit the family.
    """
    unet = build_unet(spec, device)
    if spec.adapter == "none":
        return unet
    with torch.device(device):
        return AdaptedUNet(plain_config(unet), spec.adapter)


def read_network(folder: Path) -> Network:
    """The network of a diffusers folder; what it raises says what is wrong with the folder."""
    name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    kinds: dict[str, type[Network]] = {"UNet2DConditionModel": UNet2DConditionModel, "AdaptedUNet": AdaptedUNet}
    if name not in kinds:
        raise ValueError(f"config.json names the class {name}; known: {', '.join(kinds)}")
    return kinds[name].from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)
