"""The results database: points and scores in one transaction with several writers, order of the table, schema versions."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from isocost.analysis.results_table import read_table
from isocost.errors import ConfigError
from isocost.evaluation.confidence_intervals import Interval
from isocost.sweep.results_db import ResultsDB


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
        "gflop": 1.0,
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


def test_a_folder_without_a_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no table\.parquet"):
        read_table(tmp_path)
