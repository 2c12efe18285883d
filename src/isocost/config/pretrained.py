"""Configuration that is read from a published pipeline: its family, its noise schedule, its text encoder."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from isocost.config.base import Spec
from isocost.config.sampling import SolverSpec
from isocost.config.types import Tokens

MAX_TRAIN_TIMESTEPS = 1_000_000
FamilyName = Literal["sd", "sdxl", "pixart", "sd3", "flux"]


class NoiseSpec(Spec):
    """A noise schedule, with the fields of diffusers' scheduler configurations."""

    kind: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "flow"]
    beta_start: float = Field(0.0001, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    num_timesteps: int = Field(1000, ge=2, le=MAX_TRAIN_TIMESTEPS)
    rescale_betas_zero_snr: bool = False
    set_alpha_to_one: bool = Field(False, description="DDIM's last step ends at the clean latent")
    shift: float = Field(1.0, gt=0, le=1e6, description="time shift of a flow")


class PretrainedSpec(Spec):
    """A published pipeline and its sampling defaults."""

    path: str = Field(description="folder or Hub id, with LoRAs or without: `FOLDER + LORA:SCALE`")
    kind: FamilyName
    noise: NoiseSpec
    solver: SolverSpec = Field(description="the solver that equals the pipeline's scheduler, or the nearest one")
    solver_problem: str = Field("", description="why `solver` does not equal the scheduler; empty if it does")
    scheduler: str = Field(
        "", description="class of the pipeline's scheduler; empty in an entry of a version that did not check its fields"
    )
    max_tokens: Tokens = Field(description="prompt length, tokens")
    null_is_zero: bool = Field(False, description="the unconditional embeddings are zeros, not those of the empty prompt")
