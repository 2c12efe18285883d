"""Run guidance searches (races) on a worker.

A race's images are generated in shards, as the images of points are. A race is a function of its shards only: it resumes
after a crash, several workers can share its images, and every worker gets the same result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np

from isocost.config.sweep import PointSpec
from isocost.errors import RunError
from isocost.evaluation.bootstrap import extractors_of, resamples
from isocost.evaluation.confidence_intervals import percentile_interval
from isocost.evaluation.metric_registry import metric_of
from isocost.evaluation.reference_set import ReferenceSet
from isocost.models.checkpoint import CheckpointInfo
from isocost.models.component_costs import ComponentCosts
from isocost.sweep.grid import SearchCell, SweepPoint
from isocost.sweep.guidance_search import (
    MAX_EXTENSION,
    Array,
    GuidanceSearch,
    ScoreRequest,
    SearchConfig,
    SearchResult,
    nearest_grid_index,
    search_guidance,
    search_options,
)
from isocost.sweep.image_shards import MAX_NONFINITE_FRACTION, Shard, read_shards, split_into_shards
from isocost.sweep.schema import GFLOP_PARTS
from isocost.sweep.worker import Worker
from isocost.utils.artifact_store import Store

FIRST_RUNG_DIVISOR, LAST_RUNG_DIVISOR = 20, 2
"""The first rung has a twentieth of the protocol's images, the last rung at most half of them."""
MIN_RUNG = 32
EXPECTED_VALUES = 5
INTERVAL_BRACKET = (0, 4)
"""Grid steps from the best guidance without an interval to the first values of every interval: 1 and 1.41 times that value."""


def rungs_for(num_images: int) -> tuple[int, ...]:
    """Return the default rungs, images per value: 500, 1000, 2000, 4000 for 10,000 scored images."""
    first = max(MIN_RUNG, num_images // FIRST_RUNG_DIVISOR)
    rungs = [first]
    while rungs[-1] * 2 <= num_images // LAST_RUNG_DIVISOR:
        rungs.append(rungs[-1] * 2)
    return tuple(rungs)


def tolerance_for(num_images: int) -> float:
    """Return the default tolerance: 1.5 % at 5,000 scored images, scaled with 1 / sqrt(images), not above 5 %.

    This is about half of the half-width of the score's own interval.
    """
    return min(0.015 * math.sqrt(5000 / num_images), 0.05)


def search_config(cell: SearchCell) -> SearchConfig:
    """Return the settings of a cell's race."""
    rungs = tuple(n for n in cell.race.rungs if n <= cell.scored.num_images) or rungs_for(cell.scored.num_images)
    return SearchConfig(
        rungs,
        cell.guidance[0],
        cell.guidance[-1],
        min_index=1 if cell.is_two_pass else 0,
        max_extension=MAX_EXTENSION if cell.is_two_pass else 0,  # a student is not trained on guidance beyond its range
        tolerance=cell.race.tolerance or tolerance_for(cell.scored.num_images),
        confidence=cell.race.confidence,
        higher_is_better=metric_of(cell.metric).better == "higher",
    )


def expected_race_images(cell: SearchCell) -> int:
    """Return an estimate of a race's images, for a plan: the first rung for five values, or for the cell's only value."""
    first = search_config(cell).rungs[0]
    if cell.base is not None:
        guides = len({option.guide for option in cell.options})
        return first * (len(INTERVAL_BRACKET) * len(cell.options) // guides + EXPECTED_VALUES)
    return first * (1 if len(cell.guidance) == 1 else EXPECTED_VALUES) * len(cell.options)


def single_value_search(cell: SearchCell) -> GuidanceSearch:
    """Run the trivial race of a cell with one guidance value: score it at the first rung."""
    (guidance,) = cell.guidance
    first = search_config(cell).rungs[0]
    yield [ScoreRequest(guidance, first)]
    return SearchResult(guidance, guidance, guidance, first, {guidance: first}, 0.0, True, False, ())


@dataclass(frozen=True)
class TrialStore:
    """The generated images of races, as shards in a store."""

    store: Store
    reference: ReferenceSet
    shard_size: int

    def shards(self, cell: SearchCell, guidance: float, num_images: int, option: int = 0) -> list[Shard]:
        """Return the shards of a trial's first images. They are also cut at the rungs, so shards do not depend on the rung."""
        bounds = [n for n in search_config(cell).rungs if n <= num_images]
        assert bounds, "a request is for a rung"
        return split_into_shards(cell.trial(guidance, option), self.shard_size, bounds, self.extractors(cell))

    def extractors(self, cell: SearchCell) -> tuple[str, ...] | None:
        """Return the only feature extractors that the race of a cell needs; None if these are all of the protocol.

        Raises:
            ConfigError: the race cannot use its metric, or the protocol does not measure it.
        """
        needed = extractors_of(cell.metric, self.reference)
        return None if needed == tuple(self.reference.extractors) else needed

    def score(self, cell: SearchCell, guidance: float, num_images: int, option: int = 0) -> Array:
        """Return the score of a trial's first images in every resample, [1 + R]; ±inf if too many images are non-finite."""
        shards = self.shards(cell, guidance, num_images, option)
        num_nonfinite = sum(len(self.store.manifest("shard", shard.digest)["nonfinite"]) for shard in shards)
        if num_nonfinite > MAX_NONFINITE_FRACTION * num_images:
            worst = -np.inf if metric_of(cell.metric).better == "higher" else np.inf
            return np.full(self.reference.protocol.num_bootstrap + 1, worst)
        features = read_shards(self.store, extractors_of(cell.metric, self.reference), shards)
        return resamples(features, num_images, cell.metric, self.reference)


def run_races(worker: Worker, cells: Sequence[SearchCell], done: Callable[[SearchCell], None], deadline: float | None) -> bool:
    """Find the best guidance of every cell that has no race in the results database.

    Cells of one solver, number of passes, guides and interval run in the order of increasing steps, each from the result of the
    previous one. The others run at the same time. Races of intervals follow, each from the result of its base.

    Args:
        worker: generates the images.
        cells: cells of one checkpoint.
        done: called with every cell whose race is over.
        deadline: `time.monotonic()` after which the races stop; None never stops.

    Returns:
        False if the deadline came first.
    """
    return all(
        _run_races(worker, [cell for cell in cells if (cell.base is None) is is_base], done, deadline)
        for is_base in (True, False)
    )


def _run_races(worker: Worker, cells: Sequence[SearchCell], done: Callable[[SearchCell], None], deadline: float | None) -> bool:
    """Run races whose bases are recorded; see `run_races`."""
    recorded = worker.results_db.races()
    queues: dict[tuple[Any, ...], list[SearchCell]] = {}
    for cell in cells:
        if cell.digest in recorded:
            done(cell)
        key = (cell.scored.solver.label, cell.is_two_pass, cell.options) if cell.base is None else (cell.digest,)
        queues.setdefault(key, []).append(cell)
    chains = [_WarmStartedSearches(worker, queue, recorded, done) for queue in queues.values()]
    running = [chain for chain in chains if chain.start_next()]
    while running:
        by_extractors: dict[tuple[str, ...] | None, dict[str, Shard]] = {}
        for chain in running:
            shards = by_extractors.setdefault(chain.trials.extractors(chain.cell), {})
            shards.update({shard.digest: shard for shard in chain.shards()})
        for extractors, shards in by_extractors.items():
            if not worker.generate_shards(list(shards.values()), extractors, deadline):
                return False
        running = [chain for chain in running if chain.advance()]
    return True


class _WarmStartedSearches:
    """Races that run one after the other; each starts at the guidance that the previous one found."""

    def __init__(
        self,
        worker: Worker,
        cells: Sequence[SearchCell],
        recorded: Mapping[str, Mapping[str, float]],
        done: Callable[[SearchCell], None],
    ) -> None:
        self.results_db, self.recorded, self.done = worker.results_db, recorded, done
        self.trials = TrialStore(worker.store, worker.reference, worker.shard_size)
        self.cells, self.cell_index = list(cells), -1
        self.start: int | None = None
        self.search: GuidanceSearch
        self.requests: list[ScoreRequest]
        self.has_scores: bool

    @property
    def cell(self) -> SearchCell:
        return self.cells[self.cell_index]

    def start_next(self) -> bool:
        """Start the next cell that has no recorded race; False if there is none."""
        self.cell_index += 1
        while self.cell_index < len(self.cells) and self.cell.digest in self.recorded:
            self.start = nearest_grid_index(self.recorded[self.cell.digest]["guidance"])
            self.cell_index += 1
        if self.cell_index == len(self.cells):
            return False
        self.has_scores = False
        self.search = make_search(self.cell, self.start, self.recorded)
        self.requests = next(self.search)
        return True

    def shards(self) -> list[Shard]:
        """Return the shards that the open score requests need."""
        return [
            shard
            for request in self.requests
            for shard in self.trials.shards(self.cell, request.guidance, request.num_images, request.option)
        ]

    def advance(self) -> bool:
        """Answer the score requests; False if that ended the last race.

        Raises:
            RunError: nearly all images are non-finite at every guidance that was tried first.
        """
        scores = {
            request: self.trials.score(self.cell, request.guidance, request.num_images, request.option)
            for request in self.requests
        }
        if all(np.isinf(values[0]) for values in scores.values()) and not self.has_scores:
            raise RunError(f"{self.cell.title}: too few finite images at every guidance that was tried; train longer")
        self.has_scores = True
        try:
            self.requests = self.search.send(scores)
            return True
        except StopIteration as ended:
            self._record(ended.value)
            return self.start_next()

    def _record(self, result: SearchResult) -> None:
        cell = self.cell
        self.start = nearest_grid_index(result.guidance)
        self.results_db.add_race(
            {
                "cell": cell.digest,
                "point": cell.point(result.guidance, result.option).digest,
                "checkpoint": cell.scored.checkpoint,
                "protocol": cell.protocol.id,
                "metric": cell.metric,
                "solver": cell.scored.solver.label,
                "num_steps": cell.scored.num_steps,
                "guidance": result.guidance,
                "guidance_low": result.low,
                "guidance_high": result.high,
                "num_images": result.num_images,
                "images_by_guidance": json.dumps(result.images_by_guidance),
                "regret": result.regret,
                "is_decided": result.is_decided,
                "is_at_boundary": result.is_at_boundary,
                "warnings": json.dumps(result.warnings),
                "dominated_by": None,
                "option_index": result.option if cell.is_joint else None,
                "options": json.dumps(_tried_options(cell, result)) if cell.is_joint else None,
            }
        )
        self.done(cell)


def make_search(cell: SearchCell, start: int | None, recorded: Mapping[str, Mapping[str, Any]]) -> GuidanceSearch:
    """Return the search of a cell.

    Args:
        cell: the cell.
        start: grid index of the result of the previous cell, or None.
        recorded: the finished races by the digest of their cell; the base of the cell is one of them.
    """
    config = search_config(cell)
    if cell.base is not None:
        found = recorded[cell.base.digest]
        options = cell.options_of(cell.base.options[option_of(found)].guide)
        best = nearest_grid_index(found["guidance"])
        search = search_options(config, [[best + step for step in INTERVAL_BRACKET] for _ in options])
        return _renumbered(search, options)
    if cell.is_joint:
        return search_options(config, [config.initial_indices(start) for _ in cell.options])
    return single_value_search(cell) if len(cell.guidance) == 1 else search_guidance(config, start)


def _renumbered(search: GuidanceSearch, indices: Sequence[int]) -> GuidanceSearch:
    """Run a search over some options of a cell, whose indices in the cell are given."""
    requests = next(search)
    while True:
        of_cell = [replace(request, option=indices[request.option]) for request in requests]
        scores = yield of_cell
        try:
            requests = search.send({request: scores[named] for request, named in zip(requests, of_cell, strict=True)})
        except StopIteration as ended:
            tried = {indices[option]: images for option, images in ended.value.tried.items()}
            return replace(ended.value, option=indices[ended.value.option], tried=tried)


def option_of(race: Mapping[str, Any]) -> int:
    """Return the index of the option that a recorded race found."""
    return int(race["option_index"] or 0)


def _tried_options(cell: SearchCell, result: SearchResult) -> list[dict[str, Any]]:
    """Return what was sampled of each option, as plain data."""
    tried = []
    for index, images_by_guidance in result.tried.items():
        fields = {key: value for key, value in cell.trial(1.0, index).coordinate().items() if key.startswith("guid")}
        del fields["guidance"]
        tried.append({"option": index, **fields, "images_by_guidance": images_by_guidance})
    return tried


@dataclass(frozen=True)
class Candidate:
    """A cell with the result of its race.

    Attributes:
        cell: the cell.
        info: its checkpoint.
        guide: checkpoint of its guide, if it has one.
        guidance: the guidance that the race found.
        scores: returns the score [1 + R] of the first so many images at that guidance.
        num_images: images generated at that guidance.
        components: costs of the text encoder and the autoencoder.
        option: the guide and the interval that the race found, as an index into the cell's options.
    """

    cell: SearchCell
    info: CheckpointInfo
    guide: CheckpointInfo | None
    guidance: float
    scores: Callable[[int], Array]
    num_images: int
    components: ComponentCosts
    option: int = 0

    @property
    def point(self) -> SweepPoint:
        """The point that would be scored."""
        return self.cell.point(self.guidance, self.option)

    @property
    def costs(self) -> tuple[float, ...]:
        """All costs that do not need a measurement."""
        costs = self.point.costs(self.info, self.guide, self.components)
        return (costs["normalized_cost"], costs["nfe"], costs["gflop_denoiser"], sum(costs[part] for part in GFLOP_PARTS))

    def __str__(self) -> str:
        return f"{self.info.label}, {self.point.title}"


def make_candidate(
    cell: SearchCell,
    info: CheckpointInfo,
    guide: CheckpointInfo | None,
    trials: TrialStore,
    guidance: float,
    num_images: int,
    components: Callable[[PointSpec], ComponentCosts],
    option: int = 0,
) -> Candidate:
    """Return the candidate of a cell whose race is over; see `Candidate`. `components` returns the costs of a point's."""
    scores = cache(partial(trials.score, cell, guidance, option=option))
    parts = components(cell.point(guidance, option).spec)
    return Candidate(cell, info, guide, guidance, scores, num_images, parts, option)


def dominated(candidates: Sequence[Candidate], confidence: float) -> dict[str, str]:
    """Return the cells that cannot be on the frontier of any cost, with the reason by the cell's digest.

    A cell is compared with the best of the cells whose every cost is not higher, on the images that both have. It is
    dominated if the paired interval of that confidence lies on the worse side.
    """
    reasons = {}
    for candidate in candidates:
        rivals = [
            rival
            for rival in candidates
            if rival is not candidate and all(a <= b for a, b in zip(rival.costs, candidate.costs, strict=True))
        ]
        if not rivals:
            continue
        sign = -1.0 if metric_of(candidate.cell.metric).better == "higher" else 1.0

        def loss_against(rival: Candidate, candidate: Candidate = candidate, sign: float = sign) -> Array:
            common = min(candidate.num_images, rival.num_images)
            return sign * (candidate.scores(common) - rival.scores(common))

        best = max(rivals, key=lambda rival: loss_against(rival)[0])
        loss = percentile_interval(loss_against(best), confidence)
        if loss.low > 0:
            reasons[candidate.cell.digest] = f"{best} costs no more and scores better by about {loss.value:.3g}"
    return reasons
