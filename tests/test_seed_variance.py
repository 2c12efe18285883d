"""Sizes trained again: the spread between trainings on planted tables, what it does to verdicts, a study the whole way."""

from __future__ import annotations

import math
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from conftest import plain_study, tiny_study
from isocost.analysis.claims import TaskResults, evaluate_claims, with_seed_variance
from isocost.analysis.paper_claims import FINDINGS
from isocost.analysis.seed_variance import SeedVariance, TrainingSpread, estimate_seed_variance, side_by_side, training_of
from isocost.errors import ConfigError
from isocost.models.checkpoint import load_checkpoint
from isocost.pipeline.dry_run import plan
from isocost.pipeline.merge import archive, merge
from isocost.pipeline.pipeline import Pipeline
from isocost.report.build import report
from isocost.report.report_data import redraw
from synthetic_results import planted_table

KERNEL = "mmd_efficientnet"
ENDS = ("", "_low", "_high")
STUDY: dict[str, Any] = {
    "family": {"widths": [4, 8]},
    "train": {"num_images": 64, "batch_size": 16, "lr": 1e-3, "snapshots": [32]},
    "seed_replicates": {"seeds": [1, 2], "widths": [8]},
}


_planted = lru_cache(lambda sizes: planted_table(sizes=sizes, guidance=(1.0, 2.0), snapshots=()))


def trained_again(spread: float, seed: int = 0, sizes: tuple[str, ...] = ("0.2M", "0.8M"), num_seeds: int = 2) -> pd.DataFrame:
    """A table with trainings whose scores are all off by one factor each, of that standard deviation."""
    generator = np.random.default_rng(seed)
    table = _planted(sizes)
    parts = []
    for number in range(num_seeds):
        factors = table["size"].map({size: math.exp(spread * generator.standard_normal()) for size in sizes})
        scores = {f"{KERNEL}{end}": table[f"{KERNEL}{end}"] * factors for end in ENDS}
        names = table["size"] if number == 0 else table["size"] + f" seed {number}"
        parts.append(table.assign(**scores, size=names, point=table["point"] + str(number)))
    return pd.concat(parts, ignore_index=True)


# --- the spread ---


def test_a_name_tells_size_and_training() -> None:
    assert training_of("2.6M seed 1") == ("2.6M", "seed 1")
    assert training_of("2.6M") == ("2.6M", "")
    assert training_of("2.6M consistency") == ("2.6M consistency", "")


@pytest.mark.parametrize(("sizes", "num_seeds", "degrees"), [(("0.2M", "0.8M"), 2, 2), (("0.8M",), 4, 3)])
def test_intervals_cover_the_planted_spread_and_margins_what_luck_does(
    sizes: tuple[str, ...], num_seeds: int, degrees: int
) -> None:
    spreads = [estimate_seed_variance(trained_again(0.05, seed, sizes, num_seeds), KERNEL).together for seed in range(200)]
    assert {one.degrees for one in spreads} == {degrees}
    assert {one.sizes for one in spreads} == {sizes}
    assert 0.90 <= np.mean([one.low <= 0.05 <= one.high for one in spreads]) <= 0.99
    assert np.mean([one.share**2 for one in spreads]) == pytest.approx(0.05**2, rel=0.25)
    seed_variance = 0.05 * np.random.default_rng(1).standard_normal((len(spreads), 2))
    assert 0.91 <= np.mean(np.abs(seed_variance[:, 0] - seed_variance[:, 1]) <= [one.margin for one in spreads]) <= 0.99


def test_settings_that_one_training_lacks_do_not_count() -> None:
    table = trained_again(0.05)
    difference_between = table[~((table["size"] == "0.8M seed 1") & (table["num_steps"] == 2))]
    assert estimate_seed_variance(difference_between, KERNEL).together.share == pytest.approx(
        estimate_seed_variance(table, KERNEL).together.share
    )
    assert len(side_by_side(table, KERNEL)["0.8M"]) == len(side_by_side(difference_between, KERNEL)["0.8M"]) + 2  # solvers
    with pytest.raises(ConfigError, match=r"seed_replicates.seeds"):
        estimate_seed_variance(planted_table(), KERNEL)


# --- verdicts ---


def verdicts(spread: float | None) -> dict[str, str]:
    tables = {"text2image": TaskResults(planted_table(sizes=("0.2M", "0.8M", "3.2M")), KERNEL)}
    if spread is not None:
        tables["seed-replicates"] = TaskResults(trained_again(spread), KERNEL)
    return {one.statement: one.verdict for one in evaluate_claims(FINDINGS, with_seed_variance(tables)) if not one.cost}


def test_sizes_have_to_differ_by_more_than_luck() -> None:
    larger, longer = (
        "Of sizes trained on the same images the larger is better",
        "More training gives better images, at every size",
    )
    assert verdicts(None)[larger] == verdicts(0.001)[larger] == "holds"
    lucky = verdicts(0.5)
    assert lucky[larger] == "undecided"
    assert lucky["With any sampling cost allowed the largest size is the best"] == "undecided"
    assert lucky[longer] == verdicts(None)[longer] == "holds"  # one training, which its seed does not set apart from itself


# --- a study ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    pipeline = Pipeline(tiny_study(**STUDY), tmp_path_factory.mktemp("seed-replicates") / "out")
    assert pipeline.run()
    report(pipeline)
    return pipeline


def test_further_trainings_differ_by_their_seed_alone(finished: Pipeline) -> None:
    first, *again = [run for run in finished.runs if run.model.width == 8]
    assert [run.title for run in again] == ["seed-replicates width 8 seed 1", "seed-replicates width 8 seed 2"]
    other = Pipeline(
        tiny_study(**{**STUDY, "train": {**STUDY["train"], "seed": 1}, "seed_replicates": None}), finished.out / "other"
    )
    assert [run.digest for run in other.runs if run.model.width == 8] == [again[0].digest]
    weights = [load_checkpoint(finished.store.folder("checkpoint", run.final)).network.state_dict() for run in (first, *again)]
    assert not any(weights[0]["conv_in.weight"].equal(one["conv_in.weight"]) for one in weights[1:])


def test_they_have_a_table_and_a_page_of_their_own(finished: Pipeline) -> None:
    table = pd.read_parquet(finished.out / "table-seed-replicates.parquet")
    assert set(table["size"]) == {"0.8M", "0.8M seed 1", "0.8M seed 2"}
    by_size = table[table["is_final"]].groupby("size").size()
    assert set(by_size) == {4 + 1 - 1}  # the grid, which the mark's setting is part of
    assert set(pd.read_parquet(finished.out / "table.parquet")["size"]) == {"0.3M", "0.8M"}
    page = (finished.out / "report" / "seed-replicates" / "index.html").read_text()
    assert "scores of one setting spread between trainings" in page
    told = (finished.out / "report" / "claims.md").read_text()
    assert re.search(r"between trainings: 0\.8M [\d.e-]+ % .* by 2 more trainings, luck up to", told)
    before = (finished.out / "report" / "index.html").read_bytes()
    redraw(finished.out)
    assert (finished.out / "report" / "index.html").read_bytes() == before


def test_their_checkpoints_can_be_left_behind(finished: Pipeline, tmp_path: Path) -> None:
    archive(finished.out, tmp_path / "kept", tasks=("text2image",))
    kept = {folder.name for folder in (tmp_path / "kept" / "artefacts" / "checkpoint").iterdir()}
    own = [run for run in finished.runs if run.task == "text2image"]
    assert {run.final for run in own} <= kept
    assert len(kept) == 2 * len(own)  # the marks too
    again = Pipeline(tiny_study(**STUDY), tmp_path / "out")
    merge(again.out, [tmp_path / "kept"])
    assert all(size["points_to_make"] == 0 for size in plan(again)["sizes"])


def test_the_plan_counts_them(finished: Pipeline, tmp_path: Path) -> None:
    sizes = plan(Pipeline(tiny_study(**STUDY), tmp_path))["sizes"]
    assert [(one["task"], one["size"], one["images_to_train"]) for one in sizes if one["width"] == 8] == [
        ("text2image", "0.8M", 64),
        ("seed-replicates", "0.8M seed 1", 64),
        ("seed-replicates", "0.8M seed 2", 64),
    ]
    assert all(size["points_to_make"] == 0 for size in plan(finished)["sizes"])
    assert {size["task"] for size in plan(finished, ("seed-replicates",))["sizes"]} == {"seed-replicates"}
    more = tiny_study(**{**STUDY, "seed_replicates": {"seeds": [1, 2, 3]}})
    wanted = [one["size"] for one in plan(Pipeline(more, finished.out))["sizes"] if one["images_to_train"]]
    assert wanted == ["0.3M seed 1", "0.3M seed 2", "0.3M seed 3", "0.8M seed 3"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seeds": [0, 1]}, r"seed_replicates.seeds: 0 is train\.seed"),
        ({"seeds": [1, 1]}, "seeds must be given, each once"),
        ({"seeds": [1], "widths": [12]}, r"seed_replicates.widths: 12 is not in family\.widths"),
    ],
)
def test_mistakes_are_one_line(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        tiny_study(seed_replicates=change)


def test_a_study_of_given_checkpoints_has_no_repeats() -> None:
    plain = {key: value for key, value in plain_study().items() if key not in ("autoencoder", "family", "train", "text")}
    data = {"resolution": 32, "reference": plain["data"]["reference"]}
    with pytest.raises(ConfigError, match="seed_replicates: has no place beside checkpoints"):
        tiny_study(
            **plain
            | {"data": data, "checkpoints": ["a"], "seed_replicates": {"seeds": [1]}}
            | dict.fromkeys(("autoencoder", "family", "train"))
        )


def rows_of(one: float, other: float, sizes: tuple[str, str] = ("1M", "2M")) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two rows of the table with these scores."""
    return {"size": sizes[0], KERNEL: one}, {"size": sizes[1], KERNEL: other}


def test_a_wide_margin_still_leaves_scores_that_are_far_apart() -> None:
    spread = TrainingSpread(share=0.18, low=0.09, high=1.1, degrees=2, sizes=("1M", "2M"))
    seed_variance, times = SeedVariance({}, spread), math.exp(spread.margin)
    assert 2.9 < times < 3.1
    assert seed_variance.explains(*rows_of(1.0, 0.99 * times), KERNEL)
    assert seed_variance.explains(*rows_of(0.99 * times, 1.0), KERNEL)
    assert not seed_variance.explains(*rows_of(1.0, 1.01 * times), KERNEL)
    assert not seed_variance.explains(*rows_of(1.01 * times, 1.0), KERNEL)
    assert seed_variance.explains(*rows_of(0.0, 0.01), KERNEL), "around 0 a share of the larger one"
    assert f"luck up to {times:.3g} times" in str(spread)


def test_each_size_has_its_own_luck_and_one_trained_once_that_of_all() -> None:
    spreads, sizes = {"0.2M": 0.2, "3.2M": 0.02}, ("0.2M", "3.2M")
    tables = [trained_again(spread, 3, (size,), 4) for size, spread in spreads.items()]
    seed_variance = estimate_seed_variance(pd.concat(tables, ignore_index=True), KERNEL)
    assert list(seed_variance.by_size) == ["0.2M", "3.2M"]
    assert seed_variance.of("0.2M seed 1").share > 3 * seed_variance.of("3.2M").share
    assert seed_variance.of("12.6M") is seed_variance.together
    assert seed_variance.of("3.2M").share < seed_variance.together.share < seed_variance.of("0.2M").share
    assert not seed_variance.explains(*rows_of(1.0, 1.25, ("3.2M", "3.2M seed 1")), KERNEL)
    assert seed_variance.explains(*rows_of(1.0, 1.25, sizes), KERNEL)
    assert str(seed_variance).count("luck up to") == 3
    assert "taken for sizes trained once" in str(seed_variance)


@pytest.mark.parametrize("spreads", [(0.2, 0.02), (0.05, 0.05)])
def test_margins_between_two_sizes_hold_what_luck_does(spreads: tuple[float, float]) -> None:
    generator, held = np.random.default_rng(5), []
    for seed in range(300):
        planted = zip((2 * seed, 2 * seed + 1), ("0.2M", "3.2M"), spreads, strict=True)
        tables = [trained_again(spread, number, (size,), 3) for number, size, spread in planted]
        seed_variance = estimate_seed_variance(pd.concat(tables, ignore_index=True), KERNEL)
        one, other = np.exp(spreads * generator.standard_normal(2))
        held.append(seed_variance.explains(*rows_of(one, other, ("0.2M", "3.2M")), KERNEL))
    assert 0.91 <= np.mean(held) <= 0.99
