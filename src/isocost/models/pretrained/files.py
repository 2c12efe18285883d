"""The files of a pipeline folder: found here or on the Hub, checked before anything is built, read, and named by their content.

Weights are safetensors; every file that the folder's own indices name must be there and whole.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import nn

from isocost.config.base import digest
from isocost.errors import ConfigError

INDEX = "model_index.json"
PARTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Folders that hold weights."""
PLAIN_PARTS = ("scheduler", "tokenizer", "tokenizer_2", "tokenizer_3")
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
STEMS = ("diffusion_pytorch_model", "model")
"""What diffusers and transformers call their weights."""
VARIANTS = ("", ".fp16")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
NOT_NEEDED = ("*.bin", "*.ckpt", "*.msgpack", "*.onnx*", "*.xml", "*.non_ema.*", "*openvino*", "*flax*")

M = TypeVar("M", bound=nn.Module)


def is_pretrained(path: str | Path) -> bool:
    """Whether a pipeline of diffusers is meant: a folder of one that isocost did not publish, or a Hub id."""
    folder = Path(path)
    if folder.exists():
        return (folder / INDEX).is_file()
    return HUB_ID.fullmatch(str(path)) is not None


def find_folder(path: str | Path) -> Path:
    """The folder itself, or the Hub's snapshot of an id (`OWNER/NAME`, `OWNER/NAME@REVISION`), fetched where it is not cached.

    Raises:
        ConfigError: neither is there.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if HUB_ID.fullmatch(str(path)) is None:
        raise ConfigError(f"{path}: no such folder, and not a Hub id (OWNER/NAME)")
    name, _, revision = str(path).partition("@")
    wanted = [INDEX, *(f"{part}/*" for part in (*PARTS, *PLAIN_PARTS))]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted, ignore_patterns=list(NOT_NEEDED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        said = " ".join(str(error).split())[:160]
        raise ConfigError(f"{path}: no folder here, not in the Hub's cache, and the Hub does not give it: {said}") from error


def read_config(file: Path) -> dict[str, Any]:
    """A JSON file of the folder.

    Raises:
        ConfigError: it is missing or no JSON object.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: missing; the folder is not whole (half a download?)")
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not JSON: {error}") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"{file}: not a JSON object")
    return plain


def weight_files(part: Path) -> tuple[str, list[Path]]:
    """The variant ("" or "fp16") of a part's weights, and their files, each there and whole. Full precision comes first.

    Raises:
        ConfigError: pickled weights alone, a missing or a truncated file; the file is named.
    """
    for variant in VARIANTS:
        for stem in STEMS:
            single = part / f"{stem}{variant}.safetensors"
            indices = [part / f"{stem}.safetensors.index{variant}.json", part / f"{stem}{variant}.safetensors.index.json"]
            index = next((file for file in indices if file.is_file()), None)
            if index is not None:
                shards = read_config(index).get("weight_map")
                if not isinstance(shards, dict) or not shards:
                    raise ConfigError(f"{index}: no weight_map in it")
                files = [part / name for name in sorted(set(shards.values()))]
            elif single.is_file():
                files = [single]
            else:
                continue
            for file in files:
                check_whole(file)
            return variant.lstrip("."), files
    pickles = sorted(file for file in part.glob("*") if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ConfigError(f"{pickles[0]}: pickled weights are refused (they can run code when loaded); convert to safetensors")
    stem = STEMS[part.name.startswith("text_encoder")]
    raise ConfigError(f"{part / f'{stem}.safetensors'}: missing; the folder is not whole (half a download?)")


def check_whole(file: Path) -> None:
    """
    Raises:
        ConfigError: a safetensors file is missing, or shorter or longer than its own header says.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: missing; the folder is not whole (half a download?)")
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        header = opened.read(length) if 8 + length <= size else b""
    try:
        tensors = [value for key, value in json.loads(header).items() if key != "__metadata__"]
        end = 8 + length + max((int(one["data_offsets"][1]) for one in tensors), default=0)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: not a whole safetensors file; fetch it again") from error
    if end != size:
        raise ConfigError(f"{file}: {size:,} bytes where its header says {end:,}: a truncated file; fetch it again")


def load_module(kind: type[M], part: Path) -> M:
    """A network of diffusers or transformers with all of its weights, float32.

    Raises:
        ConfigError: files are missing, pickled or truncated, or do not hold every weight that the configuration asks for.
    """
    read_config(part / "config.json")
    variant, _ = weight_files(part)
    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, "variant": variant or None}
    is_diffusers = kind.__module__.startswith("diffusers")
    options |= {"torch_dtype": torch.float32, "low_cpu_mem_usage": False} if is_diffusers else {"dtype": torch.float32}
    try:
        network, told = kind.from_pretrained(str(part), **options)  # type: ignore[attr-defined]
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise ConfigError(f"{part}: does not load: {' '.join(str(error).split())[:200]}") from error
    absent = sorted(told["missing_keys"]) + [str(one) for one in told.get("mismatched_keys", ())]
    if absent:
        raise ConfigError(f"{part}: {len(absent)} weights are missing or of another shape, {absent[0]} first")
    loaded: M = network.eval().requires_grad_(False)
    return loaded


def content_digest(folder: Path, added: Sequence[tuple[Path, float]] = ()) -> str:
    """16 hex digits of all that decides the checkpoint's images: configurations, tokenizers, weights.

    `added` are files of LoRAs with their scales.
    """
    files = [folder / INDEX]
    for name in (*PARTS, *PLAIN_PARTS):
        part = folder / name
        if part.is_dir():
            files += [file for file in part.iterdir() if file.suffix in (".json", ".txt", ".model")]
        if name in PARTS and (part / "config.json").is_file():
            files += weight_files(part)[1]
    hashes = {str(file.relative_to(folder)): _hash(file, *_stamp(file)) for file in sorted(set(files))}
    loras = [[_hash(file, *_stamp(file)), scale] for file, scale in added]
    return digest({"stage": "pretrained", "version": 1, "files": hashes, **({"loras": loras} if loras else {})})


def _stamp(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=1024)
def _hash(file: Path, size: int, changed_ns: int) -> str:
    """SHA-256 of a file, once a process as long as size and time of change stay."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
