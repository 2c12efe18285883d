"""GFLOP of the networks around the denoiser: text encoders and autoencoder.

They are counted as those of the denoiser (`flops.py`): on the meta device, from the configs alone. GFLOP are
2 x multiply-accumulates of matrix products, convolutions and attention.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from isocost.config.model import TextEncoderSpec
from isocost.config.sampling import VaeSpec
from isocost.errors import ConfigError
from isocost.models.autoencoder import PCA_FILE, DiffusersVAE, PCAAutoencoder, autoencoder_folder
from isocost.models.checkpoint import CheckpointInfo, CheckpointSource
from isocost.models.decoder_memory import autoencoder_on_meta
from isocost.models.pretrained.files import MODEL_INDEX, first_line, read_config
from isocost.models.pretrained.pipeline_config import clip_tokens_of, family_at, find_base_folder, text_encoder_classes
from isocost.models.pretrained.prompt_encoder import encoder_on_meta
from isocost.models.text_encoder import text_network_on_meta


@dataclass(frozen=True)
class ComponentCosts:
    """GFLOP of one image outside of the denoiser.

    Attributes:
        gflop_text: its prompt in all text encoders. The empty prompt of guidance is the same for all images and is not counted.
        gflop_encoder: the autoencoder's encoder: of the enlarged input in super-resolution, else 0.
        gflop_decoder: the autoencoder's decoder.
    """

    gflop_text: float
    gflop_encoder: float
    gflop_decoder: float

    @property
    def total(self) -> float:
        """GFLOP of all components."""
        return self.gflop_text + self.gflop_encoder + self.gflop_decoder


@dataclass(frozen=True)
class AutoencoderCost:
    """GFLOP of an autoencoder for one image."""

    encode_gflop: float
    decode_gflop: float


def count_gflop(function: Callable[..., Any], *arguments: Any, **options: Any) -> float:
    """Count the GFLOP of one call with tensors on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        function(*arguments, **options)
    return counter.get_total_flops() / 1e9


# --- autoencoders -----------------------------------------------------------------------------------------------------


def pca_autoencoder_cost(num_channels: int, resolution: int) -> AutoencoderCost:
    """Cost of a `PCAAutoencoder`, which is one matrix product in each direction."""
    gflop = 2 * num_channels * 3 * resolution**2 / 1e9
    return AutoencoderCost(gflop, gflop)


def autoencoder_cost(config: Mapping[str, Any], resolution: int, vae: VaeSpec | None = None) -> AutoencoderCost:
    """Cost of an autoencoder of diffusers.

    Args:
        config: content of its `config.json`.
        resolution: side of an image in pixels.
        vae: tiling, whose tiles overlap and so cost more.

    Raises:
        ConfigError: diffusers cannot build it, or it has no tiling.
    """
    return _autoencoder_cost(json.dumps(dict(config), sort_keys=True), resolution, None if vae is None else vae.tile_size)


@lru_cache(maxsize=64)
def _autoencoder_cost(config_json: str, resolution: int, tile_size: int | None) -> AutoencoderCost:
    network = autoencoder_on_meta(json.loads(config_json))
    autoencoder = DiffusersVAE(network, "meta", VaeSpec(tile_size=tile_size))
    latent_size = resolution // autoencoder.factor
    return AutoencoderCost(
        count_gflop(network.encode, torch.empty(1, 3, resolution, resolution, device="meta")),
        count_gflop(network.decode, torch.empty(1, autoencoder.latent_channels, latent_size, latent_size, device="meta")),
    )


@lru_cache(maxsize=64)
def autoencoder_cost_at(path: str, subfolder: str | None, resolution: int, vae: VaeSpec | None = None) -> AutoencoderCost:
    """Cost of the autoencoder that `load_autoencoder` would load, without its weights.

    Raises:
        ConfigError: the path holds no autoencoder.
    """
    folder = autoencoder_folder(path, subfolder)
    if (folder / PCA_FILE).is_file():
        return pca_autoencoder_cost(PCAAutoencoder.load(folder).latent_channels, resolution)
    return autoencoder_cost(read_config(folder / "config.json"), resolution, vae)


# --- text encoders ----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def text_encoder_gflop(spec: TextEncoderSpec) -> float:
    """GFLOP of one prompt in a text encoder of a model that isocost trained.

    Raises:
        ConfigError: the path holds no text encoder.
    """
    return _text_gflop(text_network_on_meta(spec), spec.max_tokens, spec.path)


def pipeline_text_gflop(info: CheckpointInfo) -> float:
    """GFLOP of one prompt in all text encoders of a published pipeline.

    Raises:
        ConfigError: the pipeline is not there, or transformers cannot build a text encoder from its config.
    """
    assert info.pretrained is not None, "checkpoints of isocost have a text encoder of their own"
    return _pipeline_text_gflop(info.pretrained.path, info.pretrained.max_tokens)


@lru_cache(maxsize=64)
def _pipeline_text_gflop(path: str, max_tokens: int) -> float:
    folder = find_base_folder(path)
    family = family_at(folder)
    total = 0.0
    for name, class_name in text_encoder_classes(family, read_config(folder / MODEL_INDEX), folder).items():
        is_t5 = class_name == "T5EncoderModel"
        num_tokens = max_tokens if is_t5 else clip_tokens_of(folder / name.replace("text_encoder", "tokenizer"))
        total += _text_gflop(encoder_on_meta(folder / name, class_name), num_tokens, str(folder))
    return total


def _text_gflop(network: nn.Module, num_tokens: int, source: str) -> float:
    try:
        return count_gflop(network, torch.empty(1, num_tokens, dtype=torch.long, device="meta"))
    except Exception as error:  # a tokenizer and an encoder that do not fit raise many kinds of errors
        raise ConfigError(f"{source}: its text encoders and tokenizers do not run: {first_line(error)}") from error


# --- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint_components(
    checkpoint: CheckpointSource, guide: CheckpointSource | None = None, vae: VaeSpec | None = None
) -> ComponentCosts:
    """Costs of the components of a checkpoint.

    Args:
        checkpoint: the checkpoint.
        guide: its guide, whose prompts are encoded again if it has text encoders of its own.
        vae: settings of the autoencoder.

    Raises:
        ConfigError: a component is not there, or its config does not run.
    """
    info = checkpoint.info
    if info.pretrained is not None:
        return pipeline_components(info, None if guide is None else guide.info, vae)
    cost = autoencoder_cost_at(checkpoint.autoencoder_path, info.autoencoder_subfolder, info.resolution, vae)
    text = text_encoder_gflop(checkpoint.text_encoder)
    if guide is not None and guide.text_encoder != checkpoint.text_encoder:
        text += text_encoder_gflop(guide.text_encoder)
    return ComponentCosts(text, cost.encode_gflop if info.scale is not None else 0.0, cost.decode_gflop)


def pipeline_components(
    info: CheckpointInfo, guide: CheckpointInfo | None = None, vae: VaeSpec | None = None
) -> ComponentCosts:
    """Costs of the components of a published pipeline; see `checkpoint_components`.

    Raises:
        ConfigError: the pipeline is not there, or the config of a component does not run.
    """
    assert info.pretrained is not None, "checkpoints of isocost name their components"
    folder = find_base_folder(info.pretrained.path)
    cost = autoencoder_cost_at(str(folder / "vae"), None, info.resolution, vae)
    text = pipeline_text_gflop(info) + (0.0 if guide is None else pipeline_text_gflop(guide))
    return ComponentCosts(text, 0.0, cost.decode_gflop)
