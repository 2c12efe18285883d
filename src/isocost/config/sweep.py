"""Configuration of a sweep, of its points and of the guidance search."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from isocost.config.base import Spec
from isocost.config.sampling import SolverSpec
from isocost.config.types import NUM_TRAIN_TIMESTEPS, DTypeName

DEFAULT_BATCH_SIZE = 64


class PointSpec(Spec):
    """A coordinate of the sweep: everything that decides the generated images."""

    checkpoint: str
    solver: SolverSpec
    num_steps: int = Field(ge=1, le=NUM_TRAIN_TIMESTEPS)
    guidance: float = Field(ge=0)
    num_images: int = Field(ge=1)
    seed: int = 0
    dtype: DTypeName = "fp32"
    compiled: bool = False
    batch_size: int = Field(DEFAULT_BATCH_SIZE, ge=1)

    @property
    def numerics(self) -> tuple[str, bool, int]:
        """What decides the last bits of an image: precision, compiled or eager, places of a network call."""
        return self.dtype, self.compiled, self.batch_size


class RaceSpec(Spec):
    """How the best guidance is searched (`sweep/race.py`). Its images have noise of their own, winners are scored anew."""

    rungs: tuple[Annotated[int, Field(ge=16)], ...] = Field(
        (), description="images of a value, rising; from protocol.num_images where absent"
    )
    tolerance: float | None = Field(
        None, gt=0, lt=1, description="what a choice may lose, as a share of the score; from protocol.num_images where absent"
    )
    confidence: float = Field(0.95, gt=0.5, lt=1, description="by which values are dropped and a race ends")
    seed: int = Field(1, description="of the search; sweep.seed is that of the scores")
    stop_confidence: float | None = Field(
        0.99, gt=0.5, lt=1, description="by which a cell that cannot be on any frontier is not scored; null scores all"
    )

    @field_validator("rungs")
    @classmethod
    def _rising(cls, rungs: tuple[int, ...]) -> tuple[int, ...]:
        if any(later <= earlier for earlier, later in itertools.pairwise(rungs)):
            raise ValueError("rungs must rise")
        return rungs


class SweepSpec(Spec):
    """The grid: every trained size x solver x num_steps x guidance; `marks_at` is the point scored at each snapshot.

    With `search: race` the values of guidance are a range, and the best in it is found for every size, solver and num_steps.
    """

    solvers: tuple[SolverSpec, ...] = (SolverSpec(),)
    num_steps: tuple[Annotated[int, Field(ge=1, le=NUM_TRAIN_TIMESTEPS)], ...]
    guidance: tuple[Annotated[float, Field(ge=0)], ...]
    search: Literal["grid", "race"] = Field("grid", description="every value of guidance, or the best found with few images")
    race: RaceSpec = RaceSpec()
    seed: int = 0
    dtype: DTypeName = "fp32"
    compiled: bool = Field(False, description="compile the network: minutes once a machine, then faster calls")
    batch_size: int = Field(DEFAULT_BATCH_SIZE, ge=1, description="passes of a call; on a CPU each core makes its own")
    shard_size: int = Field(256, ge=1, description="images that are made, kept and shared out at once; changes no number")
    snapshot_num_steps: int = Field(16, ge=1, le=NUM_TRAIN_TIMESTEPS)
    snapshot_guidance: float = Field(2.0, ge=0)

    @model_validator(mode="after")
    def _races_on_fresh_noise(self) -> SweepSpec:
        if self.search == "race" and self.race.seed == self.seed:
            raise ValueError(f"race.seed: {self.seed} is sweep.seed too; a winner is scored with noise it was not chosen by")
        if self.search == "race" and min(self.guidance) < 1:
            raise ValueError("search: race takes guidance from 1 on; take the lower values out, or search: grid")
        return self

    @field_validator("solvers", "num_steps", "guidance")
    @classmethod
    def _not_empty(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if not values:
            raise ValueError("needs at least one value")
        return values
