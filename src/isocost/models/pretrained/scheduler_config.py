"""Read noise schedule, prediction type and solver from a diffusers scheduler config.

Missing fields have diffusers' default for the class. The prediction type is an exception: a wrong one gives noise, so a missing
one is read as epsilon only if that is certain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from isocost.config.base import parse_spec
from isocost.config.pretrained import NoiseSpec
from isocost.config.sampling import SolverSpec
from isocost.config.types import PredictionType
from isocost.errors import ConfigError
from isocost.models.pretrained.files import read_config

SCHEDULER_CLASS_TO_SOLVER: dict[str, str] = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "ddim",
    "LMSDiscreteScheduler": "euler",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-ancestral",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmsolver++2m",
    "DPMSolverSinglestepScheduler": "dpmsolver++2m",
    "DEISMultistepScheduler": "dpmsolver++2m",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
    "FlowMatchEulerDiscreteScheduler": "euler",
}
"""The nearest solver of isocost for each scheduler class."""
FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
DEFAULT_BETAS = {"LCMScheduler": ("scaled_linear", 0.00085, 0.012), "HeunDiscreteScheduler": ("linear", 0.00085, 0.012)}
DEFAULT_SPACING = {"DPMSolverMultistepScheduler": "linspace", "DPMSolverSinglestepScheduler": "linspace"}
DEFAULT_SPACING |= {"EulerDiscreteScheduler": "linspace", "EulerAncestralDiscreteScheduler": "linspace"}
DEFAULT_SPACING |= {"DEISMultistepScheduler": "linspace", "UniPCMultistepScheduler": "linspace"}
DEFAULT_SPACING |= {"HeunDiscreteScheduler": "linspace", "LMSDiscreteScheduler": "linspace"}
UNSUPPORTED_FLAGS = ("use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "thresholding", "final_sigma")
UNSUPPORTED_FLOW_FLAGS = ("use_karras_sigmas", "shift_terminal", "stochastic_sampling")


@dataclass(frozen=True)
class SchedulerSettings:
    """Settings of a scheduler; `is_consistency_model` is True for a consistency student."""

    noise: NoiseSpec
    prediction_type: PredictionType
    solver: SolverSpec
    is_consistency_model: bool


def read_scheduler(folder: Path, epsilon_is_certain: bool, num_patches: int | None = None) -> SchedulerSettings:
    """Read `scheduler/scheduler_config.json` of a pipeline folder.

    Args:
        folder: pipeline folder.
        epsilon_is_certain: a missing prediction type means epsilon (Stable Diffusion 1).
        num_patches: patches of an image in Flux's transformer, for a shift that depends on the resolution; None for other
            families, whose shift is a constant.

    Raises:
        ConfigError: the scheduler or its noise schedule is not supported, or the prediction type is missing and not certain.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    config = read_config(file)
    name = config.get("_class_name")
    if name not in SCHEDULER_CLASS_TO_SOLVER:
        supported = ", ".join(SCHEDULER_CLASS_TO_SOLVER)
        raise ConfigError(f"{file}: the scheduler {name} is not supported; supported: {supported}")
    is_flow = name == FLOW_SCHEDULER
    unsupported = [key for key in (*UNSUPPORTED_FLAGS, *(UNSUPPORTED_FLOW_FLAGS if is_flow else ())) if config.get(key)]
    if config.get("use_dynamic_shifting") and (num_patches is None or not is_flow):
        unsupported.append("use_dynamic_shifting")
    if unsupported:
        raise ConfigError(f"{file}: {unsupported[0]} = {config[unsupported[0]]}: not supported; remove it from the file")
    if is_flow:
        shift, num_timesteps = config.get("shift", 1.0), config.get("num_train_timesteps", 1000)
        if config.get("use_dynamic_shifting"):
            assert num_patches is not None
            shift = _resolution_shift(num_patches, config, file)
        noise = parse_spec(NoiseSpec, {"kind": "flow", "shift": shift, "num_timesteps": num_timesteps}, str(file))
        # Flux's pipeline passes its own sigmas, from 1 to 1 / steps.
        timestep_spacing = "linspace" if num_patches is None else "trailing"
        return SchedulerSettings(noise, "flow_prediction", SolverSpec(name="euler", timestep_spacing=timestep_spacing), False)
    return SchedulerSettings(
        _noise_spec(config, file),
        _prediction_type(config, file, epsilon_is_certain),
        _solver_spec(config, file),
        name == "LCMScheduler",
    )


def _resolution_shift(num_patches: int, config: dict[str, Any], file: Path) -> float:
    """Shift of a flow for a number of patches.

    mu is linear in the number of patches, from `base_shift` at `base_image_seq_len` to `max_shift` at `max_image_seq_len`.
    "exponential" shifts by exp(mu), "linear" by mu (diffusers' `calculate_shift` and `time_shift`; SD3, arXiv 2403.03206,
    section 5.3.2, shifts by the square root of the number of patches).

    Raises:
        ConfigError: a field is not a number, or the fields define no line.
    """
    defaults = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    fields = {key: config.get(key, default) for key, default in defaults.items()}
    for key, value in fields.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{file}: {key} = {value!r}: must be a number for a resolution-dependent shift")
    base_length, max_length = fields["base_image_seq_len"], fields["max_image_seq_len"]
    if base_length == max_length:
        raise ConfigError(f"{file}: base_image_seq_len = max_image_seq_len = {base_length}: they must differ")
    slope = (fields["max_shift"] - fields["base_shift"]) / (max_length - base_length)
    mu = fields["base_shift"] + slope * (num_patches - base_length)
    shift_type = config.get("time_shift_type", "exponential")
    if shift_type not in ("exponential", "linear"):
        raise ConfigError(f"{file}: time_shift_type = {shift_type!r}: supported: exponential, linear")
    return float(math.exp(mu) if shift_type == "exponential" else mu)


def _noise_spec(config: dict[str, Any], file: Path) -> NoiseSpec:
    if config.get("trained_betas") is not None:
        raise ConfigError(f"{file}: trained_betas are not supported; supported: linear, scaled_linear, squaredcos_cap_v2")
    if config.get("use_flow_sigmas"):
        raise ConfigError(f"{file}: use_flow_sigmas is not supported; a flow needs a {FLOW_SCHEDULER}")
    kind, start, end = DEFAULT_BETAS.get(config["_class_name"], ("linear", 0.0001, 0.02))
    fields = {
        "kind": config.get("beta_schedule", kind),
        "beta_start": config.get("beta_start", start),
        "beta_end": config.get("beta_end", end),
        "num_timesteps": config.get("num_train_timesteps", 1000),
        "rescale_betas_zero_snr": bool(config.get("rescale_betas_zero_snr", False)),
        "set_alpha_to_one": bool(config.get("set_alpha_to_one", config["_class_name"] in ("DDIMScheduler", "LCMScheduler"))),
    }
    return parse_spec(NoiseSpec, fields, str(file))


def _prediction_type(config: dict[str, Any], file: Path, epsilon_is_certain: bool) -> PredictionType:
    value = config.get("prediction_type")
    if value is None and epsilon_is_certain:
        return "epsilon"
    if value is None:
        raise ConfigError(f"{file}: prediction_type is missing; set it to epsilon or v_prediction, as in training")
    supported: tuple[PredictionType, ...] = get_args(PredictionType)
    for prediction_type in supported:
        if prediction_type == value != "flow_prediction":
            return prediction_type
    raise ConfigError(f"{file}: prediction_type = {value!r}: supported: epsilon, v_prediction, sample")


def _solver_spec(config: dict[str, Any], file: Path) -> SolverSpec:
    name = SCHEDULER_CLASS_TO_SOLVER[config["_class_name"]]
    if name == "lcm":
        return SolverSpec(name="lcm")
    timestep_spacing = config.get("timestep_spacing", DEFAULT_SPACING.get(config["_class_name"], "leading"))
    if config.get("use_karras_sigmas"):
        timestep_spacing = "karras"
    offset = {"steps_offset": config.get("steps_offset", 0)} if timestep_spacing == "leading" else {}
    return parse_spec(SolverSpec, {"name": name, "timestep_spacing": timestep_spacing, **offset}, str(file))
