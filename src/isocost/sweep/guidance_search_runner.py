"""Races run on a worker: what they wish to know is sampled in shards, so they are shared, resumed and repeated as points are.

A race is a function of shards alone. Whoever works at a checkpoint runs all of its races, and finds what others have made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from isocost.errors import RunError
from isocost.evaluation.bootstrap import resamples
from isocost.evaluation.confidence_intervals import percentiles
from isocost.evaluation.reference_set import ReferenceSet
from isocost.metrics.registry import metric_of
from isocost.models.checkpoint import CheckpointInfo
from isocost.sweep.grid import SearchCell
from isocost.sweep.guidance_search import BEYOND, Array, Found, Race, ScoreRequest, SearchConfig, nearest_grid_index, race
from isocost.sweep.image_shards import MAX_NONFINITE_FRACTION, Shard, read_shards, split_into_shards
from isocost.sweep.worker import Worker
from isocost.utils.artifact_store import Store

FIRST_SHARE, MOST_SHARE = 20, 2
"""A first rung has a twentieth of the protocol's images, the last at most half of them."""
MIN_RUNG = 32
TYPICAL_VALUES = 5


def rungs_for(num_images: int) -> tuple[int, ...]:
    """Images of a value, doubling: 500, 1000, 2000, 4000 of 10,000."""
    first = max(MIN_RUNG, num_images // FIRST_SHARE)
    rungs = [first]
    while rungs[-1] * 2 <= num_images // MOST_SHARE:
        rungs.append(rungs[-1] * 2)
    return tuple(rungs)


def tolerance_for(num_images: int) -> float:
    """1.5 % at 5,000 images, and as the scores' intervals are at others: about half of their half-width; 5 % at most."""
    return min(0.015 * math.sqrt(5000 / num_images), 0.05)


def search_config(cell: SearchCell) -> SearchConfig:
    """How a cell's race is run."""
    rungs = tuple(n for n in cell.race.rungs if n <= cell.scored.num_images) or rungs_for(cell.scored.num_images)
    return SearchConfig(
        rungs,
        cell.guidance[0],
        cell.guidance[-1],
        lowest_place=1 if cell.is_two_pass else 0,
        beyond=BEYOND if cell.is_two_pass else 0,  # a student knows no guidance beyond its range
        tolerance=cell.race.tolerance or tolerance_for(cell.scored.num_images),
        confidence=cell.race.confidence,
        higher_is_better=metric_of(cell.metric).better == "higher",
    )


def typical_images(cell: SearchCell) -> int:
    """Images that a race draws, for a plan: of five values at the first rung, or of one where there is no other."""
    return search_config(cell).rungs[0] * (1 if len(cell.guidance) == 1 else TYPICAL_VALUES)


def single_value_search(cell: SearchCell) -> Race:
    """What stands in for a race where there is one value: its score at the first rung."""
    (guidance,) = cell.guidance
    first = search_config(cell).rungs[0]
    yield [ScoreRequest(guidance, first)]
    return Found(guidance, guidance, guidance, first, {guidance: first}, 0.0, True, False, ())


@dataclass(frozen=True)
class TrialStore:
    """The images of races, as shards of a store."""

    store: Store
    reference: ReferenceSet
    shard_size: int

    def shards(self, cell: SearchCell, guidance: float, num_images: int) -> list[Shard]:
        """The first images of a trial, cut at the rungs as well, so that neither cut decides the other."""
        bounds = [n for n in search_config(cell).rungs if n <= num_images]
        assert bounds, "a wish is for a rung"
        return split_into_shards(cell.trial(guidance), self.shard_size, bounds)

    def score(self, cell: SearchCell, guidance: float, num_images: int) -> Array:
        """The score of a trial's first images for every resample, [1 + R]; the worst where too many are no finite numbers."""
        shards = self.shards(cell, guidance, num_images)
        broken = sum(len(self.store.manifest("shard", shard.digest)["nonfinite"]) for shard in shards)
        if broken > MAX_NONFINITE_FRACTION * num_images:
            worst = -np.inf if metric_of(cell.metric).better == "higher" else np.inf
            return np.full(self.reference.protocol.num_bootstrap + 1, worst)
        measured = read_shards(self.store, self.reference, shards)
        return resamples(measured, num_images, cell.metric, self.reference)


def run_races(worker: Worker, cells: Sequence[SearchCell], done: Callable[[SearchCell], None], deadline: float | None) -> bool:
    """Find the best guidance of every cell that the results database does not know; False where `deadline` came first.

    Cells of one solver and number of passes go by rising steps, each from where the one before it ended; the others beside.
    """
    known = worker.results_db.races()
    queues: dict[tuple[str, bool], list[SearchCell]] = {}
    for cell in cells:
        if cell.digest in known:
            done(cell)
        queues.setdefault((cell.scored.solver.label, cell.is_two_pass), []).append(cell)
    running = [chain for queue in queues.values() if (chain := _WarmStartedSearches(worker, queue, known, done)).begin()]
    while running:
        shards = {shard.digest: shard for chain in running for shard in chain.shards()}
        if not worker.make(list(shards.values()), deadline):
            return False
        running = [chain for chain in running if chain.go_on()]
    return True


class _WarmStartedSearches:
    """Races one after the other, each beginning at the guidance that the one before it found."""

    def __init__(
        self,
        worker: Worker,
        cells: Sequence[SearchCell],
        known: Mapping[str, Mapping[str, float]],
        done: Callable[[SearchCell], None],
    ) -> None:
        self.results_db, self.known, self.done = worker.results_db, known, done
        self.trials = TrialStore(worker.store, worker.reference, worker.shard_size)
        self.cells, self.at = list(cells), -1
        self.start: int | None = None
        self.running: Race
        self.wishes: list[ScoreRequest]
        self.has_begun: bool

    @property
    def cell(self) -> SearchCell:
        """The one that is raced now."""
        return self.cells[self.at]

    def begin(self) -> bool:
        """Begin the next cell that is not known; False where there is none."""
        self.at += 1
        while self.at < len(self.cells) and self.cell.digest in self.known:
            self.start = nearest_grid_index(self.known[self.cell.digest]["guidance"])
            self.at += 1
        if self.at == len(self.cells):
            return False
        self.has_begun = False
        self.running = (
            single_value_search(self.cell) if len(self.cell.guidance) == 1 else race(search_config(self.cell), self.start)
        )
        self.wishes = next(self.running)
        return True

    def shards(self) -> list[Shard]:
        """What must be there for the wishes to be granted."""
        return [shard for wish in self.wishes for shard in self.trials.shards(self.cell, wish.guidance, wish.num_images)]

    def go_on(self) -> bool:
        """Grant the wishes; False where that ended the last race."""
        told = {wish: self.trials.score(self.cell, wish.guidance, wish.num_images) for wish in self.wishes}
        if all(np.isinf(scores[0]) for scores in told.values()) and not self.has_begun:
            raise RunError(f"{self.cell.title}: too few images are finite numbers at any guidance tried; train longer")
        self.has_begun = True
        try:
            self.wishes = self.running.send(told)
            return True
        except StopIteration as ended:
            self._record(ended.value)
            return self.begin()

    def _record(self, found: Found) -> None:
        cell = self.cell
        self.start = nearest_grid_index(found.guidance)
        self.results_db.add_race(
            {
                "cell": cell.digest,
                "point": cell.point(found.guidance).digest,
                "checkpoint": cell.scored.checkpoint,
                "protocol": cell.protocol.id,
                "metric": cell.metric,
                "solver": cell.scored.solver.label,
                "num_steps": cell.scored.num_steps,
                "guidance": found.guidance,
                "guidance_low": found.low,
                "guidance_high": found.high,
                "num_images": found.num_images,
                "images_at": json.dumps(found.images_at),
                "regret": found.regret,
                "is_decided": found.is_decided,
                "is_at_boundary": found.is_at_boundary,
                "warnings": json.dumps(found.warnings),
                "stopped": None,
            }
        )
        self.done(cell)


@dataclass(frozen=True)
class Candidate:
    """A cell with what its race found and its scores: [1 + R] by number of images."""

    cell: SearchCell
    info: CheckpointInfo
    guidance: float
    scores: Callable[[int], Array]
    num_images: int

    @property
    def costs(self) -> tuple[float, ...]:
        """Every cost that is known before anything is timed."""
        return tuple(self.cell.point(self.guidance).costs(self.info).values())

    def __str__(self) -> str:
        return f"{self.info.label}, {self.cell.point(self.guidance).title}"


def make_candidate(cell: SearchCell, info: CheckpointInfo, trials: TrialStore, guidance: float, num_images: int) -> Candidate:
    """A cell whose race is over, with the guidance it found and the images drawn there."""
    return Candidate(cell, info, guidance, cache(partial(trials.score, cell, guidance)), num_images)


def stopped(contenders: Sequence[Candidate], confidence: float) -> dict[str, str]:
    """Cells that cannot be on the frontier of any cost, with the reason: one that costs no more is better.

    A cell is set against the best of those that cost no more in every way, on the images that both have; it is stopped where
    the paired interval of that confidence lies on the worse side.
    """
    reasons = {}
    for one in contenders:
        rivals = [
            other
            for other in contenders
            if other is not one and all(a <= b for a, b in zip(other.costs, one.costs, strict=True))
        ]
        if not rivals:
            continue
        sign = -1.0 if metric_of(one.cell.metric).better == "higher" else 1.0

        def difference_between(other: Candidate, one: Candidate = one, sign: float = sign) -> Array:
            common = min(one.num_images, other.num_images)
            return sign * (one.scores(common) - other.scores(common))

        best = max(rivals, key=lambda other: difference_between(other)[0])
        apart = percentiles(difference_between(best), confidence)
        if apart.low > 0:
            reasons[one.cell.digest] = f"{best} costs no more and is better by {apart.value:.3g} or so"
    return reasons
