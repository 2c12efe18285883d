"""Configuration of the solver and its timesteps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from isocost.config.base import Spec
from isocost.config.types import NUM_TRAIN_TIMESTEPS

TIMESTEP_SPACING_NAMES = ("leading", "trailing", "linspace", "karras")

OWN_SOLVER, NEAREST_SOLVER = "own", "nearest"
FOLDER_SOLVERS = (OWN_SOLVER, NEAREST_SOLVER)
"""Names in place of a solver: that of the checkpoint's folder, exactly, or the nearest solver of isocost."""

TimestepSpacingName = Literal["leading", "trailing", "linspace", "karras"]


class SolverSpec(Spec):
    """A solver with its timestep spacing. The number of steps and the guidance belong to the sweep point."""

    name: str = Field("ddim", pattern=r"^[^/\s]+$", description="name of a solver; see `isocost list solvers`")
    timestep_spacing: TimestepSpacingName = "trailing"
    eta: float = Field(0.0, ge=0, le=1, description="ddim: fraction of DDPM's noise; 0 is deterministic")
    steps_offset: int = Field(
        1, ge=0, le=NUM_TRAIN_TIMESTEPS, description="added to the timesteps of leading spacing, as in diffusers"
    )

    @property
    def label(self) -> str:
        """Label for tables, such as `ddim/trailing`; eta and offset are shown if they are not the default."""
        eta = f"/eta={self.eta:g}" if self.eta else ""
        return f"{self.name}/{self.timestep_spacing}{eta}" + (f"/offset={self.steps_offset}" if self.steps_offset != 1 else "")
