"""A finding put to a study's own points: cases that agree, contradict or stay open, and what they say together.

A case compares two scores. It agrees or contradicts where their 95 % intervals are apart, and is open where they overlap or
one has none: separate intervals are wider than a paired difference, so verdicts err towards undecided. Where sizes were trained
again from other seeds, scores of two sizes have to differ by more than that luck as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd

from isocost.analysis.costs import COSTS
from isocost.analysis.formatting import format_score
from isocost.analysis.seed_variance import SeedVariance, estimate_seed_variance
from isocost.errors import ConfigError
from isocost.metrics.registry import metric_of

Says = Literal["agrees", "contradicts", "open"]
MAX_CASES = 3
"""Told of a verdict's evidence."""


@dataclass(frozen=True)
class TaskResults:
    """The table of a task (`isocost.analysis.frontier`) and the metric that its report leads with.

    `luck` is how far trainings that differ in their seed alone are apart in it, where that was measured.
    """

    table: pd.DataFrame
    metric: str
    seed_variance: SeedVariance | None = None


Tables = Mapping[str, TaskResults]
"""By task: "text2image", "seed-replicates", "superres", "distill", "dreambooth"."""


@dataclass(frozen=True)
class Evidence:
    """One comparison: what it says of the finding, and the two scores in words."""

    says: Says
    words: str


@dataclass(frozen=True)
class Claim:
    """A statement of arXiv 2404.01367.

    Attributes:
        section: the experiment it belongs to, 1 to 6 in the order of the paper.
        judge: its cases in the tables, under the cost called so; ConfigError where the tables cannot say.
        is_by_cost: whether the verdict depends on how cost is counted.
    """

    section: int
    statement: str
    evaluate_claims: Callable[[Tables, str], list[Evidence]]
    is_by_cost: bool = False


@dataclass(frozen=True)
class ClaimVerdict:
    """What a study says of a finding; `cost` is empty where no cost enters, `why` says what is missing where nothing does."""

    section: int
    statement: str
    cost: str
    cases: tuple[Evidence, ...]
    why: str = ""

    def count(self, says: Says) -> int:
        """How many cases say so."""
        return sum(case.says == says for case in self.cases)

    @property
    def verdict(self) -> str:
        """ "holds": some case agrees, none contradicts, and at most as many are open. "does not hold": most of those that are
        decided contradict, and at least as many as are open. "undecided" otherwise; "not measured" without cases."""
        agree, against, still_open = (self.count(says) for says in ("agrees", "contradicts", "open"))
        if not self.cases:
            return "not measured"
        if agree and not against and agree >= still_open:
            return "holds"
        if against > agree and against >= still_open:
            return "does not hold"
        return "undecided"

    @property
    def counts(self) -> str:
        """How many cases say what, or what is missing."""
        if not self.cases:
            return self.why
        counts = f"{self.count('agrees')} of {len(self.cases)} agree, {self.count('contradicts')} contradict"
        return f"{counts}, {self.count('open')} open"

    @property
    def told(self) -> tuple[str, ...]:
        """Some cases in words: those against first where it does not hold, else those for it."""
        first: tuple[Says, ...] = ("contradicts", "agrees") if self.verdict == "does not hold" else ("agrees", "contradicts")
        told = [case for says in (*first, "open") for case in spread([case for case in self.cases if case.says == says])]
        return tuple(case.words for case in told[:MAX_CASES])


def spread(cases: Sequence[Evidence]) -> list[Evidence]:
    """The first, the last and the middle one of them in front."""
    order = dict.fromkeys([0, len(cases) - 1, len(cases) // 2, *range(len(cases))])
    return [cases[at] for at in order if 0 <= at < len(cases)]


def evaluate_claims(findings: Sequence[Claim], tables: Tables) -> list[ClaimVerdict]:
    """A verdict for every finding; under every cost where that enters."""
    told = []
    for finding in findings:
        for cost in COSTS if finding.is_by_cost else ("",):
            try:
                cases, why = finding.evaluate_claims(tables, cost), ""
            except ConfigError as error:
                cases, why = [], str(error)
            told.append(ClaimVerdict(finding.section, finding.statement, cost, tuple(cases), why or "nothing to compare"))
    return told


def points_of(tables: Tables, task: str) -> TaskResults:
    """The points of a task; ConfigError where it was not done."""
    if task not in tables:
        raise ConfigError(f"{task} was not done")
    return tables[task]


def with_seed_variance(tables: Tables) -> dict[str, TaskResults]:
    """The family's points, and those of its repeats, with what its repeats say of luck."""
    told = dict(tables)
    if "seed-replicates" not in tables:
        return told
    try:
        seed_variance = estimate_seed_variance(tables["seed-replicates"].table, tables["seed-replicates"].metric)
    except ConfigError:  # a further training that has no point yet, of which the page tells
        return told
    return told | {
        task: replace(told[task], seed_variance=seed_variance) for task in ("text2image", "seed-replicates") if task in told
    }


def compare(one: Mapping[Any, Any], other: Mapping[Any, Any], metric: str, seed_variance: SeedVariance | None = None) -> str:
    """Whether the first row's score is "better" or "worse" than the other's, or "undecided".

    Their intervals must be apart; with `luck` scores of two sizes must also differ by more than two trainings may.
    """
    if seed_variance is not None and one["size"] != other["size"] and seed_variance.explains(one, other, metric):
        return "undecided"
    ends = [float(row[f"{metric}_{side}"]) for row in (one, other) for side in ("low", "high")]
    low, high, other_low, other_high = ends
    if any(end != end for end in ends) or (low <= other_high and other_low <= high):
        return "undecided"
    return "better" if (high < other_low) == (metric_of(metric).better == "lower") else "worse"


def says(outcome: str, wanted: str = "better") -> Says:
    """What an outcome of `compare` says of a finding that wants the first "better" (or "worse")."""
    if outcome == "undecided":
        return "open"
    return "agrees" if outcome == wanted else "contradicts"


def format_metric_score(row: Mapping[Any, Any], metric: str) -> str:
    """A score with its interval."""
    return format_score(float(row[metric]), float(row[f"{metric}_low"]), float(row[f"{metric}_high"]))
