"""Seed variance: the spread between trainings on synthetic tables, its effect on verdicts, and a study with seed replicates."""

from __future__ import annotations

import math
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from conftest import plain_study, tiny_study
from finished_study import BASE, finished_spec
from isocost.analysis.claims import TaskResults, evaluate_claims, with_seed_variance
from isocost.analysis.paper_claims import CLAIMS
from isocost.analysis.seed_variance import (
    SeedVariance,
    TrainingSpread,
    estimate_seed_variance,
    format_replicate_scores,
    split_training_name,
)
from isocost.config.study import StudySpec
from isocost.config.study_yaml import dump_study
from isocost.errors import ConfigError
from isocost.models.checkpoint import load_checkpoint, read_info
from isocost.pipeline.dry_run import plan
from isocost.pipeline.merge import archive, merge
from isocost.pipeline.pipeline import Pipeline
from isocost.sweep.results_db import ResultsDB
from isocost.sweep.schema import PointRecord
from synthetic_results import synthetic_table

KERNEL = "mmd_efficientnet"
ENDS = ("", "_low", "_high")


_synthetic = lru_cache(lambda sizes: synthetic_table(sizes=sizes, num_steps=(2, 4), guidance=(1.0, 2.0), snapshots=()))


def trained_again(spread: float, seed: int = 0, sizes: tuple[str, ...] = ("0.2M", "0.8M"), num_seeds: int = 2) -> pd.DataFrame:
    """A table with several trainings; all scores of a training are multiplied by one factor, of that standard deviation."""
    generator = np.random.default_rng(seed)
    table = _synthetic(sizes)
    parts = []
    for number in range(num_seeds):
        factors = table["size"].map({size: math.exp(spread * generator.standard_normal()) for size in sizes})
        scores = {f"{KERNEL}{end}": table[f"{KERNEL}{end}"] * factors for end in ENDS}
        names = table["size"] if number == 0 else table["size"] + f" seed {number}"
        parts.append(table.assign(**scores, size=names, point=table["point"] + str(number)))
    return pd.concat(parts, ignore_index=True)


# --- the spread ---


def test_a_name_contains_size_and_training() -> None:
    assert split_training_name("2.6M seed 1") == ("2.6M", "seed 1")
    assert split_training_name("2.6M") == ("2.6M", "")
    assert split_training_name("2.6M consistency") == ("2.6M consistency", "")


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "num_seeds", "degrees"), [(("0.2M", "0.8M"), 2, 2), (("0.8M",), 4, 3)])
def test_intervals_cover_the_true_spread_and_margins_the_differences(
    sizes: tuple[str, ...], num_seeds: int, degrees: int
) -> None:
    spreads = [estimate_seed_variance(trained_again(0.05, seed, sizes, num_seeds), KERNEL).pooled for seed in range(200)]
    assert {spread.degrees_of_freedom for spread in spreads} == {degrees}
    assert {spread.sizes for spread in spreads} == {sizes}
    assert 0.90 <= np.mean([spread.low <= 0.05 <= spread.high for spread in spreads]) <= 0.99
    assert np.mean([spread.relative_std**2 for spread in spreads]) == pytest.approx(0.05**2, rel=0.25)
    scores = 0.05 * np.random.default_rng(1).standard_normal((len(spreads), 2))
    assert 0.91 <= np.mean(np.abs(scores[:, 0] - scores[:, 1]) <= [spread.margin for spread in spreads]) <= 0.99


def test_settings_that_a_training_does_not_have_do_not_count() -> None:
    table = trained_again(0.05)
    incomplete = table[~((table["size"] == "0.8M seed 1") & (table["num_steps"] == 2))]
    assert estimate_seed_variance(incomplete, KERNEL).pooled.relative_std == pytest.approx(
        estimate_seed_variance(table, KERNEL).pooled.relative_std
    )
    all_settings, fewer_settings = (format_replicate_scores(rows, KERNEL)["0.8M"] for rows in (table, incomplete))
    assert len(all_settings) == len(fewer_settings) + 2  # solvers
    with pytest.raises(ConfigError, match=r"seed_replicates.seeds"):
        estimate_seed_variance(synthetic_table(), KERNEL)


# --- verdicts ---


def verdicts(spread: float | None) -> dict[str, str]:
    tables = {"text2image": TaskResults(synthetic_table(sizes=("0.2M", "0.8M", "3.2M")), KERNEL)}
    if spread is not None:
        tables["seed-replicates"] = TaskResults(trained_again(spread), KERNEL)
    results = evaluate_claims(CLAIMS, with_seed_variance(tables))
    return {verdict.statement: verdict.verdict for verdict in results if not verdict.cost}


@pytest.mark.slow
def test_sizes_have_to_differ_by_more_than_the_seed_variance() -> None:
    larger, longer = (
        "Of two sizes trained on the same images the larger is better",
        "More training gives better images, at every size",
    )
    assert verdicts(None)[larger] == verdicts(0.001)[larger] == "holds"
    with_large_variance = verdicts(0.5)
    assert with_large_variance[larger] == "undecided"
    assert with_large_variance["With any sampling cost allowed the largest size is the best"] == "undecided"
    assert with_large_variance[longer] == verdicts(None)[longer] == "holds"  # snapshots of one training have one seed


# --- a study ---


def replicates_study(**changes: Any) -> StudySpec:
    """The finished study with seed replicates, without its other experiments."""
    return finished_spec("seed_replicates", **changes)


@pytest.fixture(scope="module")
def finished(finished_copy: Path) -> Pipeline:
    return Pipeline(replicates_study(), finished_copy)


def test_further_trainings_differ_only_in_their_seed(finished: Pipeline) -> None:
    first, *again = finished.runs
    assert [run.title for run in again] == ["seed-replicates width 8 seed 1", "seed-replicates width 8 seed 2"]
    other = Pipeline(finished_spec(train={**BASE["train"], "seed": 1}), finished.out / "other")
    assert [run.digest for run in other.runs] == [again[0].digest]
    weights = [load_checkpoint(finished.store.folder("checkpoint", run.final)).network.state_dict() for run in (first, *again)]
    assert not any(weights[0]["conv_in.weight"].equal(one["conv_in.weight"]) for one in weights[1:])


def test_they_have_a_separate_table_and_page(finished: Pipeline) -> None:
    table = pd.read_parquet(finished.out / "table-seed-replicates.parquet")
    assert set(table["size"]) == {"0.8M", "0.8M seed 1", "0.8M seed 2"}
    by_size = table[table["is_final"]].groupby("size").size()
    assert set(by_size) == {4 + 1 - 1}  # the grid contains the setting of the snapshots
    assert set(pd.read_parquet(finished.out / "table.parquet")["size"]) == {"0.8M"}
    page = (finished.out / "report" / "seed-replicates" / "index.html").read_text()
    assert "standard deviation of a score between training seeds" in page
    claims = (finished.out / "report" / "claims.md").read_text()
    assert re.search(r"between training seeds: 0\.8M [\d.e-]+ % .* from 2 more trainings, explains a factor of up to", claims)


def test_their_checkpoints_can_be_left_out_of_an_archive(finished: Pipeline, tmp_path: Path) -> None:
    archive(finished.out, tmp_path / "archive", tasks=("text2image",))
    archived = {folder.name for folder in (tmp_path / "archive" / "artefacts" / "checkpoint").iterdir()}
    runs = [run for run in finished.runs if run.task == "text2image"]
    assert {run.final for run in runs} <= archived
    assert len(archived) == 2 * len(runs)  # with the snapshots
    merged = Pipeline(replicates_study(), tmp_path / "out")
    merge(merged.out, [tmp_path / "archive"])
    assert all(size["points_to_make"] == 0 for size in plan(merged)["sizes"])


def test_the_plan_counts_them(finished: Pipeline, tmp_path: Path) -> None:
    two_widths = replicates_study(family={"widths": [4, 8]}, seed_replicates={"seeds": [1, 2], "widths": [8]})
    sizes = plan(Pipeline(two_widths, tmp_path))["sizes"]
    assert [(size["task"], size["size"], size["images_to_train"]) for size in sizes] == [
        ("text2image", "0.3M", 64),
        ("text2image", "0.8M", 64),
        ("seed-replicates", "0.8M seed 1", 64),
        ("seed-replicates", "0.8M seed 2", 64),
    ]
    assert all(size["points_to_make"] == 0 for size in plan(finished)["sizes"])
    assert {size["task"] for size in plan(finished, ("seed-replicates",))["sizes"]} == {"seed-replicates"}
    more = replicates_study(family={"widths": [4, 8]}, seed_replicates={"seeds": [1, 2, 3]})
    to_train = [size["size"] for size in plan(Pipeline(more, finished.out))["sizes"] if size["images_to_train"]]
    assert to_train == ["0.3M", "0.3M seed 1", "0.3M seed 2", "0.3M seed 3", "0.8M seed 3"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [0, 1]}, r"seed_replicates.seeds: 0 is train\.seed"),
        ({"seeds": [1, 1]}, "give at least one seed, and each seed once"),
        ({"seeds": [1], "widths": [12]}, r"seed_replicates.widths: 12 is not in family\.widths"),
    ],
)
def test_errors_are_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_study(seed_replicates=change)


def test_a_study_of_pretrained_checkpoints_has_no_seed_replicates() -> None:
    plain = {key: value for key, value in plain_study().items() if key not in ("autoencoder", "family", "train", "text")}
    data = {"resolution": 32, "reference": plain["data"]["reference"]}
    with pytest.raises(ConfigError, match="seed_replicates: a study of pretrained checkpoints does not use it"):
        tiny_study(
            **plain
            | {"data": data, "checkpoints": ["a"], "seed_replicates": {"seeds": [1]}}
            | dict.fromkeys(("autoencoder", "family", "train"))
        )


def rows_of(first: float, second: float, sizes: tuple[str, str] = ("1M", "2M")) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two rows of the table with these scores."""
    return {"size": sizes[0], KERNEL: first}, {"size": sizes[1], KERNEL: second}


def test_a_wide_margin_does_not_explain_every_difference() -> None:
    spread = TrainingSpread(relative_std=0.18, low=0.09, high=1.1, degrees_of_freedom=2, sizes=("1M", "2M"))
    seed_variance, factor = SeedVariance({}, spread), math.exp(spread.margin)
    assert 2.9 < factor < 3.1
    assert seed_variance.explains(*rows_of(1.0, 0.99 * factor), KERNEL)
    assert seed_variance.explains(*rows_of(0.99 * factor, 1.0), KERNEL)
    assert not seed_variance.explains(*rows_of(1.0, 1.01 * factor), KERNEL)
    assert not seed_variance.explains(*rows_of(1.01 * factor, 1.0), KERNEL)
    assert seed_variance.explains(*rows_of(0.0, 0.01), KERNEL), "around 0 the margin is a fraction of the larger score"
    assert str(spread).endswith(f"explains a factor of up to {factor:.3g}")


def test_each_size_has_its_own_variance_and_sizes_trained_once_the_pooled_one() -> None:
    spreads, sizes = {"0.2M": 0.2, "3.2M": 0.02}, ("0.2M", "3.2M")
    tables = [trained_again(spread, 3, (size,), 4) for size, spread in spreads.items()]
    seed_variance = estimate_seed_variance(pd.concat(tables, ignore_index=True), KERNEL)
    assert list(seed_variance.by_size) == ["0.2M", "3.2M"]
    small, large = seed_variance.spread_of("0.2M seed 1").relative_std, seed_variance.spread_of("3.2M").relative_std
    assert small > 3 * large
    assert seed_variance.spread_of("12.6M") is seed_variance.pooled
    assert large < seed_variance.pooled.relative_std < small
    assert seed_variance.spread_of("0.2M seed 1") is seed_variance.spread_of("0.2M")
    assert not seed_variance.explains(*rows_of(1.0, 1.25, ("3.2M", "3.2M seed 1")), KERNEL)
    assert seed_variance.explains(*rows_of(1.0, 1.25, sizes), KERNEL)
    assert str(seed_variance).count("explains a factor of up to") == 3
    assert "pooled, for sizes trained once" in str(seed_variance)


@pytest.mark.slow
@pytest.mark.parametrize("spreads", [(0.2, 0.02), (0.05, 0.05)])
def test_margins_between_two_sizes_cover_the_differences(spreads: tuple[float, float]) -> None:
    generator, explained = np.random.default_rng(5), []
    for seed in range(200):
        trainings = zip((2 * seed, 2 * seed + 1), ("0.2M", "3.2M"), spreads, strict=True)
        tables = [trained_again(spread, number, (size,), 3) for number, size, spread in trainings]
        seed_variance = estimate_seed_variance(pd.concat(tables, ignore_index=True), KERNEL)
        first, second = np.exp(spreads * generator.standard_normal(2))
        explained.append(seed_variance.explains(*rows_of(first, second, ("0.2M", "3.2M")), KERNEL))
    assert 0.91 <= np.mean(explained) <= 0.99


@pytest.mark.slow
def test_a_checkpoint_of_a_replicate_serves_as_the_own_training_of_another_study(
    finished_study: Path, tmp_path: Path, isocost: Any
) -> None:
    """Its rows have the task and the size of the study that uses it, in the report and in the database."""
    other = finished_spec(train={**BASE["train"], "seed": 1})
    out, file = tmp_path / "out", tmp_path / "study.yaml"
    file.write_text(dump_study(other))
    assert isocost("merge", "--artefacts", out, finished_study / "complete").status == 0
    checkpoints = {run.final for run in Pipeline(other, out).runs}
    assert {read_info(out / "artefacts" / "checkpoint" / name).task for name in checkpoints} == {"seed-replicates"}
    outcome = isocost("run", file, "--out", out, "--no-figures")
    assert outcome.status == 0, outcome.line
    assert outcome.answer["num_points"] == 5
    assert not list((out / "artefacts").glob("run/*"))  # nothing was trained
    table = Pipeline(other, out).results_db.table()
    assert (set(table["task"]), set(table["size"].str.contains("seed"))) == ({"text2image"}, {False})
    with ResultsDB(out / "results.sqlite") as database, Session(database.engine) as session, session.begin():
        session.execute(update(PointRecord).values(task="seed-replicates", size="0.3M seed 1"))
    assert isocost("report", file, "--out", out, "--no-figures").answer["num_points"] == 5
    assert set(pd.read_parquet(out / "table.parquet")["task"]) == {"text2image"}
