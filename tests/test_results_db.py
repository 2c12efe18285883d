"""The results database: points and scores in one transaction with several writers, order of the table, schema versions."""

from __future__ import annotations

import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy.schema import Column

from isocost.analysis.results_table import read_table
from isocost.errors import ConfigError, RunError
from isocost.evaluation.confidence_intervals import Interval
from isocost.evaluation.paired import PairedComparer, PointResamples
from isocost.pipeline.resamples import read_resamples
from isocost.sweep.results_db import ResultsDB
from isocost.sweep.schema import Base
from isocost.utils.artifact_store import Store
from output_folders import plain_user, read_only


def row(point: str, **changes: object) -> dict[str, object]:
    return {
        "point": point,
        "checkpoint": "c",
        "protocol": "p",
        "task": "text2image",
        "size": "1M",
        "width": 8,
        "num_parameters": 1,
        "images_seen": 10,
        "training_gflop": 1.0,
        "solver": "ddim/trailing",
        "num_steps": 4,
        "guidance": 1.0,
        "num_images": 5,
        "num_nonfinite": 0,
        "seed": 0,
        "dtype": "fp32",
        "compiled": False,
        "batch_size": 64,
        "min_batch_size": 64,
        "normalized_cost": 1.0,
        "nfe": 4.0,
        "gflop_denoiser": 1.0,
        "ms_per_image": 1.0,
        "seconds": 1.0,
        "has_too_few_samples": False,
        **changes,
    }


SCORES = {"mmd_efficientnet": Interval(0.5, 0.4, 0.6)}


def test_a_point_is_read_with_its_scores(tmp_path: Path) -> None:
    results_db = ResultsDB(tmp_path / "results.sqlite")
    results_db.add_point(row("b", num_steps=8), SCORES, {"host": "here"}, {})
    results_db.add_point(row("a"), SCORES, {}, {})
    results_db.add_scores("a", {"alignment": Interval(0.9, 0.8, 1.0)})
    table = ResultsDB(tmp_path / "results.sqlite").table()
    assert list(table["point"]) == ["a", "b"]
    assert list(table["alignment"].isna()) == [False, True]
    assert table.loc[0, ["mmd_efficientnet", "mmd_efficientnet_low", "mmd_efficientnet_high"]].tolist() == [
        0.5,
        0.4,
        0.6,
    ]
    assert results_db.points() == {"a", "b"}
    assert results_db.metrics()["a"] == {"mmd_efficientnet", "alignment"}


def test_a_point_recorded_again_replaces_itself(tmp_path: Path) -> None:
    results_db = ResultsDB(tmp_path / "results.sqlite")
    results_db.add_point(row("a"), {**SCORES, "alignment": Interval(0.9, 0.8, 1.0)}, {}, {})
    results_db.add_point(row("a", guidance=2.0), SCORES, {}, {})
    table = results_db.table()
    assert table["guidance"].tolist() == [2.0]
    assert "alignment" not in table


def test_resamples_are_stored_with_the_scores(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    resamples = {"mmd_efficientnet": 1.7 + 0.03 * generator.standard_normal(201)}
    scores = {"mmd_efficientnet": Interval(resamples["mmd_efficientnet"][0], 1.6, 1.8), "recall": Interval(0.1, 0.0, 0.2)}
    results_db = ResultsDB(tmp_path / "results.sqlite")
    results_db.add_point(row("a"), scores, {}, {}, resamples=resamples)
    results_db.add_point(row("b"), SCORES, {}, {})
    found = results_db.resamples("a")
    assert found is not None
    assert (found.protocol, found.num_images, set(found.by_metric)) == ("p", 5, {"mmd_efficientnet"})
    assert found.by_metric["mmd_efficientnet"][0] == resamples["mmd_efficientnet"][0]
    np.testing.assert_allclose(found.by_metric["mmd_efficientnet"], resamples["mmd_efficientnet"], rtol=0, atol=1e-8)
    assert results_db.resamples("b") is None
    assert results_db.resamples("absent") is None
    assert not any("resamples" in column for column in results_db.table())
    copy = ResultsDB(tmp_path / "copy.sqlite")
    copy.import_from(results_db)
    again = copy.resamples("a")
    assert again is not None
    np.testing.assert_array_equal(again.by_metric["mmd_efficientnet"], found.by_metric["mmd_efficientnet"])


def test_reading_resamples_changes_no_file(tmp_path: Path) -> None:
    with ResultsDB(tmp_path / "results.sqlite") as results_db:
        results_db.add_point(row("a"), SCORES, {}, {}, resamples={"mmd_efficientnet": np.array([0.5, 0.6, 0.4])})
    with sqlite3.connect(tmp_path / "results.sqlite") as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
    connection.close()
    before = (tmp_path / "results.sqlite").read_bytes()
    for folder in (tmp_path, tmp_path / "absent"):
        found = read_resamples(folder, "mmd_efficientnet")
        assert set(found) == ({"a"} if folder == tmp_path else set())
    assert [file.name for file in tmp_path.iterdir()] == ["results.sqlite"]
    assert (tmp_path / "results.sqlite").read_bytes() == before


def test_points_are_not_compared_if_one_has_neither_resamples_nor_features(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.create("point", "b", {"spec": {"num_images": 5}, "protocol": "p"}):
        pass

    def no_reference() -> Any:
        raise AssertionError("the reference set is not needed")

    def read(point: str) -> PointResamples | None:
        return PointResamples("p", 5, {"mmd": np.array([1.0, 1.1])}) if point == "a" else None

    comparer = PairedComparer((read,), (store,), no_reference, ("mmd",))
    assert comparer.difference("a", "absent", "mmd") is None
    assert comparer.difference("b", "absent", "mmd") is None
    assert comparer.difference("a", "a", "mmd") is not None


def test_points_are_paired_only_under_one_protocol_and_number_of_images() -> None:
    first = PointResamples("p", 5, {"mmd": np.array([1.0, 1.1, 0.9]), "recall": np.array([0.1, 0.1, 0.1])})
    second = PointResamples("p", 5, {"mmd": np.array([0.5, 0.6, 0.4])})
    (difference,) = first.minus(second).values()
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.5, 0.5, 0.5))
    assert first.minus(replace(second, protocol="q")) == {}
    assert first.minus(replace(second, num_images=6)) == {}


def test_a_row_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    results_db = ResultsDB(tmp_path / "results.sqlite")
    with pytest.raises(TypeError):
        results_db.add_point({**row("a"), "colour": "red"}, SCORES, {}, {})
    assert results_db.points() == set()


def test_several_writers_lose_nothing(tmp_path: Path) -> None:
    def write(number: int) -> None:
        ResultsDB(tmp_path / "results.sqlite").add_point(row(f"{number:03d}"), SCORES, {}, {})

    ResultsDB(tmp_path / "results.sqlite")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    assert len(ResultsDB(tmp_path / "results.sqlite").table()) == 40


def test_events_of_a_stage_are_replaced_and_stay_in_order(tmp_path: Path) -> None:
    results_db = ResultsDB(tmp_path / "results.sqlite")
    results_db.set_events("data.train", [("1.png", "broken")])
    results_db.set_events("data.reference", [("9.png", "empty")])
    results_db.set_events("data.train", [("2.png", "broken"), ("3.png", "broken")])
    assert [event["subject"] for event in results_db.events()] == ["9.png", "2.png", "3.png"]


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (1, "version 1, made by isocost 0.1; this isocost reads version 7: run the study again with 0.2"),
        (6, "version 6, made by isocost 0.1; this isocost reads version 7: run the study again with 0.2"),
        (99, "version 99, made by a newer isocost; this isocost reads version 7: upgrade isocost"),
    ],
)
def test_a_database_of_another_version_is_refused_in_one_line(version: int, message: str, tmp_path: Path) -> None:
    file = tmp_path / "results.sqlite"
    ResultsDB(file).add_point(row("a"), SCORES, {}, {})
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE schema SET version = ?", (version,))
        before = list(connection.iterdump())
    with pytest.raises(ConfigError) as refused:
        ResultsDB(file)
    assert str(refused.value) == f"{file}: results database of {message}"
    with sqlite3.connect(file) as connection:
        assert list(connection.iterdump()) == before


# --- databases of an earlier release, without the nullable columns that were added since ---


ADDED = ("latency_ms", "peak_memory_mib")
"""Nullable columns of the points: the tests hold for any set of them."""
TIMED_WITH = {"device": "gpu", "num_latency_runs": 9}


def write_earlier(file: Path, *points: str) -> Path:
    """A database without the columns `ADDED`."""
    with ResultsDB(file) as results_db:
        for point in points:
            results_db.add_point(row(point), SCORES, {"host": "here"}, {})
    with sqlite3.connect(file) as connection:
        for column in ADDED:
            connection.execute(f"ALTER TABLE points DROP COLUMN {column}")
    connection.close()
    return file


def columns_of(file: Path) -> set[str]:
    with sqlite3.connect(file) as connection:
        return {column[1] for column in connection.execute("PRAGMA table_info(points)")}


def test_missing_columns_are_added_to_a_database_that_is_opened_for_writing(tmp_path: Path) -> None:
    file = write_earlier(tmp_path / "results.sqlite", "a")
    assert not columns_of(file) & set(ADDED)
    results_db = ResultsDB(file)
    assert columns_of(file) >= set(ADDED)
    results_db.add_point(row("b", peak_memory_mib=3.0), SCORES, {}, {})
    results_db.set_time("b", 2.0, TIMED_WITH, latency_ms=7.0)
    table = ResultsDB(file).table()
    assert table["point"].tolist() == ["a", "b"]
    assert table["latency_ms"].isna().tolist() == [True, False]
    assert table.loc[1, ["latency_ms", "peak_memory_mib"]].tolist() == [7.0, 3.0]
    assert table["mmd_efficientnet"].tolist() == [0.5, 0.5]


def test_several_processes_may_add_the_columns_at_the_same_time(tmp_path: Path) -> None:
    file = write_earlier(tmp_path / "results.sqlite", "a")
    with ThreadPoolExecutor(8) as pool:
        tables = list(pool.map(lambda _: ResultsDB(file).table(), range(8)))
    assert all(table["latency_ms"].isna().all() for table in tables)


def test_a_column_of_nulls_is_a_column_of_numbers(tmp_path: Path) -> None:
    table = ResultsDB(write_earlier(tmp_path / "results.sqlite", "a")).table()
    assert table["latency_ms"].dtype == float


def test_a_database_that_is_only_read_gets_no_columns(tmp_path: Path) -> None:
    file = write_earlier(tmp_path / "results.sqlite", "a")
    before = columns_of(file)
    with ResultsDB(file, keep_tables=True) as results_db:
        assert results_db.table()["latency_ms"].isna().all()
        assert results_db.points() == {"a"}
        with ThreadPoolExecutor(4) as pool:  # every connection reads the columns as NULL
            assert all(table["point"].tolist() == ["a"] for table in pool.map(lambda _: results_db.table(), range(4)))
    assert columns_of(file) == before


@pytest.mark.parametrize("has_log", [False, True], ids=["without a log", "with a log"])
def test_missing_columns_of_a_read_only_database_are_read_as_null(has_log: bool) -> None:
    with plain_user() as folder:
        source = folder / "source"
        source.mkdir()
        file = source / "results.sqlite"
        if has_log:
            live = folder / "live.sqlite"
            write_earlier(live, "a")
            with sqlite3.connect(live) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("UPDATE points SET num_steps = 9")
                connection.commit()
                for suffix in ("", "-wal"):
                    file.with_name(f"{file.name}{suffix}").write_bytes(live.with_name(f"{live.name}{suffix}").read_bytes())
            assert file.with_name(f"{file.name}-wal").stat().st_size
        else:
            write_earlier(file, "a")
        contents = {path.name: path.read_bytes() for path in source.iterdir()}
        with read_only(source):
            results_db = ResultsDB(file)
            table = results_db.table()
            assert table["num_steps"].tolist() == [9 if has_log else 4]
            assert table["latency_ms"].isna().all()
            with pytest.raises(RunError, match="make it writable"):
                results_db.set_time("a", 2.0, TIMED_WITH, latency_ms=7.0)
        assert {path.name: path.read_bytes() for path in source.iterdir()} == contents


def test_points_of_earlier_and_later_databases_are_copied_in_both_directions(tmp_path: Path) -> None:
    earlier = write_earlier(tmp_path / "earlier.sqlite", "a")
    with ResultsDB(tmp_path / "later.sqlite") as later:
        later.add_point(row("b"), SCORES, {}, {})
        later.set_time("b", 2.0, TIMED_WITH, latency_ms=7.0)
        assert later.import_from(ResultsDB(earlier, keep_tables=True)) == 1
        assert later.table().set_index("point")["latency_ms"].isna().to_dict() == {"a": True, "b": False}
        assert not columns_of(earlier) & set(ADDED)
        with ResultsDB(earlier) as extended:
            assert extended.import_from(later) == 1
            assert extended.table().set_index("point")["latency_ms"].dropna().to_dict() == {"b": 7.0}


def test_a_point_takes_the_times_of_a_copy_whose_latency_was_measured(tmp_path: Path) -> None:
    archived = ResultsDB(write_earlier(tmp_path / "archive.sqlite", "a", "b"))
    with ResultsDB(tmp_path / "out.sqlite") as out:
        out.import_from(archived)
        out.set_time("a", 2.0, TIMED_WITH, latency_ms=7.0)
        assert archived.import_from(out) == 0
    table = archived.table().set_index("point")
    assert table.loc["a", ["ms_per_image", "latency_ms"]].tolist() == [2.0, 7.0]
    assert json.loads(table.loc["a", "provenance"]) == {"host": "here", "timed_with": TIMED_WITH}
    assert table.loc["b", "ms_per_image"] == 1.0
    assert "timed_with" not in json.loads(table.loc["b", "provenance"])


def test_measured_times_survive_another_record_of_the_point(tmp_path: Path) -> None:
    results_db = ResultsDB(tmp_path / "results.sqlite")
    for point in ("a", "b"):
        results_db.add_point(row(point), SCORES, {"host": "here"}, {})
    results_db.set_time("a", 2.0, TIMED_WITH, latency_ms=7.0)
    for point in ("a", "b"):
        results_db.add_point(row(point, ms_per_image=9.0), {"alignment": Interval(0.9, 0.8, 1.0)}, {"host": "there"}, {})
    table = results_db.table().set_index("point")
    assert table.loc["a", ["ms_per_image", "latency_ms"]].tolist() == [2.0, 7.0]
    assert json.loads(table.loc["a", "provenance"]) == {"host": "there", "timed_with": TIMED_WITH}
    assert table.loc["b", "ms_per_image"] == 9.0, "it was never measured again"
    assert json.loads(table.loc["b", "provenance"]) == {"host": "there"}
    assert table["alignment"].tolist() == [0.9, 0.9]


def test_every_column_added_since_the_first_release_is_nullable() -> None:
    """A new column that is not nullable would make databases of schema version 7 unreadable."""
    required: dict[str, set[str]] = {
        name: {column.name for column in table.columns if isinstance(column, Column) and not column.nullable}
        for name, table in Base.metadata.tables.items()
    }
    assert required["points"] == set(row("a")) - {"gflop_denoiser"} | {"gflop", "created", "provenance"}


def test_a_folder_without_a_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no table\.parquet"):
        read_table(tmp_path)
