"""Configuration of a sweep, its points and the guidance search."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from isocost.config.base import Spec
from isocost.config.sampling import SolverSpec, VaeSpec
from isocost.config.types import MAX_SAMPLES, Channels, DTypeName, Guidance, ImagesSeen, NumSamples, NumSteps, Seed, SweepBatch

DEFAULT_BATCH_SIZE = 64
MAX_LOG_SNR = 100.0
"""Beyond this log-SNR there is no noise, or nothing but noise, in any schedule."""
NO_GUIDANCE = "guidance = 0 samples without the prompt; give 1 for no guidance (one network pass per evaluation)"
"""The error for guidance 0 of a model that is trained here."""


IntervalEnd = Annotated[float, Field(ge=-MAX_LOG_SNR, le=MAX_LOG_SNR)] | None
GuidanceInterval = tuple[IntervalEnd, IntervalEnd]
"""(low, high) in log-SNR, `log(alpha^2 / sigma^2)`: guidance applies where low <= log-SNR < high; null is an open end."""
GuidanceSchedule = tuple[tuple[Annotated[float, Field(ge=-MAX_LOG_SNR, le=MAX_LOG_SNR)], Guidance], ...]
"""Points (log-SNR, w) with rising log-SNR; w is linear between them and constant outside."""


def _check_interval(interval: GuidanceInterval | None) -> GuidanceInterval | None:
    low, high = (None, None) if interval is None else interval
    if low is not None and high is not None and low >= high:
        raise ValueError("the lower log-SNR comes first (low log-SNR is high noise); exchange the two")
    return interval


def _check_schedule(schedule: GuidanceSchedule | None) -> GuidanceSchedule | None:
    levels = [level for level, _ in schedule or ((0.0, 1.0),)]
    if not levels or any(later <= earlier for earlier, later in itertools.pairwise(levels)):
        raise ValueError("give points [log-SNR, guidance] with rising log-SNR")
    return schedule


class GuideSpec(Spec):
    """A network that guides another one: `guide + w (main - guide)` (autoguidance, arXiv 2406.02507)."""

    checkpoint: str
    null_prompt: bool = Field(False, description="the guide gets the empty prompt in place of the image's prompt")


class PointSpec(Spec):
    """A point of the sweep: everything that determines the generated images.

    With a guidance schedule, `guidance` is its largest value.
    """

    checkpoint: str
    solver: SolverSpec
    num_steps: NumSteps
    guidance: Guidance
    num_images: NumSamples
    seed: Seed = 0
    dtype: DTypeName = "fp32"
    compiled: bool = False
    batch_size: SweepBatch = DEFAULT_BATCH_SIZE
    guide: GuideSpec | None = None
    guidance_interval: Annotated[GuidanceInterval | None, AfterValidator(_check_interval)] = None
    guidance_schedule: Annotated[GuidanceSchedule | None, AfterValidator(_check_schedule)] = None
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
    guides: Literal["best", "each"] = Field(
        "best", description="best: guides race against each other, and the best is scored; each: every guide is scored"
    )
    stop_confidence: float | None = Field(
        0.99, gt=0.5, lt=1, description="confidence that a winner is on no frontier, so that it is not scored; null scores all"
    )

    @field_validator("rungs")
    @classmethod
    def _rising(cls, rungs: tuple[int, ...]) -> tuple[int, ...]:
        if any(later <= earlier for earlier, later in itertools.pairwise(rungs)):
            raise ValueError("rungs must rise; sort them and use each number once")
        return rungs


class GuideSelection(Spec):
    """Members of the study, or a published checkpoint, that guide the networks of a sweep.

    A guide is a network of the same size or smaller. Of the same size it is an earlier snapshot.
    """

    size: Literal["smaller", "same", "all"] | Channels | None = Field(
        None, description="guides by size: smaller, same (earlier snapshots), all of these, or a width of the family"
    )
    snapshot: Literal["last", "all"] | ImagesSeen = Field(
        "last", description="guides by training: last, all, or the number of images of a snapshot, as in train.snapshots"
    )
    checkpoint: str | None = Field(None, description="a published checkpoint in place of a size: a folder or OWNER/NAME")
    null_prompt: bool = Field(False, description="the guide gets the empty prompt in place of the image's prompt")

    @model_validator(mode="after")
    def _check_kind(self) -> GuideSelection:
        if (self.size is None) is (self.checkpoint is None):
            raise ValueError("a guide has either size or checkpoint; give one of the two")
        if self.checkpoint is not None and self.snapshot != "last":
            raise ValueError("snapshot belongs to a size of the family; leave it out for a checkpoint")
        return self

    @property
    def title(self) -> str:
        """The selection for messages."""
        return ", ".join(f"{key}: {value}" for key, value in self.canonical().items())


def without_guides(guides: tuple[Any, ...], reason: str) -> tuple[Any, ...]:
    """Return the guides of a sweep that may have none.

    Raises:
        ValueError: there is a guide; the message has the reason.
    """
    if any(isinstance(guide, GuideSelection) for guide in guides):
        raise ValueError(f"this sweep takes no guides, because {reason}; remove them")
    return guides


class SweepSpec(Spec):
    """The grid of points: every size x solver x num_steps x guidance, with each guide and in each guidance interval.

    With `search: race` the values of guidance are a range, and the best value is searched for every size, solver and num_steps,
    together with the best guide and, if requested, the best interval.
    Snapshots are scored at one point: the first solver, `snapshot_num_steps` and `snapshot_guidance`.
    """

    solvers: tuple[SolverSpec, ...] = (SolverSpec(),)
    num_steps: tuple[NumSteps, ...]
    guidance: tuple[Guidance, ...]
    guides: tuple[GuideSelection | Literal["none"] | None, ...] = Field(
        ("none",), description="networks that run the second pass of guidance; none is the network itself with the empty prompt"
    )
    guidance_intervals: tuple[
        Annotated[GuidanceInterval, AfterValidator(_check_interval)] | Literal["all", "search"] | None, ...
    ] = Field(
        ("all",),
        description="noise levels with guidance, [low, high] in log-SNR, or all; elsewhere guidance is 1; with search: race, "
        "search finds the best interval",
    )
    guidance_schedules: tuple[Annotated[GuidanceSchedule, AfterValidator(_check_schedule)], ...] = Field(
        (), description="further ways of guidance: lists of points [log-SNR, guidance]; needs search: grid"
    )
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
        if self.search == "grid" and self.searches_interval:
            raise ValueError("guidance_intervals: only a race searches the interval; use search: race, or give [low, high]")
        if self.searches_interval and None not in self.intervals:
            raise ValueError("guidance_intervals: the search of the interval starts from all noise levels; add all")
        raced = {value for value in self.guidance if value != 1}
        has_options = self.searches_interval or len(self.guide_selections) > 0
        if self.search == "race" and has_options and len(raced) == 1 and 1 not in self.guidance:
            raise ValueError("guidance: a race of guides or intervals needs a range of guidance; give two values or more")
        if self.search == "race" and self.guidance_schedules:
            raise ValueError("guidance_schedules: a race searches one guidance value; use search: grid")
        weights = [*self.guidance, *(weight for schedule in self.guidance_schedules for _, weight in schedule)]
        if self.guide_selections and min(weights) < 1:
            raise ValueError("guidance below 1 with a guide leads to the images of the guide; remove the values below 1")
        return self

    @model_validator(mode="after")
    def _check_timesteps(self) -> SweepSpec:
        for solver in self.solvers:
            if solver.timesteps is not None and len(solver.timesteps) not in self.num_steps:
                raise ValueError(f"solvers: {solver.label} has {len(solver.timesteps)} timesteps; add this number to num_steps")
        return self

    def step_counts(self, solver: SolverSpec) -> tuple[int, ...]:
        """The numbers of steps of a solver, rising: those of `num_steps`, or the number of its own timesteps."""
        return tuple(sorted(set(self.num_steps))) if solver.timesteps is None else (len(solver.timesteps),)

    @property
    def guide_selections(self) -> tuple[GuideSelection, ...]:
        """The guides other than the network itself."""
        return tuple(guide for guide in self.guides if isinstance(guide, GuideSelection))

    @property
    def includes_no_guide(self) -> bool:
        """Whether points without a guide belong to the sweep."""
        return any(not isinstance(guide, GuideSelection) for guide in self.guides)

    @property
    def intervals(self) -> tuple[GuidanceInterval | None, ...]:
        """The given guidance intervals without repetition; None is all noise levels."""
        plain: list[GuidanceInterval | None] = [
            interval if isinstance(interval, tuple) and interval != (None, None) else None
            for interval in self.guidance_intervals
            if interval != "search"
        ]
        return tuple(dict.fromkeys(plain))

    @property
    def searches_interval(self) -> bool:
        """Whether a race searches the guidance interval."""
        return "search" in self.guidance_intervals

    @field_validator("solvers", "num_steps", "guidance", "guides", "guidance_intervals")
    @classmethod
    def _not_empty(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if not values:
            raise ValueError("give at least one value")
        return values
