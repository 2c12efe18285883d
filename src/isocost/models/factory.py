"""A network of any kind by its spec, and what is done to one whatever its kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from isocost.config.model import FamilySpec, ModelSpec
from isocost.models.codi_unet import CoDiUNet
from isocost.models.dit import (
    GuidedTransformer,
    Transformer,
    build_dit,
    check_dit_width,
    embed_dit_guidance,
    expand_dit_in_channels,
)
from isocost.models.pretrained.wrappers import ConditionedDenoiser
from isocost.models.unet import build_unet, check_width, embed_guidance, expand_unet_in_channels, plain_config

Network: TypeAlias = UNet2DConditionModel | CoDiUNet | Transformer | GuidedTransformer
_CLASSES: dict[str, type[Network]] = {
    "UNet2DConditionModel": UNet2DConditionModel,
    "CoDiUNet": CoDiUNet,
    "PixArtTransformer2DModel": Transformer,
    "GuidedTransformer": GuidedTransformer,
}
NETWORK_FOLDERS = ("unet", "transformer")
"""Where a checkpoint's network may lie, as in diffusers' pipelines."""


def check_widths(family: FamilySpec) -> None:
    """Raise ConfigError for a width that the family's rule does not fit."""
    for width in family.widths:
        (check_width if family.kind == "unet" else check_dit_width)(width)


def build_network(spec: ModelSpec, device: str | torch.device = "cpu") -> Network:
    """Random weights; on device "meta" it takes no memory.

    Raises:
        ConfigError: the width or the latent side does not fit the family.
    """
    if spec.kind == "dit":
        return build_dit(spec, device)
    unet = build_unet(spec, device)
    if spec.adapter == "none":
        return unet
    with torch.device(device):
        return CoDiUNet(plain_config(unet), spec.adapter)


def read_network(folder: Path) -> Network:
    """The network of a diffusers folder; what it raises says what is wrong with the folder."""
    name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    if name not in _CLASSES:
        raise ValueError(f"config.json names the class {name}; known: {', '.join(_CLASSES)}")
    return _CLASSES[name].from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)


def write_config(network: Network, folder: Path) -> None:
    """Write `config.json` into a new `folder`.

    It names the class that opens it: diffusers' own where there is one, whatever FSDP2 has made of the network's.
    """
    name = next(name for name, kind in _CLASSES.items() if isinstance(network, kind))
    config = json.loads(network.to_json_string()) | {"_class_name": name}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def component_name(network: nn.Module) -> str:
    """Which of `NETWORK_FOLDERS` is the network's."""
    return "transformer" if isinstance(network, Transformer | GuidedTransformer) else "unet"


def expand_in_channels(network: Network, num_channels: int) -> Network:
    """The network with `num_channels` further input channels that it does not look at yet: their weights are zero."""
    if isinstance(network, Transformer):
        return expand_dit_in_channels(network, num_channels)
    assert isinstance(network, UNet2DConditionModel), "adapted networks and students are not widened"
    return expand_unet_in_channels(network, num_channels)


def with_guidance(network: Network, width: int) -> Network:
    """A copy that takes an embedding of the guidance [B, width] beside the timestep, and does not look at it yet."""
    if isinstance(network, Transformer):
        return embed_dit_guidance(network, width)
    assert isinstance(network, UNet2DConditionModel), "adapted networks and students are not distilled again"
    return embed_guidance(network, width)


def guidance_embed_dim(network: nn.Module) -> int | None:
    """Width of the guidance embedding that a network takes; None where it takes none."""
    if isinstance(network, ConditionedDenoiser):
        return network.guidance_embed_dim
    config: Any = network.config
    if isinstance(network, CoDiUNet):
        return config.unet_config["time_cond_proj_dim"]
    return config.get("guidance_embed_dim" if component_name(network) == "transformer" else "time_cond_proj_dim")
