"""The frontier with what is not known of it: bands, the best size at a budget, and the budgets at which the best size changes.

Every point's score is drawn again from its own 95 % interval, taken as normal (deviation = width / 3.92) and apart from the
others', and everything is found anew in each redraw, choices of guidance, steps and solver included.

The least of several noisy scores flatters its point: it was chosen for its luck as well. In a redraw the truth is known, it is
what was observed; so what a redraw's winner shows less what that point truly has is the winner's error, and the frontier is
the observed least less those errors (the basic bootstrap interval, Davison and Hinkley 1997, section 5.2, of a score that was
chosen). A frontier cannot rise with the budget, so each redraw is made monotone. `observed` keeps the least as it was measured.

Crossings put the sizes in the order of their parameters and find, in each redraw, the budgets at which to go over to a larger
one so that the mean score over the logarithm of the budget is best; a smaller size is never gone back to. Lone budgets at
which noise, or the coarse steps of a grid, puts another size ahead thus change nothing; `against_order` says how much they are.

What the intervals leave out: points of a study share their noise and captions, so differences between them are better known
than redraws of each apart say (the verdicts err towards undecided); another training seed would move whole sizes together.

Shapes: N points in rising cost, B budgets at which the frontier may change, S sizes, R redraws; row 0 of [1 + R] is the
estimate itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from isocost.analysis.costs import COSTS, cost_of
from isocost.analysis.formatting import ROUNDING, format_number, format_score
from isocost.analysis.pareto import BEYOND, metric_of
from isocost.analysis.results_table import deviations, final_points, rank_points, sizes_in_order
from isocost.errors import ConfigError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
DECIDED = 0.95
"""Share of redraws in which a size must be the best to be called so."""
TAILS = (0.025, 0.975)


@dataclass(frozen=True)
class BestSize:
    """The best size within a budget, and the frontier's value there.

    `observed` is the best score measured, `value` what its point is thought to have, with its pointwise 95 % band; `share` the
    share of redraws in which the size is the best, `shares` that of every size that fits. None where an interval is missing.
    `beyond_data` is as in `isocost.analysis.frontier.BudgetChoice`.
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
        """Whether the size is told apart from the others: the best in at least 95 % of the redraws."""
        return self.share is not None and self.share >= DECIDED

    def __str__(self) -> str:
        told = f"{self.size} at {cost_of(self.cost).amount(self.budget)}: {format_score(self.value, self.low, self.high)}"
        if self.share is None:
            return f"{told}, undecided: an interval is missing"
        return f"{told}, the best size in {self.share:.0%} of redraws{'' if self.is_decided else ', undecided'}"


@dataclass(frozen=True)
class Crossing:
    """The budget from which `larger`, or a still larger size, is better than `smaller`, with its 95 % interval.

    `high` is None where more than 1 in 40 redraws never go over: the interval has no upper end within the data, and the
    two sizes are not told apart. `share` is the share of redraws that go over; all three are None where an interval is missing.
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
        """Whether the larger size does take over within the data."""
        return self.high is not None

    def __str__(self) -> str:
        told = f"{self.smaller} to {self.larger} at {format_number(self.budget)}"
        if self.low is None or self.share is None:
            return f"{told} {cost_of(self.cost).unit}, undecided: an interval is missing"
        if self.high is None:
            low = format_number(self.low)
            return f"{told} [{low}, none] {cost_of(self.cost).unit}, undecided: {1 - self.share:.0%} of redraws never go over"
        return f"{told} [{format_number(self.low)}, {format_number(self.high)}] {cost_of(self.cost).unit}"


@dataclass(frozen=True, eq=False)
class Bands:
    """The frontier as a step function of the budget; each entry holds from its budget up to the next.

    Attributes:
        sizes: smallest first, [S].
        budgets: costs at which a point comes in, rising, [B].
        observed: best score measured within the budget, [B].
        value: the frontier, corrected for the winner's luck, [B].
        low: lower end of the pointwise 95 % band, [B]; NaN where the best point has no interval.
        high: upper end, [B].
        best: place of the best size in `sizes`, [B].
        shares: share of redraws in which each size is the best, [S, B]; NaN where the best point of a size has no interval.
        crossings: where the best size changes, from small to large.
        against_order: share of the range of budgets, in logarithms, in which a size is decidedly best that the crossings do not
            have there. Where it is large they do not describe the table.
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
            raise ConfigError(f"a budget is a positive number, not {budget:g}")
        at = int(np.searchsorted(self.budgets, budget * (1 + ROUNDING), side="right")) - 1
        if at < 0:
            asked, least = (cost_of(self.cost).amount(value) for value in (budget, self.budgets[0]))
            raise ConfigError(f"a budget of {asked} is below every point; the cheapest costs {least}")
        shares = self.shares[:, at]
        is_known = not bool(np.isnan(shares).any())
        low, high = float(self.low[at]), float(self.high[at])
        return BestSize(
            budget=float(budget),
            cost=self.cost,
            metric=self.metric,
            size=self.sizes[self.best[at]],
            observed=float(self.observed[at]),
            value=float(self.value[at]),
            low=None if math.isnan(low) else low,
            high=None if math.isnan(high) else high,
            share=float(shares[self.best[at]]) if is_known else None,
            shares=dict(zip(self.sizes, shares.tolist(), strict=True)) if is_known else None,
            beyond_data=bool(budget > self.budgets[-1] * BEYOND),
        )

    @property
    def is_decided(self) -> Bools:
        """Whether the best size is told apart from the others at each budget, [B]."""
        return np.nan_to_num(np.take_along_axis(self.shares, self.best[None], axis=0)[0]) >= DECIDED

    def table(self) -> pd.DataFrame:
        """One row a budget: budget, size, share, is_decided, observed, value, low, high."""
        return pd.DataFrame(
            {
                "budget": self.budgets,
                "size": [self.sizes[at] for at in self.best],
                "share": np.take_along_axis(self.shares, self.best[None], axis=0)[0],
                "is_decided": self.is_decided,
                "observed": self.observed,
                "value": self.value,
                "low": self.low,
                "high": self.high,
            }
        )


def frontier_bands(table: pd.DataFrame, cost: str, metric: str, num_replicates: int = 1000, seed: int = 0) -> Bands:
    """The frontier under a cost of `COSTS` with its bands, the best size at every budget, and the crossings.

    Args:
        table: points as in `isocost.analysis.frontier`, of one line of models: few-step students in a table of their own.
        num_replicates: redraws of all scores, R; time and memory grow with it.
        seed: of the redraws.

    Raises:
        ConfigError: nothing competes, the points cannot be compared, or a cost is not above 0.
    """
    rows = rank_points(final_points(table, metric, cost), metric, cost).sort_values(cost, kind="stable")
    costs = rows[cost].to_numpy(dtype=float)
    if costs[0] <= 0:
        raise ConfigError(f"point {rows['point'].iloc[0]} has a {cost} of {costs[0]:g}: a cost is above 0; measure it again")
    sign = 1.0 if metric_of(metric).better == "lower" else -1.0
    values, spread = sign * rows[metric].to_numpy(dtype=float), deviations(rows, metric)
    by_name = np.argsort(rows["point"].to_numpy(dtype=str))  # the same redraws under every cost
    redrawn = np.empty((num_replicates, len(values)))
    redrawn[:, by_name] = redraw(values[by_name], spread[by_name], num_replicates, seed)
    ends = _last_of_equals(costs)
    whole = running_best(values, redrawn)[:, ends]
    low, high = np.quantile(whole[1:], TAILS, axis=0)
    low, high = np.minimum(low, whole[0]), np.maximum(high, whole[0])
    unknown = ~np.isfinite(spread)
    low[unknown[_leaders(values)[ends]]] = high[unknown[_leaders(values)[ends]]] = np.nan

    sizes = sizes_in_order(rows)
    names = rows["size"].to_numpy()
    curves, is_known = [], np.ones((len(sizes), len(ends)), dtype=bool)
    for number, size in enumerate(sizes):
        own = np.flatnonzero(names == size)
        count = np.searchsorted(own, ends, side="right")
        draws = running_best(values[own], redrawn[:, own])
        curves.append(np.where(count > 0, draws[:, np.maximum(count - 1, 0)], np.inf))
        is_known[number] = (count == 0) | ~unknown[own][_leaders(values[own])][np.maximum(count - 1, 0)]
    budgets = costs[ends]
    winners = _winners(curves)
    shares = np.stack([(winners[1:] == number).mean(0) for number in range(len(sizes))])
    shares[:, ~is_known.all(0)] = np.nan
    widths = np.append(np.diff(np.log(budgets)), math.log(BEYOND))
    levels = in_order(curves, widths)
    best = winners[0]
    share = np.take_along_axis(shares, best[None], axis=0)[0]
    contradicts = (np.nan_to_num(share) >= DECIDED) & (best != levels[0])
    return Bands(
        cost=cost,
        metric=metric,
        sizes=tuple(sizes),
        budgets=budgets,
        observed=sign * np.minimum.accumulate(values)[ends],
        value=sign * whole[0],
        low=sign * (low if sign > 0 else high),
        high=sign * (high if sign > 0 else low),
        best=best,
        shares=shares,
        crossings=tuple(_crossings(cost, sizes, budgets, levels, bool(is_known.all()))),
        against_order=float(widths[contradicts].sum() / widths.sum()),
    )


def format_bands(table: pd.DataFrame, metric: str) -> dict[str, Any]:
    """For a report, by cost: where the best size changes, and at how many of the budgets it is told apart."""
    told: dict[str, Any] = {}
    for cost in COSTS.values():
        if table.loc[table["is_final"].astype(bool), cost.name].isna().all():
            continue
        found = frontier_bands(table, cost.name, metric)
        crossings = [str(crossing) for crossing in found.crossings] or [f"{found.sizes[found.best[-1]]} at every budget"]
        if found.against_order > 0:
            crossings.append(f"over {found.against_order:.0%} of the range of budgets another size is decidedly best")
        told[cost.label] = {
            "best size": crossings,
            "told apart": f"at {int(found.is_decided.sum())} of {len(found.budgets)} budgets, in 95 % of redraws or more",
        }
    return told


def redraw(values: Floats, spread: Floats, num_replicates: int, seed: int) -> Floats:
    """Scores [R, N] drawn from normals about values [N] with deviations `spread` [N]; a score without one stays as it is."""
    noise = np.random.default_rng(seed).standard_normal((num_replicates, len(values)))
    return values + np.where(np.isfinite(spread), spread, 0.0) * noise


def running_best(values: Floats, redrawn: Floats) -> Floats:
    """The least of the first n scores, less the luck of whichever is the least: [1 + R, N], falling along n.

    Args:
        values: scores of which less is better, [N].
        redrawn: the same drawn again, [R, N].
    """
    leaders = _leaders(redrawn)
    errors = np.minimum.accumulate(redrawn, axis=-1) - values[leaders]
    draws = np.minimum.accumulate(values) - np.concatenate([errors.mean(0, keepdims=True), errors])
    return np.minimum.accumulate(draws, axis=-1)


def in_order(curves: Sequence[Floats], widths: Floats) -> NDArray[np.int64]:
    """Which of S curves [1 + R, B] to follow at each budget, never back to an earlier one, so that the sum of their values
    times `widths` [B] is least: [1 + R, B]."""
    num_rows, num_budgets = curves[0].shape
    rows = np.arange(num_rows)
    came_from = np.zeros((num_budgets, len(curves), num_rows), dtype=np.int16)
    totals = [curve[:, 0] * widths[0] for curve in curves]
    for at in range(1, num_budgets):
        least, origin = totals[0], np.zeros(num_rows, dtype=np.int16)
        for number, curve in enumerate(curves):
            origin = np.where(totals[number] < least, np.int16(number), origin)
            least = np.minimum(totals[number], least)
            came_from[at, number] = origin
            totals[number] = least + widths[at] * curve[:, at]
    levels = np.zeros((num_rows, num_budgets), dtype=np.int64)
    level = np.argmin(np.stack(totals), axis=0)
    for at in range(num_budgets - 1, -1, -1):
        levels[:, at] = level
        level = came_from[at, level, rows]
    return levels


def frontier_points(x: Floats, values: Floats, spread: Floats, num_replicates: int, seed: int) -> tuple[Floats, Floats]:
    """The x at which the frontier falls, [M], and its values there, [1 + R, M]: row 0 itself, then its redraws.

    Only values above 0 count, for laws in logarithms. There are no redraws where a score has no interval.

    Args:
        x: what the points cost, rising, [N].
        values: of which less is better, [N].
        spread: their standard deviations, [N].
    """
    draws = running_best(values, redraw(values, spread, num_replicates, seed))
    ends = _last_of_equals(x)
    draws = draws[: None if np.isfinite(spread).all() else 1, ends]
    falls = (np.diff(draws[0], prepend=np.inf) < 0) & (draws[0] > 0)
    return x[ends][falls], draws[:, falls]


def _last_of_equals(x: Floats) -> NDArray[np.int64]:
    """Places of rising numbers [N] behind which a larger one comes."""
    return np.unique(np.searchsorted(x, x * (1 + ROUNDING), side="right") - 1)


def _leaders(values: Floats) -> NDArray[np.int64]:
    """Place of the first of the least among the first n, for every n, along the last axis."""
    least = np.minimum.accumulate(values, axis=-1)
    is_new = np.ones(values.shape, dtype=bool)
    is_new[..., 1:] = least[..., 1:] < least[..., :-1]
    return np.maximum.accumulate(np.where(is_new, np.arange(values.shape[-1]), 0), axis=-1)


def _winners(curves: Sequence[Floats]) -> NDArray[np.int64]:
    """Place of the least of S curves [1 + R, B] everywhere; the first of equals."""
    best, winners = curves[0], np.zeros(curves[0].shape, dtype=np.int64)
    for number, curve in enumerate(curves[1:], start=1):
        winners = np.where(curve < best, number, winners)
        best = np.minimum(curve, best)
    return winners


def _crossings(cost: str, sizes: Sequence[str], budgets: Floats, levels: NDArray[np.int64], is_known: bool) -> list[Crossing]:
    """Where the estimate's level changes, and where the redraws reach the same level."""
    edges = np.append(budgets, np.inf)
    found = []
    for at in np.flatnonzero(np.diff(levels[0])) + 1:
        smaller, larger = int(levels[0, at - 1]), int(levels[0, at])
        reached = levels[1:] >= larger
        budget = float(budgets[at])
        low = high = share = None
        if is_known:
            starts = edges[np.where(reached.any(1), reached.argmax(1), len(budgets))]
            least, most = np.quantile(starts, TAILS, method="inverted_cdf")
            low, share = min(float(least), budget), float(np.isfinite(starts).mean())
            high = max(float(most), budget) if np.isfinite(most) else None
        found.append(Crossing(cost, sizes[smaller], sizes[larger], budget, low, high, share))
    return found
