"""Estimate the variance of scores between training seeds, from sizes that were trained again with other seeds.

The size name of a further training ends with its seed ("2.6M seed 1"); the name without it is the first training ("2.6M").
Guidance is chosen separately for each training, solver and number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from isocost.analysis.formatting import format_number, format_score, format_steps
from isocost.analysis.results_table import best_per_group, final_points
from isocost.errors import ConfigError

SEED_SUFFIX = "seed"
SETTING_COLUMNS = ("solver", "num_steps")


@dataclass(frozen=True)
class TrainingSpread:
    """Standard deviation of a score between trainings that differ only in their seed.

    It includes the noise of the images. All settings of a size come from the same few trainings, so they count as one
    observation for each training after the first.

    Attributes:
        relative_std: the standard deviation, as a fraction of the score.
        low: lower end of its 95 % interval, by chi-square.
        high: upper end.
        degrees_of_freedom: number of trainings minus number of sizes.
        sizes: the sizes that were trained again.
    """

    relative_std: float
    low: float
    high: float
    degrees_of_freedom: int
    sizes: tuple[str, ...]

    @property
    def margin(self) -> float:
        """Largest difference between the logarithms of two trainings' scores that the seed explains (95 %, Student's t)."""
        return _margin(self, self)

    def __str__(self) -> str:
        std, low, high = (f"{100 * value:.3g} %" for value in (self.relative_std, self.low, self.high))
        count = "1 more training" if self.degrees_of_freedom == 1 else f"{self.degrees_of_freedom} more trainings"
        factor = f"{math.exp(self.margin):.3g}"
        return f"{', '.join(self.sizes)} {std} [{low}, {high}] from {count}, explains a factor of up to {factor}"


@dataclass(frozen=True)
class SeedVariance:
    """The spread between trainings by size, because small networks can have a much larger spread than large ones.

    Attributes:
        by_size: the spread of each size that was trained again.
        pooled: an estimate over all of them, for the other sizes.
    """

    by_size: Mapping[str, TrainingSpread]
    pooled: TrainingSpread

    def spread_of(self, size: str) -> TrainingSpread:
        """The spread of a size, or of a further training of it ("2.6M seed 1")."""
        return self.by_size.get(split_training_name(size)[0], self.pooled)

    def explains(self, first: Mapping[Any, Any], second: Mapping[Any, Any], metric: str) -> bool:
        """Whether the seeds can explain the difference between the scores of two rows.

        The test is Welch's t between the logarithms. If a score is not above 0, the margin is a fraction of the larger score
        instead.
        """
        scores = float(first[metric]), float(second[metric])
        margin = _margin(self.spread_of(str(first["size"])), self.spread_of(str(second["size"])))
        if min(scores) <= 0:
            return abs(scores[0] - scores[1]) <= margin * max(abs(score) for score in scores)
        return abs(math.log(scores[0] / scores[1])) <= margin

    def __str__(self) -> str:
        spreads = [str(spread) for spread in self.by_size.values()]
        if len(spreads) > 1:
            spreads.append(f"pooled, for sizes trained once: {self.pooled}")
        return f"standard deviation of a score between training seeds: {'; '.join(spreads)}"


def _margin(first: TrainingSpread, second: TrainingSpread) -> float:
    """Welch's t at 95 % for one training of each; two sizes with the same spread share its degrees of freedom."""
    first_variance, second_variance = first.relative_std**2, second.relative_std**2
    total = first_variance + second_variance
    degrees: float = first.degrees_of_freedom
    if first is not second and total > 0:
        degrees = total**2 / (first_variance**2 / first.degrees_of_freedom + second_variance**2 / second.degrees_of_freedom)
    return float(stats.t.ppf(0.975, degrees)) * math.sqrt(total)


def split_training_name(size: str) -> tuple[str, str]:
    """Split the name of a training: "2.6M seed 1" gives ("2.6M", "seed 1"), and the first training "2.6M" ("2.6M", "")."""
    name, _, seed = size.rpartition(f" {SEED_SUFFIX} ")
    return (name, f"{SEED_SUFFIX} {seed}") if name else (size, "")


def estimate_seed_variance(table: pd.DataFrame, metric: str) -> SeedVariance:
    """Estimate the spread from the logarithms of the scores of final checkpoints.

    Only the settings (solver, number of steps) that all trainings of a size share are used.

    Raises:
        ConfigError: no size was scored after two trainings.
    """
    sums_of_squares: dict[str, float] = {}
    degrees: dict[str, int] = {}
    for size, scores in _replicate_scores(table, metric):
        degrees[size] = len(scores) - 1
        sums_of_squares[size] = degrees[size] * float(np.log(scores).var(axis=0, ddof=1).mean())
    if not sums_of_squares:
        raise ConfigError("no size was scored after two trainings: add seed_replicates.seeds")
    by_size = {size: _make_spread(total, degrees[size], (size,)) for size, total in sums_of_squares.items()}
    pooled = _make_spread(sum(sums_of_squares.values()), sum(degrees.values()), tuple(sums_of_squares))
    return SeedVariance(by_size, pooled)


def _make_spread(sum_of_squares: float, degrees: int, sizes: tuple[str, ...]) -> TrainingSpread:
    low, high = (math.sqrt(sum_of_squares / stats.chi2.ppf(level, degrees)) for level in (0.975, 0.025))
    return TrainingSpread(math.sqrt(sum_of_squares / degrees), low, high, degrees, sizes)


def format_replicate_scores(table: pd.DataFrame, metric: str) -> dict[str, list[str]]:
    """The score of each training at its best guidance: size -> one text for each setting."""
    rows = _best_guidance(table, metric)
    texts: dict[str, list[str]] = {}
    for (size, solver, _), group in rows.groupby(["_size", *SETTING_COLUMNS], sort=False):
        if len(group) < 2:
            continue
        scores = [_format_training(row, metric) for row in group.to_dict("records")]
        steps = format_steps(int(group["num_steps"].iloc[0]))
        texts.setdefault(str(size), []).append(f"{solver}, {steps}: {', '.join(scores)}")
    return texts


def _format_training(row: Mapping[Any, Any], metric: str) -> str:
    score = format_score(*(float(row[f"{metric}{suffix}"]) for suffix in ("", "_low", "_high")))
    return f"{row['_training'] or 'first'} {score} at guidance {format_number(row['guidance'])}"


def _replicate_scores(table: pd.DataFrame, metric: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every size with several trainings, and its scores, trainings x settings."""
    rows = _best_guidance(table, metric)
    for size, group in rows[rows[metric] > 0].groupby("_size", sort=False):
        scores = group.pivot(index="_training", columns=list(SETTING_COLUMNS), values=metric).dropna(axis=1)
        if len(scores) > 1 and scores.size:
            yield str(size), scores


def _best_guidance(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The points of final checkpoints at the best guidance of each setting, with the columns `_size` and `_training`."""
    rows = best_per_group(final_points(table, metric), metric, ["size", *SETTING_COLUMNS])
    names = rows["size"].map(split_training_name)
    return rows.assign(_size=names.str[0], _training=names.str[1])
