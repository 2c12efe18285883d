"""Laws of the frontier: quality over cost and over size, and the frontier of a size that was held out.

`frontier_law` fits one variable, `floor + scale x^-exponent`, to the frontier over a cost, or to every size at its best over
parameters; over training compute `isocost.analysis.scaling` does the same. `predict_held_out` fits the two-variable law of
Hoffmann et al. (arXiv 2203.15556, eq. 2) with the parameters N of the network and the steps D that it takes,

    value = floor + A N^-alpha + B D^-beta,

to the frontiers of all sizes but the largest, and says what that one's would be at each cost. D is a cost in units of what the
size's cheapest step costs, which is known before it is trained: num_steps under the paper's cost, evaluations where a second
pass counts. The law takes for granted that what a size lacks and what its steps lack add up.

`value` is a distance, or what a share lacks of 1. All fits are `isocost.analysis.laws.fit_frontier`'s, all redraws those of
`isocost.analysis.bands`: corrected for the winner's luck, and without another training seed.

Shapes: M points of all frontiers, K of the held-out one, R redraws; row 0 of [1 + R] is the estimate itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from isocost.analysis.costs import COSTS, cost_of
from isocost.analysis.formatting import format_number, format_score
from isocost.analysis.frontier_ci import TAILS, Floats, frontier_points
from isocost.analysis.power_laws import MIN_SNAPSHOTS, Law, fit_frontier, fit_terms, interval_of
from isocost.analysis.results_table import deviations, final_points, sizes_in_order
from isocost.analysis.scaling_laws import check_law, loss_value
from isocost.errors import ConfigError
from isocost.evaluation.confidence_intervals import Interval

SIZE = "num_parameters"
MIN_SIZES = 3
"""As many as a law over size has numbers; one more is held out."""
MIN_STEPS = 3


@dataclass(frozen=True)
class Prediction:
    """The held-out frontier at one cost: what the other sizes' law says, and what was measured.

    `low` and `high` are the 95 % interval for the measured score, from the redraws and the scatter of the points about the
    law; `covers` says whether the score lies in it. None where the scores have no intervals. `relative_error` is predicted
    over measured less 1.
    """

    cost: float
    predicted: float
    low: float | None
    high: float | None
    measured: float
    relative_error: float
    covers: bool | None


@dataclass(frozen=True)
class HeldOutFit:
    """How well the law of the smaller sizes says the frontier of the largest.

    Attributes:
        size: the largest size.
        sizes: those that the law was fitted to.
        exponent_of_size: alpha.
        exponent_of_steps: beta; None where all points took the same few numbers of steps, and the law has no such term.
        floor: what infinite size and steps would leave.
        scatter: standard deviation of the logarithms of the fitted points about the law.
        predictions: by cost, from cheap to dear.
    """

    metric: str
    cost: str
    size: str
    sizes: tuple[str, ...]
    exponent_of_size: Interval
    exponent_of_steps: Interval | None
    floor: Interval
    scatter: float
    predictions: tuple[Prediction, ...]

    @property
    def mean_error(self) -> float:
        """Mean of the relative errors' sizes over the held-out costs."""
        return float(np.mean([abs(one.relative_error) for one in self.predictions]))

    @property
    def num_covered(self) -> int:
        """Of the predictions those whose interval holds the measured score."""
        return sum(one.covers is True for one in self.predictions)

    def __str__(self) -> str:
        told = f"{self.size} from {', '.join(self.sizes)}: off by {self.mean_error:.1%} on average"
        best = self.predictions[-1]
        said = format_score(best.predicted, best.low, best.high)
        measured = format_number(best.measured)
        told += f"; at {cost_of(self.cost).amount(best.cost)} predicted {said}, measured {measured}"
        if best.covers is None:
            return f"{told}; no intervals, since the scores have none"
        return f"{told}; {self.num_covered} of {len(self.predictions)} intervals hold the measured score"


def frontier_law(table: pd.DataFrame, metric: str, over: str, num_replicates: int = 200, seed: int = 0) -> Law:
    """The law of the frontier over a cost of `COSTS`, or of every size at its best over `num_parameters`.

    The law's intervals have no width where a score has no interval.

    Raises:
        ConfigError: nothing is counted so, the metric has no law, or the frontier has fewer than four points.
    """
    if over not in (*COSTS, SIZE):
        known = ", ".join((*COSTS, SIZE))
        raise ConfigError(f"no law over {over!r}; known: {known}, and training compute by isocost.analysis.scaling.scaling")
    check_law(metric)
    if over == SIZE:
        x, draws = _at_their_best(final_points(table, metric), metric, num_replicates, seed)
        what = f"{len(x)} sizes have a value above 0"
    else:
        x, draws = _frontier(final_points(table, metric, over), metric, over, num_replicates, seed)
        what = f"the frontier over {over} has {len(x)} points above 0"
    if len(x) < MIN_SNAPSHOTS:
        remedy = "train more sizes" if over == SIZE else "sweep more numbers of steps"
        raise ConfigError(f"a law takes {MIN_SNAPSHOTS} points, but {what}: {remedy}")
    return fit_frontier(over, x, draws)


def predict_held_out(
    table: pd.DataFrame, metric: str, cost: str = "normalized_cost", num_replicates: int = 200, seed: int = 0
) -> HeldOutFit:
    """Fit the frontiers of all sizes but the largest, and set what they say of that one's against what it has.

    Args:
        table: points as in `isocost.analysis.frontier`, of one line of models: few-step students in a table of their own.
        cost: a name of `COSTS`.

    Raises:
        ConfigError: the metric or cost has no law, or fewer than three sizes stay when one is held out.
    """
    check_law(metric)
    rows = final_points(table, metric, cost)
    *sizes, largest = sizes_in_order(rows)
    if len(sizes) < MIN_SIZES:
        left = "1 size" if len(sizes) == 1 else f"{len(sizes)} sizes"
        raise ConfigError(f"without {largest} there are {left}: a law over size takes {MIN_SIZES}, so train more sizes")
    groups = {size: rows[rows["size"] == size] for size in (*sizes, largest)}
    frontiers = {
        size: _frontier(group, metric, cost, num_replicates, seed + at) for at, (size, group) in enumerate(groups.items())
    }
    for size, (costs, _) in frontiers.items():
        if not len(costs):
            raise ConfigError(f"{size} has no {metric} above 0, and a law in logarithms needs one; take another metric")
    fewest = min(len(draws) for _, draws in frontiers.values())  # 1 where some score has no interval
    coordinates = [_coordinates(groups[size], costs, cost) for size, (costs, _) in frontiers.items()]
    *known, asked = coordinates
    x = np.concatenate(known, axis=1)
    draws = np.concatenate([frontiers[size][1][:fewest] for size in sizes], axis=1)
    variables = 2 if len(np.unique(x[1].round(6))) >= MIN_STEPS else 1
    middle = x.mean(1, keepdims=True)
    fits = fit_terms((x - middle)[:variables], draws)
    degrees = max(draws.shape[1] - fits.shape[1], 1)
    scatter = float(np.sqrt(np.sum((np.log(draws[0]) - _predicted(fits, (x - middle)[:variables])[0]) ** 2) / degrees))
    logs = _predicted(fits, (asked - middle)[:variables])
    costs, measured = frontiers[largest]
    exponents = fits[:, variables : 2 * variables]
    return HeldOutFit(
        metric=metric,
        cost=cost,
        size=largest,
        sizes=tuple(sizes),
        exponent_of_size=interval_of(exponents[:, 0]),
        exponent_of_steps=interval_of(exponents[:, 1]) if variables > 1 else None,
        floor=interval_of(np.exp(fits[:, -1])),
        scatter=scatter,
        predictions=tuple(_predictions(costs, logs, scatter, measured[0], seed)),
    )


def _frontier(rows: pd.DataFrame, metric: str, cost: str, num_replicates: int, seed: int) -> tuple[Floats, Floats]:
    """Costs [M] at which the frontier of the rows falls, and its values there with redraws, [1 + R, M]."""
    rows = rows.assign(_lacks=loss_value(rows, metric)).sort_values([cost, "_lacks", "point"], kind="stable")
    if not (rows[cost] > 0).all():
        raise ConfigError(f"a {cost} of 0 has no logarithm; leave such points out, or measure them again")
    costs, values = (rows[column].to_numpy(dtype=float) for column in (cost, "_lacks"))
    return frontier_points(costs, values, deviations(rows, metric), num_replicates, seed)


def _at_their_best(rows: pd.DataFrame, metric: str, num_replicates: int, seed: int) -> tuple[Floats, Floats]:
    """Parameters [M] of the sizes, and the best value of each with redraws, [1 + R, M]; sizes without one above 0 left out."""
    parameters, columns = [], []
    for at, size in enumerate(sizes_in_order(rows)):
        own = rows[rows["size"] == size]
        values = loss_value(own, metric)
        _, draws = frontier_points(np.ones(len(own)), values, deviations(own, metric), num_replicates, seed + at)
        if draws.shape[1]:
            parameters.append(float(own["num_parameters"].iloc[0]))
            columns.append(draws[:, 0])
    fewest = min((len(column) for column in columns), default=1)  # 1 where some score has no interval
    stacked = [column[:fewest] for column in columns] or [np.empty((1, 0))]
    return np.array(parameters), np.column_stack(stacked)


def _coordinates(rows: pd.DataFrame, costs: Floats, cost: str) -> Floats:
    """Logarithms of a size's parameters and of its costs in cheapest steps, [2, M]."""
    unit = float((rows[cost] / rows["num_steps"]).min())
    return np.stack([np.full(len(costs), math.log(rows["num_parameters"].iloc[0])), np.log(costs / unit)])


def _predicted(fits: Floats, x: Floats) -> Floats:
    """Logarithms of the laws [1 + R, 2V + 1] at x [V, K]: [1 + R, K]."""
    num_variables = len(x)
    terms = fits[:, :num_variables, None] - fits[:, num_variables:-1, None] * x
    floor = np.broadcast_to(fits[:, -1:, None], (len(fits), 1, x.shape[1]))
    return np.logaddexp.reduce(np.concatenate([terms, floor], axis=1), axis=1)


def _predictions(costs: Floats, logs: Floats, scatter: float, measured: Floats, seed: int) -> list[Prediction]:
    values = np.exp(logs[0])
    spread = np.exp(logs + scatter * np.random.default_rng(seed).standard_normal(logs.shape))
    has_interval = len(logs) > 1
    ends = np.quantile(spread[1:], TAILS, axis=0) if has_interval else np.full((2, len(costs)), np.nan)
    return [
        Prediction(
            cost=float(costs[at]),
            predicted=float(values[at]),
            low=float(ends[0, at]) if has_interval else None,
            high=float(ends[1, at]) if has_interval else None,
            measured=float(measured[at]),
            relative_error=float(values[at] / measured[at] - 1),
            covers=bool(ends[0, at] <= measured[at] <= ends[1, at]) if has_interval else None,
        )
        for at in range(len(costs))
    ]
