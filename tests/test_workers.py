"""Several runs at one study: claims, shards, further processes, other results databases, united folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from sqlalchemy import update
from sqlalchemy.orm import Session

from conftest import plain_study, tiny_study
from isocost.errors import ConfigError, RunError
from isocost.evaluation.feature_store import read_measured
from isocost.pipeline.merge import merge
from isocost.pipeline.pipeline import Pipeline
from isocost.pipeline.workers import run_on_ray, work
from isocost.report.build import report
from isocost.sweep import leases as claiming
from isocost.sweep import worker as workers
from isocost.sweep.image_shards import split_into_shards
from isocost.sweep.leases import Leases
from isocost.sweep.results_db import ResultsDB
from isocost.sweep.schema import HARDWARE_COLUMNS, LeaseRecord


def small(**changes: Any) -> dict[str, Any]:
    """One size and four points of three shards each."""
    return plain_study(
        family={"widths": [8]},
        train={"num_images": 64, "batch_size": 16, "lr": 1e-3},
        sweep={"num_steps": [1, 2], "guidance": [1, 2], "batch_size": 16, "shard_size": 12},
        **changes,
    )


def table_of(out: Path, results_db: str | None = None) -> pd.DataFrame:
    return ResultsDB(results_db or out / "results.sqlite").table().drop(columns=HARDWARE_COLUMNS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "out"
    study = tiny_study(**{key: value for key, value in small().items() if key in ("family", "train", "sweep")})
    assert Pipeline(study, out).run()
    return out


def study_file(folder: Path, **changes: Any) -> Path:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(small(**changes)))
    return file


def isocost(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "isocost", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


# --- claims ---


def two(folder: Path) -> tuple[Leases, Leases]:
    engine = ResultsDB(folder / "results.sqlite").engine
    return Leases(engine), Leases(ResultsDB(folder / "results.sqlite").engine)


def test_what_one_has_the_other_cannot_take(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    assert one.take("a")
    assert one.take("a")
    assert not other.take("a")
    assert other.take("b")
    assert (one.num_workers(), other.num_workers()) == (2, 2)
    other.release("a")  # not its own
    assert not other.take("a")
    one.release("a")
    assert other.take("a")
    other.close()
    assert one.take("a")
    assert one.take("b")
    one.close()


def test_a_silent_or_dead_workers_claim_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = two(tmp_path)
    monkeypatch.setattr(claiming, "HEARTBEAT_S", 3600)
    assert one.take("a")

    def set_claim(**values: Any) -> None:
        with Session(other.engine) as session, session.begin():
            session.execute(update(LeaseRecord).where(LeaseRecord.work == "a").values(**values))

    set_claim(host="elsewhere")
    assert not other.take("a")
    set_claim(beat=LeaseRecord.beat - claiming.LEASE_TIMEOUT_S - 1)
    assert other.take("a")
    other.release("a")
    assert one.take("a")
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    set_claim(pid=process.pid, worker="gone")
    assert other.take("a")
    set_claim(worker="skewed", host="elsewhere", beat=LeaseRecord.beat + 3 * claiming.LEASE_TIMEOUT_S)
    with pytest.raises(ConfigError, match=r"claimed by elsewhere, 1\d\d s in the future"):
        one.take("a")
    other.close()
    one.close()


def test_claims_are_renewed_while_their_worker_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claiming, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(claiming, "LEASE_TIMEOUT_S", 1.0)
    one, other = two(tmp_path)
    one.host = "elsewhere"  # so that only its beat speaks for it
    assert one.take("a")
    for _ in range(15):
        assert not other.take("a")
        claiming.time.sleep(0.1)
    one._stop.set()
    claiming.time.sleep(1.2)
    assert other.take("a")
    other.close()


# --- shards ---


def test_a_points_shards_cover_it_once(finished: Path) -> None:
    pipeline = Pipeline(tiny_study(**{k: small()[k] for k in ("family", "train", "sweep")}), finished)
    point = pipeline.points(pipeline.runs[0])[0]
    shards = split_into_shards(point, 12)
    assert [i for shard in shards for i in shard.images] == list(range(32))
    assert [len(shard.images) for shard in shards] == [12, 12, 8]
    assert len({shard.digest for shard in shards}) == 3


def test_the_size_of_shards_changes_no_bit(finished: Path, tmp_path: Path) -> None:
    parts = {k: small()[k] for k in ("family", "train", "sweep")}
    shutil.copytree(finished, tmp_path / "out")
    for kind in ("point", "shard"):
        shutil.rmtree(tmp_path / "out" / "artefacts" / kind, ignore_errors=True)
    (tmp_path / "out" / "results.sqlite").unlink()
    whole = tiny_study(**{**parts, "sweep": {**parts["sweep"], "shard_size": 1000}})
    assert Pipeline(whole, tmp_path / "out").run()
    pd.testing.assert_frame_equal(table_of(tmp_path / "out"), table_of(finished))
    for folder in (finished / "artefacts" / "point").iterdir():
        ours, theirs = (
            read_measured(each / "artefacts" / "point" / folder.name, ("efficientnet-lite0",))
            for each in (finished, tmp_path / "out")
        )
        assert (ours.features["efficientnet-lite0"] == theirs.features["efficientnet-lite0"]).all()
        assert (ours.ids == theirs.ids).all()  # type: ignore[union-attr]
    assert not any((finished / "artefacts").glob("shard/*"))


def test_shards_outlive_a_kill_and_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {k: small()[k] for k in ("family", "train", "sweep")}
    made: list[str] = []
    keep = workers.Worker._keep

    def stopping(this: workers.Worker, work_: Any, *measured: Any) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        keep(this, work_, *measured)
        made.append(work_.shard.digest)

    with monkeypatch.context() as patched:
        patched.setattr(workers.Worker, "_keep", stopping)
        with pytest.raises(KeyboardInterrupt):
            Pipeline(tiny_study(**parts), tmp_path / "out").run()
    assert {folder.name for folder in (tmp_path / "out" / "artefacts" / "shard").iterdir()} == set(made)
    assert ResultsDB(tmp_path / "out" / "results.sqlite").num_shards() == 2
    again: list[str] = []

    def noting(this: workers.Worker, work_: Any, *measured: Any) -> None:
        again.append(work_.shard.digest)
        keep(this, work_, *measured)

    monkeypatch.setattr(workers.Worker, "_keep", noting)
    assert Pipeline(tiny_study(**parts), tmp_path / "out").run()
    assert not set(again) & set(made)
    assert len(again) + len(made) == 12
    assert ResultsDB(tmp_path / "out" / "results.sqlite").num_shards() == 0


# --- several processes ---


@pytest.mark.parametrize("num_workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_end_with_the_same_table(finished: Path, tmp_path: Path, num_workers: int) -> None:
    ended = isocost("run", study_file(tmp_path), "--out", tmp_path / "out", "--workers", num_workers)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1])["finished"]
    pd.testing.assert_frame_equal(table_of(tmp_path / "out"), table_of(finished))
    assert not any((tmp_path / "out" / "artefacts").glob("shard/*"))
    assert not any((tmp_path / "out" / "artefacts" / ".partial").glob("*"))


def test_a_run_is_joined_by_its_folder(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to join"):
        work(tmp_path)
    shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "artefacts" / "point")
    (tmp_path / "out" / "results.sqlite").unlink()
    assert work(tmp_path / "out")
    pd.testing.assert_frame_equal(table_of(tmp_path / "out"), table_of(finished))


# --- other results databases ---


def test_a_ledger_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    study = study_file(tmp_path)
    for address, said in (
        ("postgresql://nobody@127.0.0.1:1/none", "the results database cannot be reached"),
        ("nonsense://x", "no address of a database"),
        ("post gres://", "no address of a database"),
    ):
        with pytest.raises(ConfigError, match=said):
            ResultsDB(address)
    ended = isocost("run", study, "--out", tmp_path / "out", "--database", "postgresql://me:secret@127.0.0.1:1/none")
    assert ended.returncode == 2, ended.stderr
    assert "the results database cannot be reached" in ended.stderr.splitlines()[-1]
    assert "secret" not in ended.stderr


def test_a_postgresql_ledger_holds_the_same(finished: Path, tmp_path: Path) -> None:
    pgserver = pytest.importorskip("pgserver")
    server = pgserver.get_server(tmp_path / "pg")
    try:
        address = server.get_uri()
        parts = {k: small()[k] for k in ("family", "train", "sweep")}
        pipeline = Pipeline(tiny_study(**parts), tmp_path / "out", address)
        assert pipeline.run()
        assert not (tmp_path / "out" / "results.sqlite").exists()
        pd.testing.assert_frame_equal(table_of(tmp_path / "out", address), table_of(finished), check_dtype=False)
        assert len(report(pipeline).table) == 4
        one, other = Leases(ResultsDB(address).engine), Leases(ResultsDB(address).engine)
        assert one.take("a")
        assert not other.take("a")
        one.close()
        assert other.take("a")
        other.close()
    finally:
        server.cleanup()


@pytest.mark.slow
def test_a_ray_cluster_of_two_nodes_ends_with_the_same_table(finished: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    try:
        parts = {k: small()[k] for k in ("family", "train", "sweep")}
        pipeline = Pipeline(tiny_study(**parts), tmp_path / "out")
        pipeline.prepare()
        assert run_on_ray(cluster.address, tmp_path / "out", None, 2, None, None)
        pd.testing.assert_frame_equal(table_of(tmp_path / "out"), table_of(finished))
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_no_ray_cluster_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    ended = isocost("run", study_file(tmp_path), "--out", tmp_path / "out", "--ray", "127.0.0.1:1")
    assert ended.returncode == 2, ended.stderr[-500:]
    assert "no cluster answers there" in ended.stderr.splitlines()[-1]


# --- united folders ---


def test_two_folders_of_one_study_are_united(finished: Path, tmp_path: Path) -> None:
    parts = {k: small()[k] for k in ("family", "train", "sweep")}
    for name, change in (("left", {"num_steps": [1]}), ("right", {"num_steps": [2]})):
        assert Pipeline(tiny_study(**{**parts, "sweep": {**parts["sweep"], **change}}), tmp_path / name).run()
    came = merge(tmp_path / "both", [tmp_path / "left", tmp_path / "right"])
    assert came["points"] == 4
    pd.testing.assert_frame_equal(table_of(tmp_path / "both"), table_of(finished))
    study = yaml.safe_load((tmp_path / "both" / "study.yaml").read_text())
    assert study["sweep"]["num_steps"] == [1, 2]
    assert merge(tmp_path / "both", [tmp_path / "right"]) == {"artefacts": 0, "points": 0}
    assert len(report(Pipeline(tiny_study(**parts), tmp_path / "both")).table) == 4


def test_what_cannot_be_united_is_one_line(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no output folder of a study"):
        merge(tmp_path / "both", [tmp_path])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(ConfigError, match="neither empty nor"):
        merge(tmp_path / "mine", [finished])
    parts = {k: small()[k] for k in ("family", "train", "sweep")}
    other = tiny_study(**{**parts, "train": {**parts["train"], "lr": 2e-3}})
    assert Pipeline(other, tmp_path / "other").run()
    with pytest.raises(ConfigError, match=r"train\.lr"):
        merge(tmp_path / "other", [finished])


def test_work_that_fails_gives_its_claims_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {k: small()[k] for k in ("family", "train", "sweep")}

    def fail(*_: Any) -> None:
        raise RunError("no")

    with monkeypatch.context() as patched:
        patched.setattr(workers.Worker, "_keep", fail)
        with pytest.raises(RunError):
            Pipeline(tiny_study(**parts), tmp_path / "out").run()
    assert Leases(ResultsDB(tmp_path / "out" / "results.sqlite").engine).num_workers() == 0
