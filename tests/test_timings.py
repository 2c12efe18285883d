"""Milliseconds of different devices are never compared."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from finished_study import finished_spec
from isocost.analysis.pareto import pareto
from isocost.analysis.results_table import of_task
from isocost.analysis.timings import format_excluded_timings, keep_one_timing_device, timing_device
from isocost.cli import app
from isocost.pipeline.pipeline import Pipeline
from isocost.report.build import _provenance, study_table
from isocost.utils.environment import processor_name


def table_of(*devices: str | None) -> pd.DataFrame:
    provenance = [None if device is None else json.dumps({"device": device}) for device in devices]
    return pd.DataFrame({"ms_per_image": [float(n + 1) for n in range(len(devices))], "provenance": provenance})


def test_the_device_of_most_points_keeps_its_milliseconds() -> None:
    table = keep_one_timing_device(table_of("gpu", "cpu", "cpu"))
    assert table["ms_per_image"].isna().tolist() == [True, False, False]
    note = format_excluded_timings(table)
    assert note is not None
    assert note.startswith("measured on cpu; 1 of 3 points")


@pytest.mark.parametrize("devices", [("cpu", "cpu"), (None, None), ()])
def test_a_table_of_one_device_stays(devices: tuple[str | None, ...]) -> None:
    table = table_of(*devices)
    assert keep_one_timing_device(table) is table
    assert format_excluded_timings(table) is None


def test_a_remeasured_point_belongs_to_the_device_of_the_new_measurement() -> None:
    assert timing_device(json.dumps({"device": "gpu", "timed_with": {"device": "cpu"}})) == "cpu"
    assert timing_device(json.dumps({"device": "gpu"})) == "gpu"
    assert timing_device(None) == ""


def test_a_report_leaves_out_and_mentions_times_of_another_device(family_copy: Path) -> None:
    pipeline = Pipeline(finished_spec(), family_copy)
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
    outcome = CliRunner().invoke(app, ["recommend", "--database", str(family_copy / "results.sqlite"), "--budget-nfe", "4"])
    assert f"note: milliseconds measured on {timing_device(table['provenance'].iloc[-1])}; 2 of" in outcome.stderr


def test_the_processor_name_contains_the_instruction_set() -> None:
    assert f"({torch.backends.cpu.get_cpu_capability()}), " in processor_name()
