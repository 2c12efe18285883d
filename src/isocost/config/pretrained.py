"""What a published checkpoint says of itself beyond what ours say: its kind, its noise, its captions."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from isocost.config.base import Spec
from isocost.config.sampling import SolverSpec

FamilyName = Literal["sd", "sdxl", "pixart", "sd3", "flux"]


class NoiseSpec(Spec):
    """A noise schedule by the fields of diffusers' scheduler configurations.

    `set_alpha_to_one` is `set_alpha_to_one`: where DDIM's last step leads to. `shift` is a flow's.
    """

    kind: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "flow"]
    beta_start: float = Field(0.0001, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    num_timesteps: int = Field(1000, ge=1)
    rescale_betas_zero_snr: bool = False
    set_alpha_to_one: bool = False
    shift: float = Field(1.0, gt=0)


class PretrainedSpec(Spec):
    """A pipeline folder or Hub id with LoRAs or without (`FOLDER + LORA:SCALE`), and how it is sampled.

    `solver` is what its own scheduler comes nearest to. `null_is_zero` says that guidance leads away from zeros in place of
    the empty caption's states.
    """

    path: str
    kind: FamilyName
    noise: NoiseSpec
    solver: SolverSpec
    max_tokens: int
    null_is_zero: bool = False
