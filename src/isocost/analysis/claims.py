"""Check claims of a paper against a study's own points: cases that agree, contradict or stay open, and a verdict.

A case compares two scores. It agrees or contradicts if their 95 % intervals are disjoint. It is open if they overlap or an
interval is missing. Separate intervals are wider than the interval of a paired difference, so verdicts err towards undecided.
If sizes were trained again with other seeds, the scores of two sizes must also differ by more than the seed variance explains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd

from isocost.analysis.costs import REPORT_COSTS, expected_costs
from isocost.analysis.formatting import format_score
from isocost.analysis.results_table import classifier_free
from isocost.analysis.seed_variance import SeedVariance, estimate_seed_variance
from isocost.errors import ConfigError
from isocost.evaluation.metric_registry import metric_of

Vote = Literal["agrees", "contradicts", "open"]
MAX_EXAMPLES = 3
"""Number of cases that a verdict shows as evidence."""


@dataclass(frozen=True)
class TaskResults:
    """The points of a task (a table as in `isocost.analysis.results_table`) and the main metric of its report.

    Attributes:
        seed_variance: of this metric, if it was measured.
    """

    table: pd.DataFrame
    metric: str
    seed_variance: SeedVariance | None = None


Tables = Mapping[str, TaskResults]
"""By task: "text2image", "seed-replicates", "superres", "distill", "dreambooth"."""


@dataclass(frozen=True)
class Evidence:
    """One comparison: whether it agrees with the claim, and a text with the two scores."""

    vote: Vote
    text: str


@dataclass(frozen=True)
class Claim:
    """A claim of a paper.

    Attributes:
        section: the experiment of the paper that it belongs to, counted from 1.
        find_evidence: returns its cases, from the tables and the name of a cost; raises ConfigError if the tables lack the
            data.
        depends_on_cost: whether there is one verdict per cost.
    """

    section: int
    statement: str
    find_evidence: Callable[[Tables, str], list[Evidence]]
    depends_on_cost: bool = False


@dataclass(frozen=True)
class ClaimVerdict:
    """The verdict of a study on a claim.

    Attributes:
        cost: the cost under which it was evaluated; empty if the claim does not depend on cost.
        missing: the missing data, if there are no cases.
    """

    section: int
    statement: str
    cost: str
    cases: tuple[Evidence, ...]
    missing: str = ""

    def count(self, vote: Vote) -> int:
        """The number of cases with this vote."""
        return sum(case.vote == vote for case in self.cases)

    @property
    def verdict(self) -> str:
        """The verdict that follows from the counts.

        "holds": at least one case agrees, none contradicts, and the open cases are no more than the agreeing ones. "does not
        hold": more cases contradict than agree, and the contradicting cases are no fewer than the open ones. "not measured":
        there are no cases. "undecided": all other counts.
        """
        num_agree, num_contradict, num_open = (self.count(vote) for vote in ("agrees", "contradicts", "open"))
        if not self.cases:
            return "not measured"
        if num_agree and not num_contradict and num_agree >= num_open:
            return "holds"
        if num_contradict > num_agree and num_contradict >= num_open:
            return "does not hold"
        return "undecided"

    @property
    def counts(self) -> str:
        """The number of cases with each vote as text, or the missing data."""
        if not self.cases:
            return self.missing
        counts = f"{self.count('agrees')} of {len(self.cases)} agree, {self.count('contradicts')} contradict"
        return f"{counts}, {self.count('open')} open"

    @property
    def examples(self) -> tuple[str, ...]:
        """Texts of at most `MAX_EXAMPLES` cases: contradicting ones first if the claim does not hold, else agreeing ones."""
        does_not_hold = self.verdict == "does not hold"
        votes: tuple[Vote, ...] = ("contradicts", "agrees", "open") if does_not_hold else ("agrees", "contradicts", "open")
        ordered = [case for vote in votes for case in pick_diverse([case for case in self.cases if case.vote == vote])]
        return tuple(case.text for case in ordered[:MAX_EXAMPLES])


def pick_diverse(cases: Sequence[Evidence]) -> list[Evidence]:
    """The cases with the first, the last and the middle one moved to the front."""
    order = dict.fromkeys([0, len(cases) - 1, len(cases) // 2, *range(len(cases))])
    return [cases[index] for index in order if 0 <= index < len(cases)]


def evaluate_claims(claims: Sequence[Claim], tables: Tables) -> list[ClaimVerdict]:
    """The verdict on every claim; one per cost if the claim depends on cost.

    The paper knows classifier-free guidance only, so points with a guide, an interval or a schedule do not count.
    """
    tables = {task: replace(results, table=classifier_free(results.table)) for task, results in tables.items()}
    expected = {cost for results in tables.values() for cost in expected_costs(results.table)}
    costs = [cost for cost in REPORT_COSTS if cost in expected]
    verdicts = []
    for claim in claims:
        for cost in costs if claim.depends_on_cost else ("",):
            try:
                cases, missing = claim.find_evidence(tables, cost), ""
            except ConfigError as error:
                cases, missing = [], str(error)
            missing = missing or "nothing to compare"
            verdicts.append(ClaimVerdict(claim.section, claim.statement, cost, tuple(cases), missing))
    return verdicts


def results_of(tables: Tables, task: str) -> TaskResults:
    """The results of a task.

    Raises:
        ConfigError: the study has no results of this task.
    """
    if task not in tables:
        raise ConfigError(f"no results of {task}")
    return tables[task]


def with_seed_variance(tables: Tables) -> dict[str, TaskResults]:
    """The tables, with the seed variance of "seed-replicates" added to the results of that task and of "text2image"."""
    results = dict(tables)
    if "seed-replicates" not in tables:
        return results
    try:
        seed_variance = estimate_seed_variance(tables["seed-replicates"].table, tables["seed-replicates"].metric)
    except ConfigError:  # no second training has a point yet; the page of that task reports it
        return results
    return results | {
        task: replace(results[task], seed_variance=seed_variance)
        for task in ("text2image", "seed-replicates")
        if task in results
    }


def compare_scores(
    first: Mapping[Any, Any], second: Mapping[Any, Any], metric: str, seed_variance: SeedVariance | None = None
) -> str:
    """Whether the score of the first row is "better" or "worse" than that of the second, or "undecided".

    The intervals must be disjoint. With `seed_variance`, scores of two sizes must also differ by more than it explains.
    """
    if seed_variance is not None and first["size"] != second["size"] and seed_variance.explains(first, second, metric):
        return "undecided"
    ends = [float(row[f"{metric}_{end}"]) for row in (first, second) for end in ("low", "high")]
    first_low, first_high, second_low, second_high = ends
    if any(end != end for end in ends) or (first_low <= second_high and second_low <= first_high):
        return "undecided"
    return "better" if (first_high < second_low) == (metric_of(metric).better == "lower") else "worse"


def vote_of(outcome: str, expected: str = "better") -> Vote:
    """The vote of a case: its outcome (`compare_scores`) against the outcome that the claim expects."""
    if outcome == "undecided":
        return "open"
    return "agrees" if outcome == expected else "contradicts"


def format_metric_score(row: Mapping[Any, Any], metric: str) -> str:
    """The score of a row with its interval."""
    return format_score(float(row[metric]), float(row[f"{metric}_low"]), float(row[f"{metric}_high"]))
