"""Coverage of the 95 % intervals: how often they contain the true value, in simulated studies with a known truth.

    python benchmarks/coverage.py [--quick] [--json]

Images are samples of two finite populations of features, so the true squared MMD is a plain sum. The Frechet distance is
biased at N images; its interval is compared with its expectation at N generated and M reference images, estimated by the mean
of other samples. The extrapolated distance is compared with the distance of infinitely many generated images to M reference
images. The last line is JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
from results import argument_parser, print_results

from isocost.evaluation.confidence_intervals import (
    Interval,
    KernelReference,
    frechet_infinity_interval,
    frechet_interval,
    kernel_interval,
    paired_frechet_difference,
    paired_kernel_difference,
)
from isocost.metrics.frechet import Moments, frechet_distance, frechet_from_moments, frechet_infinity

POPULATION, WIDTH = 4000, 24
NUM, NUM_REFERENCE = 160, 240
MIN_COVERAGE, MAX_COVERAGE = 0.90, 0.98

Array = np.ndarray


def population(seed: int, shift: float) -> Array:
    """All images: skewed, correlated and non-negative features [POPULATION, WIDTH], similar to pooled features."""
    mixing = np.random.default_rng(99).standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)
    return np.maximum(shift + np.random.default_rng(seed).standard_normal((POPULATION, WIDTH)) @ mixing, 0)


REAL = population(2, 0.3)
GENERATED = population(1, 0.7)
WORSE = np.maximum(GENERATED + 0.4 * population(7, 0.0) - 0.1, 0)
"""Image i of WORSE is a changed image i of GENERATED, as in two points that share noise and prompt."""


def sample(generator: np.random.Generator) -> tuple[Array, Array, Array]:
    """Features of two paired points, [NUM, WIDTH] each, and of a reference, [NUM_REFERENCE, WIDTH]."""
    indices = generator.integers(POPULATION, size=NUM)
    return GENERATED[indices], WORSE[indices], REAL[generator.integers(POPULATION, size=NUM_REFERENCE)]


def true_mmd(a: Array, b: Array) -> float:
    """Squared MMD of two populations."""

    def mean(first: Array, second: Array) -> float:
        return float(np.mean([((chunk @ second.T / WIDTH + 1) ** 3).mean() for chunk in np.array_split(first, 8)]))

    return mean(a, a) + mean(b, b) - 2 * mean(a, b)


def expectation(statistic: Callable[[Array, Array, Array], float], num: int) -> float:
    """Mean of a statistic over `num` samples that are not used for intervals."""
    generator = np.random.default_rng(10_000)
    return float(np.mean([statistic(*sample(generator)) for _ in range(num)]))


def population_moments(features: Array) -> Moments:
    """Moments of a whole population."""
    return Moments(features.mean(0), np.cov(features, rowvar=False, ddof=0))


def main() -> None:
    arguments = argument_parser(__doc__, quick="300 simulations, under a minute").parse_args()
    num_simulations, num_samples = (300, 2000) if arguments.quick else (1000, 20_000)
    generated_moments = population_moments(GENERATED)

    def at_infinity(_generated: Array, _worse: Array, real: Array) -> float:
        return frechet_from_moments(generated_moments, Moments.of(real))

    cases: dict[str, tuple[Callable[[Array, Array, Array, int], Interval], float]] = {
        "squared MMD, percentile bootstrap": (
            lambda generated, _, real, seed: kernel_interval(generated, KernelReference.of(real, seed=seed)),
            true_mmd(GENERATED, REAL),
        ),
        "paired difference of squared MMD, percentile bootstrap": (
            lambda generated, worse, real, seed: paired_kernel_difference(
                worse, generated, KernelReference.of(real, seed=seed)
            ),
            true_mmd(WORSE, REAL) - true_mmd(GENERATED, REAL),
        ),
        "Frechet distance, against its expectation at N and M": (
            lambda generated, _, real, _seed: frechet_interval(generated, real),
            expectation(lambda generated, _, real: frechet_distance(generated, real), num_samples),
        ),
        "paired difference of Frechet distances, against its expectation": (
            lambda generated, worse, real, _seed: paired_frechet_difference(worse, generated, real),
            expectation(
                lambda generated, worse, real: frechet_distance(worse, real) - frechet_distance(generated, real), num_samples
            ),
        ),
        "Frechet distance at infinite N, against the truth at M": (
            lambda generated, _, real, seed: frechet_infinity_interval(generated, real, seed=seed),
            expectation(at_infinity, num_samples),
        ),
    }
    rows, targets = [], []
    for what, (compute_interval, truth) in cases.items():
        generator = np.random.default_rng(0)
        intervals = [compute_interval(*sample(generator), seed) for seed in range(num_simulations)]
        coverage = float(np.mean([interval.low <= truth <= interval.high for interval in intervals]))
        error = 1.96 * np.sqrt(coverage * (1 - coverage) / num_simulations)
        rows.append({"what": what, "value": coverage, "unit": "fraction", "low": coverage - error, "high": coverage + error})
        is_met = bool(MIN_COVERAGE <= coverage <= MAX_COVERAGE)
        targets.append({"what": what, "value": coverage, "target": f"{MIN_COVERAGE} to {MAX_COVERAGE}", "met": is_met})
        if not arguments.json:
            bias = float(np.mean([interval.value for interval in intervals])) - truth
            print(
                f"{what}: covered in {coverage:.3f} of {num_simulations}; truth {truth:.4f}, bias {bias:+.4f}",
                file=sys.stderr,
                flush=True,
            )
    generator = np.random.default_rng(1)
    samples = [sample(generator) for _ in range(num_simulations // 3)]
    truth = expectation(at_infinity, num_samples)
    at_n = float(np.mean([frechet_distance(generated, real) for generated, _, real in samples])) - truth
    fitted = float(np.mean([frechet_infinity(generated, Moments.of(real)).value for generated, _, real in samples])) - truth
    for what, value in (("bias of the Frechet distance at N", at_n), ("bias of the distance at infinite N", fitted)):
        rows.append({"what": what, "value": value, "unit": f"of {truth:.3f}", "low": value, "high": value})
    settings = {"simulations": num_simulations, "images": NUM, "reference": NUM_REFERENCE, "features": WIDTH}
    print_results("coverage", rows, targets, **settings)


if __name__ == "__main__":
    main()
