"""The cost-quality frontier with confidence bands, the best size at a budget, and the budgets at which the best size changes.

All intervals come from a bootstrap. If the resamples of all points are stored, they are the replicates: the points share
noise, prompts and reference images, so their errors are paired. Otherwise the bootstrap is parametric. Each replicate then
draws every point's score from a normal distribution around the observed score, independently of the other points. The standard
deviation is the width of the score's 95 % interval divided by 3.92. All results are computed again for each replicate,
including the choices of guidance, steps and solver.

The minimum of several noisy scores is too optimistic (winner's curse). In a replicate the observed scores act as the truth, so
the optimism of the selected point is its replicate score minus its observed score. This bias is subtracted from the observed
minimum (the basic bootstrap interval, Davison and Hinkley 1997, section 5.2, of a selected score). A frontier cannot get worse
with the budget, so each replicate is made monotone. `observed` is the minimum without this correction.

For the crossings the sizes are ordered by their number of parameters. For each replicate we find the budgets at which to switch
to a larger size, never back to a smaller one, that optimise the mean score over the logarithm of the budget. Single budgets at
which noise, or the coarse grid of steps, puts another size ahead therefore change nothing; `against_order` measures them.

Another training seed would move all points of a size; this effect is not included. Without resamples the noise that points
share is not included either: differences are then known better than independent replicates suggest, and verdicts err towards
undecided.

Shapes: N points in rising cost, B budgets at which the frontier may change, S sizes, R bootstrap replicates; row 0 of [1 + R]
is the estimate itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from isocost.analysis.costs import REPORT_COSTS, cost_of, is_measured
from isocost.analysis.formatting import ROUNDING, format_number, format_score
from isocost.analysis.paired_decisions import Resamples, joint_replicates
from isocost.analysis.pareto import BEYOND_DATA_FACTOR
from isocost.analysis.results_table import final_points, rank_points, sizes_in_order, standard_errors
from isocost.errors import ConfigError
from isocost.evaluation.metric_registry import metric_of

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
DECIDED = 0.95
"""The best size is decided if it is the best in at least this fraction of the replicates."""
TAILS = (0.025, 0.975)
"""Quantiles at the ends of a 95 % interval."""


@dataclass(frozen=True)
class BestSize:
    """The best size within a budget, and the frontier there.

    Attributes:
        observed: the best measured score.
        value: the frontier, corrected for selection bias; `low` and `high` are its pointwise 95 % band. The band is None if an
            interval is missing.
        share: fraction of replicates in which the size is the best; None if an interval is missing.
        shares: the same for every size.
        beyond_data: as in `isocost.analysis.pareto.BudgetChoice`.
    """

    budget: float
    cost: str
    metric: str
    size: str
    observed: float
    value: float
    low: float | None
    high: float | None
    share: float | None
    shares: dict[str, float] | None
    beyond_data: bool

    @property
    def is_decided(self) -> bool:
        """Whether the size is the best in at least 95 % of the replicates."""
        return self.share is not None and self.share >= DECIDED

    def __str__(self) -> str:
        budget = cost_of(self.cost).format_amount(self.budget)
        text = f"{self.size} at {budget}: {format_score(self.value, self.low, self.high)}"
        if self.share is None:
            return f"{text}, undecided: an interval is missing"
        return f"{text}, best size in {self.share:.0%} of bootstrap replicates{'' if self.is_decided else ', undecided'}"


@dataclass(frozen=True)
class Crossing:
    """The budget from which `larger`, or an even larger size, is better than `smaller`, with its 95 % interval.

    Attributes:
        low: lower end of the interval.
        high: upper end; None if more than 1 in 40 replicates never switch to the larger size. The interval then has no upper
            end within the data, and the crossing is undecided.
        share: fraction of replicates that switch. It is None, like `low` and `high`, if the interval of a score is missing.
    """

    cost: str
    smaller: str
    larger: str
    budget: float
    low: float | None
    high: float | None
    share: float | None

    @property
    def is_decided(self) -> bool:
        """Whether the larger size becomes the better one within the data."""
        return self.high is not None

    def __str__(self) -> str:
        text, unit = f"{self.smaller} to {self.larger} at {format_number(self.budget)}", cost_of(self.cost).unit
        if self.low is None or self.share is None:
            return f"{text} {unit}, undecided: an interval is missing"
        if self.high is None:
            interval, fraction = f"[{format_number(self.low)}, none]", f"{1 - self.share:.0%}"
            return f"{text} {interval} {unit}, undecided: {fraction} of bootstrap replicates never switch"
        return f"{text} [{format_number(self.low)}, {format_number(self.high)}] {unit}"


@dataclass(frozen=True, eq=False)
class FrontierBands:
    """The frontier with confidence bands, as a step function: each entry holds from its budget up to the next one.

    Attributes:
        sizes: names, smallest first, [S].
        budgets: the costs of the points, rising, [B].
        observed: best measured score within the budget, [B].
        value: the frontier, corrected for selection bias, [B].
        low: lower end of the pointwise 95 % band, [B]; NaN if the best point has no interval.
        high: upper end, [B].
        best: index of the best size in `sizes`, [B].
        shares: fraction of replicates in which each size is the best, [S, B]; NaN if the best point of a size has no interval.
        crossings: the budgets at which the best size changes, from small to large.
        against_order: fraction of the range of log budgets in which another size than that of the crossings is decidedly best.
            If it is large, the crossings do not describe the table.
    """

    cost: str
    metric: str
    sizes: tuple[str, ...]
    budgets: Floats
    observed: Floats
    value: Floats
    low: Floats
    high: Floats
    best: NDArray[np.int64]
    shares: Floats
    crossings: tuple[Crossing, ...]
    against_order: float

    def at(self, budget: float) -> BestSize:
        """The best size with cost <= budget.

        Raises:
            ConfigError: the budget is not a positive number, or lies below every point.
        """
        if not (math.isfinite(budget) and budget > 0):
            raise ConfigError(f"a budget must be a positive number, not {budget:g}")
        index = int(np.searchsorted(self.budgets, budget * (1 + ROUNDING), side="right")) - 1
        if index < 0:
            requested, lowest = (cost_of(self.cost).format_amount(amount) for amount in (budget, self.budgets[0]))
            raise ConfigError(f"a budget of {requested} is below every point; the cheapest costs {lowest}")
        shares = self.shares[:, index]
        is_known = not bool(np.isnan(shares).any())
        low, high = float(self.low[index]), float(self.high[index])
        return BestSize(
            budget=float(budget),
            cost=self.cost,
            metric=self.metric,
            size=self.sizes[self.best[index]],
            observed=float(self.observed[index]),
            value=float(self.value[index]),
            low=None if math.isnan(low) else low,
            high=None if math.isnan(high) else high,
            share=float(shares[self.best[index]]) if is_known else None,
            shares=dict(zip(self.sizes, shares.tolist(), strict=True)) if is_known else None,
            beyond_data=bool(budget > self.budgets[-1] * BEYOND_DATA_FACTOR),
        )

    @property
    def is_decided(self) -> Bools:
        """Whether the best size at each budget is the best in at least 95 % of the bootstrap replicates, [B]."""
        return np.nan_to_num(np.take_along_axis(self.shares, self.best[None], axis=0)[0]) >= DECIDED

    def table(self) -> pd.DataFrame:
        """One row per budget: budget, size, share, is_decided, observed, value, low, high."""
        return pd.DataFrame(
            {
                "budget": self.budgets,
                "size": [self.sizes[index] for index in self.best],
                "share": np.take_along_axis(self.shares, self.best[None], axis=0)[0],
                "is_decided": self.is_decided,
                "observed": self.observed,
                "value": self.value,
                "low": self.low,
                "high": self.high,
            }
        )


def frontier_bands(
    table: pd.DataFrame,
    cost: str,
    metric: str,
    num_replicates: int = 1000,
    seed: int = 0,
    resamples: Resamples | None = None,
) -> FrontierBands:
    """Compute the frontier under a cost, with its confidence bands, the best size at every budget, and the crossings.

    Args:
        table: points of one family of models; put few-step students in a separate table.
        cost: a name of `COSTS`.
        num_replicates: number of parametric bootstrap replicates, R; time and memory grow with it.
        seed: random seed of these replicates.
        resamples: resamples of the points by `metric`; where all points have them, they are the replicates.

    Raises:
        ConfigError: there are no final points, the scores cannot be compared, or a cost is not above 0.
    """
    rows = rank_points(final_points(table, metric, cost), metric, cost).sort_values(cost, kind="stable")
    costs = rows[cost].to_numpy(dtype=float)
    if costs[0] <= 0:
        raise ConfigError(
            f"point {rows['point'].iloc[0]} has a {cost} of {costs[0]:g}: a cost must be above 0; measure it again"
        )
    sign = 1.0 if metric_of(metric).better == "lower" else -1.0
    values, errors = sign * rows[metric].to_numpy(dtype=float), standard_errors(rows, metric)
    paired = joint_replicates(rows, metric, resamples or {})
    if paired is None:
        by_name = np.argsort(rows["point"].to_numpy(dtype=str))  # the same replicates under every cost
        replicates = np.empty((num_replicates, len(values)))
        replicates[:, by_name] = draw_replicates(values[by_name], errors[by_name], num_replicates, seed)
    else:
        replicates = paired
    ends = _last_of_equals(costs)
    frontier = corrected_running_minimum(values, replicates)[:, ends]
    low, high = np.quantile(frontier[1:], TAILS, axis=0)
    low, high = np.minimum(low, frontier[0]), np.maximum(high, frontier[0])
    has_no_interval = ~np.isfinite(errors)
    band_is_missing = has_no_interval[_running_argmin(values)[ends]]
    low[band_is_missing] = high[band_is_missing] = np.nan

    sizes = sizes_in_order(rows)
    names = rows["size"].to_numpy()
    curves, is_known = [], np.ones((len(sizes), len(ends)), dtype=bool)
    for index, size in enumerate(sizes):
        points = np.flatnonzero(names == size)
        count = np.searchsorted(points, ends, side="right")
        curve = corrected_running_minimum(values[points], replicates[:, points])
        curves.append(np.where(count > 0, curve[:, np.maximum(count - 1, 0)], np.inf))
        is_known[index] = (count == 0) | ~has_no_interval[points][_running_argmin(values[points])][np.maximum(count - 1, 0)]
    budgets = costs[ends]
    winners = _argmin_of_curves(curves)
    shares = np.stack([(winners[1:] == index).mean(0) for index in range(len(sizes))])
    shares[:, ~is_known.all(0)] = np.nan
    widths = np.append(np.diff(np.log(budgets)), math.log(BEYOND_DATA_FACTOR))
    levels = best_ordered_path(curves, widths)
    best = winners[0]
    share = np.take_along_axis(shares, best[None], axis=0)[0]
    contradicts = (np.nan_to_num(share) >= DECIDED) & (best != levels[0])
    return FrontierBands(
        cost=cost,
        metric=metric,
        sizes=tuple(sizes),
        budgets=budgets,
        observed=sign * np.minimum.accumulate(values)[ends],
        value=sign * frontier[0],
        low=sign * (low if sign > 0 else high),
        high=sign * (high if sign > 0 else low),
        best=best,
        shares=shares,
        crossings=tuple(_crossings(cost, sizes, budgets, levels, bool(is_known.all()))),
        against_order=float(widths[contradicts].sum() / widths.sum()),
    )


def format_best_sizes(table: pd.DataFrame, metric: str, resamples: Resamples | None = None) -> dict[str, Any]:
    """Text for a report, by cost: the budgets at which the best size changes, and how often the best size is decided.

    `resamples` are those of the points by `metric`.
    """
    texts: dict[str, Any] = {}
    for cost in map(cost_of, REPORT_COSTS):
        if not is_measured(table[table["is_final"].astype(bool)], cost.name):
            continue
        bands = frontier_bands(table, cost.name, metric, resamples=resamples)
        crossings = [str(crossing) for crossing in bands.crossings] or [f"{bands.sizes[bands.best[-1]]} at every budget"]
        if bands.against_order > 0:
            crossings.append(f"another size is decidedly best over {bands.against_order:.0%} of the range of budgets")
        num_decided = int(bands.is_decided.sum())
        texts[cost.label] = {
            "best size": crossings,
            "decided": f"at {num_decided} of {len(bands.budgets)} budgets (best in at least 95 % of bootstrap replicates)",
        }
    return texts


def draw_replicates(values: Floats, errors: Floats, num_replicates: int, seed: int) -> Floats:
    """Draw bootstrap replicates of scores from normal distributions.

    Args:
        values: observed scores, the means of the distributions, [N].
        errors: standard errors, [N]; a score without one (NaN) is the same in all replicates.
        num_replicates: number of replicates R.
        seed: seed of the random numbers.

    Returns:
        The replicates, [R, N].
    """
    noise = np.random.default_rng(seed).standard_normal((num_replicates, len(values)))
    return values + np.where(np.isfinite(errors), errors, 0.0) * noise


def corrected_running_minimum(values: Floats, replicates: Floats) -> Floats:
    """The minimum of the first n scores, corrected for selection bias, for every n.

    Args:
        values: scores, lower is better, [N].
        replicates: bootstrap replicates of the scores, [R, N].

    Returns:
        The estimate and its replicates, [1 + R, N], falling along n.
    """
    selected = _running_argmin(replicates)
    bias = np.minimum.accumulate(replicates, axis=-1) - values[selected]
    corrected = np.minimum.accumulate(values) - np.concatenate([bias.mean(0, keepdims=True), bias])
    return np.minimum.accumulate(corrected, axis=-1)


def best_ordered_path(curves: Sequence[Floats], widths: Floats) -> NDArray[np.int64]:
    """Choose a curve for each budget so that the sum of values times widths is least; the curve's index never falls.

    Args:
        curves: S curves, [1 + R, B] each.
        widths: weight of each budget, [B].

    Returns:
        Index of the curve, [1 + R, B].
    """
    num_rows, num_budgets = curves[0].shape
    rows = np.arange(num_rows)
    previous_level = np.zeros((num_budgets, len(curves), num_rows), dtype=np.int16)
    totals = [curve[:, 0] * widths[0] for curve in curves]
    for budget in range(1, num_budgets):
        lowest, origin = totals[0], np.zeros(num_rows, dtype=np.int16)
        for index, curve in enumerate(curves):
            origin = np.where(totals[index] < lowest, np.int16(index), origin)
            lowest = np.minimum(totals[index], lowest)
            previous_level[budget, index] = origin
            totals[index] = lowest + widths[budget] * curve[:, budget]
    levels = np.zeros((num_rows, num_budgets), dtype=np.int64)
    level = np.argmin(np.stack(totals), axis=0)
    for budget in range(num_budgets - 1, -1, -1):
        levels[:, budget] = level
        level = previous_level[budget, level, rows]
    return levels


def frontier_points(x: Floats, values: Floats, errors: Floats, num_replicates: int, seed: int) -> tuple[Floats, Floats]:
    """The points at which the frontier falls.

    Only values above 0 count, because a law is fitted to logarithms.

    Args:
        x: costs of the points, rising, [N].
        values: lower is better, [N].
        errors: standard errors of the values, [N].

    Returns:
        The costs, [M], and the frontier with its replicates, [1 + R, M]. There are no replicates if a score has no interval.
    """
    frontier = corrected_running_minimum(values, draw_replicates(values, errors, num_replicates, seed))
    ends = _last_of_equals(x)
    frontier = frontier[: None if np.isfinite(errors).all() else 1, ends]
    falls = (np.diff(frontier[0], prepend=np.inf) < 0) & (frontier[0] > 0)
    return x[ends][falls], frontier[:, falls]


def _last_of_equals(x: Floats) -> NDArray[np.int64]:
    """Index of the last number of every run of equal numbers, of rising numbers [N]."""
    return np.unique(np.searchsorted(x, x * (1 + ROUNDING), side="right") - 1)


def _running_argmin(values: Floats) -> NDArray[np.int64]:
    """Index of the minimum of the first n numbers, for every n, along the last axis; the first of equals."""
    minimum = np.minimum.accumulate(values, axis=-1)
    is_new = np.ones(values.shape, dtype=bool)
    is_new[..., 1:] = minimum[..., 1:] < minimum[..., :-1]
    return np.maximum.accumulate(np.where(is_new, np.arange(values.shape[-1]), 0), axis=-1)


def _argmin_of_curves(curves: Sequence[Floats]) -> NDArray[np.int64]:
    """Index of the lowest of S curves [1 + R, B] at every entry; the first of equals."""
    lowest, winners = curves[0], np.zeros(curves[0].shape, dtype=np.int64)
    for index, curve in enumerate(curves[1:], start=1):
        winners = np.where(curve < lowest, index, winners)
        lowest = np.minimum(curve, lowest)
    return winners


def _crossings(cost: str, sizes: Sequence[str], budgets: Floats, levels: NDArray[np.int64], is_known: bool) -> list[Crossing]:
    """The crossings of the estimate, row 0 of `levels` [1 + R, B], with intervals from the budgets of the replicates."""
    edges = np.append(budgets, np.inf)
    crossings = []
    for index in np.flatnonzero(np.diff(levels[0])) + 1:
        smaller, larger = int(levels[0, index - 1]), int(levels[0, index])
        has_switched = levels[1:] >= larger
        budget = float(budgets[index])
        low = high = share = None
        if is_known:
            starts = edges[np.where(has_switched.any(1), has_switched.argmax(1), len(budgets))]
            lower, upper = np.quantile(starts, TAILS, method="inverted_cdf")
            low, share = min(float(lower), budget), float(np.isfinite(starts).mean())
            high = max(float(upper), budget) if np.isfinite(upper) else None
        crossings.append(Crossing(cost, sizes[smaller], sizes[larger], budget, low, high, share))
    return crossings
