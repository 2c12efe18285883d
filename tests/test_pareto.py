"""The frontier against definitions written out by brute force, pandas' own idxmin, and Table 1 of arXiv 2404.01367."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from isocost.analysis.costs import COSTS
from isocost.analysis.formatting import format_score
from isocost.analysis.pareto import best_at_budgets, best_guidance, default_budgets, pareto
from isocost.analysis.results_table import final_points, sizes_in_order
from isocost.errors import ConfigError
from synthetic_results import BEST_GUIDANCE, TABLE_1, paper_table, planted_table

KERNEL = "mmd_efficientnet"


def random_table(seed: int) -> pd.DataFrame:
    """Points whose costs and values are coarse, so that ties abound."""
    generator = np.random.default_rng(seed)
    table = planted_table(snapshots=())
    values = generator.integers(1, 40, len(table)) / 10
    return table.assign(
        normalized_cost=generator.integers(1, 25, len(table)).astype(float),
        mmd_efficientnet=values,
        mmd_efficientnet_low=values - 0.2,
        mmd_efficientnet_high=values + 0.2,
        alignment=values,
    )


@pytest.mark.parametrize(("metric", "pick"), [(KERNEL, "idxmin"), ("alignment", "idxmax")])
def test_best_guidance_is_what_pandas_finds(metric: str, pick: str) -> None:
    table = planted_table(noise=0.01)
    table["alignment"] = table["alignment"].sample(frac=1, random_state=1).to_numpy()
    groups = table[table["is_final"]].groupby(["size", "solver", "num_steps"])[metric]
    expected = set(table.loc[getattr(groups, pick)(), "point"])
    assert set(best_guidance(table, metric)["point"]) == expected


def test_planted_guidance_is_found_inside_the_grid() -> None:
    found = best_guidance(planted_table(), KERNEL)
    assert (found["guidance"] == BEST_GUIDANCE).all()
    assert not found["guidance_at_boundary"].any()


@pytest.mark.parametrize("guidance", [(2.0, 3.0, 5.0), (1.0, 1.5, 2.0), (2.0,)])
def test_an_optimum_at_the_edge_is_flagged(guidance: tuple[float, ...]) -> None:
    assert best_guidance(planted_table(guidance=guidance), KERNEL)["guidance_at_boundary"].all()


def test_sampling_without_guidance_is_no_search_with_an_edge() -> None:
    assert not best_guidance(planted_table(guidance=(1.0,)), KERNEL)["guidance_at_boundary"].any()


def test_guidance_zero_is_no_edge() -> None:
    table = planted_table(guidance=(2.0, 3.0))
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
    found = pareto(table, "normalized_cost", metric)
    assert {(cost, sign * value) for cost, value in zip(found["normalized_cost"], found[metric], strict=True)} == expected
    assert len(found) == len(expected)
    assert found["normalized_cost"].is_monotonic_increasing


def test_every_size_of_table_1_is_on_the_frontier() -> None:
    table = paper_table().sample(frac=1, random_state=0)
    assert list(pareto(table, "normalized_cost", "frechet_efficientnet")["size"]) == list(TABLE_1)
    assert sizes_in_order(table) == list(TABLE_1)


def test_budgets_on_table_1_take_in_equality() -> None:
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
    assert not choices[1].undecided, "one size leaves nothing to decide"


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
def test_undecided_is_where_intervals_overlap(half_width: float, undecided: bool) -> None:
    table = planted_table(sizes=("0.2M", "0.8M"), num_steps=(4,), guidance=(1.0,), solvers=("ddim/trailing",), snapshots=())
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


def test_training_marks_do_not_compete() -> None:
    table = planted_table()
    table.loc[~table["is_final"], KERNEL] = 1e-6
    assert final_points(table, KERNEL)["is_final"].all()
    assert pareto(table, "nfe", KERNEL)["is_final"].all()
    with pytest.raises(ConfigError, match="no finished checkpoint"):
        best_guidance(table[~table["is_final"]], KERNEL)


@pytest.mark.parametrize(("column", "other"), [("protocol", "newer"), ("num_images", 50), ("seed", 7)])
def test_what_cannot_be_compared_is_refused_by_name(column: str, other: object) -> None:
    table = planted_table()
    table.loc[table.index[:3], column] = other
    with pytest.raises(ConfigError, match=rf"differ in {column}.*{other} \(3 points\)"):
        pareto(table, "nfe", KERNEL)


def test_points_without_the_metric_do_not_count_as_mixed() -> None:
    table = planted_table()
    table.loc[table.index[:3], "protocol"] = "newer"
    table.loc[table.index[:3], KERNEL] = np.nan
    assert len(best_guidance(table, KERNEL))


def test_two_points_of_one_configuration_are_refused() -> None:
    table = planted_table()
    twin = table[table["is_final"]].iloc[[0]].assign(point="twin")
    with pytest.raises(ConfigError, match="twin stand for the same configuration"):
        best_guidance(pd.concat([table, twin], ignore_index=True), KERNEL)


def test_unknown_names_and_missing_numbers_are_one_clear_line() -> None:
    table = planted_table()
    with pytest.raises(ConfigError, match="no metric is called 'beauty'"):
        best_guidance(table, "beauty")
    with pytest.raises(ConfigError, match="no cost is called 'steps'"):
        pareto(table, "steps", KERNEL)
    with pytest.raises(ConfigError, match="no point carries a measured ms_per_image"):
        pareto(table.assign(ms_per_image=np.nan), "ms_per_image", KERNEL)
    with pytest.raises(ConfigError, match="no point carries alignment"):
        best_guidance(table.assign(alignment=np.nan), "alignment")
    for budget in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="a budget is a positive number"):
            best_at_budgets(table, "nfe", KERNEL, [budget])


@pytest.mark.parametrize("cost", list(COSTS))
def test_default_budgets_spread_over_the_log_range(cost: str) -> None:
    table = planted_table()
    budgets = default_budgets(table, cost)
    costs = table.loc[table["is_final"], cost]
    assert len(budgets) == 5
    assert all(float(f"{budget:.2g}") == budget for budget in budgets), "two significant digits"
    assert costs.max() <= budgets[-1] <= costs.max() * 1.1
    steps = np.diff(np.log(budgets))
    assert steps.max() - steps.min() < 2 * np.log(1.1)
    assert not any(choice.best is None or choice.beyond_data for choice in best_at_budgets(table, cost, KERNEL, budgets))


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((0.1234, 0.12, 0.1266), "0.123 [0.120, 0.127]"),
        ((22.354, 22.0, 22.8), "22.4 [22.0, 22.8]"),
        ((0.99912, 0.9990, 0.9992), "0.9991 [0.9990, 0.9992]"),
        ((-0.00042, -0.001, 0.0002), "-0.00042 [-0.00100, 0.00020]"),
        ((1887.5, None, None), "1888"),
    ],
)
def test_scores_show_the_digits_they_need(numbers: tuple[float, float, float], text: str) -> None:
    assert format_score(*numbers).startswith(text) or format_score(*numbers) == text
