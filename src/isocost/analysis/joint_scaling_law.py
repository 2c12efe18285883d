"""Laws of the frontier over cost and over size, and a prediction of the frontier of a held-out size.

`frontier_law` fits a law of one variable, `asymptote + scale * x^-exponent`, to the frontier over a cost, or to the best score
of every size over its parameters. (`isocost.analysis.scaling_laws` does this over training compute.) `predict_held_out` fits
the law of two variables of Hoffmann et al. (arXiv 2203.15556, eq. 2), with the number of parameters N and of steps D,

    value = asymptote + A N^-alpha + B D^-beta,

to the frontiers of all sizes except the largest, and predicts the frontier of the largest. D is the cost divided by the cost of
the size's cheapest step, which is known before training: the number of steps under the normalized cost, and evaluations where
guidance adds a second pass. The law assumes that the loss from model size and the loss from the number of steps are additive.

`value` is a distance, or 1 minus a metric that is a fraction. All fits use the method of `fit_frontier` in
`isocost.analysis.power_laws`. The bootstrap replicates are those of `isocost.analysis.frontier_ci`: corrected for selection
bias, without another training seed.

Shapes: M points of all frontiers, K points of the held-out frontier, R replicates; row 0 of [1 + R] is the estimate itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from isocost.analysis.costs import COSTS, cost_of
from isocost.analysis.formatting import format_number, format_score
from isocost.analysis.frontier_ci import TAILS, Floats, frontier_points
from isocost.analysis.power_laws import MIN_POINTS, Law, bootstrap_interval, fit_frontier, fit_terms
from isocost.analysis.results_table import final_points, sizes_in_order, standard_errors
from isocost.analysis.scaling_laws import check_law, loss_value
from isocost.errors import ConfigError
from isocost.evaluation.confidence_intervals import Interval

SIZE = "num_parameters"
MIN_SIZES = 3
"""Number of fitted sizes: a law over size has three parameters."""
MIN_STEPS = 3
"""The law has a term for the steps if the points have at least this many distinct numbers of steps."""


@dataclass(frozen=True)
class Prediction:
    """The held-out frontier at one cost.

    Attributes:
        predicted: by the law of the other sizes.
        low: lower end of the 95 % interval for the measured value, from the replicates and the scatter of the points around the
            law; None if the scores have no intervals.
        high: upper end.
        relative_error: predicted / measured - 1.
        covers: whether the interval contains the measured value; None without an interval.
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
    """The prediction of the largest size's frontier by the law of the smaller sizes.

    Attributes:
        size: the largest size, which was held out.
        sizes: the sizes that the law was fitted to.
        exponent_of_size: alpha.
        exponent_of_steps: beta; None if the points have too few distinct numbers of steps, and the law has no such term.
        asymptote: the value for infinite size and steps.
        scatter: standard deviation of the logarithms of the fitted points around the law.
        predictions: in order of rising cost.
    """

    metric: str
    cost: str
    size: str
    sizes: tuple[str, ...]
    exponent_of_size: Interval
    exponent_of_steps: Interval | None
    asymptote: Interval
    scatter: float
    predictions: tuple[Prediction, ...]

    @property
    def mean_error(self) -> float:
        """Mean absolute relative error over the held-out costs."""
        return float(np.mean([abs(prediction.relative_error) for prediction in self.predictions]))

    @property
    def num_covered(self) -> int:
        """The number of predictions whose interval contains the measured value."""
        return sum(prediction.covers is True for prediction in self.predictions)

    def __str__(self) -> str:
        last = self.predictions[-1]
        text = f"{self.size} predicted from {', '.join(self.sizes)}: mean error {self.mean_error:.1%}"
        text += (
            f"; at {cost_of(self.cost).format_amount(last.cost)} predicted {format_score(last.predicted, last.low, last.high)}"
        )
        text += f", measured {format_number(last.measured)}"
        if last.covers is None:
            return f"{text}; no intervals, because the scores have none"
        return f"{text}; {self.num_covered} of {len(self.predictions)} intervals contain the measured value"


def frontier_law(table: pd.DataFrame, metric: str, over: str, num_replicates: int = 200, seed: int = 0) -> Law:
    """Fit the law of the frontier over a cost, or of the best score of every size over its parameters.

    The intervals of the law have no width if a score has no interval.

    Args:
        over: a name of `COSTS`, or `num_parameters`.
        num_replicates: number of bootstrap replicates.
        seed: random seed of the replicates.

    Raises:
        ConfigError: `over` is unknown, the metric has no law, or the frontier has fewer than four points.
    """
    if over not in (*COSTS, SIZE):
        known = ", ".join((*COSTS, SIZE))
        raise ConfigError(
            f"no law over {over!r}; known: {known}; for training compute use isocost.analysis.scaling_laws.fit_scaling_laws"
        )
    check_law(metric)
    if over == SIZE:
        x, values = _best_of_each_size(final_points(table, metric), metric, num_replicates, seed)
        count = f"{len(x)} sizes have a value above 0"
    else:
        x, values = _frontier(final_points(table, metric, over), metric, over, num_replicates, seed)
        count = f"the frontier over {over} has {len(x)} points above 0"
    if len(x) < MIN_POINTS:
        remedy = "train more sizes" if over == SIZE else "sweep more numbers of steps"
        raise ConfigError(f"a law needs {MIN_POINTS} points, but {count}: {remedy}")
    return fit_frontier(over, x, values)


def predict_held_out(
    table: pd.DataFrame, metric: str, cost: str = "normalized_cost", num_replicates: int = 200, seed: int = 0
) -> HeldOutFit:
    """Fit the frontiers of all sizes except the largest, and predict the frontier of the largest.

    Args:
        table: points of one family of models; put few-step students in a separate table.
        cost: a name of `COSTS`.
        num_replicates: number of bootstrap replicates.
        seed: random seed of the replicates.

    Raises:
        ConfigError: the metric or cost has no law, or fewer than three sizes remain without the largest.
    """
    check_law(metric)
    rows = final_points(table, metric, cost)
    *sizes, largest = sizes_in_order(rows)
    if len(sizes) < MIN_SIZES:
        remaining = "there is 1 size" if len(sizes) == 1 else f"there are {len(sizes)} sizes"
        raise ConfigError(f"without {largest} {remaining}: a law over size needs {MIN_SIZES}, so train more sizes")
    groups = {size: rows[rows["size"] == size] for size in (*sizes, largest)}
    frontiers = {
        size: _frontier(group, metric, cost, num_replicates, seed + index) for index, (size, group) in enumerate(groups.items())
    }
    for size, (costs, _) in frontiers.items():
        if not len(costs):
            raise ConfigError(f"{size} has no {metric} above 0, and the law is fitted to logarithms; choose another metric")
    num_rows = min(len(values) for _, values in frontiers.values())  # 1 if a score has no interval
    *known, held_out = (_coordinates(groups[size], costs, cost) for size, (costs, _) in frontiers.items())
    x = np.concatenate(known, axis=1)
    values = np.concatenate([frontiers[size][1][:num_rows] for size in sizes], axis=1)
    num_variables = 2 if len(np.unique(x[1].round(6))) >= MIN_STEPS else 1
    center = x.mean(1, keepdims=True)
    fits = fit_terms((x - center)[:num_variables], values)
    degrees_of_freedom = max(values.shape[1] - fits.shape[1], 1)
    residuals = np.log(values[0]) - _evaluate_law(fits, (x - center)[:num_variables])[0]
    scatter = float(np.sqrt(np.sum(residuals**2) / degrees_of_freedom))
    logs = _evaluate_law(fits, (held_out - center)[:num_variables])
    costs, measured = frontiers[largest]
    exponents = fits[:, num_variables : 2 * num_variables]
    return HeldOutFit(
        metric=metric,
        cost=cost,
        size=largest,
        sizes=tuple(sizes),
        exponent_of_size=bootstrap_interval(exponents[:, 0]),
        exponent_of_steps=bootstrap_interval(exponents[:, 1]) if num_variables > 1 else None,
        asymptote=bootstrap_interval(np.exp(fits[:, -1])),
        scatter=scatter,
        predictions=tuple(_predictions(costs, logs, scatter, measured[0], seed)),
    )


def _frontier(rows: pd.DataFrame, metric: str, cost: str, num_replicates: int, seed: int) -> tuple[Floats, Floats]:
    """Costs [M] at which the frontier of the rows falls, and its values there with replicates, [1 + R, M]."""
    rows = rows.assign(_loss=loss_value(rows, metric)).sort_values([cost, "_loss", "point"], kind="stable")
    if not (rows[cost] > 0).all():
        raise ConfigError(f"a {cost} of 0 has no logarithm; leave such points out, or measure them again")
    costs, values = (rows[column].to_numpy(dtype=float) for column in (cost, "_loss"))
    return frontier_points(costs, values, standard_errors(rows, metric), num_replicates, seed)


def _best_of_each_size(rows: pd.DataFrame, metric: str, num_replicates: int, seed: int) -> tuple[Floats, Floats]:
    """Parameters [M] of the sizes, and the best value of each with replicates, [1 + R, M]; sizes without a value above 0 are
    left out."""
    parameters, columns = [], []
    for index, size in enumerate(sizes_in_order(rows)):
        points = rows[rows["size"] == size]
        losses, errors = loss_value(points, metric), standard_errors(points, metric)
        _, values = frontier_points(np.ones(len(points)), losses, errors, num_replicates, seed + index)
        if values.shape[1]:
            parameters.append(float(points["num_parameters"].iloc[0]))
            columns.append(values[:, 0])
    num_rows = min((len(column) for column in columns), default=1)  # 1 if a score has no interval
    stacked = [column[:num_rows] for column in columns] or [np.empty((1, 0))]
    return np.array(parameters), np.column_stack(stacked)


def _coordinates(rows: pd.DataFrame, costs: Floats, cost: str) -> Floats:
    """Logarithms of a size's parameters, and of its costs divided by the cost of its cheapest step, [2, M]."""
    unit = float((rows[cost] / rows["num_steps"]).min())
    return np.stack([np.full(len(costs), math.log(rows["num_parameters"].iloc[0])), np.log(costs / unit)])


def _evaluate_law(fits: Floats, x: Floats) -> Floats:
    """Logarithms of the laws' values, [1 + R, K], from their parameters [1 + R, 2V + 1] (`fit_terms`) at x [V, K]."""
    num_variables = len(x)
    terms = fits[:, :num_variables, None] - fits[:, num_variables:-1, None] * x
    asymptote = np.broadcast_to(fits[:, -1:, None], (len(fits), 1, x.shape[1]))
    return np.logaddexp.reduce(np.concatenate([terms, asymptote], axis=1), axis=1)


def _predictions(costs: Floats, logs: Floats, scatter: float, measured: Floats, seed: int) -> list[Prediction]:
    """The predictions at costs [K], from the logarithms [1 + R, K] of the law's values, and the measured frontier [K]."""
    values = np.exp(logs[0])
    scattered = np.exp(logs + scatter * np.random.default_rng(seed).standard_normal(logs.shape))
    has_interval = len(logs) > 1
    low, high = np.quantile(scattered[1:], TAILS, axis=0) if has_interval else np.full((2, len(costs)), np.nan)
    return [
        Prediction(
            cost=float(costs[index]),
            predicted=float(values[index]),
            low=float(low[index]) if has_interval else None,
            high=float(high[index]) if has_interval else None,
            measured=float(measured[index]),
            relative_error=float(values[index] / measured[index] - 1),
            covers=bool(low[index] <= measured[index] <= high[index]) if has_interval else None,
        )
        for index in range(len(costs))
    ]
