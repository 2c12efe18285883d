"""The frontier against brute-force definitions, pandas' idxmin, and Table 1 of arXiv 2404.01367."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from isocost.analysis.costs import COSTS
from isocost.analysis.formatting import format_score
from isocost.analysis.pareto import best_at_budgets, best_guidance, default_budgets, pareto
from isocost.analysis.results_table import final_points, sizes_in_order
from isocost.errors import ConfigError
from synthetic_results import BEST_GUIDANCE, TABLE_1, paper_table, synthetic_table

KERNEL = "mmd_efficientnet"


def random_table(seed: int) -> pd.DataFrame:
    """Points with coarse costs and values, so that there are many ties."""
    generator = np.random.default_rng(seed)
    table = synthetic_table(snapshots=())
    values = generator.integers(1, 40, len(table)) / 10
    return table.assign(
        normalized_cost=generator.integers(1, 25, len(table)).astype(float),
        mmd_efficientnet=values,
        mmd_efficientnet_low=values - 0.2,
        mmd_efficientnet_high=values + 0.2,
        alignment=values,
    )


@pytest.mark.parametrize(("metric", "pick"), [(KERNEL, "idxmin"), ("alignment", "idxmax")])
def test_best_guidance_equals_that_of_pandas(metric: str, pick: str) -> None:
    table = synthetic_table(noise=0.01)
    table["alignment"] = table["alignment"].sample(frac=1, random_state=1).to_numpy()
    groups = table[table["is_final"]].groupby(["size", "solver", "num_steps"])[metric]
    expected = set(table.loc[getattr(groups, pick)(), "point"])
    assert set(best_guidance(table, metric)["point"]) == expected


def test_the_true_best_guidance_is_found_inside_the_grid() -> None:
    best = best_guidance(synthetic_table(), KERNEL)
    assert (best["guidance"] == BEST_GUIDANCE).all()
    assert not best["guidance_at_boundary"].any()


@pytest.mark.parametrize("guidance", [(2.0, 3.0, 5.0), (1.0, 1.5, 2.0), (2.0,)])
def test_an_optimum_at_the_boundary_is_flagged(guidance: tuple[float, ...]) -> None:
    assert best_guidance(synthetic_table(guidance=guidance), KERNEL)["guidance_at_boundary"].all()


def test_sampling_without_guidance_has_no_boundary() -> None:
    assert not best_guidance(synthetic_table(guidance=(1.0,)), KERNEL)["guidance_at_boundary"].any()


def test_guidance_zero_is_no_boundary() -> None:
    table = synthetic_table(guidance=(2.0, 3.0))
    table["guidance"] = table["guidance"].replace({2.0: 0.0})
    assert not best_guidance(table, KERNEL)["guidance_at_boundary"].any()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("metric", [KERNEL, "alignment"])
def test_pareto_is_the_undominated_set(seed: int, metric: str) -> None:
    table = random_table(seed)
    sign = 1 if metric == KERNEL else -1
    coordinates = {(cost, sign * value) for cost, value in zip(table["normalized_cost"], table[metric], strict=True)}
    expected = {
        (cost, value)
        for cost, value in coordinates
        if not any(c <= cost and v <= value and (c, v) != (cost, value) for c, v in coordinates)
    }
    front = pareto(table, "normalized_cost", metric)
    assert {(cost, sign * value) for cost, value in zip(front["normalized_cost"], front[metric], strict=True)} == expected
    assert len(front) == len(expected)
    assert front["normalized_cost"].is_monotonic_increasing


def test_every_size_of_table_1_is_on_the_frontier() -> None:
    table = paper_table().sample(frac=1, random_state=0)
    assert list(pareto(table, "normalized_cost", "frechet_efficientnet")["size"]) == list(TABLE_1)
    assert sizes_in_order(table) == list(TABLE_1)


def test_budgets_on_table_1_include_equality() -> None:
    assert 0.07 * 50 > 3.5, "the published cost x 50 exceeds its decimal value by a rounding error"
    choices = best_at_budgets(paper_table(), "normalized_cost", "frechet_efficientnet", [3.4, 3.5, 12, 49.9, 50, 1000])
    assert [choice.best.size if choice.best else None for choice in choices] == [None, "39M", "145M", "704M", "866M", "5B"]
    assert [choice.runner_up.size if choice.runner_up else None for choice in choices] == [
        None,
        None,
        "83M",
        "558M",
        "704M",
        "2B",
    ]
    assert [choice.beyond_data for choice in choices] == [False] * 5 + [True]
    assert choices[0].cheapest.size == "39M"
    assert choices[2].undecided, "without an interval nothing is decided"
    assert not choices[1].undecided, "with one size there is nothing to decide"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", [2.0, 9.0, 24.0])
def test_the_best_within_a_budget_by_definition(seed: int, budget: float) -> None:
    table = random_table(seed)
    (choice,) = best_at_budgets(table, "normalized_cost", KERNEL, [budget])
    within = table[table["normalized_cost"] <= budget]
    assert choice.best is not None
    assert choice.best.value == within[KERNEL].min()
    assert choice.best.cost == within.loc[within[KERNEL] == choice.best.value, "normalized_cost"].min()
    others = within[within["size"] != choice.best.size]
    assert choice.runner_up is not None
    assert choice.runner_up.value == others[KERNEL].min()
    assert choice.num_points == len(within)


@pytest.mark.parametrize(("half_width", "undecided"), [(0.049, False), (0.051, True)])
def test_a_choice_is_undecided_if_intervals_overlap(half_width: float, undecided: bool) -> None:
    table = synthetic_table(sizes=("0.2M", "0.8M"), num_steps=(4,), guidance=(1.0,), solvers=("ddim/trailing",), snapshots=())
    table[KERNEL] = [0.4, 0.3]
    table[f"{KERNEL}_low"], table[f"{KERNEL}_high"] = table[KERNEL] - half_width, table[KERNEL] + half_width
    (choice,) = best_at_budgets(table, "nfe", KERNEL, [100])
    assert choice.best is not None
    assert choice.best.size == "0.8M"
    assert choice.undecided is undecided


def test_order_of_rows_does_not_matter() -> None:
    table = random_table(0)
    expected = best_at_budgets(table, "normalized_cost", KERNEL, [3, 12, 30])
    for seed in range(5):
        shuffled = table.sample(frac=1, random_state=seed)
        assert best_at_budgets(shuffled, "normalized_cost", KERNEL, [3, 12, 30]) == expected
        pd.testing.assert_frame_equal(best_guidance(shuffled, KERNEL), best_guidance(table, KERNEL))
        pd.testing.assert_frame_equal(pareto(shuffled, "normalized_cost", KERNEL), pareto(table, "normalized_cost", KERNEL))


def test_training_snapshots_do_not_compete() -> None:
    table = synthetic_table()
    table.loc[~table["is_final"], KERNEL] = 1e-6
    assert final_points(table, KERNEL)["is_final"].all()
    assert pareto(table, "nfe", KERNEL)["is_final"].all()
    with pytest.raises(ConfigError, match="no final checkpoint has"):
        best_guidance(table[~table["is_final"]], KERNEL)


@pytest.mark.parametrize(("column", "other"), [("protocol", "newer"), ("num_images", 50), ("seed", 7)])
def test_points_that_cannot_be_compared_are_refused_by_name(column: str, other: object) -> None:
    table = synthetic_table()
    table.loc[table.index[:3], column] = other
    with pytest.raises(ConfigError, match=rf"differ in {column}.*{other} \(3 points\)"):
        pareto(table, "nfe", KERNEL)


def test_points_without_the_metric_do_not_count_as_mixed() -> None:
    table = synthetic_table()
    table.loc[table.index[:3], "protocol"] = "newer"
    table.loc[table.index[:3], KERNEL] = np.nan
    assert len(best_guidance(table, KERNEL))


def test_two_points_of_one_configuration_are_refused() -> None:
    table = synthetic_table()
    twin = table[table["is_final"]].iloc[[0]].assign(point="twin")
    with pytest.raises(ConfigError, match="twin have this same configuration"):
        best_guidance(pd.concat([table, twin], ignore_index=True), KERNEL)


def test_unknown_names_and_missing_values_are_one_clear_line() -> None:
    table = synthetic_table()
    with pytest.raises(ConfigError, match="unknown metric 'beauty'"):
        best_guidance(table, "beauty")
    with pytest.raises(ConfigError, match="no cost is called 'steps'"):
        pareto(table, "steps", KERNEL)
    with pytest.raises(ConfigError, match="no point has a measured ms_per_image"):
        pareto(table.assign(ms_per_image=np.nan), "ms_per_image", KERNEL)
    with pytest.raises(ConfigError, match="no point has alignment"):
        best_guidance(table.assign(alignment=np.nan), "alignment")
    for budget in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="a budget must be a positive number"):
            best_at_budgets(table, "nfe", KERNEL, [budget])


@pytest.mark.parametrize("cost", list(COSTS))
def test_default_budgets_spread_over_the_log_range(cost: str) -> None:
    table = synthetic_table()
    budgets = default_budgets(table, cost)
    costs = table.loc[table["is_final"], cost]
    assert len(budgets) == 5
    assert all(float(f"{budget:.2g}") == budget for budget in budgets), "two significant digits"
    assert costs.max() <= budgets[-1] <= costs.max() * 1.1
    steps = np.diff(np.log(budgets))
    assert steps.max() - steps.min() < 2 * np.log(1.1)
    assert not any(choice.best is None or choice.beyond_data for choice in best_at_budgets(table, cost, KERNEL, budgets))


@pytest.mark.parametrize(
    ("score", "text"),
    [
        ((0.1234, 0.12, 0.1266), "0.123 [0.120, 0.127]"),
        ((22.354, 22.0, 22.8), "22.4 [22.0, 22.8]"),
        ((0.99912, 0.9990, 0.9992), "0.9991 [0.9990, 0.9992]"),
        ((-0.00042, -0.001, 0.0002), "-0.00042 [-0.00100, 0.00020]"),
        ((1887.5, None, None), "1888"),
    ],
)
def test_scores_have_the_digits_that_they_need(score: tuple[float, float, float], text: str) -> None:
    assert format_score(*score).startswith(text) or format_score(*score) == text
