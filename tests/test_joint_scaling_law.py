"""Laws of the frontier and predictions of a held-out size, on synthetic tables with a known law and on the paper's Table 1."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from isocost.analysis.joint_scaling_law import frontier_law, predict_held_out
from isocost.analysis.power_laws import fit_frontier, fit_law
from isocost.errors import ConfigError
from synthetic_results import PARAMETERS, exact, measured, paper_table, synthetic_table

KERNEL = "mmd_efficientnet"
FID = "frechet_efficientnet"
STEPS = (1, 2, 4, 8, 16, 32)
LOSS_AT_32_STEPS = 0.5 / (1.6 * 32) ** 1.3
NUM_TABLES = 40


def synthetic(**changes: object) -> pd.DataFrame:
    """A table with exponents 0.4 over size and 1.3 over steps and asymptote 0.02; DPM-Solver++ and guidance 2 are the best."""
    return synthetic_table(snapshots=(), **{"num_steps": STEPS, "guidance": (1.0, 2.0, 3.0), **changes})  # type: ignore[arg-type]


OVER = {  # variable of the law: (table, exponent, asymptote, half width of a score's interval)
    "num_parameters": (synthetic(), 0.4, 0.02 + LOSS_AT_32_STEPS, 0.001),
    "normalized_cost": (synthetic(sizes=("12.6M",)), 1.3, 0.02 + 8 / PARAMETERS["12.6M"] ** 0.4, 0.003),
}


@pytest.mark.parametrize("over", list(OVER))
def test_a_known_law_is_found_exactly_in_exact_scores(over: str) -> None:
    table, exponent, asymptote, _ = OVER[over]
    law = frontier_law(exact(table), KERNEL, over)
    assert law.exponent.value == pytest.approx(exponent, rel=1e-2)
    assert law.asymptote.value == pytest.approx(asymptote, rel=1e-2)
    assert law.misfit < 1e-3
    assert law.saturation is None, "nothing is certain without intervals"
    assert str(law).endswith("no intervals, because the scores have none")


@pytest.mark.slow
@pytest.mark.parametrize("over", ["num_parameters", "normalized_cost"])
def test_intervals_cover_the_true_exponent_and_asymptote(over: str) -> None:
    table, exponent, asymptote, half_width = OVER[over]
    covered = {"exponent": 0, "asymptote": 0}
    for seed in range(NUM_TABLES):
        law = frontier_law(measured(table, half_width, seed), KERNEL, over, num_replicates=30, seed=seed)
        covered["exponent"] += law.exponent.low <= exponent <= law.exponent.high
        covered["asymptote"] += law.asymptote.low <= asymptote <= law.asymptote.high
    assert all(count >= 0.85 * NUM_TABLES for count in covered.values()), covered


def test_an_outlier_does_not_change_the_law_of_a_frontier() -> None:
    x = np.geomspace(1, 1000, 9)
    values = 0.1 + 2 * x**-0.5
    values[4] *= 1.5
    robust, squares = fit_frontier("robust", x, values[None]), fit_law("squares", x, values)
    assert robust.exponent.value == pytest.approx(0.5, rel=1e-2)
    assert abs(squares.exponent.value - 0.5) > 0.03


def test_values_below_zero_have_no_logarithm_and_are_left_out() -> None:
    x = np.geomspace(1, 1000, 9)
    values = 0.1 + 2 * x**-0.5
    with_negative = np.where(np.arange(9) == 3, -0.1, values)
    law = fit_frontier("known", x, np.stack([values, with_negative, -values]))
    assert law.exponent.low == pytest.approx(0.5, rel=1e-2)
    assert law.exponent.high == pytest.approx(0.5, rel=1e-2)


def test_a_fraction_is_fitted_as_one_minus_its_value_and_saturation_needs_an_asymptote() -> None:
    table = measured(synthetic(sizes=("12.6M",)), 0.0005, 0)
    fraction = 1 - table[KERNEL]
    mirrored = table.assign(alignment=fraction, alignment_low=fraction - 0.0005, alignment_high=fraction + 0.0005)
    law, mirrored_law = frontier_law(table, KERNEL, "nfe", 40), frontier_law(mirrored, "alignment", "nfe", 40)
    assert law.exponent.value == pytest.approx(mirrored_law.exponent.value, rel=1e-6)
    assert law.saturation is not None
    assert law.saturation.low <= law.saturation.value <= law.saturation.high
    assert "saturates at" in str(law)


# --- a held-out size --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", ["normalized_cost", "gflop"])
def test_a_size_that_follows_the_law_is_predicted_from_the_smaller_ones(cost: str) -> None:
    fit = predict_held_out(exact(synthetic(guidance=(2.0, 3.0))), KERNEL, cost)
    assert (fit.size, fit.sizes) == ("12.6M", ("0.2M", "0.8M", "3.2M", "7.1M"))
    assert fit.mean_error < 0.002
    assert fit.exponent_of_size.value == pytest.approx(0.4, rel=0.02)
    assert fit.exponent_of_steps is not None
    assert fit.exponent_of_steps.value == pytest.approx(1.3, rel=0.02)
    assert [prediction.covers for prediction in fit.predictions] == [None] * len(STEPS)
    assert "no intervals" in str(fit)


@pytest.mark.slow
def test_the_intervals_of_a_prediction_contain_the_measured_values() -> None:
    fractions, errors, exponents = [], [], []
    for seed in range(6):
        fit = predict_held_out(measured(synthetic(), 0.002, seed), KERNEL, num_replicates=30, seed=seed)
        fractions.append(fit.num_covered / len(fit.predictions))
        errors.append(fit.mean_error)
        exponents.append(fit.exponent_of_size.low <= 0.4 <= fit.exponent_of_size.high)
    assert np.mean(fractions) >= 0.85
    assert np.mean(errors) < 0.05
    assert np.mean(exponents) >= 0.8
    assert f"{fit.num_covered} of {len(fit.predictions)} intervals contain" in str(fit)


def test_a_size_that_breaks_the_law_is_reported() -> None:
    table = measured(synthetic(), 0.001, 0)
    worse = table["size"] == "12.6M"
    for column in (KERNEL, f"{KERNEL}_low", f"{KERNEL}_high"):
        table.loc[worse, column] *= 1.5
    fit = predict_held_out(table, KERNEL, num_replicates=40)
    assert fit.mean_error == pytest.approx(1 / 3, abs=0.05)
    assert fit.num_covered <= 1
    assert all(prediction.relative_error < 0 for prediction in fit.predictions)


def test_the_largest_size_of_the_papers_table_1_is_predicted_from_the_ten_others() -> None:
    fit = predict_held_out(paper_table(), FID)
    (prediction,) = fit.predictions
    assert (fit.size, prediction.measured) == ("5B", 20.14)
    assert fit.exponent_of_steps is None, "all points have 50 steps"
    assert prediction.predicted == pytest.approx(20.14, rel=0.01)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_tables_without_a_law_are_refused_in_one_line() -> None:
    table = synthetic()
    with pytest.raises(ConfigError, match="no law over 'width'; known: normalized_cost"):
        frontier_law(table, KERNEL, "width")
    with pytest.raises(ConfigError, match="but 3 sizes have a value above 0: train more sizes"):
        frontier_law(synthetic(sizes=("0.2M", "0.8M", "3.2M")), KERNEL, "num_parameters")
    with pytest.raises(ConfigError, match="the frontier over nfe has 2 points above 0: sweep more"):
        frontier_law(synthetic(num_steps=(1, 2), guidance=(1.0,)), KERNEL, "nfe")
    with pytest.raises(ConfigError, match="no law for a metric without a maximum"):
        predict_held_out(table.assign(psnr=20.0), "psnr")
    with pytest.raises(ConfigError, match=r"without 3\.2M there are 2 sizes: a law over size needs 3"):
        predict_held_out(synthetic(sizes=("0.2M", "0.8M", "3.2M")), KERNEL)
    with pytest.raises(ConfigError, match="a ms_per_image of 0 has no logarithm"):
        predict_held_out(table.assign(ms_per_image=0.0), KERNEL, "ms_per_image")
    with_negative = table.assign(**{KERNEL: table[KERNEL].where(table["size"] != "0.8M", -1.0)})
    with pytest.raises(ConfigError, match=r"0\.8M has no mmd_efficientnet above 0"):
        predict_held_out(with_negative, KERNEL)
