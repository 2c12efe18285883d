"""The search for the best guidance of one cell (a checkpoint, a solver and a number of steps) with few images: a *race*.

Guidance values lie on a grid of even ratios. A race is successive halving on that grid. It brackets the best value with few
images per value, fits a parabola over the logarithm of guidance to the values around the incumbent (the best value so far),
and requests more images, rung by rung, of those values that a paired interval does not show to be worse than the incumbent.
It ends when, at the required confidence, the choice is worse than the best value by no more than the tolerance. All values
use the same noise and the same prompts, so differences between them are paired. Guides and intervals race against each other
in the same way, each at its best guidance. This module generates no images.

Shapes: R bootstrap resamples, row 0 of [1 + R] is the score itself; V values in the fit.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace

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
    """A request for the score, in every resample, of the first `num_images` images at a guidance.

    `option` is the index of the guide or interval, where several race against each other.
    """

    guidance: float
    num_images: int
    option: int = 0


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
        option: index of the chosen guide or interval.
        tried: for each guide or interval that raced, its number of images at each guidance.
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
    option: int = 0
    tried: Mapping[int, Mapping[float, int]] = field(default_factory=dict)


GuidanceSearch = Generator[list[ScoreRequest], Mapping[ScoreRequest, Array], SearchResult]
"""Yields score requests, is sent the scores [1 + R] of every request, and returns the result."""
_Step = Generator[list[ScoreRequest], Mapping[ScoreRequest, Array], None]
"""Part of a search; see `GuidanceSearch`."""


def search_guidance(config: SearchConfig, start: int | None = None) -> GuidanceSearch:
    """Run one race.

    Args:
        config: settings of the race.
        start: grid index to begin at, such as the result of a neighbouring cell; None brackets the whole range.
    """
    option = _Observations(config, active=config.initial_indices(start))
    for number in range(1, len(config.rungs) + 1):
        yield from option.complete_rung(config.rungs[:number])
        if option.fit().regret <= config.tolerance:
            break
        option.active = option.survivors()
    return option.result()


def search_options(config: SearchConfig, brackets: Sequence[Collection[int]]) -> GuidanceSearch:
    """Race several guides, or several intervals, against each other, each at its best guidance.

    After every rung, the better half of the options goes on. So does an option less than the tolerance behind the best one,
    unless a paired interval shows that it is worse. The race ends when the choice of option and guidance is decided.

    Args:
        config: settings of the race.
        brackets: for each option, grid indices of its first guidance values.
    """
    options = [_Observations(config, index, set(map(config.clamp, bracket))) for index, bracket in enumerate(brackets)]
    running = list(options)
    for number in range(1, len(config.rungs) + 1):
        rungs = config.rungs[:number]
        yield from _together([option.request(option.active, rungs) for option in running])
        running = _better_options(running, config)
        yield from _together([option.complete_rung(rungs) for option in running])
        running = _better_options(running, config)
        best = _best_option(running)
        if max(best.fit().regret, _regret_of_option(running, config)) <= config.tolerance:
            break
        for option in running:
            option.active = option.survivors()
    best = _best_option(running)
    result = best.result()
    tried = {option.option: option.images_by_guidance for option in options}
    regret = max(result.regret, _regret_of_option(running, config))
    return replace(
        result,
        num_images=sum(sum(images.values()) for images in tried.values()),
        regret=regret,
        is_decided=regret <= config.tolerance,
        tried=tried,
    )


def _together(steps: Sequence[_Step]) -> _Step:
    """Run several generators at the same time: their requests are answered together."""
    requests = {step: next(step, None) for step in steps}
    while pending := {step: wanted for step, wanted in requests.items() if wanted is not None}:
        scores = yield [request for wanted in pending.values() for request in wanted]
        requests = {step: _answer(step, wanted, scores) for step, wanted in pending.items()}


def _answer(step: _Step, wanted: Sequence[ScoreRequest], scores: Mapping[ScoreRequest, Array]) -> list[ScoreRequest] | None:
    """Send a generator its scores; return its next requests, or None at its end."""
    try:
        return step.send({request: scores[request] for request in wanted})
    except StopIteration:
        return None


def _best_option(options: Sequence[_Observations]) -> _Observations:
    """Return the option with the lowest loss of its incumbent; all have the same number of images there."""
    return min(options, key=lambda option: option.incumbent_losses()[0])


def _better_options(options: Sequence[_Observations], config: SearchConfig) -> list[_Observations]:
    """Return the better half of the options, and those within the tolerance of the best, without those shown to be worse."""
    best = _best_option(options)
    losses = best.incumbent_losses()
    ranked = sorted(options, key=lambda option: option.incumbent_losses()[0])
    better = []
    for rank, option in enumerate(ranked):
        difference = option.incumbent_losses() - losses
        if option is best:
            better.append(option)
            continue
        if not np.isfinite(difference).all() or percentile_interval(difference, config.confidence).low > 0:
            continue
        if rank < math.ceil(len(options) / 2) or difference[0] <= config.tolerance * abs(losses[0]):
            better.append(option)
    return better


def _regret_of_option(options: Sequence[_Observations], config: SearchConfig) -> float:
    """Return the loss of the best option that the confidence does not exclude, as a fraction of the score."""
    losses = np.stack([option.incumbent_losses() for option in options])
    best = int(losses[:, 0].argmin())
    regret = np.quantile(losses[best, 1:] - losses[:, 1:].min(0), config.confidence)
    return float(regret / max(abs(losses[best, 0]), 1e-12))


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
    """Scores of one option by grid index and number of images; lower is better.

    Attributes:
        config: settings of the race.
        option: index of the option in the score requests.
        active: grid indices of the values that are still in the race.
        losses: losses [1 + R] by grid index and number of images.
    """

    config: SearchConfig
    option: int = 0
    active: set[int] = field(default_factory=set)
    losses: dict[int, dict[int, Array]] = field(default_factory=dict)

    def complete_rung(self, rungs: Sequence[int]) -> _Step:
        """Request the active values at these rungs, further values while the best one is outermost, and the fitted minimum."""
        yield from self.request(self.active, rungs)
        while (extension := self.extension(self.active)) is not None:
            self.active.add(extension)
            yield from self.request(self.active, rungs)
        while (best := self.fit().best_index) not in self.active:
            self.active.add(best)
            yield from self.request(self.active, rungs)

    def request(self, indices: set[int], rungs: Sequence[int]) -> _Step:
        """Request the missing scores of these values at each of these rungs, so that any two values have one in common."""
        requests = {
            (index, rung): ScoreRequest(grid_value(index), rung, self.option)
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

    def incumbent_losses(self) -> Array:
        """Return the losses [1 + R] of the incumbent, on all of its images."""
        incumbent = self.incumbent()
        return self.losses[incumbent][self.num_images(incumbent)]

    @property
    def images_by_guidance(self) -> dict[float, int]:
        """Images generated at each guidance."""
        return {grid_value(index): self.num_images(index) for index in sorted(self.losses)}

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

    def survivors(self) -> set[int]:
        """Return the better half of the values and the fitted best, without values that a paired interval shows to be worse."""
        differences = {index: self.minus_incumbent(index) for index in self.active}
        undecided = [index for index in self.active if percentile_interval(differences[index], self.config.confidence).low <= 0]
        ranked = sorted(undecided, key=lambda index: (differences[index][0], index))
        return {*ranked[: max(MIN_SURVIVORS, math.ceil(len(self.active) / 2))], self.fit().best_index}

    def result(self) -> SearchResult:
        fit = self.fit()
        tail = (1 - self.config.confidence) / 2
        low, high = (grid_value(round(float(end))) for end in np.quantile(fit.resampled_indices[1:], [tail, 1 - tail]))
        guidance = grid_value(fit.best_index)
        return SearchResult(
            guidance,
            min(low, guidance),
            max(high, guidance),
            sum(self.images_by_guidance.values()),
            self.images_by_guidance,
            fit.regret,
            fit.regret <= self.config.tolerance,
            fit.best_index == self.config.max_index,
            self._warnings(fit.best_index, guidance),
            self.option,
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
