"""Confidence intervals of scores: coverage of a known truth, and dependence on their inputs. Oracles: closed forms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from isocost.evaluation import confidence_intervals
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
    """A finite population of images: features [POPULATION, WIDTH], all equally likely, so true values are plain sums."""
    mixing = np.random.default_rng(99).standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)
    return shift + np.random.default_rng(seed).standard_normal((POPULATION, WIDTH)) @ mixing


REAL = population(2)
POOR = population(1, 0.5)
POORER = POOR + 0.3 * population(7) + 0.15
BLANK = np.zeros((POPULATION, WIDTH))


def true_squared_mmd(a: np.ndarray, b: np.ndarray) -> float:
    def mean_kernel(left: np.ndarray, right: np.ndarray) -> float:
        return float(((left @ right.T / WIDTH + 1) ** 3).mean())

    return mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)


def sample(features: np.ndarray, num: int, generator: np.random.Generator) -> np.ndarray:
    return features[generator.integers(POPULATION, size=num)]


def repeated(draw: Callable[[np.random.Generator, int], Interval], repeats: int = REPEATS) -> list[Interval]:
    generator = np.random.default_rng(0)
    return [draw(generator, repeat) for repeat in range(repeats)]


def coverage(intervals: list[Interval], truth: float) -> float:
    return float(np.mean([interval.low <= truth <= interval.high for interval in intervals]))


def relative_width(intervals: list[Interval]) -> float:
    """Mean width, divided by the width of the normal interval with the true standard deviation of the values."""
    confidence = intervals[0].confidence
    true_width = 2 * stats.norm.ppf((1 + confidence) / 2) * np.std([interval.value for interval in intervals], ddof=1)
    return float(np.mean([interval.high - interval.low for interval in intervals]) / true_width)


def assert_calibrated(intervals: list[Interval], truth: float) -> None:
    """Coverage of 95 %, within chance and small-sample error, and a width within 20 % of the true one."""
    assert 0.86 <= coverage(intervals, truth) <= 0.99
    assert 0.8 <= relative_width(intervals) <= 1.2


def mmd_experiment(
    generated: np.ndarray, num: int, num_reference: int, *, real: np.ndarray = REAL, confidence: float = 0.95
) -> Callable[[np.random.Generator, int], Interval]:
    def draw(generator: np.random.Generator, repeat: int) -> Interval:
        features, reference = sample(generated, num, generator), sample(real, num_reference, generator)
        return kernel_interval(features, KernelReference.of(reference, seed=repeat), confidence=confidence)

    return draw


# --- coverage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.5, 0.8])
def test_an_interval_covers_the_truth_at_its_confidence(confidence: float) -> None:
    intervals = repeated(lambda g, seed: mean_interval(g.standard_normal(60), seed=seed, confidence=confidence), 400)
    assert coverage(intervals, 0.0) == pytest.approx(confidence, abs=0.07)
    assert {interval.confidence for interval in intervals} == {confidence}


def test_the_interval_of_a_fraction_covers_the_truth() -> None:
    assert_calibrated(repeated(lambda g, seed: mean_interval(g.random(100) < 0.3, seed=seed)), 0.3)


def test_the_interval_of_a_skewed_mean_covers_the_truth() -> None:
    assert_calibrated(repeated(lambda g, seed: mean_interval(g.exponential(2.0, size=80), seed=seed)), 2.0)


@pytest.mark.parametrize(("num", "num_reference"), [(80, 80), (40, 160), (160, 40)])
@pytest.mark.fast_cases(1)
def test_the_interval_of_a_squared_mmd_covers_the_truth(num: int, num_reference: int) -> None:
    assert_calibrated(repeated(mmd_experiment(POOR, num, num_reference)), true_squared_mmd(POOR, REAL))


@pytest.mark.parametrize(
    ("generated", "real"),
    [(BLANK, POOR), (POOR, BLANK), (REAL, POOR)],
    ids=["reference only", "generated only", "reference above all"],
)
def test_the_interval_of_a_squared_mmd_includes_the_noise_of_both_sets(generated: np.ndarray, real: np.ndarray) -> None:
    assert_calibrated(repeated(mmd_experiment(generated, 80, 80, real=real)), true_squared_mmd(generated, real))


def test_the_two_sides_are_resampled_independently() -> None:
    same_set = kernel_interval(REAL[:80], KernelReference.of(REAL[:80]))
    two_sets = kernel_interval(REAL[:80], KernelReference.of(REAL[80:160]))
    assert same_set.high - same_set.low > 0.7 * (two_sets.high - two_sets.low)


def test_the_resamples_of_a_squared_mmd_are_centred_on_its_value() -> None:
    intervals = repeated(mmd_experiment(REAL, 80, 80))
    medians = repeated(mmd_experiment(REAL, 80, 80, confidence=1e-6))
    half_width = np.mean([(interval.high - interval.low) / 2 for interval in intervals])
    assert abs(np.mean([median.low - median.value for median in medians])) < 0.15 * half_width


def test_the_interval_of_sets_from_one_distribution_is_rather_too_wide() -> None:
    intervals = repeated(mmd_experiment(REAL, 80, 80))
    assert coverage(intervals, 0.0) >= 0.97
    assert relative_width(intervals) > 1


def test_the_interval_of_a_paired_difference_covers_the_truth() -> None:
    def draw(generator: np.random.Generator, repeat: int) -> Interval:
        same = generator.integers(POPULATION, size=80)
        reference = KernelReference.of(sample(REAL, 80, generator), seed=repeat)
        return paired_kernel_difference(POORER[same], POOR[same], reference)

    assert_calibrated(repeated(draw), true_squared_mmd(POORER, REAL) - true_squared_mmd(POOR, REAL))


@pytest.mark.parametrize(("num", "num_reference"), [(120, 120), (60, 240), (240, 60)])
def test_the_interval_of_a_frechet_distance_covers_its_expectation(num: int, num_reference: int) -> None:
    def draw(generator: np.random.Generator, _repeat: int) -> Interval:
        return frechet_interval(sample(POOR, num, generator), sample(REAL, num_reference, generator))

    intervals = repeated(draw)
    assert_calibrated(intervals, float(np.mean([interval.value for interval in intervals])))


def test_the_frechet_bias_stays_in_value_and_interval() -> None:
    truth = frechet_from_moments(*(Moments(x.mean(0), np.cov(x, rowvar=False, ddof=0)) for x in (POOR, REAL)))

    def excess(num: int) -> float:
        intervals = repeated(lambda g, _: frechet_interval(sample(POOR, num, g), sample(REAL, num, g)), 400)
        centre_errors = [(interval.low + interval.high) / 2 - interval.value for interval in intervals]
        assert np.mean(centre_errors) == pytest.approx(0, abs=1e-9)
        return float(np.mean([interval.value for interval in intervals])) - truth

    assert excess(30) > 2 * excess(120) > 0


def test_the_interval_of_a_frechet_distance_from_few_images_covers_its_expectation() -> None:
    mixing = np.random.default_rng(3).standard_normal((60, 60)) / np.sqrt(60)

    def draw(generator: np.random.Generator, _repeat: int) -> Interval:
        a, b = (generator.standard_normal((num, 60)) @ mixing for num in (40, 50))
        return frechet_interval(a + 0.5, b)

    intervals = repeated(draw)
    assert 0.85 <= coverage(intervals, float(np.mean([interval.value for interval in intervals]))) <= 0.995
    assert 0.75 <= relative_width(intervals) <= 1.35


# --- pairing ----------------------------------------------------------------------------------------------------------


def test_a_paired_difference_is_narrower_than_an_unpaired_one() -> None:
    generator = np.random.default_rng(0)
    same, other = generator.integers(POPULATION, size=(2, 100))
    reference = KernelReference.of(sample(REAL, 100, generator))
    paired = paired_kernel_difference(POORER[same], POOR[same], reference)
    unpaired = paired_kernel_difference(POORER[same], POOR[other], reference)
    separate = [kernel_interval(features, reference) for features in (POORER[same], POOR[same])]
    combined_width = np.hypot(*(interval.high - interval.low for interval in separate))
    assert paired.high - paired.low < 0.7 * (unpaired.high - unpaired.low)
    assert paired.high - paired.low < 0.7 * combined_width


def test_a_paired_difference_is_the_difference_of_the_values() -> None:
    reference = KernelReference.of(REAL[:70])
    first, second = POORER[:50], POOR[:50]
    difference = paired_kernel_difference(first, second, reference)
    expected = kernel_interval(first, reference).value - kernel_interval(second, reference).value
    assert difference.value == pytest.approx(expected, rel=1e-11)
    swapped = paired_kernel_difference(second, first, reference)
    negated = [-swapped.value, -swapped.high, -swapped.low]
    np.testing.assert_allclose(negated, [difference.value, difference.low, difference.high])


def test_a_point_does_not_differ_from_itself() -> None:
    difference = paired_kernel_difference(POOR[:50], POOR[:50], KernelReference.of(REAL[:70]))
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)


def test_a_paired_difference_of_unequal_lengths_is_refused() -> None:
    with pytest.raises(ValueError, match="same images"):
        paired_kernel_difference(POOR[:50], POOR[:49], KernelReference.of(REAL[:70]))


# --- inputs of an interval --------------------------------------------------------------------------------------------


def all_intervals(features: np.ndarray, reference: np.ndarray, seed: int) -> dict[str, Interval]:
    kernel_reference = KernelReference.of(reference, seed=seed)
    return {
        "mean": mean_interval(features[:, 0], seed=seed),
        "mmd": kernel_interval(features, kernel_reference),
        "paired": paired_kernel_difference(features, np.roll(features, 1, axis=1), kernel_reference),
        "frechet": frechet_interval(features, reference),
    }


def test_the_same_seed_gives_the_same_interval() -> None:
    assert all_intervals(POOR[:60], REAL[:80], 3) == all_intervals(POOR[:60], REAL[:80], 3)


def test_another_seed_gives_other_ends_and_the_same_value() -> None:
    first, second = (all_intervals(POOR[:60], REAL[:80], seed) for seed in (3, 4))
    assert {name: interval.value for name, interval in first.items()} == {
        name: interval.value for name, interval in second.items()
    }
    for name in ("mean", "mmd", "paired"):
        assert first[name].low != second[name].low
        assert first[name].low == pytest.approx(second[name].low, abs=0.25 * (first[name].high - first[name].low))


def test_intervals_neither_use_nor_change_global_random_state() -> None:
    np.random.seed(0)  # noqa: NPY002
    expected, state = all_intervals(POOR[:60], REAL[:80], 3), np.random.get_state()[1].copy()  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    assert all_intervals(POOR[:60], REAL[:80], 3) == expected
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
    intervals = all_intervals(features, reference, 0)
    assert intervals["mean"].value == pytest.approx(features[:, 0].astype(np.float64).mean(), rel=1e-12)
    assert intervals["mmd"].value == pytest.approx(squared_mmd(features, reference), rel=1e-10)
    assert intervals["frechet"].value == pytest.approx(frechet_distance(features, reference), rel=1e-12)


def test_an_interval_contains_its_value() -> None:
    for name, interval in all_intervals(POOR[:60], REAL[:80], 0).items():
        assert interval.low < interval.value < interval.high, name


def test_more_confidence_gives_a_wider_interval() -> None:
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


def test_more_images_give_a_narrower_interval() -> None:
    few, many = all_intervals(POOR[:60], REAL[:60], 0), all_intervals(POOR[:480], REAL[:480], 0)
    for name in few:
        assert many[name].high - many[name].low < 0.6 * (few[name].high - few[name].low), name


def test_equal_values_give_zero_width() -> None:
    assert mean_interval(np.ones(40)) == Interval(1.0, 1.0, 1.0)


def test_given_moments_do_not_change_a_frechet_interval() -> None:
    features, reference = POOR[:60], REAL[:80]
    with_moments = frechet_interval(features, reference, reference_moments=Moments.of(reference))
    assert with_moments == frechet_interval(features, reference)


def test_resampling_in_blocks_does_not_change_the_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = all_intervals(POOR[:60], REAL[:80], 0)
    monkeypatch.setattr(confidence_intervals, "_BLOCK_ROWS", 7)
    blocked = all_intervals(POOR[:60], REAL[:80], 0)
    for name in ("mmd", "paired"):
        ends = [[interval.value, interval.low, interval.high] for interval in (blocked[name], expected[name])]
        np.testing.assert_allclose(*ends, rtol=1e-9)


def test_a_difference_of_independent_scores_covers_the_true_one() -> None:
    generator = np.random.default_rng(3)
    intervals, size = [], 60

    def skewed(scale: float) -> Interval:
        """Mean of exponential draws with its exact chi-square interval."""
        total = 2 * generator.exponential(scale, size).sum()
        return Interval(total / (2 * size), *(total / stats.chi2.ppf(level, 2 * size) for level in (0.975, 0.025)))

    for _ in range(2000):
        intervals.append(independent_difference(skewed(3.0), skewed(1.0)))
    assert coverage(intervals, 2.0) == pytest.approx(0.95, abs=0.015)
    assert independent_difference(Interval(2, 1, 3), Interval(1, 1, 1)) == Interval(1, 0, 2)
