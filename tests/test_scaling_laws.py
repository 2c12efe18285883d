"""Scaling laws of quality over training compute, on synthetic curves whose law is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from isocost.analysis.frontier_ci import frontier_points
from isocost.analysis.power_laws import fit_law
from isocost.analysis.scaling_laws import fit_scaling_laws, points_over_compute
from isocost.errors import ConfigError
from isocost.report import plot_data
from synthetic_results import synthetic_table

KERNEL = "mmd_efficientnet"
COMPUTE = np.geomspace(1e3, 1e7, 9)


def synthetic_curve(scale: float, exponent: float, asymptote: float, noise: float, seed: int) -> np.ndarray:
    truth = asymptote + scale * COMPUTE**-exponent
    return truth * (1 + noise * np.random.default_rng(seed).standard_normal(len(COMPUTE)))


@pytest.mark.parametrize(("scale", "exponent", "asymptote"), [(50.0, 0.3, 0.0), (400.0, 0.5, 0.9), (20.0, 0.234, 0.4)])
def test_a_known_law_is_found_exactly_without_noise(scale: float, exponent: float, asymptote: float) -> None:
    law = fit_law("known", COMPUTE, synthetic_curve(scale, exponent, asymptote, 0.0, 0))
    assert law.exponent.value == pytest.approx(exponent, rel=1e-3)
    assert law.scale.value == pytest.approx(scale, rel=5e-3)
    assert law.asymptote.value == pytest.approx(asymptote, abs=1e-3)
    assert law.misfit < 1e-5
    assert law.at(1e5) == pytest.approx(asymptote + scale * 1e5**-exponent, rel=1e-4)


def test_intervals_cover_the_true_exponent_and_saturation() -> None:
    noise, saturation = 0.02, (400 / 0.9) ** 2
    covered = {"exponent": 0, "asymptote": 0, "saturation": 0}
    for seed in range(40):
        values = synthetic_curve(400.0, 0.5, 0.9, noise, seed)
        law = fit_law("known", COMPUTE, values, noise * values, num_replicates=60, seed=seed)
        assert law.saturation is not None
        for name, truth in (("exponent", 0.5), ("asymptote", 0.9), ("saturation", saturation)):
            interval = getattr(law, name)
            covered[name] += interval.low <= truth <= interval.high
    assert all(32 <= count <= 40 for count in covered.values()), covered


def test_saturation_is_reported_only_where_there_is_one() -> None:
    straight = synthetic_curve(50.0, 0.3, 0.0, 0.02, 1)
    law = fit_law("straight", COMPUTE, straight, 0.02 * straight)
    assert law.saturation is None
    assert "no saturation within the range of its 9 points" in str(law)
    bent = synthetic_curve(400.0, 0.5, 0.9, 0.02, 1)
    law = fit_law("bent", COMPUTE, bent, 0.02 * bent)
    assert law.saturation is not None
    assert "saturates at" in str(law)


def test_a_curve_that_does_not_fall_has_no_law() -> None:
    for values in (np.full(9, 2.0), np.linspace(1.0, 2.0, 9), np.array([9.0, *[2.0] * 8])):
        law = fit_law("flat", COMPUTE, values, 0.01 * values)
        assert not law.is_found
        assert law.saturation is None
        assert str(law) == "flat: no power law fits its 9 points"


@pytest.mark.slow
def test_both_axes_give_the_same_law_and_differ_by_the_batch_size() -> None:
    table = synthetic_table(noise=0.0)
    points = points_over_compute(table, KERNEL, batch_size=64)
    assert set(points["guidance"]) == {2.0}
    assert points.groupby("size")["images_seen"].nunique().eq(4).all()
    assert np.allclose(points["training_gflop"], points["normalized_training_compute"] * 3 * 64)
    true, papers = (fit_scaling_laws(table, KERNEL, 64, axis) for axis in ("training_gflop", "normalized_training_compute"))
    assert true.sizes[0].exponent.value == pytest.approx(papers.sizes[0].exponent.value, rel=1e-3)
    assert true.setting.endswith("guidance 2")


def test_the_family_follows_the_best_size_at_each_compute() -> None:
    points = points_over_compute(synthetic_table(noise=0.0), KERNEL, 64).sort_values(["training_gflop", KERNEL])
    compute, values = (points[column].to_numpy(dtype=float) for column in ("training_gflop", KERNEL))
    budgets, frontier = frontier_points(compute, values, np.full(len(values), np.nan), 50, 0)
    assert len(frontier) == 1, "no replicates without intervals"
    assert frontier[0].tolist() == [values[compute <= budget].min() for budget in budgets]
    fitted = fit_scaling_laws(synthetic_table(noise=0.0, half_width=1e-6), KERNEL, 64)
    assert fitted.family is not None
    assert fitted.family.num_points == len(budgets)
    assert [law.name for law in fitted.sizes] == ["0.2M", "0.8M", "3.2M", "7.1M", "12.6M"]


@pytest.mark.slow
def test_fractions_are_fitted_as_one_minus_the_value_and_short_curves_are_left_out() -> None:
    table = synthetic_table(noise=0.0)
    law = fit_scaling_laws(table, "alignment", 64).sizes[0]
    assert law.exponent.value > 0
    few = table[(table["size"] != "0.8M") | (table["images_seen"] >= 100_000)]
    fitted = fit_scaling_laws(few, KERNEL, 64)
    assert fitted.left_out == ("0.8M",)
    assert len(fitted.sizes) == 4


def at_settings(table: pd.DataFrame, *settings: tuple[int, float]) -> pd.DataFrame:
    """All snapshots of a table, scored at each of these numbers of steps and guidances."""
    snapshots = points_over_compute(table, KERNEL)
    parts = [
        snapshots.assign(num_steps=steps, guidance=guidance, point=snapshots["point"] + f"-{steps}-{guidance:g}")
        for steps, guidance in settings
    ]
    return pd.concat(parts, ignore_index=True)


def test_the_figure_and_the_law_rest_on_the_same_setting() -> None:
    tied = at_settings(synthetic_table(noise=0.0), (4, 1.0), (16, 3.0), (16, 1.5), (8, 1.0))
    law, figure = fit_scaling_laws(tied, KERNEL, 64), plot_data.compute_curves(tied, KERNEL)
    assert law.setting == figure.setting == "ddim/trailing, 16 steps, guidance 1.5"
    first = figure.series[0]
    points = points_over_compute(tied, KERNEL)
    assert first.y.tolist() == points.loc[points["size"] == first.label, KERNEL].tolist()
    assert len(first.x) == law.sizes[0].num_points


def test_a_setting_with_final_points_only_has_no_curve() -> None:
    table = at_settings(synthetic_table(noise=0.0, sizes=("0.2M", "0.8M")), (16, 2.0))
    finals = [table[table["is_final"]].assign(num_steps=32, point=lambda rows: rows["point"] + "f") for _ in range(6)]
    finals = [rows.assign(size=rows["size"] + f" {number}") for number, rows in enumerate(finals)]
    combined = pd.concat([table, *finals], ignore_index=True)
    assert (combined["num_steps"] == 32).sum() > (combined["num_steps"] == 16).sum()
    assert set(points_over_compute(combined, KERNEL)["num_steps"]) == {16}
    assert plot_data.compute_curves(combined, KERNEL).setting == fit_scaling_laws(combined, KERNEL, 64).setting


def test_metrics_and_axes_without_a_law_are_refused() -> None:
    with pytest.raises(ConfigError, match="training_gflop or normalized_training_compute"):
        fit_scaling_laws(synthetic_table(), KERNEL, 64, axis="steps")
    with pytest.raises(ConfigError, match="no law for a metric without a maximum"):
        fit_scaling_laws(synthetic_table(), "psnr", 64)
    with pytest.raises(ConfigError, match="no point has lpips"):
        fit_scaling_laws(pd.DataFrame(synthetic_table()).assign(lpips=np.nan), "lpips", 64)
