"""A scheduler's configuration to noise schedule, prediction type and sampler.

What the file leaves out is diffusers' default for the class, but for the prediction type: a wrong one draws noise, so it is
taken as epsilon only where that is certain.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from isocost.errors import RequestError
from isocost.models.hub.facts import NoiseSpec
from isocost.models.hub.folder import read_config
from isocost.spec import parse_spec
from isocost.stages import PredictionType, SamplerName, SamplerSpec

SAMPLERS: dict[str, SamplerName] = {
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
NOT_OURS = ("use_exponential_sigmas", "use_beta_sigmas", "use_dynamic_shifting", "invert_sigmas", "thresholding", "final_sigma")


@dataclass(frozen=True)
class Scheduled:
    """What a scheduler's configuration comes to; `is_consistent` that of a consistency student."""

    noise: NoiseSpec
    prediction: PredictionType
    sampler: SamplerSpec
    is_consistent: bool


def read_scheduler(folder: Path, epsilon_is_certain: bool) -> Scheduled:
    """`scheduler/scheduler_config.json` of a pipeline folder.

    `epsilon_is_certain`: networks of this kind predict noise where nothing is said (Stable Diffusion 1).

    Raises:
        RequestError: an unknown class or schedule, or a prediction type that is not said and cannot be known.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    config = read_config(file)
    name = config.get("_class_name")
    if name not in SAMPLERS:
        raise RequestError(f"{file}: the scheduler {name} is not known here; known: {', '.join(SAMPLERS)}")
    odd = [key for key in NOT_OURS if config.get(key)]
    if odd:
        raise RequestError(f"{file}: {odd[0]} = {config[odd[0]]}: no sampler here does that; take it out of the file")
    if name == FLOW:
        shift, number = config.get("shift", 1.0), config.get("num_train_timesteps", 1000)
        noise = parse_spec(NoiseSpec, {"kind": "flow", "shift": shift, "num_timesteps": number}, str(file))
        return Scheduled(noise, "flow_prediction", SamplerSpec(name="euler", spacing="linspace"), False)
    return Scheduled(
        _noise(config, file),
        _prediction(config, file, epsilon_is_certain),
        _sampler(config, file),
        name == "LCMScheduler",
    )


def _noise(config: dict[str, Any], file: Path) -> NoiseSpec:
    if config.get("trained_betas") is not None:
        raise RequestError(f"{file}: trained_betas are not read here; known: linear, scaled_linear, squaredcos_cap_v2")
    if config.get("use_flow_sigmas"):
        raise RequestError(f"{file}: use_flow_sigmas is not read here; a flow has {FLOW}")
    kind, start, end = DEFAULT_BETAS.get(config["_class_name"], ("linear", 0.0001, 0.02))
    plain = {
        "kind": config.get("beta_schedule", kind),
        "beta_start": config.get("beta_start", start),
        "beta_end": config.get("beta_end", end),
        "num_timesteps": config.get("num_train_timesteps", 1000),
        "zero_terminal_snr": bool(config.get("rescale_betas_zero_snr", False)),
        "ends_clean": bool(config.get("set_alpha_to_one", config["_class_name"] in ("DDIMScheduler", "LCMScheduler"))),
    }
    return parse_spec(NoiseSpec, plain, str(file))


def _prediction(config: dict[str, Any], file: Path, epsilon_is_certain: bool) -> PredictionType:
    said = config.get("prediction_type")
    if said is None and epsilon_is_certain:
        return "epsilon"
    if said is None:
        raise RequestError(f"{file}: no prediction_type, and it cannot be known from the network: epsilon or v_prediction?")
    known: tuple[PredictionType, ...] = get_args(PredictionType)
    for one in known:
        if one == said != "flow_prediction":
            return one
    raise RequestError(f"{file}: prediction_type = {said!r}: known are epsilon, v_prediction and sample")


def _sampler(config: dict[str, Any], file: Path) -> SamplerSpec:
    name = SAMPLERS[config["_class_name"]]
    if name == "lcm":
        return SamplerSpec(name="lcm")
    spacing = config.get("timestep_spacing", DEFAULT_SPACING.get(config["_class_name"], "leading"))
    if config.get("use_karras_sigmas"):
        spacing = "karras"
    offset = {"offset": config.get("steps_offset", 0)} if spacing == "leading" else {}
    return parse_spec(SamplerSpec, {"name": name, "spacing": spacing, **offset}, str(file))
