"""Paired decisions between sizes: their formula, false decisions and power in simulated studies, and their texts."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import false_discovery_control

import isocost
from isocost.analysis.frontier_ci import frontier_bands
from isocost.analysis.paired_decisions import PairedDecision, Resamples, decide, decide_together
from isocost.analysis.pareto import best_at_budgets
from isocost.analysis.recommend import describe_choice, recommend
from isocost.evaluation.confidence_intervals import Interval
from isocost.pipeline.merge import archive
from isocost.report.budget_slider import slider_values
from isocost.report.html import write_report
from isocost.report.markdown import markdown_summary
from isocost.report.report_data import rebuild
from synthetic_results import synthetic_table

KERNEL = "mmd_efficientnet"
NUM_RESAMPLES = 200


def paired_study(
    groups: tuple[int, ...], truth: float, correlation: float, generator: np.random.Generator
) -> tuple[list[pd.DataFrame], Resamples]:
    """Sizes with several points each. All true scores are 0, but those of the first size are `truth` errors of a difference."""
    num_points = sum(groups)
    true = np.where(np.arange(num_points) < groups[0], truth * np.sqrt(2 * (1 - correlation)), 0.0)

    def errors(num: int) -> np.ndarray:
        shared = generator.standard_normal((num, 1))
        return np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * generator.standard_normal((num, num_points))

    scores = 10 + true + errors(1)[0]
    resampled = scores + errors(NUM_RESAMPLES)
    names = [f"p{number}" for number in range(num_points)]
    resamples = {name: np.concatenate([[scores[i]], resampled[:, i]]) for i, name in enumerate(names)}
    rows = pd.DataFrame({"point": names, KERNEL: scores, "num_images": 1000})
    ends = np.cumsum((0, *groups))
    return [rows.iloc[start:stop] for start, stop in itertools.pairwise(ends)], resamples


def best_two(groups: list[pd.DataFrame]) -> tuple[int, int]:
    order = np.argsort([rows[KERNEL].min() for rows in groups])
    return int(order[0]), int(order[1])


def separate_intervals_decide(first: pd.DataFrame, second: pd.DataFrame, resamples: Resamples) -> bool:
    ends = [np.quantile(resamples[rows.loc[rows[KERNEL].idxmin(), "point"]][1:], [0.025, 0.975]) for rows in (first, second)]
    return bool(ends[0][1] < ends[1][0])


def test_the_difference_of_two_points_is_the_basic_bootstrap_interval() -> None:
    (first, second), resamples = paired_study((1, 1), -1.0, 0.8, np.random.default_rng(0))
    decision = decide(first, second, KERNEL, resamples)
    assert decision is not None
    value = float(first[KERNEL].iloc[0] - second[KERNEL].iloc[0])
    change = (resamples["p0"] - resamples["p1"])[1:] - value
    assert decision.difference.value == pytest.approx(value - change.mean())
    low, high = np.quantile(value - change, [0.025, 0.975], method="weibull")
    assert (decision.difference.low, decision.difference.high) == pytest.approx((low, high))
    assert decision.is_decided == (not low <= 0 <= high)


@pytest.mark.parametrize("groups", [(1, 1), (5, 5), (20, 20), (10, 10, 10, 10)])
def test_equal_sizes_are_rarely_decided(groups: tuple[int, ...]) -> None:
    generator, num_studies, num_decided = np.random.default_rng(1), 300, 0
    for _ in range(num_studies):
        sizes, resamples = paired_study(groups, 0.0, 0.8, generator)
        best, runner_up = best_two(sizes)
        decision = decide(sizes[best], sizes[runner_up], KERNEL, resamples)
        assert decision is not None
        num_decided += decision.is_decided
    assert num_decided / num_studies <= 0.07, "5 % and the error of 300 studies"


def test_paired_decisions_find_differences_that_separate_intervals_do_not() -> None:
    generator, num_studies = np.random.default_rng(2), 100
    found = wrong = found_by_intervals = 0
    for _ in range(num_studies):
        sizes, resamples = paired_study((5, 5), -3.0, 0.8, generator)
        best, runner_up = best_two(sizes)
        decision = decide(sizes[best], sizes[runner_up], KERNEL, resamples)
        assert decision is not None
        found += decision.is_decided and best == 0
        wrong += decision.is_decided and best == 1
        found_by_intervals += separate_intervals_decide(sizes[best], sizes[runner_up], resamples)
    assert found >= 85
    assert wrong == 0
    assert found_by_intervals <= 5


def test_the_estimated_number_of_images_decides() -> None:
    """The error falls with the root of the number of images: at the estimate, the interval ends near 0."""
    (first, second), resamples = paired_study((1, 1), -0.5, 0.5, np.random.default_rng(5))
    decision = decide(first, second, KERNEL, resamples)
    assert decision is not None
    assert not decision.is_decided
    assert decision.num_images is not None
    shrink = np.sqrt(1000 / decision.num_images)
    closer = {name: values[0] + shrink * (values - values[0]) for name, values in resamples.items()}
    at_estimate = decide(first, second, KERNEL, closer)
    assert at_estimate is not None
    assert at_estimate.p_value == pytest.approx(0.05, abs=0.02)


def test_a_best_point_that_is_only_lucky_is_not_decided() -> None:
    """The best of twelve noisy points looks better than one exact point; corrected for the selection it is worse."""
    generator = np.random.default_rng(0)
    first = pd.DataFrame({"point": [f"a{i}" for i in range(12)], KERNEL: np.linspace(1.0, 1.055, 12), "num_images": 1000})
    second = pd.DataFrame({"point": ["b"], KERNEL: [1.001], "num_images": 1000})
    errors = {**dict.fromkeys(first["point"], 0.05), "b": 0.01}
    scores = dict(zip([*first["point"], "b"], [*first[KERNEL], 1.001], strict=True))
    resamples = {
        point: np.concatenate([[scores[point]], scores[point] + error * generator.standard_normal(NUM_RESAMPLES)])
        for point, error in errors.items()
    }
    decision = decide(first, second, KERNEL, resamples)
    assert decision is not None
    assert decision.difference.low > 0, "the corrected difference says that the other group is better"
    assert not decision.is_decided
    assert decision.num_images is None


def test_equal_scores_without_noise_are_undecided() -> None:
    rows = [pd.DataFrame({"point": [name], KERNEL: [1.0], "num_images": 1000}) for name in "ab"]
    decision = decide(*rows, KERNEL, {name: np.ones(NUM_RESAMPLES + 1) for name in "ab"})
    assert decision is not None
    assert (decision.p_value, decision.is_decided) == (1.0, False)
    assert decision.num_images is not None
    assert decision.num_images > 1_000_000


@pytest.mark.parametrize("change", ["no resamples", "fewer resamples", "fewer images"])
def test_points_that_are_not_paired_are_not_compared(change: str) -> None:
    (first, second), resamples = paired_study((2, 2), -3.0, 0.8, np.random.default_rng(0))
    changed = dict(resamples)
    if change == "no resamples":
        del changed["p2"]
    elif change == "fewer resamples":
        changed["p2"] = changed["p2"][:-1]
    else:
        second = second.assign(num_images=500)
    assert decide(first, second, KERNEL, changed) is None


def test_decisions_made_at_once_follow_benjamini_and_hochberg() -> None:
    p_values = [0.001, 0.04, 0.011, 0.2, 0.03, 0.009]
    decisions = [PairedDecision(Interval(-1, -2, -0.1), p, True, 10) for p in p_values]
    together = decide_together([None, *decisions])
    assert together[0] is None
    expected = false_discovery_control(p_values) <= 0.05
    assert [decision.is_decided for decision in together[1:] if decision is not None] == expected.tolist()
    assert decide_together([decisions[1]]) == [decisions[1]]
    assert not decide_together([PairedDecision(Interval(-1, -2, 0.1), 0.001, False, 10)])[0].is_decided  # type: ignore[union-attr]


# --- tables, texts and pages ---


def table_with_resamples(half_width: float = 0.05, correlation: float = 0.998) -> tuple[pd.DataFrame, Resamples]:
    """Points whose separate intervals overlap, while their errors are nearly the same."""
    table = synthetic_table(half_width=half_width)
    generator, error = np.random.default_rng(0), half_width / 1.96
    shared = generator.standard_normal(NUM_RESAMPLES)
    resamples = {}
    for point, score in zip(table["point"], table[KERNEL], strict=True):
        own = generator.standard_normal(NUM_RESAMPLES)
        noise = error * (np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own)
        resamples[point] = np.concatenate([[score], score + noise])
    return table, resamples


def test_a_recommendation_is_decided_by_its_paired_difference() -> None:
    table, resamples = table_with_resamples()
    unpaired, paired = (recommend(table, "normalized_cost", 3, KERNEL, resamples=values) for values in (None, resamples))
    assert not unpaired.decided
    assert unpaired.difference is None
    assert "undecided, the intervals overlap" in unpaired.reason
    assert paired.configuration == unpaired.configuration
    assert paired.decided
    assert paired.difference is not None
    assert paired.difference.high < 0
    assert ": decided, paired difference -" in paired.reason
    higher = recommend(table, "normalized_cost", 3, "alignment", resamples=_of_alignment(table, resamples))
    assert higher.difference is not None
    assert higher.difference.low > 0


def _of_alignment(table: pd.DataFrame, resamples: Resamples) -> Resamples:
    offset = dict(zip(table["point"], table["alignment"] + table[KERNEL], strict=True))
    return {point: offset[point] - values for point, values in resamples.items()}


def test_an_undecided_choice_names_the_images_that_would_decide_it() -> None:
    table, resamples = table_with_resamples(correlation=0.0)
    (choice,) = best_at_budgets(table, "normalized_cost", KERNEL, [6], resamples=resamples)
    assert choice.undecided
    text = str(describe_choice(choice))
    assert "undecided, paired difference" in text
    assert "images per point would" in text


def test_a_choice_that_only_the_other_budgets_leave_undecided_says_so() -> None:
    table, resamples = table_with_resamples()
    (choice,) = best_at_budgets(table, "normalized_cost", KERNEL, [3], resamples=resamples)
    assert choice.decision is not None
    assert not choice.undecided
    assert choice.decision.num_images is None
    rejected = replace(choice, decision=replace(choice.decision, is_decided=False), undecided=True)
    text = str(describe_choice(rejected))
    assert "; undecided among all budgets together, paired difference -0.0" in text
    assert "images per point" not in text


def test_choices_that_are_judged_together_are_decided_no_more_often() -> None:
    table, resamples = table_with_resamples(correlation=0.9)
    together = slider_values(table, KERNEL, "gflop", resamples)
    alone = [best_at_budgets(table, "gflop", KERNEL, [choice.budget], resamples=resamples)[0] for choice in together]
    assert len(together) > 5
    for one, other in zip(together, alone, strict=True):
        assert (one.best, one.runner_up) == (other.best, other.runner_up)
        assert one.undecided or not other.undecided
    assert any(not choice.undecided for choice in together)


def test_a_summary_shows_paired_differences() -> None:
    table, resamples = table_with_resamples()
    texts = [markdown_summary(table, KERNEL, "study", resamples=values) for values in (None, resamples)]
    assert "paired difference" not in texts[0]
    assert "decided, paired difference" in texts[1]


def test_a_page_states_how_it_decides(tmp_path: Path) -> None:
    table, resamples = table_with_resamples()
    pages = [
        write_report(tmp_path, "study", table, KERNEL, {}, {}, {}, [], figure_formats=(), resamples=values).read_text("utf-8")
        for values in (None, resamples)
    ]
    assert "Benjamini-Hochberg" not in pages[0]
    assert "decided by their paired difference" in pages[1]
    assert "decided, paired difference -0.0" in pages[1]


def test_the_frontier_uses_the_resamples_of_all_points() -> None:
    table, resamples = table_with_resamples()
    independent, paired = (frontier_bands(table, "gflop", KERNEL, resamples=values) for values in (None, resamples))
    assert paired.is_decided.mean() > independent.is_decided.mean()
    np.testing.assert_allclose(paired.observed, independent.observed)
    without_one = {point: values for point, values in resamples.items() if point != table["point"].iloc[-1]}
    same = frontier_bands(table, "gflop", KERNEL, resamples=without_one)
    np.testing.assert_array_equal(same.value, independent.value)


@pytest.mark.slow
def test_archives_have_the_resamples_and_the_same_pages(finished_study: Path, tmp_path: Path) -> None:
    finished = finished_study / "complete"
    resamples = isocost.read_resamples(finished)
    table = isocost.read_results(finished)
    assert set(resamples) >= set(table["point"])
    for point, score in zip(table["point"], table[KERNEL], strict=True):
        assert resamples[point][0] == score
    archive(finished, tmp_path / "archive")
    rebuild(tmp_path / "archive", figure_formats=())
    for name in ("index.html", "summary.md"):
        assert (tmp_path / "archive" / "report" / name).read_bytes() == (finished / "report" / name).read_bytes()
