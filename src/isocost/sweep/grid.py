"""The grid of a study as points: coordinate, digest, and what an image costs there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from isocost.config.base import digest
from isocost.config.evaluation import ProtocolSpec
from isocost.config.model import ModelSpec
from isocost.config.sweep import PointSpec, RaceSpec, SweepSpec
from isocost.diffusion.solvers import num_function_evaluations
from isocost.evaluation.protocol import Protocol
from isocost.models.checkpoint import CheckpointInfo
from isocost.sampling.request import num_passes
from isocost.sweep.guidance_search import value_at

VERSION = 3
"""Raised when a fix changes what a point's images or scores are."""


@dataclass(frozen=True)
class SweepPoint:
    """A coordinate under a protocol. The digest names its artefact and its row in the ledger."""

    spec: PointSpec
    digest: str

    def nfe(self, model: ModelSpec) -> int:
        """Network evaluations per image, guidance's second pass counted where the network does not take w itself."""
        return self.num_function_evaluations * num_passes(self.spec.guidance, model.embeds_guidance)

    @property
    def num_function_evaluations(self) -> int:
        """Network evaluations of one pass: the steps, but for Heun's solver."""
        return num_function_evaluations(self.spec.solver, self.spec.num_steps)

    def costs(self, info: CheckpointInfo) -> dict[str, float]:
        """What one image costs, time apart.

        `normalized_cost` is normalized cost x steps (arXiv 2404.01367, sec. 4.1); Heun's second evaluations count in full.
        """
        nfe = self.nfe(info.model)
        return {
            "normalized_cost": info.normalized_cost_per_step * self.num_function_evaluations,
            "nfe": float(nfe),
            "gflop": info.gflop_per_forward * nfe,
        }

    def coordinate(self) -> dict[str, Any]:
        """The columns of the results database that say where the point lies."""
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
        }

    @property
    def title(self) -> str:
        """Short words for a progress bar."""
        return f"{self.spec.solver.name} {self.spec.num_steps} steps, guidance {self.spec.guidance:g}"


def make_point(spec: PointSpec, protocol: Protocol) -> SweepPoint:
    """A point and its digest."""
    return SweepPoint(spec, digest({"stage": "point", "version": VERSION, "protocol": protocol.id}, spec))


def grid_points(checkpoint: str, sweep: SweepSpec, protocol_spec: ProtocolSpec, protocol: Protocol) -> list[SweepPoint]:
    """Every solver x num_steps x guidance of the sweep for one checkpoint, in rising cost."""
    specs = [
        _point_spec(checkpoint, sweep, protocol_spec, solver=solver, num_steps=num_steps, guidance=guidance)
        for solver in sweep.solvers
        for num_steps in sorted(set(sweep.num_steps))
        for guidance in sorted(set(sweep.guidance))
    ]
    return [make_point(spec, protocol) for spec in specs]


def run_points(
    checkpoints: Sequence[str], sweep: SweepSpec, protocol_spec: ProtocolSpec, protocol: Protocol
) -> dict[str, tuple[SweepPoint, ...]]:
    """The points of one run by checkpoint: the grid at the last one, one point at every snapshot where there are several.

    Where guidance is raced there is no grid: see `search_cells`.
    """
    points: dict[str, tuple[SweepPoint, ...]] = {}
    for name in checkpoints:
        has_grid = name == checkpoints[-1] and sweep.search == "grid"
        grid = grid_points(name, sweep, protocol_spec, protocol) if has_grid else []
        snapshot_points = [snapshot_point(name, sweep, protocol_spec, protocol)] if len(checkpoints) > 1 else []
        points[name] = tuple({point.digest: point for point in [*grid, *snapshot_points]}.values())
    return points


@dataclass(frozen=True)
class SearchCell:
    """What shares a solver, a number of steps and a number of passes at one checkpoint; its best guidance is raced for.

    `guidance` are the values of the sweep that are of so many passes, rising; one value leaves nothing to race for.
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
        """Short words: "ddim 4 steps"."""
        passes = "" if self.is_two_pass or len(self.guidance) > 1 else f", guidance {self.guidance[0]:g}"
        return f"{self.scored.solver.name} {self.scored.num_steps} steps{passes}"

    @property
    def digest(self) -> str:
        """Names what its race found."""
        rules = {"race": self.race.canonical(), "guidance": list(self.guidance), "metric": self.metric}
        stage = {"stage": "cell", "version": VERSION, "protocol": self.protocol.id, "seed": self.scored.seed, **rules}
        return digest(stage, self.searched)

    def trial(self, guidance: float) -> SweepPoint:
        """Images of the search: some of a point with noise of its own."""
        return make_point(self.searched.model_copy(update={"guidance": guidance}), self.protocol)

    def point(self, guidance: float) -> SweepPoint:
        """The point that is scored once the guidance is found."""
        return make_point(self.scored.model_copy(update={"guidance": guidance}), self.protocol)


def search_cells(
    checkpoint: str,
    sweep: SweepSpec,
    protocol_spec: ProtocolSpec,
    protocol: Protocol,
    metric: str,
    embeds_guidance: bool,
) -> list[SearchCell]:
    """The cells of a checkpoint where guidance is raced, by solver, passes and rising steps; none where it is a grid.

    A range from 1, one pass, to a value of two passes is searched from the ladder's first value above 1.
    """
    if sweep.search != "race":
        return []
    by_passes: dict[int, list[float]] = {}
    for value in sorted(set(sweep.guidance)):
        by_passes.setdefault(num_passes(value, embeds_guidance), []).append(value)
    if by_passes.get(1) == [1] and len(by_passes.get(2, ())) == 1:
        by_passes[2].insert(0, value_at(1))
    cells = []
    for solver in sweep.solvers:
        for passes, values in by_passes.items():
            for num_steps in sorted(set(sweep.num_steps)):
                at = {"solver": solver, "num_steps": num_steps, "guidance": values[0]}
                scored = _point_spec(checkpoint, sweep, protocol_spec, **at)
                searched = scored.model_copy(update={"seed": sweep.race.seed})
                cells.append(SearchCell(scored, searched, tuple(values), protocol, metric, sweep.race, passes > 1))
    return cells


def snapshot_point(checkpoint: str, sweep: SweepSpec, protocol_spec: ProtocolSpec, protocol: Protocol) -> SweepPoint:
    """The one point at which every snapshot is scored, so that the curve over training compute compares like with like."""
    at = {"solver": sweep.solvers[0], "num_steps": sweep.snapshot_num_steps, "guidance": sweep.snapshot_guidance}
    return make_point(_point_spec(checkpoint, sweep, protocol_spec, **at), protocol)


def _point_spec(checkpoint: str, sweep: SweepSpec, protocol_spec: ProtocolSpec, **at: Any) -> PointSpec:
    return PointSpec(
        checkpoint=checkpoint,
        num_images=protocol_spec.num_images,
        seed=sweep.seed,
        dtype=sweep.dtype,
        compiled=sweep.compiled,
        batch_size=sweep.batch_size,
        **at,
    )
