"""The checkpoint folder: where training and scoring meet.

unet/          config.json, diffusion_pytorch_model.safetensors: the EMA weights, as diffusers reads them
               (transformer/ where the network is one)
scheduler/     scheduler_config.json: noise schedule and prediction type, as diffusers reads them
isocost.json   size, width, images seen, where autoencoder and text encoder are, and what made them
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
from isocost.config.model import ModelSpec, TextEncoderSpec
from isocost.config.pretrained import PretrainedSpec
from isocost.config.sampling import SolverSpec
from isocost.config.types import PredictionType, TaskName
from isocost.errors import ConfigError
from isocost.models.factory import NETWORK_FOLDERS, Network, component_name, read_network, write_config
from isocost.models.flops import reference_gflop
from isocost.models.pretrained.architectures import load_network
from isocost.models.pretrained.files import is_pretrained
from isocost.models.pretrained.lora import split_loras
from isocost.models.pretrained.pipeline_config import find_base, kind_at, read_pipeline, source_digest
from isocost.models.pretrained.wrappers import ConditionedDenoiser
from isocost.models.streaming_safetensors import Plan, write_streamed
from isocost.utils.artifact_store import MANIFEST, read_manifest

CONSISTENT = frozenset({"consistency", "codi", "codi-efficient"})
"""Ways of distilling whose students are sampled by consistency."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})


class CheckpointInfo(Spec):
    """What `isocost.json` of a checkpoint says.

    `autoencoder` is a path beside the checkpoint, a folder, a Hub id or `scenes`. `parent` is the digest of the checkpoint that a
    tuned one started from; `scale` that of super-resolution. A student says how it was `distilled` and, where it takes w as an
    input, the range that it learned. `training_gflop` is what the training took where that is not 3 x forward x images.
    `given` is of a published checkpoint: a pipeline folder of diffusers, which stays where it is.
    """

    model: ModelSpec
    size: str
    num_parameters: int
    images_seen: int
    gflop_per_forward: float
    normalized_cost_per_step: float
    prediction_type: PredictionType
    rescale_betas_zero_snr: bool = False
    autoencoder: str
    autoencoder_subfolder: str | None = None
    text_encoder: TextEncoderSpec
    resolution: int
    run: str = ""
    task: TaskName = "text2image"
    parent: str = ""
    variant: str = ""
    scale: int | None = None
    distilled: str = ""
    guidance_range: tuple[float, float] | None = None
    training_gflop: float | None = None
    pretrained: PretrainedSpec | None = None

    @property
    def solver(self) -> SolverSpec:
        """What it is sampled with where nothing else is asked for."""
        if self.pretrained is not None:
            return self.pretrained.solver
        return SolverSpec(name="lcm") if self.distilled in CONSISTENT else SolverSpec()

    @property
    def num_steps(self) -> int:
        """Steps where nothing else is asked for."""
        return 4 if self.distilled else 16

    def check_guidance(self, guidance: float) -> None:
        """
        Raises:
            ConfigError: a student that takes w was not taught this one.
        """
        if self.guidance_range is not None and not self.guidance_range[0] <= guidance <= self.guidance_range[1]:
            low, high = self.guidance_range
            raise ConfigError(f"guidance = {guidance:g}: this student was taught {low:g} to {high:g}; take one of these")

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
    network: Network | ConditionedDenoiser

    @property
    def autoencoder_path(self) -> str:
        """Where the autoencoder is, with a path beside the checkpoint resolved."""
        relative = self.folder / self.info.autoencoder
        return str(relative) if relative.is_dir() else self.info.autoencoder

    @property
    def text_encoder(self) -> TextEncoderSpec:
        """Its text encoder: one of its own where that was tuned, else the study's."""
        relative = self.folder / self.info.text_encoder.path
        return (
            self.info.text_encoder.model_copy(update={"path": str(relative)}) if relative.is_dir() else self.info.text_encoder
        )


def scheduler_for(prediction_type: PredictionType, rescale_betas_zero_snr: bool = False) -> SchedulerMixin:
    """Stable Diffusion's noise schedule (scaled linear, 0.00085 to 0.012) as a diffusers scheduler, trailing spacing.

    A flow's is diffusers' Euler for flow matching.
    """
    if prediction_type == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler()
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=rescale_betas_zero_snr,
    )


def save_networks(
    folder: Path,
    network: Network,
    prediction_type: PredictionType,
    rescale_betas_zero_snr: bool = False,
    weights: Iterable[tuple[str, Tensor]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write `unet/` or `transformer/`, and `scheduler/`; the manifest comes from the store when it publishes the folder.

    `weights` are names and whole tensors in the order of the network's parameters, its own where None; they are written one
    at a time, so they need not fit into memory together. They are rounded to `dtype`, and float32 again where they are read.
    """
    assert len(network.state_dict()) == len(list(network.parameters())), "a network with buffers needs them written too"
    plan: Plan = [(name, dtype, tuple(parameter.shape)) for name, parameter in network.named_parameters()]
    part = folder / component_name(network)
    write_config(network, part)
    tensors = (tensor.to(dtype) for _, tensor in (weights if weights is not None else network.named_parameters()))
    write_streamed(part / WEIGHTS, plan, tensors, {"format": "pt"})
    scheduler_for(prediction_type, rescale_betas_zero_snr).save_pretrained(folder / "scheduler")


def load_checkpoint(folder: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Open a checkpoint folder: one of isocost, or a text-to-image pipeline of diffusers, by its folder or Hub id.

    Raises:
        ConfigError: no such folder, not a checkpoint, pickled or truncated weights, a pipeline that is not read here, or one
            that has changed since it was entered into an output folder.
    """
    path = Path(folder)
    info = read_info(path)
    if info.pretrained is not None:
        return _open_pretrained(path, info, device)
    try:
        network = read_network(network_folder(path))
    except (OSError, SafetensorError, json.JSONDecodeError, ValueError) as error:
        raise ConfigError(f"{path}: the weights cannot be read: {' '.join(str(error).split())[:200]}") from error
    return Checkpoint(path, read_manifest(path)["digest"], info, network.to(device).eval().requires_grad_(False))


def _open_pretrained(path: Path, info: CheckpointInfo, device: torch.device | str) -> Checkpoint:
    assert info.pretrained is not None
    source, name = find_base(info.pretrained.path), source_digest(info.pretrained.path)
    if (path / MANIFEST).is_file() and read_manifest(path)["digest"] != name:
        raise ConfigError(f"{info.pretrained.path}: has changed since it was scored as {path.name}; run the study again")
    network = load_network(kind_at(source), source, info.resolution, split_loras(info.pretrained.path)[1])
    return Checkpoint(source, name, info, network.to(device).eval().requires_grad_(False))


def pretrained_info(path: str | Path) -> CheckpointInfo:
    """What a pipeline folder of diffusers, or a Hub id, is as a checkpoint. Its normalized cost is by the paper's network.

    Raises:
        ConfigError: the pipeline is not read here, is not whole, or lacks what must be known.
    """
    facts = read_pipeline(path)
    return CheckpointInfo(**facts, normalized_cost_per_step=facts["gflop_per_forward"] / reference_gflop())


def read_info(path: Path) -> CheckpointInfo:
    """What a checkpoint folder says of itself, without its weights.

    Raises:
        ConfigError: no such folder, not a checkpoint, or pickled weights.
    """
    if not (path / MANIFEST).is_file() and is_pretrained(split_loras(path)[0]):
        return pretrained_info(path)
    if path.is_file() and path.suffix in PICKLE_SUFFIXES:
        raise ConfigError(
            f"{path}: pickled weights are refused (they can run code when loaded); convert to a safetensors folder"
        )
    if not path.is_dir():
        raise ConfigError(f"{path}: no such checkpoint folder; a run writes them to OUT/artefacts/checkpoint/")
    if (path / MANIFEST).is_file() and (manifest := read_manifest(path)).get("info", {}).get("pretrained") is not None:
        return CheckpointInfo.model_validate(manifest["info"])
    part = network_folder(path)
    refuse_pickles(path)
    refuse_pickles(part)
    if not (path / MANIFEST).is_file() or not (part / "config.json").is_file():
        needed = " or ".join(f"{name}/config.json" for name in NETWORK_FOLDERS)
        raise ConfigError(f"{path}: not a checkpoint of isocost (needs {MANIFEST} and {needed})")
    manifest = read_manifest(path)
    if manifest.get("kind") != "checkpoint":
        raise ConfigError(f"{path}: a {manifest.get('kind', 'folder')}, not a checkpoint; see OUT/artefacts/checkpoint/")
    return CheckpointInfo.model_validate(manifest["info"])


def network_folder(path: Path) -> Path:
    """Where the network of a checkpoint folder lies; `unet/` where there is none."""
    return next((path / name for name in NETWORK_FOLDERS if (path / name).is_dir()), path / NETWORK_FOLDERS[0])


def refuse_pickles(folder: Path) -> None:
    """Raise ConfigError where a folder has pickled weights and no safetensors."""
    files = [file for file in folder.glob("*") if file.is_file()]
    pickles = [file for file in files if file.suffix in PICKLE_SUFFIXES]
    if pickles and not any(file.suffix == ".safetensors" for file in files):
        raise ConfigError(f"{pickles[0]}: pickled weights are refused (they can run code when loaded); convert to safetensors")


def summary_columns(info: CheckpointInfo) -> dict[str, Any]:
    """The columns that every point of a checkpoint shares."""
    return {
        "task": info.task,
        "size": info.label,
        "width": info.model.width,
        "num_parameters": info.num_parameters,
        "images_seen": info.images_seen,
        "training_gflop": info.training_gflop or 3 * info.gflop_per_forward * info.images_seen,
    }
