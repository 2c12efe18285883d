"""Sweep points and search cells of a study: their coordinates, digests and costs per image."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from isocost.config.base import digest
from isocost.config.evaluation import ProtocolSpec
from isocost.config.model import ModelSpec
from isocost.config.sweep import GuideSpec, PointSpec, RaceSpec, SweepSpec
from isocost.diffusion.guidance import format_interval, guidance_per_evaluation
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.solvers import num_function_evaluations, solver_coefficients
from isocost.evaluation.protocol import Protocol
from isocost.models.checkpoint import CheckpointInfo
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

    def costs(self, info: CheckpointInfo, guide: CheckpointInfo | None) -> dict[str, float]:
        """Return all costs of one image that do not need a measurement.

        `normalized_cost` is normalized cost x steps (arXiv 2404.01367, sec. 4.1); Heun's second evaluations count in full. It
        has no pass for guidance, neither of the network itself nor of a guide.

        Args:
            info: the network.
            guide: its guide, if the point has one.
        """
        main_passes, guide_passes = self.passes(info.model, schedule_of(info))
        return {
            "normalized_cost": info.normalized_cost_per_step * self.num_function_evaluations,
            "nfe": float(main_passes + guide_passes),
            "gflop": info.gflop_per_forward * main_passes + (guide.gflop_per_forward * guide_passes if guide else 0.0),
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
        for num_steps in sorted(set(sweep.num_steps))
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


@dataclass(frozen=True)
class SearchCell:
    """One checkpoint, solver, number of steps, number of passes, guide and interval; a race searches its best guidance.

    Attributes:
        scored: coordinate of the point to score, at any guidance.
        searched: the same with the seed of the race.
        guidance: the sweep's values of guidance that take this number of passes, increasing; a single one needs no race.
        protocol: protocol of the scores.
        metric: metric of the race.
        race: settings of the race.
        is_two_pass: whether a step takes two passes.
    """

    scored: PointSpec
    searched: PointSpec
    guidance: tuple[float, ...]
    protocol: Protocol
    metric: str
    race: RaceSpec
    is_two_pass: bool

    @property
    def title(self) -> str:
        """Short title such as "ddim 4 steps"."""
        scored = self.scored
        passes = "" if self.is_two_pass or len(self.guidance) > 1 else f", guidance {self.guidance[0]:g}"
        guide = f", guide {scored.guide.checkpoint}" if scored.guide is not None else ""
        interval = "" if scored.guidance_interval is None else f", interval {format_interval(scored.guidance_interval)}"
        return f"{scored.solver.name} {scored.num_steps} steps{passes}{guide}{interval}"

    @property
    def digest(self) -> str:
        """Name of the race's result in the results database."""
        settings = {"race": self.race.canonical(), "guidance": list(self.guidance), "metric": self.metric}
        stage = {"stage": "cell", "version": VERSION, "protocol": self.protocol.id, "seed": self.scored.seed, **settings}
        return digest(stage, self.searched)

    def trial(self, guidance: float) -> SweepPoint:
        """Return the point whose first images a race generates; its noise differs from that of the scored point."""
        return make_point(self.searched.model_copy(update={"guidance": guidance}), self.protocol)

    def point(self, guidance: float) -> SweepPoint:
        """Return the point that is scored after the race."""
        return make_point(self.scored.model_copy(update={"guidance": guidance}), self.protocol)


def search_cells(
    checkpoint: str,
    sweep: SweepSpec,
    protocol_spec: ProtocolSpec,
    protocol: Protocol,
    metric: str,
    embeds_guidance: bool,
    guides: Guides = NO_GUIDES,
) -> list[SearchCell]:
    """Return the cells of a checkpoint by solver, number of passes, guide, interval and increasing steps.

    There are none with `search: grid`.

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
            combined = itertools.product(guides, sweep.intervals) if values != [1] else [(None, None)]
            for guide, interval in combined:
                for num_steps in sorted(set(sweep.num_steps)):
                    settings = {"guidance": values[0], "guide": guide, "guidance_interval": interval}
                    scored = _point_spec(checkpoint, sweep, protocol_spec, solver=solver, num_steps=num_steps, **settings)
                    searched = scored.model_copy(update={"seed": sweep.race.seed})
                    cells.append(SearchCell(scored, searched, tuple(values), protocol, metric, sweep.race, passes > 1))
    return cells


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
