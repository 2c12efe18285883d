"""The ledger: a point with its scores in one transaction, whatever else writes; a table in the order of coordinates."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from isocost.analysis.results_table import read_table
from isocost.errors import RequestError
from isocost.evaluation.confidence_intervals import Interval
from isocost.sweep.results_db import Ledger


def row(point: str, **changes: object) -> dict[str, object]:
    return {
        "point": point,
        "checkpoint": "c",
        "protocol": "p",
        "size": "1M",
        "width": 8,
        "num_parameters": 1,
        "images_seen": 10,
        "training_gflop": 1.0,
        "sampler": "ddim/trailing",
        "num_steps": 4,
        "guidance": 1.0,
        "num_pictures": 5,
        "num_not_finite": 0,
        "seed": 0,
        "precision": "fp32",
        "compiled": False,
        "bucket_size": 64,
        "least_bucket_size": 64,
        "paper_cost": 1.0,
        "nfe": 4.0,
        "gflop": 1.0,
        "ms_per_picture": 1.0,
        "seconds": 1.0,
        "flagged": False,
        **changes,
    }


SCORES = {"kernel_efficientnet": Interval(0.5, 0.4, 0.6)}


def test_an_older_ledger_is_brought_up_to_date(tmp_path: Path) -> None:
    file = tmp_path / "ledger.sqlite"
    Ledger(file).add_point(row("a"), SCORES, {}, {})
    with sqlite3.connect(file) as connection:
        for column in ("compiled", "bucket_size", "least_bucket_size"):
            connection.execute(f"ALTER TABLE points DROP COLUMN {column}")
        connection.execute("UPDATE schema SET version = 1")
    ledger = Ledger(file)
    ledger.add_point(row("b"), SCORES, {}, {})
    table = ledger.table().set_index("point")
    assert table.loc["b", "bucket_size"] == 64
    assert table["bucket_size"].isna().tolist() == [True, False]


def test_a_point_comes_back_with_its_scores(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.add_point(row("b", num_steps=8), SCORES, {"host": "here"}, {})
    ledger.add_point(row("a"), SCORES, {}, {})
    ledger.add_scores("a", {"alignment": Interval(0.9, 0.8, 1.0)})
    table = Ledger(tmp_path / "ledger.sqlite").table()
    assert list(table["point"]) == ["a", "b"]
    assert list(table["alignment"].isna()) == [False, True]
    assert table.loc[0, ["kernel_efficientnet", "kernel_efficientnet_low", "kernel_efficientnet_high"]].tolist() == [
        0.5,
        0.4,
        0.6,
    ]
    assert ledger.points() == {"a", "b"}
    assert ledger.metrics()["a"] == {"kernel_efficientnet", "alignment"}


def test_a_point_recorded_again_replaces_itself(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.add_point(row("a"), {**SCORES, "alignment": Interval(0.9, 0.8, 1.0)}, {}, {})
    ledger.add_point(row("a", guidance=2.0), SCORES, {}, {})
    table = ledger.table()
    assert table["guidance"].tolist() == [2.0]
    assert "alignment" not in table


def test_a_row_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    with pytest.raises(TypeError):
        ledger.add_point({**row("a"), "colour": "red"}, SCORES, {}, {})
    assert ledger.points() == set()


def test_several_writers_lose_nothing(tmp_path: Path) -> None:
    def write(number: int) -> None:
        Ledger(tmp_path / "ledger.sqlite").add_point(row(f"{number:03d}"), SCORES, {}, {})

    Ledger(tmp_path / "ledger.sqlite")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    assert len(Ledger(tmp_path / "ledger.sqlite").table()) == 40


def test_events_of_a_stage_are_replaced_and_kept_in_order(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.set_events("data.train", [("1.png", "broken")])
    ledger.set_events("data.reference", [("9.png", "empty")])
    ledger.set_events("data.train", [("2.png", "broken"), ("3.png", "broken")])
    assert [event["subject"] for event in ledger.events()] == ["9.png", "2.png", "3.png"]


def test_a_ledger_of_a_newer_isocost_is_refused(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger.sqlite")
    with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
        connection.execute("UPDATE schema SET version = 99")
    with pytest.raises(RequestError, match="upgrade isocost"):
        Ledger(tmp_path / "ledger.sqlite")


def test_a_folder_without_a_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no table\.parquet"):
        read_table(tmp_path)
