"""How often 95 % intervals contain the truth, in simulated studies whose truth is known.

    python benchmarks/coverage.py [--quick] [--json]

Images are draws from two finite populations of features, so kernel truths are plain sums. A Frechet distance is biased at
N images, and its interval is about its own expectation at that N and M: the truth is the mean over further draws. The
extrapolated distance is about that of infinitely many generated images against M real ones. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import numpy as np
from results import print_results

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
LEAST, MOST = 0.90, 0.98

Array = np.ndarray


def population(seed: int, shift: float) -> Array:
    """Every image there is: skewed features [POPULATION, WIDTH] with correlations, above zero as pooled features are."""
    mixing = np.random.default_rng(99).standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)
    return np.maximum(shift + np.random.default_rng(seed).standard_normal((POPULATION, WIDTH)) @ mixing, 0)


REAL = population(2, 0.3)
POOR = population(1, 0.7)
POORER = np.maximum(POOR + 0.4 * population(7, 0.0) - 0.1, 0)
"""Image i of POORER is image i of POOR with something done to it: two points that share noise and caption."""


def drawn(generator: np.random.Generator) -> tuple[Array, Array, Array]:
    """Features of two paired points [NUM, WIDTH] and of a reference [NUM_REFERENCE, WIDTH]."""
    same = generator.integers(POPULATION, size=NUM)
    return POOR[same], POORER[same], REAL[generator.integers(POPULATION, size=NUM_REFERENCE)]


def kernel_truth(a: Array, b: Array) -> float:
    """Squared discrepancy of two populations."""

    def mean(one: Array, other: Array) -> float:
        return float(np.mean([((part @ other.T / WIDTH + 1) ** 3).mean() for part in np.array_split(one, 8)]))

    return mean(a, a) + mean(b, b) - 2 * mean(a, b)


def expectation(statistic: Callable[[Array, Array, Array], float], num: int) -> float:
    """Mean of a statistic over draws that no interval is made from."""
    generator = np.random.default_rng(10_000)
    return float(np.mean([statistic(*drawn(generator)) for _ in range(num)]))


def exact(features: Array) -> Moments:
    """Moments of a whole population."""
    return Moments(features.mean(0), np.cov(features, rowvar=False, ddof=0))


def main() -> None:
    """Simulate and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="300 simulations, under a minute")
    options.add_argument("--json", action="store_true", help="the JSON line alone")
    asked = options.parse_args()
    num_simulations, num_draws = (300, 2000) if asked.quick else (1000, 20_000)
    of_poor = exact(POOR)

    def at_infinity(_poor: Array, _poorer: Array, real: Array) -> float:
        return frechet_from_moments(of_poor, Moments.of(real))

    cases: dict[str, tuple[Callable[[Array, Array, Array, int], Interval], float]] = {
        "squared MMD, percentile bootstrap": (
            lambda poor, _, real, seed: kernel_interval(poor, KernelReference.of(real, seed=seed)),
            kernel_truth(POOR, REAL),
        ),
        "paired difference of squared MMD, percentile bootstrap": (
            lambda poor, poorer, real, seed: paired_kernel_difference(poorer, poor, KernelReference.of(real, seed=seed)),
            kernel_truth(POORER, REAL) - kernel_truth(POOR, REAL),
        ),
        "Frechet distance, about its own expectation at N and M": (
            lambda poor, _, real, _seed: frechet_interval(poor, real),
            expectation(lambda poor, _, real: frechet_distance(poor, real), num_draws),
        ),
        "paired difference of Frechet distances, about its own expectation": (
            lambda poor, poorer, real, _seed: paired_frechet_difference(poorer, poor, real),
            expectation(lambda poor, poorer, real: frechet_distance(poorer, real) - frechet_distance(poor, real), num_draws),
        ),
        "Frechet distance at infinite N, about the truth at M": (
            lambda poor, _, real, seed: frechet_infinity_interval(poor, real, seed=seed),
            expectation(at_infinity, num_draws),
        ),
    }
    rows, targets = [], []
    for what, (interval, truth) in cases.items():
        generator = np.random.default_rng(0)
        found = [interval(*drawn(generator), seed) for seed in range(num_simulations)]
        share = float(np.mean([one.low <= truth <= one.high for one in found]))
        error = 1.96 * np.sqrt(share * (1 - share) / num_simulations)
        rows.append({"what": what, "value": share, "unit": "share", "low": share - error, "high": share + error})
        targets.append({"what": what, "value": share, "target": f"{LEAST} to {MOST}", "met": bool(LEAST <= share <= MOST)})
        if not asked.json:
            bias = float(np.mean([one.value for one in found])) - truth
            print(
                f"{what}: {share:.3f} of {num_simulations}; truth {truth:.4f}, mean value off by {bias:+.4f}", file=sys.stderr
            )
    generator = np.random.default_rng(1)
    samples = [drawn(generator) for _ in range(num_simulations // 3)]
    truth = expectation(at_infinity, num_draws)
    plain = float(np.mean([frechet_distance(poor, real) for poor, _, real in samples])) - truth
    fitted = float(np.mean([frechet_infinity(poor, Moments.of(real)).value for poor, _, real in samples])) - truth
    for what, value in (("bias of the Frechet distance at N", plain), ("bias left at infinite N", fitted)):
        rows.append({"what": what, "value": value, "unit": f"of {truth:.3f}", "low": value, "high": value})
    told = {"simulations": num_simulations, "images": NUM, "reference": NUM_REFERENCE, "features": WIDTH}
    print_results("coverage", rows, targets, **told)


if __name__ == "__main__":
    main()
