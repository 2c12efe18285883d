"""Configuration of a sweep, its points and the guidance search."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from isocost.config.base import Spec
from isocost.config.sampling import SolverSpec, VaeSpec
from isocost.config.types import MAX_SAMPLES, DTypeName, Guidance, NumSamples, NumSteps, Seed, SweepBatch

DEFAULT_BATCH_SIZE = 64
NO_GUIDANCE = "guidance = 0 samples without the prompt; give 1 for no guidance (one network pass per evaluation)"
"""The error for guidance 0 of a model that is trained here."""


class PointSpec(Spec):
    """A point of the sweep: everything that determines the generated images."""

    checkpoint: str
    solver: SolverSpec
    num_steps: NumSteps
    guidance: Guidance
    num_images: NumSamples
    seed: Seed = 0
    dtype: DTypeName = "fp32"
    compiled: bool = False
    batch_size: SweepBatch = DEFAULT_BATCH_SIZE
    vae: VaeSpec = VaeSpec()

    @property
    def numerics(self) -> tuple[str, bool, int]:
        """The settings that change only the rounding of an image: dtype, compiled, batch size."""
        return self.dtype, self.compiled, self.batch_size


class RaceSpec(Spec):
    """Guidance search by successive halving (`sweep/guidance_search.py`). The winner is scored again with other noise."""

    rungs: tuple[Annotated[int, Field(ge=16, le=MAX_SAMPLES)], ...] = Field(
        (), description="images per guidance value in each rung, rising; if absent, derived from protocol.num_images"
    )
    tolerance: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="allowed loss of the selected value, as a fraction of the score; if absent, from protocol.num_images",
    )
    confidence: float = Field(0.95, gt=0.5, lt=1, description="confidence of dropping a value and of ending a race")
    seed: Seed = Field(1, description="seed of the search; must differ from sweep.seed, the seed of the scores")
    stop_confidence: float | None = Field(
        0.99, gt=0.5, lt=1, description="confidence that a winner is on no frontier, so that it is not scored; null scores all"
    )

    @field_validator("rungs")
    @classmethod
    def _rising(cls, rungs: tuple[int, ...]) -> tuple[int, ...]:
        if any(later <= earlier for earlier, later in itertools.pairwise(rungs)):
            raise ValueError("rungs must rise; sort them and use each number once")
        return rungs


class SweepSpec(Spec):
    """The grid of points: every size x solver x num_steps x guidance.

    With `search: race` the values of guidance are a range, and the best value is searched for every size, solver and num_steps.
    Snapshots are scored at one point: the first solver, `snapshot_num_steps` and `snapshot_guidance`.
    """

    solvers: tuple[SolverSpec, ...] = (SolverSpec(),)
    num_steps: tuple[NumSteps, ...]
    guidance: tuple[Guidance, ...]
    search: Literal["grid", "race"] = Field(
        "grid", description="score every guidance value, or search the best one with few images"
    )
    race: RaceSpec = RaceSpec()
    seed: Seed = 0
    dtype: DTypeName = "fp32"
    compiled: bool = Field(False, description="compile the network; takes minutes once per machine")
    batch_size: SweepBatch = Field(DEFAULT_BATCH_SIZE, description="slots of a network call; on a CPU one call per core")
    vae: VaeSpec = Field(VaeSpec(), description="dtype, tiling and slicing of the autoencoder that decodes the images")
    shard_size: NumSamples = Field(256, description="images per unit of work of a worker; changes no result")
    snapshot_num_steps: NumSteps = Field(16, description="num_steps of the snapshots' points")
    snapshot_guidance: Guidance = Field(2.0, description="guidance of the snapshots' points")

    @model_validator(mode="after")
    def _check_search(self) -> SweepSpec:
        if self.search == "race" and self.race.seed == self.seed:
            raise ValueError(f"race.seed = {self.seed} equals sweep.seed; choose another seed")
        if self.search == "race" and min(self.guidance) < 1:
            raise ValueError("search: race needs guidance of 1 or more; remove the lower values, or use search: grid")
        return self

    @field_validator("solvers", "num_steps", "guidance")
    @classmethod
    def _not_empty(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if not values:
            raise ValueError("give at least one value")
        return values
