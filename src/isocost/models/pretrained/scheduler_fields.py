"""The fields of every diffusers scheduler class: honoured, restricted, or without effect.

`SCHEDULER_FIELDS` has one entry for every field of the supported classes, `UNSUPPORTED_SCHEDULERS` names all other classes.
tests/test_scheduler_fields.py compares both with the signatures of the installed diffusers, so it fails if diffusers adds a
field or a class. It also compares diffusers' schedulers with the solver coefficients for the fields that are honoured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from isocost.errors import ConfigError

Effect = Literal["honoured", "restricted", "no effect"]
NO_VALUES: tuple[Any, ...] = ()


@dataclass(frozen=True)
class FieldRule:
    """Treatment of a field of a scheduler.

    Attributes:
        effect: "honoured": the value is used. "restricted": any value outside `accepted` is an error. "no effect": diffusers
            does not read the field in the cases that isocost accepts.
        accepted: values of a restricted field for which our solver does the same as diffusers.
        is_schedule: the field belongs to the noise schedule or the network's input, so it concerns every solver. The other
            fields concern the folder's own solver only, and a sweep with other solvers may use the folder.
        reason: why, in a few words.
    """

    effect: Effect
    accepted: tuple[Any, ...] = NO_VALUES
    is_schedule: bool = False
    reason: str = ""


def _honoured(reason: str = "", is_schedule: bool = False) -> FieldRule:
    return FieldRule("honoured", is_schedule=is_schedule, reason=reason)


def _only(*accepted: Any, reason: str = "", is_schedule: bool = False) -> FieldRule:
    return FieldRule("restricted", accepted, is_schedule, reason)


def _ignored(reason: str) -> FieldRule:
    return FieldRule("no effect", reason=reason)


_SCHEDULE = {
    "num_train_timesteps": _honoured(is_schedule=True),
    "beta_start": _honoured(is_schedule=True),
    "beta_end": _honoured(is_schedule=True),
    "beta_schedule": _honoured("linear, scaled_linear, squaredcos_cap_v2", is_schedule=True),
    "trained_betas": _only(None, is_schedule=True, reason="betas must follow a named schedule"),
    "prediction_type": _honoured("epsilon, v_prediction, sample", is_schedule=True),
}
_ZERO_SNR = {"rescale_betas_zero_snr": _honoured(is_schedule=True)}
_ALPHA_ONE = {"set_alpha_to_one": _honoured("alpha at the end of the last step", is_schedule=True)}
_SPACING = {"timestep_spacing": _honoured("leading, trailing, linspace"), "steps_offset": _honoured("with leading spacing")}
_CLIPPING = {
    "clip_sample": _only(False, reason="latents are not clipped; pipelines of Stable Diffusion 1 and 2 switch it off"),
    "clip_sample_range": _ignored("used only with clip_sample"),
}
_THRESHOLDING = {
    "thresholding": _only(False, reason="made for pixels, not for latents"),
    "dynamic_thresholding_ratio": _ignored("used only with thresholding"),
    "sample_max_value": _ignored("used only with thresholding"),
}
_SIGMAS = {
    "use_karras_sigmas": _honoured("read as karras spacing"),
    "use_exponential_sigmas": _honoured("read as exponential spacing"),
    "use_beta_sigmas": _honoured("read as beta spacing"),
}
_FLOW = {
    "use_flow_sigmas": _only(False, is_schedule=True, reason="a flow needs a FlowMatchEulerDiscreteScheduler"),
    "flow_shift": _ignored("used only with use_flow_sigmas"),
}
_DYNAMIC = {
    "use_dynamic_shifting": _only(False, is_schedule=True),
    "time_shift_type": _ignored("used only with use_dynamic_shifting"),
}
_WITHOUT_SOLVER = "isocost has no such solver; `nearest` ignores the field"
_DPM = {
    **_SCHEDULE,
    **_THRESHOLDING,
    **_SIGMAS,
    **_FLOW,
    **_DYNAMIC,
    "solver_order": _only(1, 2, reason="1 with trailing spacing is Euler's method"),
    "algorithm_type": _only("dpmsolver++", "sde-dpmsolver++"),
    "solver_type": _only("midpoint", "logrho", "bh1", "bh2", reason="diffusers reads logrho, bh1 and bh2 as midpoint"),
    "lower_order_final": _ignored("the last step to sigma 0 has order 1 in any case"),
    "euler_at_final": _ignored("the last step to sigma 0 has order 1 in any case"),
    "use_lu_lambdas": _only(False),
    "final_sigmas_type": _only("zero", reason="the last step ends at the clean latent"),
    "lambda_min_clipped": _only(-float("inf"), None),
    "variance_type": _only(None),
    **_SPACING,
    **_ZERO_SNR,
}

SCHEDULER_FIELDS: dict[str, dict[str, FieldRule]] = {
    "DDIMScheduler": {**_SCHEDULE, **_CLIPPING, **_ALPHA_ONE, **_SPACING, **_THRESHOLDING, **_ZERO_SNR},
    "DDPMScheduler": {
        **_SCHEDULE,
        "variance_type": _only("fixed_small", reason="isocost uses the posterior variance"),
        **_CLIPPING,
        **_THRESHOLDING,
        **_SPACING,
        **_ZERO_SNR,
    },
    "PNDMScheduler": {**_SCHEDULE, **_ALPHA_ONE, **_SPACING, "skip_prk_steps": _ignored(_WITHOUT_SOLVER)},
    "LMSDiscreteScheduler": {**_SCHEDULE, **_SIGMAS, **_SPACING},
    "EulerDiscreteScheduler": {
        **_SCHEDULE,
        "interpolation_type": _only("linear"),
        **_SIGMAS,
        "sigma_min": _only(None),
        "sigma_max": _only(None),
        **_SPACING,
        "timestep_type": _only("discrete", is_schedule=True, reason="the network's input is the index of a timestep"),
        **_ZERO_SNR,
        "final_sigmas_type": _only("zero", reason="the last step ends at the clean latent"),
    },
    "EulerAncestralDiscreteScheduler": {**_SCHEDULE, **_SPACING, **_ZERO_SNR},
    "HeunDiscreteScheduler": {**_SCHEDULE, **_SIGMAS, **_CLIPPING, **_SPACING},
    "DPMSolverMultistepScheduler": _DPM,
    "DPMSolverSinglestepScheduler": {
        name: _ignored(_WITHOUT_SOLVER) if name in ("solver_order", "solver_type", "lower_order_final") else rule
        for name, rule in _DPM.items()
        if name not in ("euler_at_final", "use_lu_lambdas", "timestep_spacing", "steps_offset", "rescale_betas_zero_snr")
    },
    "DEISMultistepScheduler": {
        **_SCHEDULE,
        **_THRESHOLDING,
        **_SIGMAS,
        **_FLOW,
        **_DYNAMIC,
        **_SPACING,
        **{name: _ignored(_WITHOUT_SOLVER) for name in ("solver_order", "algorithm_type", "solver_type", "lower_order_final")},
    },
    "UniPCMultistepScheduler": {
        **_SCHEDULE,
        **_THRESHOLDING,
        **_SIGMAS,
        **_FLOW,
        **_DYNAMIC,
        "solver_order": _only(2),
        "predict_x0": _only(True),
        "solver_type": _only("bh2", "midpoint", "heun", "logrho", reason="diffusers reads midpoint, heun and logrho as bh2"),
        "lower_order_final": _only(True),
        "disable_corrector": _only([], None),
        "solver_p": _only(None),
        **_SPACING,
        "final_sigmas_type": _only("zero", reason="the last step ends at the clean latent"),
        **_ZERO_SNR,
        "sigma_min": _only(None),
        "sigma_max": _only(None),
        "shift_terminal": _only(None),
    },
    "LCMScheduler": {
        **_SCHEDULE,
        "original_inference_steps": _only(50),
        "timestep_scaling": _only(10.0),
        **_CLIPPING,
        **_ALPHA_ONE,
        "steps_offset": _ignored("LCM has its own timesteps"),
        "timestep_spacing": _ignored("LCM has its own timesteps"),
        **_THRESHOLDING,
        **_ZERO_SNR,
    },
    "FlowMatchEulerDiscreteScheduler": {
        "num_train_timesteps": _honoured(is_schedule=True),
        "shift": _honoured(is_schedule=True),
        "use_dynamic_shifting": _honoured("for Flux only", is_schedule=True),
        **{
            name: _honoured("with use_dynamic_shifting", is_schedule=True)
            for name in ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type")
        },
        "invert_sigmas": _only(False),
        "shift_terminal": _only(None),
        "use_karras_sigmas": _only(False),
        "use_exponential_sigmas": _only(False),
        "use_beta_sigmas": _only(False),
        "stochastic_sampling": _only(False),
    },
}
"""Rule of every field of the supported scheduler classes."""

UNSUPPORTED_SCHEDULERS: dict[str, str] = {
    **dict.fromkeys(
        (
            "AmusedScheduler",
            "BlockRefinementScheduler",
            "DiscreteDDIMScheduler",
            "EntropyBoundScheduler",
            "VQDiffusionScheduler",
        ),
        "for discrete tokens",
    ),
    **dict.fromkeys(("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"), "inverts images"),
    **dict.fromkeys(
        ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler", "KarrasVeScheduler"),
        "for networks with EDM's preconditioning",
    ),
    **dict.fromkeys(
        ("CMStochasticIterativeScheduler", "ConsistencyDecoderScheduler", "SCMScheduler", "TCDScheduler"),
        "for consistency models of another kind than LCM",
    ),
    **dict.fromkeys(("ScoreSdeVeScheduler", "ScoreSdeVpScheduler"), "for score networks in continuous time"),
    **dict.fromkeys(
        (
            *("FlowMapEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler", "HeliosDMDScheduler"),
            *("HeliosScheduler", "LTXEulerAncestralRFScheduler", "MiniMaxH3Scheduler", "PiflowScheduler"),
        ),
        "isocost has no such solver for flows",
    ),
    **dict.fromkeys(("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"), "for videos"),
    **dict.fromkeys(
        (
            *("DDIMParallelScheduler", "DDPMParallelScheduler", "DPMSolverSDEScheduler", "IPNDMScheduler"),
            *("KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "SASolverScheduler"),
        ),
        "isocost has no such solver",
    ),
    **dict.fromkeys(
        ("DDPMWuerstchenScheduler", "RePaintScheduler", "RFD4ProteinaScheduler", "UnCLIPScheduler"), "for other pipelines"
    ),
}
"""The other scheduler classes of diffusers, and why they are refused."""

WITHOUT_EXACT_SOLVER = frozenset(
    {"PNDMScheduler", "LMSDiscreteScheduler", "DEISMultistepScheduler", "DPMSolverSinglestepScheduler"}
)
"""Supported classes whose solver isocost does not have. isocost reads their noise schedules."""

LEGACY_FIELDS = frozenset({"tensor_format", "predict_epsilon", "predict_x0", "clip_sample", "timesteps", "timestep_values"})
"""Fields of earlier diffusers versions that today's diffusers ignores."""

_ALL_FIELDS = frozenset(name for fields in SCHEDULER_FIELDS.values() for name in fields)


@dataclass(frozen=True)
class FieldProblem:
    """A field whose value isocost does not reproduce."""

    name: str
    value: Any
    reason: str
    is_schedule: bool

    def __str__(self) -> str:
        return f"{self.name} = {self.value!r}"

    @property
    def hint(self) -> str:
        """The reason in brackets, to be added to a message."""
        return f" ({self.reason})" if self.reason else ""


def field_problems(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[FieldProblem]:
    """Yield the fields of a scheduler config whose values isocost does not reproduce.

    A field that only other scheduler classes have is ignored, as in diffusers. A field that no supported class has is reported,
    unless its value is null or false.

    Args:
        config: content of `scheduler_config.json`, with the name of a supported class.
        defaults: diffusers' defaults of the class's fields.

    Raises:
        ConfigError: a field with the values true and false has another value.
    """
    rules = SCHEDULER_FIELDS[config["_class_name"]]
    for name, rule in rules.items():
        value = config.get(name, defaults.get(name))
        if isinstance(defaults.get(name), bool):
            if not isinstance(value, bool | None):
                raise ConfigError(f"{name} = {value!r}: must be true or false")
            value = bool(value)
        if rule.effect == "restricted" and not any(_same(value, accepted) for accepted in rule.accepted):
            yield FieldProblem(name, value, rule.reason, rule.is_schedule)
    for name, value in config.items():
        is_known = name.startswith("_") or name in _ALL_FIELDS or name in LEGACY_FIELDS
        if not is_known and value is not None and value is not False:
            yield FieldProblem(name, value, "a field that isocost does not know", False)


def _same(value: Any, accepted: Any) -> bool:
    """Whether two values are equal; 1 equals 1.0 but not True."""
    return isinstance(value, bool) == isinstance(accepted, bool) and bool(value == accepted)


def fields_table() -> str:
    """The rules as a Markdown table, for docs/schedulers.md."""
    lines = ["| class | field | effect | values |", "|---|---|---|---|"]
    for class_name, rules in SCHEDULER_FIELDS.items():
        for name, rule in sorted(rules.items()):
            accepted = f"accepted: {', '.join(_shown(value) for value in rule.accepted)}" if rule.accepted else ""
            values = "; ".join(part for part in (accepted, rule.reason) if part)
            lines.append(f"| `{class_name}` | `{name}` | {rule.effect} | {values} |")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    return f"`{words.get(value, value) if isinstance(value, bool | None) else value}`"
