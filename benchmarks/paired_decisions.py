"""False and true decisions between sizes in simulated studies: by paired resamples, and by separate intervals.

    python benchmarks/paired_decisions.py [--quick] [--json] [--studies 600]

A study has two to four sizes with one to eight points each. The features of a point are the noise of its images, which all
points share, plus noise of its own, plus a shift along one axis. The reference is spherical, so the true squared MMD depends
only on the length of the shift. In a third of the studies all points are equally good; in the others one size is better.
The best point of the best size and the best point of any other size are compared, as `isocost recommend` does. A decision is
false if the chosen size is not truly better. Power is the fraction of the other studies in which the truly best size is chosen
and decided. The last line is JSON.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import pandas as pd
from results import Row, argument_parser, print_results

from isocost.analysis.paired_decisions import decide
from isocost.evaluation.confidence_intervals import KernelReference, generated_counts, kernel_resamples, percentile_interval

METRIC = "mmd_efficientnet"
NUM_IMAGES, NUM_REFERENCE, WIDTH, NUM_RESAMPLES = 160, 200, 16, 200
SHIFT, MAX_GAIN, OWN_NOISE = 1.2, 0.6, 0.35
MAX_FALSE = 0.05


@dataclass(frozen=True)
class Outcome:
    """The outcome of one study: whether it has a truly best size, and for each rule whether it decided and was right."""

    has_best: bool
    is_right: bool
    by_rule: dict[str, bool]


def simulate(seed: int) -> Outcome:
    """Draw a study, score its points and decide between its two best sizes."""
    generator = np.random.default_rng(seed)
    groups = generator.integers(1, 9, size=generator.integers(2, 5))
    better = -1 if seed % 3 == 0 else int(generator.integers(len(groups)))
    gain = generator.uniform(0, MAX_GAIN)
    reference = KernelReference.of(generator.standard_normal((NUM_REFERENCE, WIDTH)), num_bootstrap=NUM_RESAMPLES, seed=seed)
    counts = generated_counts(NUM_IMAGES, NUM_RESAMPLES, seed)
    shared = generator.standard_normal((NUM_IMAGES, WIDTH))
    rows, resamples = [], {}
    for size, num_points in enumerate(groups):
        for _ in range(num_points):
            own = generator.standard_normal((NUM_IMAGES, WIDTH))
            features = np.sqrt(1 - OWN_NOISE**2) * shared + OWN_NOISE * own
            features[:, generator.integers(WIDTH)] += SHIFT - (gain if size == better else 0)
            point = f"{len(rows)}"
            resamples[point] = kernel_resamples(features, counts, reference)
            rows.append({"point": point, "size": size, "num_images": NUM_IMAGES, METRIC: resamples[point][0]})
    table = pd.DataFrame(rows).sort_values(METRIC)
    best = table.iloc[0]
    runner_up = table[table["size"] != best["size"]].iloc[0]
    decision = decide(*(table[table["size"] == row["size"]] for row in (best, runner_up)), METRIC, resamples)
    assert decision is not None
    first, second = (percentile_interval(resamples[row["point"]]) for row in (best, runner_up))
    by_rule = {"paired": decision.is_decided, "separate intervals": first.high < second.low}
    return Outcome(better >= 0, int(best["size"]) == better, by_rule)


def main() -> None:
    parser = argument_parser(__doc__, quick="60 studies")
    parser.add_argument("--studies", type=int, default=600)
    arguments = parser.parse_args()
    num_studies = 60 if arguments.quick else arguments.studies
    outcomes = []
    for seed in range(num_studies):
        outcomes.append(simulate(seed))
        if not arguments.json and (seed + 1) % 60 == 0:
            print(f"{seed + 1} of {num_studies} studies", file=sys.stderr, flush=True)
    rows: list[Row] = []
    with_best = [outcome for outcome in outcomes if outcome.has_best]
    for rule in ("paired", "separate intervals"):
        false = float(np.mean([outcome.by_rule[rule] and not outcome.is_right for outcome in outcomes]))
        equal = float(np.mean([outcome.by_rule[rule] for outcome in outcomes if not outcome.has_best]))
        power = float(np.mean([outcome.by_rule[rule] and outcome.is_right for outcome in with_best]))
        rows += [
            {"what": f"{rule}: false decisions, all studies", "value": false, "unit": "fraction"},
            {"what": f"{rule}: decided although all points are equal", "value": equal, "unit": "fraction"},
            {"what": f"{rule}: power", "value": power, "unit": "fraction"},
        ]
    targets = [
        {"what": row["what"], "value": row["value"], "target": f"<= {MAX_FALSE:g}", "met": row["value"] <= MAX_FALSE}
        for row in rows[:1]
    ]
    print_results("paired_decisions", rows, targets, num_studies=num_studies)


if __name__ == "__main__":
    main()
