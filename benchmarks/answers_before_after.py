"""The best size within each budget of a study: decided by separate intervals, as before version 0.2, and by paired differences.

    python benchmarks/answers_before_after.py FOLDER [FOLDER ...] [--json]

The budgets are those of a report, evenly spaced over the logarithm of the cost in GFLOP of the whole image. All points of one
family share text encoder and decoder, so counting them changes the ratios of costs but not the best point within a budget.
Only points without a guide, an interval and a schedule take part. Paired differences need the bootstrap resamples of all points
of both sizes. The last line is JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from results import Row, print_results

import isocost
from isocost.analysis.pareto import BudgetChoice, best_at_budgets, default_budgets
from isocost.analysis.results_table import classifier_free, report_metric

HEADER = "| study | GFLOP | best | best of another size | separate intervals | paired difference |\n|---|--:|---|---|---|---|"


@dataclass(frozen=True)
class Answer:
    """The choice within one budget of a study by both rules; `paired` equals `separate` where there are no resamples."""

    study: str
    separate: BudgetChoice
    paired: BudgetChoice

    @property
    def verdict(self) -> str:
        """Decided or undecided, by separate intervals."""
        return "undecided" if self.separate.undecided else "decided"

    @property
    def paired_verdict(self) -> str:
        """Decided or undecided, by the paired difference; with the difference and its interval."""
        decision = self.paired.decision
        if decision is None:
            return "no resamples"
        difference = decision.difference
        verdict = "undecided" if self.paired.undecided else "decided"
        return f"{verdict}, {difference.value:.3f} [{difference.low:.3f}, {difference.high:.3f}]"


def answers(folder: str) -> list[Answer]:
    """The answers of the study in an output folder or an archive, one per budget with two sizes."""
    table = classifier_free(isocost.read_results(folder))
    metric, budgets = report_metric(folder, table), default_budgets(table, "gflop")
    separate = best_at_budgets(table, "gflop", metric, budgets)
    paired = best_at_budgets(table, "gflop", metric, budgets, resamples=isocost.read_resamples(folder))
    return [Answer(folder, *choices) for choices in zip(separate, paired, strict=True) if choices[0].runner_up is not None]


def format_answer(answer: Answer) -> str:
    """A row of the table."""
    choice = answer.separate
    cells = (answer.study, f"{choice.budget:g}", str(choice.best), str(choice.runner_up), answer.verdict, answer.paired_verdict)
    return f"| {' | '.join(cells)} |"


def count_decided(folder: str, found: Sequence[Answer]) -> list[Row]:
    """How many choices between two sizes a study has, and how many of them each rule decides."""
    with_resamples = [answer for answer in found if answer.paired.decision is not None]
    counts = {
        "choices between sizes": len(found),
        "decided by separate intervals": sum(not answer.separate.undecided for answer in found),
        "choices with resamples": len(with_resamples),
        "of these decided by separate intervals": sum(not answer.separate.undecided for answer in with_resamples),
        "of these decided by paired differences": sum(not answer.paired.undecided for answer in with_resamples),
    }
    return [{"what": f"{folder}: {what}", "value": value, "unit": "budgets"} for what, value in counts.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="output folder or archive with a report")
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    arguments = parser.parse_args()
    rows: list[Row] = []
    if not arguments.json:
        print(HEADER)
    for folder in arguments.folders:
        found = answers(folder)
        if not arguments.json:
            print("\n".join(map(format_answer, found)))
        rows += count_decided(folder, found)
    print_results("answers_before_after", rows, [])


if __name__ == "__main__":
    main()
