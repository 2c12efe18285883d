"""Several runs of one study: leases, shards, several processes, other results databases, merged folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from sqlalchemy import update
from sqlalchemy.orm import Session

from finished_study import BASE, copy_trained, finished_spec, plain_finished
from isocost.errors import ConfigError, RunError
from isocost.evaluation.feature_store import read_sample_features
from isocost.pipeline.merge import merge
from isocost.pipeline.pipeline import Pipeline
from isocost.pipeline.workers import run_on_ray, work
from isocost.report.build import report
from isocost.sweep import leases
from isocost.sweep import worker as workers
from isocost.sweep.grid import SweepPoint
from isocost.sweep.image_shards import split_into_shards
from isocost.sweep.leases import Leases
from isocost.sweep.results_db import ResultsDB
from isocost.sweep.schema import HARDWARE_COLUMNS, LeaseRecord


def table_of(out: Path, results_db: str | None = None) -> pd.DataFrame:
    return ResultsDB(results_db or out / "results.sqlite").table().drop(columns=HARDWARE_COLUMNS)


@pytest.fixture(scope="module")
def finished(family_copy: Path) -> Path:
    """The output folder of a study of one size: five points of three shards each."""
    return family_copy


def study_file(folder: Path, **changes: Any) -> Path:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(plain_finished(**changes)))
    return file


# --- leases ---


class VirtualClock:
    """A clock that only `sleep` moves."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


def two(folder: Path) -> tuple[Leases, Leases]:
    engine = ResultsDB(folder / "results.sqlite").engine
    return Leases(engine), Leases(ResultsDB(folder / "results.sqlite").engine)


def test_leased_work_is_not_leased_twice(tmp_path: Path) -> None:
    first, second = two(tmp_path)
    assert first.acquire("a")
    assert first.acquire("a")
    assert not second.acquire("a")
    assert second.acquire("b")
    assert (first.num_workers(), second.num_workers()) == (2, 2)
    second.release("a")  # the lease belongs to the first
    assert not second.acquire("a")
    first.release("a")
    assert second.acquire("a")
    second.close()
    assert first.acquire("a")
    assert first.acquire("b")
    first.close()


def test_the_lease_of_a_silent_or_dead_worker_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = two(tmp_path)
    monkeypatch.setattr(leases, "HEARTBEAT_S", 3600)
    assert first.acquire("a")

    def set_lease(**values: Any) -> None:
        with Session(second.engine) as session, session.begin():
            session.execute(update(LeaseRecord).where(LeaseRecord.work_item == "a").values(**values))

    set_lease(host="elsewhere")
    assert not second.acquire("a")
    set_lease(heartbeat=LeaseRecord.heartbeat - leases.LEASE_TIMEOUT_S - 1)
    assert second.acquire("a")
    second.release("a")
    assert first.acquire("a")
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    set_lease(pid=process.pid, worker="gone")
    assert second.acquire("a")
    set_lease(worker="skewed", host="elsewhere", heartbeat=LeaseRecord.heartbeat + 3 * leases.LEASE_TIMEOUT_S)
    with pytest.raises(ConfigError, match=r"leased by elsewhere, 1\d\d s in the future"):
        first.acquire("a")
    second.close()
    first.close()


def test_leases_are_renewed_while_their_worker_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(leases, "LEASE_TIMEOUT_S", 1.0)
    first, second = two(tmp_path)
    first.host = "elsewhere"  # so that only its heartbeat shows that it is alive
    assert first.acquire("a")
    for _ in range(15):
        assert not second.acquire("a")
        leases.time.sleep(0.1)
    first._stop.set()
    leases.time.sleep(1.2)
    assert second.acquire("a")
    second.close()


def test_a_long_wait_names_the_holder_of_the_lease_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = VirtualClock()
    monkeypatch.setattr(leases, "time", clock)
    first, second = two(tmp_path)
    first.pid = os.getppid()
    assert first.acquire("train 1")
    with caplog.at_level("INFO", logger="isocost"):
        for _ in range(round(100 / leases.POLL_S)):
            assert not second.acquire("train 1")
            second.wait("train 1")
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 4  # after 5, 35, 65 and 95 s
    assert f"waiting for train 1: process {first.pid} on {first.host} has held it for 5 s or more" in messages[0]
    assert "has held it for 95 s or more" in messages[3]
    first.release("train 1")
    assert second.acquire("train 1")
    caplog.clear()
    second.wait("train 1")
    assert not caplog.records
    second.close()
    first.close()


# --- shards ---


def test_the_shards_of_a_point_cover_it_once(finished: Path) -> None:
    pipeline = Pipeline(finished_spec(), finished)
    point = pipeline.points(pipeline.runs[0])[0]
    shards = split_into_shards(point, 12)
    assert [i for shard in shards for i in shard.images] == list(range(32))
    assert [len(shard.images) for shard in shards] == [12, 12, 8]
    assert len({shard.digest for shard in shards}) == 3


@pytest.mark.slow
def test_the_shard_size_changes_no_bit(finished: Path, tmp_path: Path) -> None:
    copy_trained(finished, tmp_path / "out")
    one_shard = finished_spec(sweep={**BASE["sweep"], "shard_size": 1000})
    assert Pipeline(one_shard, tmp_path / "out").run()
    pd.testing.assert_frame_equal(table_of(tmp_path / "out"), table_of(finished))
    for folder in (finished / "artefacts" / "point").iterdir():
        ours, theirs = (
            read_sample_features(out / "artefacts" / "point" / folder.name, ("efficientnet-lite0",))
            for out in (finished, tmp_path / "out")
        )
        assert (ours.features["efficientnet-lite0"] == theirs.features["efficientnet-lite0"]).all()
        assert (ours.ids == theirs.ids).all()  # type: ignore[union-attr]
    assert not any((finished / "artefacts").glob("shard/*"))


@pytest.mark.slow
def test_work_that_is_asked_for_twice_is_done_once(finished: Path, tmp_path: Path) -> None:
    """Two searches can end with the same winner. With 64 slots, all its images are under way at the same time."""
    copy_trained(finished, tmp_path / "out")
    pipeline = Pipeline(finished_spec(sweep={**BASE["sweep"], "batch_size": 64}), tmp_path / "out")
    pipeline.prepare()
    (run,) = pipeline.runs
    job = pipeline.experiments["text2image"].jobs(run)[-1]
    first, second, *_ = job.points
    done: list[SweepPoint] = []
    worker = pipeline._sweeper._worker(run, job)
    shards = split_into_shards(first, 12)
    assert worker.generate_shards([*shards, *shards], list(worker.reference.extractors), None)
    assert worker.run([first, first, second, second], done.append, None)
    pipeline.close()
    assert {point.digest for point in done} == {first.digest, second.digest}


@pytest.mark.slow
def test_shards_survive_a_kill_and_are_not_made_again(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_trained(finished, tmp_path / "out")
    made: list[str] = []
    keep = workers.Worker._commit_shard

    def stopping(this: workers.Worker, work_: Any, *measured: Any) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        keep(this, work_, *measured)
        made.append(work_.shard.digest)

    with monkeypatch.context() as patched:
        patched.setattr(workers.Worker, "_commit_shard", stopping)
        with pytest.raises(KeyboardInterrupt):
            Pipeline(finished_spec(), tmp_path / "out").run()
    assert {folder.name for folder in (tmp_path / "out" / "artefacts" / "shard").iterdir()} == set(made)
    assert ResultsDB(tmp_path / "out" / "results.sqlite").num_shards() == 2
    again: list[str] = []

    def noting(this: workers.Worker, work_: Any, *measured: Any) -> None:
        again.append(work_.shard.digest)
        keep(this, work_, *measured)

    monkeypatch.setattr(workers.Worker, "_commit_shard", noting)
    assert Pipeline(finished_spec(), tmp_path / "out").run()
    assert not set(again) & set(made)
    assert len(again) + len(made) == 5 * 3
    assert ResultsDB(tmp_path / "out" / "results.sqlite").num_shards() == 0


# --- several processes ---


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [2, 3])
def test_several_processes_end_with_the_same_table(finished: Path, tmp_path: Path, num_workers: int) -> None:
    command = [sys.executable, "-m", "isocost", "run", str(study_file(tmp_path)), "--out", str(tmp_path / "out")]
    command += ["--workers", str(num_workers), "--no-figures"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["finished"]
    pd.testing.assert_frame_equal(table_of(tmp_path / "out"), table_of(finished))
    assert not any((tmp_path / "out" / "artefacts").glob("shard/*"))
    assert not any((tmp_path / "out" / "artefacts" / ".partial").glob("*"))


@pytest.mark.slow
def test_a_worker_joins_a_run_by_its_folder(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to join"):
        work(tmp_path)
    copy_trained(finished, tmp_path / "out")
    assert work(tmp_path / "out")
    pd.testing.assert_frame_equal(table_of(tmp_path / "out"), table_of(finished))


# --- other results databases ---


def test_an_unreachable_results_database_is_one_line(isocost: Any, tmp_path: Path) -> None:
    study = study_file(tmp_path)
    for address, message in (
        ("postgresql://nobody@127.0.0.1:1/none", "the results database cannot be reached"),
        ("nonsense://x", "not a database address"),
        ("post gres://", "not a database address"),
    ):
        with pytest.raises(ConfigError, match=message):
            ResultsDB(address)
    result = isocost("run", study, "--out", tmp_path / "out", "--database", "postgresql://me:secret@127.0.0.1:1/none")
    assert result.status == 2, result.err
    assert "the results database cannot be reached" in result.line
    assert "secret" not in result.err


@pytest.mark.slow
def test_a_postgresql_results_database_has_the_same_table(finished: Path, tmp_path: Path) -> None:
    pgserver = pytest.importorskip("pgserver")
    server = pgserver.get_server(tmp_path / "pg")
    try:
        address = server.get_uri()
        pipeline = Pipeline(finished_spec(), tmp_path / "out", address)
        assert pipeline.run()
        assert not (tmp_path / "out" / "results.sqlite").exists()
        pd.testing.assert_frame_equal(table_of(tmp_path / "out", address), table_of(finished), check_dtype=False)
        assert len(report(pipeline, figure_formats=()).table) == 5
        first, second = Leases(ResultsDB(address).engine), Leases(ResultsDB(address).engine)
        assert first.acquire("a")
        assert not second.acquire("a")
        first.close()
        assert second.acquire("a")
        second.close()
    finally:
        server.cleanup()


@pytest.mark.slow
def test_a_ray_cluster_of_two_nodes_ends_with_the_same_table(finished: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    try:
        pipeline = Pipeline(finished_spec(), tmp_path / "out")
        pipeline.prepare()
        assert run_on_ray(cluster.address, tmp_path / "out", None, 2, None, None)
        pd.testing.assert_frame_equal(table_of(tmp_path / "out"), table_of(finished))
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_an_unreachable_ray_cluster_is_one_line(isocost: Any, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    result = isocost("run", study_file(tmp_path), "--out", tmp_path / "out", "--ray", "127.0.0.1:1")
    assert result.status == 2, result.err[-500:]
    assert "no cluster answers there" in result.line


# --- merged folders ---


@pytest.mark.slow
def test_two_folders_of_one_study_are_merged(finished: Path, tmp_path: Path) -> None:
    for name, change in (("left", {"num_steps": [1]}), ("right", {"num_steps": [2]})):
        out = copy_trained(finished, tmp_path / name)
        assert Pipeline(finished_spec(sweep={**BASE["sweep"], **change}), out).run()
    came = merge(tmp_path / "both", [tmp_path / "left", tmp_path / "right"])
    assert came["points"] == 5
    pd.testing.assert_frame_equal(table_of(tmp_path / "both"), table_of(finished))
    study = yaml.safe_load((tmp_path / "both" / "study.yaml").read_text())
    assert study["sweep"]["num_steps"] == [1, 2]
    assert merge(tmp_path / "both", [tmp_path / "right"]) == {"artefacts": 0, "points": 0}
    assert len(report(Pipeline(finished_spec(), tmp_path / "both"), figure_formats=()).table) == 5


@pytest.mark.slow
def test_folders_that_cannot_be_merged_are_refused_in_one_line(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not the output folder of a study"):
        merge(tmp_path / "both", [tmp_path])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(ConfigError, match="neither empty nor"):
        merge(tmp_path / "mine", [finished])
    other = Pipeline(finished_spec(train={**BASE["train"], "lr": 2e-3}), tmp_path / "other")
    other.prepare()
    other.train(other.runs[0])
    with pytest.raises(ConfigError, match=r"train\.lr"):
        merge(tmp_path / "other", [finished])


def test_failed_work_releases_its_leases(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_trained(finished, tmp_path / "out")

    def fail(*_: Any) -> None:
        raise RunError("no")

    with monkeypatch.context() as patched:
        patched.setattr(workers.Worker, "_commit_shard", fail)
        with pytest.raises(RunError):
            Pipeline(finished_spec(), tmp_path / "out").run()
    assert Leases(ResultsDB(tmp_path / "out" / "results.sqlite").engine).num_workers() == 0


def test_folders_of_pretrained_checkpoints_are_merged(tmp_path: Path) -> None:
    data = {"resolution": 16, "reference": {"kind": "scenes", "num_images": 64, "seed": 1}}
    for name, num_steps in (("left", 1), ("right", 2)):
        sweep = {"num_steps": [num_steps], "guidance": [1, 3]}
        plain = {"name": "pretrained", "data": data, "checkpoints": [name], "sweep": sweep, "protocol": {"num_images": 32}}
        (tmp_path / name).mkdir()
        ResultsDB(tmp_path / name / "results.sqlite")
        (tmp_path / name / "study.yaml").write_text(yaml.safe_dump(plain))
    assert merge(tmp_path / "both", [tmp_path / "left", tmp_path / "right"]) == {"artefacts": 0, "points": 0}
    study = yaml.safe_load((tmp_path / "both" / "study.yaml").read_text())
    assert study["checkpoints"] == ["left", "right"]
    assert study["sweep"]["num_steps"] == [1, 2]
