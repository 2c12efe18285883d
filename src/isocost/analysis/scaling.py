"""Quality against training compute: power laws with intervals, and where they saturate.

A law is `value = floor + scale * C^-exponent` of training compute C; `value` is a distance, or what a share lacks of 1.
It falls like a power law while the second term is the larger one; where the two are equal the slope in logarithms has
halved, and that C is called the saturation. Two axes count C:

training_gflop   3 x forward x images: a backward pass costs two forward ones (Kaplan et al., arXiv 2001.08361, sec. 2.1)
paper_compute    GFLOP of one forward x iterations, the axis of arXiv 2404.01367, fig. 3; the batch is not in it

Intervals (95 %) redraw every score from its own interval, apart from the others, and fit again: they cover the noise of the
scores, neither another training seed nor a law of another form.

Shapes: M marks of a curve, R redrawn curves, E exponents that are tried.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from isocost.analysis.frontier import format_number, scored, sizes_in_order
from isocost.errors import RequestError
from isocost.metrics.names import metric_of
from isocost.score.intervals import Interval

FORWARDS_A_STEP = 3
LEAST_MARKS = 4
SETTING = ("sampler", "num_steps", "guidance")
FAMILY = "family"
_EXPONENTS = (0.01, 10.0)
_NUM_TRIED, _NUM_ROUNDS = 32, 6
_INTERVAL_WIDTH = 2 * 1.959964

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Law:
    """A fitted law of one curve. `saturation` is the compute from which the floor outweighs what compute still buys.

    `saturation` is None where the floor's interval reaches 0, or where the curve ends before it. `misfit` is the
    root-mean-square deviation of the points from the law, as a share of their values.
    """

    name: str
    num_marks: int
    scale: Interval
    exponent: Interval
    floor: Interval
    saturation: Interval | None
    misfit: float

    def at(self, compute: float) -> float:
        """The law's value after this much compute."""
        return self.floor.value + self.scale.value * compute**-self.exponent.value

    def __str__(self) -> str:
        falls = f"{self.name}: exponent {_in_words(self.exponent)}"
        if self.saturation is None:
            return f"{falls}, no saturation within its {self.num_marks} marks"
        return f"{falls}, saturates at {_in_words(self.saturation)} towards {_in_words(self.floor)}"


@dataclass(frozen=True)
class Scaling:
    """The laws of a study: one for each size with enough marks, and that of the best size at each compute."""

    metric: str
    axis: str
    setting: str
    sizes: tuple[Law, ...]
    family: Law | None
    left_out: tuple[str, ...]


def compute_curves(table: pd.DataFrame, metric: str, batch_size: int) -> pd.DataFrame:
    """The points of quality against compute: one setting for all sizes and marks, with `paper_compute` beside `training_gflop`.

    The setting is the one that most marks were scored at; ties go to more steps, then less guidance.

    Raises:
        RequestError: no point carries the metric, or the points cannot be compared.
    """
    rows = scored(table, metric)
    settings = rows.groupby(list(SETTING), as_index=False).agg(marks=("images_seen", "count"))
    order = ["marks", "num_steps", "guidance", "sampler"]
    chosen = settings.sort_values(order, ascending=[False, False, True, True]).iloc[0]
    rows = rows[(rows[list(SETTING)] == chosen[list(SETTING)]).all(axis=1)]
    compute = paper_compute(rows["training_gflop"], batch_size)
    return rows.assign(paper_compute=compute).sort_values(["num_parameters", "training_gflop"])


def paper_compute(training_gflop: pd.Series, batch_size: int) -> pd.Series:
    """GFLOP of one forward x iterations, from 3 x forward x images."""
    return training_gflop / (FORWARDS_A_STEP * batch_size)


def scaling(
    table: pd.DataFrame, metric: str, batch_size: int, axis: str = "training_gflop", num_bootstrap: int = 200, seed: int = 0
) -> Scaling:
    """Fit every size with `LEAST_MARKS` marks or more, and the family.

    Args:
        batch_size: images a step of the training, for the paper's axis.
        axis: `training_gflop` or `paper_compute`.

    Raises:
        RequestError: the axis or metric has no law, or there are no points to compare.
    """
    if axis not in ("training_gflop", "paper_compute"):
        raise RequestError(f"axis {axis!r}: compute is counted as training_gflop or paper_compute")
    if metric_of(metric).better == "higher" and metric != "alignment":
        raise RequestError(f"{metric}: no law for a quality without an upper end; take a distance or alignment")
    curves = compute_curves(table, metric, batch_size)
    first = curves.iloc[0]
    setting = f"{first['sampler']}, {first['num_steps']} steps, guidance {first['guidance']:g}"
    laws, left_out = [], []
    for size in sizes_in_order(curves):
        rows = curves[curves["size"] == size]
        if (law := _law_of(size, rows, metric, axis, num_bootstrap, seed)) is None:
            left_out.append(size)
        else:
            laws.append(law)
    family = _law_of(FAMILY, frontier_of(curves, metric), metric, axis, num_bootstrap, seed)
    return Scaling(metric, axis, setting, tuple(laws), family, tuple(left_out))


def frontier_of(curves: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The points that no point of lower or equal compute matches: the best size at each compute, from little to much."""
    sign = 1.0 if metric_of(metric).better == "lower" else -1.0
    rows = curves.assign(_worse=sign * curves[metric]).sort_values(["training_gflop", "_worse"], kind="stable")
    worse = rows["_worse"].to_numpy(dtype=float)
    before = np.concatenate([[np.inf], np.minimum.accumulate(worse)[:-1]])
    return rows[worse < before].drop(columns="_worse")


def fit_law(
    name: str, compute: Floats, values: Floats, spread: Floats | None = None, num_bootstrap: int = 200, seed: int = 0
) -> Law:
    """The law of a curve: weighted least squares, intervals from redrawn scores.

    Args:
        compute: rising, [M].
        values: above 0, [M].
        spread: standard deviation of each value, [M]; without it values weigh by their size and intervals have no width.
    """
    assert len(compute) >= LEAST_MARKS, "too few marks for three numbers and a deviation"
    known = spread is not None and bool(np.all(np.isfinite(spread) & (spread > 0)))
    weights = 1 / (spread if known and spread is not None else values)
    curves = values[None]
    if known and spread is not None:
        noise = np.random.default_rng(seed).standard_normal((num_bootstrap, len(values)))
        curves = np.concatenate([curves, values + spread * noise])
    middle = math.exp(float(np.log(compute).mean()))
    scales, exponents, floors = _fit(np.log(compute / middle), curves, weights)
    with np.errstate(divide="ignore", over="ignore"):
        saturations = middle * (scales / floors) ** (1 / exponents)
    floor = _interval(floors)
    is_certain = floor.low > 0 and saturations[0] <= compute[-1]
    fitted = floors[0] + scales[0] * (compute / middle) ** -exponents[0]
    return Law(
        name=name,
        num_marks=len(compute),
        scale=_interval(scales * middle**exponents),
        exponent=_interval(exponents),
        floor=floor,
        saturation=_interval(saturations) if is_certain else None,
        misfit=float(np.sqrt(np.mean((values / fitted - 1) ** 2))),
    )


def _law_of(name: str, rows: pd.DataFrame, metric: str, axis: str, num_bootstrap: int, seed: int) -> Law | None:
    values, low, high = (rows[column].to_numpy(dtype=float) for column in (metric, f"{metric}_low", f"{metric}_high"))
    values = values if metric_of(metric).better == "lower" else 1 - values
    compute = rows[axis].to_numpy(dtype=float)
    usable = values > 0
    if len(np.unique(compute[usable])) < LEAST_MARKS:
        return None
    spread = (high - low) / _INTERVAL_WIDTH
    return fit_law(name, compute[usable], values[usable], spread[usable], num_bootstrap, seed)


def _fit(x: Floats, curves: Floats, weights: Floats) -> tuple[Floats, Floats, Floats]:
    """Scale at x = 0, exponent and floor >= 0, [R] each, of the weighted least squares of every curve [R, M].

    With the exponent given the law is linear in the other two, so only exponents are searched, closer each round.
    """
    square = weights**2
    low, high = (np.full(len(curves), math.log(end)) for end in _EXPONENTS)
    rows = np.arange(len(curves))
    for _ in range(_NUM_ROUNDS):
        tried = np.linspace(low, high, _NUM_TRIED, axis=1)
        basis = np.exp(-np.exp(tried)[..., None] * x)  # [R, E, M]
        gg, g1, gv = (basis**2 @ square, basis @ square, np.einsum("rem,rm,m->re", basis, curves, square))
        one, v1 = square.sum(), (curves @ square)[:, None]
        floor = np.maximum((gg * v1 - g1 * gv) / np.maximum(gg * one - g1**2, 1e-300), 0)
        scale = np.maximum((gv - floor * g1) / gg, 1e-300)
        misfit = (square * (floor[..., None] + scale[..., None] * basis - curves[:, None]) ** 2).sum(-1)
        best = misfit.argmin(1)
        low, high = tried[rows, np.maximum(best - 1, 0)], tried[rows, np.minimum(best + 1, _NUM_TRIED - 1)]
    return scale[rows, best], np.exp(tried[rows, best]), floor[rows, best]


def _interval(draws: Floats) -> Interval:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(float(draws[0]), float(min(low, draws[0])), float(max(high, draws[0])))


def _in_words(interval: Interval) -> str:
    return f"{format_number(interval.value)} [{format_number(interval.low)}, {format_number(interval.high)}]"
