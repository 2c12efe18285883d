"""How much of a difference between two trainings is luck: sizes trained again from other seeds, scored at the same settings.

A further training is a row of the table whose size ends in its seed ("2.6M seed 1"); the first one is the row of the rest
("2.6M"). Guidance is chosen anew for each training, solver and number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from isocost.analysis.formatting import format_number, format_score
from isocost.analysis.results_table import best_in_each, final_points
from isocost.errors import ConfigError

SEED_SUFFIX = "seed"
SETTING = ("solver", "num_steps")


@dataclass(frozen=True)
class TrainingSpread:
    """Standard deviation of a score between trainings that differ in their seed alone, as a share of the score.

    The images' own noise is part of it. All settings of a size rest on the same few trainings, so they count as one
    observation for each training beyond the first.

    Attributes:
        share: the standard deviation.
        low, high: its 95 % interval by chi-square with `degrees` degrees of freedom.
        degrees: trainings less sizes.
        sizes: those that were trained again.
    """

    share: float
    low: float
    high: float
    degrees: int
    sizes: tuple[str, ...]

    @property
    def margin(self) -> float:
        """How far apart the logarithms of two trainings' scores have to be before it is more than luck: 95 %, Student's t."""
        return _margin(self, self)

    def __str__(self) -> str:
        spread, low, high = (f"{100 * value:.3g} %" for value in (self.share, self.low, self.high))
        more = f"{self.degrees} more {'training' if self.degrees == 1 else 'trainings'}"
        return f"{', '.join(self.sizes)} {spread} [{low}, {high}] by {more}, luck up to {math.exp(self.margin):.3g} times"


@dataclass(frozen=True)
class SeedVariance:
    """The spread between trainings, size by size: small networks may have far more of it than large ones.

    Attributes:
        by_size: of each size that was trained again.
        together: of all of them, for sizes that were not.
    """

    by_size: Mapping[str, TrainingSpread]
    together: TrainingSpread

    def of(self, size: str) -> TrainingSpread:
        """The spread of a size, or of a further training of it ("2.6M seed 1")."""
        return self.by_size.get(training_of(size)[0], self.together)

    def explains(self, one: Mapping[Any, Any], other: Mapping[Any, Any], metric: str) -> bool:
        """Whether the scores of two rows of the table may be as far apart by the luck of their trainings.

        Welch's t between logarithms. A score that is not above 0 has none: there the margin is a share of the larger one.
        """
        scores = float(one[metric]), float(other[metric])
        margin = _margin(self.of(str(one["size"])), self.of(str(other["size"])))
        if min(scores) <= 0:
            return abs(scores[0] - scores[1]) <= margin * max(abs(score) for score in scores)
        return abs(math.log(scores[0] / scores[1])) <= margin

    def __str__(self) -> str:
        told = [str(spread) for spread in self.by_size.values()]
        if len(told) > 1:
            told.append(f"taken for sizes trained once: {self.together}")
        return f"scores of one setting spread between trainings: {'; '.join(told)}"


def _margin(one: TrainingSpread, other: TrainingSpread) -> float:
    """Welch's t at 95 % for one training of each; two sizes with the same spread share its degrees of freedom."""
    first, second = one.share**2, other.share**2
    degrees: float = one.degrees
    if one is not other and first + second > 0:
        degrees = (first + second) ** 2 / (first**2 / one.degrees + second**2 / other.degrees)
    return float(stats.t.ppf(0.975, degrees)) * math.sqrt(first + second)


def training_of(size: str) -> tuple[str, str]:
    """The size and what sets a further training of it apart: ("2.6M", "seed 1"); the latter empty of the first one."""
    name, _, seed = size.rpartition(f" {SEED_SUFFIX} ")
    return (name, f"{SEED_SUFFIX} {seed}") if name else (size, "")


def estimate_seed_variance(table: pd.DataFrame, metric: str) -> SeedVariance:
    """From logarithms of the scores of last checkpoints, at settings that all trainings of a size share.

    Raises:
        ConfigError: no size was scored after two trainings.
    """
    squares: dict[str, float] = {}
    degrees: dict[str, int] = {}
    for size, trainings in _trained_again(table, metric):
        degrees[size] = len(trainings) - 1
        squares[size] = degrees[size] * float(np.log(trainings).var(axis=0, ddof=1).mean())
    if not squares:
        raise ConfigError("no size was scored after two trainings: add seed_replicates.seeds")
    by_size = {size: _spread(squares[size], degrees[size], (size,)) for size in squares}
    return SeedVariance(by_size, _spread(sum(squares.values()), sum(degrees.values()), tuple(squares)))


def _spread(sums: float, degrees: int, sizes: tuple[str, ...]) -> TrainingSpread:
    low, high = (math.sqrt(sums / stats.chi2.ppf(level, degrees)) for level in (0.975, 0.025))
    return TrainingSpread(math.sqrt(sums / degrees), low, high, degrees, sizes)


def side_by_side(table: pd.DataFrame, metric: str) -> dict[str, list[str]]:
    """By size: at every setting, the score of each training at its best guidance."""
    rows = _best(table, metric)
    told: dict[str, list[str]] = {}
    for (size, solver, num_steps), group in rows.groupby(["_size", *SETTING], sort=False):
        if len(group) < 2:
            continue
        scores = [_score(row, metric) for row in group.to_dict("records")]
        steps = "1 step" if num_steps == 1 else f"{num_steps} steps"
        told.setdefault(str(size), []).append(f"{solver}, {steps}: {', '.join(scores)}")
    return told


def _score(row: Mapping[Any, Any], metric: str) -> str:
    score = format_score(*(float(row[f"{metric}{end}"]) for end in ("", "_low", "_high")))
    return f"{row['_training'] or 'first'} {score} at guidance {format_number(row['guidance'])}"


def _trained_again(table: pd.DataFrame, metric: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Sizes with several trainings: scores, trainings x settings."""
    rows = _best(table, metric)
    for size, group in rows[rows[metric] > 0].groupby("_size", sort=False):
        scores = group.pivot(index="_training", columns=list(SETTING), values=metric).dropna(axis=1)
        if len(scores) > 1 and scores.size:
            yield str(size), scores


def _best(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Last checkpoints at the best guidance of each setting, with the size and the training of each."""
    rows = best_in_each(final_points(table, metric), metric, ["size", *SETTING])
    names = rows["size"].map(training_of)
    return rows.assign(_size=names.str[0], _training=names.str[1])
