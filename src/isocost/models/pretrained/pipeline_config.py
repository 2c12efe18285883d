"""A pipeline folder to what a checkpoint says of itself: everything from the folder's own configurations, nothing guessed.

Resolution is the denoiser's `sample_size` times the autoencoder's factor; Flux's is the autoencoder's `sample_size`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isocost.config.model import ModelSpec, TextEncoderSpec
from isocost.config.pretrained import PretrainedSpec
from isocost.config.sampling import SolverSpec
from isocost.errors import ConfigError
from isocost.models.pretrained.architectures import Counted, Kind, check_added, check_denoiser, count, kind_of, latent_size
from isocost.models.pretrained.files import INDEX, content_digest, find_folder, read_config, weight_files
from isocost.models.pretrained.lora import absolute, find_lora, split_loras
from isocost.models.pretrained.scheduler_config import read_scheduler
from isocost.models.pretrained.wrappers import FLUX_PATCH
from isocost.models.unet import size_name

STABLE_DIFFUSION_SCALE = 0.18215
"""diffusers' default, and that of every Stable Diffusion 1 and 2, whose configurations may leave it out."""
_AUTOENCODER_FACTS = ("latents_mean", "latents_std")
_SD1_CONTEXT = 768
_CLIP_TOKENS = 77
FLUX_SCHNELL_TOKENS = 256
_UNSET = frozenset({None, "None"})


def read_pipeline(path: str | Path) -> dict[str, Any]:
    """Fields of `CheckpointInfo` for a pipeline folder or Hub id, with LoRAs or without; weights are looked for, not read.

    Raises:
        ConfigError: what is not supported, not whole or cannot be known, in one line.
    """
    at = absolute(path)
    base, loras = split_loras(at)
    folder = find_folder(base)
    index = read_config(folder / INDEX)
    kind = kind_of(index, folder / INDEX)
    vae_file = folder / "vae" / "config.json"
    vae = read_config(vae_file)
    channels, factor = _read_autoencoder(kind, vae, vae_file)
    file = folder / kind.part / "config.json"
    config = read_config(file)
    check_denoiser(kind, config, channels, file)
    encoders = encoders_of(kind, index, folder)
    for part in (kind.part, "vae", *encoders):
        weight_files(folder / part)
    side = latent_size(kind, config, vae, factor, file)
    resolution = side * factor
    num_places = (side // FLUX_PATCH) ** 2 if kind.name == "flux" else None
    scheduled = read_scheduler(folder, kind.name == "sd" and config.get(kind.context) == _SD1_CONTEXT, num_places)
    is_flow = kind.name in ("sd3", "flux")
    if (scheduled.prediction_type == "flow_prediction") != is_flow:
        wanted = "flow matching" if is_flow else "a schedule of betas"
        raise ConfigError(f"{folder}: its scheduler is of another kind of model; a {index['_class_name']} needs {wanted}")
    check_added(kind, config, loras)
    num_tokens, max_tokens = tokens_of(kind, folder)
    counted = _counted(kind, config, num_tokens, resolution, side, file)
    solver = scheduled.solver
    if kind.name == "sd" and solver.timestep_spacing == "leading":
        solver = SolverSpec(name=solver.name, timestep_spacing="leading")  # diffusers' pipeline sets steps_offset to 1
    given = PretrainedSpec(
        path=at,
        kind=kind.name,
        noise=scheduled.noise,
        solver=solver,
        max_tokens=max_tokens,
        null_is_zero=kind.name == "sdxl" and bool(index.get("force_zeros_for_empty_prompt", True)),
    )
    return {
        "model": ModelSpec(
            kind="unet" if kind.part == "unet" else "dit",
            width=counted.width,
            latent_channels=channels,
            latent_size=side,
            cross_attention_dim=int(config[kind.context]),
            guidance_embed_dim=counted.guidance_embed_dim,
        ),
        "size": size_name(0, counted.num_parameters, 0),
        "num_parameters": counted.num_parameters,
        "images_seen": 0,
        "gflop_per_forward": counted.gflop_per_forward,
        "prediction_type": scheduled.prediction_type,
        "rescale_betas_zero_snr": scheduled.noise.rescale_betas_zero_snr,
        "autoencoder": base,
        "autoencoder_subfolder": "vae",
        "text_encoder": TextEncoderSpec(path=base, subfolder="text_encoder", max_tokens=max_tokens),
        "resolution": resolution,
        "variant": name_of(at),
        "distilled": "consistency" if scheduled.is_consistent else "",
        "pretrained": given,
    }


def name_of(path: str) -> str:
    """What tables call a checkpoint: the last part of its path or id, and what is added to it."""
    base, loras = split_loras(path)
    return " + ".join([base.rpartition("/")[2], *(one.name for one in loras)])


def source_digest(path: str | Path) -> str:
    """16 hex digits of a checkpoint's content, that of its LoRAs and their scales with it.

    Raises:
        ConfigError: one of them is not there or not whole.
    """
    base, loras = split_loras(path)
    return content_digest(find_folder(base), [(find_lora(one), one.scale) for one in loras])


def find_base(path: str | Path) -> Path:
    """The pipeline folder of a checkpoint, whatever is added to it.

    Raises:
        ConfigError: it is not there.
    """
    return find_folder(split_loras(path)[0])


def kind_at(folder: Path) -> Kind:
    """The adapter of a pipeline folder."""
    return kind_of(read_config(folder / INDEX), folder / INDEX)


def encoders_of(kind: Kind, index: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Folders of the text encoders that the pipeline has, with their classes.

    Raises:
        ConfigError: one is missing or of another class. Stable Diffusion 3 may do without its T5.
    """
    found = {}
    for part, wanted in kind.encoders.items():
        named = index.get(part)
        if part == "text_encoder_3" and (not isinstance(named, list) or named[1] in _UNSET):
            continue
        if not isinstance(named, list) or len(named) != 2 or named[1] != wanted:
            raise ConfigError(f"{folder / INDEX}: {part} = {named}: a {index['_class_name']} is read with {wanted}")
        read_config(folder / part / "config.json")
        if not (folder / part.replace("text_encoder", "tokenizer")).is_dir():
            raise ConfigError(f"{folder / part.replace('text_encoder', 'tokenizer')}: missing; the folder is not whole")
        found[part] = wanted
    return found


def tokens_of(kind: Kind, folder: Path) -> tuple[int, int]:
    """Tokens that the denoiser sees of a caption, and the most that T5, or CLIP where there is no T5, is given."""
    own = _CLIP_TOKENS
    if kind.name in ("sd", "sdxl"):
        own = int(read_config(folder / "tokenizer" / "tokenizer_config.json").get("model_max_length", _CLIP_TOKENS))
    most = kind.max_tokens or own
    if kind.name == "flux" and is_schnell(folder):
        most = FLUX_SCHNELL_TOKENS
    return (own + most if kind.name == "sd3" else most), most


def is_schnell(folder: Path) -> bool:
    """Whether a Flux is one of few steps by FLUX.1-schnell's mark: no guidance goes in, and nothing shifts by the resolution.

    These are trained on captions of 256 tokens (their card; Black Forest Labs' code), others on 512.
    """
    config, scheduler = (read_config(folder / name) for name in ("transformer/config.json", "scheduler/scheduler_config.json"))
    return not config.get("guidance_embeds") and not scheduler.get("use_dynamic_shifting")


def _read_autoencoder(kind: Kind, config: Mapping[str, Any], file: Path) -> tuple[int, int]:
    """Latent channels, and pixels that a place of the latent is wide."""
    name = config.get("_class_name")
    if name not in ("AutoencoderKL", "AutoencoderTiny"):
        raise ConfigError(f"{file}: _class_name = {name}: read are AutoencoderKL and AutoencoderTiny")
    for key in _AUTOENCODER_FACTS:
        if config.get(key) is not None:
            raise ConfigError(f"{file}: {key}: latents shifted channel by channel are not read here")
    channels, widths = config.get("latent_channels"), config.get("block_out_channels")
    if name == "AutoencoderTiny":
        widths = config.get("decoder_block_out_channels", (64, 64, 64, 64))
        channels = config.get("latent_channels", 4)
    if not isinstance(channels, int) or not isinstance(widths, list | tuple) or not widths:
        raise ConfigError(f"{file}: latent_channels or block_out_channels are missing")
    for key in ("scaling_factor", "shift_factor"):
        _check_factor(kind, config, key, file)
    return channels, 2 ** (len(widths) - 1)


def _check_factor(kind: Kind, config: Mapping[str, Any], key: str, file: Path) -> None:
    value = config.get(key)
    if key == "shift_factor" or config["_class_name"] == "AutoencoderTiny":
        is_right = value is None or _is_finite(value)
    elif value is None:
        is_right = kind.name == "sd"
    else:
        is_right = _is_finite(value) and value > 0
    if not is_right:
        said = "missing" if value is None else f"{value!r}"
        raise ConfigError(f"{file}: {key} is {said}: at another scale latents decode to noise; give what it was trained with")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _counted(kind: Kind, config: Mapping[str, Any], num_tokens: int, resolution: int, side: int, file: Path) -> Counted:
    try:
        return count(kind, config, num_tokens, resolution, side)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
