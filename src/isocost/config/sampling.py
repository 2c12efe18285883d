"""Configuration of the solver and its timesteps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from isocost.config.base import Spec

TIMESTEP_SPACING_NAMES = ("leading", "trailing", "linspace", "karras")

TimestepSpacingName = Literal["leading", "trailing", "linspace", "karras"]


class SolverSpec(Spec):
    """A solver with its time grid; the number of steps and the guidance belong to the point."""

    name: str = Field("ddim", pattern=r"^[^/\s]+$", description="`isocost list solvers` shows the names")
    timestep_spacing: TimestepSpacingName = "trailing"
    eta: float = Field(0.0, ge=0, le=1)
    steps_offset: int = Field(1, ge=0, description="added to a leading grid: Stable Diffusion's steps_offset")

    @property
    def label(self) -> str:
        """Short text for tables: `ddim/trailing`, with eta and offset where they are not the default."""
        eta = f"/eta={self.eta:g}" if self.eta else ""
        return f"{self.name}/{self.timestep_spacing}{eta}" + (f"/offset={self.steps_offset}" if self.steps_offset != 1 else "")
