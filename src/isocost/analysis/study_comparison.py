"""Several studies on one axis: at each budget the best of each, and whether the leader is told apart from the others.

Families, autoencoders, recipes or data sets of training, or people's checkpoints beside one's own: whatever differs, the studies
must be scored under one protocol. A table is one of `isocost.analysis.frontier`; the united one has the column `study` too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from isocost.analysis.costs import cost_of
from isocost.analysis.formatting import format_score
from isocost.analysis.iso_cost import Comparison, Pairs, best_at_budget
from isocost.analysis.pareto import default_budgets
from isocost.analysis.results_table import final_points, fits, rank_points, with_metric
from isocost.analysis.timings import timed_on_one_device
from isocost.errors import ConfigError

NUM_BUDGETS = 6
SAME_UNIT = 1e-3
"""Most that two studies' GFLOP of a unit of normalized cost may differ by, as a share, to be one unit."""


@dataclass(frozen=True)
class Ranking:
    """The studies at one budget: the leader, the score of each at its best within it, and the leader against every other.

    `scores` has the studies from best to worst, those of which nothing fits left out. A choice of the best by the same scores
    that it is then compared with flatters every study alike; the intervals do not cover it.
    """

    budget: float
    cost: str
    metric: str
    leader: str
    scores: Mapping[str, str]
    against: tuple[Comparison, ...]

    @property
    def is_decided(self) -> bool:
        """Whether the leader is better than every other study that fits, by intervals of differences."""
        return all(one.verdict == "better" for one in self.against if one.other in self.scores)

    @property
    def is_contested(self) -> bool:
        """Whether anything of another study fits."""
        return len(self.scores) > 1

    def __str__(self) -> str:
        first = self.against[0]
        told = (
            f"{cost_of(self.cost).amount(self.budget)}: {self.leader}, {self.scores[self.leader]} ({first.one_configuration})"
        )
        if not self.is_contested:
            return f"{told}; nothing else fits"
        others = [
            f"{one.other} {self.scores[one.other]} ({one.other_configuration}), {one}"
            for one in self.against
            if one.other in self.scores
        ]
        return f"{told}; {self.leader} less {'; less '.join(others)}"


def concat_studies(tables: Mapping[str, pd.DataFrame], metric: str) -> pd.DataFrame:
    """The competing points of several studies, by the name of each, in one table.

    A size that two studies have carries its study's name: "2.6M (emoji)". Milliseconds stay those of one device.

    Raises:
        ConfigError: fewer than two studies, a study has nothing finished, or the studies' numbers cannot be compared.
    """
    if len(tables) < 2:
        raise ConfigError("one study has nothing to be compared with: give two output folders or more")
    parts = [final_points(table, metric).assign(study=study) for study, table in tables.items()]
    homes = pd.concat([part[["size", "study"]] for part in parts]).drop_duplicates().groupby("size")["study"].nunique()
    shared = set(homes[homes > 1].index)
    named = [
        part.assign(size=part["size"].where(~part["size"].isin(shared), part["size"] + f" ({part['study'].iloc[0]})"))
        for part in parts
    ]
    return timed_on_one_device(with_metric(pd.concat(named, ignore_index=True), metric))


def rankings(table: pd.DataFrame, metric: str, cost: str, pairs: Pairs, budgets: Sequence[float] = ()) -> list[Ranking]:
    """How the studies of a united table stand at each budget of a cost; spread over the points' costs where none is given.

    Raises:
        ConfigError: a study has no point with the cost measured, its normalized cost is in other units, or nothing fits a budget.
    """
    cost_of(cost)
    studies = list(dict.fromkeys(table["study"]))
    untimed = [study for study in studies if table.loc[table["study"] == study, cost].isna().all()]
    if untimed:
        raise ConfigError(
            f"{untimed[0]} has no point with {cost} measured on the device of the others: compare by --cost gflop"
        )
    if cost == "normalized_cost":
        _check_units(table)
    rows = rank_points(table[table[cost].notna()], metric, cost)
    found = []
    for budget in budgets or default_budgets(rows, cost, NUM_BUDGETS):
        within = rows[fits(rows[cost], budget)]
        if within.empty:
            least = cost_of(cost).amount(float(rows[cost].min()))
            raise ConfigError(f"a budget of {cost_of(cost).amount(budget)} is below every point; the cheapest costs {least}")
        best = within.drop_duplicates("study")
        leader = str(best["study"].iloc[0])
        scores = {
            str(row["study"]): format_score(*(float(row[f"{metric}{end}"]) for end in ("", "_low", "_high")))
            for row in best.to_dict("records")
        }
        others = [study for study in [*scores, *(each for each in studies if each not in scores)] if study != leader]
        against = tuple(best_at_budget(rows, metric, pairs, cost, budget, leader, other, by="study") for other in others)
        found.append(Ranking(float(budget), cost, metric, leader, scores, against))
    return found


def headline(told: Sequence[Ranking]) -> str:
    """What the budgets say together: who leads how often, and how often that is decided."""
    contested = [standing for standing in told if standing.is_contested]
    if not contested:
        return "no budget takes in two studies."
    leaders = list(dict.fromkeys(standing.leader for standing in contested))
    parts = []
    for leader in leaders:
        own = [standing for standing in contested if standing.leader == leader]
        parts.append(f"{leader} leads at {len(own)} of {len(contested)} budgets, decided at {sum(s.is_decided for s in own)}")
    return "; ".join(parts) + "."


def _check_units(table: pd.DataFrame) -> None:
    """Paper cost is in units of the largest U-Net at a study's own latents and captions."""
    units = (table["gflop"] / (table["normalized_cost"] * table["nfe"] / table["num_steps"])).groupby(table["study"]).median()
    if units.max() > units.min() * (1 + SAME_UNIT):
        told = ", ".join(f"{unit:.3g} GFLOP ({study})" for study, unit in units.items())
        raise ConfigError(f"a unit of normalized cost is not the same in these studies: {told}; compare by --cost gflop")
