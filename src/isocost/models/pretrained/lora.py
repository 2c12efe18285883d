"""LoRA files on top of a checkpoint (arXiv 2106.09685): `CHECKPOINT + LORA[:SCALE] [+ ...]`.

diffusers reads the files, whoever trained them, into its own names; here what they say is added to the weights,
`W + scale * alpha / rank * up @ down`, so that a network with a LoRA is as fast as one without, and is called as one.

Shapes: O outputs, I inputs of a layer, K side of a kernel, R rank.
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
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor, nn

from isocost.errors import ConfigError
from isocost.models.pretrained.files import PICKLE_SUFFIXES, check_whole

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
"""What diffusers calls a LoRA's file."""
_ADDED = re.compile(r"(?:^|\s)\+(?:\s|$)")
_SCALED = re.compile(r"(.+?)(?::([+-]?(?:\d+\.?\d*|\.\d+)))?")
_HUB_FILE = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?:@([\w.-]+))?(?:/(.+\.safetensors))?")
_METADATA = "lora_adapter_metadata"
_NOT_READ = {"use_dora": "DoRA", "use_rslora": "rank-stabilised scales", "alpha_pattern": "alphas by pattern"}
_OTHER_FORMS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "lora_mid": "CP LoCon"}


@dataclass(frozen=True)
class Lora:
    """A file, or where the Hub has it, and the factor of what it adds."""

    path: str
    scale: float = 1.0

    def __str__(self) -> str:
        return self.path if self.scale == 1 else f"{self.path}:{self.scale:g}"

    @property
    def name(self) -> str:
        """What tables call it: its file, or the folder or repository of one that is called as all are."""
        path = Path(self.path)
        named = path.parent.name if path.name == WEIGHT_NAME else path.name.removesuffix(".safetensors")
        return named if self.scale == 1 else f"{named}:{self.scale:g}"


def split_loras(source: str | Path) -> tuple[str, tuple[Lora, ...]]:
    """`CHECKPOINT + LORA[:SCALE] + ...` to the checkpoint and its LoRAs, none where there is no plus between spaces.

    Raises:
        ConfigError: nothing stands on one side of a plus, or a scale is 0.
    """
    if Path(source).is_dir():
        return str(source), ()
    base, *added = _ADDED.split(str(source))
    loras = []
    for one in added:
        matched = _SCALED.fullmatch(one.strip())
        if not base.strip() or matched is None:
            raise ConfigError(f"{source}: write CHECKPOINT + LORA, or CHECKPOINT + LORA:SCALE")
        lora = Lora(matched[1], 1.0 if matched[2] is None else float(matched[2]))
        if lora.scale == 0:
            raise ConfigError(f"{source}: {lora.path} at scale 0 does nothing; leave it out")
        loras.append(lora)
    return base.strip(), tuple(loras)


def absolute(source: str | Path) -> str:
    """The same source wherever it is read from: folders and files by absolute paths, Hub ids as they are."""
    base, loras = split_loras(source)
    at = [os.path.abspath(base) if Path(base).is_dir() else base]
    at += [str(Lora(os.path.abspath(one.path), one.scale) if Path(one.path).exists() else one) for one in loras]
    return " + ".join(at)


def find_lora(lora: Lora) -> Path:
    """The file of a LoRA: itself, the one in a folder, or the Hub's (`OWNER/NAME[@REVISION][/FILE.safetensors]`), whole.

    Raises:
        ConfigError: there is none, it is pickled or truncated, or a folder holds several.
    """
    path = Path(lora.path)
    if path.is_dir():
        path = _only_file(path)
    elif not path.is_file() and (matched := _HUB_FILE.fullmatch(lora.path)) is not None:
        name, revision, file = matched.groups()
        try:
            path = Path(hf_hub_download(name, file or WEIGHT_NAME, revision=revision))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            said = " ".join(str(error).split())[:160]
            not_here = "no file here, not in the Hub's cache, and the Hub does not give it"
            raise ConfigError(f"{lora.path}: {not_here}: {said}") from error
    if path.suffix in PICKLE_SUFFIXES:
        raise ConfigError(f"{path}: a pickled LoRA is refused (it can run code when loaded); convert to safetensors")
    if not path.is_file():
        raise ConfigError(f"{path}: no such LoRA; give a safetensors file, a folder of one, or a Hub id")
    check_whole(path)
    return path


def _only_file(folder: Path) -> Path:
    if (folder / WEIGHT_NAME).is_file():
        return folder / WEIGHT_NAME
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        raise ConfigError(f"{folder}: {len(files)} safetensors files; give the one that is meant, as {files[0]}")
    pickles = sorted(file for file in folder.glob("*") if file.suffix in PICKLE_SUFFIXES)
    return [*files, *pickles, folder / WEIGHT_NAME][0]


@dataclass(frozen=True, eq=False)
class LoraDelta:
    """What a LoRA adds to a layer before its scale: `factor * up @ down`; up [O, R], down [R, I] or [R, I, K, K]."""

    up: Tensor
    down: Tensor
    factor: float

    def __call__(self, scale: float) -> Tensor:
        """float32 [O, I] or [O, I, K, K]."""
        added = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (scale * self.factor * added).unflatten(1, self.down.shape[1:])


def read_lora(file: Path, pipeline: str, part: str, config: Mapping[str, Any]) -> dict[str, LoraDelta]:
    """What a file adds, by the name of the layer.

    Args:
        file: safetensors, whole.
        pipeline: diffusers' class, which knows the forms that files for it have.
        part: the denoiser's folder, which its layers are called by in the file.
        config: the denoiser's.

    Raises:
        ConfigError: no LoRA of such a pipeline, one with more than up and down weights, or one for text encoders too.
    """
    with safe_open(file, "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        written = (opened.metadata() or {}).get(_METADATA, "{}")
    for key in tensors:
        form = next((form for snapshot, form in _OTHER_FORMS.items() if snapshot in key), None)
        if form is not None:
            raise ConfigError(f"{file}: {key}: {form} is not read here; LoRAs of up and down weights are")
    reader = getattr(getattr(diffusers, pipeline), "lora_state_dict", None)
    if reader is None:
        raise ConfigError(f"{file}: diffusers has no LoRA for a {pipeline}")
    options: dict[str, Any] = {"return_alphas": True} if pipeline == "FluxPipeline" else {}
    options |= {"unet_config": _Fields(config)} if pipeline == "StableDiffusionXLPipeline" else {}
    try:
        metadata, told = json.loads(written), reader(dict(tensors), **options)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"{file}: no LoRA of a {pipeline}: {' '.join(str(error).split())[:160]}") from error
    weights, alphas = told if isinstance(told, tuple) else (told, None)
    _refuse_text(file, weights)
    return _pairs(file, weights, {**(alphas or {})}, metadata, part)


class _Fields(dict[str, Any]):
    """A configuration as diffusers' readers take one: by key and by attribute."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


def _refuse_text(file: Path, weights: Mapping[str, Any]) -> None:
    of_text = sorted(key for key in weights if key.startswith("text_encoder"))
    if of_text:
        raise ConfigError(
            f"{file}: {len(of_text)} of its weights are for text encoders ({of_text[0]} first), which are not changed here; "
            "fuse it with diffusers and save the pipeline"
        )


def _pairs(
    file: Path, weights: dict[str, Tensor], alphas: dict[str, float], metadata: dict[str, Any], part: str
) -> dict[str, LoraDelta]:
    own = {key.removeprefix(f"{part}."): value for key, value in metadata.items() if key.startswith(f"{part}.")}
    odd = next((what for field, what in _NOT_READ.items() if own.get(field)), None)
    if odd is not None:
        raise ConfigError(f"{file}: trained with {odd}, which is not read here; fuse it with diffusers and save the pipeline")
    named = convert_unet_state_dict_to_peft({key.removeprefix(f"{part}."): value for key, value in weights.items()})
    of_alphas = convert_unet_state_dict_to_peft(
        {key.removeprefix(f"{part}.").removesuffix(".alpha"): value for key, value in alphas.items()}
    )
    by_layer = {key.partition(".lora_A")[0]: float(value) for key, value in of_alphas.items()}
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in named.items():
        layer, snapshot, rest = key.partition(".lora_")
        if not snapshot or rest not in ("A.weight", "B.weight"):
            raise ConfigError(f"{file}: {key}: neither an up nor a down weight of a LoRA, and nothing else is read")
        found.setdefault(layer, {})[rest[0]] = value
    if not found:
        raise ConfigError(f"{file}: no LoRA weights in it")
    additions = {}
    for layer, pair in found.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1] or math.prod(pair["B"].shape[2:]) != 1:
            raise ConfigError(f"{file}: {layer}: its up and down weights make no product; not a LoRA, or half of one")
        rank = pair["A"].shape[0]
        alpha = by_layer.get(layer, own.get("lora_alpha", rank))
        additions[layer] = LoraDelta(pair["B"], pair["A"], float(alpha) / rank)
    return additions


def check_loras(
    loras: tuple[Lora, ...], pipeline: str, part: str, config: Mapping[str, Any], shapes: Mapping[str, Any]
) -> None:
    """
    Args:
        loras: what is added.
        pipeline, part, config: as of `read_lora`.
        shapes: the denoiser's weights by name, [O, I] or [O, I, K, K] each.

    Raises:
        ConfigError: what `find_lora` and `read_lora` raise, or a LoRA of another network.
    """
    plain = json.dumps(dict(config), sort_keys=True)
    for lora in loras:
        file = find_lora(lora)
        stat = file.stat()
        for layer, shape in _lora_layers(file, stat.st_size, stat.st_mtime_ns, pipeline, part, plain):
            _check_layer(file, layer, shape, shapes)


@lru_cache(maxsize=64)
def _lora_layers(
    file: Path, size: int, changed_ns: int, pipeline: str, part: str, config: str
) -> list[tuple[str, tuple[int, ...]]]:
    """Layers that a file adds to with the shape of what it adds; read once a process as long as the file stays."""
    read = read_lora(file, pipeline, part, json.loads(config))
    return [(layer, (one.up.shape[0], *one.down.shape[1:])) for layer, one in read.items()]


def _check_layer(file: Path, layer: str, shape: tuple[int, ...], shapes: Mapping[str, Any]) -> None:
    own = shapes.get(f"{layer}.weight")
    if own is None:
        raise ConfigError(f"{file}: a LoRA of another network: this one has no layer {layer}")
    if _squeeze_1x1(shape) != _squeeze_1x1(tuple(own)):
        there, here = list(shape), list(own)
        raise ConfigError(f"{file}: a LoRA of another network: {layer} is {there} there and {here} here")


def _squeeze_1x1(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A kernel of one pixel is a matrix."""
    return shape[:2] if math.prod(shape[2:]) == 1 else shape


@torch.no_grad()
def fuse_loras(network: nn.Module, loras: tuple[Lora, ...], pipeline: str, part: str, config: Mapping[str, Any]) -> None:
    """Add what LoRAs say to the weights of a denoiser of diffusers, in place and in float32.

    Raises:
        ConfigError: as `check_loras`.
    """
    layers = dict(network.named_parameters())
    shapes = {name: parameter.shape for name, parameter in layers.items()}
    for lora in loras:
        file = find_lora(lora)
        for layer, addition in read_lora(file, pipeline, part, config).items():
            added = addition(lora.scale)
            _check_layer(file, layer, tuple(added.shape), shapes)
            weight = layers[f"{layer}.weight"]
            weight.add_(added.reshape(weight.shape).to(weight))
