"""The effect of guide networks at equal cost: frontiers by way of guidance, differences, and the best guide of each network.

A point belongs to one of five ways of guidance, by the steps that are guided:

none                                 no step is guided (w = 1)
classifier-free                      every step, by the network itself with the empty prompt (arXiv 2207.12598)
classifier-free within an interval   some steps (arXiv 2404.07724)
guide                                every step, by a guide network (autoguidance, arXiv 2406.02507)
guide within an interval             some steps, by a guide network

The guided steps are counted, not read from the settings. So an interval or a schedule that guides every step counts as guidance
at all steps, and one that guides no step counts as none. A network that takes w as an input has no second passes to count: its
points with an interval or a schedule count as none.

Every group of points is represented by its best point within a cost. The best of many noisy scores is too optimistic, and more
so the more points a group has; a sweep usually has more points with a guide than without one. So the expected optimism of both
groups is subtracted from their difference. It comes from the bootstrap of `frontier_ci`, in which every score has the noise of
one side of the difference: the standard error of the difference divided by the square root of 2. If the difference is paired,
the noise that all points share does not count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from isocost.analysis.costs import COSTS, cost_of, is_measured
from isocost.analysis.formatting import format_metric, format_number, format_row, format_row_guidance, format_score
from isocost.analysis.frontier_ci import corrected_running_minimum, draw_replicates
from isocost.analysis.iso_cost import PairedDifferences, classify, difference_between, format_difference
from isocost.analysis.pareto import default_budgets
from isocost.analysis.results_table import INTERVAL_WIDTH, final_points, is_within_budget, rank_points, sizes_in_order
from isocost.diffusion.guidance import NO_GUIDANCE
from isocost.diffusion.solvers import SOLVERS
from isocost.errors import ConfigError
from isocost.evaluation.confidence_intervals import Interval
from isocost.evaluation.metric_registry import METRICS, metric_of

WAYS = (NONE, CLASSIFIER_FREE, CLASSIFIER_FREE_INTERVAL, GUIDE, GUIDE_INTERVAL) = (
    "none",
    "classifier-free",
    "classifier-free within an interval",
    "guide",
    "guide within an interval",
)
"""Ways of guidance."""
WITH_GUIDE = (GUIDE, GUIDE_INTERVAL)
GUIDE_COSTS = ("gflop", "nfe", "ms_per_image", "latency_ms", "joules_per_image", "usd_per_1000")
"""Costs that count the passes of a guide. `normalized_cost` does not."""
NUM_BUDGETS = 4
NUM_REPLICATES = 400
"""Bootstrap replicates for the optimism of a selected score."""
NOT_SHOWN = "no difference is shown"


@dataclass(frozen=True)
class Difference:
    """The score of one point minus that of another.

    Attributes:
        interval: the difference; None if one of the scores has no interval.
        is_paired: whether the two points share their noise, image by image.
        verdict: whether the first point is "better" or "worse", or `NOT_SHOWN` if the interval contains 0.
    """

    interval: Interval | None
    is_paired: bool
    verdict: str

    @property
    def amount(self) -> str:
        """The difference with its interval: "-0.35 [-0.55, -0.18] (not paired)"."""
        return format_difference(self.interval, self.is_paired)

    def __str__(self) -> str:
        return f"{self.amount}: {self.verdict}"


@dataclass(frozen=True)
class GuideComparison:
    """All ways of guidance at one cost.

    Attributes:
        best: way of guidance -> score and configuration of its best point within the budget.
        difference: the best point with a guide minus the best point without one; None if one of the two does not fit.
        other_metrics: metric -> the difference of the same two points by this metric.
    """

    budget: float
    cost: str
    metric: str
    best: Mapping[str, tuple[str, str]]
    difference: Difference | None
    other_metrics: Mapping[str, Difference]

    @property
    def verdict(self) -> str:
        """The verdict on the guide, or the reason why there is none."""
        if self.difference is None:
            missing = "without" if any(way in self.best for way in WITH_GUIDE) else "with"
            return f"no point {missing} a guide fits"
        return self.difference.verdict


@dataclass(frozen=True)
class BestGuide:
    """The best guide of a network at one number of steps, and the best point of the network without a guide at the same cost.

    Attributes:
        size: name of the guided network.
        guide: label of the guide: its size, then "@IMAGES" for a snapshot and "/null" for the empty prompt.
        guidance: w, interval or schedule, in running text.
        cost: of the point, in the unit of the requested cost.
        score: with its interval.
        unguided: score and configuration of the best point without a guide that costs at most as much; None if none does.
        difference: the point with the guide minus that point.
    """

    size: str
    num_steps: int
    guide: str
    guidance: str
    cost: float
    score: str
    unguided: tuple[str, str] | None
    difference: Difference | None


@dataclass(frozen=True)
class GuideChange:
    """The best point of a network with one guide, relative to the network with classifier-free guidance at the same cost.

    Attributes:
        size: name of the guided network.
        guide: label of the guide.
        change: the score divided by that of the best point of the network without guidance, or with classifier-free guidance at
            all steps, that costs at most as much; minus 1. NaN if there is no such point, or its score is not above 0.
        configuration: of the point with the guide.
        score: of the point with the guide, with its interval.
        reference: score and configuration of the other point; "" without one.
        is_best: whether no other guide has a better score with this network.
    """

    size: str
    guide: str
    change: float
    configuration: str
    score: str
    reference: str
    is_best: bool


def has_guides(table: pd.DataFrame) -> bool:
    """Whether a point of a final checkpoint has a guide network."""
    return "guide" in table.columns and bool(table.loc[table["is_final"].astype(bool), "guide"].notna().any())


def way_of_guidance(row: Mapping[Any, Any]) -> str:
    """The way of guidance of a point, one of `WAYS`.

    Args:
        row: a row of a results table.

    Returns:
        The way, by the number of guided steps.
    """
    has_guide = not pd.isna(row.get("guide"))
    everywhere, somewhere = (GUIDE, GUIDE_INTERVAL) if has_guide else (CLASSIFIER_FREE, CLASSIFIER_FREE_INTERVAL)
    if pd.isna(row.get("guidance_interval")) and pd.isna(row.get("guidance_schedule")):
        return NONE if row["guidance"] == NO_GUIDANCE else everywhere
    if has_guide:
        num_guided = row["guide_nfe"]
        num_evaluations = row["nfe"] - num_guided
    else:
        solver = SOLVERS[str(row["solver"]).partition("/")[0]]
        num_evaluations = solver.num_function_evaluations(int(row["num_steps"]))
        num_guided = row["nfe"] - num_evaluations
    if num_guided == 0:
        return NONE
    return everywhere if num_guided == num_evaluations else somewhere


def points_by_way(table: pd.DataFrame, metric: str, cost: str) -> dict[str, pd.DataFrame]:
    """The competing points of every way of guidance, best first.

    Args:
        table: points, as in `isocost.analysis.results_table`.
        metric: the metric that ranks the points.
        cost: one of `GUIDE_COSTS`.

    Returns:
        Way of guidance -> points, in the order of `WAYS`; a way without points has an empty table.

    Raises:
        ConfigError: the cost does not count guides, or no point has a guide, or all points have one.
    """
    rows = _ranked(table, metric, cost)
    return {way: rows[rows["way"] == way] for way in WAYS}


def guide_costs(table: pd.DataFrame) -> list[str]:
    """The names of `GUIDE_COSTS` that a point with a guide and a point without one have.

    Raises:
        ConfigError: there is no such cost.
    """
    finished = table[table["is_final"].astype(bool)]
    has_guide = finished["guide"].notna()
    costs = [cost for cost in GUIDE_COSTS if is_measured(finished[has_guide], cost) and is_measured(finished[~has_guide], cost)]
    if not costs:
        raise ConfigError("points with a guide and points without one have no cost in common; add `none` to sweep.guides")
    return costs


def compare_guides(
    table: pd.DataFrame, metric: str, cost: str, pairs: PairedDifferences, budgets: Sequence[float] = ()
) -> list[GuideComparison]:
    """Compare the best point with a guide and the best point without one, over all networks, at equal cost.

    Args:
        table: points, as in `isocost.analysis.results_table`.
        metric: the metric that selects the points.
        cost: one of `GUIDE_COSTS`.
        pairs: paired differences between points; where it has none, the scores are treated as independent.
        budgets: in the unit of the cost; if empty, `NUM_BUDGETS` budgets from the cheapest cost at which both groups have a
            point to the highest cost.

    Returns:
        One comparison per budget. The other metrics judge the two points that `metric` selected.

    Raises:
        ConfigError: the cost does not count guides, or no point has a guide, or all points have one.
    """
    rows = _ranked(table, metric, cost)
    others = [name for name in METRICS if name != metric and name in rows.columns and rows[name].notna().any()]
    comparisons = []
    for budget in budgets or _budgets(rows, cost):
        within = rows[is_within_budget(rows[cost], budget)]
        guided, unguided = within[within["has_guide"]], within[~within["has_guide"]]
        best = {
            str(row["way"]): (_format_score(row, metric), format_row(row))
            for row in within.drop_duplicates("way").to_dict("records")
        }
        difference, other_metrics = None, {}
        if len(guided) and len(unguided):
            difference = _difference_of_best(guided, unguided, metric, cost, pairs)
            first, second = guided.iloc[0].to_dict(), unguided.iloc[0].to_dict()
            other_metrics = {
                name: _difference(first, second, name, pairs)
                for name in others
                if not (pd.isna(first[name]) or pd.isna(second[name]))
            }
        comparisons.append(GuideComparison(float(budget), cost, metric, best, difference, other_metrics))
    return comparisons


def best_guides(table: pd.DataFrame, metric: str, cost: str, pairs: PairedDifferences) -> list[BestGuide]:
    """The best guide of every network at every number of steps, compared with the network without a guide at equal cost.

    Args:
        table: points, as in `isocost.analysis.results_table`.
        metric: the metric that selects the points.
        cost: one of `GUIDE_COSTS`.
        pairs: paired differences between points; where it has none, the scores are treated as independent.

    Returns:
        One entry per network and number of steps that has a point with a guide, small networks first.

    Raises:
        ConfigError: the cost does not count guides, or no point has a guide, or all points have one.
    """
    rows = _ranked(table, metric, cost)
    results = []
    for size in sizes_in_order(rows[rows["has_guide"]]):
        of_size = rows[rows["size"] == size]
        for _, guided in of_size[of_size["has_guide"]].groupby("num_steps"):
            row = guided.iloc[0].to_dict()
            unguided = of_size[~of_size["has_guide"] & is_within_budget(of_size[cost], float(row[cost]))]
            results.append(
                BestGuide(
                    size=size,
                    num_steps=int(row["num_steps"]),
                    guide=str(row["guide"]),
                    guidance=f"{format_row_guidance({**row, 'guide': None})}, {row['solver']}",
                    cost=float(row[cost]),
                    score=_format_score(row, metric),
                    unguided=None
                    if unguided.empty
                    else (_format_score(unguided.iloc[0], metric), format_row(unguided.iloc[0])),
                    difference=None if unguided.empty else _difference_of_best(guided, unguided, metric, cost, pairs),
                )
            )
    return results


def guide_changes(table: pd.DataFrame, metric: str, cost: str) -> list[GuideChange]:
    """The best score of every pair of network and guide, relative to classifier-free guidance of the network at equal cost.

    Args:
        table: points, as in `isocost.analysis.results_table`.
        metric: the metric that selects the points.
        cost: one of `GUIDE_COSTS`.

    Returns:
        One entry per pair of network and guide: networks from small to large, then guides in the order of `guides_in_order`.

    Raises:
        ConfigError: the cost does not count guides, or no point has a guide, or all points have one.
    """
    rows = _ranked(table, metric, cost)
    best = rows[rows["has_guide"]].drop_duplicates(["size", "guide"])
    leaders = set(best.drop_duplicates("size")["point"])
    plain = rows[rows["way"].isin((NONE, CLASSIFIER_FREE))]
    guides = {guide: index for index, guide in enumerate(guides_in_order(rows))}
    changes = []
    for size in sizes_in_order(best):
        for row in sorted(best[best["size"] == size].to_dict("records"), key=lambda row: guides[str(row["guide"])]):
            reference = plain[(plain["size"] == size) & is_within_budget(plain[cost], float(row[cost]))].head(1)
            value = math.nan if reference.empty else float(reference[metric].iloc[0])
            changes.append(
                GuideChange(
                    size=size,
                    guide=str(row["guide"]),
                    change=float(row[metric]) / value - 1 if value > 0 else math.nan,
                    configuration=format_row(row),
                    score=_format_score(row, metric),
                    reference=""
                    if reference.empty
                    else f"{_format_score(reference.iloc[0], metric)}: {format_row(reference.iloc[0])}",
                    is_best=row["point"] in leaders,
                )
            )
    return changes


def guides_in_order(table: pd.DataFrame) -> list[str]:
    """The labels of all guides: small networks first, then short trainings, then the image's prompt before the empty one.

    A guide whose size is not in the table comes after the others.
    """
    sizes = sizes_in_order(table)

    def key(guide: str) -> tuple[int, float, bool, str]:
        label = guide.removesuffix("/null")
        name, _, images = label.rpartition("@")
        size, images_seen = (name, float(images)) if name and images.isdecimal() else (label, math.inf)
        return sizes.index(size) if size in sizes else len(sizes), images_seen, label != guide, guide

    return sorted({str(guide) for guide in table["guide"].dropna()}, key=key)


def summarise(comparisons: Sequence[GuideComparison], metric: str | None = None) -> str:
    """The verdicts at all costs in sentences.

    Args:
        comparisons: of one metric and one cost.
        metric: another metric that judges the selected points; None for the metric that selected them.

    Returns:
        Text such as "With a guide, the best squared MMD is better at 2 of 4 costs (0.2, 0.4 GFLOP per image). No difference
        between the best squared MMD with and without a guide is shown at 2 of 4 costs (0.8, 1.6 GFLOP per image)."
    """
    differences = {
        comparison.budget: comparison.difference if metric is None else comparison.other_metrics.get(metric)
        for comparison in comparisons
    }
    verdicts = {budget: difference.verdict for budget, difference in differences.items() if difference is not None}
    if not verdicts:
        return "No cost has both a point with a guide and a point without one."
    leading = comparisons[0].metric
    names = [leading, *(name for comparison in comparisons for name in comparison.other_metrics)]
    label = f"the best {format_metric(leading, names)}" if metric is None else f"{format_metric(metric, names)} of these points"
    texts = {
        "better": f"With a guide, {label} is better",
        "worse": f"With a guide, {label} is worse",
        NOT_SHOWN: f"No difference between {label} with and without a guide is shown",
    }
    unit, sentences = cost_of(comparisons[0].cost).unit, []
    for verdict, text in texts.items():
        amounts = [format_number(budget) for budget, found in verdicts.items() if found == verdict]
        if amounts:
            count = f"{len(amounts)} of {len(verdicts)} cost{'' if len(verdicts) == 1 else 's'}"
            sentences.append(f"{text} at {count} ({', '.join(amounts)} {unit}).")
    return " ".join(sentences)


def disagreements(comparisons: Sequence[GuideComparison]) -> list[tuple[float, str, str, str]]:
    """The costs at which two metrics contradict each other on the same two points.

    Returns:
        (budget, verdict by the metric that selected the points, other metric, its verdict): one is "better", the other "worse".
    """
    opposite = {"better": "worse", "worse": "better"}
    return [
        (comparison.budget, comparison.difference.verdict, name, other.verdict)
        for comparison in comparisons
        if comparison.difference is not None
        for name, other in comparison.other_metrics.items()
        if opposite.get(comparison.difference.verdict) == other.verdict
    ]


def _ranked(table: pd.DataFrame, metric: str, cost: str) -> pd.DataFrame:
    """The competing points, best first, with the columns `way` and `has_guide`."""
    if cost_of(cost).name not in GUIDE_COSTS:
        raise ConfigError(
            f"{COSTS[cost].label} does not count the passes of a guide; choose another cost of {', '.join(GUIDE_COSTS)}"
        )
    rows = rank_points(final_points(table, metric, cost), metric, cost)
    if rows["guide"].isna().all():
        raise ConfigError(f"no point with a guide has both {metric} and {cost}; list guides in sweep.guides")
    rows = rows.assign(way=[way_of_guidance(row) for row in rows.to_dict("records")])
    rows = rows.assign(has_guide=rows["way"].isin(WITH_GUIDE))
    if rows["has_guide"].all():
        raise ConfigError(f"every point with {metric} and {cost} has a guide; add `none` to sweep.guides")
    if not rows["has_guide"].any():
        raise ConfigError("no step of any point is guided by a guide; widen sweep.guidance_intervals")
    return rows


def _budgets(rows: pd.DataFrame, cost: str) -> list[float]:
    start = rows.groupby("has_guide")[cost].min().max()
    return default_budgets(rows[rows[cost] >= start], cost, NUM_BUDGETS)


def _format_score(row: Mapping[Any, Any] | pd.Series, metric: str) -> str:
    return format_score(*(float(row[f"{metric}{suffix}"]) for suffix in ("", "_low", "_high")))


def _difference(first: Mapping[Any, Any], second: Mapping[Any, Any], metric: str, pairs: PairedDifferences) -> Difference:
    interval, is_paired = difference_between(first, second, metric, pairs)
    return _judge(interval, is_paired, metric)


def _judge(interval: Interval | None, is_paired: bool, metric: str) -> Difference:
    verdict = classify(interval, metric)
    return Difference(interval, is_paired, NOT_SHOWN if verdict == "undecided" else verdict)


def _difference_of_best(
    first: pd.DataFrame, second: pd.DataFrame, metric: str, cost: str, pairs: PairedDifferences
) -> Difference:
    """The best of the first rows minus the best of the second rows, without the expected optimism of both selections."""
    interval, is_paired = difference_between(first.iloc[0].to_dict(), second.iloc[0].to_dict(), metric, pairs)
    if interval is None:
        return _judge(None, is_paired, metric)
    error = (interval.high - interval.low) / INTERVAL_WIDTH / math.sqrt(2)
    shift = _optimism(first, metric, cost, error) - _optimism(second, metric, cost, error)
    shift *= 1.0 if metric_of(metric).better == "lower" else -1.0
    low, value, high = (end + shift for end in (interval.low, interval.value, interval.high))
    return _judge(replace(interval, low=low, value=value, high=high), is_paired, metric)


def _optimism(rows: pd.DataFrame, metric: str, cost: str, error: float) -> float:
    """How much better the best of the rows is expected to look than it is, if every score has this standard error."""
    sign = 1.0 if metric_of(metric).better == "lower" else -1.0
    values = sign * rows.sort_values([cost, "point"])[metric].to_numpy(dtype=float)
    replicates = draw_replicates(values, np.full(len(values), error), NUM_REPLICATES, seed=0)
    return float(corrected_running_minimum(values, replicates)[0, -1] - values.min())
