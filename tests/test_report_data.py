"""A page drawn again from what it was drawn from: the same bytes, elsewhere, with neither data nor checkpoints."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from conftest import tiny_study
from isocost.analysis.results_table import REPORT_DATA
from isocost.cli import app
from isocost.errors import ConfigError
from isocost.pipeline.merge import archive, merge
from isocost.pipeline.pipeline import Pipeline
from isocost.report.build import report
from isocost.report.report_data import _read_strip, _write_strip, redraw
from isocost.sweep.results_db import ResultsDB

REFERENCE = Path(__file__).resolve().parents[1] / "docs" / "reference"
PARTS = sorted(file.parent for file in REFERENCE.glob("*/study.yaml"))
"""Studies that stand beside it: the grid, emoji."""


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    pipeline = Pipeline(tiny_study(family={"widths": [8]}), tmp_path_factory.mktemp("reported") / "out")
    assert pipeline.run()
    report(pipeline)
    return pipeline


def pages_of(out: Path) -> dict[str, bytes]:
    """Every file of the report by its path."""
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted((out / "report").rglob("*")) if file.is_file()}


def test_what_is_kept_gives_the_same_pages_byte_by_byte(reported: Pipeline, tmp_path: Path) -> None:
    archive(reported.out, tmp_path / "kept")
    assert not (tmp_path / "kept" / "report").exists()
    shutil.rmtree(tmp_path / "kept" / "artefacts")
    (tmp_path / "kept" / "results.sqlite").unlink()
    again = redraw(tmp_path / "kept")
    drawn = pages_of(tmp_path / "kept")
    assert {"report/index.html", "report/summary.md"} < set(drawn)
    assert sum(name.endswith(".png") for name in drawn) >= 5
    assert drawn == pages_of(reported.out)
    assert b"data:image" in drawn["report/index.html"]
    assert again.summary == (reported.out / "report" / "summary.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_changed_number_changes_the_page(reported: Pipeline, tmp_path: Path) -> None:
    archive(reported.out, tmp_path / "kept")
    file = tmp_path / "kept" / "table.parquet"
    table = pd.read_parquet(file)
    table.assign(mmd_efficientnet=table["mmd_efficientnet"] + 1).to_parquet(file, index=False)
    redraw(tmp_path / "kept")
    assert pages_of(tmp_path / "kept")["report/index.html"] != pages_of(reported.out)["report/index.html"]


@pytest.mark.slow
def test_merged_elsewhere_it_still_shows_its_images(reported: Pipeline, tmp_path: Path) -> None:
    archive(reported.out, tmp_path / "kept")
    merge(tmp_path / "out", [tmp_path / "kept"])
    pipeline = Pipeline(reported.study, tmp_path / "out")
    assert pipeline.run()
    report(pipeline)
    shown, before = (sorted((out / REPORT_DATA).rglob("*.png")) for out in (tmp_path / "out", reported.out))
    assert [file.name for file in shown] == [file.name for file in before]
    assert len(shown) >= 2
    assert shown[0].read_bytes() == before[0].read_bytes()


def test_the_command_draws_a_folder_again(reported: Pipeline, tmp_path: Path) -> None:
    archive(reported.out, tmp_path / "kept")
    done = CliRunner().invoke(app, ["report", str(tmp_path / "kept")])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["num_points"] == len(reported.results_db.table())
    assert pages_of(tmp_path / "kept") == pages_of(reported.out)


def test_bad_folders_are_one_line(reported: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leaves it"):
        redraw(tmp_path)
    archive(reported.out, tmp_path / "kept")
    page = tmp_path / "kept" / REPORT_DATA / "text2image" / "page.json"
    page.write_text(page.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    with pytest.raises(ConfigError, match="damaged"):
        redraw(tmp_path / "kept")
    (tmp_path / "kept" / "table.parquet").unlink()
    with pytest.raises(ConfigError, match=r"no table\.parquet|damaged"):
        redraw(tmp_path / "kept")


def test_the_reference_study_is_drawn_again_from_its_table(tmp_path: Path) -> None:
    left_out = shutil.ignore_patterns("artefacts", "report", *(part.name for part in PARTS))
    shutil.copytree(REFERENCE, tmp_path / "reference", ignore=left_out)
    redraw(tmp_path / "reference")
    drawn, told = pages_of(tmp_path / "reference"), pages_of(REFERENCE)
    assert kept_in_the_repository(drawn) == kept_in_the_repository(told)
    texts = [name for name in told if name.endswith((".html", ".md"))]
    assert {"report/index.html", "report/summary.md", "report/claims.md", "report/distill/summary.md"} <= set(texts)
    for name in texts:
        assert drawn[name] == told[name], f"{name}: make reference-report, and look at what changed"
    assert len(told["report/index.html"]) < 15e6
    assert (REFERENCE / "table.parquet").stat().st_size < 5e6


def kept_in_the_repository(pages: dict[str, bytes]) -> set[str]:
    """Names of files; the pages of the other tasks and their figures are drawn by `make reference-report` alone."""
    return {name for name in pages if not fnmatch(name, "report/*/index.html") and not fnmatch(name, "report/*/figures/*")}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_its_parts_are_drawn_again_from_their_tables(part: Path, tmp_path: Path) -> None:
    shutil.copytree(part, tmp_path / "part", ignore=shutil.ignore_patterns("artefacts", "report"))
    redraw(tmp_path / "part")
    drawn, told = pages_of(tmp_path / "part"), pages_of(part)
    texts = [name for name in told if name.endswith(".md")]
    assert "report/summary.md" in texts
    for name in texts:
        assert drawn[name] == told[name], f"{name}: make reference-report, and look at what changed"


@pytest.mark.parametrize("part", [REFERENCE, *PARTS], ids=lambda part: part.name)
def test_every_point_of_the_reference_study_is_a_row_of_its_ledger(part: Path, tmp_path: Path) -> None:
    shutil.copy(part / "results.sqlite", tmp_path)
    known = ResultsDB(tmp_path / "results.sqlite").table().set_index("point")
    table = pd.read_parquet(part / "table.parquet").set_index("point")
    assert set(table.index) <= set(known.index)
    scores = [name for name in ("mmd_efficientnet", "mmd_efficientnet_low", "alignment") if name in table.columns]
    for column in (*scores, "guidance", "gflop", "num_images"):
        pd.testing.assert_series_equal(table[column], known.loc[table.index, column])


@pytest.mark.parametrize("channels", ["grey", "colour"])
def test_strips_keep_every_bit(channels: str, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    if channels == "grey":
        images = np.repeat(images[..., :1], 3, axis=-1)
    _write_strip(tmp_path / "strip.png", images)
    assert np.array_equal(_read_strip(tmp_path / "strip.png"), images)
