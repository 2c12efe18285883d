"""Weights from a local file, a URL or the Hub, checked by SHA-256 and read without unpickling code.

A place is written `PATH`, `https://...` or `hub:OWNER/NAME@REVISION`; `#sha256=HEX` behind it says which file is meant
where it is not the known one.
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
_STATED = re.compile(r"(?P<place>.*)#sha256=(?P<sha256>[0-9a-fA-F]{64})")


@dataclass(frozen=True)
class WeightsFile:
    """A file on this machine and the SHA-256 of its bytes."""

    path: Path
    sha256: str


def find_weights(place: str, *, known_sha256: str | None, title: str, hub_file: str = "model.safetensors") -> WeightsFile:
    """The file at `place`, fetched where it is not here, its hash checked.

    The expected SHA-256 is the one stated behind `place`, or else `known_sha256`; where neither is there (`None`), a file of
    the Hub is checked against the hash that the Hub itself lists, and a local file or URL must state one.

    Raises:
        ConfigError: there is no such file, it cannot be fetched, or its hash is another.
    """
    stated = _STATED.fullmatch(place)
    where, expected = (stated["place"], stated["sha256"].lower()) if stated else (place, known_sha256)
    if where.startswith(HUB):
        file, listed = _from_hub(where, hub_file, title)
        expected = expected or listed
    elif where.startswith(("https://", "http://")):
        file = _from_url(where, title)
    else:
        path = Path(where).expanduser()
        file = path / hub_file if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(f"{title}: {file}: no such file of weights; give a local file, a URL or {HUB}OWNER/NAME@REVISION")
    found = file_sha256(file)
    if expected is None:
        raise ConfigError(
            f"{title}: the hash of its weights is not known: write {where}#sha256={found} if {file.name} is meant"
        )
    if found != expected:
        raise ConfigError(
            f"{title}: {file.name}: SHA-256 {found[:16]}..., expected {expected[:16]}...: fetch it again, "
            f"or write {where}#sha256={found} if this file is meant"
        )
    return WeightsFile(file, found)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a torch file that holds tensors alone.

    Raises:
        ConfigError: the file is cut short, is neither, or holds pickled objects, which are never run.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: no such file of weights")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ConfigError(f"{file}: not a safetensors file or cut short ({error}); pickled weights are refused") from error
    except pickle.UnpicklingError as error:
        raise ConfigError(f"{file}: holds pickled objects, which are refused; give it as safetensors") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:80]
        raise ConfigError(f"{file}: cut short or not a file of torch weights ({reason}); fetch it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ConfigError(f"{file}: not a plain table of tensors; give it as safetensors")
    return tensors


def load_into(network: torch.nn.Module, tensors: Mapping[str, Tensor], where: object) -> None:
    """Strictly load `tensors` into `network`.

    Raises:
        ConfigError: a tensor is missing, left over or of another shape; the line names the first.
    """
    own = network.state_dict()
    for name in sorted(set(own) ^ set(tensors)):
        what = f"no tensor {name}" if name in own else f"a tensor {name} that the network does not have"
        raise ConfigError(f"{where}: {what}; these are weights of another network")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise ConfigError(f"{where}: {name} is {list(tensors[name].shape)}, not {list(tensor.shape)}")
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


def _from_url(url: str, title: str) -> Path:
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.partial")
        try:
            torch.hub.download_url_to_file(url, str(partial), progress=False)
        except OSError as error:
            raise ConfigError(
                f"{title}: {url} cannot be fetched ({error}); put the file at {file}, or give its place"
            ) from error
        partial.replace(file)
    return file


def _from_hub(place: str, name: str, title: str) -> tuple[Path, str | None]:
    """The file in the Hub's cache, and the SHA-256 that the Hub lists for it: its cache names large files by it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = place.removeprefix(HUB).partition("@")
    try:
        file = Path(hf_hub_download(repository, name, revision=revision or None))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ConfigError(
            f"{title}: {repository}: {name} is neither in the Hub's cache nor to be fetched; give a local folder in its place"
        ) from error
    blob = file.resolve().name
    return file, blob if re.fullmatch(r"[0-9a-f]{64}", blob) else None
