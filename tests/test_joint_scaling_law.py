"""Laws of the frontier on tables whose law is known, and a size held out: of planted tables, and of the paper's Table 1."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from isocost.analysis.joint_scaling_law import frontier_law, predict_held_out
from isocost.analysis.power_laws import fit_frontier, fit_law
from isocost.errors import ConfigError
from synthetic_results import PARAMETERS, exact, measured, paper_table, planted_table

KERNEL = "mmd_efficientnet"
FID = "frechet_efficientnet"
STEPS = (1, 2, 4, 8, 16, 32)
LEFT_BY_32_STEPS = 0.5 / (1.6 * 32) ** 1.3
NUM_TABLES = 40


def planted(**changes: object) -> pd.DataFrame:
    """Of exponents 0.4 over size and 1.3 over steps, floor 0.02; second order is the best solver, 2 the best guidance."""
    return planted_table(snapshots=(), **{"num_steps": STEPS, "guidance": (1.0, 2.0, 3.0), **changes})  # type: ignore[arg-type]


OVER = {  # over what: (the table, its exponent, its floor, half width of a score's interval)
    "num_parameters": (planted(), 0.4, 0.02 + LEFT_BY_32_STEPS, 0.001),
    "normalized_cost": (planted(sizes=("12.6M",)), 1.3, 0.02 + 8 / PARAMETERS["12.6M"] ** 0.4, 0.003),
}


@pytest.mark.parametrize("over", list(OVER))
def test_a_planted_law_is_found_exactly_in_exact_scores(over: str) -> None:
    table, exponent, floor, _ = OVER[over]
    law = frontier_law(exact(table), KERNEL, over)
    assert law.exponent.value == pytest.approx(exponent, rel=1e-2)
    assert law.floor.value == pytest.approx(floor, rel=1e-2)
    assert law.misfit < 1e-3
    assert law.saturation is None, "nothing is certain without intervals"
    assert str(law).endswith("no intervals, since the scores have none")


@pytest.mark.parametrize("over", list(OVER))
def test_intervals_cover_the_planted_exponent_and_floor(over: str) -> None:
    table, exponent, floor, half_width = OVER[over]
    covered = {"exponent": 0, "floor": 0}
    for seed in range(NUM_TABLES):
        law = frontier_law(measured(table, half_width, seed), KERNEL, over, num_replicates=30, seed=seed)
        covered["exponent"] += law.exponent.low <= exponent <= law.exponent.high
        covered["floor"] += law.floor.low <= floor <= law.floor.high
    assert all(count >= 0.85 * NUM_TABLES for count in covered.values()), covered


def test_a_point_far_off_does_not_pull_the_law_of_a_frontier() -> None:
    x = np.geomspace(1, 1000, 9)
    values = 0.1 + 2 * x**-0.5
    values[4] *= 1.5
    robust, squares = fit_frontier("robust", x, values[None]), fit_law("squares", x, values)
    assert robust.exponent.value == pytest.approx(0.5, rel=1e-2)
    assert abs(squares.exponent.value - 0.5) > 0.03


def test_values_below_zero_have_no_logarithm_and_are_left_out() -> None:
    x = np.geomspace(1, 1000, 9)
    values = 0.1 + 2 * x**-0.5
    one_below = np.where(np.arange(9) == 3, -0.1, values)
    law = fit_frontier("planted", x, np.stack([values, one_below, -values]))
    assert law.exponent.low == pytest.approx(0.5, rel=1e-2)
    assert law.exponent.high == pytest.approx(0.5, rel=1e-2)


def test_a_share_is_fitted_by_what_it_lacks_and_saturation_needs_a_floor() -> None:
    table = measured(planted(sizes=("12.6M",)), 0.0005, 0)
    lacks = 1 - table[KERNEL]
    mirrored = table.assign(alignment=lacks, alignment_low=lacks - 0.0005, alignment_high=lacks + 0.0005)
    ours, theirs = (frontier_law(each, name, "nfe", 40) for each, name in ((table, KERNEL), (mirrored, "alignment")))
    assert ours.exponent.value == pytest.approx(theirs.exponent.value, rel=1e-6)
    assert ours.saturation is not None
    assert ours.saturation.low <= ours.saturation.value <= ours.saturation.high
    assert "saturates at" in str(ours)


# --- a size held out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", ["normalized_cost", "gflop"])
def test_a_planted_size_is_predicted_from_the_smaller_ones(cost: str) -> None:
    found = predict_held_out(exact(planted(guidance=(2.0, 3.0))), KERNEL, cost)
    assert (found.size, found.sizes) == ("12.6M", ("0.2M", "0.8M", "3.2M", "7.1M"))
    assert found.mean_error < 0.002
    assert found.exponent_of_size.value == pytest.approx(0.4, rel=0.02)
    assert found.exponent_of_steps is not None
    assert found.exponent_of_steps.value == pytest.approx(1.3, rel=0.02)
    assert [one.covers for one in found.predictions] == [None] * len(STEPS)
    assert "no intervals" in str(found)


def test_the_intervals_of_a_prediction_hold_what_is_measured() -> None:
    shares, errors, exponents = [], [], []
    for seed in range(6):
        found = predict_held_out(measured(planted(), 0.002, seed), KERNEL, num_replicates=30, seed=seed)
        shares.append(found.num_covered / len(found.predictions))
        errors.append(found.mean_error)
        exponents.append(found.exponent_of_size.low <= 0.4 <= found.exponent_of_size.high)
    assert np.mean(shares) >= 0.85
    assert np.mean(errors) < 0.05
    assert np.mean(exponents) >= 0.8
    assert f"{found.num_covered} of {len(found.predictions)} intervals hold" in str(found)


def test_a_size_that_breaks_the_law_is_said_to() -> None:
    table = measured(planted(), 0.001, 0)
    worse = table["size"] == "12.6M"
    for column in (KERNEL, f"{KERNEL}_low", f"{KERNEL}_high"):
        table.loc[worse, column] *= 1.5
    found = predict_held_out(table, KERNEL, num_replicates=40)
    assert found.mean_error == pytest.approx(1 / 3, abs=0.05)
    assert found.num_covered <= 1
    assert all(one.relative_error < 0 for one in found.predictions)


def test_the_largest_size_of_the_papers_table_1_is_predicted_from_the_ten_others() -> None:
    found = predict_held_out(paper_table(), FID)
    (only,) = found.predictions
    assert (found.size, only.measured) == ("5B", 20.14)
    assert found.exponent_of_steps is None, "all took 50 steps"
    assert only.predicted == pytest.approx(20.14, rel=0.01)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_what_has_no_law_is_refused_in_one_line() -> None:
    table = planted()
    with pytest.raises(ConfigError, match="no law over 'width'; known: normalized_cost"):
        frontier_law(table, KERNEL, "width")
    with pytest.raises(ConfigError, match="but 3 sizes have a value above 0: train more sizes"):
        frontier_law(planted(sizes=("0.2M", "0.8M", "3.2M")), KERNEL, "num_parameters")
    with pytest.raises(ConfigError, match="the frontier over nfe has 2 points above 0: sweep more"):
        frontier_law(planted(num_steps=(1, 2), guidance=(1.0,)), KERNEL, "nfe")
    with pytest.raises(ConfigError, match="no law for a quality without an upper end"):
        predict_held_out(table.assign(psnr=20.0), "psnr")
    with pytest.raises(ConfigError, match=r"without 3\.2M there are 2 sizes: a law over size takes 3"):
        predict_held_out(planted(sizes=("0.2M", "0.8M", "3.2M")), KERNEL)
    with pytest.raises(ConfigError, match="a ms_per_image of 0 has no logarithm"):
        predict_held_out(table.assign(ms_per_image=0.0), KERNEL, "ms_per_image")
    negative_prompt = table.assign(**{KERNEL: table[KERNEL].where(table["size"] != "0.8M", -1.0)})
    with pytest.raises(ConfigError, match=r"0\.8M has no mmd_efficientnet above 0"):
        predict_held_out(negative_prompt, KERNEL)
