"""Laws of quality against compute, on curves whose law is known, and on the paper's own last points."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from isocost.analysis.frontier_ci import frontier_points
from isocost.analysis.power_laws import fit_law
from isocost.analysis.scaling_laws import compute_curves, scaling
from isocost.errors import ConfigError
from synthetic_results import planted_table

KERNEL = "mmd_efficientnet"
COMPUTE = np.geomspace(1e3, 1e7, 9)


def planted_curve(scale: float, exponent: float, floor: float, noise: float, seed: int) -> np.ndarray:
    truth = floor + scale * COMPUTE**-exponent
    return truth * (1 + noise * np.random.default_rng(seed).standard_normal(len(COMPUTE)))


@pytest.mark.parametrize(("scale", "exponent", "floor"), [(50.0, 0.3, 0.0), (400.0, 0.5, 0.9), (20.0, 0.234, 0.4)])
def test_a_planted_law_is_found_exactly_without_noise(scale: float, exponent: float, floor: float) -> None:
    law = fit_law("planted", COMPUTE, planted_curve(scale, exponent, floor, 0.0, 0))
    assert law.exponent.value == pytest.approx(exponent, rel=1e-3)
    assert law.scale.value == pytest.approx(scale, rel=5e-3)
    assert law.floor.value == pytest.approx(floor, abs=1e-3)
    assert law.misfit < 1e-5
    assert law.at(1e5) == pytest.approx(floor + scale * 1e5**-exponent, rel=1e-4)


def test_intervals_cover_the_planted_exponent_and_saturation() -> None:
    noise, saturation = 0.02, (400 / 0.9) ** 2
    covered = {"exponent": 0, "floor": 0, "saturation": 0}
    for seed in range(40):
        values = planted_curve(400.0, 0.5, 0.9, noise, seed)
        law = fit_law("planted", COMPUTE, values, noise * values, num_bootstrap=60, seed=seed)
        assert law.saturation is not None
        for name, truth in (("exponent", 0.5), ("floor", 0.9), ("saturation", saturation)):
            interval = getattr(law, name)
            covered[name] += interval.low <= truth <= interval.high
    assert all(32 <= count <= 40 for count in covered.values()), covered


def test_saturation_is_named_only_where_there_is_one() -> None:
    straight = planted_curve(50.0, 0.3, 0.0, 0.02, 1)
    law = fit_law("straight", COMPUTE, straight, 0.02 * straight)
    assert law.saturation is None
    assert "no saturation within its 9 points" in str(law)
    bent = planted_curve(400.0, 0.5, 0.9, 0.02, 1)
    law = fit_law("bent", COMPUTE, bent, 0.02 * bent)
    assert law.saturation is not None
    assert "saturates at" in str(law)


def test_a_curve_that_does_not_fall_has_no_law() -> None:
    for values in (np.full(9, 2.0), np.linspace(1.0, 2.0, 9), np.array([9.0, *[2.0] * 8])):
        law = fit_law("flat", COMPUTE, values, 0.01 * values)
        assert not law.is_found
        assert law.saturation is None
        assert str(law) == "flat: no power law within its 9 points"


def test_both_axes_tell_the_same_law_and_differ_by_the_batch() -> None:
    table = planted_table(noise=0.0)
    curves = compute_curves(table, KERNEL, batch_size=64)
    assert set(curves["guidance"]) == {2.0}
    assert curves.groupby("size")["images_seen"].nunique().eq(4).all()
    assert np.allclose(curves["training_gflop"], curves["normalized_training_compute"] * 3 * 64)
    true, papers = (scaling(table, KERNEL, 64, axis) for axis in ("training_gflop", "normalized_training_compute"))
    assert true.sizes[0].exponent.value == pytest.approx(papers.sizes[0].exponent.value, rel=1e-3)
    assert true.setting.endswith("guidance 2")


def test_the_family_follows_the_best_size_at_each_compute() -> None:
    curves = compute_curves(planted_table(noise=0.0), KERNEL, 64).sort_values(["training_gflop", KERNEL])
    compute, values = (curves[column].to_numpy(dtype=float) for column in ("training_gflop", KERNEL))
    at, draws = frontier_points(compute, values, np.full(len(values), np.nan), 50, 0)
    assert len(draws) == 1, "no redraws without intervals"
    assert draws[0].tolist() == [values[compute <= budget].min() for budget in at]
    fitted = scaling(planted_table(noise=0.0, half_width=1e-6), KERNEL, 64)
    assert fitted.family is not None
    assert fitted.family.num_snapshots == len(at)
    assert [law.name for law in fitted.sizes] == ["0.2M", "0.8M", "3.2M", "7.1M", "12.6M"]


def test_shares_are_fitted_by_what_they_lack_of_one_and_short_curves_are_left_out() -> None:
    table = planted_table(noise=0.0)
    law = scaling(table, "alignment", 64).sizes[0]
    assert law.exponent.value > 0
    few = table[(table["size"] != "0.8M") | (table["images_seen"] >= 100_000)]
    fitted = scaling(few, KERNEL, 64)
    assert fitted.left_out == ("0.8M",)
    assert len(fitted.sizes) == 4


def test_what_has_no_law_is_refused() -> None:
    with pytest.raises(ConfigError, match="training_gflop or normalized_training_compute"):
        scaling(planted_table(), KERNEL, 64, axis="steps")
    with pytest.raises(ConfigError, match="no law for a quality without an upper end"):
        scaling(planted_table(), "psnr", 64)
    with pytest.raises(ConfigError, match="no point carries"):
        scaling(pd.DataFrame(planted_table()).assign(lpips=np.nan), "lpips", 64)
