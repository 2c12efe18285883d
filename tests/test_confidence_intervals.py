"""Intervals of scores: how often they hold the planted truth, and what they are functions of. Oracles: closed forms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from isocost.evaluation import confidence_intervals as intervals
from isocost.evaluation.confidence_intervals import (
    Interval,
    KernelReference,
    frechet_interval,
    independent_difference,
    kernel_interval,
    mean_interval,
    paired_kernel_difference,
)
from isocost.metrics.frechet import Moments, frechet_distance, frechet_from_moments
from isocost.metrics.mmd import squared_mmd

REPEATS = 200
POPULATION = 500
WIDTH = 4


def population(seed: int, shift: float = 0.0) -> np.ndarray:
    """All the images there are: features [POPULATION, WIDTH], every one equally likely, so truths are plain sums."""
    mixing = np.random.default_rng(99).standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)
    return shift + np.random.default_rng(seed).standard_normal((POPULATION, WIDTH)) @ mixing


REAL = population(2)
POOR = population(1, 0.5)
POORER = POOR + 0.3 * population(7) + 0.15
BLANK = np.zeros((POPULATION, WIDTH))


def true_kernel(a: np.ndarray, b: np.ndarray) -> float:
    def mean(one: np.ndarray, other: np.ndarray) -> float:
        return float(((one @ other.T / WIDTH + 1) ** 3).mean())

    return mean(a, a) + mean(b, b) - 2 * mean(a, b)


def drawn(features: np.ndarray, num: int, generator: np.random.Generator) -> np.ndarray:
    return features[generator.integers(POPULATION, size=num)]


def repeated(draw: Callable[[np.random.Generator, int], Interval], repeats: int = REPEATS) -> list[Interval]:
    generator = np.random.default_rng(0)
    return [draw(generator, repeat) for repeat in range(repeats)]


def coverage(found: list[Interval], truth: float) -> float:
    return float(np.mean([one.low <= truth <= one.high for one in found]))


def width(found: list[Interval]) -> float:
    """Mean width, in units of that of the normal interval which knows how far the values really scatter."""
    confidence = found[0].confidence
    honest = 2 * stats.norm.ppf((1 + confidence) / 2) * np.std([one.value for one in found], ddof=1)
    return float(np.mean([one.high - one.low for one in found]) / honest)


def assert_honest(found: list[Interval], truth: float) -> None:
    """Coverage within what chance and a small sample allow of 95 %, and width within 20 % of the values' real scatter."""
    assert 0.86 <= coverage(found, truth) <= 0.99
    assert 0.8 <= width(found) <= 1.2


def kernel_of(
    generated: np.ndarray, num: int, num_reference: int, *, real: np.ndarray = REAL, confidence: float = 0.95
) -> Callable[[np.random.Generator, int], Interval]:
    def draw(generator: np.random.Generator, repeat: int) -> Interval:
        features, compared = drawn(generated, num, generator), drawn(real, num_reference, generator)
        return kernel_interval(features, KernelReference.of(compared, seed=repeat), confidence=confidence)

    return draw


# --- coverage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.5, 0.8])
def test_an_interval_holds_the_truth_as_often_as_it_says(confidence: float) -> None:
    found = repeated(lambda g, seed: mean_interval(g.standard_normal(60), seed=seed, confidence=confidence), 400)
    assert coverage(found, 0.0) == pytest.approx(confidence, abs=0.07)
    assert {one.confidence for one in found} == {confidence}


def test_the_interval_of_a_share_holds_the_truth() -> None:
    assert_honest(repeated(lambda g, seed: mean_interval(g.random(100) < 0.3, seed=seed)), 0.3)


def test_the_interval_of_a_skewed_mean_holds_the_truth() -> None:
    assert_honest(repeated(lambda g, seed: mean_interval(g.exponential(2.0, size=80), seed=seed)), 2.0)


@pytest.mark.parametrize(("num", "num_reference"), [(80, 80), (40, 160), (160, 40)])
def test_the_interval_of_a_kernel_distance_holds_the_truth(num: int, num_reference: int) -> None:
    assert_honest(repeated(kernel_of(POOR, num, num_reference)), true_kernel(POOR, REAL))


@pytest.mark.parametrize(
    ("generated", "real"),
    [(BLANK, POOR), (POOR, BLANK), (REAL, POOR)],
    ids=["reference only", "generated only", "reference above all"],
)
def test_the_interval_of_a_kernel_distance_counts_the_scatter_of_either_side(generated: np.ndarray, real: np.ndarray) -> None:
    assert_honest(repeated(kernel_of(generated, 80, 80, real=real)), true_kernel(generated, real))


def test_the_two_sides_are_resampled_apart() -> None:
    same = kernel_interval(REAL[:80], KernelReference.of(REAL[:80]))
    apart = kernel_interval(REAL[:80], KernelReference.of(REAL[80:160]))
    assert same.high - same.low > 0.7 * (apart.high - apart.low)


def test_the_resamples_of_a_kernel_distance_centre_on_its_value() -> None:
    whole = repeated(kernel_of(REAL, 80, 80))
    middle = repeated(kernel_of(REAL, 80, 80, confidence=1e-6))
    reach = np.mean([(one.high - one.low) / 2 for one in whole])
    assert abs(np.mean([one.low - one.value for one in middle])) < 0.15 * reach


def test_the_interval_of_alike_sets_is_too_wide_rather_than_too_narrow() -> None:
    found = repeated(kernel_of(REAL, 80, 80))
    assert coverage(found, 0.0) >= 0.97
    assert width(found) > 1


def test_the_interval_of_a_paired_difference_holds_the_truth() -> None:
    def draw(generator: np.random.Generator, repeat: int) -> Interval:
        same = generator.integers(POPULATION, size=80)
        reference = KernelReference.of(drawn(REAL, 80, generator), seed=repeat)
        return paired_kernel_difference(POORER[same], POOR[same], reference)

    assert_honest(repeated(draw), true_kernel(POORER, REAL) - true_kernel(POOR, REAL))


@pytest.mark.parametrize(("num", "num_reference"), [(120, 120), (60, 240), (240, 60)])
def test_the_interval_of_a_frechet_distance_holds_its_expectation(num: int, num_reference: int) -> None:
    def draw(generator: np.random.Generator, _repeat: int) -> Interval:
        return frechet_interval(drawn(POOR, num, generator), drawn(REAL, num_reference, generator))

    found = repeated(draw)
    assert_honest(found, float(np.mean([one.value for one in found])))


def test_the_frechet_bias_stays_in_value_and_interval() -> None:
    truth = frechet_from_moments(*(Moments(one.mean(0), np.cov(one, rowvar=False, ddof=0)) for one in (POOR, REAL)))

    def excess(num: int) -> float:
        found = repeated(lambda g, _: frechet_interval(drawn(POOR, num, g), drawn(REAL, num, g)), 400)
        assert np.mean([(one.low + one.high) / 2 - one.value for one in found]) == pytest.approx(0, abs=1e-9)
        return float(np.mean([one.value for one in found])) - truth

    assert excess(30) > 2 * excess(120) > 0


def test_the_interval_of_a_frechet_distance_from_few_images_holds_its_expectation() -> None:
    mixing = np.random.default_rng(3).standard_normal((60, 60)) / np.sqrt(60)

    def draw(generator: np.random.Generator, _repeat: int) -> Interval:
        a, b = (generator.standard_normal((num, 60)) @ mixing for num in (40, 50))
        return frechet_interval(a + 0.5, b)

    found = repeated(draw)
    assert 0.85 <= coverage(found, float(np.mean([one.value for one in found]))) <= 0.995
    assert 0.75 <= width(found) <= 1.35


# --- pairing ----------------------------------------------------------------------------------------------------------


def test_a_paired_difference_is_narrower_than_an_unpaired_one() -> None:
    generator = np.random.default_rng(0)
    same, other = generator.integers(POPULATION, size=(2, 100))
    reference = KernelReference.of(drawn(REAL, 100, generator))
    paired = paired_kernel_difference(POORER[same], POOR[same], reference)
    unpaired = paired_kernel_difference(POORER[same], POOR[other], reference)
    apart = [kernel_interval(one, reference) for one in (POORER[same], POOR[same])]
    reach = np.hypot(*(one.high - one.low for one in apart))
    assert paired.high - paired.low < 0.7 * (unpaired.high - unpaired.low)
    assert paired.high - paired.low < 0.7 * reach


def test_a_paired_difference_is_the_difference_of_the_values() -> None:
    reference = KernelReference.of(REAL[:70])
    first, second = POORER[:50], POOR[:50]
    difference = paired_kernel_difference(first, second, reference)
    apart = kernel_interval(first, reference).value - kernel_interval(second, reference).value
    assert difference.value == pytest.approx(apart, rel=1e-11)
    swapped = paired_kernel_difference(second, first, reference)
    turned = [-swapped.value, -swapped.high, -swapped.low]
    np.testing.assert_allclose(turned, [difference.value, difference.low, difference.high])


def test_a_point_does_not_differ_from_itself() -> None:
    difference = paired_kernel_difference(POOR[:50], POOR[:50], KernelReference.of(REAL[:70]))
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)


def test_a_pair_of_unequal_lengths_is_refused() -> None:
    with pytest.raises(ValueError, match="same images"):
        paired_kernel_difference(POOR[:50], POOR[:49], KernelReference.of(REAL[:70]))


# --- what an interval is a function of --------------------------------------------------------------------------------


def all_intervals(features: np.ndarray, reference: np.ndarray, seed: int) -> dict[str, Interval]:
    compared = KernelReference.of(reference, seed=seed)
    return {
        "mean": mean_interval(features[:, 0], seed=seed),
        "mmd": kernel_interval(features, compared),
        "paired": paired_kernel_difference(features, np.roll(features, 1, axis=1), compared),
        "frechet": frechet_interval(features, reference),
    }


def test_the_same_seed_gives_the_same_interval() -> None:
    assert all_intervals(POOR[:60], REAL[:80], 3) == all_intervals(POOR[:60], REAL[:80], 3)


def test_another_seed_gives_other_ends_and_the_same_value() -> None:
    one, other = (all_intervals(POOR[:60], REAL[:80], seed) for seed in (3, 4))
    assert {name: interval.value for name, interval in one.items()} == {
        name: interval.value for name, interval in other.items()
    }
    for name in ("mean", "mmd", "paired"):
        assert one[name].low != other[name].low
        assert one[name].low == pytest.approx(other[name].low, abs=0.25 * (one[name].high - one[name].low))


def test_intervals_neither_use_nor_move_global_randomness() -> None:
    np.random.seed(0)  # noqa: NPY002
    one, state = all_intervals(POOR[:60], REAL[:80], 3), np.random.get_state()[1].copy()  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    assert all_intervals(POOR[:60], REAL[:80], 3) == one
    np.random.seed(0)  # noqa: NPY002
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_the_order_of_images_does_not_change_the_value() -> None:
    shuffled = np.random.default_rng(5).permutation
    straight = all_intervals(POOR[:60], REAL[:80], 0)
    mixed = all_intervals(POOR[:60][shuffled(60)], REAL[:80][shuffled(80)], 0)
    for name, interval in straight.items():
        assert mixed[name].value == pytest.approx(interval.value, rel=1e-10), name


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_the_value_is_the_distance(kind: type) -> None:
    features, reference = POOR[:60].astype(kind), REAL[:80].astype(kind)
    found = all_intervals(features, reference, 0)
    assert found["mean"].value == pytest.approx(features[:, 0].astype(np.float64).mean(), rel=1e-12)
    assert found["mmd"].value == pytest.approx(squared_mmd(features, reference), rel=1e-10)
    assert found["frechet"].value == pytest.approx(frechet_distance(features, reference), rel=1e-12)


def test_an_interval_stands_around_its_value() -> None:
    for name, interval in all_intervals(POOR[:60], REAL[:80], 0).items():
        assert interval.low < interval.value < interval.high, name


def test_more_confidence_is_a_wider_interval() -> None:
    reference = KernelReference.of(REAL[:80])
    for interval in (
        lambda c: mean_interval(POOR[:60, 0], confidence=c),
        lambda c: kernel_interval(POOR[:60], reference, confidence=c),
        lambda c: paired_kernel_difference(POORER[:60], POOR[:60], reference, confidence=c),
        lambda c: frechet_interval(POOR[:60], REAL[:80], confidence=c),
    ):
        narrow, middle, wide = (interval(confidence) for confidence in (0.5, 0.9, 0.99))
        assert wide.low < middle.low < narrow.low
        assert narrow.high < middle.high < wide.high


def test_more_images_are_a_narrower_interval() -> None:
    few, many = all_intervals(POOR[:60], REAL[:60], 0), all_intervals(POOR[:480], REAL[:480], 0)
    for name in few:
        assert many[name].high - many[name].low < 0.6 * (few[name].high - few[name].low), name


def test_values_that_are_all_equal_give_no_width() -> None:
    assert mean_interval(np.ones(40)) == Interval(1.0, 1.0, 1.0)


def test_a_frechet_interval_is_the_same_with_moments_at_hand() -> None:
    features, reference = POOR[:60], REAL[:80]
    at_hand = frechet_interval(features, reference, reference_moments=Moments.of(reference))
    assert at_hand == frechet_interval(features, reference)


def test_large_sets_are_resampled_in_blocks_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = all_intervals(POOR[:60], REAL[:80], 0)
    monkeypatch.setattr(intervals, "_BLOCK_ROWS", 7)
    blocked = all_intervals(POOR[:60], REAL[:80], 0)
    for name in ("mmd", "paired"):
        ends = [[one.value, one.low, one.high] for one in (blocked[name], whole[name])]
        np.testing.assert_allclose(*ends, rtol=1e-9)


def test_a_difference_of_independent_scores_covers_the_true_one() -> None:
    generator = np.random.default_rng(3)
    found, size = [], 60

    def skewed(scale: float) -> Interval:
        """Mean of exponential draws, exact interval by chi-square."""
        total = 2 * generator.exponential(scale, size).sum()
        return Interval(total / (2 * size), *(total / stats.chi2.ppf(level, 2 * size) for level in (0.975, 0.025)))

    for _ in range(2000):
        found.append(independent_difference(skewed(3.0), skewed(1.0)))
    assert coverage(found, 2.0) == pytest.approx(0.95, abs=0.015)
    assert independent_difference(Interval(2, 1, 3), Interval(1, 1, 1)) == Interval(1, 0, 2)
