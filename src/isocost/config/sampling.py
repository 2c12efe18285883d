"""Configuration of the solver and its timesteps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from isocost.config.base import Spec

SAMPLER_NAMES = (
    *("ddim", "ddpm", "euler", "euler-ancestral", "heun"),
    *("dpmsolver++2m", "sde-dpmsolver++2m", "unipc", "lcm"),
)
SPACING_NAMES = ("leading", "trailing", "linspace", "karras")

SamplerName = Literal["ddim", "ddpm", "euler", "euler-ancestral", "heun", "dpmsolver++2m", "sde-dpmsolver++2m", "unipc", "lcm"]
SpacingName = Literal["leading", "trailing", "linspace", "karras"]


# --- sampling and scoring ---------------------------------------------------------------------------------------------


class SamplerSpec(Spec):
    """A solver with its time grid; the number of steps and the guidance belong to the point."""

    name: SamplerName = "ddim"
    spacing: SpacingName = "trailing"
    eta: float = Field(0.0, ge=0, le=1)
    offset: int = Field(1, ge=0, description="added to a leading grid: Stable Diffusion's steps_offset")

    @property
    def label(self) -> str:
        """Short text for tables: `ddim/trailing`, with eta and offset where they are not the default."""
        eta = f"/eta={self.eta:g}" if self.eta else ""
        return f"{self.name}/{self.spacing}{eta}" + (f"/offset={self.offset}" if self.offset != 1 else "")
