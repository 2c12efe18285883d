"""Milliseconds of different devices are never set against each other."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from conftest import tiny_study
from isocost.analysis.pareto import pareto
from isocost.analysis.results_table import of_task
from isocost.analysis.timings import format_untimed, timed_on, timed_on_one_device
from isocost.cli import app
from isocost.pipeline.pipeline import Pipeline
from isocost.report.build import _provenance, study_table
from isocost.utils.environment import processor_name


def table_of(*devices: str | None) -> pd.DataFrame:
    told = [None if device is None else json.dumps({"device": device}) for device in devices]
    return pd.DataFrame({"ms_per_image": [float(n + 1) for n in range(len(devices))], "provenance": told})


def test_the_device_of_most_points_keeps_its_milliseconds() -> None:
    table = timed_on_one_device(table_of("gpu", "cpu", "cpu"))
    assert table["ms_per_image"].isna().tolist() == [True, False, False]
    words = format_untimed(table)
    assert words is not None
    assert words.startswith("on cpu; 1 of 3 points")


@pytest.mark.parametrize("devices", [("cpu", "cpu"), (None, None), ()])
def test_a_table_of_one_device_stays(devices: tuple[str | None, ...]) -> None:
    table = table_of(*devices)
    assert timed_on_one_device(table) is table
    assert format_untimed(table) is None


def test_a_point_timed_again_belongs_to_the_device_that_did_it() -> None:
    assert timed_on(json.dumps({"device": "gpu", "timed_with": {"device": "cpu"}})) == "cpu"
    assert timed_on(json.dumps({"device": "gpu"})) == "gpu"
    assert timed_on(None) == ""


def test_a_report_leaves_out_what_another_device_timed_and_says_so(tmp_path: Path) -> None:
    pipeline = Pipeline(tiny_study(family={"widths": [8]}), tmp_path / "out")
    pipeline.run()
    points = pipeline.results_db.table()["point"].tolist()
    for point in points[:2]:
        pipeline.results_db.set_time(point, 1e-9, {"device": "another"})
    family = pipeline.experiments["text2image"]
    table = study_table(pipeline, family)
    assert table[table["ms_per_image"].isna()]["point"].tolist() == points[:2]
    assert len(table) == len(points), "they compete by every other cost"
    assert f"2 of {len(points)} points were timed on another device" in _provenance(pipeline, family, table)["milliseconds"]
    by_ms = pareto(table, "ms_per_image", "mmd_efficientnet")
    assert (by_ms["ms_per_image"] > 1e-9).all()
    assert of_task(pipeline.results_db.table())["ms_per_image"].isna().sum() == 2
    told = CliRunner().invoke(app, ["recommend", "--database", str(tmp_path / "out" / "results.sqlite"), "--budget-nfe", "4"])
    assert f"note: milliseconds on {timed_on(table['provenance'].iloc[-1])}; 2 of" in told.stderr


def test_processors_of_one_model_name_are_told_apart() -> None:
    assert f"({torch.backends.cpu.get_cpu_capability()}), " in processor_name()
