"""Read the checkpoint metadata of a pipeline folder from its own configs; no value is guessed.

The resolution is the denoiser's `sample_size` times the autoencoder's factor; for Flux it is the autoencoder's `sample_size`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isocost.config.model import ModelSpec, TextEncoderSpec
from isocost.config.pretrained import PretrainedSpec
from isocost.errors import ConfigError
from isocost.models.pretrained.architectures import (
    DenoiserCost,
    PipelineFamily,
    check_denoiser,
    check_loras_fit,
    count_denoiser,
    family_of,
    latent_size,
    text_to_image_pipeline,
)
from isocost.models.pretrained.files import (
    MODEL_INDEX,
    content_digest,
    find_folder,
    read_component_config,
    read_config,
    weight_files,
)
from isocost.models.pretrained.lora import absolute_source, lora_files, split_loras
from isocost.models.pretrained.scheduler_config import read_scheduler
from isocost.models.pretrained.wrappers import FLUX_PATCH
from isocost.models.unet import size_name

_SD1_EMBED_DIM = 768
_CLIP_TOKENS = 77
FLUX_SCHNELL_TOKENS = 256
_UNSET = (None, "None")
MAX_PROMPT_TOKENS = 4096
MAX_VAE_LEVELS = 8


def read_pipeline(path: str | Path) -> dict[str, Any]:
    """Fields of `CheckpointInfo` for a pipeline folder or Hub id, optionally with LoRAs.

    Weight files are checked, but not loaded.

    Raises:
        ConfigError: something is not supported or incomplete, or a required value is missing; the message is one line.
    """
    source = absolute_source(path)
    base, loras = split_loras(source)
    folder = find_folder(base)
    index = read_config(folder / MODEL_INDEX)
    family = family_of(index, folder / MODEL_INDEX)
    vae_file = folder / "vae" / "config.json"
    vae = read_component_config(vae_file)
    channels, factor = _read_autoencoder(family, vae, vae_file)
    file = folder / family.denoiser_folder / "config.json"
    config = read_component_config(file)
    check_denoiser(family, config, channels, file)
    encoders = text_encoder_classes(family, index, folder)
    for component in (family.denoiser_folder, "vae", *encoders):
        weight_files(folder / component)
    size = latent_size(family, config, vae, factor, file)
    resolution = size * factor
    num_patches = (size // FLUX_PATCH) ** 2 if family.name == "flux" else None
    is_sd1 = family.name == "sd" and config.get(family.embed_dim_field) == _SD1_EMBED_DIM
    sets_sd_fields = family.name == "sd" and text_to_image_pipeline(index) != "LatentConsistencyModelPipeline"
    scheduler = read_scheduler(folder, is_sd1, num_patches, sets_sd_fields)
    is_flow = family.name in ("sd3", "flux")
    if (scheduler.prediction_type == "flow_prediction") != is_flow:
        needed = "flow matching" if is_flow else "a schedule of betas"
        raise ConfigError(f"{folder}: its scheduler is for other models; a {index['_class_name']} needs {needed}")
    check_loras_fit(family, config, loras)
    num_tokens, max_tokens = num_tokens_of(family, folder)
    cost = _denoiser_cost(family, config, num_tokens, resolution, size, file)
    pretrained = PretrainedSpec(
        path=source,
        kind=family.name,
        noise=scheduler.noise,
        solver=scheduler.solver,
        solver_problem=scheduler.solver_problem,
        scheduler=scheduler.class_name,
        max_tokens=max_tokens,
        null_is_zero=family.name == "sdxl" and bool(index.get("force_zeros_for_empty_prompt", True)),
    )
    return {
        "model": ModelSpec(
            kind="unet" if family.denoiser_folder == "unet" else "dit",
            width=cost.width,
            latent_channels=channels,
            latent_size=size,
            cross_attention_dim=int(config.get(family.embed_dim_field) or 0),
            guidance_embed_dim=cost.guidance_embed_dim,
        ),
        "size": size_name(0, cost.num_parameters, 0),
        "num_parameters": cost.num_parameters,
        "images_seen": 0,
        "gflop_per_forward": cost.gflop_per_forward,
        "prediction_type": scheduler.prediction_type,
        "rescale_betas_zero_snr": scheduler.noise.rescale_betas_zero_snr,
        "autoencoder": base,
        "autoencoder_subfolder": "vae",
        "text_encoder": TextEncoderSpec(path=base, subfolder="text_encoder", max_tokens=max_tokens),
        "resolution": resolution,
        "variant": display_name(source),
        "distilled": "consistency" if scheduler.is_consistency_model else "",
        "pretrained": pretrained,
    }


def display_name(path: str, num_parts: int = 1) -> str:
    """Name of a checkpoint in tables: the last `num_parts` parts of its path or id, and the names of its LoRAs."""
    base, loras = split_loras(path)
    return " + ".join(["/".join(base.split("/")[-num_parts:]), *(lora.name for lora in loras)])


def source_digest(path: str | Path) -> str:
    """Digest of the content of a checkpoint, including its LoRAs and their scales; 16 hexadecimal digits.

    Raises:
        ConfigError: a file is missing or incomplete.
    """
    base, loras = split_loras(path)
    return content_digest(find_folder(base), [(lora_files(lora), lora.scale) for lora in loras])


def find_base_folder(path: str | Path) -> Path:
    """Pipeline folder of a checkpoint, without its LoRAs.

    Raises:
        ConfigError: there is no such folder.
    """
    return find_folder(split_loras(path)[0])


def family_at(folder: Path) -> PipelineFamily:
    """Family of a pipeline folder.

    Raises:
        ConfigError: the pipeline is not supported.
    """
    return family_of(read_config(folder / MODEL_INDEX), folder / MODEL_INDEX)


def text_encoder_classes(family: PipelineFamily, index: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Folders of the pipeline's text encoders and their classes. The T5 of Stable Diffusion 3 is optional.

    Raises:
        ConfigError: a text encoder is missing or has another class.
    """
    classes = {}
    for name, needed in family.text_encoders.items():
        entry = index.get(name)
        if name == "text_encoder_3" and (not isinstance(entry, list) or entry[1] in _UNSET):
            continue
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] != needed:
            raise ConfigError(f"{folder / MODEL_INDEX}: {name} = {entry}: a {index['_class_name']} needs {needed}")
        read_component_config(folder / name / "config.json")
        tokenizer = folder / name.replace("text_encoder", "tokenizer")
        if not tokenizer.is_dir():
            raise ConfigError(f"{tokenizer}: missing; the folder is incomplete, download it again")
        classes[name] = needed
    return classes


def num_tokens_of(family: PipelineFamily, folder: Path) -> tuple[int, int]:
    """Tokens of a prompt in the denoiser's input, and the limit of T5's tokenizer (of CLIP's if there is no T5).

    Raises:
        ConfigError: the tokenizer's limit is no usable number.
    """
    clip_tokens = clip_tokens_of(folder / "tokenizer") if family.name in ("sd", "sdxl") else _CLIP_TOKENS
    max_tokens = family.max_tokens or clip_tokens
    if family.name == "flux" and is_schnell(folder):
        max_tokens = FLUX_SCHNELL_TOKENS
    return (clip_tokens + max_tokens if family.name == "sd3" else max_tokens), max_tokens


def clip_tokens_of(tokenizer: Path) -> int:
    """Tokens of a prompt by the folder of CLIP's tokenizer, which pads every prompt to its limit.

    Raises:
        ConfigError: the limit is no usable number.
    """
    file = tokenizer / "tokenizer_config.json"
    clip_tokens = read_config(file).get("model_max_length", _CLIP_TOKENS)
    if not isinstance(clip_tokens, int) or not 3 <= clip_tokens <= MAX_PROMPT_TOKENS:
        raise ConfigError(
            f"{file}: model_max_length = {str(clip_tokens)[:40]}: must be the number of tokens of a prompt, usually 77"
        )
    return clip_tokens


def is_schnell(folder: Path) -> bool:
    """True if a Flux is a few-step model such as FLUX.1-schnell: no guidance input and no shift that depends on the resolution.

    Few-step models are trained on prompts of 256 tokens (model card; Black Forest Labs' code), others on 512.
    """
    config, scheduler = (read_config(folder / name) for name in ("transformer/config.json", "scheduler/scheduler_config.json"))
    return not config.get("guidance_embeds") and not scheduler.get("use_dynamic_shifting")


def _read_autoencoder(family: PipelineFamily, config: Mapping[str, Any], file: Path) -> tuple[int, int]:
    """Latent channels, and pixels per latent position along one side."""
    name = config.get("_class_name")
    if name not in ("AutoencoderKL", "AutoencoderTiny"):
        raise ConfigError(f"{file}: _class_name = {name}: supported classes: AutoencoderKL, AutoencoderTiny")
    for key in ("latents_mean", "latents_std"):
        if config.get(key) is not None:
            raise ConfigError(f"{file}: {key}: latents normalized per channel are not supported")
    channels, widths = config.get("latent_channels"), config.get("block_out_channels")
    if name == "AutoencoderTiny":
        widths = config.get("decoder_block_out_channels", (64, 64, 64, 64))
        channels = config.get("latent_channels", 4)
    if not isinstance(channels, int) or isinstance(channels, bool) or channels < 1:
        raise ConfigError(f"{file}: latent_channels = {channels!r}: must be a number of channels")
    if not isinstance(widths, list | tuple) or not 0 < len(widths) <= MAX_VAE_LEVELS:
        raise ConfigError(f"{file}: block_out_channels = {widths!r}: must be the widths of 1 to {MAX_VAE_LEVELS} levels")
    for key in ("scaling_factor", "shift_factor"):
        _check_factor(family, config, key, file)
    return channels, 2 ** (len(widths) - 1)


def _check_factor(family: PipelineFamily, config: Mapping[str, Any], key: str, file: Path) -> None:
    value = config.get(key)
    if key == "shift_factor" or config["_class_name"] == "AutoencoderTiny":
        is_valid = value is None or _is_finite(value)
    elif value is None:
        # Stable Diffusion 1 and 2 may omit it: diffusers' default, 0.18215, is the value of all of them.
        is_valid = family.name == "sd"
    else:
        is_valid = _is_finite(value) and value > 0
    if not is_valid:
        shown = "missing" if value is None else f"{value!r}"
        raise ConfigError(f"{file}: {key} is {shown}; set the value that the autoencoder was trained with")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _denoiser_cost(
    family: PipelineFamily, config: Mapping[str, Any], num_tokens: int, resolution: int, size: int, file: Path
) -> DenoiserCost:
    try:
        return count_denoiser(family, config, num_tokens, resolution, size)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
