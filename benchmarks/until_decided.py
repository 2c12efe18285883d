"""Images that a comparison with fresh batches needs until it decides, next to those of an oracle; false decisions at ties.

    python benchmarks/until_decided.py [--quick] [--json] [--contests 400]

A contest has two configurations with planted features: noise that both share, noise of their own, and a shift along one axis,
as in benchmarks/paired_decisions.py. The reference is spherical, so the configuration with the shorter shift is truly better.
In a fifth of the contests both are equally good. An oracle knows the true difference and its standard error, and draws at once
as many batches as a single test at 5 % needs to decide with 90 % probability. A contest is decidable if this is at most
`MAX_BATCHES`. The last line is JSON. The targets: at least 90 % of the decidable contests are decided, with at most 1.5
times the oracle's images in all; at most 5 % of the decisions are false.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import numpy as np
from results import Row, argument_parser, print_results
from scipy.stats import norm

from isocost.analysis.until_decided import decide_with_batches
from isocost.evaluation.confidence_intervals import KernelReference, generated_counts, kernel_resamples
from isocost.metrics.arrays import Array

NUM_IMAGES, NUM_REFERENCE, WIDTH, NUM_RESAMPLES = 160, 400, 16, 200
SHIFT, MAX_GAIN, OWN_NOISE = 1.2, 0.5, 0.35
MAX_BATCHES = 16
NUM_PROBES = 24
"""Batches from which the oracle knows the true difference and its standard error."""
POWER = 0.9


@dataclass(frozen=True)
class Contest:
    """The result of one contest. `oracle` is the number of batches of the oracle; inf at a tie."""

    oracle: float
    used: int
    is_decided: bool
    is_right: bool
    is_tie: bool


def simulate(seed: int) -> Contest:
    """Draw a contest and decide it."""
    generator = np.random.default_rng(seed)
    is_tie = seed % 5 == 0
    gain = 0.0 if is_tie else float(generator.uniform(0.02, MAX_GAIN))
    reference = KernelReference.of(generator.standard_normal((NUM_REFERENCE, WIDTH)), num_bootstrap=NUM_RESAMPLES, seed=seed)
    counts = generated_counts(NUM_IMAGES, NUM_RESAMPLES, seed)
    axes = generator.integers(WIDTH, size=2)

    def draw(_: int) -> tuple[Array, Array]:
        shared = generator.standard_normal((NUM_IMAGES, WIDTH))
        scores = []
        for axis, shift in zip(axes, (SHIFT - gain, SHIFT), strict=True):
            features = np.sqrt(1 - OWN_NOISE**2) * shared + OWN_NOISE * generator.standard_normal((NUM_IMAGES, WIDTH))
            features[:, axis] += shift
            scores.append(kernel_resamples(features, counts, reference))
        return scores[0], scores[1]

    differences = np.array([np.subtract(*draw(number)) for number in range(NUM_PROBES)])
    error_of_one = float(np.mean(differences[:, 1:].std(1, ddof=1)))
    error_of_all = float(differences.mean(0)[1:].std(ddof=1))
    decision = decide_with_batches(draw, True, MAX_BATCHES)
    oracle = math.inf if is_tie else _oracle_batches(abs(float(differences[:, 0].mean())), error_of_one, error_of_all)
    return Contest(oracle, decision.num_batches, decision.outcome != "open", decision.outcome == "first", is_tie)


def _oracle_batches(difference: float, error_of_one: float, error_of_all: float) -> float:
    """Smallest number of batches whose standard error is small enough. The part of the error from the reference stays."""
    fixed = max(error_of_all**2 - error_of_one**2 / NUM_PROBES, 0.0)
    needed = (difference / float(norm.ppf(0.975) + norm.ppf(POWER))) ** 2
    if needed <= fixed:
        return math.inf
    return float(max(1, math.ceil(max(error_of_one**2 - fixed, 0.0) / (needed - fixed))))


def main() -> None:
    parser = argument_parser(__doc__, quick="40 contests")
    parser.add_argument("--contests", type=int, default=400)
    arguments = parser.parse_args()
    num_contests = 40 if arguments.quick else arguments.contests
    contests = []
    for seed in range(num_contests):
        contests.append(simulate(seed))
        if not arguments.json and (seed + 1) % 40 == 0:
            print(f"{seed + 1} of {num_contests} contests", file=sys.stderr, flush=True)
    decidable = [contest for contest in contests if contest.oracle <= MAX_BATCHES]
    ties = [contest for contest in contests if contest.is_tie]
    decided = float(np.mean([contest.is_decided for contest in decidable]))
    ratio = sum(contest.used for contest in decidable) / sum(contest.oracle for contest in decidable)
    false = float(np.mean([contest.is_decided and not contest.is_right for contest in contests if not contest.is_tie]))
    at_ties = float(np.mean([contest.is_decided for contest in ties]))
    rows: list[Row] = [
        {"what": "decidable contests", "value": len(decidable), "unit": "contests"},
        {"what": "decided of the decidable", "value": decided, "unit": "fraction"},
        {"what": "images, over those of the oracle", "value": ratio, "unit": "ratio"},
        {"what": "the wrong one was chosen", "value": false, "unit": "fraction"},
        {"what": "decided although both are equal", "value": at_ties, "unit": "fraction"},
    ]
    bounds = {"decided of the decidable": (0.9, ">="), "images, over those of the oracle": (1.5, "<=")}
    bounds |= {"the wrong one was chosen": (0.05, "<="), "decided although both are equal": (0.05, "<=")}
    targets = [
        {
            "what": row["what"],
            "value": row["value"],
            "target": f"{sign} {bound:g}",
            "met": row["value"] >= bound if sign == ">=" else row["value"] <= bound,
        }
        for row in rows
        if (rule := bounds.get(row["what"])) is not None
        for bound, sign in [rule]
    ]
    print_results("until_decided", rows, targets, num_contests=num_contests)


if __name__ == "__main__":
    main()
