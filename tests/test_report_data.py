"""Pages rebuilt from the report data are equal byte by byte, in another folder and without data or checkpoints."""

from __future__ import annotations

import errno
import json
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from finished_study import finished_spec
from isocost.analysis.results_table import REPORT_DATA
from isocost.cli import app
from isocost.config.study_yaml import load_study
from isocost.errors import ConfigError
from isocost.pipeline.dry_run import plan
from isocost.pipeline.merge import archive, merge
from isocost.pipeline.pipeline import Pipeline
from isocost.report import report_data
from isocost.report.build import report
from isocost.report.report_data import read_image_row, rebuild, write_image_row
from isocost.sweep.results_db import ResultsDB

ROOT = Path(__file__).resolve().parents[1]
TOOL = runpy.run_path(str(ROOT / "tools" / "page_digests.py"))
REFERENCE, STUDIES = TOOL["REFERENCE"], TOOL["STUDIES"]
"""The reference study; with the studies inside its folder: emoji for two families, the grid of guidance."""


@pytest.fixture(scope="module")
def reported(family_copy: Path) -> Pipeline:
    pipeline = Pipeline(finished_spec(), family_copy)
    report(pipeline)
    return pipeline


def report_files(out: Path) -> dict[str, bytes]:
    """Return the content of every file of the report by its path."""
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted((out / "report").rglob("*")) if file.is_file()}


@pytest.mark.slow
def test_an_archive_gives_the_same_pages_byte_by_byte(reported: Pipeline, tmp_path: Path) -> None:
    archive(reported.out, tmp_path / "archive")
    assert not (tmp_path / "archive" / "report").exists()
    shutil.rmtree(tmp_path / "archive" / "artefacts")
    (tmp_path / "archive" / "results.sqlite").unlink()
    rebuilt = rebuild(tmp_path / "archive")
    files = report_files(tmp_path / "archive")
    assert {"report/index.html", "report/summary.md"} < set(files)
    assert sum(name.endswith(".png") for name in files) >= 5
    assert files == report_files(reported.out)
    assert b"data:image" in files["report/index.html"]
    assert rebuilt.summary == (reported.out / "report" / "summary.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_full_disk_loses_neither_images_nor_tables(
    reported: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a merged folder the images of the points are only in the report data."""
    archive(reported.out, tmp_path / "archive")
    merge(tmp_path / "out", [tmp_path / "archive"])
    pipeline = Pipeline(finished_spec(), tmp_path / "out")
    kept = [tmp_path / "out" / REPORT_DATA / "text2image", tmp_path / "out" / "table.parquet"]
    before = {file: file.read_bytes() for path in kept for file in [path, *path.rglob("*")] if file.is_file()}
    assert {file.suffix for file in before} == {".json", ".webp", ".parquet", ".safetensors"}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writers = [(pd.DataFrame, "to_parquet"), (pd.DataFrame, "to_csv"), (shutil, "copyfile"), (report_data, "write_atomically")]
    for owner, name in writers:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(OSError, match="No space left"):
                report(pipeline, figure_formats=())
        assert {file: file.read_bytes() for file in before} == before
    report(pipeline, figure_formats=())
    assert b"data:image" in (tmp_path / "out" / "report" / "index.html").read_bytes()
    assert not list((tmp_path / "out").rglob("*.partial"))[1:], "only the folder of unfinished artefacts"
    assert not list((tmp_path / "out" / "artefacts" / ".partial").iterdir())


@pytest.mark.slow
def test_a_changed_number_changes_the_page(reported: Pipeline, tmp_path: Path) -> None:
    archive(reported.out, tmp_path / "archive")
    file = tmp_path / "archive" / "table.parquet"
    table = pd.read_parquet(file)
    table.assign(mmd_efficientnet=table["mmd_efficientnet"] + 1).to_parquet(file, index=False)
    rebuild(tmp_path / "archive", figure_formats=())
    assert report_files(tmp_path / "archive")["report/index.html"] != report_files(reported.out)["report/index.html"]


@pytest.mark.slow
def test_a_merged_folder_still_shows_its_images(reported: Pipeline, tmp_path: Path) -> None:
    archive(reported.out, tmp_path / "archive")
    merge(tmp_path / "out", [tmp_path / "archive"])
    pipeline = Pipeline(reported.study, tmp_path / "out")
    assert pipeline.run()
    report(pipeline, figure_formats=())
    merged, original = (sorted((out / REPORT_DATA).rglob("*.webp")) for out in (tmp_path / "out", reported.out))
    assert [file.name for file in merged] == [file.name for file in original]
    assert len(merged) >= 2
    assert merged[0].read_bytes() == original[0].read_bytes()


@pytest.mark.slow
def test_the_report_command_rebuilds_a_folder(reported: Pipeline, tmp_path: Path) -> None:
    archive(reported.out, tmp_path / "archive")
    result = CliRunner().invoke(app, ["report", str(tmp_path / "archive")])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["num_points"] == len(reported.results_db.table())
    assert report_files(tmp_path / "archive") == report_files(reported.out)
    result = CliRunner().invoke(app, ["report", str(tmp_path / "archive"), "--pdf"])
    assert result.exit_code == 0, result.output
    files = report_files(tmp_path / "archive")
    assert {name for name in files if name.endswith(".pdf")} == {
        name.replace(".png", ".pdf") for name in report_files(reported.out) if name.endswith(".png")
    }
    assert b"quality_vs_cost-nfe.pdf" in files["report/index.html"]
    assert not CliRunner().invoke(app, ["report", str(tmp_path / "archive")]).exit_code
    assert report_files(tmp_path / "archive") == report_files(reported.out), "the PDF files are removed"
    result = CliRunner().invoke(app, ["report", str(tmp_path / "archive"), "--no-figures"])
    assert result.exit_code == 0, result.output
    assert not any(name.endswith((".png", ".pdf")) for name in report_files(tmp_path / "archive"))


@pytest.mark.slow
def test_a_damaged_folder_gives_one_line(reported: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="to rebuild from"):
        rebuild(tmp_path)
    archive(reported.out, tmp_path / "archive")
    page = tmp_path / "archive" / REPORT_DATA / "text2image" / "page.json"
    page.write_text(page.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    with pytest.raises(ConfigError, match="damaged"):
        rebuild(tmp_path / "archive")
    (tmp_path / "archive" / "table.parquet").unlink()
    with pytest.raises(ConfigError, match=r"no table\.parquet|damaged"):
        rebuild(tmp_path / "archive")


@pytest.mark.parametrize(
    "study",
    [pytest.param(study, marks=() if study.name == "grid" else pytest.mark.slow, id=study.name) for study in STUDIES],
)
def test_a_reference_study_is_rebuilt_from_its_tables(study: Path, tmp_path: Path) -> None:
    """Its pages have the digests in the repository, and its texts are those in the repository."""
    rebuilt = TOOL["page_digests"](study, tmp_path / "study")
    message = "run `make reference-report` and review the changes"
    assert rebuilt == json.loads(TOOL["FILE"].read_text(encoding="utf-8"))[study.name], message
    texts = [file.relative_to(study) for file in sorted((study / "report").rglob("*.md"))]
    assert Path("report/summary.md") in texts
    for text in texts:
        assert (tmp_path / "study" / text).read_bytes() == (study / text).read_bytes(), f"{text}: {message}"
    assert (tmp_path / "study" / "report" / "index.html").stat().st_size < 15e6
    assert (study / "table.parquet").stat().st_size < 5e6


@pytest.mark.slow
def test_a_run_continued_from_the_reference_study_trains_no_scored_model_again_but_one_teacher(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model with a score for every point is not trained, even if its checkpoint is not in the repository.

    The exception is the teacher of students that are not scored yet.
    """
    monkeypatch.chdir(ROOT)
    merge(tmp_path / "out", [REFERENCE])
    study = load_study("studies/reference.yaml")
    work = plan(Pipeline(study, tmp_path / "out"))
    finished = {(size["task"], size["size"]): size["images_to_train"] for size in work["sizes"] if not size["points_to_make"]}
    assert {size for task, size in finished if task == "text2image"} == {"0.3M", "0.8M", "2.6M"}
    assert {task for task, _ in finished} >= {"text2image", "superres", "distill"}
    assert {run for run, num_images in finished.items() if num_images} == {("superres", "2.6M")}
    autoencoder = Pipeline(study, tmp_path / "out").assets
    assert autoencoder.store.has("autoencoder", autoencoder.autoencoder_digest)


def test_the_reference_study_is_small() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "."], cwd=REFERENCE, capture_output=True, text=True, check=False
    ).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    assert sum((REFERENCE / name).stat().st_size for name in tracked if (REFERENCE / name).is_file()) < 20.5e6


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_every_point_of_a_reference_study_is_in_its_results_database(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "results.sqlite", tmp_path)
    database = ResultsDB(tmp_path / "results.sqlite").table().set_index("point")
    table = pd.read_parquet(folder / "table.parquet").set_index("point")
    assert set(table.index) <= set(database.index)
    scores = [name for name in ("mmd_efficientnet", "mmd_efficientnet_low", "alignment") if name in table.columns]
    for column in (*scores, "guidance", "gflop_denoiser", "num_images"):
        pd.testing.assert_series_equal(table[column], database.loc[table.index, column])


@pytest.mark.parametrize("channels", ["grey", "colour"])
@pytest.mark.parametrize(("num_images", "suffix"), [(5, ".webp"), (1024, ".png")])
def test_image_rows_are_lossless(channels: str, num_images: int, suffix: str, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (num_images, 16, 16, 3), dtype=np.uint8)
    if channels == "grey":
        images = np.repeat(images[..., :1], 3, axis=-1)
    file = write_image_row(tmp_path, "row", images)
    assert file.suffix == suffix, "a WebP image is at most 16,383 pixels wide"
    assert np.array_equal(read_image_row(file), images)
