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

from isocost.errors import WorkError
from isocost.evaluation.bootstrap import resamples
from isocost.evaluation.confidence_intervals import percentiles
from isocost.evaluation.reference_set import Reference
from isocost.metrics.registry import metric_of
from isocost.models.checkpoint import CheckpointInfo
from isocost.sweep.grid import Cell
from isocost.sweep.guidance_search import BEYOND, Array, Found, Race, Rules, Wish, nearest_place, race
from isocost.sweep.image_shards import MAX_NOT_FINITE_SHARE, Shard, read_shards, shards_of
from isocost.sweep.worker import Worker
from isocost.utils.artifact_store import Store

FIRST_SHARE, MOST_SHARE = 20, 2
"""A first rung has a twentieth of the protocol's pictures, the last at most half of them."""
LEAST_RUNG = 32
TYPICAL_VALUES = 5


def rungs_for(num_pictures: int) -> tuple[int, ...]:
    """Pictures of a value, doubling: 500, 1000, 2000, 4000 of 10,000."""
    first = max(LEAST_RUNG, num_pictures // FIRST_SHARE)
    rungs = [first]
    while rungs[-1] * 2 <= num_pictures // MOST_SHARE:
        rungs.append(rungs[-1] * 2)
    return tuple(rungs)


def tolerance_for(num_pictures: int) -> float:
    """1.5 % at 5,000 pictures, and as the scores' intervals are at others: about half of their half-width; 5 % at most."""
    return min(0.015 * math.sqrt(5000 / num_pictures), 0.05)


def rules_of(cell: Cell) -> Rules:
    """How a cell's race is run."""
    rungs = tuple(n for n in cell.race.rungs if n <= cell.scored.num_pictures) or rungs_for(cell.scored.num_pictures)
    return Rules(
        rungs,
        cell.guidance[0],
        cell.guidance[-1],
        lowest_place=1 if cell.is_two_pass else 0,
        beyond=BEYOND if cell.is_two_pass else 0,  # a student knows no guidance beyond its range
        tolerance=cell.race.tolerance or tolerance_for(cell.scored.num_pictures),
        confidence=cell.race.confidence,
        higher_is_better=metric_of(cell.metric).better == "higher",
    )


def typical_pictures(cell: Cell) -> int:
    """Pictures that a race draws, for a plan: of five values at the first rung, or of one where there is no other."""
    return rules_of(cell).rungs[0] * (1 if len(cell.guidance) == 1 else TYPICAL_VALUES)


def without_race(cell: Cell) -> Race:
    """What stands in for a race where there is one value: its score at the first rung."""
    (guidance,) = cell.guidance
    first = rules_of(cell).rungs[0]
    yield [Wish(guidance, first)]
    return Found(guidance, guidance, guidance, first, {guidance: first}, 0.0, True, False, ())


@dataclass(frozen=True)
class Trials:
    """The pictures of races, as shards of a store."""

    store: Store
    reference: Reference
    shard_size: int

    def shards(self, cell: Cell, guidance: float, num_pictures: int) -> list[Shard]:
        """The first pictures of a trial, cut at the rungs as well, so that neither cut decides the other."""
        bounds = [n for n in rules_of(cell).rungs if n <= num_pictures]
        assert bounds, "a wish is for a rung"
        return shards_of(cell.trial(guidance), self.shard_size, bounds)

    def score(self, cell: Cell, guidance: float, num_pictures: int) -> Array:
        """The score of a trial's first pictures for every resample, [1 + R]; the worst where too many are no finite numbers."""
        shards = self.shards(cell, guidance, num_pictures)
        broken = sum(len(self.store.manifest("shard", shard.digest)["not_finite"]) for shard in shards)
        if broken > MAX_NOT_FINITE_SHARE * num_pictures:
            worst = -np.inf if metric_of(cell.metric).better == "higher" else np.inf
            return np.full(self.reference.protocol.num_bootstrap + 1, worst)
        measured = read_shards(self.store, self.reference, shards)
        return resamples(measured, num_pictures, cell.metric, self.reference)


def run_races(worker: Worker, cells: Sequence[Cell], done: Callable[[Cell], None], deadline: float | None) -> bool:
    """Find the best guidance of every cell that the ledger does not know; False where `deadline` came first.

    Cells of one sampler and number of passes go by rising steps, each from where the one before it ended; the others beside.
    """
    known = worker.ledger.races()
    queues: dict[tuple[str, bool], list[Cell]] = {}
    for cell in cells:
        if cell.digest in known:
            done(cell)
        queues.setdefault((cell.scored.sampler.label, cell.is_two_pass), []).append(cell)
    running = [chain for queue in queues.values() if (chain := _Chain(worker, queue, known, done)).begin()]
    while running:
        shards = {shard.digest: shard for chain in running for shard in chain.shards()}
        if not worker.make(list(shards.values()), deadline):
            return False
        running = [chain for chain in running if chain.go_on()]
    return True


class _Chain:
    """Races one after the other, each beginning at the guidance that the one before it found."""

    def __init__(
        self, worker: Worker, cells: Sequence[Cell], known: Mapping[str, Mapping[str, float]], done: Callable[[Cell], None]
    ) -> None:
        self.ledger, self.known, self.done = worker.ledger, known, done
        self.trials = Trials(worker.store, worker.reference, worker.shard_size)
        self.cells, self.at = list(cells), -1
        self.start: int | None = None
        self.running: Race
        self.wishes: list[Wish]
        self.has_begun: bool

    @property
    def cell(self) -> Cell:
        """The one that is raced now."""
        return self.cells[self.at]

    def begin(self) -> bool:
        """Begin the next cell that is not known; False where there is none."""
        self.at += 1
        while self.at < len(self.cells) and self.cell.digest in self.known:
            self.start = nearest_place(self.known[self.cell.digest]["guidance"])
            self.at += 1
        if self.at == len(self.cells):
            return False
        self.has_begun = False
        self.running = without_race(self.cell) if len(self.cell.guidance) == 1 else race(rules_of(self.cell), self.start)
        self.wishes = next(self.running)
        return True

    def shards(self) -> list[Shard]:
        """What must be there for the wishes to be granted."""
        return [shard for wish in self.wishes for shard in self.trials.shards(self.cell, wish.guidance, wish.num_pictures)]

    def go_on(self) -> bool:
        """Grant the wishes; False where that ended the last race."""
        told = {wish: self.trials.score(self.cell, wish.guidance, wish.num_pictures) for wish in self.wishes}
        if all(np.isinf(scores[0]) for scores in told.values()) and not self.has_begun:
            raise WorkError(f"{self.cell.title}: too few pictures are finite numbers at any guidance tried; train longer")
        self.has_begun = True
        try:
            self.wishes = self.running.send(told)
            return True
        except StopIteration as ended:
            self._record(ended.value)
            return self.begin()

    def _record(self, found: Found) -> None:
        cell = self.cell
        self.start = nearest_place(found.guidance)
        self.ledger.add_race(
            {
                "cell": cell.digest,
                "point": cell.point(found.guidance).digest,
                "checkpoint": cell.scored.checkpoint,
                "protocol": cell.protocol.id,
                "metric": cell.metric,
                "sampler": cell.scored.sampler.label,
                "num_steps": cell.scored.num_steps,
                "guidance": found.guidance,
                "guidance_low": found.low,
                "guidance_high": found.high,
                "num_pictures": found.num_pictures,
                "pictures_at": json.dumps(found.pictures_at),
                "regret": found.regret,
                "is_decided": found.is_decided,
                "is_at_edge": found.is_at_edge,
                "warnings": json.dumps(found.warnings),
                "stopped": None,
            }
        )
        self.done(cell)


@dataclass(frozen=True)
class Contender:
    """A cell with what its race found and its scores: [1 + R] by number of pictures."""

    cell: Cell
    info: CheckpointInfo
    guidance: float
    scores: Callable[[int], Array]
    num_pictures: int

    @property
    def costs(self) -> tuple[float, ...]:
        """Every cost that is known before anything is timed."""
        return tuple(self.cell.point(self.guidance).costs(self.info).values())

    def __str__(self) -> str:
        return f"{self.info.label}, {self.cell.point(self.guidance).title}"


def contender_of(cell: Cell, info: CheckpointInfo, trials: Trials, guidance: float, num_pictures: int) -> Contender:
    """A cell whose race is over, with the guidance it found and the pictures drawn there."""
    return Contender(cell, info, guidance, cache(partial(trials.score, cell, guidance)), num_pictures)


def stopped(contenders: Sequence[Contender], confidence: float) -> dict[str, str]:
    """Cells that cannot be on the frontier of any cost, with the reason: one that costs no more is better.

    A cell is set against the best of those that cost no more in every way, on the pictures that both have; it is stopped where
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

        def less(other: Contender, one: Contender = one, sign: float = sign) -> Array:
            common = min(one.num_pictures, other.num_pictures)
            return sign * (one.scores(common) - other.scores(common))

        best = max(rivals, key=lambda other: less(other)[0])
        apart = percentiles(less(best), confidence)
        if apart.low > 0:
            reasons[one.cell.digest] = f"{best} costs no more and is better by {apart.value:.3g} or so"
    return reasons
