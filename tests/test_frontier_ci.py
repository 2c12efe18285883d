"""Confidence bands, best sizes and crossings on synthetic tables whose true frontier is known: the intervals cover it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from isocost.analysis.costs import REPORT_COSTS
from isocost.analysis.frontier_ci import (
    DECIDED,
    FrontierBands,
    best_ordered_path,
    corrected_running_minimum,
    format_best_sizes,
    frontier_bands,
)
from isocost.errors import ConfigError
from synthetic_results import exact, measured, paper_table, synthetic_table

KERNEL = "mmd_efficientnet"
NUM_TABLES = 50


def synthetic(**changes: object) -> pd.DataFrame:
    return synthetic_table(snapshots=(), **changes)  # type: ignore[arg-type]


def crossings_of(bands: FrontierBands) -> dict[str, float]:
    return {crossing.larger: crossing.budget for crossing in bands.crossings}


# --- the known truth is found -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", list(REPORT_COSTS))
@pytest.mark.parametrize("metric", [KERNEL, "alignment"])
def test_the_frontier_of_exact_scores_is_the_best_within_each_budget(cost: str, metric: str) -> None:
    table = exact(synthetic(noise=0.02), metric)
    bands = frontier_bands(table, cost, metric, num_replicates=20)
    pick = "min" if metric == KERNEL else "max"
    for index, budget in enumerate(bands.budgets):
        within = table[table[cost] <= budget * (1 + 1e-9)]
        assert bands.value[index] == bands.observed[index] == pytest.approx(within[metric].agg(pick))
        best = set(within.loc[within[metric] == within[metric].agg(pick), "size"])
        assert bands.sizes[bands.best[index]] in best
    assert np.isnan(bands.low).all()
    assert np.isnan(bands.high).all()


@pytest.mark.parametrize("half_width", [0.002, 0.01])
@pytest.mark.fast_cases(1)
def test_intervals_cover_the_true_frontier_and_crossings(half_width: float) -> None:
    truth = frontier_bands(exact(synthetic()), "normalized_cost", KERNEL, num_replicates=1)
    true_crossings = crossings_of(truth)
    assert list(true_crossings) == ["0.8M", "3.2M", "7.1M", "12.6M"], "the table has a crossing to every size"
    in_band, covered = [], []
    for seed in range(NUM_TABLES):
        bands = frontier_bands(
            measured(synthetic(), half_width, seed), "normalized_cost", KERNEL, num_replicates=200, seed=seed
        )
        in_band.append((bands.low <= truth.value) & (truth.value <= bands.high))
        crossings = {crossing.larger: crossing for crossing in bands.crossings}
        for larger, budget in true_crossings.items():
            if larger in crossings:
                low, high = crossings[larger].low, crossings[larger].high
                assert low is not None
                covered.append(low <= budget <= (math.inf if high is None else high))
    assert np.mean(in_band) >= 0.9
    assert np.mean(in_band, axis=0).min() >= 0.8, "at every budget"
    assert len(covered) >= 3 * NUM_TABLES
    assert np.mean(covered) >= 0.85


def test_the_selection_bias_is_corrected() -> None:
    half_width = 0.02
    truth = frontier_bands(exact(synthetic()), "normalized_cost", KERNEL, num_replicates=1).value
    observed, corrected = [], []
    for seed in range(NUM_TABLES):
        bands = frontier_bands(
            measured(synthetic(), half_width, seed), "normalized_cost", KERNEL, num_replicates=200, seed=seed
        )
        observed.append(np.mean(bands.observed - truth) / (half_width / 1.96))
        corrected.append(np.mean(bands.value - truth) / (half_width / 1.96))
    assert np.mean(observed) < -0.7, "the minimum of noisy scores is optimistic, in standard deviations"
    assert abs(np.mean(corrected)) < 0.5 * abs(np.mean(observed))


@pytest.mark.slow
def test_equal_sizes_are_rarely_decided() -> None:
    equal = synthetic(sizes=("7.1M", "12.6M"))
    equal[KERNEL] = equal["num_steps"].map(lambda steps: 0.03 + 0.5 / steps**1.3)
    num_decided = 0
    for seed in range(NUM_TABLES):
        bands = frontier_bands(measured(equal, 0.004, seed), "nfe", KERNEL, num_replicates=200, seed=seed)
        num_decided += bool(bands.is_decided[-1])
        assert all(crossing.smaller == "7.1M" for crossing in bands.crossings)
    assert num_decided <= 0.15 * NUM_TABLES


def test_very_different_sizes_are_decided() -> None:
    bands = frontier_bands(measured(synthetic(), 0.0005, 0), "normalized_cost", KERNEL)
    assert bands.is_decided[[0, -1]].all()
    assert all(crossing.is_decided for crossing in bands.crossings)
    best = bands.at(1000)
    assert (best.size, best.is_decided, best.beyond_data) == ("12.6M", True, True)
    assert best.share is not None
    assert best.share >= DECIDED
    assert best.shares is not None
    assert sum(best.shares.values()) == pytest.approx(1)
    assert not bands.at(float(bands.budgets[-1])).beyond_data


def test_a_crossing_that_noise_hides_has_no_upper_end() -> None:
    hidden = [
        crossing
        for seed in range(20)
        for crossing in frontier_bands(measured(synthetic(), 0.06, seed), "normalized_cost", KERNEL, 100).crossings
        if not crossing.is_decided
    ]
    assert hidden
    for crossing in hidden:
        assert crossing.share is not None
        assert crossing.share < 0.98
        assert "undecided" in str(crossing)
        assert "none]" in str(crossing)
        assert str(crossing).endswith("of bootstrap replicates never switch")


# --- the method -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_ordered_path_is_the_best_that_never_goes_back(seed: int) -> None:
    generator = np.random.default_rng(seed)
    curves = list(generator.random((3, 1, 6)))
    curves[2][0, :2] = np.inf
    widths = generator.random(6)
    rising = itertools.combinations_with_replacement(range(3), 6)
    best = min(rising, key=lambda levels: sum(widths[index] * curves[level][0, index] for index, level in enumerate(levels)))
    assert best_ordered_path(curves, widths)[0].tolist() == list(best)


def test_a_replicate_corrects_the_selection_bias_of_its_own_minimum() -> None:
    values, replicates = np.array([3.0, 1.0, 2.0]), np.array([[3.5, 0.4, 1.8], [3.0, 1.5, 1.2]])
    minimum = corrected_running_minimum(values, replicates)
    # In the first replicate point 2 is 0.6 too low. In the second replicate point 3 is 0.8 too low and point 2 is 0.5 too high.
    assert minimum[1].tolist() == pytest.approx([2.5, 1.6, 1.6])
    assert minimum[2].tolist() == pytest.approx([3.0, 0.5, 0.5])
    assert minimum[0].tolist() == pytest.approx([2.75, 1.05, 1.05])


def test_the_order_of_rows_changes_nothing() -> None:
    table = measured(synthetic(), 0.01, 0)
    expected = frontier_bands(table, "gflop", KERNEL, 50)
    shuffled = frontier_bands(table.sample(frac=1, random_state=1), "gflop", KERNEL, 50)
    pd.testing.assert_frame_equal(shuffled.table(), expected.table())
    assert shuffled.crossings == expected.crossings


def test_an_order_that_the_points_contradict_is_reported() -> None:
    table = measured(synthetic(), 0.0005, 0)
    reversed_sizes = table.assign(num_parameters=1e9 / table["num_parameters"])
    assert frontier_bands(table, "normalized_cost", KERNEL, 50).against_order < 0.1, "12.6M at 16 steps, before 7.1M takes 32"
    assert frontier_bands(table, "nfe", KERNEL, 50).against_order == 0
    assert frontier_bands(reversed_sizes, "normalized_cost", KERNEL, 50).against_order > 0.5
    texts = format_best_sizes(reversed_sizes, KERNEL)["normalized cost"]["best size"]
    assert texts[-1].startswith("another size is decidedly best over ")
    assert texts[-1].endswith(" of the range of budgets")


# --- missing intervals, and errors ------------------------------------------------------------------------------------


def test_without_intervals_nothing_is_decided() -> None:
    bands = frontier_bands(paper_table(), "normalized_cost", "frechet_efficientnet", 20)
    assert [crossing.larger for crossing in bands.crossings] == list(bands.sizes[1:])
    assert all((crossing.low, crossing.high, crossing.share) == (None, None, None) for crossing in bands.crossings)
    assert "an interval is missing" in str(bands.crossings[0])
    best = bands.at(20)
    assert (best.size, best.share, best.low, best.is_decided) == ("318M", None, None, False)
    assert "undecided: an interval is missing" in str(best)


def test_the_band_is_missing_where_the_best_point_has_no_interval() -> None:
    table = measured(synthetic(), 0.004, 0)
    best = table.sort_values(KERNEL).index[0]
    table.loc[best, [f"{KERNEL}_low", f"{KERNEL}_high"]] = np.nan
    bands = frontier_bands(table, "normalized_cost", KERNEL, 50)
    is_best = bands.budgets >= table.loc[best, "normalized_cost"] * (1 - 1e-9)
    assert np.isnan(bands.low[is_best]).all()
    assert not np.isnan(bands.low[~is_best]).any()
    assert bands.at(float(bands.budgets[-1])).share is None
    assert bands.at(float(bands.budgets[0])).share is not None


def test_the_report_has_a_text_for_every_measured_cost() -> None:
    table = measured(synthetic(), 0.001, 0).assign(
        ms_per_image=np.nan, latency_ms=np.nan, joules_per_image=np.nan, usd_per_1000=np.nan
    )
    texts = format_best_sizes(table, KERNEL)
    assert list(texts) == ["normalized cost", "evaluations", "GFLOP"]
    assert texts["evaluations"]["best size"] == ["12.6M at every budget"]
    assert texts["normalized cost"]["best size"][0].startswith("0.2M to 0.8M at ")
    assert "95 % of bootstrap replicates" in texts["normalized cost"]["decided"]


def test_errors_are_one_line() -> None:
    table = measured(synthetic(), 0.004, 0)
    bands = frontier_bands(table, "normalized_cost", KERNEL, 20)
    for budget in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="a budget must be a positive number"):
            bands.at(budget)
    with pytest.raises(ConfigError, match="below every point; the cheapest costs 0"):
        bands.at(0.01)
    with pytest.raises(ConfigError, match="no cost is called 'euros'"):
        frontier_bands(table, "euros", KERNEL)
    with pytest.raises(ConfigError, match="a cost must be above 0"):
        frontier_bands(table.assign(ms_per_image=0.0), "ms_per_image", KERNEL)
    with pytest.raises(ConfigError, match="no point has fid"):
        frontier_bands(table, "nfe", "fid")
