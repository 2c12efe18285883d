"""Read noise schedule, prediction type and solver from a diffusers scheduler config.

Missing fields have diffusers' default for the class. The prediction type is an exception: a wrong one gives noise, so a missing
one is read as epsilon only if that is certain.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import diffusers

from isocost.config.base import parse_spec
from isocost.config.pretrained import NoiseSpec
from isocost.config.sampling import SolverSpec
from isocost.config.types import PredictionType
from isocost.errors import ConfigError
from isocost.models.pretrained.files import MAX_SIZE, read_config
from isocost.models.pretrained.scheduler_fields import (
    WITHOUT_EXACT_SOLVER,
    FieldProblem,
    field_problems,
)

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
SPACING_NAMES = ("leading", "trailing", "linspace")
SIGMA_FIELDS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}
"""Fields that replace the timestep spacing, and the spacing of isocost that equals each."""


@dataclass(frozen=True)
class SchedulerSettings:
    """Settings of a scheduler.

    Attributes:
        noise: the noise schedule.
        prediction_type: what the network predicts.
        solver: the solver that equals the scheduler, or the nearest one.
        solver_problem: why `solver` does not equal the scheduler; empty if it does.
        is_consistency_model: True for a consistency student.
        class_name: diffusers' class of the scheduler.
    """

    noise: NoiseSpec
    prediction_type: PredictionType
    solver: SolverSpec
    solver_problem: str
    is_consistency_model: bool
    class_name: str


def read_scheduler(
    folder: Path, epsilon_is_certain: bool, num_patches: int | None = None, pipeline_sets_sd_fields: bool = False
) -> SchedulerSettings:
    """Read `scheduler/scheduler_config.json` of a pipeline folder.

    Args:
        folder: pipeline folder.
        epsilon_is_certain: a missing prediction type means epsilon (Stable Diffusion 1).
        num_patches: patches of an image in Flux's transformer, for a shift that depends on the resolution; None for other
            families, whose shift is a constant.
        pipeline_sets_sd_fields: diffusers' pipeline sets `steps_offset` to 1 and `clip_sample` to false.

    Raises:
        ConfigError: the scheduler or its noise schedule is not supported, or the prediction type is missing and not certain.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    config = read_config(file)
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in SCHEDULER_CLASS_TO_SOLVER:
        supported = ", ".join(SCHEDULER_CLASS_TO_SOLVER)
        raise ConfigError(f"{file}: the scheduler {name} is not supported; supported: {supported}")
    defaults = default_fields(name)
    if pipeline_sets_sd_fields:
        fixed = {"steps_offset": 1, "clip_sample": False}
        config |= {key: value for key, value in fixed.items() if key in config or key in defaults}
    try:
        problems = list(field_problems(config, defaults))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    is_flow = name == FLOW_SCHEDULER
    schedule_problems = [problem for problem in problems if problem.is_schedule]
    if is_flow and config.get("use_dynamic_shifting") and num_patches is None:
        schedule_problems.append(FieldProblem("use_dynamic_shifting", True, "supported for Flux only", True))
    if schedule_problems:
        problem = schedule_problems[0]
        raise ConfigError(f"{file}: {problem}: not supported{problem.hint}; choose another checkpoint, or correct the file")
    if is_flow:
        shift, num_timesteps = config.get("shift", 1.0), config.get("num_train_timesteps", 1000)
        if config.get("use_dynamic_shifting"):
            assert num_patches is not None
            shift = _resolution_shift(num_patches, config, file)
        noise = parse_spec(NoiseSpec, {"kind": "flow", "shift": shift, "num_timesteps": num_timesteps}, str(file))
        # Flux's pipeline passes its own sigmas, from 1 to 1 / steps.
        solver = SolverSpec(name="euler", timestep_spacing="linspace" if num_patches is None else "trailing")
        return SchedulerSettings(noise, "flow_prediction", solver, _solver_problem(file, config, problems), False, name)
    own_fields = {"_class_name": name, **{key: config.get(key, default) for key, default in defaults.items()}}
    solver = _solver_spec(own_fields, file)
    problems += _combination_problems(own_fields, solver)
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in defaults:
        problems.append(FieldProblem("rescale_betas_zero_snr", True, f"diffusers' {name} does not read it", False))
    return SchedulerSettings(
        _noise_spec(config, defaults, file),
        _prediction_type(config, file, epsilon_is_certain),
        solver,
        _solver_problem(file, config, problems),
        name == "LCMScheduler",
        name,
    )


@lru_cache(maxsize=64)
def default_fields(class_name: str) -> dict[str, Any]:
    """diffusers' default of every field of a scheduler class."""
    parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


def _solver_problem(file: Path, config: Mapping[str, Any], problems: Sequence[FieldProblem]) -> str:
    """One line about the first field that our solver does not reproduce; empty if it reproduces all."""
    name = config["_class_name"]
    if name in WITHOUT_EXACT_SOLVER:
        return f"{file}: _class_name = {name}: isocost does not have this solver"
    return f"{file}: {problems[0]}: isocost has no {name} with this value{problems[0].hint}" if problems else ""


def _combination_problems(config: Mapping[str, Any], solver: SolverSpec) -> Iterator[FieldProblem]:
    """Yield fields whose values are supported, but not together."""
    name, spacing = config["_class_name"], config.get("timestep_spacing")
    given = [field for field in SIGMA_FIELDS if config.get(field)]
    if len(given) > 1:
        yield FieldProblem(given[1], True, f"not with {given[0]}", False)
    if given and name in ("EulerDiscreteScheduler", "HeunDiscreteScheduler") and spacing != "linspace":
        yield FieldProblem("timestep_spacing", spacing, f"{given[0]} needs linspace", False)
    if config.get("use_karras_sigmas"):
        is_rounded = name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
        if is_rounded and config["beta_schedule"] == "squaredcos_cap_v2":
            yield FieldProblem("use_karras_sigmas", True, "not with beta_schedule = squaredcos_cap_v2", False)
    if name == "DPMSolverMultistepScheduler" and config["solver_order"] == 1 and solver.timestep_spacing != "trailing":
        yield FieldProblem(
            "solver_order", 1, "needs timestep_spacing = trailing without karras, exponential or beta sigmas", False
        )
    if config.get("rescale_betas_zero_snr") and given:
        yield FieldProblem(given[0], True, "not with rescale_betas_zero_snr", False)


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
        if not abs(value) <= MAX_SIZE:  # also NaN
            raise ConfigError(f"{file}: {key} = {str(value)[:60]}: too large for a resolution-dependent shift")
    base_length, max_length = fields["base_image_seq_len"], fields["max_image_seq_len"]
    if base_length == max_length:
        raise ConfigError(f"{file}: base_image_seq_len = max_image_seq_len = {base_length}: they must differ")
    slope = (fields["max_shift"] - fields["base_shift"]) / (max_length - base_length)
    mu = fields["base_shift"] + slope * (num_patches - base_length)
    shift_type = config.get("time_shift_type", "exponential")
    if shift_type not in ("exponential", "linear"):
        raise ConfigError(f"{file}: time_shift_type = {shift_type!r}: supported: exponential, linear")
    try:
        return float(math.exp(mu) if shift_type == "exponential" else mu)
    except OverflowError as error:
        raise ConfigError(f"{file}: base_shift and max_shift give a shift of exp({mu:.3g}), which is too large") from error


def _noise_spec(config: dict[str, Any], defaults: Mapping[str, Any], file: Path) -> NoiseSpec:
    merged = {**defaults, **config}
    fields = {
        "kind": merged["beta_schedule"],
        "beta_start": merged["beta_start"],
        "beta_end": merged["beta_end"],
        "num_timesteps": merged["num_train_timesteps"],
        "rescale_betas_zero_snr": bool(merged.get("rescale_betas_zero_snr", False)),
        "set_alpha_to_one": bool(merged.get("set_alpha_to_one", False)),
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


def _solver_spec(config: Mapping[str, Any], file: Path) -> SolverSpec:
    """The solver nearest to a scheduler, from its fields with diffusers' defaults."""
    name = SCHEDULER_CLASS_TO_SOLVER[config["_class_name"]]
    if name == "lcm":
        return SolverSpec(name="lcm")
    # DPMSolverSinglestepScheduler has no such field; its timesteps are those of linspace.
    timestep_spacing = config.get("timestep_spacing", "linspace")
    if timestep_spacing not in SPACING_NAMES:
        raise ConfigError(f"{file}: timestep_spacing = {timestep_spacing!r}: supported: {', '.join(SPACING_NAMES)}")
    if config["_class_name"] == "DPMSolverMultistepScheduler":
        is_sde = config["algorithm_type"] == "sde-dpmsolver++"
        if config["solver_order"] == 1:
            name = "euler-ancestral" if is_sde else "euler"
        elif is_sde:
            name = "sde-dpmsolver++2m"
    timestep_spacing = next((name for field, name in SIGMA_FIELDS.items() if config.get(field)), timestep_spacing)
    offset = {"steps_offset": config.get("steps_offset", 0)} if timestep_spacing == "leading" else {}
    return parse_spec(SolverSpec, {"name": name, "timestep_spacing": timestep_spacing, **offset}, str(file))
