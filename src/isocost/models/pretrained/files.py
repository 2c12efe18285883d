"""Files of a pipeline folder: find them locally or on the Hub, check them, load them, and compute their digest.

Weights must be safetensors. Every file that the folder's indices name must exist and be complete.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn

from isocost.config.base import digest
from isocost.errors import ConfigError
from isocost.models.weight_checks import check_loaded
from isocost.utils.file_hash import file_sha256
from isocost.utils.json_text import parse_json
from isocost.utils.progress import no_library_progress

MODEL_INDEX = "model_index.json"
WEIGHT_FOLDERS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Folders that hold weights."""
OTHER_FOLDERS = ("scheduler", "tokenizer", "tokenizer_2", "tokenizer_3")
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
WEIGHT_STEMS = ("diffusion_pytorch_model", "model")
"""File names of weights in diffusers and in transformers, without suffix."""
VARIANTS = ("", ".fp32", ".fp16", ".bf16", ".ema", ".non_ema")
"""Variants of weights in the order of preference."""
WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".sft")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
"""Hub id of a repository without an owner, such as `t5-small`."""
IGNORED_FILES = ("*.onnx*", "*openvino*", "*flax*")
DOWNLOADED_SUFFIXES = (".json", ".txt", ".model")
"""Suffixes of configs, indices and tokenizers."""

QUANTISED = "quantised weights are not supported; load the pipeline with diffusers, dequantise it and save it in bf16 or fp16"
"""Ending of the errors for quantised networks."""
MAX_SIZE = 10_000_000
_LIMITS = {"layers": 200, "sample_size": 8192, "pos_embed_max_size": 512, "block_out_channels": 65_536}
"""Largest numbers in the config of a network, by a part of the field's name. Published networks have at most 57 layers."""
_FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
_SCALES = (".scale_weight", "scaled_fp8", ".SCB", ".weight_scale", ".weight._scale")
"""Ends of the names of scales in quantised weights."""
MAX_FILE_NAME = 255

M = TypeVar("M", bound=nn.Module)


def is_pretrained(path: str | Path) -> bool:
    """True if a path is a diffusers pipeline folder or a Hub id."""
    folder = Path(path)
    if folder.exists():
        return (folder / MODEL_INDEX).is_file()
    if folder.suffix in (*WEIGHT_SUFFIXES, *PICKLE_SUFFIXES):
        return False
    return HUB_ID.fullmatch(str(path)) is not None


def explain_other_layout(path: str | Path) -> str:
    """One line about weights that are no diffusers folder, with the remedy; empty if there are none at a path.

    Such weights are a single file, as of Civitai, or a folder of single files, as ComfyUI and other programs have.
    """
    source = Path(path)
    convert = "PIPELINE.from_single_file(FILE).save_pretrained(FOLDER) of diffusers, with its pipeline class for the model"
    if source.is_file():
        return f"{path}: a single file, not a diffusers pipeline folder; convert it: {convert}"
    if not source.is_dir() or (source / MODEL_INDEX).is_file():
        return ""
    files = [file for folder in (source, *sorted(source.iterdir())) if folder.is_dir() for file in sorted(folder.iterdir())]
    weights = [file for file in files if file.suffix in (*WEIGHT_SUFFIXES, *PICKLE_SUFFIXES)]
    if (source / "config.json").is_file() and weights:
        return f"{path}: one network, not a pipeline folder with a {MODEL_INDEX}; give the folder of the whole pipeline"
    if weights:
        return f"{path}: has {weights[0].relative_to(source)}, but no {MODEL_INDEX} of diffusers; convert a file: {convert}"
    return ""


def find_folder(path: str | Path) -> Path:
    """Resolve a path: a folder, or the snapshot of a Hub id (`OWNER/NAME`, `OWNER/NAME@REVISION`), downloaded if not cached.

    Raises:
        ConfigError: there is no such folder, and the Hub id cannot be downloaded.
    """
    folder = Path(path)
    if folder.is_dir() and not explain_other_layout(folder):
        return folder
    if folder.exists():
        raise ConfigError(explain_other_layout(path))
    if HUB_ID.fullmatch(str(path)) is None or folder.suffix in (*WEIGHT_SUFFIXES, *PICKLE_SUFFIXES):
        raise ConfigError(f"{path}: no such folder, and not a Hub id (OWNER/NAME)")
    return download(str(path), WEIGHT_FOLDERS, OTHER_FOLDERS)


def find_component(path: str | Path, subfolder: str | None, other_folders: Sequence[str] = ()) -> Path:
    """The root folder of an autoencoder or text encoder that is not a part of a pipeline: a folder or a snapshot of the Hub.

    Args:
        path: a folder or a Hub id, downloaded if it is not cached.
        subfolder: folder of the network inside `path`.
        other_folders: further folders that are needed, such as that of the tokenizer.

    Raises:
        ConfigError: there is no such folder, and the Hub id cannot be downloaded.
    """
    folder = Path(path).expanduser()
    if folder.exists():
        if not folder.is_dir():
            raise ConfigError(f"{path}: a file, not a folder with a config.json; give the folder")
        return folder
    if HUB_ID.fullmatch(str(path)) is None and HUB_NAME.fullmatch(str(path)) is None:
        raise ConfigError(f"{path}: no such folder, and not a Hub id (OWNER/NAME)")
    return download(str(path), (subfolder or "",), other_folders)


def download(hub_id: str, network_folders: Sequence[str], other_folders: Sequence[str]) -> Path:
    """Download what is not cached: for every network the weights of the first variant of `VARIANTS` that the repository has.

    Args:
        hub_id: `OWNER/NAME` or `OWNER/NAME@REVISION`.
        network_folders: folders of networks; "" is the repository itself.
        other_folders: folders without weights.

    Returns:
        The snapshot.

    Raises:
        ConfigError: the download failed, or the repository has no safetensors weights of a network.
    """
    try:
        return _download(hub_id, network_folders, other_folders)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"{hub_id}: no such folder, not in the Hub's cache, and the download failed: {reason}") from error


def _download(hub_id: str, network_folders: Sequence[str], other_folders: Sequence[str]) -> Path:
    name, _, revision = hub_id.partition("@")
    all_folders = (*network_folders, *other_folders)
    small = [f"{folder}/*{suffix}".lstrip("/") for folder in all_folders for suffix in DOWNLOADED_SUFFIXES]
    lacking = network_folders
    for variant in (*VARIANTS, ".*"):
        weights = [f"{folder}/{pattern}".lstrip("/") for folder in lacking for pattern in _weight_patterns(variant)]
        ignored = list(IGNORED_FILES)
        ignored += ["*.*.safetensors"] if not variant else []
        ignored += ["*.non_ema.*"] if variant not in (".non_ema", ".*") else []
        snapshot = Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=[MODEL_INDEX, *small, *weights],
                ignore_patterns=ignored,
            )
        )
        lacking = [
            folder
            for folder in lacking
            if (snapshot / folder / "config.json").is_file() and not _has_variant(snapshot / folder, variant)
        ]
        if not lacking:
            return snapshot
    file = f"{lacking[0]}/{WEIGHT_STEMS[lacking[0].startswith('text_encoder')]}.safetensors".lstrip("/")
    raise ConfigError(
        f"{hub_id}: {file}: missing in the repository, or in the Hub's cache after an interrupted download; pickled weights "
        "are refused (they can run code when loaded): convert them, or choose another repository"
    )


def _weight_patterns(variant: str) -> list[str]:
    """Patterns of the file names of a variant's weights, in one file or in shards."""
    ends = (f"{variant}.safetensors", f"{variant}-*-of-*.safetensors", f"-*-of-*{variant}.safetensors")
    return [stem + end for stem in WEIGHT_STEMS for end in ends]


def _has_variant(folder: Path, variant: str) -> bool:
    names = [file.name for file in folder.glob("*.safetensors") if variant or file.name.count(".") == 1]
    return any(fnmatchcase(name, pattern) for name in names for pattern in _weight_patterns(variant))


def read_config(file: Path) -> dict[str, Any]:
    """Read a JSON file.

    Raises:
        ConfigError: the file is missing or is not a JSON object, or an object has a key twice.
    """
    if not file.is_file():
        raise ConfigError(_missing(file))
    try:
        config = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, not UTF-8, a key twice, nested too deeply, or an integer of too many digits
        raise ConfigError(f"{file}: not JSON: {' '.join(str(error).split())[:160]}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: not a JSON object")
    return config


def read_component_config(file: Path) -> dict[str, Any]:
    """Read the config of a network, and refuse what would not load or would take forever.

    Raises:
        ConfigError: the file is missing or is not a JSON object, the network is quantised, or a number is too large.
    """
    config = read_config(file)
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ConfigError(f"{file}: quantization_config: {str(method)[:40]}: {QUANTISED}")
    for key, value in config.items():
        if key.startswith("_"):
            continue
        limit = next((limit for name, limit in _LIMITS.items() if name in key), MAX_SIZE)
        largest = max(_numbers_in(value), default=0)
        if largest > limit:
            raise ConfigError(
                f"{file}: {key} = {str(value)[:60]}: too large; isocost reads networks with at most {limit:,} here"
            )
    return config


def _numbers_in(value: Any) -> Iterator[float]:
    """All numbers in a value of JSON."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, int | float) and not isinstance(item, bool):
            yield abs(item)
        elif isinstance(item, list | tuple):
            pending += item
        elif isinstance(item, dict):
            pending += item.values()


def _missing(file: Path) -> str:
    return f"{file}: missing; the folder is incomplete (interrupted download?)"


def weight_files(folder: Path) -> tuple[str, list[Path]]:
    """Find the weights of a network folder: of the first variant of `VARIANTS` that exists, or of the only other one.

    Returns:
        The variant ("", "fp16", ...) and the files, all of them complete.

    Raises:
        ConfigError: a file is missing or truncated, or there are only pickled weights; the message names the file.
    """
    others = _other_variants(folder)
    for variant in (*VARIANTS, *(others if len(others) == 1 else ())):
        for stem in WEIGHT_STEMS:
            single = folder / f"{stem}{variant}.safetensors"
            indices = [folder / f"{stem}.safetensors.index{variant}.json", folder / f"{stem}{variant}.safetensors.index.json"]
            index = next((file for file in indices if file.is_file()), None)
            if index is not None:
                shards = read_config(index).get("weight_map")
                if not isinstance(shards, dict) or not shards:
                    raise ConfigError(f"{index}: has no weight_map")
                invalid = [name for name in shards.values() if not _is_file_name(name)]
                if invalid:
                    raise ConfigError(f"{index}: weight_map: {str(invalid[0])[:60]!r} is not the name of a file in this folder")
                files = [folder / name for name in sorted(set(shards.values()))]
            elif single.is_file():
                files = [single]
            else:
                continue
            for file in files:
                check_complete(file)
            return variant.lstrip("."), files
    pickles = sorted(file for file in folder.glob("*") if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ConfigError(f"{pickles[0]}: pickled weights are refused (they can run code when loaded); convert to safetensors")
    if len(others) > 1:
        names = ", ".join(name.lstrip(".") for name in others)
        raise ConfigError(f"{folder}: has the variants {names} of its weights; keep one of them")
    stem = WEIGHT_STEMS[folder.name.startswith("text_encoder")]
    raise ConfigError(_missing(folder / f"{stem}.safetensors"))


def _is_file_name(name: Any) -> bool:
    is_text = isinstance(name, str) and name.isprintable() and len(name.encode(errors="replace")) <= MAX_FILE_NAME
    return is_text and name not in ("", ".", "..") and "/" not in name and "\\" not in name


def _other_variants(folder: Path) -> list[str]:
    """Variants in the names of weight files that are not in `VARIANTS`, with their leading dot."""
    pattern = re.compile(rf"(?:{'|'.join(WEIGHT_STEMS)})(\.[\w-]+?)(?:-\d+-of-\d+)?\.safetensors")
    matches = (pattern.fullmatch(file.name) for file in folder.glob("*.safetensors"))
    return sorted({match[1] for match in matches if match is not None} - set(VARIANTS))


def check_complete(file: Path) -> None:
    """
    Raises:
        ConfigError: a safetensors file is missing, it is truncated, or its weights are quantised.
    """
    if not file.is_file():
        raise ConfigError(_missing(file))
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        header = opened.read(length) if 8 + length <= size else b""
    try:
        tensors = {key: value for key, value in json.loads(header).items() if key != "__metadata__"}
        end = 8 + length + max((int(tensor["data_offsets"][1]) for tensor in tensors.values()), default=0)
        types = {key: str(tensor["dtype"]) for key, tensor in tensors.items()}
    except (ValueError, AttributeError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{file}: not a complete safetensors file; download it again") from error
    if end != size:
        raise ConfigError(f"{file}: truncated: it has {size:,} bytes, its header needs {end:,}; download it again")
    for key, type_name in types.items():
        is_integer_weight = type_name not in _FLOAT_TYPES and "weight" in key
        if type_name.startswith(("F8", "F4", "F6")) or is_integer_weight or key.endswith(_SCALES):
            raise ConfigError(f"{file}: {key} has type {type_name}: {QUANTISED}")


def load_module(
    network_class: type[M], folder: Path, dtype: torch.dtype = torch.float32, unused_weights: tuple[str, ...] = ()
) -> M:
    """Load a network with all of its weights. Every part of a checkpoint is loaded by this function, under the same rules.

    Args:
        network_class: a class of diffusers, transformers or isocost.
        folder: folder of its config and weights.
        dtype: of the weights in memory. They are converted one by one while they are read.
        unused_weights: starts of the names of weights that are not used, and may be missing.

    Raises:
        ConfigError: files are missing, pickled or truncated, lack weights that the config requires, or contain NaN or inf.
    """
    read_component_config(folder / "config.json")
    variant, files = weight_files(folder)
    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, "variant": variant or None}
    is_diffusers = issubclass(network_class, ModelMixin)
    options |= {"torch_dtype" if is_diffusers else "dtype": dtype}
    try:
        with no_library_progress():
            network, loading_info = network_class.from_pretrained(str(folder), **options)  # type: ignore[attr-defined]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # diffusers and transformers raise many kinds of errors for a wrong config
        raise ConfigError(f"{folder}: cannot load it: {first_line(error)}") from error
    missing = {key for key in loading_info["missing_keys"] if not key.startswith(unused_weights or ("\0",))}
    check_loaded(network, {**loading_info, "missing_keys": missing}, folder, files)
    loaded: M = network.eval().requires_grad_(False)
    return loaded


def load_tokenizer(folder: Path) -> Any:
    """Load a transformers tokenizer.

    Raises:
        ConfigError: the folder has no tokenizer that the installed transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # transformers and tokenizers raise many kinds of errors for wrong files
        raise ConfigError(f"{folder}: cannot load a tokenizer from it: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The message of another library's error in one line, with its kind if it has no message."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def content_digest(folder: Path, loras: Sequence[tuple[Sequence[Path], float]] = ()) -> str:
    """Digest of everything that determines the images of a checkpoint: configs, tokenizers and weights.

    Args:
        folder: pipeline folder.
        loras: the files of every LoRA, and its scale.

    Returns:
        16 hexadecimal digits.
    """
    files = [folder / MODEL_INDEX]
    for name in (*WEIGHT_FOLDERS, *OTHER_FOLDERS):
        component = folder / name
        if component.is_dir():
            files += [file for file in component.iterdir() if file.suffix in (".json", ".txt", ".model")]
        if name in WEIGHT_FOLDERS and (component / "config.json").is_file():
            files += weight_files(component)[1]
    hashes = {str(file.relative_to(folder)): file_sha256(file) for file in sorted(set(files))}
    lora_hashes = [[*(file_sha256(file) for file in files), scale] for files, scale in loras]
    lora_entry = {"loras": lora_hashes} if lora_hashes else {}
    return digest({"stage": "pretrained", "version": 1, "files": hashes, **lora_entry})
