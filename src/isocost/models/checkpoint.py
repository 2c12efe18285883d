"""The checkpoint folder: training writes it and evaluation reads it.

unet/          config.json, diffusion_pytorch_model.safetensors: the EMA weights in diffusers' format
               (transformer/ if the network is a transformer)
scheduler/     scheduler_config.json: noise schedule and prediction type in diffusers' format
isocost.json   size, width, images seen, paths of the autoencoder and the text encoder, provenance
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

from isocost.config.base import Spec, parse_spec
from isocost.config.model import ModelSpec, TextEncoderSpec
from isocost.config.pretrained import PretrainedSpec
from isocost.config.sampling import FOLDER_SOLVERS, NEAREST_SOLVER, OWN_SOLVER, SolverSpec
from isocost.config.sweep import NO_GUIDANCE
from isocost.config.types import PredictionType, TaskName
from isocost.errors import ConfigError
from isocost.models.factory import NETWORK_FOLDERS, Network, component_name, read_network, write_config
from isocost.models.flops import reference_gflop
from isocost.models.pretrained.architectures import load_network
from isocost.models.pretrained.files import explain_other_layout, is_pretrained
from isocost.models.pretrained.lora import split_loras
from isocost.models.pretrained.pipeline_config import family_at, find_base_folder, read_pipeline, source_digest
from isocost.models.pretrained.wrappers import ConditionedDenoiser
from isocost.models.streaming_safetensors import TensorLayout, write_streamed
from isocost.utils.artifact_store import MANIFEST, read_manifest, verified_manifest

logger = logging.getLogger(__name__)

CONSISTENCY_METHODS = frozenset({"consistency", "codi", "codi-efficient"})
"""Distillation methods whose students are consistency models, sampled with the solver `lcm`."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})


class CheckpointInfo(Spec):
    """The content of a checkpoint's `isocost.json`.

    Attributes:
        autoencoder: a path relative to the checkpoint, a folder, a Hub id or `scenes`.
        parent: digest of the checkpoint that a fine-tuned one started from.
        scale: enlargement of a super-resolution model.
        distilled: distillation method of a student.
        guidance_range: range of w that a student with guidance as an input was trained on.
        teacher_guide: digest of the checkpoint that guided the teacher of a student.
        training_gflop: cost of the training, if it is not 3 x GFLOP per forward x images.
        pretrained: set for a published checkpoint, that is a diffusers pipeline folder, which is not copied.
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
    teacher_guide: str = ""
    training_gflop: float | None = None
    pretrained: PretrainedSpec | None = None

    @property
    def nearest_solver(self) -> SolverSpec:
        """The checkpoint's own solver, or the one that is nearest to the scheduler of a published checkpoint."""
        if self.pretrained is not None:
            return self.pretrained.solver
        return SolverSpec(name="lcm") if self.distilled in CONSISTENCY_METHODS else SolverSpec()

    @property
    def solver(self) -> SolverSpec:
        """The checkpoint's own solver, which is the default.

        Raises:
            ConfigError: isocost has no solver that equals the scheduler of a published checkpoint.
        """
        if self.pretrained is not None and self.pretrained.solver_problem:
            remedy = f"give a solver of `isocost list solvers`, or `{NEAREST_SOLVER}` for {self.pretrained.solver.label}"
            raise ConfigError(f"{self.pretrained.solver_problem}; {remedy}")
        return self.nearest_solver

    def resolve_solver(self, requested: SolverSpec | None = None) -> SolverSpec:
        """The solver that a request means: None and "own" are the checkpoint's own, "nearest" is the nearest one.

        A message says so if the nearest solver differs from the checkpoint's own.

        Raises:
            ConfigError: see `solver`, or a spacing is given to "own" or "nearest".
        """
        if requested is not None and requested.name not in FOLDER_SOLVERS:
            return requested
        if requested is not None and requested != SolverSpec(name=requested.name):
            raise ConfigError(f"solver {requested.name} takes spacing and eta from the checkpoint; leave them out")
        if requested is None or requested.name == OWN_SOLVER:
            return self.solver
        if self.pretrained is not None and self.pretrained.solver_problem:
            logger.warning(f"{self.variant}: sampled with {self.nearest_solver.label}: {self.pretrained.solver_problem}")
        return self.nearest_solver

    def replaced_scheduler(self, requested: SolverSpec | None) -> str:
        """The scheduler class of the folder, if the request "nearest" means another solver than that one; else empty."""
        is_replaced = self.pretrained is not None and self.pretrained.solver_problem != ""
        if requested is None or requested.name != NEAREST_SOLVER or not is_replaced:
            return ""
        assert self.pretrained is not None
        return self.pretrained.scheduler

    @property
    def num_steps(self) -> int:
        """Default number of solver steps."""
        return 4 if self.distilled else 16

    def effective_guidance(self, guidance: float) -> float:
        """The w that stands for a requested guidance; every command and every sweep calls this function.

        In diffusers' pipelines 0 means "no guidance". For a published checkpoint it is w = 1, one conditional pass, with a
        message. If guidance is an input of the network, 0 is a value like any other.

        Raises:
            ConfigError: guidance is 0 for a model that was trained here, or a student with guidance as an input was not trained
                on this value.
        """
        if guidance == 0 and not self.model.embeds_guidance:
            if self.pretrained is None:
                raise ConfigError(NO_GUIDANCE)
            logger.warning(f"{self.variant}: guidance 0 means no guidance, as in diffusers; it is w = 1 here")
            return 1.0
        if self.guidance_range is not None and not self.guidance_range[0] <= guidance <= self.guidance_range[1]:
            low, high = self.guidance_range
            raise ConfigError(
                f"guidance = {guidance:g}: this student was trained on guidance {low:g} to {high:g}; choose one of these values"
            )
        return guidance

    @property
    def label(self) -> str:
        """The size and the variant, such as "0.8M from scratch"."""
        return f"{self.size} {self.variant}".rstrip()


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint whose network is not loaded."""

    folder: Path
    digest: str
    info: CheckpointInfo

    @property
    def autoencoder_path(self) -> str:
        """Path or id of the autoencoder; a path relative to the checkpoint is resolved."""
        relative = self.folder / self.info.autoencoder
        return str(relative) if relative.is_dir() else self.info.autoencoder

    @property
    def text_encoder(self) -> TextEncoderSpec:
        """The text encoder: the fine-tuned one in the checkpoint folder if there is one, else the study's."""
        spec = self.info.text_encoder
        relative = self.folder / spec.path
        return spec.model_copy(update={"path": str(relative)}) if relative.is_dir() else spec

    def load_network(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Network | ConditionedDenoiser:
        """Load the network; see `load_checkpoint`.

        Raises:
            ConfigError: weights are missing, truncated, NaN or infinite.
        """
        network: Network | ConditionedDenoiser
        if self.info.pretrained is not None:
            loras = split_loras(self.info.pretrained.path)[1]
            network = load_network(family_at(self.folder), self.folder, self.info.resolution, loras, dtype)
        else:
            network = read_network(network_folder(self.folder), dtype)
        return network.to(device).eval().requires_grad_(False)


@dataclass(frozen=True)
class Checkpoint(CheckpointSource):
    """A checkpoint opened for sampling."""

    network: Network | ConditionedDenoiser


def scheduler_for(prediction_type: PredictionType, rescale_betas_zero_snr: bool = False) -> SchedulerMixin:
    """Stable Diffusion's noise schedule (scaled linear, 0.00085 to 0.012) as a diffusers scheduler with trailing spacing.

    For flow matching it is diffusers' FlowMatchEulerDiscreteScheduler.
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
    """Write `unet/` or `transformer/`, and `scheduler/`. The artefact store adds the manifest when it publishes the folder.

    Args:
        folder: folder to write into.
        network: the denoiser.
        prediction_type: prediction type to write into the scheduler's config.
        rescale_betas_zero_snr: whether the schedule is rescaled to zero terminal SNR.
        weights: names and whole tensors in the order of the network's parameters; the network's own weights if None. They are
            written one at a time, so they need not fit into memory together.
        dtype: type of the weights in the file; they are converted to float32 when loaded.
    """
    assert len(network.state_dict()) == len(list(network.parameters())), "a network with buffers needs them written too"
    layout: TensorLayout = [(name, dtype, tuple(parameter.shape)) for name, parameter in network.named_parameters()]
    network_path = folder / component_name(network)
    write_config(network, network_path)
    tensors = (tensor.to(dtype) for _, tensor in (weights if weights is not None else network.named_parameters()))
    write_streamed(network_path / WEIGHTS, layout, tensors, {"format": "pt"})
    scheduler_for(prediction_type, rescale_betas_zero_snr).save_pretrained(folder / "scheduler")


def load_checkpoint(folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Checkpoint:
    """Open an isocost checkpoint folder, or a diffusers text-to-image pipeline given by its folder or Hub id.

    Args:
        folder: the checkpoint.
        device: where the network is.
        dtype: of the network's weights. A network that computes in bf16 takes half of the memory if it is read in bf16.

    Raises:
        ConfigError: the folder does not exist or is not a checkpoint, weights are pickled or truncated, the pipeline is not
            supported, or it has changed since it was added to an output folder.
        RunError: a file does not match its checksum.
    """
    source = open_checkpoint(folder)
    return Checkpoint(source.folder, source.digest, source.info, source.load_network(device, dtype))


def open_checkpoint(folder: str | Path) -> CheckpointSource:
    """Read and check a checkpoint without its network.

    Raises:
        ConfigError: as `load_checkpoint`, except for the values of the weights.
        RunError: a file does not match its checksum.
    """
    path = Path(folder).expanduser()
    if (path / MANIFEST).is_file():
        verified_manifest(path)
    info = read_info(path)
    if info.pretrained is None:
        return CheckpointSource(path, read_manifest(path)["digest"], info)
    source, source_name = find_base_folder(info.pretrained.path), source_digest(info.pretrained.path)
    if (path / MANIFEST).is_file() and read_manifest(path)["digest"] != source_name:
        raise ConfigError(
            f"{info.pretrained.path}: its content has changed since it was scored as {path.name}; run the study again"
        )
    return CheckpointSource(source, source_name, info)


def pretrained_info(path: str | Path) -> CheckpointInfo:
    """Describe a diffusers pipeline folder or Hub id as a checkpoint.

    Its normalized cost is relative to the paper's 866M network at the paper's latent shape.

    Raises:
        ConfigError: the pipeline is not supported, is incomplete, or lacks a required value.
    """
    fields = read_pipeline(path)
    return CheckpointInfo(**fields, normalized_cost_per_step=fields["gflop_per_forward"] / reference_gflop())


def read_info(path: Path) -> CheckpointInfo:
    """Read the metadata of a checkpoint folder, without its weights.

    Raises:
        ConfigError: the folder does not exist or is not a checkpoint, or its weights are pickled.
    """
    path = path.expanduser()
    if not (path / MANIFEST).is_file() and is_pretrained(split_loras(path)[0]):
        return pretrained_info(path)
    if path.is_file() and path.suffix in PICKLE_SUFFIXES:
        raise ConfigError(
            f"{path}: pickled weights are refused (they can run code when loaded); convert to a safetensors folder"
        )
    if not (path / MANIFEST).is_file() and (explanation := explain_other_layout(split_loras(path)[0])):
        raise ConfigError(explanation)
    if not path.is_dir():
        raise ConfigError(f"{path}: no such checkpoint folder; `isocost run` writes checkpoints to OUT/artefacts/checkpoint/")
    if (path / MANIFEST).is_file() and _is_pretrained_entry(manifest := read_manifest(path)):
        return _with_checked_scheduler(parse_spec(CheckpointInfo, manifest["info"], str(path / MANIFEST)), path)
    network_path = network_folder(path)
    refuse_pickles(path)
    refuse_pickles(network_path)
    if not (path / MANIFEST).is_file() or not (network_path / "config.json").is_file():
        needed = " or ".join(f"{name}/config.json" for name in NETWORK_FOLDERS)
        raise ConfigError(f"{path}: not an isocost checkpoint, which has {MANIFEST} and {needed}")
    manifest = read_manifest(path)
    if manifest.get("kind") != "checkpoint":
        raise ConfigError(f"{path}: a {manifest.get('kind', 'folder')}, not a checkpoint; see OUT/artefacts/checkpoint/")
    return parse_spec(CheckpointInfo, manifest["info"], str(path / MANIFEST))


def _is_pretrained_entry(manifest: dict[str, Any]) -> bool:
    info = manifest.get("info")
    return isinstance(info, dict) and info.get("pretrained") is not None


def _with_checked_scheduler(info: CheckpointInfo, path: Path) -> CheckpointInfo:
    """The metadata of a pretrained checkpoint. If its entry was written before schedulers were checked, the pipeline is read.

    Raises:
        ConfigError: the pipeline of such an entry is missing or not supported.
    """
    assert info.pretrained is not None
    if info.pretrained.scheduler:
        return info
    try:
        return info.model_copy(update={"pretrained": pretrained_info(info.pretrained.path).pretrained})
    except ConfigError as error:
        raise ConfigError(
            f"{path / MANIFEST}: of a version that did not check schedulers, so the pipeline is read: {error}"
        ) from error


def checkpoint_name(folder: Path) -> str:
    """Digest of a checkpoint, whatever its folder is called; the name of the folder if the checkpoint does not exist yet.

    Raises:
        RunError: its manifest is damaged.
    """
    return str(read_manifest(folder)["digest"]) if (folder / MANIFEST).is_file() else folder.name


def network_folder(path: Path) -> Path:
    """Folder of the network in a checkpoint folder; `unet/` if there is no network."""
    return next((path / name for name in NETWORK_FOLDERS if (path / name).is_dir()), path / NETWORK_FOLDERS[0])


def refuse_pickles(folder: Path) -> None:
    """
    Raises:
        ConfigError: the folder has pickled weights and no safetensors file.
    """
    files = [file for file in folder.glob("*") if file.is_file()]
    pickles = [file for file in files if file.suffix in PICKLE_SUFFIXES]
    if pickles and not any(file.suffix == ".safetensors" for file in files):
        raise ConfigError(f"{pickles[0]}: pickled weights are refused (they can run code when loaded); convert to safetensors")


def summary_columns(info: CheckpointInfo) -> dict[str, Any]:
    """Values of the results table that are the same for all points of a checkpoint, by column."""
    return {
        "task": info.task,
        "size": info.label,
        "width": info.model.width,
        "num_parameters": info.num_parameters,
        "images_seen": info.images_seen,
        "training_gflop": info.training_gflop or 3 * info.gflop_per_forward * info.images_seen,
    }
