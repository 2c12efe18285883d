"""A scheduler's configuration to noise schedule, prediction type and solver.

What the file leaves out is diffusers' default for the class, but for the prediction type: a wrong one draws noise, so it is
taken as epsilon only where that is certain.
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
"""By class what comes nearest among ours."""
FLOW = "FlowMatchEulerDiscreteScheduler"
DEFAULT_BETAS = {"LCMScheduler": ("scaled_linear", 0.00085, 0.012), "HeunDiscreteScheduler": ("linear", 0.00085, 0.012)}
DEFAULT_SPACING = {"DPMSolverMultistepScheduler": "linspace", "DPMSolverSinglestepScheduler": "linspace"}
DEFAULT_SPACING |= {"EulerDiscreteScheduler": "linspace", "EulerAncestralDiscreteScheduler": "linspace"}
DEFAULT_SPACING |= {"DEISMultistepScheduler": "linspace", "UniPCMultistepScheduler": "linspace"}
DEFAULT_SPACING |= {"HeunDiscreteScheduler": "linspace", "LMSDiscreteScheduler": "linspace"}
UNSUPPORTED_FLAGS = ("use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "thresholding", "final_sigma")
UNSUPPORTED_FLOW_FLAGS = ("use_karras_sigmas", "shift_terminal", "stochastic_sampling")


@dataclass(frozen=True)
class Scheduled:
    """What a scheduler's configuration comes to; `is_consistent` that of a consistency student."""

    noise: NoiseSpec
    prediction_type: PredictionType
    solver: SolverSpec
    is_consistent: bool


def read_scheduler(folder: Path, epsilon_is_certain: bool, num_places: int | None = None) -> Scheduled:
    """`scheduler/scheduler_config.json` of a pipeline folder.

    `epsilon_is_certain`: networks of this kind predict noise where nothing is said (Stable Diffusion 1). `num_places`: what
    Flux's transformer makes of an image, for a shift that depends on it; None for other kinds, whose shift is a number.

    Raises:
        ConfigError: an unknown class or schedule, or a prediction type that is not said and cannot be known.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    config = read_config(file)
    name = config.get("_class_name")
    if name not in SCHEDULER_CLASS_TO_SOLVER:
        raise ConfigError(f"{file}: the scheduler {name} is not known here; known: {', '.join(SCHEDULER_CLASS_TO_SOLVER)}")
    odd = [key for key in (*UNSUPPORTED_FLAGS, *(UNSUPPORTED_FLOW_FLAGS if name == FLOW else ())) if config.get(key)]
    odd += ["use_dynamic_shifting"] if config.get("use_dynamic_shifting") and (num_places is None or name != FLOW) else []
    if odd:
        raise ConfigError(f"{file}: {odd[0]} = {config[odd[0]]}: no solver here does that; take it out of the file")
    if name == FLOW:
        shift, number = config.get("shift", 1.0), config.get("num_train_timesteps", 1000)
        if config.get("use_dynamic_shifting"):
            assert num_places is not None
            shift = _shift_of(num_places, config, file)
        noise = parse_spec(NoiseSpec, {"kind": "flow", "shift": shift, "num_timesteps": number}, str(file))
        timestep_spacing = (
            "linspace" if num_places is None else "trailing"
        )  # Flux's pipeline gives sigmas of its own: 1 to 1 / steps
        return Scheduled(noise, "flow_prediction", SolverSpec(name="euler", timestep_spacing=timestep_spacing), False)
    return Scheduled(
        _noise(config, file),
        _prediction(config, file, epsilon_is_certain),
        _solver(config, file),
        name == "LCMScheduler",
    )


def _shift_of(num_places: int, config: dict[str, Any], file: Path) -> float:
    """A flow's shift at so many places: mu lies on the line through `base_shift` and `max_shift` at their `image_seq_len`.

    "exponential" shifts by exp(mu), "linear" by mu (diffusers' `calculate_shift` and `time_shift`; SD3, arXiv 2403.03206,
    section 5.3.2, shifts by the root of the number of places).

    Raises:
        ConfigError: the fields make no shift.
    """
    known = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    said = {key: config.get(key, value) for key, value in known.items()}
    for key, value in said.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{file}: {key} = {value!r}: a shift by the resolution needs a number")
    least, most = said["base_image_seq_len"], said["max_image_seq_len"]
    if least == most:
        raise ConfigError(f"{file}: base_image_seq_len = max_image_seq_len = {least}: no shift by the resolution comes of it")
    slope = (said["max_shift"] - said["base_shift"]) / (most - least)
    mu = said["base_shift"] + slope * (num_places - least)
    kind = config.get("time_shift_type", "exponential")
    if kind not in ("exponential", "linear"):
        raise ConfigError(f"{file}: time_shift_type = {kind!r}: known are exponential and linear")
    return float(math.exp(mu) if kind == "exponential" else mu)


def _noise(config: dict[str, Any], file: Path) -> NoiseSpec:
    if config.get("trained_betas") is not None:
        raise ConfigError(f"{file}: trained_betas are not read here; known: linear, scaled_linear, squaredcos_cap_v2")
    if config.get("use_flow_sigmas"):
        raise ConfigError(f"{file}: use_flow_sigmas is not read here; a flow has {FLOW}")
    kind, start, end = DEFAULT_BETAS.get(config["_class_name"], ("linear", 0.0001, 0.02))
    plain = {
        "kind": config.get("beta_schedule", kind),
        "beta_start": config.get("beta_start", start),
        "beta_end": config.get("beta_end", end),
        "num_timesteps": config.get("num_train_timesteps", 1000),
        "rescale_betas_zero_snr": bool(config.get("rescale_betas_zero_snr", False)),
        "set_alpha_to_one": bool(config.get("set_alpha_to_one", config["_class_name"] in ("DDIMScheduler", "LCMScheduler"))),
    }
    return parse_spec(NoiseSpec, plain, str(file))


def _prediction(config: dict[str, Any], file: Path, epsilon_is_certain: bool) -> PredictionType:
    said = config.get("prediction_type")
    if said is None and epsilon_is_certain:
        return "epsilon"
    if said is None:
        raise ConfigError(f"{file}: no prediction_type, and it cannot be known from the network: epsilon or v_prediction?")
    known: tuple[PredictionType, ...] = get_args(PredictionType)
    for one in known:
        if one == said != "flow_prediction":
            return one
    raise ConfigError(f"{file}: prediction_type = {said!r}: known are epsilon, v_prediction and sample")


def _solver(config: dict[str, Any], file: Path) -> SolverSpec:
    name = SCHEDULER_CLASS_TO_SOLVER[config["_class_name"]]
    if name == "lcm":
        return SolverSpec(name="lcm")
    timestep_spacing = config.get("timestep_spacing", DEFAULT_SPACING.get(config["_class_name"], "leading"))
    if config.get("use_karras_sigmas"):
        timestep_spacing = "karras"
    offset = {"steps_offset": config.get("steps_offset", 0)} if timestep_spacing == "leading" else {}
    return parse_spec(SolverSpec, {"name": name, "timestep_spacing": timestep_spacing, **offset}, str(file))
