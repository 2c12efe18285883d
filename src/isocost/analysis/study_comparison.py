"""Compare several studies at equal cost: the best point of each study at each budget, and the differences to the leader.

The studies may differ in the family, the autoencoder, the training recipe or the training data, or use pretrained checkpoints.
They must be scored under one protocol. The columns of a table are listed in `isocost.analysis.results_table`; a table of
several studies has the column `study` as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from isocost.analysis.costs import cost_of, is_measured
from isocost.analysis.formatting import format_score
from isocost.analysis.iso_cost import Comparison, PairedDifferences, best_at_budget
from isocost.analysis.pareto import default_budgets
from isocost.analysis.results_table import final_points, is_within_budget, rank_points, with_metric
from isocost.analysis.timings import keep_one_timing_device
from isocost.errors import ConfigError

NUM_BUDGETS = 6
UNIT_TOLERANCE = 1e-3
"""Two studies have the same unit of normalized cost if its GFLOP differ by at most this fraction."""


@dataclass(frozen=True)
class Ranking:
    """The studies at one budget.

    Every study is represented by its best score within the budget. This selection makes the scores of all studies optimistic in
    the same way; the intervals do not include it.

    Attributes:
        leader: the study with the best score.
        scores: the best score of every study with a point within the budget, as text, from best to worst.
        against: the leader compared with every other study.
    """

    budget: float
    cost: str
    metric: str
    leader: str
    scores: Mapping[str, str]
    against: tuple[Comparison, ...]

    @property
    def is_decided(self) -> bool:
        """Whether the leader is better than every other study within the budget, by the intervals of the differences."""
        return all(comparison.verdict == "better" for comparison in self.against if comparison.other in self.scores)

    @property
    def is_contested(self) -> bool:
        """Whether another study has a point within the budget."""
        return len(self.scores) > 1

    def __str__(self) -> str:
        budget, configuration = cost_of(self.cost).format_amount(self.budget), self.against[0].one_configuration
        text = f"{budget}: {self.leader}, {self.scores[self.leader]} ({configuration})"
        if not self.is_contested:
            return f"{text}; no other study fits"
        others = [
            f"{comparison.other}, {self.scores[comparison.other]} ({comparison.other_configuration}); "
            f"{self.leader} minus {comparison.other} is {comparison}"
            for comparison in self.against
            if comparison.other in self.scores
        ]
        return f"{text}; {'; '.join(others)}"


def concat_studies(tables: Mapping[str, pd.DataFrame], metric: str) -> pd.DataFrame:
    """Combine the competing points of several studies in one table.

    The name of a size that several studies have gets the name of its study: "2.6M (emoji)". Only the milliseconds of one device
    are kept.

    Args:
        tables: study name -> table.

    Raises:
        ConfigError: there are fewer than two studies, a study has no final point, or the scores cannot be compared.
    """
    if len(tables) < 2:
        raise ConfigError("a comparison needs at least two studies: give two output folders or more")
    parts = [final_points(table, metric).assign(study=study) for study, table in tables.items()]
    names = pd.concat([part[["size", "study"]] for part in parts]).drop_duplicates()
    num_studies = names.groupby("size")["study"].nunique()
    shared = set(num_studies[num_studies > 1].index)
    renamed = [
        part.assign(size=part["size"].where(~part["size"].isin(shared), part["size"] + f" ({part['study'].iloc[0]})"))
        for part in parts
    ]
    return keep_one_timing_device(with_metric(pd.concat(renamed, ignore_index=True), metric))


def rankings(
    table: pd.DataFrame, metric: str, cost: str, pairs: PairedDifferences, budgets: Sequence[float] = ()
) -> list[Ranking]:
    """Rank the studies of a combined table at each budget.

    Args:
        table: the result of `concat_studies`.
        cost: a name of `COSTS`.
        budgets: in the unit of that cost; if empty, `NUM_BUDGETS` budgets over the range of the points' costs.

    Raises:
        ConfigError: a study has no point with a measured cost, the units of normalized cost differ, or no point fits a budget.
    """
    measured_by, counted_by = cost_of(cost).measured_by, cost_of(cost).counted_by
    studies = list(dict.fromkeys(table["study"]))
    untimed = [study for study in studies if not is_measured(table[table["study"] == study], cost)]
    if untimed:
        raise ConfigError(
            f"{untimed[0]} has no point with a known {cost}; {counted_by}, or compare by --cost gflop_denoiser"
            if counted_by
            else f"{untimed[0]} has no point with {cost} measured on the device of the other studies: compare by --cost gflop"
            + (f", or {measured_by}" if measured_by else "")
        )
    if cost == "normalized_cost":
        _check_units(table)
    rows = rank_points(table[table[cost].notna()], metric, cost)
    results = []
    for budget in budgets or default_budgets(rows, cost, NUM_BUDGETS):
        within = rows[is_within_budget(rows[cost], budget)]
        if within.empty:
            requested, lowest = (cost_of(cost).format_amount(amount) for amount in (budget, float(rows[cost].min())))
            raise ConfigError(f"a budget of {requested} is below every point; the cheapest costs {lowest}")
        best = within.drop_duplicates("study")
        leader = str(best["study"].iloc[0])
        scores = {
            str(row["study"]): format_score(*(float(row[f"{metric}{suffix}"]) for suffix in ("", "_low", "_high")))
            for row in best.to_dict("records")
        }
        others = [study for study in [*scores, *(name for name in studies if name not in scores)] if study != leader]
        against = tuple(best_at_budget(rows, metric, pairs, cost, budget, leader, other, by="study") for other in others)
        results.append(Ranking(float(budget), cost, metric, leader, scores, against))
    return results


def headline(results: Sequence[Ranking]) -> str:
    """A summary of all budgets: how often each study leads, and how often that is decided."""
    contested = [ranking for ranking in results if ranking.is_contested]
    if not contested:
        return "no budget has points of two studies."
    leaders = list(dict.fromkeys(ranking.leader for ranking in contested))
    parts = []
    for leader in leaders:
        led = [ranking for ranking in contested if ranking.leader == leader]
        num_decided = sum(ranking.is_decided for ranking in led)
        parts.append(f"{leader} leads at {len(led)} of {len(contested)} budgets, decided at {num_decided}")
    return "; ".join(parts) + "."


def _check_units(table: pd.DataFrame) -> None:
    """Check that the unit of normalized cost, the largest U-Net at the study's latent shape and prompt length, is the same."""
    units = (
        (table["gflop_denoiser"] / (table["normalized_cost"] * table["nfe"] / table["num_steps"]))
        .groupby(table["study"])
        .median()
    )
    if units.max() > units.min() * (1 + UNIT_TOLERANCE):
        values = ", ".join(f"{unit:.3g} GFLOP ({study})" for study, unit in units.items())
        raise ConfigError(f"the unit of normalized cost differs between these studies: {values}; compare by --cost gflop")
