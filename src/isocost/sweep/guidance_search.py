"""The search for the best guidance of one cell (a checkpoint, a solver and a number of steps) with few images: a *race*.

Guidance values lie on a grid of even ratios. A race is successive halving on that grid. It brackets the best value with few
images per value, fits a parabola over the logarithm of guidance to the values around the incumbent (the best value so far),
and requests more images, rung by rung, of those values that a paired interval does not show to be worse than the incumbent.
It ends when, at the required confidence, the choice is worse than the best value by no more than the tolerance. All values
use the same noise and the same prompts, so differences between them are paired. This module generates no images.

Shapes: R bootstrap resamples, row 0 of [1 + R] is the score itself; V values in the fit.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from isocost.evaluation.confidence_intervals import percentile_interval

Array = NDArray[np.float64]
GRID_PER_OCTAVE = 8
BRACKET_STRIDE = 6
"""Grid steps between the values of the first bracket: a factor of 1.68."""
MIN_SURVIVORS = 3
"""Values that a rung keeps; a parabola needs three."""
MAX_EXTENSION = 8
"""Grid steps by which a race may leave the given range: a factor of 2."""


def grid_value(grid_index: int) -> float:
    """Return the guidance at a grid index: 2 ** (index / 8), rounded to two decimals."""
    return round(2.0 ** (grid_index / GRID_PER_OCTAVE), 2)


def nearest_grid_index(guidance: float) -> int:
    """Return the grid index of the value nearest to a guidance > 0."""
    return round(GRID_PER_OCTAVE * math.log2(guidance))


@dataclass(frozen=True)
class SearchConfig:
    """Settings of one race.

    Attributes:
        rungs: numbers of images per value, increasing.
        low: lowest guidance of the requested range.
        high: highest guidance of the requested range.
        min_index: lower end of the grid; 1 where guidance 1 takes one pass and is therefore a cell of its own.
        max_extension: grid steps by which the race may exceed `high`.
        tolerance: the largest accepted loss against the best value, as a fraction of the score.
        confidence: confidence of the intervals that drop values and end the race.
        higher_is_better: direction of the score.
    """

    rungs: tuple[int, ...]
    low: float
    high: float
    min_index: int = 1
    max_extension: int = MAX_EXTENSION
    tolerance: float = 0.015
    confidence: float = 0.95
    higher_is_better: bool = False

    def initial_indices(self, start: int | None) -> set[int]:
        """Return the first bracket: around `start`, or over the whole range, because a curve may have two minima."""
        if start is not None:
            return {self.clamp(start + offset) for offset in (-BRACKET_STRIDE, 0, BRACKET_STRIDE)}
        low, high = (nearest_grid_index(end) for end in (self.low, self.high))
        number = max(3, round((high - low) / BRACKET_STRIDE) + 1)
        return {self.clamp(round(float(position))) for position in np.linspace(low, high, number)}

    @property
    def max_index(self) -> int:
        """Index of the largest guidance on the grid."""
        highest = math.floor(GRID_PER_OCTAVE * math.log2(self.high) + 1e-9)
        return max(highest + self.max_extension, self.min_index)

    def clamp(self, grid_index: int) -> int:
        return min(max(grid_index, self.min_index), self.max_index)


@dataclass(frozen=True)
class ScoreRequest:
    """A request for the score, in every resample, of the first `num_images` images at a guidance."""

    guidance: float
    num_images: int


@dataclass(frozen=True)
class SearchResult:
    """Result of one race.

    Attributes:
        guidance: the choice.
        low: lower end of the interval of the best guidance.
        high: upper end of that interval.
        num_images: images generated for the race in total.
        images_by_guidance: images generated at each guidance.
        regret: loss against the best value that the race's confidence does not exclude, as a fraction of the score.
        is_decided: whether the regret is within the tolerance.
        is_at_boundary: whether the choice is the upper end of the grid, so that the best value may lie beyond.
        warnings: messages for the user.
    """

    guidance: float
    low: float
    high: float
    num_images: int
    images_by_guidance: Mapping[float, int]
    regret: float
    is_decided: bool
    is_at_boundary: bool
    warnings: tuple[str, ...]


GuidanceSearch = Generator[list[ScoreRequest], Mapping[ScoreRequest, Array], SearchResult]
"""Yields score requests, is sent the scores [1 + R] of every request, and returns the result."""


def search_guidance(config: SearchConfig, start: int | None = None) -> GuidanceSearch:
    """Run one race.

    Args:
        config: settings of the race.
        start: grid index to begin at, such as the result of a neighbouring cell; None brackets the whole range.
    """
    observations, active = _Observations(config), config.initial_indices(start)
    for number in range(1, len(config.rungs) + 1):
        rungs = config.rungs[:number]
        yield from observations.request(active, rungs)
        while (extension := observations.extension(active)) is not None:
            active.add(extension)
            yield from observations.request(active, rungs)
        while (best := observations.fit().best_index) not in active:
            active.add(best)
            yield from observations.request(active, rungs)
        if observations.fit().regret <= config.tolerance:
            break
        active = observations.survivors(active)
    return observations.result()


@dataclass
class _Fit:
    """A parabola around the incumbent.

    Attributes:
        best_index: grid index of its minimum.
        resampled_indices: grid index of the minimum in every resample, [1 + R].
        regret: see `SearchResult`.
    """

    best_index: int
    resampled_indices: Array
    regret: float


@dataclass
class _Observations:
    """Scores by grid index and number of images; lower is better."""

    config: SearchConfig
    losses: dict[int, dict[int, Array]] = field(default_factory=dict)

    def request(
        self, indices: set[int], rungs: Sequence[int]
    ) -> Generator[list[ScoreRequest], Mapping[ScoreRequest, Array], None]:
        """Request the missing scores of these values at each of these rungs, so that any two values have one in common."""
        requests = {
            (index, rung): ScoreRequest(grid_value(index), rung)
            for index in sorted(indices)
            for rung in rungs
            if rung not in self.losses.get(index, {})
        }
        if requests:
            scores = yield list(requests.values())
            sign = -1.0 if self.config.higher_is_better else 1.0
            for (index, rung), request in requests.items():
                self.losses.setdefault(index, {})[rung] = sign * scores[request]

    def num_images(self, index: int) -> int:
        return max(self.losses[index])

    def incumbent(self) -> int:
        """Return the best of the values that have the most images."""
        most = max(map(self.num_images, self.losses))
        return min((index for index in self.losses if self.num_images(index) == most), key=lambda i: self.losses[i][most][0])

    def extension(self, active: set[int]) -> int | None:
        """Return the next index outward if the incumbent is at the boundary of all tried values.

        None if it is not, or if the grid ends there.
        """
        incumbent = self.incumbent()
        tried = sorted(self.losses)
        for at_boundary, step in ((incumbent == tried[0], -BRACKET_STRIDE), (incumbent == tried[-1], BRACKET_STRIDE)):
            index = self.config.clamp(incumbent + step)
            if at_boundary and index not in active and index != incumbent:
                return index
        return None

    def minus_incumbent(self, index: int) -> Array:
        """Return a value's scores minus the incumbent's, on the images that both have."""
        ours, incumbents = self.losses[index], self.losses[self.incumbent()]
        common = max(ours.keys() & incumbents.keys())
        return ours[common] - incumbents[common]

    def fit(self) -> _Fit:
        """Fit the parabola to the values around the incumbent."""
        incumbent = self.incumbent()
        finite = [index for index in self.losses if np.isfinite(self.minus_incumbent(index)).all()]
        near = sorted(index for index in finite if abs(index - incumbent) <= BRACKET_STRIDE)
        if len(near) < 3:
            near = sorted(sorted(finite, key=lambda index: abs(index - incumbent))[:3])
        grid = np.arange(near[0], near[-1] + 1)
        if len(near) < 3:
            curves = np.stack([self.minus_incumbent(index) for index in near])
            grid = np.array(near)
        else:
            weights = np.sqrt([self.num_images(index) for index in near])
            basis = _powers(np.array(near) - incumbent)
            losses = np.stack([self.minus_incumbent(index) for index in near])
            curves = _powers(grid - incumbent) @ (np.linalg.pinv(weights[:, None] * basis) @ (weights[:, None] * losses))
        best = int(curves[:, 0].argmin())
        regret = np.quantile(curves[best, 1:] - curves[:, 1:].min(0), self.config.confidence)
        score = abs(self.losses[incumbent][self.num_images(incumbent)][0])
        return _Fit(int(grid[best]), grid[curves.argmin(0)], float(regret / max(score, 1e-12)))

    def survivors(self, active: set[int]) -> set[int]:
        """Return the better half of the values and the fitted best, without values that a paired interval shows to be worse."""
        differences = {index: self.minus_incumbent(index) for index in active}
        undecided = [index for index in active if percentile_interval(differences[index], self.config.confidence).low <= 0]
        ranked = sorted(undecided, key=lambda index: (differences[index][0], index))
        return {*ranked[: max(MIN_SURVIVORS, math.ceil(len(active) / 2))], self.fit().best_index}

    def result(self) -> SearchResult:
        fit = self.fit()
        tail = (1 - self.config.confidence) / 2
        low, high = (grid_value(round(float(end))) for end in np.quantile(fit.resampled_indices[1:], [tail, 1 - tail]))
        guidance = grid_value(fit.best_index)
        images_by_guidance = {grid_value(index): self.num_images(index) for index in sorted(self.losses)}
        return SearchResult(
            guidance,
            min(low, guidance),
            max(high, guidance),
            sum(images_by_guidance.values()),
            images_by_guidance,
            fit.regret,
            fit.regret <= self.config.tolerance,
            fit.best_index == self.config.max_index,
            self._warnings(fit.best_index, guidance),
        )

    def _warnings(self, index: int, guidance: float) -> tuple[str, ...]:
        config = self.config
        if index == config.max_index:
            return (f"guidance {guidance:g} is the upper end of the grid; widen sweep.guidance to be sure of the optimum",)
        if not config.low <= guidance <= config.high:
            return (f"guidance {guidance:g} lies outside {config.low:g} to {config.high:g}, the range of sweep.guidance",)
        return ()


def _powers(indices: NDArray[np.int_]) -> Array:
    """1, x, x² of indices [V]: [V, 3]."""
    return np.stack([np.ones(len(indices)), indices, indices**2], axis=1)
