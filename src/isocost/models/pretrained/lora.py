"""Fuse LoRA files into a checkpoint (arXiv 2106.09685), given as `CHECKPOINT + LORA[:SCALE] [+ ...]`.

diffusers converts the keys of the known LoRA formats to its own layer names. The update is added to the weights,
`W + scale * alpha / rank * up @ down`, so a network with a LoRA has the same cost and call signature as one without.

Shapes: O outputs and I inputs of a layer, K kernel size, R rank.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from isocost.errors import ConfigError
from isocost.models.pretrained.files import PICKLE_SUFFIXES, check_complete, first_line, read_config

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
"""Default file name of a LoRA in diffusers."""
ADAPTER_NAME, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""File names of a LoRA that the package peft saved; its alpha is in the config."""
_ADAPTER_PREFIX = "base_model.model."
_PLUS = re.compile(r"(?:^|\s)\+(?:\s|$)")
_PATH_AND_SCALE = re.compile(r"(.+?)(?::([+-]?(?:\d+\.?\d*|\.\d+)))?")
_HUB_FILE = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?:@([\w.-]+))?(?:/(.+\.safetensors))?")
_METADATA = "lora_adapter_metadata"
_UNSUPPORTED_OPTIONS = {"use_dora": "DoRA", "use_rslora": "rank-stabilised scales", "alpha_pattern": "alphas by pattern"}
_UNSUPPORTED_KEYS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "CP LoCon",
}


@dataclass(frozen=True)
class Lora:
    """A LoRA: its path or Hub id, and the scale of its update."""

    path: str
    scale: float = 1.0

    def __str__(self) -> str:
        return self.path if self.scale == 1 else f"{self.path}:{self.scale:g}"

    @property
    def name(self) -> str:
        """Name in tables: the file name, or the name of the folder or repository if the file has diffusers' default name."""
        path = Path(self.path)
        name = path.parent.name if path.name in (WEIGHT_NAME, ADAPTER_NAME) else path.name.removesuffix(".safetensors")
        return name if self.scale == 1 else f"{name}:{self.scale:g}"


def split_loras(source: str | Path) -> tuple[str, tuple[Lora, ...]]:
    """Split `CHECKPOINT + LORA[:SCALE] + ...` into the checkpoint and its LoRAs. The plus needs a space on both sides.

    Raises:
        ConfigError: one side of a plus is empty, or a scale is 0.
    """
    if Path(source).expanduser().is_dir():
        return str(Path(source).expanduser()), ()
    base, *terms = _PLUS.split(str(source))
    loras = []
    for term in terms:
        match = _PATH_AND_SCALE.fullmatch(term.strip())
        if not base.strip() or match is None:
            raise ConfigError(f"{source}: write CHECKPOINT + LORA, or CHECKPOINT + LORA:SCALE")
        lora = Lora(os.path.expanduser(match[1]), 1.0 if match[2] is None else float(match[2]))
        if lora.scale == 0:
            raise ConfigError(f"{source}: {lora.path} at scale 0 does nothing; remove it")
        loras.append(lora)
    return os.path.expanduser(base.strip()), tuple(loras)


def absolute_source(source: str | Path) -> str:
    """Replace relative paths of the checkpoint and its LoRAs by absolute paths; Hub ids stay unchanged."""
    base, loras = split_loras(source)
    terms = [os.path.abspath(base) if Path(base).is_dir() else base]
    terms += [str(Lora(os.path.abspath(lora.path), lora.scale) if Path(lora.path).exists() else lora) for lora in loras]
    return " + ".join(terms)


def find_lora(lora: Lora) -> Path:
    """Find the file of a LoRA and check that it is complete.

    The path may be a file, a folder with one file, or a Hub id (`OWNER/NAME[@REVISION][/FILE.safetensors]`).

    Raises:
        ConfigError: there is no file, it is pickled or truncated, or a folder has several.
    """
    path = Path(lora.path)
    if path.is_dir():
        path = _only_file(path)
    elif not path.is_file() and (match := _HUB_FILE.fullmatch(lora.path)) is not None:
        name, revision, file = match.groups()
        try:
            path = _download(name, revision, file)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ConfigError(
                f"{lora.path}: no such file, not in the Hub's cache, and the download failed: {reason}"
            ) from error
    if path.suffix in PICKLE_SUFFIXES:
        raise ConfigError(f"{path}: a pickled LoRA is refused (it can run code when loaded); convert to safetensors")
    if not path.is_file():
        raise ConfigError(f"{path}: no such LoRA; give a safetensors file, a folder of one, or a Hub id")
    check_complete(path)
    return path


def _download(name: str, revision: str | None, file: str | None) -> Path:
    """Download a LoRA file of a Hub repository; by default diffusers' file or, if it is absent, peft's with its config."""
    if file is not None:
        return Path(hf_hub_download(name, file, revision=revision))
    try:
        return Path(hf_hub_download(name, WEIGHT_NAME, revision=revision))
    except EntryNotFoundError:
        hf_hub_download(name, ADAPTER_CONFIG, revision=revision)
        return Path(hf_hub_download(name, ADAPTER_NAME, revision=revision))


def lora_files(lora: Lora) -> list[Path]:
    """The files that determine the update of a LoRA: its weights, and the config of one that peft saved.

    Raises:
        ConfigError: see `find_lora`.
    """
    file = find_lora(lora)
    config = file.with_name(ADAPTER_CONFIG)
    return [file, config] if file.name == ADAPTER_NAME and config.is_file() else [file]


def _only_file(folder: Path) -> Path:
    if (folder / WEIGHT_NAME).is_file():
        return folder / WEIGHT_NAME
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        raise ConfigError(f"{folder}: has {len(files)} safetensors files; give the path of one, such as {files[0]}")
    pickles = sorted(file for file in folder.glob("*") if file.suffix in PICKLE_SUFFIXES)
    return [*files, *pickles, folder / WEIGHT_NAME][0]


@dataclass(frozen=True, eq=False)
class LoraDelta:
    """Update of one layer: `factor * up @ down`, with up [O, R] and down [R, I] or [R, I, K, K]."""

    up: Tensor
    down: Tensor
    factor: float

    def scaled(self, scale: float) -> Tensor:
        """The update times `scale`, float32 [O, I] or [O, I, K, K]."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (scale * self.factor * product).unflatten(1, self.down.shape[1:])


def read_lora(file: Path, pipeline: str, denoiser_folder: str, config: Mapping[str, Any]) -> dict[str, LoraDelta]:
    """Read the updates of a LoRA file by layer name.

    Args:
        file: a complete safetensors file.
        pipeline: diffusers pipeline class, which converts the formats of LoRA files for it.
        denoiser_folder: folder of the denoiser, the prefix of its layer names in the file.
        config: config of the denoiser.

    Raises:
        ConfigError: the file is not a LoRA of this pipeline, has weights other than up and down, or changes text encoders.
    """
    try:
        with safe_open(file, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            metadata_json = (opened.metadata() or {}).get(_METADATA, "{}")
    except SafetensorError as error:
        raise ConfigError(f"{file}: not a complete safetensors file: {first_line(error)}; download it again") from error
    damaged = next((key for key, value in tensors.items() if not bool(value.isfinite().all())), None)
    if damaged is not None:
        raise ConfigError(f"{file}: {damaged} contains NaN or inf; the weights are damaged, download them again")
    metadata, tensors = _peft_adapter(file, tensors, denoiser_folder)
    for key in tensors:
        method = next((method for substring, method in _UNSUPPORTED_KEYS.items() if substring in key), None)
        if method is not None:
            raise ConfigError(f"{file}: {key}: {method} is not supported; only LoRAs with up and down weights are")
    convert = getattr(getattr(diffusers, pipeline), "lora_state_dict", None)
    if convert is None:
        raise ConfigError(f"{file}: diffusers supports no LoRA for a {pipeline}")
    options: dict[str, Any] = {"return_alphas": True} if pipeline == "FluxPipeline" else {}
    options |= {"unet_config": _AttributeDict(config)} if pipeline == "StableDiffusionXLPipeline" else {}
    traced = {key: tensor.requires_grad_(tensor.is_floating_point()) for key, tensor in tensors.items()}
    try:
        metadata = {**json.loads(metadata_json), **metadata}
        with torch.enable_grad():
            converted = convert({key: tensor.view_as(tensor) for key, tensor in traced.items()}, **options)
    except Exception as error:  # diffusers raises many kinds of errors for weights that it does not know
        raise ConfigError(f"{file}: not a LoRA of a {pipeline}: {first_line(error)}") from error
    weights, alphas = converted if isinstance(converted, tuple) else (converted, None)
    _refuse_text_encoder_weights(file, weights)
    _refuse_unused_weights(file, traced, weights)
    detached = {key: value.detach() for key, value in weights.items()}
    return _layer_updates(file, detached, {**(alphas or {})}, metadata, denoiser_folder)


def _peft_adapter(file: Path, tensors: dict[str, Tensor], denoiser_folder: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Options and weights with the prefix of the denoiser, if peft saved the file; else no options and the same weights.

    Raises:
        ConfigError: the adapter's config is missing, or the adapter is no LoRA or changes the weights of the network.
    """
    if not tensors or not all(key.startswith(_ADAPTER_PREFIX) for key in tensors):
        return {}, tensors
    options = read_config(file.with_name(ADAPTER_CONFIG))
    if options.get("peft_type") != "LORA":
        raise ConfigError(f"{file.parent}: peft_type = {options.get('peft_type')}: only adapters of type LORA are supported")
    if options.get("init_lora_weights") not in (None, True, False, "gaussian", "orthogonal"):
        raise ConfigError(
            f"{file.parent}: init_lora_weights = {options['init_lora_weights']}: it changes the weights of the network too; "
            "merge it with peft and save the pipeline"
        )
    renamed = {f"{denoiser_folder}.{key.removeprefix(_ADAPTER_PREFIX)}": value for key, value in tensors.items()}
    return {f"{denoiser_folder}.{key}": value for key, value in options.items()}, renamed


class _AttributeDict(dict[str, Any]):
    """A config that diffusers can read by key and by attribute."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


def _refuse_text_encoder_weights(file: Path, weights: Mapping[str, Any]) -> None:
    text_keys = sorted(key for key in weights if key.startswith("text_encoder"))
    if text_keys:
        raise ConfigError(
            f"{file}: {len(text_keys)} of its weights are for text encoders (the first is {text_keys[0]}), which is not "
            "supported; fuse it with diffusers and save the pipeline"
        )


@torch.enable_grad()
def _refuse_unused_weights(file: Path, weights: Mapping[str, Tensor], converted: Mapping[str, Tensor]) -> None:
    """Refuse a file of which diffusers' conversion drops a weight.

    The converted weights are differentiable functions of the file's weights; a weight without a gradient was dropped. An alpha
    is used as a number; it is dropped if the file has no other weight of its layer.
    """
    outputs = [value.sum(dtype=torch.float32) for value in converted.values() if value.requires_grad]
    if outputs:
        torch.stack(outputs).sum().backward()
    used = {key for key, value in weights.items() if value.grad is not None}
    used_layers = {_lora_layer(key) for key in used}
    unused = sorted(key for key in weights.keys() - used if not (key.endswith(".alpha") and _lora_layer(key) in used_layers))
    if unused:
        raise ConfigError(
            f"{file}: diffusers drops {len(unused)} of its weights (the first is {unused[0]}), so the images would not be "
            "those of the whole file; fuse it with the program that trained it and save the pipeline"
        )


def _lora_layer(key: str) -> str:
    """Layer of a weight in a LoRA file: the key up to the names of the formats for up, down and alpha."""
    return re.split(r"\.(?:alpha|lora|diff|processor|down|up)|_lora\.", key, maxsplit=1)[0]


def _layer_updates(
    file: Path, weights: dict[str, Tensor], alphas: dict[str, float], metadata: dict[str, Any], denoiser_folder: str
) -> dict[str, LoraDelta]:
    prefix = f"{denoiser_folder}."
    options = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    unsupported = next((name for option, name in _UNSUPPORTED_OPTIONS.items() if options.get(option)), None)
    if unsupported is not None:
        raise ConfigError(
            f"{file}: trained with {unsupported}, which is not supported; fuse it with diffusers and save the pipeline"
        )
    peft_weights = convert_unet_state_dict_to_peft({key.removeprefix(prefix): value for key, value in weights.items()})
    peft_alphas = convert_unet_state_dict_to_peft(
        {key.removeprefix(prefix).removesuffix(".alpha"): value for key, value in alphas.items()}
    )
    layer_alphas = {key.partition(".lora_A")[0]: value for key, value in peft_alphas.items()}
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, value in peft_weights.items():
        layer, separator, suffix = key.partition(".lora_")
        if not separator or suffix not in ("A.weight", "B.weight"):
            raise ConfigError(f"{file}: {key}: neither an up nor a down weight of a LoRA; other weights are not supported")
        pairs.setdefault(layer, {})[suffix[0]] = value
    if not pairs:
        raise ConfigError(f"{file}: has no LoRA weights")
    updates = {}
    for layer, pair in pairs.items():
        if set(pair) != {"A", "B"} or not _can_be_multiplied(pair["B"], pair["A"]):
            raise ConfigError(f"{file}: {layer}: its up and down weights are incomplete or cannot be multiplied")
        rank = pair["A"].shape[0]
        alpha = _alpha(layer_alphas.get(layer, options.get("lora_alpha", rank)), f"{file}: {layer}")
        updates[layer] = LoraDelta(pair["B"], pair["A"], alpha / rank)
    return updates


def _can_be_multiplied(up: Tensor, down: Tensor) -> bool:
    """Whether up is [O, R] or [O, R, 1, 1], and down [R, I] or [R, I, K, K], with a rank R of 1 or more."""
    return min(up.ndim, down.ndim) > 1 and up.shape[1] == down.shape[0] > 0 and math.prod(up.shape[2:]) == 1


def _alpha(value: Any, source: str) -> float:
    """The alpha of a layer as a number.

    Raises:
        ConfigError: it is not a finite number.
    """
    try:
        number = math.nan if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # also a tensor of several values
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{source}: alpha = {' '.join(str(value).split())[:60]}: must be a finite number")
    return number


def check_loras(
    loras: tuple[Lora, ...], pipeline: str, denoiser_folder: str, config: Mapping[str, Any], shapes: Mapping[str, Any]
) -> None:
    """Check that LoRAs fit a denoiser.

    Args:
        loras: the LoRAs.
        pipeline: diffusers pipeline class.
        denoiser_folder: folder of the denoiser.
        config: config of the denoiser.
        shapes: shapes of the denoiser's weights by name, [O, I] or [O, I, K, K].

    Raises:
        ConfigError: a file is missing, cannot be read (see `find_lora`, `read_lora`), or is a LoRA of another network.
    """
    config_json = json.dumps(dict(config), sort_keys=True)
    for lora in loras:
        file = find_lora(lora)
        stat = file.stat()
        for layer, shape in _update_shapes(file, stat.st_size, stat.st_mtime_ns, pipeline, denoiser_folder, config_json):
            _check_layer(file, layer, shape, shapes)


@lru_cache(maxsize=64)
def _update_shapes(
    file: Path, size: int, mtime_ns: int, pipeline: str, denoiser_folder: str, config_json: str
) -> list[tuple[str, tuple[int, ...]]]:
    """Layers and shapes of the updates in a file; read again only if its size or its modification time changes."""
    updates = read_lora(file, pipeline, denoiser_folder, json.loads(config_json))
    return [(layer, (update.up.shape[0], *update.down.shape[1:])) for layer, update in updates.items()]


def _check_layer(file: Path, layer: str, shape: tuple[int, ...], shapes: Mapping[str, Any]) -> None:
    weight_shape = shapes.get(f"{layer}.weight")
    if weight_shape is None:
        raise ConfigError(f"{file}: a LoRA of another network: the checkpoint has no layer {layer}")
    if _squeeze_1x1(shape) != _squeeze_1x1(tuple(weight_shape)):
        raise ConfigError(
            f"{file}: a LoRA of another network: {layer} is {list(shape)} in the LoRA, {list(weight_shape)} in the checkpoint"
        )


def _squeeze_1x1(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a 1 x 1 convolution as a matrix; other shapes are unchanged."""
    return shape[:2] if math.prod(shape[2:]) == 1 else shape


@torch.no_grad()
def fuse_loras(
    network: nn.Module, loras: tuple[Lora, ...], pipeline: str, denoiser_folder: str, config: Mapping[str, Any]
) -> None:
    """Add the updates of LoRAs to the weights of a diffusers denoiser, in place and in float32.

    Raises:
        ConfigError: see `check_loras`.
    """
    parameters = dict(network.named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    for lora in loras:
        file = find_lora(lora)
        for layer, update in read_lora(file, pipeline, denoiser_folder, config).items():
            delta = update.scaled(lora.scale)
            _check_layer(file, layer, tuple(delta.shape), shapes)
            weight = parameters[f"{layer}.weight"]
            weight.add_(delta.reshape(weight.shape).to(weight))
