"""Weights from a local file, a URL or the Hugging Face Hub, checked by SHA-256 and read without running pickled code.

A source is `PATH`, `https://...` or `hub:OWNER/NAME@REVISION`. An appended `#sha256=HEX` states the expected hash, for a
file other than the known one.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from isocost.errors import ConfigError

HUB = "hub:"
_SOURCE_WITH_HASH = re.compile(r"(?P<source>.*)#sha256=(?P<sha256>[0-9a-fA-F]{64})")


@dataclass(frozen=True)
class WeightsFile:
    """A local file and the SHA-256 of its bytes."""

    path: Path
    sha256: str


OFFLINE_REMEDY = "use features without a download: `protocol: offline` in a study (--set protocol=offline)"


def find_weights(source: str, *, known_sha256: str | None, title: str, hub_file: str = "model.safetensors") -> WeightsFile:
    """Find the weights file of `source`, download it if necessary, and check its hash.

    The expected hash is the one appended to `source`, else `known_sha256`. If both are missing, a file of the Hub is checked
    against the hash that the Hub lists for it, and a local file or URL is refused.

    Args:
        source: as in the module docstring.
        known_sha256: hash of the published file, 64 hex digits.
        title: name of the network in messages.
        hub_file: file name inside a Hub repository or a local folder.

    Raises:
        ConfigError: the file is missing, cannot be downloaded, has another hash, or its hash is unknown.
    """
    with_hash = _SOURCE_WITH_HASH.fullmatch(source)
    location, expected = (with_hash["source"], with_hash["sha256"].lower()) if with_hash else (source, known_sha256)
    if location.startswith(HUB):
        file, listed_sha256 = _download_from_hub(location, hub_file, title)
        expected = expected or listed_sha256
    elif location.startswith(("https://", "http://")):
        file = _download_url(location, title)
    else:
        path = Path(location).expanduser()
        file = path / hub_file if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(f"{title}: {file}: no such weights file; give a local file, a URL or {HUB}OWNER/NAME@REVISION")
    sha256 = file_sha256(file)
    if expected is None:
        raise ConfigError(
            f"{title}: no expected hash is known for its weights; if you trust {file.name}, give {location}#sha256={sha256}"
        )
    if sha256 != expected:
        raise ConfigError(
            f"{title}: {file.name}: SHA-256 {sha256[:16]}..., expected {expected[:16]}...; download it again, "
            f"or if you trust this file, give {location}#sha256={sha256}"
        )
    return WeightsFile(file, sha256)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, or of a torch file that contains only tensors.

    Raises:
        ConfigError: the file is missing, truncated, of another format, or contains pickled objects, which are never run.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: no such weights file")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ConfigError(f"{file}: truncated or not a safetensors file ({error}); download it again, or convert it") from error
    except pickle.UnpicklingError as error:
        raise ConfigError(f"{file}: contains pickled objects, which are refused; convert it to safetensors") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:80]
        raise ConfigError(f"{file}: truncated or not a torch weights file ({reason}); download it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ConfigError(f"{file}: not a plain dictionary of tensors; convert it to safetensors")
    return tensors


def load_into(network: torch.nn.Module, tensors: Mapping[str, Tensor], file: object) -> None:
    """Load `tensors` into `network`; names and shapes must match exactly.

    Args:
        network: the network to fill.
        tensors: its weights by name.
        file: name of the source in messages.

    Raises:
        ConfigError: a tensor is missing, superfluous or of another shape; the message names the first one.
    """
    state = network.state_dict()
    for name in sorted(set(state) ^ set(tensors)):
        problem = f"no tensor {name}" if name in state else f"a tensor {name} that the network does not have"
        raise ConfigError(f"{file}: {problem}; these are weights of another network")
    for name, tensor in state.items():
        if tensor.shape != tensors[name].shape:
            raise ConfigError(
                f"{file}: tensor {name} has shape {list(tensors[name].shape)}, not {list(tensor.shape)}; "
                "these are weights of another network"
            )
    network.load_state_dict(dict(tensors), strict=True)


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes of tensors, in the order of the names."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        hasher.update(name.encode())
        hasher.update(tensors[name].contiguous().numpy().tobytes())
    return hasher.hexdigest()


def text_sha256(value: object) -> str:
    """SHA-256 of the canonical JSON of plain data."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()


def _download_url(url: str, title: str) -> Path:
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.partial")
        try:
            torch.hub.download_url_to_file(url, str(partial), progress=False)
        except OSError as error:
            raise ConfigError(
                f"{title}: {url} cannot be downloaded ({error}); put the file at {file}, give its path, or {OFFLINE_REMEDY}"
            ) from error
        partial.replace(file)
    return file


def _download_from_hub(source: str, name: str, title: str) -> tuple[Path, str | None]:
    """The file in the Hub's cache and the SHA-256 that the Hub lists for it; the cache uses it as the name of a large file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = source.removeprefix(HUB).partition("@")
    try:
        file = Path(hf_hub_download(repository, name, revision=revision or None))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ConfigError(
            f"{title}: {repository}: {name} is not in the Hub's cache and cannot be downloaded; give a local folder, or "
            f"{OFFLINE_REMEDY}"
        ) from error
    blob = file.resolve().name
    return file, blob if re.fullmatch(r"[0-9a-f]{64}", blob) else None
