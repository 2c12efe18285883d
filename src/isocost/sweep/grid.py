"""Sweep points and search cells of a study: their coordinates, digests and costs per image."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from isocost.config.base import digest
from isocost.config.evaluation import ProtocolSpec
from isocost.config.model import ModelSpec
from isocost.config.sampling import SolverSpec
from isocost.config.sweep import GuidanceInterval, GuideSpec, PointSpec, RaceSpec, SweepSpec
from isocost.diffusion.guidance import NO_GUIDANCE, format_interval, guidance_per_evaluation
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.solvers import num_function_evaluations, solver_coefficients
from isocost.evaluation.protocol import Protocol
from isocost.models.checkpoint import CheckpointInfo
from isocost.models.component_costs import ComponentCosts
from isocost.sampling.generate import schedule_of
from isocost.sampling.request import passes_in_total, passes_per_evaluation
from isocost.sweep.guidance_search import grid_value

VERSION = 3
"""Increase when a fix changes the images or the scores of a point."""


@dataclass(frozen=True)
class SweepPoint:
    """A coordinate of the sweep under a protocol. The digest names its artefact and its row in the results database."""

    spec: PointSpec
    digest: str

    def nfe(self, model: ModelSpec, schedule: NoiseSchedule) -> int:
        """Return the network evaluations per image, including those of a guide."""
        return sum(self.passes(model, schedule))

    def passes(self, model: ModelSpec, schedule: NoiseSchedule) -> tuple[int, int]:
        """Return the evaluations per image of the network and of its guide.

        Guidance takes a second pass unless `model` embeds the guidance scale.
        """
        return passes_in_total(self.weights(schedule), model.embeds_guidance, self.spec.guide is not None)

    def weights(self, schedule: NoiseSchedule) -> tuple[float, ...]:
        """Return the guidance w at each evaluation of the solver."""
        spec = self.spec
        if spec.guidance_interval is None and spec.guidance_schedule is None:
            return (spec.guidance,) * self.num_function_evaluations
        solver = solver_coefficients(spec.solver, spec.num_steps, schedule)
        return guidance_per_evaluation(
            solver.alpha, solver.sigma, spec.guidance, spec.guidance_interval, spec.guidance_schedule
        )

    @property
    def num_function_evaluations(self) -> int:
        """Solver evaluations per image, each of one or two network passes: the number of steps, except for Heun's solver."""
        return num_function_evaluations(self.spec.solver, self.spec.num_steps)

    def costs(self, info: CheckpointInfo, guide: CheckpointInfo | None, components: ComponentCosts) -> dict[str, float]:
        """Return all costs of one image that do not need a measurement: those of the results database.

        `normalized_cost` is normalized cost x steps (arXiv 2404.01367, sec. 4.1); Heun's second evaluations count in full. It
        has no pass for guidance, neither of the network itself nor of a guide.

        Args:
            info: the network.
            guide: its guide, if the point has one.
            components: the costs of the text encoder and the autoencoder.
        """
        main_passes, guide_passes = self.passes(info.model, schedule_of(info))
        return {
            "normalized_cost": info.normalized_cost_per_step * self.num_function_evaluations,
            "nfe": float(main_passes + guide_passes),
            "gflop_text": components.gflop_text,
            "gflop_encoder": components.gflop_encoder,
            "gflop_denoiser": info.gflop_per_forward * main_passes + (guide.gflop_per_forward * guide_passes if guide else 0.0),
            "gflop_decoder": components.gflop_decoder,
        }

    def coordinate(self) -> dict[str, Any]:
        """Return the columns of the results database that hold the coordinate."""
        spec = self.spec
        return {
            "point": self.digest,
            "checkpoint": spec.checkpoint,
            "solver": spec.solver.label,
            "num_steps": spec.num_steps,
            "guidance": spec.guidance,
            "num_images": spec.num_images,
            "seed": spec.seed,
            "dtype": spec.dtype,
            "compiled": spec.compiled,
            "batch_size": spec.batch_size,
            "guide_checkpoint": None if spec.guide is None else spec.guide.checkpoint,
            "guide_null_prompt": None if spec.guide is None else spec.guide.null_prompt,
            "guidance_interval": None if spec.guidance_interval is None else json.dumps(spec.guidance_interval),
            "guidance_schedule": None if spec.guidance_schedule is None else json.dumps(spec.guidance_schedule),
        }

    def vae_columns(self) -> dict[str, Any] | None:
        """The columns of `VaeRecord`; None if the autoencoder has its default settings."""
        vae = self.spec.vae
        if vae.is_default:
            return None
        return {"vae_dtype": vae.dtype, "vae_tile_size": vae.tile_size, "vae_slicing": vae.slicing}

    @property
    def title(self) -> str:
        """Short title for a progress bar."""
        spec = self.spec
        guidance = f"guidance {spec.guidance:g}" if spec.guidance_schedule is None else "scheduled guidance"
        guide = f" by {spec.guide.checkpoint}" if spec.guide is not None else ""
        interval = "" if spec.guidance_interval is None else f" in {format_interval(spec.guidance_interval)}"
        return f"{spec.solver.name} {spec.num_steps} steps, {guidance}{guide}{interval}"


def guide_label(guide: CheckpointInfo, main: CheckpointInfo, spec: GuideSpec | None) -> str:
    """Text for tables such as "0.8M@12000/null": size of the guide, its images seen if it is not a last checkpoint of the same
    training length, and whether it has the empty prompt."""
    snapshot = "" if guide.images_seen == main.images_seen else f"@{guide.images_seen}"
    return f"{guide.label}{snapshot}" + ("/null" if spec is not None and spec.null_prompt else "")


def make_point(spec: PointSpec, protocol: Protocol) -> SweepPoint:
    """Compute the digest of a coordinate under a protocol."""
    return SweepPoint(spec, digest({"stage": "point", "version": VERSION, "protocol": protocol.id}, spec))


Guides = tuple[GuideSpec | None, ...]
"""The guides of a checkpoint in a sweep; None is the network itself with the empty prompt."""
NO_GUIDES: Guides = (None,)


def grid_points(
    checkpoint: str, sweep: SweepSpec, protocol_spec: ProtocolSpec, protocol: Protocol, guides: Guides = NO_GUIDES
) -> list[SweepPoint]:
    """Return the points of one checkpoint, in order of increasing cost.

    They are every solver x num_steps x guidance of the sweep. Guidance other than 1 is combined with every guide and interval.
    """
    specs = [
        _point_spec(checkpoint, sweep, protocol_spec, solver=solver, num_steps=num_steps, **guidance)
        for solver in sweep.solvers
        for num_steps in sweep.step_counts(solver)
        for guidance in _ways_of_guidance(sweep, guides)
    ]
    return [make_point(spec, protocol) for spec in specs]


def _ways_of_guidance(sweep: SweepSpec, guides: Guides) -> Iterator[dict[str, Any]]:
    """Every combination of guidance, guide and interval as fields of a point; guidance 1 has neither guide nor interval."""
    combined = list(itertools.product(guides, sweep.intervals))
    for value in sorted(set(sweep.guidance)):
        for guide, interval in combined if value != 1 else [(None, None)]:
            yield {"guidance": value, "guide": guide, "guidance_interval": interval}
    for schedule in sweep.guidance_schedules:
        highest = max(weight for _, weight in schedule)
        for guide, interval in combined:
            yield {"guidance": highest, "guide": guide, "guidance_interval": interval, "guidance_schedule": schedule}


def run_points(
    checkpoints: Sequence[str],
    sweep: SweepSpec,
    protocol_spec: ProtocolSpec,
    protocol: Protocol,
    guides: Guides = NO_GUIDES,
) -> dict[str, tuple[SweepPoint, ...]]:
    """Return the points of one training by checkpoint.

    The last checkpoint has the whole grid. With several checkpoints, each one also has its snapshot point. With
    `search: race` there is no grid; see `search_cells`.
    """
    points: dict[str, tuple[SweepPoint, ...]] = {}
    for name in checkpoints:
        has_grid = name == checkpoints[-1] and sweep.search == "grid"
        grid = grid_points(name, sweep, protocol_spec, protocol, guides) if has_grid else []
        snapshot_points = [snapshot_point(name, sweep, protocol_spec, protocol)] if len(checkpoints) > 1 else []
        points[name] = tuple({point.digest: point for point in [*grid, *snapshot_points]}.values())
    return points


INTERVAL_ENDS = (-4.0, -2.0, 0.0, 2.0, 4.0)
"""Ends of the guidance intervals that a race tries, in log-SNR."""


@dataclass(frozen=True)
class GuidanceOption:
    """A guide and an interval that race against others; see `PointSpec`."""

    guide: GuideSpec | None = None
    interval: GuidanceInterval | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The option as fields of a point."""
        return {"guide": self.guide, "guidance_interval": self.interval}

    def __str__(self) -> str:
        guide = f", guide {self.guide.checkpoint}{'/null' if self.guide.null_prompt else ''}" if self.guide is not None else ""
        interval = "" if self.interval is None else f", interval {format_interval(self.interval)}"
        return guide + interval


@dataclass(frozen=True)
class SearchCell:
    """One checkpoint, solver, number of steps and number of passes; a race searches its best guidance, guide and interval.

    Attributes:
        scored: coordinate of the point to score, at any guidance and option.
        searched: the same with the seed of the race.
        guidance: the sweep's values of guidance that take this number of passes, increasing; a single one needs no race.
        protocol: protocol of the scores.
        metric: metric of the race.
        race: settings of the race.
        is_two_pass: whether a step takes two passes.
        options: guides and intervals that race against each other; at least one.
        base: the cell without an interval whose guide and guidance this one begins with; None searches all options.
    """

    scored: PointSpec
    searched: PointSpec
    guidance: tuple[float, ...]
    protocol: Protocol
    metric: str
    race: RaceSpec
    is_two_pass: bool
    options: tuple[GuidanceOption, ...] = (GuidanceOption(),)
    base: SearchCell | None = None

    @property
    def is_joint(self) -> bool:
        """Whether options race against each other."""
        return len(self.options) > 1 or self.base is not None

    def options_of(self, guide: GuideSpec | None) -> list[int]:
        """Return the indices of the options with this guide."""
        return [index for index, option in enumerate(self.options) if option.guide == guide]

    @property
    def title(self) -> str:
        """Short title such as "ddim 4 steps"."""
        scored = self.scored
        passes = "" if self.is_two_pass or len(self.guidance) > 1 else f", guidance {self.guidance[0]:g}"
        if self.base is not None:
            raced = f", {len(self.options)} intervals" + ("" if self.options[0].guide is None else " of a guide")
        else:
            raced = f", {len(self.options)} guides" if self.is_joint else str(self.options[0])
        return f"{scored.solver.name} {scored.num_steps} steps{passes}{raced}"

    @property
    def digest(self) -> str:
        """Name of the race's result in the results database."""
        settings: dict[str, Any] = {"race": self.race.canonical(), "guidance": list(self.guidance), "metric": self.metric}
        if self.is_joint:
            settings["options"] = [self.scored.model_copy(update=option.fields).canonical() for option in self.options]
            settings["base"] = None if self.base is None else self.base.digest
        stage = {"stage": "cell", "version": VERSION, "protocol": self.protocol.id, "seed": self.scored.seed, **settings}
        return digest(stage, self.searched)

    def trial(self, guidance: float, option: int = 0) -> SweepPoint:
        """Return the point whose first images a race generates; its noise differs from that of the scored point."""
        return self._point(self.searched, guidance, option)

    def point(self, guidance: float, option: int = 0) -> SweepPoint:
        """Return the point that is scored after the race.

        Args:
            guidance: w.
            option: index of the guide and the interval.
        """
        return self._point(self.scored, guidance, option)

    def _point(self, spec: PointSpec, guidance: float, option: int) -> SweepPoint:
        return make_point(spec.model_copy(update={"guidance": guidance, **self.options[option].fields}), self.protocol)


def search_cells(
    checkpoint: str,
    sweep: SweepSpec,
    protocol_spec: ProtocolSpec,
    protocol: Protocol,
    metric: str,
    embeds_guidance: bool,
    schedule: NoiseSchedule,
    guides: Guides = NO_GUIDES,
) -> list[SearchCell]:
    """Return the cells of a checkpoint by solver, number of passes, guide, interval and increasing steps.

    There are none with `search: grid`. Guides other than the network itself race against each other in one cell, unless
    `race.guides` is `each`. Where the sweep searches the interval, each cell without an interval has a further one, which
    begins with its guide and guidance.

    Guidance 1 takes one pass and is a cell of its own. If only one other value is given, its race starts at the first value
    of the search grid above 1.
    """
    if sweep.search != "race":
        return []
    by_passes: dict[int, list[float]] = {}
    for value in sorted(set(sweep.guidance)):
        by_passes.setdefault(passes_per_evaluation(value, embeds_guidance), []).append(value)
    if by_passes.get(1) == [1] and len(by_passes.get(2, ())) == 1:
        by_passes[2].insert(0, grid_value(1))
    cells = []
    for solver in sweep.solvers:
        for passes, values in by_passes.items():
            for options in _raced_options(sweep, guides) if values != [1] else [(GuidanceOption(),)]:
                for num_steps in sweep.step_counts(solver):
                    alone = options[0].fields if len(options) == 1 else {}
                    settings = {"guidance": values[0], **alone, "solver": solver, "num_steps": num_steps}
                    scored = _point_spec(checkpoint, sweep, protocol_spec, **settings)
                    searched = scored.model_copy(update={"seed": sweep.race.seed})
                    cell = SearchCell(scored, searched, tuple(values), protocol, metric, sweep.race, passes > 1, options)
                    cells.append(cell)
                    if values != [1] and sweep.searches_interval and options[0].interval is None:
                        tried = [None, *distinct_intervals(solver, num_steps, schedule)]
                        intervals = tuple(GuidanceOption(option.guide, interval) for option in options for interval in tried)
                        free = {"guide": None, "guidance_interval": None}
                        scored, searched = scored.model_copy(update=free), searched.model_copy(update=free)
                        cells.append(replace(cell, scored=scored, searched=searched, options=intervals, base=cell))
    return cells


def _raced_options(sweep: SweepSpec, guides: Guides) -> list[tuple[GuidanceOption, ...]]:
    """Return the options of each cell: for every given interval, the network itself and the guides."""
    separate = [(guide,) for guide in guides if guide is None or sweep.race.guides == "each"]
    together = [tuple(guide for guide in guides if guide is not None)] if sweep.race.guides == "best" else []
    return [
        tuple(GuidanceOption(guide, interval) for guide in group)
        for group in (*separate, *together)
        for interval in sweep.intervals
        if group
    ]


def distinct_intervals(solver: SolverSpec, num_steps: int, schedule: NoiseSchedule) -> list[GuidanceInterval]:
    """Return the intervals between `INTERVAL_ENDS` and open ends that guide different evaluations of a solver.

    Intervals that guide all evaluations, or none, are left out.
    """
    coefficients = solver_coefficients(solver, num_steps, schedule)
    by_guided: dict[tuple[bool, ...], GuidanceInterval] = {}
    ends = (None, *INTERVAL_ENDS, None)
    for low, high in itertools.combinations(range(len(ends)), 2):
        interval = (ends[low], ends[high])
        weights = guidance_per_evaluation(coefficients.alpha, coefficients.sigma, 2.0, interval)
        guided = tuple(weight != NO_GUIDANCE for weight in weights)
        if any(guided) and not all(guided):
            by_guided.setdefault(guided, interval)
    return list(by_guided.values())


def snapshot_point(checkpoint: str, sweep: SweepSpec, protocol_spec: ProtocolSpec, protocol: Protocol) -> SweepPoint:
    """Return the point at which every snapshot is scored: the same settings at every amount of training compute."""
    settings = {"solver": sweep.solvers[0], "num_steps": sweep.snapshot_num_steps, "guidance": sweep.snapshot_guidance}
    return make_point(_point_spec(checkpoint, sweep, protocol_spec, **settings), protocol)


def _point_spec(checkpoint: str, sweep: SweepSpec, protocol_spec: ProtocolSpec, **settings: Any) -> PointSpec:
    return PointSpec(
        checkpoint=checkpoint,
        num_images=protocol_spec.num_images,
        seed=sweep.seed,
        dtype=sweep.dtype,
        compiled=sweep.compiled,
        batch_size=sweep.batch_size,
        vae=sweep.vae,
        **settings,
    )
