"""Pipeline families: the diffusers pipelines that isocost supports, and how each loads, wraps and checks its denoiser."""

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
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from isocost.config.pretrained import FamilyName
from isocost.errors import ConfigError
from isocost.models.memory import activation_bytes, weight_bytes
from isocost.models.pretrained.files import first_line, load_module, read_config
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
class PipelineFamily:
    """Pipelines that are read in the same way.

    Attributes:
        name: the family's name.
        pipelines: pipeline classes in `model_index.json`.
        denoiser_folder: folder of the denoiser.
        denoiser_classes: class names that the denoiser's config may have.
        denoiser_type: diffusers class that loads the denoiser.
        wrap: function of (denoiser, resolution) that returns the network with the call signature of a U-Net.
        text_encoders: folders of the text encoders and their classes.
        embed_dim_field: field of the denoiser's config with the width of the prompt embeddings.
        max_tokens: maximum number of tokens of a prompt; None for the tokenizer's own limit.
    """

    name: FamilyName
    pipelines: tuple[str, ...]
    denoiser_folder: str
    denoiser_classes: tuple[str, ...]
    denoiser_type: type[nn.Module]
    wrap: Wrap
    text_encoders: Mapping[str, str]
    embed_dim_field: str
    max_tokens: int | None = None


_CLIP, _PROJECTED, _T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
_PIXART = PipelineFamily(
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
    PipelineFamily(
        "sd",
        ("StableDiffusionPipeline", "LatentConsistencyModelPipeline"),
        "unet",
        ("UNet2DConditionModel",),
        UNet2DConditionModel,
        lambda unet, _: unet,
        {"text_encoder": _CLIP},
        "cross_attention_dim",
    ),
    PipelineFamily(
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
    PipelineFamily(
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
    PipelineFamily(
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
FLUX_LATENT_SIZE = 128
"""Latent size that diffusers' Flux pipeline uses by default."""
SAME_NETWORKS = {
    "StableDiffusionPipeline": (
        *("StableDiffusionPAGPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionPAGImg2ImgPipeline"),
        *("StableDiffusionInpaintPipeline", "StableDiffusionPAGInpaintPipeline"),
    ),
    "LatentConsistencyModelPipeline": ("LatentConsistencyModelImg2ImgPipeline",),
    "StableDiffusionXLPipeline": (
        *("StableDiffusionXLPAGPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLPAGImg2ImgPipeline"),
        *("StableDiffusionXLInpaintPipeline", "StableDiffusionXLPAGInpaintPipeline"),
    ),
    "PixArtSigmaPipeline": ("PixArtSigmaPAGPipeline",),
    "StableDiffusion3Pipeline": (
        *("StableDiffusion3PAGPipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3PAGImg2ImgPipeline"),
        "StableDiffusion3InpaintPipeline",
    ),
    "FluxPipeline": ("FluxImg2ImgPipeline", "FluxInpaintPipeline"),
}
"""Pipelines with the networks of a text-to-image pipeline. A folder of one is sampled as text-to-image, without perturbed
attention; a denoiser with further input channels is refused as everywhere."""
PIPELINE_OF = {other: pipeline for pipeline, others in SAME_NETWORKS.items() for other in others}
PIPELINES = {pipeline: family for family in FAMILIES for pipeline in family.pipelines}
_UNSUPPORTED_UNET_FIELDS = (
    *("class_embed_type", "encoder_hid_dim", "encoder_hid_dim_type", "dual_cross_attention", "num_class_embeds"),
    *("time_embedding_act_fn", "timestep_post_act", "mid_block_only_cross_attention"),
)
_OTHER_UNET_TASKS = {8: "for image editing or super-resolution", 9: "for inpainting"}
_OTHER_FLUX_TASKS = {128: "for depth or edge control", 384: "for inpainting"}
"""Tasks of published denoisers that are not text-to-image, by their input channels."""


def text_to_image_pipeline(index: Mapping[str, Any]) -> str:
    """The text-to-image pipeline with the networks of the pipeline that `model_index.json` names."""
    name = index.get("_class_name")
    return PIPELINE_OF.get(name, name) if isinstance(name, str) else repr(name)


def family_of(index: Mapping[str, Any], file: Path) -> PipelineFamily:
    """Find the family of a pipeline.

    Args:
        index: content of `model_index.json`.
        file: path of `model_index.json`, for messages.

    Raises:
        ConfigError: the pipeline or its denoiser is not supported.
    """
    pipeline = text_to_image_pipeline(index)
    if pipeline not in PIPELINES:
        raise ConfigError(f"{file}: the pipeline {pipeline} is not supported; supported: {', '.join(PIPELINES)}")
    family = PIPELINES[pipeline]
    if index.get("requires_aesthetics_score"):
        raise ConfigError(f"{file}: requires_aesthetics_score = True: this is a refiner; only text-to-image is supported")
    entry = index.get(family.denoiser_folder)
    if not isinstance(entry, list) or len(entry) != 2 or entry[1] not in family.denoiser_classes:
        needed = " or ".join(family.denoiser_classes)
        raise ConfigError(f"{file}: {family.denoiser_folder} = {entry}: a {pipeline} needs {needed}")
    return family


def check_denoiser(family: PipelineFamily, config: Mapping[str, Any], latent_channels: int, file: Path) -> None:
    """
    Raises:
        ConfigError: the config is not that of a text-to-image denoiser of the family.
    """
    if config.get("_class_name") not in family.denoiser_classes:
        supported = ", ".join(family.denoiser_classes)
        raise ConfigError(f"{file}: _class_name = {config.get('_class_name')}: supported classes: {supported}")
    in_channels = config.get("in_channels")
    is_flux = family.name == "flux"
    if not isinstance(in_channels, int) or isinstance(in_channels, bool):
        raise ConfigError(f"{file}: in_channels = {in_channels!r}: must be a number of channels")
    if in_channels != latent_channels * (FLUX_PATCH**2 if is_flux else 1):
        other_task = (_OTHER_FLUX_TASKS if is_flux else _OTHER_UNET_TASKS).get(in_channels)
        if other_task is None:
            problem = f"does not fit the autoencoder's {latent_channels} latent channels"
        else:
            problem = f"a network {other_task}; only text-to-image checkpoints are supported"
        raise ConfigError(f"{file}: in_channels = {in_channels}: {problem}")
    out_channels = config.get("out_channels") or in_channels
    if out_channels != in_channels and not (family.name == "pixart" and out_channels == 2 * in_channels):
        raise ConfigError(f"{file}: out_channels = {out_channels}: not supported with in_channels = {in_channels}")
    if is_flux and config.get("patch_size", 1) != 1:
        raise ConfigError(f"{file}: patch_size = {config['patch_size']}: only a Flux with patch_size = 1 is supported")
    if family.denoiser_folder == "unet":
        unsupported = [key for key in _UNSUPPORTED_UNET_FIELDS if config.get(key)]
        if unsupported:
            raise ConfigError(f"{file}: {unsupported[0]} = {config[unsupported[0]]}: not supported in a U-Net")
        expected = "text_time" if family.name == "sdxl" else None
        embed_type = config.get("addition_embed_type")
        if embed_type != expected:
            raise ConfigError(f"{file}: addition_embed_type = {embed_type}: this pipeline needs {expected}")
        cross_attention_dim = config.get("cross_attention_dim")
        if not isinstance(cross_attention_dim, int):
            raise ConfigError(f"{file}: cross_attention_dim = {cross_attention_dim}: must be one number for all levels")


def load_network(
    family: PipelineFamily,
    folder: Path,
    resolution: int,
    loras: tuple[Lora, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Load the denoiser of a pipeline folder, with LoRAs fused into its weights in float32, wrapped for the engine.

    Args:
        family: the pipeline's family.
        folder: the pipeline's folder.
        resolution: side of an image in pixels.
        loras: LoRA files and their scales.
        dtype: of the weights in memory.

    Raises:
        ConfigError: weights are missing, pickled, truncated or do not fit the config, or a LoRA does not fit.
    """
    denoiser_path = folder / family.denoiser_folder
    network = load_module(family.denoiser_type, denoiser_path, torch.float32 if loras else dtype)
    if loras:
        config = read_config(denoiser_path / "config.json")
        fuse_loras(network, loras, family.pipelines[0], family.denoiser_folder, config)
        network = network.to(dtype)
    return family.wrap(network, resolution)


def check_loras_fit(family: PipelineFamily, config: Mapping[str, Any], loras: tuple[Lora, ...]) -> None:
    """
    Raises:
        ConfigError: a LoRA is missing, pickled, truncated, or not for a denoiser with this config.
    """
    if loras:
        shapes = _weight_shapes(family.pipelines[0], json.dumps(dict(config), sort_keys=True))
        check_loras(loras, family.pipelines[0], family.denoiser_folder, config, shapes)


@lru_cache(maxsize=16)
def _weight_shapes(pipeline: str, config: str) -> dict[str, tuple[int, ...]]:
    network = _build_on_meta(PIPELINES[pipeline], json.loads(config))
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}


def _build_on_meta(family: PipelineFamily, config: Mapping[str, Any]) -> nn.Module:
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        with torch.device("meta"):
            network: nn.Module = family.denoiser_type.from_config(arguments).eval()  # type: ignore[attr-defined]
    except Exception as error:  # diffusers raises many kinds of errors for a wrong config
        raise ConfigError(f"diffusers cannot build a {family.denoiser_classes[0]} from it: {first_line(error)}") from error
    return network


@dataclass(frozen=True)
class DenoiserCost:
    """Size and cost of a denoiser.

    Attributes:
        num_parameters: number of parameters.
        gflop_per_forward: GFLOP of one forward pass of one sample.
        width: channels at the first level.
        guidance_embed_dim: width of the guidance embedding; None if guidance is not an input.
    """

    num_parameters: int
    gflop_per_forward: float
    width: int
    guidance_embed_dim: int | None


def latent_size(
    family: PipelineFamily, config: Mapping[str, Any], autoencoder: Mapping[str, Any], factor: int, file: Path
) -> int:
    """Latent size that a denoiser generates: `sample_size` of its config.

    The config of Flux has no `sample_size`. Its resolution is the autoencoder's `sample_size` (1024 in published checkpoints);
    if that is missing too, the latent size is 128, the default of diffusers' pipeline.

    Args:
        family: the pipeline's family.
        config: config of the denoiser.
        autoencoder: config of the autoencoder.
        factor: pixels per latent position along one side.
        file: path of the denoiser's config, for messages.

    Raises:
        ConfigError: the configs do not give a square latent.
    """
    if family.name != "flux":
        size = config.get("sample_size")
        if isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1]:
            size = size[0]
        if not isinstance(size, int) or not _is_positive_integer(size):
            raise ConfigError(f"{file}: sample_size = {size}: must be one positive number, the size of a square latent")
        return size
    pixels = autoencoder.get("sample_size", FLUX_LATENT_SIZE * factor)
    if not isinstance(pixels, int) or pixels < 1 or pixels % (FLUX_PATCH * factor):
        raise ConfigError(
            f"{file.parents[1] / 'vae' / 'config.json'}: sample_size = {pixels}: must be the resolution of Flux's square "
            f"images, a multiple of {FLUX_PATCH * factor}"
        )
    return pixels // factor


def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def count_denoiser(
    family: PipelineFamily, config: Mapping[str, Any], num_tokens: int, resolution: int, latent_size: int
) -> DenoiserCost:
    """Count the cost of a denoiser on the meta device from its config, as in `models/flops.py`.

    Args:
        family: the pipeline's family.
        config: config of the denoiser.
        num_tokens: tokens of a prompt.
        resolution: size of the images in pixels.
        latent_size: size of the latents.

    Raises:
        ConfigError: diffusers cannot build or run a denoiser with this config.
    """
    return _count_denoiser(family.pipelines[0], json.dumps(dict(config), sort_keys=True), num_tokens, resolution, latent_size)


@lru_cache(maxsize=64)
def _count_denoiser(pipeline: str, config_json: str, num_tokens: int, resolution: int, latent_size: int) -> DenoiserCost:
    family, config = PIPELINES[pipeline], json.loads(config_json)
    try:
        network = family.wrap(_build_on_meta(family, config), resolution)
        guidance_embed_dim, gflop = _count_forward(family, config, network, num_tokens, latent_size)
        width = int(config["block_out_channels"][0] if family.denoiser_folder == "unet" else _transformer_width(config))
    except ConfigError:
        raise
    except Exception as error:  # diffusers and torch raise many kinds of errors for a wrong config
        raise ConfigError(
            f"a {family.denoiser_classes[0]} with this config does not run ({first_line(error)}); correct the config"
        ) from error
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    return DenoiserCost(num_parameters, gflop, width, guidance_embed_dim)


def _count_forward(
    family: PipelineFamily, config: Mapping[str, Any], network: nn.Module, num_tokens: int, latent_size: int
) -> tuple[int | None, float]:
    """Width of the guidance embedding, and GFLOP of a forward pass of one sample."""
    arguments, options, guidance_embed_dim = _meta_inputs(family, config, network, num_tokens, latent_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        network(*arguments, **options)
    return guidance_embed_dim, counter.get_total_flops() / 1e9


def _meta_inputs(
    family: PipelineFamily,
    config: Mapping[str, Any],
    network: nn.Module,
    num_tokens: int,
    latent_size: int,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor], int | None]:
    """Inputs of a denoiser on the meta device: latents, timesteps and prompt embeddings, and the guidance with its width."""
    embed_dim, num_embeds, channels = int(config.get(family.embed_dim_field) or 0), num_tokens, int(config["in_channels"])
    guidance_embed_dim = config.get("time_cond_proj_dim")
    if isinstance(network, ConditionedDenoiser):
        embed_dim, channels = network.packed_width, network.num_channels
        guidance_embed_dim = network.guidance_embed_dim
        num_embeds += math.ceil(getattr(network, "pooled_width", 0) / embed_dim)
    options = {}
    if guidance_embed_dim is not None:
        options["timestep_cond"] = torch.empty(batch, guidance_embed_dim, device="meta", dtype=dtype)
    latents = torch.empty(batch, channels, latent_size, latent_size, device="meta", dtype=dtype)
    prompt_embeds = torch.empty(batch, num_embeds, embed_dim, device="meta", dtype=dtype)
    return (latents, torch.zeros(batch, device="meta"), prompt_embeds), options, guidance_embed_dim


@dataclass(frozen=True)
class DenoiserMemory:
    """Memory of a denoiser.

    Attributes:
        weight_bytes: of its parameters.
        activation_bytes: largest sum of the tensors of a call, without the weights.
        key_value_width: width of the keys and values of all cross-attentions; 0 if a network gets packed prompt embeddings.
        packed_bytes: of the packed embeddings of one prompt in float32.
    """

    weight_bytes: int
    activation_bytes: int
    key_value_width: int
    packed_bytes: int


def denoiser_memory(
    family: PipelineFamily,
    config: Mapping[str, Any],
    num_tokens: int,
    resolution: int,
    latent_size: int,
    batch: int,
    dtype: torch.dtype,
) -> DenoiserMemory:
    """Count the memory of a denoiser on the meta device from its config.

    Args:
        family: the pipeline's family.
        config: config of the denoiser.
        num_tokens: tokens of a prompt.
        resolution: size of the images in pixels.
        latent_size: size of the latents.
        batch: rows of a call.
        dtype: of the weights and the activations.

    Raises:
        ConfigError: diffusers cannot build a denoiser with this config.
    """
    network = family.wrap(_build_on_meta(family, config), resolution)
    nn.Module.to(network, dtype)
    arguments, options, _ = _meta_inputs(family, config, network, num_tokens, latent_size, batch, dtype)
    is_packed = isinstance(network, ConditionedDenoiser)
    attentions = [layer for layer in network.modules() if isinstance(layer, Attention) and layer.is_cross_attention]
    return DenoiserMemory(
        weight_bytes(network, dtype),
        activation_bytes(network, network, *arguments, **options),
        0 if is_packed else sum(2 * attention.inner_dim for attention in attentions),
        arguments[2][0].numel() * torch.float32.itemsize,
    )


def _transformer_width(config: Mapping[str, Any]) -> int:
    return int(config["num_attention_heads"]) * int(config["attention_head_dim"])
