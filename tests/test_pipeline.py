"""A study from images to report: finished stages are skipped, and a killed run ends with the same table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from conftest import plain_study, tiny_study
from finished_study import BASE, finished_spec, plain_finished
from isocost.config.study_yaml import load_study
from isocost.errors import ConfigError, RunError
from isocost.evaluation.evaluator import score
from isocost.evaluation.feature_store import SampleFeatures, read_sample_features
from isocost.pipeline.dry_run import plan
from isocost.pipeline.merge import archive, merge, take_artefacts
from isocost.pipeline.pipeline import Pipeline
from isocost.report.build import report
from isocost.sampling.generate import PromptEmbeds
from isocost.sweep import image_shards as shards
from isocost.sweep.results_db import ResultsDB
from isocost.sweep.schema import HARDWARE_COLUMNS
from isocost.utils.artifact_store import Store
from tiny_configs import save, scenes


@pytest.fixture(scope="module")
def finished(family_copy: Path) -> Path:
    """The output folder of a small study that ran without an interruption."""
    return family_copy


def table_of(out: Path) -> pd.DataFrame:
    return pd.read_parquet(out / "table.parquet").drop(columns=HARDWARE_COLUMNS)


def test_the_table_has_the_grid_and_the_snapshots(finished: Path) -> None:
    table = table_of(finished)
    final_points = table[table["is_final"]]
    assert len(final_points) == 2 * 2
    assert len(table[~table["is_final"]]) == 1
    assert set(table["images_seen"]) == {32, 64}
    for metric in ("mmd_efficientnet", "alignment"):
        assert (table[f"{metric}_low"] <= table[f"{metric}_high"]).all()
    peaks = pd.read_parquet(finished / "table.parquet")["peak_memory_mib"]
    assert peaks.isna().all() if sys.platform != "linux" else (peaks > 100).all()
    one_pass = final_points[final_points["guidance"] == 1]
    assert (one_pass["nfe"] == one_pass["num_steps"]).all()
    two_passes = final_points[final_points["guidance"] == 2]
    assert (two_passes["nfe"] == 2 * two_passes["num_steps"]).all()


def test_the_output_folder_has_all_files(finished: Path) -> None:
    for name in ("study.yaml", "results.sqlite", "table.csv", "report/index.html", "report/summary.md"):
        assert (finished / name).is_file(), name
    page = (finished / "report" / "index.html").read_text()
    assert "0.8M" in page
    assert "http://" not in page.split("<body>")[1].split("<script")[0]


def test_existing_artefacts_are_skipped(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "artefacts").rglob("*") if path.is_file()}
    pipeline = Pipeline(finished_spec(), finished)
    assert pipeline.run()
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "artefacts").rglob("*") if path.is_file()}
    assert all(size["points_to_make"] == size["images_to_train"] == 0 for size in plan(pipeline)["sizes"])


def test_a_wider_grid_reuses_the_existing_points(finished: Path, tmp_path: Path) -> None:
    sweep = {**BASE["sweep"], "guidance": [1, 2, 4]}
    before = (finished / "study.yaml").read_bytes()
    planned = plan(Pipeline(finished_spec(sweep=sweep, family={"widths": [8, 16, 24]}), finished))
    assert (finished / "study.yaml").read_bytes() == before, "a plan writes nothing"
    by_width = {size["width"]: size for size in planned["sizes"]}
    assert by_width[8]["points_to_make"] == 2
    assert by_width[8]["images_to_train"] == 0
    assert by_width[24]["images_to_train"] == 64


def test_more_images_continue_from_the_last_state(finished: Path) -> None:
    longer = {**BASE["train"], "num_images": 96, "snapshots": [32, 64]}
    pipeline = Pipeline(finished_spec(train=longer), finished)
    assert [size["images_to_train"] for size in plan(pipeline)["sizes"]] == [32]


def test_a_snapshot_behind_the_state_is_refused(finished: Path) -> None:
    pipeline = Pipeline(finished_spec(train={**BASE["train"], "snapshots": [16, 32]}), finished)
    with pytest.raises(ConfigError, match=r"train\.snapshots: no checkpoint was saved at 16 images"):
        pipeline.train(pipeline.runs[0])


@pytest.mark.slow
def test_checkpoints_of_scored_snapshots_may_be_absent(finished: Path, tmp_path: Path) -> None:
    archive(finished, tmp_path / "archive", checkpoint_mib=100)
    merge(tmp_path / "out", [tmp_path / "archive"])
    again = Pipeline(finished_spec(), tmp_path / "out")
    checkpoints = {folder.name for folder in (again.out / "artefacts" / "checkpoint").iterdir()}
    assert checkpoints == {run.final for run in again.runs}
    assert again.run()
    report(again, figure_formats=())
    pd.testing.assert_frame_equal(table_of(again.out), table_of(finished))
    assert not (again.out / "artefacts" / "run").exists()
    other_snapshots = finished_spec(sweep={**BASE["sweep"], "snapshot_num_steps": 2, "snapshot_guidance": 1.5})
    assert [size["images_to_train"] for size in plan(Pipeline(other_snapshots, again.out))["sizes"]] == [32]


def test_large_checkpoints_are_not_archived(finished: Path, tmp_path: Path) -> None:
    archive(finished, tmp_path / "archive", checkpoint_mib=0.1)
    assert not (tmp_path / "archive" / "artefacts" / "checkpoint").exists()
    assert ResultsDB(tmp_path / "archive" / "results.sqlite").points() == ResultsDB(finished / "results.sqlite").points()


def test_a_scored_study_without_checkpoints_trains_nothing_again(finished: Path, tmp_path: Path) -> None:
    archive(finished, tmp_path / "archive", checkpoint_mib=0.0001)
    merge(tmp_path / "out", [tmp_path / "archive"])
    again = Pipeline(finished_spec(), tmp_path / "out")
    assert all(size["points_to_make"] == size["images_to_train"] == 0 for size in plan(again)["sizes"])
    assert again.run()
    for kind in ("run", "checkpoint", "shard", "point"):
        assert not (again.out / "artefacts" / kind).exists(), kind
    assert [size.images_seen for size in again.status("done").sizes] == [64]
    report(again, figure_formats=())
    pd.testing.assert_frame_equal(table_of(again.out), table_of(finished))
    with pytest.raises(ConfigError, match="no checkpoint"):
        again.remeasure(again.runs[0])


@pytest.mark.slow
def test_a_new_point_of_a_study_without_checkpoints_trains_its_size_again(finished: Path, tmp_path: Path) -> None:
    archive(finished, tmp_path / "archive", checkpoint_mib=0.0001)
    merge(tmp_path / "out", [tmp_path / "archive"])
    sweep = {**BASE["sweep"], "num_steps": [1, 2, 4]}
    more_steps = Pipeline(finished_spec(sweep=sweep), tmp_path / "out")
    assert [(size["points_to_make"], size["images_to_train"]) for size in plan(more_steps)["sizes"]] == [(2, 64)]
    assert more_steps.run()
    assert all(more_steps.store.has("checkpoint", run.final) for run in more_steps.runs)
    report(more_steps, figure_formats=())
    table = table_of(more_steps.out)
    assert len(table[table["num_steps"] == 4]) == 2
    earlier_rows = table[table["num_steps"] != 4].reset_index(drop=True)
    pd.testing.assert_frame_equal(earlier_rows, table_of(finished))


def test_a_new_metric_of_a_study_without_checkpoints_trains_its_sizes_again(finished: Path, tmp_path: Path) -> None:
    archive(finished, tmp_path / "archive", checkpoint_mib=0.0001)
    merge(tmp_path / "out", [tmp_path / "archive"])
    protocol = {**plain_study()["protocol"], "metrics": ["mmd", "frechet"]}
    more_metrics = Pipeline(finished_spec(protocol=protocol), tmp_path / "out")
    assert [size["images_to_train"] for size in plan(more_metrics)["sizes"]] == [64]


def test_the_library_is_silent_and_the_command_prints_its_messages(
    finished: Path, isocost: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    merge(tmp_path / "library", [finished])
    assert capfd.readouterr() == ("", "")
    assert isocost("merge", tmp_path / "command", finished).err == f"copying artefacts and points of {finished}\n"
    take_artefacts(tmp_path / "other", [finished])
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_another_protocol_uses_the_artefacts(finished: Path, tmp_path: Path) -> None:
    protocol = {**plain_study()["protocol"], "num_images": 48}
    assert take_artefacts(tmp_path / "out", [finished]) > 4
    other = Pipeline(finished_spec(protocol=protocol), tmp_path / "out")
    assert all(size["images_to_train"] == 0 and size["points_to_make"] > 0 for size in plan(other)["sizes"])
    before = {path: path.stat().st_mtime_ns for path in (other.out / "artefacts").rglob("isocost.json")}
    assert {path.parent.parent.name for path in before} >= {"cache", "features", "checkpoint"}
    assert other.run()
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert not (other.out / "artefacts" / "run").exists()
    assert set(other.results_db.table()["num_images"]) == {48}


def test_a_folder_without_artefacts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no artefacts there"):
        take_artefacts(tmp_path / "out", [tmp_path])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("part", "change", "key"),
    [
        ("train", {"lr": 2e-3}, "train.lr"),
        ("autoencoder", {"path": "elsewhere"}, "autoencoder.path"),
        ("protocol", {"num_images": 48}, "protocol.num_images"),
        ("data", {"resolution": 64}, "data.resolution"),
    ],
)
def test_a_conflicting_study_is_refused_and_writes_nothing(finished: Path, part: str, change: dict, key: str) -> None:
    before = (finished / "study.yaml").read_bytes()
    with pytest.raises(ConfigError, match=key):
        Pipeline(finished_spec(**{part: {**plain_finished()[part], **change}}), finished)
    assert (finished / "study.yaml").read_bytes() == before


@pytest.mark.slow
def test_an_image_with_nan_is_named_and_never_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt: list[int] = []
    encode = PromptEmbeds.encode.__func__

    def spoil(cls: type[PromptEmbeds], captions: list[str], text: object) -> PromptEmbeds:
        states = encode(cls, captions, text)
        states.distinct[states.index[3]] = float("nan")
        spoilt[:] = (states.index[:32] == states.index[3]).nonzero().flatten().tolist()
        return states

    monkeypatch.setattr(PromptEmbeds, "encode", classmethod(spoil))
    small = {"num_steps": [2], "guidance": [2], "batch_size": 16}
    pipeline = Pipeline(
        tiny_study(family={"widths": [8]}, sweep=small, train={**plain_study()["train"], "snapshots": []}), tmp_path
    )
    with pytest.raises(RunError, match=r"images contain NaN or inf \(the first is image 3\)"):
        pipeline.run()
    assert not any((tmp_path / "artefacts").glob("point/*"))
    monkeypatch.setattr(shards, "MAX_NONFINITE_FRACTION", 0.5)
    assert pipeline.run()
    store = Store(tmp_path)
    (folder,) = (tmp_path / "artefacts").glob("point/*")
    manifest = store.manifest("point", folder.name)
    assert 3 in spoilt
    assert manifest["nonfinite"] == spoilt
    measured = read_sample_features(folder, ("efficientnet-lite0",))
    assert measured.ids is not None
    assert measured.ids.tolist() == [i for i in range(32) if i not in spoilt]
    assert len(measured.features["efficientnet-lite0"]) == 32 - len(spoilt)


@pytest.mark.slow
def test_a_deadline_saves_the_finished_work(tmp_path: Path) -> None:
    pipeline = Pipeline(tiny_study(family={"widths": [8]}), tmp_path / "out")
    assert not pipeline.run(deadline=time.monotonic())
    assert any((tmp_path / "out" / "artefacts" / "run").glob("*/state-*"))
    assert Pipeline(tiny_study(family={"widths": [8]}), tmp_path / "out").run()


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def start(study: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "isocost", "run", str(study), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)


def kill_when(process: subprocess.Popen[bytes], ready: object) -> None:
    deadline = time.monotonic() + 120
    while not ready():  # type: ignore[operator]
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_table(finished: Path, tmp_path: Path) -> None:
    study, out = tmp_path / "study.yaml", tmp_path / "out"
    study.write_text(yaml.safe_dump(plain_finished()))
    artefacts = out / "artefacts"
    kill_when(start(study, out), lambda: any(artefacts.glob("run/*/state-*32")))
    assert len(list(artefacts.glob("checkpoint/*/isocost.json"))) < 2, "the last one is not trained yet"
    kill_when(start(study, out), lambda: any(artefacts.glob("point/*/isocost.json")))
    assert len(list(artefacts.glob("point/*"))) < 5
    (artefacts / ".partial").mkdir(exist_ok=True)
    last = start(study, out)
    answer = json.loads(last.communicate(timeout=300)[0].splitlines()[-1])
    assert answer["finished"]
    assert last.returncode == 0
    pd.testing.assert_frame_equal(table_of(out), table_of(finished))
    assert not any(Store(out).root.glob(".partial/*"))


@pytest.mark.slow
def test_the_papers_study_runs_at_tiny_scale(tmp_path: Path) -> None:
    study = load_study(Path(__file__).resolve().parents[1] / "studies" / "paper.yaml", {"scale": "tiny"})
    pipeline = Pipeline(study, tmp_path / "out")
    assert pipeline.run()
    table = report(pipeline).table
    assert set(table["width"]) == {8, 16, 24}
    assert len(table[~table["is_final"]]) >= 9
    assert "quality against training compute" in (tmp_path / "out" / "report" / "index.html").read_text()


def test_the_reconstruction_floor_of_sorted_images_is_that_of_all_of_them(tmp_path: Path) -> None:
    """With scenes first and noise last in both folders, real images are close to real images."""
    made, noise = scenes(192, 32), torch.from_numpy(np.random.default_rng(0).integers(0, 256, (192, 3, 32, 32), np.uint8))
    for part, first, count in (("train", 0, 64), ("reference", 64, 32)):
        images = torch.cat([made[first : first + count], noise[first : first + count]])
        save(tmp_path / part, images, [f"{number:04d}" for number in range(len(images))])
        for number in range(len(images)):
            (tmp_path / part / f"{number:04d}.txt").write_text(f"image {number}")
    data = {
        "resolution": 32,
        "train": {"kind": "folder", "path": str(tmp_path / "train")},
        "reference": {"kind": "folder", "path": str(tmp_path / "reference")},
    }
    protocol = {"num_images": 64, "num_reference": 64, "num_bootstrap": 20, "alignment": "none"}
    assets = Pipeline(tiny_study(data=data, protocol=protocol), tmp_path / "out").assets
    scenes_only = {name: extractor(assets.images("train").images[:64]).numpy() for name, extractor in assets.extractors.items()}
    one_kind = score(SampleFeatures(scenes_only), assets.reference, ("mmd",))["mmd_efficientnet"]
    assert abs(assets.reconstruction_floors()["real"]["mmd_efficientnet"]) < one_kind.value / 10
