"""The checkpoint folder: where training and scoring meet.

unet/          config.json, diffusion_pytorch_model.safetensors: the EMA weights, as diffusers reads them
               (transformer/ where the network is one)
scheduler/     scheduler_config.json: noise schedule and prediction type, as diffusers reads them
isocost.json   size, width, images seen, where codec and text encoder are, and what made them
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from safetensors import SafetensorError
from torch import Tensor

from isocost.config.base import Spec
from isocost.config.model import ModelSpec, TextSpec
from isocost.config.pretrained import GivenSpec
from isocost.config.sampling import SamplerSpec
from isocost.config.types import PredictionType, TaskName
from isocost.errors import RequestError
from isocost.models.factory import NETWORK_FOLDERS, Network, folder_of, read_network, write_config
from isocost.models.flops import paper_gflop
from isocost.models.pretrained.architectures import load_network
from isocost.models.pretrained.files import is_given
from isocost.models.pretrained.lora import split_loras
from isocost.models.pretrained.pipeline_config import find_base, kind_at, read_pipeline, source_digest
from isocost.models.pretrained.wrappers import PackedNetwork
from isocost.models.streaming_safetensors import Plan, write_streamed
from isocost.utils.artifact_store import MANIFEST, read_manifest

CONSISTENT = frozenset({"consistency", "codi", "codi-efficient"})
"""Ways of distilling whose students are sampled by consistency."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})


class CheckpointInfo(Spec):
    """What `isocost.json` of a checkpoint says.

    `codec` is a path beside the checkpoint, a folder, a Hub id or `scenes`. `parent` is the digest of the checkpoint that a
    tuned one started from; `scale` that of super-resolution. A student says how it was `distilled` and, where it takes w as an
    input, the range that it learned. `training_gflop` is what the training took where that is not 3 x forward x images.
    `given` is of a published checkpoint: a pipeline folder of diffusers, which stays where it is.
    """

    model: ModelSpec
    size: str
    num_parameters: int
    images_seen: int
    gflop_per_forward: float
    normalised_cost: float
    prediction: PredictionType
    zero_terminal_snr: bool = False
    codec: str
    codec_subfolder: str | None = None
    text: TextSpec
    resolution: int
    run: str = ""
    task: TaskName = "text2image"
    parent: str = ""
    variant: str = ""
    scale: int | None = None
    distilled: str = ""
    guidance_range: tuple[float, float] | None = None
    training_gflop: float | None = None
    given: GivenSpec | None = None

    @property
    def sampler(self) -> SamplerSpec:
        """What it is sampled with where nothing else is asked for."""
        if self.given is not None:
            return self.given.sampler
        return SamplerSpec(name="lcm") if self.distilled in CONSISTENT else SamplerSpec()

    @property
    def num_steps(self) -> int:
        """Steps where nothing else is asked for."""
        return 4 if self.distilled else 16

    def check_guidance(self, guidance: float) -> None:
        """
        Raises:
            RequestError: a student that takes w was not taught this one.
        """
        if self.guidance_range is not None and not self.guidance_range[0] <= guidance <= self.guidance_range[1]:
            low, high = self.guidance_range
            raise RequestError(f"guidance = {guidance:g}: this student was taught {low:g} to {high:g}; take one of these")

    @property
    def label(self) -> str:
        """The size, and what sets the checkpoint apart from others of the size: "0.8M from scratch"."""
        return f"{self.size} {self.variant}".rstrip()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint opened for sampling."""

    folder: Path
    digest: str
    info: CheckpointInfo
    network: Network | PackedNetwork

    @property
    def codec_path(self) -> str:
        """Where the codec is, with a path beside the checkpoint resolved."""
        beside = self.folder / self.info.codec
        return str(beside) if beside.is_dir() else self.info.codec

    @property
    def text(self) -> TextSpec:
        """Its text encoder: one of its own where that was tuned, else the study's."""
        beside = self.folder / self.info.text.path
        return self.info.text.model_copy(update={"path": str(beside)}) if beside.is_dir() else self.info.text


def scheduler_for(prediction: PredictionType, zero_terminal_snr: bool = False) -> SchedulerMixin:
    """Stable Diffusion's noise schedule (scaled linear, 0.00085 to 0.012) as a diffusers scheduler, trailing spacing.

    A flow's is diffusers' Euler for flow matching.
    """
    if prediction == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler()
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=zero_terminal_snr,
    )


def save_networks(
    folder: Path,
    network: Network,
    prediction: PredictionType,
    zero_terminal_snr: bool = False,
    weights: Iterable[tuple[str, Tensor]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write `unet/` or `transformer/`, and `scheduler/`; the manifest comes from the store when it publishes the folder.

    `weights` are names and whole tensors in the order of the network's parameters, its own where None; they are written one
    at a time, so they need not fit into memory together. They are rounded to `dtype`, and float32 again where they are read.
    """
    assert len(network.state_dict()) == len(list(network.parameters())), "a network with buffers needs them written too"
    plan: Plan = [(name, dtype, tuple(parameter.shape)) for name, parameter in network.named_parameters()]
    part = folder / folder_of(network)
    write_config(network, part)
    tensors = (tensor.to(dtype) for _, tensor in (weights if weights is not None else network.named_parameters()))
    write_streamed(part / WEIGHTS, plan, tensors, {"format": "pt"})
    scheduler_for(prediction, zero_terminal_snr).save_pretrained(folder / "scheduler")


def load_checkpoint(folder: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Open a checkpoint folder: one of isocost, or a text-to-image pipeline of diffusers, by its folder or Hub id.

    Raises:
        RequestError: no such folder, not a checkpoint, pickled or truncated weights, a pipeline that is not read here, or one
            that has changed since it was entered into an output folder.
    """
    path = Path(folder)
    info = read_info(path)
    if info.given is not None:
        return _open_given(path, info, device)
    try:
        network = read_network(network_folder(path))
    except (OSError, SafetensorError, json.JSONDecodeError, ValueError) as error:
        raise RequestError(f"{path}: the weights cannot be read: {' '.join(str(error).split())[:200]}") from error
    return Checkpoint(path, read_manifest(path)["digest"], info, network.to(device).eval().requires_grad_(False))


def _open_given(path: Path, info: CheckpointInfo, device: torch.device | str) -> Checkpoint:
    assert info.given is not None
    source, name = find_base(info.given.path), source_digest(info.given.path)
    if (path / MANIFEST).is_file() and read_manifest(path)["digest"] != name:
        raise RequestError(f"{info.given.path}: has changed since it was scored as {path.name}; run the study again")
    network = load_network(kind_at(source), source, info.resolution, split_loras(info.given.path)[1])
    return Checkpoint(source, name, info, network.to(device).eval().requires_grad_(False))


def given_info(path: str | Path) -> CheckpointInfo:
    """What a pipeline folder of diffusers, or a Hub id, is as a checkpoint. Its normalised cost is by the paper's network.

    Raises:
        RequestError: the pipeline is not read here, is not whole, or lacks what must be known.
    """
    facts = read_pipeline(path)
    return CheckpointInfo(**facts, normalised_cost=facts["gflop_per_forward"] / paper_gflop())


def read_info(path: Path) -> CheckpointInfo:
    """What a checkpoint folder says of itself, without its weights.

    Raises:
        RequestError: no such folder, not a checkpoint, or pickled weights.
    """
    if not (path / MANIFEST).is_file() and is_given(split_loras(path)[0]):
        return given_info(path)
    if path.is_file() and path.suffix in PICKLE_SUFFIXES:
        raise RequestError(
            f"{path}: pickled weights are refused (they can run code when loaded); convert to a safetensors folder"
        )
    if not path.is_dir():
        raise RequestError(f"{path}: no such checkpoint folder; a run writes them to OUT/artefacts/checkpoint/")
    if (path / MANIFEST).is_file() and (manifest := read_manifest(path)).get("info", {}).get("given") is not None:
        return CheckpointInfo.model_validate(manifest["info"])
    part = network_folder(path)
    refuse_pickles(path)
    refuse_pickles(part)
    if not (path / MANIFEST).is_file() or not (part / "config.json").is_file():
        needed = " or ".join(f"{name}/config.json" for name in NETWORK_FOLDERS)
        raise RequestError(f"{path}: not a checkpoint of isocost (needs {MANIFEST} and {needed})")
    manifest = read_manifest(path)
    if manifest.get("kind") != "checkpoint":
        raise RequestError(f"{path}: a {manifest.get('kind', 'folder')}, not a checkpoint; see OUT/artefacts/checkpoint/")
    return CheckpointInfo.model_validate(manifest["info"])


def network_folder(path: Path) -> Path:
    """Where the network of a checkpoint folder lies; `unet/` where there is none."""
    return next((path / name for name in NETWORK_FOLDERS if (path / name).is_dir()), path / NETWORK_FOLDERS[0])


def refuse_pickles(folder: Path) -> None:
    """Raise RequestError where a folder has pickled weights and no safetensors."""
    files = [file for file in folder.glob("*") if file.is_file()]
    pickles = [file for file in files if file.suffix in PICKLE_SUFFIXES]
    if pickles and not any(file.suffix == ".safetensors" for file in files):
        raise RequestError(f"{pickles[0]}: pickled weights are refused (they can run code when loaded); convert to safetensors")


def describe(info: CheckpointInfo) -> dict[str, Any]:
    """The columns that every point of a checkpoint shares."""
    return {
        "task": info.task,
        "size": info.label,
        "width": info.model.width,
        "num_parameters": info.num_parameters,
        "images_seen": info.images_seen,
        "training_gflop": info.training_gflop or 3 * info.gflop_per_forward * info.images_seen,
    }
