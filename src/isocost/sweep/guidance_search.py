"""The best guidance of one cell - a checkpoint, solver and number of steps - with few images. No images are made here.

Guidance values lie on a ladder of even ratios. A race brackets the best of them with few images of each, fits a parabola
over the logarithm of guidance to the values around the leader, and asks for more images, rung by rung, of those values that a
paired interval does not set apart from the leader. It ends when the choice is, at the confidence asked for, no worse than the
best by more than the tolerance. All values see the same images' noise and captions, so what they share cancels.

Shapes: R bootstrap resamples, row 0 of [1 + R] the score itself; V values in the fit.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from isocost.evaluation.confidence_intervals import percentiles

Array = NDArray[np.float64]
GRID_PER_OCTAVE = 8
BRACKET_STRIDE = 6
"""Values of the ladder between those of the first bracket: a factor of 1.68."""
MIN_SURVIVORS = 3
"""Of a rung: what a parabola takes."""
BEYOND = 8
"""Values by which a race may leave the range that was given: a factor of 2."""


def value_at(place: int) -> float:
    """The ladder's guidance: 2 ** (place / 8), rounded as people write it."""
    return round(2.0 ** (place / GRID_PER_OCTAVE), 2)


def nearest_grid_index(guidance: float) -> int:
    """The place on the ladder of the value nearest to a guidance > 0."""
    return round(GRID_PER_OCTAVE * math.log2(guidance))


@dataclass(frozen=True)
class SearchConfig:
    """How a race is run.

    Attributes:
        rungs: images of a value, rising.
        low: lowest guidance asked for.
        high: highest.
        lowest_place: the ladder's lower end: 1 where guidance 1 is another cell, of one pass.
        beyond: values by which the race may leave the range upward.
        tolerance: what the choice may lose, as a share of the score.
        confidence: of the intervals by which values are dropped and the race is ended.
        higher_is_better: direction of the score.
    """

    rungs: tuple[int, ...]
    low: float
    high: float
    lowest_place: int = 1
    beyond: int = BEYOND
    tolerance: float = 0.015
    confidence: float = 0.95
    higher_is_better: bool = False

    def first_places(self, start: int | None) -> set[int]:
        """Where a race begins: around a place, or all over the range, for a curve may have two valleys."""
        if start is not None:
            return {self.within(start + offset) for offset in (-BRACKET_STRIDE, 0, BRACKET_STRIDE)}
        low, high = (nearest_grid_index(end) for end in (self.low, self.high))
        number = max(3, round((high - low) / BRACKET_STRIDE) + 1)
        return {self.within(round(float(place))) for place in np.linspace(low, high, number)}

    @property
    def last_place(self) -> int:
        """The ladder's upper end."""
        highest = math.floor(GRID_PER_OCTAVE * math.log2(self.high) + 1e-9)
        return max(highest + self.beyond, self.lowest_place)

    def within(self, place: int) -> int:
        """The nearest place of the ladder."""
        return min(max(place, self.lowest_place), self.last_place)


@dataclass(frozen=True)
class ScoreRequest:
    """The score of the first `num_images` images at a guidance, for every resample."""

    guidance: float
    num_images: int


@dataclass(frozen=True)
class Found:
    """What a race found.

    Attributes:
        guidance: the choice.
        low: lower end of the interval of the best guidance.
        high: its upper end.
        num_images: images drawn in all.
        images_at: images drawn by guidance.
        regret: what the choice may lose at the confidence asked for, as a share of the score.
        is_decided: whether that is within the tolerance.
        is_at_boundary: whether the choice is the end of the ladder, so that the best may lie beyond.
        warnings: what a reader must know.
    """

    guidance: float
    low: float
    high: float
    num_images: int
    images_at: Mapping[float, int]
    regret: float
    is_decided: bool
    is_at_boundary: bool
    warnings: tuple[str, ...]


Race = Generator[list[ScoreRequest], Mapping[ScoreRequest, Array], Found]
"""Yields what it wants to know, is sent the scores [1 + R] of every wish, and returns what it found."""


def race(rules: SearchConfig, start: int | None = None) -> Race:
    """Run one race.

    Args:
        rules: see there.
        start: the ladder's place to begin at, such as a neighbour's best; all over the range where None.
    """
    known, at_work = _Observations(rules), rules.first_places(start)
    for number in range(1, len(rules.rungs) + 1):
        rungs = rules.rungs[:number]
        yield from known.ask(at_work, rungs)
        while (further := known.beyond_the_leader(at_work)) is not None:
            at_work.add(further)
            yield from known.ask(at_work, rungs)
        while (best := known.fitted().place) not in at_work:
            at_work.add(best)
            yield from known.ask(at_work, rungs)
        if known.fitted().regret <= rules.tolerance:
            break
        at_work = known.survivors(at_work)
    return known.found()


@dataclass
class _Fit:
    """A parabola around the leader: its best place, those of all resamples [1 + R], and what the best place may lose."""

    place: int
    places: Array
    regret: float


@dataclass
class _Observations:
    """Scores by place and number of images, lower better."""

    rules: SearchConfig
    losses: dict[int, dict[int, Array]] = field(default_factory=dict)

    def ask(self, places: set[int], rungs: Sequence[int]) -> Generator[list[ScoreRequest], Mapping[ScoreRequest, Array], None]:
        """Get what is not known of places at each of these rungs, so that any two of them have one in common."""
        wishes = {
            (place, rung): ScoreRequest(value_at(place), rung)
            for place in sorted(places)
            for rung in rungs
            if rung not in self.losses.get(place, {})
        }
        if wishes:
            told = yield list(wishes.values())
            sign = -1.0 if self.rules.higher_is_better else 1.0
            for (place, rung), wish in wishes.items():
                self.losses.setdefault(place, {})[rung] = sign * told[wish]

    def most(self, place: int) -> int:
        """Images of a place."""
        return max(self.losses[place])

    def leader(self) -> int:
        """The best of the places with the most images."""
        most = max(map(self.most, self.losses))
        return min((place for place in self.losses if self.most(place) == most), key=lambda p: self.losses[p][most][0])

    def beyond_the_leader(self, at_work: set[int]) -> int | None:
        """The next place outward where the leader is the outermost of all tried; None where it is not, or the ladder ends."""
        leader = self.leader()
        tried = sorted(self.losses)
        for is_outermost, step in ((leader == tried[0], -BRACKET_STRIDE), (leader == tried[-1], BRACKET_STRIDE)):
            place = self.rules.within(leader + step)
            if is_outermost and place not in at_work and place != leader:
                return place
        return None

    def less_leader(self, place: int) -> Array:
        """A place's scores less the leader's, of the images that both have."""
        ours, leaders = self.losses[place], self.losses[self.leader()]
        most = max(ours.keys() & leaders.keys())
        return ours[most] - leaders[most]

    def fitted(self) -> _Fit:
        """The parabola through the places around the leader."""
        leader = self.leader()
        sound = [place for place in self.losses if np.isfinite(self.less_leader(place)).all()]
        around = sorted(place for place in sound if abs(place - leader) <= BRACKET_STRIDE)
        if len(around) < 3:
            around = sorted(sorted(sound, key=lambda place: abs(place - leader))[:3])
        ladder = np.arange(around[0], around[-1] + 1)
        if len(around) < 3:
            curves = np.stack([self.less_leader(place) for place in around])
            ladder = np.array(around)
        else:
            weights = np.sqrt([self.most(place) for place in around])
            basis = _powers(np.array(around) - leader)
            losses = np.stack([self.less_leader(place) for place in around])
            curves = _powers(ladder - leader) @ (np.linalg.pinv(weights[:, None] * basis) @ (weights[:, None] * losses))
        best = int(curves[:, 0].argmin())
        lost = np.quantile(curves[best, 1:] - curves[:, 1:].min(0), self.rules.confidence)
        score = abs(self.losses[leader][self.most(leader)][0])
        return _Fit(int(ladder[best]), ladder[curves.argmin(0)], float(lost / max(score, 1e-12)))

    def survivors(self, at_work: set[int]) -> set[int]:
        """The better half of the places, those apart that a paired interval sets apart from the leader; and the fitted best."""
        apart = {place: self.less_leader(place) for place in at_work}
        kept = [place for place in at_work if percentiles(apart[place], self.rules.confidence).low <= 0]
        better = sorted(kept, key=lambda place: (apart[place][0], place))
        return {*better[: max(MIN_SURVIVORS, math.ceil(len(at_work) / 2))], self.fitted().place}

    def found(self) -> Found:
        """The choice and what it rests on."""
        fit = self.fitted()
        tail = (1 - self.rules.confidence) / 2
        low, high = (value_at(round(float(place))) for place in np.quantile(fit.places[1:], [tail, 1 - tail]))
        guidance = value_at(fit.place)
        images_at = {value_at(place): self.most(place) for place in sorted(self.losses)}
        return Found(
            guidance,
            min(low, guidance),
            max(high, guidance),
            sum(images_at.values()),
            images_at,
            fit.regret,
            fit.regret <= self.rules.tolerance,
            fit.place == self.rules.last_place,
            self._warnings(fit.place, guidance),
        )

    def _warnings(self, place: int, guidance: float) -> tuple[str, ...]:
        rules = self.rules
        if place == rules.last_place:
            return (f"guidance {guidance:g} is the end of the ladder; widen sweep.guidance to be sure of the optimum",)
        if not rules.low <= guidance <= rules.high:
            return (f"guidance {guidance:g} lies outside {rules.low:g} to {rules.high:g}, the values of sweep.guidance",)
        return ()


def _powers(places: NDArray[np.int_]) -> Array:
    """1, x, x² of places [V]: [V, 3]."""
    return np.stack([np.ones(len(places)), places, places**2], axis=1)
