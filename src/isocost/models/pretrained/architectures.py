"""One adapter a kind: which pipelines it reads, its network out of the denoiser's configuration, and what it refuses.

Shapes: C latent channels, L latent side, T tokens, D width of the prompt embeddings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from isocost.config.pretrained import FamilyName
from isocost.errors import ConfigError
from isocost.models.pretrained.files import load_module, read_config
from isocost.models.pretrained.lora import Lora, check_loras, fuse_loras
from isocost.models.pretrained.wrappers import (
    FLUX_PATCH,
    ConditionedDenoiser,
    FluxNetwork,
    PixArtNetwork,
    SD3Network,
    SDXLNetwork,
)

Wrap = Callable[[Any, int], nn.Module]


@dataclass(frozen=True)
class Kind:
    """An adapter.

    Attributes:
        pipelines: classes of `model_index.json`.
        part: the folder of the denoiser.
        classes: what the denoiser's configuration may call it.
        model: diffusers' class that reads it.
        wrap: (denoiser, resolution) -> the network as it is called here.
        encoders: folders of the text encoders and their classes; those with an asterisk may be absent.
        context: the field that says how wide the prompt embeddings are.
        max_tokens: of a caption; None is the tokenizer's own.
    """

    name: FamilyName
    pipelines: tuple[str, ...]
    part: str
    classes: tuple[str, ...]
    model: type[nn.Module]
    wrap: Wrap
    encoders: Mapping[str, str]
    context: str
    max_tokens: int | None = None


_CLIP, _PROJECTED, _T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
_PIXART = Kind(
    "pixart",
    ("PixArtAlphaPipeline",),
    "transformer",
    ("PixArtTransformer2DModel", "Transformer2DModel"),
    PixArtTransformer2DModel,
    PixArtNetwork,
    {"text_encoder": _T5},
    "caption_channels",
    120,
)

FAMILIES = (
    Kind(
        "sd",
        ("StableDiffusionPipeline", "LatentConsistencyModelPipeline"),
        "unet",
        ("UNet2DConditionModel",),
        UNet2DConditionModel,
        lambda unet, _: unet,
        {"text_encoder": _CLIP},
        "cross_attention_dim",
    ),
    Kind(
        "sdxl",
        ("StableDiffusionXLPipeline",),
        "unet",
        ("UNet2DConditionModel",),
        UNet2DConditionModel,
        SDXLNetwork,
        {"text_encoder": _CLIP, "text_encoder_2": _PROJECTED},
        "cross_attention_dim",
    ),
    _PIXART,
    replace(_PIXART, pipelines=("PixArtSigmaPipeline",), max_tokens=300),
    Kind(
        "sd3",
        ("StableDiffusion3Pipeline",),
        "transformer",
        ("SD3Transformer2DModel",),
        SD3Transformer2DModel,
        lambda transformer, _: SD3Network(transformer),
        {"text_encoder": _PROJECTED, "text_encoder_2": _PROJECTED, "text_encoder_3": _T5},
        "joint_attention_dim",
        256,
    ),
    Kind(
        "flux",
        ("FluxPipeline",),
        "transformer",
        ("FluxTransformer2DModel",),
        FluxTransformer2DModel,
        lambda transformer, _: FluxNetwork(transformer),
        {"text_encoder": _CLIP, "text_encoder_2": _T5},
        "joint_attention_dim",
        512,
    ),
)
FLUX_SIDE = 128
"""Side of the latent that diffusers' Flux pipeline draws by default."""
PIPELINES = {pipeline: kind for kind in FAMILIES for pipeline in kind.pipelines}
_UNKNOWN_TO_SD = (
    *("class_embed_type", "encoder_hid_dim", "encoder_hid_dim_type", "dual_cross_attention", "num_class_embeds"),
    *("time_embedding_act_fn", "timestep_post_act", "mid_block_only_cross_attention", "reverse_transformer_layers_per_block"),
)
_MORE_CHANNELS = {8: "edits or enlarges an image that it is given", 9: "fills in an image that it is given (inpainting)"}
_MORE_OF_FLUX = {128: "follows a map that it is given (depth, edges)", 384: "fills in an image that it is given (inpainting)"}


def kind_of(index: Mapping[str, Any], file: Path) -> Kind:
    """The adapter for a `model_index.json`.

    Raises:
        ConfigError: there is none for the pipeline or its denoiser.
    """
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise ConfigError(f"{file}: the pipeline {pipeline} is not read here; known: {', '.join(PIPELINES)}")
    kind = PIPELINES[pipeline]
    named = index.get(kind.part)
    if not isinstance(named, list) or len(named) != 2 or named[1] not in kind.classes:
        raise ConfigError(f"{file}: {kind.part} = {named}: {pipeline} is read with {' or '.join(kind.classes)}")
    return kind


def check_denoiser(kind: Kind, config: Mapping[str, Any], latent_channels: int, file: Path) -> None:
    """
    Raises:
        ConfigError: the denoiser of this configuration is not one that draws images from captions alone.
    """
    if config.get("_class_name") not in kind.classes:
        raise ConfigError(f"{file}: _class_name = {config.get('_class_name')}: read are {', '.join(kind.classes)}")
    taken = config.get("in_channels")
    is_flux = kind.name == "flux"
    if taken != latent_channels * (FLUX_PATCH**2 if is_flux else 1):
        more = _MORE_OF_FLUX if is_flux else _MORE_CHANNELS
        what = more.get(int(taken or 0), f"does not fit the autoencoder's {latent_channels} latent channels")
        raise ConfigError(f"{file}: in_channels = {taken}: a network that {what}; text-to-image checkpoints are read")
    given = config.get("out_channels") or taken
    if given != taken and not (kind.name == "pixart" and given == 2 * taken):
        raise ConfigError(f"{file}: out_channels = {given} where in_channels = {taken}: no such network is read")
    if is_flux and config.get("patch_size", 1) != 1:
        raise ConfigError(f"{file}: patch_size = {config['patch_size']}: a Flux of patches of 1 is read")
    if kind.part == "unet":
        odd = [key for key in _UNKNOWN_TO_SD if config.get(key)]
        if odd:
            raise ConfigError(f"{file}: {odd[0]} = {config[odd[0]]}: no U-Net with it is read")
        wanted = "text_time" if kind.name == "sdxl" else None
        if config.get("addition_embed_type") != wanted:
            said = config.get("addition_embed_type")
            raise ConfigError(f"{file}: addition_embed_type = {said}: a pipeline of this class is read with {wanted}")
        if not isinstance(config.get("cross_attention_dim"), int):
            raise ConfigError(f"{file}: cross_attention_dim = {config.get('cross_attention_dim')}: one width for all is read")


def load_network(kind: Kind, folder: Path, resolution: int, loras: tuple[Lora, ...] = ()) -> nn.Module:
    """The network of a pipeline folder with what LoRAs add to it, float32, as the engine calls it.

    Raises:
        ConfigError: its weights are missing, pickled, truncated or not those of its configuration, or a LoRA does not fit.
    """
    network = load_module(kind.model, folder / kind.part)
    if loras:
        fuse_loras(network, loras, kind.pipelines[0], kind.part, read_config(folder / kind.part / "config.json"))
    return kind.wrap(network, resolution)


def check_added(kind: Kind, config: Mapping[str, Any], loras: tuple[Lora, ...]) -> None:
    """
    Raises:
        ConfigError: a LoRA is missing, pickled, truncated, or not for a denoiser of this configuration.
    """
    if loras:
        shapes = _shapes(kind.pipelines[0], json.dumps(dict(config), sort_keys=True))
        check_loras(loras, kind.pipelines[0], kind.part, config, shapes)


@lru_cache(maxsize=16)
def _shapes(pipeline: str, config: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(one.shape) for name, one in _on_meta(PIPELINES[pipeline], json.loads(config)).named_parameters()}


def _on_meta(kind: Kind, fields: Mapping[str, Any]) -> nn.Module:
    plain = {key: value for key, value in fields.items() if not key.startswith("_")}
    try:
        with torch.device("meta"):
            built: nn.Module = kind.model.from_config(plain).eval()  # type: ignore[attr-defined]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"diffusers builds no {kind.classes[0]} of it: {' '.join(str(error).split())[:200]}") from error
    return built


@dataclass(frozen=True)
class Counted:
    """Parameters, GFLOP a pass of one row, width at the first level, and of the guidance embedding where it takes one."""

    num_parameters: int
    gflop_per_forward: float
    width: int
    guidance_embed_dim: int | None


def latent_size(kind: Kind, config: Mapping[str, Any], autoencoder: Mapping[str, Any], factor: int, file: Path) -> int:
    """Side of the latent that a denoiser of this configuration is drawn with: its `sample_size`.

    Flux has none. Its images are as wide as the autoencoder's `sample_size` says (1024 in what is published), and where that
    is not said, as wide as diffusers' pipeline draws them: 128 places of the latent.

    Raises:
        ConfigError: no square latent comes of it.
    """
    if kind.name != "flux":
        side = config.get("sample_size")
        if not isinstance(side, int) or side < 1:
            raise ConfigError(f"{file}: sample_size = {side}: needs one side of a square latent")
        return side
    pixels = autoencoder.get("sample_size", FLUX_SIDE * factor)
    if not isinstance(pixels, int) or pixels < 1 or pixels % (FLUX_PATCH * factor):
        raise ConfigError(
            f"{file.parents[1] / 'vae' / 'config.json'}: sample_size = {pixels}: Flux draws squares of that many pixels, "
            f"a multiple of {FLUX_PATCH * factor}"
        )
    return pixels // factor


def count(kind: Kind, config: Mapping[str, Any], num_tokens: int, resolution: int, side: int) -> Counted:
    """Count a denoiser on the meta device from its configuration alone, as `models/cost.py` counts.

    `side` is that of its latent.

    Raises:
        ConfigError: diffusers builds nothing from the configuration.
    """
    return _count(kind.pipelines[0], json.dumps(dict(config), sort_keys=True), num_tokens, resolution, side)


@lru_cache(maxsize=64)
def _count(pipeline: str, config: str, num_tokens: int, resolution: int, side: int) -> Counted:
    kind, fields = PIPELINES[pipeline], json.loads(config)
    network = kind.wrap(_on_meta(kind, fields), resolution)
    width, lines, channels = int(fields.get(kind.context) or 0), num_tokens, int(fields["in_channels"])
    embedded = fields.get("time_cond_proj_dim")
    if isinstance(network, ConditionedDenoiser):
        width, channels, embedded = network.packed_width, network.num_channels, network.guidance_embed_dim
        lines += math.ceil(getattr(network, "pooled_width", 0) / width)
    rows = torch.empty(1, channels, side, side, device="meta")
    more = {} if embedded is None else {"timestep_cond": torch.empty(1, embedded, device="meta")}
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
            network(rows, torch.zeros(1), torch.empty(1, lines, width), **more)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{kind.classes[0]} of it does not run: {' '.join(str(error).split())[:200]}") from error
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    first = fields["block_out_channels"][0] if kind.part == "unet" else _inner_width(fields)
    return Counted(num_parameters, counter.get_total_flops() / 1e9, int(first), embedded)


def _inner_width(fields: Mapping[str, Any]) -> int:
    return int(fields["num_attention_heads"]) * int(fields["attention_head_dim"])
