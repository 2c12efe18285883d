"""Memory of decoding with an autoencoder of diffusers, counted on the meta device from its config (`memory.py`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from isocost.config.sampling import VaeSpec
from isocost.errors import ConfigError
from isocost.models.autoencoder import DTYPES, DiffusersVAE
from isocost.models.memory import activation_bytes
from isocost.models.pretrained.files import first_line


def autoencoder_on_meta(config: Mapping[str, Any]) -> AutoencoderKL | AutoencoderTiny:
    """Build an autoencoder of diffusers on the meta device.

    Args:
        config: content of its `config.json`.

    Raises:
        ConfigError: diffusers cannot build it.
    """
    network_class: Any = AutoencoderTiny if config.get("_class_name") == "AutoencoderTiny" else AutoencoderKL
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        with torch.device("meta"):
            network: AutoencoderKL | AutoencoderTiny = network_class.from_config(arguments)
    except Exception as error:  # diffusers raises many kinds of errors for a wrong config
        raise ConfigError(f"diffusers cannot build the autoencoder from its config: {first_line(error)}") from error
    return network


def decoder_bytes(config: Mapping[str, Any], resolution: int, num_images: int = 1, vae: VaeSpec | None = None) -> int:
    """Largest memory of the activations while images are decoded in one call.

    Args:
        config: content of the `config.json` of an autoencoder of diffusers.
        resolution: side of an image in pixels.
        num_images: images of the call.
        vae: dtype, tiling and slicing.
    """
    return _decoder_bytes(json.dumps(dict(config), sort_keys=True), resolution, num_images, vae or VaeSpec())


@lru_cache(maxsize=64)
def _decoder_bytes(config_json: str, resolution: int, num_images: int, vae: VaeSpec) -> int:
    autoencoder = DiffusersVAE(autoencoder_on_meta(json.loads(config_json)), "meta", vae)
    side = resolution // autoencoder.factor
    latents = torch.empty(num_images, autoencoder.latent_channels, side, side, device="meta", dtype=DTYPES[vae.dtype])
    return activation_bytes(autoencoder.network, autoencoder.network.decode, latents)
