"""The progress of a run and its stop: `OUT/status.json`, `isocost status`, SIGTERM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from conftest import plain_study
from finished_study import BASE, copy_trained, finished_spec
from isocost.cli import app
from isocost.cli.status import format_duration, status_table
from isocost.config.base import parse_spec
from isocost.config.study import StudySpec
from isocost.errors import ConfigError
from isocost.pipeline.pipeline import Pipeline
from isocost.pipeline.status import PlannedPoint, read_status, seconds_left, size_status
from isocost.sweep.results_db import ResultsDB

METRIC = "mmd_efficientnet"


def with_metric(value: float, seconds: float, num_steps: int) -> dict[str, Any]:
    return {
        **{METRIC: value, f"{METRIC}_low": value - 0.1, f"{METRIC}_high": value + 0.1, "seconds": seconds},
        **{"size": "1M", "solver": "ddim/trailing", "num_steps": num_steps, "guidance": 2.0},
    }


def test_status_counts_the_finished_points_and_estimates_the_remaining_time() -> None:
    points = [PlannedPoint("a", 10.0), PlannedPoint("b", 30.0), PlannedPoint("c", 60.0)]
    known = {"a": with_metric(3.0, 5.0, 4), "b": with_metric(2.0, 15.0, 8), "of another size": with_metric(1.0, 99.0, 1)}
    status = size_status("width 8", "1M", 50, 100, points, 2, known, METRIC)
    assert (status.points_done, status.num_points, status.open_races, status.spent_s) == (2, 3, 2, 20.0)
    assert status.best is not None
    assert (status.best.value, status.best.num_steps) == (2.0, 8)
    assert seconds_left(points, known, num_workers=2) == 15.0  # 60 GFLOP at half a second each, by two
    assert seconds_left(points, {}, num_workers=2) is None
    assert (format_duration(40), format_duration(720), format_duration(12240)) == ("40 s", "12 min", "3.4 h")


def small_study(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    plain = plain_study(
        family={"widths": [8]},
        train={"num_images": 64, "batch_size": 16, "lr": 1e-3},
        sweep={"num_steps": [8, 16, 24, 32], "guidance": [1.5, 2, 3, 4], "batch_size": 16, "shard_size": 8},
    )
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(plain))
    return file, plain


@pytest.mark.slow
def test_sigterm_finishes_the_shard_and_the_same_command_continues(tmp_path: Path) -> None:
    file, plain = small_study(tmp_path)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "isocost", "run", str(file), "--out", str(out)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while running.poll() is None and not list(out.glob("artefacts/shard/*/isocost.json")):
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    stdout, _ = running.communicate(timeout=120)
    assert running.returncode == 0
    assert json.loads(stdout.splitlines()[-1])["finished"] is False
    results_db = ResultsDB(out / "results.sqlite")
    num_shards = results_db.num_shards() + 4 * len(results_db.points())
    assert 1 <= num_shards < 64  # the shard in progress was saved, and no other one was started
    assert not list(out.glob("artefacts/.partial/*"))
    status = read_status(out)
    assert status.stage == "stopped"
    assert (status.sizes[0].images_seen, status.sizes[0].num_points) == (64, 16)
    pipeline = Pipeline(parse_spec(StudySpec, plain, "study"), out)
    assert pipeline.leases.num_workers() == 0
    assert pipeline.sweep(pipeline.runs[0], deadline=None)
    assert len(pipeline.results_db.points()) == 16


@pytest.mark.slow
def test_the_command_prints_a_table_and_ends_with_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no status\.json"):
        read_status(tmp_path)
    _, plain = small_study(tmp_path)
    study = parse_spec(StudySpec, {**plain, "sweep": {"num_steps": [1], "guidance": [1], "batch_size": 16}}, "study")
    assert Pipeline(study, tmp_path / "out").run()
    result = CliRunner().invoke(app, ["status", str(tmp_path / "out"), "--follow"])
    assert result.exit_code == 0
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["stage"] == "done"
    assert answer["sizes"][0]["points_done"] == 1
    assert answer["sizes"][0]["best"]["metric"] == METRIC
    console = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(status_table(read_status(tmp_path / "out")))
    text = console.export_text()
    assert "squared MMD" in text
    assert "64/64" in text


@pytest.mark.slow
def test_progress_counts_the_finished_points_in_any_order(
    finished_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts_by_title: dict[str, list[int]] = {}

    @contextmanager
    def watched(title: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        yield lambda completed, note: counts_by_title.setdefault(f"{title}, {total}", []).append(completed)

    monkeypatch.setattr("isocost.pipeline.sweep_runner.progress_bar", watched)
    raced = {"num_steps": [1, 2], "guidance": [1, 4], "search": "race", "batch_size": 16, "snapshot_num_steps": 2}
    for name, sweep in (("grid", BASE["sweep"]), ("raced", raced)):
        Pipeline(finished_spec(sweep=sweep), copy_trained(finished_study / "family", tmp_path / name)).run()
    assert len(counts_by_title) >= 4, list(counts_by_title)
    for title, counts in counts_by_title.items():
        assert counts == sorted(counts), title
        assert counts[-1] == int(title.rsplit(", ", 1)[1]), title
