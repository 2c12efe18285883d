"""Distances as pure functions. Oracles: closed forms for Gaussians, scipy, torch-fidelity if installed, plain loops."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import scipy.linalg
import torch

from isocost.metrics import mmd
from isocost.metrics.frechet import Moments, frechet_distance, frechet_from_moments, frechet_influence
from isocost.metrics.image_similarity import psnr
from isocost.metrics.mmd import polynomial_kernel, squared_mmd


def mixing(width: int) -> np.ndarray:
    return np.random.default_rng(99).standard_normal((width, width)) / np.sqrt(width)


def draws(num: int, width: int, seed: int, *, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    """Gaussian features [num, width] of covariance scale² M'M with M = mixing(width)."""
    return shift + scale * np.random.default_rng(seed).standard_normal((num, width)) @ mixing(width)


def with_moments(mean: np.ndarray, covariance: np.ndarray, num: int, seed: int) -> np.ndarray:
    """Features [num, D] whose sample mean and covariance are `mean` and `covariance` up to rounding."""
    raw = np.random.default_rng(seed).standard_normal((num, len(mean)))
    white = np.linalg.qr(raw - raw.mean(0))[0] * np.sqrt(num - 1)
    values, vectors = np.linalg.eigh(covariance)
    return mean + white @ (vectors * np.sqrt(values.clip(0))).T


def by_sqrtm(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance by the formula of arXiv 1706.08500, with scipy's matrix square root."""
    offset, cov_a, cov_b = a.mean(0) - b.mean(0), np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return float(offset @ offset + np.trace(cov_a + cov_b - 2 * scipy.linalg.sqrtm(cov_a @ cov_b).real))


def by_loops(a: np.ndarray, b: np.ndarray) -> float:
    """Equation 4 of arXiv 1801.01401, pair by pair."""

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (sum(p * q for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3

    within_a = np.mean([kernel(x, y) for (i, x), (j, y) in product(enumerate(a), repeat=2) if i != j])
    within_b = np.mean([kernel(x, y) for (i, x), (j, y) in product(enumerate(b), repeat=2) if i != j])
    return float(within_a + within_b - 2 * np.mean([kernel(x, y) for x, y in product(a, b)]))


# --- Frechet ----------------------------------------------------------------------------------------------------------


def test_moments_equal_numpys_mean_and_covariance() -> None:
    features = draws(50, 7, 0, shift=3)
    moments = Moments.of(features.astype(np.float32))
    np.testing.assert_allclose(moments.mean, features.mean(0), rtol=1e-6)
    np.testing.assert_allclose(moments.covariance, np.cov(features, rowvar=False), rtol=1e-5, atol=1e-6)
    assert moments.covariance.dtype == np.float64
    np.testing.assert_allclose(moments.root.T @ moments.root, moments.covariance, rtol=1e-9, atol=1e-12)


def test_the_frechet_distance_of_commuting_gaussians_is_the_closed_form() -> None:
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((5, 5)))[0]
    cov_a, cov_b = np.array([4.0, 1.0, 0.25, 9.0, 2.0]), np.array([1.0, 1.0, 4.0, 0.09, 3.0])
    mean_a, mean_b = np.arange(5.0), np.array([1.0, -1.0, 0.5, 2.0, 4.0])
    a = with_moments(mean_a, rotation @ np.diag(cov_a) @ rotation.T, 40, 2)
    b = with_moments(mean_b, rotation @ np.diag(cov_b) @ rotation.T, 60, 3)
    expected = np.square(mean_a - mean_b).sum() + np.square(np.sqrt(cov_a) - np.sqrt(cov_b)).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_the_frechet_distance_of_gaussians_that_do_not_commute_is_the_closed_form_in_the_plane() -> None:
    cov_a, cov_b = np.array([[3.0, 1.0], [1.0, 2.0]]), np.array([[1.0, -0.5], [-0.5, 4.0]])
    product = cov_a @ cov_b
    trace_of_root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.trace(cov_a) + np.trace(cov_b) - 2 * trace_of_root
    zero = np.zeros(2)
    assert frechet_from_moments(Moments(zero, cov_a), Moments(zero, cov_b)) == pytest.approx(expected, rel=1e-12)
    distance = frechet_distance(with_moments(zero, cov_a, 30, 1), with_moments(zero, cov_b, 50, 2))
    assert distance == pytest.approx(expected, rel=1e-10)


def test_the_frechet_distance_of_many_draws_approaches_that_of_their_distributions() -> None:
    a, b = draws(100_000, 3, 1), draws(100_000, 3, 2, shift=0.5, scale=2)
    expected = 3 * 0.5**2 + np.square(mixing(3)).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("num_a", "num_b"), [(200, 300), (40, 40)])
def test_the_frechet_distance_equals_scipy(num_a: int, num_b: int) -> None:
    a, b = draws(num_a, 12, 1), draws(num_b, 12, 2, shift=0.3, scale=1.5)
    assert frechet_distance(a, b) == pytest.approx(by_sqrtm(a, b), rel=1e-8)


@pytest.mark.parametrize(("num_a", "num_b", "width"), [(200, 300, 12), (60, 500, 90), (40, 50, 90)])
def test_the_frechet_distance_equals_torch_fidelity(num_a: int, num_b: int, width: int) -> None:
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = draws(num_a, width, 1), draws(num_b, width, 2, shift=0.3, scale=1.5)
    statistics = [fidelity.fid_features_to_statistics(torch.from_numpy(features)) for features in (a, b)]
    expected = fidelity.fid_statistics_to_metric(*statistics, verbose=False)[fidelity.KEY_METRIC_FID]
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("num_a", "num_b"), [(15, 20), (10, 200), (200, 10), (2, 2)])
def test_sets_smaller_than_the_features_are_allowed(num_a: int, num_b: int) -> None:
    a, b = draws(num_a, 40, 1), draws(num_b, 40, 2, shift=0.2)
    offset = a.mean(0) - b.mean(0)
    singular = np.linalg.svd((a - a.mean(0)) @ (b - b.mean(0)).T, compute_uv=False) / np.sqrt((num_a - 1) * (num_b - 1))
    traces = np.cov(a, rowvar=False).trace() + np.cov(b, rowvar=False).trace()
    assert frechet_distance(a, b) == pytest.approx(offset @ offset + traces - 2 * singular.sum(), rel=1e-9)


def test_directions_without_variance_in_either_set_cost_only_their_offset() -> None:
    a, b = draws(50, 4, 1), draws(60, 4, 2)
    wide_a = np.hstack([a, np.full((50, 3), 2.0)])
    wide_b = np.hstack([b, np.full((60, 3), 5.0)])
    assert frechet_distance(wide_a, wide_b) == pytest.approx(frechet_distance(a, b) + 27, rel=1e-10)


def test_the_frechet_distance_of_sets_in_orthogonal_subspaces_is_the_closed_form() -> None:
    a, b = np.zeros((30, 6)), np.zeros((30, 6))
    a[:, :3], b[:, 3:] = draws(30, 3, 1), draws(30, 3, 2)
    offset = a.mean(0) - b.mean(0)
    expected = offset @ offset + np.cov(a, rowvar=False).trace() + np.cov(b, rowvar=False).trace()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("swapped", [False, True], ids=["first", "second"])
def test_a_set_of_one_repeated_image_has_zero_covariance(swapped: bool) -> None:
    spread, point = draws(50, 6, 1), np.full((30, 6), 0.5)
    offset = spread.mean(0) - 0.5
    expected = offset @ offset + np.cov(spread, rowvar=False).trace()
    a, b = (spread, point) if swapped else (point, spread)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_influence(a, b)[0] == pytest.approx(expected, rel=1e-9)


def test_the_frechet_distance_of_a_set_to_itself_is_zero() -> None:
    for features in (draws(300, 20, 1), draws(12, 20, 1)):
        assert frechet_distance(features, features) == pytest.approx(0, abs=1e-8)


def test_the_frechet_distance_has_the_symmetries_of_a_distance() -> None:
    a, b = draws(80, 10, 1), draws(50, 10, 2, shift=0.4)
    rotation = np.linalg.qr(np.random.default_rng(3).standard_normal((10, 10)))[0]
    value = frechet_distance(a, b)
    assert frechet_distance(b, a) == pytest.approx(value, rel=1e-10)
    assert frechet_distance(a @ rotation + 7, b @ rotation + 7) == pytest.approx(value, rel=1e-9)
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * value, rel=1e-10)
    assert frechet_distance(a[::-1], b) == pytest.approx(value, rel=1e-10)


def test_the_frechet_bias_falls_with_the_number_of_images() -> None:
    def mean_at(num: int) -> float:
        return float(np.mean([frechet_distance(draws(num, 8, 2 * seed), draws(num, 8, 2 * seed + 1)) for seed in range(60)]))

    small, large = mean_at(50), mean_at(200)
    assert small > 0
    assert small / large == pytest.approx(4, rel=0.25)


# --- Frechet: influence of each image ---------------------------------------------------------------------------------


def reweighted(features: np.ndarray, row: int, weight: float) -> Moments:
    """Moments after the weight of one image rises by `weight` and all weights are scaled to sum to one."""
    weights = np.full(len(features), (1 - weight) / len(features))
    weights[row] += weight
    mean = weights @ features
    covariance = (features - mean).T @ ((features - mean) * weights[:, None])
    return Moments(mean, covariance * len(features) / (len(features) - 1))


@pytest.mark.parametrize(("num_a", "num_b", "width"), [(300, 400, 5), (300, 30, 50), (30, 300, 50)])
def test_an_influence_is_the_derivative_by_an_images_weight(num_a: int, num_b: int, width: int) -> None:
    a, b = draws(num_a, width, 1, scale=1.3), draws(num_b, width, 2, shift=0.4)
    value, influence_a, influence_b = frechet_influence(a, b)
    assert value == pytest.approx(frechet_distance(a, b), rel=1e-10)
    assert (influence_a.shape, influence_b.shape) == ((num_a,), (num_b,))
    step, rows = 1e-5, range(0, 25, 6)
    moments_a, moments_b = Moments.of(a), Moments.of(b)

    def values_at(weight: float) -> tuple[list[float], list[float]]:
        return (
            [frechet_from_moments(reweighted(a, row, weight), moments_b) for row in rows],
            [frechet_from_moments(moments_a, reweighted(b, row, weight)) for row in rows],
        )

    derivatives = (np.array(values_at(step)) - np.array(values_at(-step))) / (2 * step)
    for derivative, influence, num in zip(derivatives, (influence_a, influence_b), (num_a, num_b), strict=True):
        np.testing.assert_allclose(derivative, influence[list(rows)], rtol=1e-3, atol=2 * np.abs(influence).max() / num)


def test_influences_sum_to_zero() -> None:
    _, influence_a, influence_b = frechet_influence(draws(60, 9, 1), draws(80, 9, 2, shift=1))
    for influence in (influence_a, influence_b):
        assert influence.sum() == pytest.approx(0, abs=1e-9 * np.abs(influence).max() * len(influence))
        assert influence.std() > 0


def test_given_moments_do_not_change_the_distance() -> None:
    a, b = draws(60, 9, 1), draws(80, 9, 2, shift=1)
    moments = Moments.of(b)
    assert frechet_influence(a, b, moments)[0] == frechet_influence(a, b)[0]
    assert frechet_from_moments(Moments.of(a), moments) == frechet_distance(a, b)


# --- squared MMD ------------------------------------------------------------------------------------------------------


def test_the_polynomial_kernel_is_the_cube_of_the_mean_product_plus_one() -> None:
    kernel = polynomial_kernel([[1.0, 2.0], [0.0, 0.0]], [[3.0, 1.0], [-1.0, -1.0], [2.0, 2.0]])
    np.testing.assert_allclose(kernel, [[3.5**3, (-0.5) ** 3, 4.0**3], [1, 1, 1]], rtol=1e-14)


@pytest.mark.parametrize(("num_a", "num_b"), [(12, 9), (2, 5), (7, 7)])
def test_the_squared_mmd_is_the_sum_over_pairs(num_a: int, num_b: int) -> None:
    a, b = draws(num_a, 6, 1), draws(num_b, 6, 2, shift=0.5)
    assert squared_mmd(a, b) == pytest.approx(by_loops(a, b), rel=1e-10)


def test_the_squared_mmd_equals_torch_fidelity_on_the_full_sets() -> None:
    fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    a, b = draws(120, 16, 1), draws(120, 16, 2, shift=0.2)
    expected = fidelity.kernel_mmd(a, b, kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_coef0=1)
    assert squared_mmd(a, b) == pytest.approx(expected, rel=1e-10)


def test_summing_in_blocks_does_not_change_the_squared_mmd(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = draws(50, 6, 1), draws(37, 6, 2, shift=0.5)
    expected = squared_mmd(a, b)
    monkeypatch.setattr(mmd, "_BLOCK_ROWS", 7)
    assert squared_mmd(a, b) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(("num_a", "num_b"), [(8, 8), (5, 40)])
@pytest.mark.fast_cases(1)
def test_the_squared_mmd_of_equal_distributions_is_zero_on_average(num_a: int, num_b: int) -> None:
    values = np.array([squared_mmd(draws(num_a, 4, 2 * seed), draws(num_b, 4, 2 * seed + 1)) for seed in range(3000)])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))
    assert 0.2 < (values < 0).mean() < 0.9


def test_the_squared_mmd_is_unbiased_if_the_distributions_differ() -> None:
    generator = np.random.default_rng(5)
    population_a, population_b = draws(6, 3, 1), draws(5, 3, 2, shift=0.6)
    within_a = polynomial_kernel(population_a, population_a).mean()
    within_b = polynomial_kernel(population_b, population_b).mean()
    expected = within_a + within_b - 2 * polynomial_kernel(population_a, population_b).mean()
    values = np.array(
        [
            squared_mmd(population_a[generator.integers(6, size=7)], population_b[generator.integers(5, size=11)])
            for _ in range(3000)
        ]
    )
    error = values.std() / np.sqrt(len(values))
    assert error < 0.1 * expected
    assert abs(values.mean() - expected) < 3 * error


def test_the_squared_mmd_is_symmetric_and_independent_of_order() -> None:
    a, b = draws(30, 6, 1), draws(20, 6, 2, shift=0.5)
    value = squared_mmd(a, b)
    assert squared_mmd(b, a) == pytest.approx(value, rel=1e-12)
    assert squared_mmd(a[::-1], b[::-1]) == pytest.approx(value, rel=1e-11)


def test_float32_features_far_from_zero_are_summed_in_double() -> None:
    a, b = (draws(20, 8, seed, shift=30).astype(np.float32) for seed in (1, 2))
    assert squared_mmd(a, b) == pytest.approx(by_loops(a.astype(np.longdouble), b.astype(np.longdouble)), abs=1e-5)


@pytest.mark.parametrize("distance", [frechet_distance, squared_mmd, polynomial_kernel])
def test_features_that_are_not_a_matrix_are_refused(distance: object) -> None:
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        distance(np.zeros(5), np.zeros((5, 1)))  # type: ignore[operator]


# --- images -----------------------------------------------------------------------------------------------------------


def test_psnr_equals_its_closed_form() -> None:
    a = np.full((3, 3, 4, 4), 100, dtype=np.uint8)
    b = a.copy()
    b[0] += 10
    b[1] -= 100
    b[2, 0, 0, 0] = 255
    expected = [20 * np.log10(25.5), 20 * np.log10(2.55), 10 * np.log10(255**2 * 48 / 155**2)]
    np.testing.assert_allclose(psnr(a, b), expected, rtol=1e-12)
    np.testing.assert_allclose(psnr(b, a), expected, rtol=1e-12)


def test_psnr_of_noise_follows_its_variance() -> None:
    image = np.full((2, 200, 200), 0.5)
    noise = np.random.default_rng(0).standard_normal(image.shape) * np.array([0.01, 0.1])[:, None, None]
    np.testing.assert_allclose(psnr(image, image + noise, peak=1), [40, 20], atol=0.1)


def test_equal_images_have_infinite_psnr() -> None:
    image = np.arange(24, dtype=np.uint8).reshape(1, 2, 12)
    assert psnr(image, image).tolist() == [np.inf]


def test_psnr_of_two_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        psnr(np.zeros((2, 4, 4)), np.zeros((1, 4, 4)))
