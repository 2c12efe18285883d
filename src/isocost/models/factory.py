"""Build, load and extend networks of any kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from isocost.config.model import FamilySpec, ModelSpec
from isocost.errors import ConfigError
from isocost.models.codi_unet import CoDiUNet
from isocost.models.dit import (
    DiT,
    GuidedTransformer,
    add_dit_guidance_embedding,
    build_dit,
    check_dit_width,
    expand_dit_in_channels,
)
from isocost.models.pretrained.files import load_module, read_config
from isocost.models.pretrained.wrappers import ConditionedDenoiser
from isocost.models.unet import add_unet_guidance_embedding, build_unet, check_width, expand_unet_in_channels, init_config

Network: TypeAlias = UNet2DConditionModel | CoDiUNet | DiT | GuidedTransformer
_CLASSES: dict[str, type[Network]] = {
    "UNet2DConditionModel": UNet2DConditionModel,
    "CoDiUNet": CoDiUNet,
    "PixArtTransformer2DModel": DiT,
    "GuidedTransformer": GuidedTransformer,
}
NETWORK_FOLDERS = ("unet", "transformer")
"""Folders of a checkpoint that may hold the network, as in diffusers' pipelines."""


def check_widths(family: FamilySpec) -> None:
    """
    Raises:
        ConfigError: a width does not fit the family.
    """
    for width in family.widths:
        (check_width if family.kind == "unet" else check_dit_width)(width)


def build_network(spec: ModelSpec, device: str | torch.device = "cpu") -> Network:
    """Build the network of a spec with random weights; on device "meta" it takes no memory.

    Raises:
        ConfigError: the width or the latent size does not fit the family.
    """
    if spec.kind == "dit":
        return build_dit(spec, device)
    unet = build_unet(spec, device)
    if spec.adapter == "none":
        return unet
    with torch.device(device):
        return CoDiUNet(init_config(unet), spec.adapter)


def read_network(folder: Path, dtype: torch.dtype = torch.float32) -> Network:
    """Load the network of a checkpoint folder that isocost wrote, with weights of a dtype.

    Raises:
        ConfigError: the class in `config.json` is unknown, or the weights are missing, damaged, NaN or infinite.
    """
    name = read_config(folder / "config.json").get("_class_name")
    if name not in _CLASSES:
        raise ConfigError(f"{folder / 'config.json'}: _class_name = {name}: supported classes: {', '.join(_CLASSES)}")
    network: Network = load_module(_CLASSES[name], folder, dtype)
    return network


def write_config(network: Network, folder: Path) -> None:
    """Write `config.json` into a new `folder`.

    It names the class that loads it, which is diffusers' own class if there is one. FSDP2 replaces the class of a network, so
    the class name of `network` itself cannot be used.
    """
    name = next(name for name, network_class in _CLASSES.items() if isinstance(network, network_class))
    config = json.loads(network.to_json_string()) | {"_class_name": name}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def component_name(network: nn.Module) -> str:
    """Folder of a network in a checkpoint, one of `NETWORK_FOLDERS`."""
    return "transformer" if isinstance(network, DiT | GuidedTransformer) else "unet"


def expand_in_channels(network: Network, num_channels: int) -> Network:
    """Add `num_channels` input channels in place; their weights are zero, so the output is unchanged."""
    if isinstance(network, DiT):
        return expand_dit_in_channels(network, num_channels)
    assert isinstance(network, UNet2DConditionModel), "CoDi networks and students are never expanded"
    return expand_unet_in_channels(network, num_channels)


def add_guidance_embedding(network: Network, width: int) -> Network:
    """Copy a network and add a guidance embedding [B, width] as an input; its weights are zero at first."""
    if isinstance(network, DiT):
        return add_dit_guidance_embedding(network, width)
    assert isinstance(network, UNet2DConditionModel), "CoDi networks and students are never distilled again"
    return add_unet_guidance_embedding(network, width)


def guidance_embed_dim(network: nn.Module) -> int | None:
    """Width of the guidance embedding of a network; None if guidance is not an input of the network."""
    if isinstance(network, ConditionedDenoiser):
        return network.guidance_embed_dim
    config: Any = network.config
    if isinstance(network, CoDiUNet):
        return config.unet_config["time_cond_proj_dim"]
    return config.get("guidance_embed_dim" if component_name(network) == "transformer" else "time_cond_proj_dim")
