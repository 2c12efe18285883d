"""Studies compared at equal cost: leaders by definition, planted leads, mistakes, and paired differences across folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from finished_study import BASE, finished_spec
from isocost.analysis.costs import COSTS
from isocost.analysis.study_comparison import concat_studies, headline, rankings
from isocost.config.study_yaml import load_study
from isocost.errors import ConfigError
from isocost.evaluation.feature_store import read_sample_features
from isocost.evaluation.paired import paired_differences
from isocost.pipeline.compare import compare
from isocost.pipeline.merge import archive
from isocost.pipeline.pipeline import Pipeline
from isocost.report.build import report
from isocost.report.study_comparison import markdown_comparison, write_comparison
from synthetic_results import measured, synthetic_table

KERNEL = "mmd_efficientnet"


class Unpaired:
    def difference(self, first: str, second: str, metric: str) -> None:
        return None


def two(ahead: float, half_width: float = 0.004, **changes: object) -> pd.DataFrame:
    """Studies "a" and "b" with the same points; the distances of b are smaller by `ahead`."""
    first = synthetic_table(half_width=half_width)
    ends = {name: first[name] - ahead for name in (KERNEL, f"{KERNEL}_low", f"{KERNEL}_high")}
    return concat_studies({"a": first, "b": first.assign(**ends, **changes)}, KERNEL)


@pytest.mark.parametrize("cost", COSTS)
def test_the_leader_has_the_best_point_within_the_budget(cost: str) -> None:
    table = concat_studies({"a": measured(synthetic_table(), 0.02, 1), "b": measured(synthetic_table(), 0.02, 2)}, KERNEL)
    ranked = rankings(table, KERNEL, cost, Unpaired())
    assert len(ranked) == 6
    for ranking in ranked:
        within = table[table[cost] <= ranking.budget * (1 + 1e-9)]
        best = within.loc[within.groupby("study")[KERNEL].idxmin()].set_index("study")[KERNEL]
        assert ranking.leader == best.idxmin()
        (against,) = ranking.against
        assert against.difference == pytest.approx(best.min() - best.max())


def test_a_planted_lead_is_found_and_decided_at_every_budget() -> None:
    ranked = rankings(two(0.05), KERNEL, "gflop", Unpaired())
    assert all(ranking.leader == "b" and ranking.is_decided for ranking in ranked)
    assert all(ranking.against[0].difference == pytest.approx(-0.05) for ranking in ranked)
    assert headline(ranked) == "b leads at 6 of 6 budgets, decided at 6."


def test_a_lead_within_the_noise_is_not_decided() -> None:
    ranked = rankings(two(0.001), KERNEL, "gflop", Unpaired())
    assert headline(ranked) == "b leads at 6 of 6 budgets, decided at 0."


@pytest.mark.slow
def test_equal_studies_are_seldom_decided() -> None:
    decided = 0
    for seed in range(40):
        tables = {name: measured(synthetic_table(snapshots=()), 0.02, 2 * seed + at) for at, name in enumerate("ab")}
        ranked = rankings(concat_studies(tables, KERNEL), KERNEL, "gflop", Unpaired())
        decided += sum(ranking.is_decided for ranking in ranked)
    assert decided / (40 * 6) < 0.1


def test_where_higher_is_better_the_higher_leads() -> None:
    first = synthetic_table()
    ends = {name: first[name] + 0.2 for name in ("alignment", "alignment_low", "alignment_high")}
    ranked = rankings(concat_studies({"a": first, "b": first.assign(**ends)}, "alignment"), "alignment", "nfe", Unpaired())
    assert all(ranking.leader == "b" and ranking.is_decided for ranking in ranked)
    assert all(ranking.against[0].difference == pytest.approx(0.2) for ranking in ranked)


def test_without_intervals_nothing_is_decided() -> None:
    blind = {f"{KERNEL}_{end}": np.nan for end in ("low", "high")}
    ranked = rankings(two(0.05).assign(**blind), KERNEL, "gflop", Unpaired())
    assert all(ranking.leader == "b" and not ranking.is_decided for ranking in ranked)


def test_a_budget_that_only_one_study_fits_is_uncontested() -> None:
    dear = synthetic_table(sizes=("7.1M", "12.6M"))
    table = concat_studies({"small": synthetic_table(sizes=("0.2M", "0.8M")), "large": dear}, KERNEL)
    (first, last) = rankings(table, KERNEL, "gflop", Unpaired(), [1.0, 1000.0])
    assert (first.leader, first.is_contested, set(first.scores)) == ("small", False, {"small"})
    assert (last.leader, last.is_contested) == ("large", True)
    assert headline([first]) == "no budget has points of two studies."
    assert "| only small fits |" in markdown_comparison(table, [first, last])
    assert "no other study fits" in str(first)


def test_three_studies_have_a_leader_that_must_beat_both() -> None:
    first = synthetic_table()
    ends = (KERNEL, f"{KERNEL}_low", f"{KERNEL}_high")
    others = {
        name: first.assign(**{end: first[end] - ahead for end in ends}) for name, ahead in (("near", 0.049), ("far", 0.05))
    }
    table = concat_studies({"a": first, **others}, KERNEL)
    ranked = rankings(table, KERNEL, "gflop", Unpaired())
    assert all(ranking.leader == "far" and not ranking.is_decided for ranking in ranked)
    assert [comparison.other for comparison in ranked[0].against] == ["near", "a"]
    assert [comparison.verdict for comparison in ranked[0].against] == ["undecided", "better"]


def test_sizes_of_one_name_are_named_with_their_study() -> None:
    table = concat_studies({"a": synthetic_table(sizes=("0.2M", "0.8M")), "b": synthetic_table(sizes=("0.8M", "3.2M"))}, KERNEL)
    assert set(table["size"]) == {"0.2M", "0.8M (a)", "0.8M (b)", "3.2M"}


def test_incomparable_studies_are_refused_in_one_line() -> None:
    table = synthetic_table()
    with pytest.raises(ConfigError, match="give two output folders"):
        concat_studies({"a": table}, KERNEL)
    with pytest.raises(ConfigError, match="differ in protocol"):
        concat_studies({"a": table, "b": table.assign(protocol="other")}, KERNEL)
    with pytest.raises(ConfigError, match="b has no point with ms_per_image"):
        rankings(
            concat_studies({"a": table, "b": table.assign(ms_per_image=np.nan)}, KERNEL), KERNEL, "ms_per_image", Unpaired()
        )
    earlier = concat_studies({"a": table, "b": table.assign(gflop=np.nan)}, KERNEL)
    with pytest.raises(ConfigError, match=r"b has no point with a known gflop; .*compare by --cost gflop_denoiser"):
        rankings(earlier, KERNEL, "gflop", Unpaired())
    with pytest.raises(ConfigError, match="the unit of normalized cost differs between these studies"):
        rankings(two(0.05, normalized_cost=table["normalized_cost"] * 2), KERNEL, "normalized_cost", Unpaired())
    with pytest.raises(ConfigError, match="below every point"):
        rankings(two(0.05), KERNEL, "gflop", Unpaired(), [1e-9])
    with pytest.raises(ConfigError, match="no cost is called"):
        rankings(two(0.05), KERNEL, "dollars", Unpaired())


def test_the_comparison_is_written_as_markdown_and_a_figure(tmp_path: Path) -> None:
    table = two(0.05)
    ranked = rankings(table, KERNEL, "gflop", Unpaired())
    files = write_comparison(tmp_path / "new", table, ranked)
    assert all(file.stat().st_size > 500 for file in files)
    text = files[0].read_text()
    assert text.startswith("**a and b**: b leads at 6 of 6 budgets, decided at 6.")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 7
    assert all(row.endswith("| b, decided |") and "(not paired)" in row for row in rows[1:])


# --- output folders ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(family_copy: Path) -> tuple[Path, Path]:
    """Two finished studies under one protocol, each with one size."""
    second = Pipeline(
        finished_spec(train={**BASE["train"], "lr": 1e-4, "snapshots": []}, name="second"), family_copy.parent / "second"
    )
    assert second.run()
    report(second, figure_formats=())
    first = family_copy.rename(family_copy.parent / "tiny")
    return first, second.out


@pytest.mark.slow
def test_differences_are_paired_across_folders(folders: tuple[Path, Path]) -> None:
    compared = compare(folders, cost="nfe", budgets=[4])
    (ranking,) = compared.rankings
    (against,) = ranking.against
    assert against.is_paired
    points = {
        row["study"]: row["point"] for row in compared.table.sort_values(KERNEL).drop_duplicates("study").to_dict("records")
    }
    pipelines = {folder.name: Pipeline(load_study(folder / "study.yaml"), folder) for folder in folders}
    reference = pipelines[ranking.leader].assets.reference
    ours, theirs = (
        read_sample_features(pipelines[study].store.open("point", points[study]), tuple(reference.extractors))
        for study in (ranking.leader, against.other)
    )
    expected = paired_differences(ours, theirs, reference, ("mmd",))[KERNEL]
    found = (against.difference, against.low, against.high)
    assert found == pytest.approx((expected.value, expected.low, expected.high), rel=1e-5)


@pytest.mark.slow
def test_archives_have_the_same_paired_differences(folders: tuple[Path, Path], tmp_path: Path) -> None:
    archives = [tmp_path / folder.name for folder in folders]
    for folder, target in zip(folders, archives, strict=True):
        archive(folder, target)
        assert not (target / "point").exists()
    rankings_before, rankings_after = (compare(paths, cost="nfe", budgets=[4]).rankings for paths in (folders, archives))
    assert rankings_after == rankings_before
    assert rankings_after[0].against[0].is_paired


@pytest.mark.slow
def test_the_command_prints_sentences_and_json(folders: tuple[Path, Path], isocost: Any, tmp_path: Path) -> None:
    outcome = isocost("compare", *folders, "--budget", "0.5", "--out", tmp_path)
    assert outcome.status == 0, outcome.err
    assert outcome.answer["answer"] in outcome.err
    assert set(outcome.answer["rankings"][0]["scores"]) == {"tiny", "second"}
    assert all(Path(file).is_file() for file in outcome.answer["files"])


@pytest.mark.slow
def test_studies_of_one_name_are_named_by_their_folders(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for folder in folders:
        (tmp_path / folder.name).mkdir()
        plain = yaml.safe_load((folder / "study.yaml").read_text())
        (tmp_path / folder.name / "study.yaml").write_text(yaml.safe_dump({**plain, "name": "twin"}))
        (tmp_path / folder.name / "table.parquet").write_bytes((folder / "table.parquet").read_bytes())
    compared = compare([tmp_path / folder.name for folder in folders])
    assert set(compared.table["study"]) == {"tiny", "second"}
    assert not compared.rankings[0].against[0].is_paired


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("tiny",), "a comparison needs at least two studies"),
        (("tiny", "tiny"), "given twice"),
        (("tiny", "absent"), "no study.yaml"),
    ],
)
@pytest.mark.slow
def test_the_command_refuses_in_one_line(
    folders: tuple[Path, Path],
    isocost: Any,
    names: tuple[str, ...],
    message: str,
) -> None:
    outcome = isocost("compare", *(folders[0].parent / name for name in names))
    assert outcome.status == 2
    assert message in outcome.line
