"""Milliseconds: the stages of sampling are measured separately, and different devices are never compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from finished_study import BASE, copy_trained, finished_spec
from isocost.analysis.costs import COSTS
from isocost.analysis.pareto import pareto
from isocost.analysis.results_table import of_task
from isocost.analysis.timings import format_excluded_timings, keep_one_timing_device, timing_device
from isocost.cli import app
from isocost.pipeline import sweep_runner
from isocost.pipeline.pipeline import Pipeline
from isocost.pipeline.study_table import study_table
from isocost.report.build import report
from isocost.sampling import generate
from isocost.sampling.generate import make_engine
from isocost.sampling.latency import load_components
from isocost.sampling.latency_stages import LoadedModel
from isocost.sweep import worker
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


def test_the_device_of_most_latencies_keeps_them() -> None:
    records = [{"device": "gpu"}] * 3 + [{"device": "gpu", "timed_with": {"device": "cpu", "num_latency_runs": 3}}] * 2
    table = pd.DataFrame({"ms_per_image": 1.0, "latency_ms": [None] * 3 + [5.0, 6.0], "provenance": map(json.dumps, records)})
    kept = keep_one_timing_device(table)
    assert kept["ms_per_image"].notna().tolist() == [True] * 3 + [False] * 2
    assert kept["latency_ms"].dropna().tolist() == [5.0, 6.0], "all latencies are of one device"
    assert format_excluded_timings(kept, "latency_ms") is None
    records[4] = {"device": "gpu", "timed_with": {"device": "another", "num_latency_runs": 3}}
    kept = keep_one_timing_device(table.assign(provenance=list(map(json.dumps, records))))
    assert kept["latency_ms"].notna().sum() == 1
    note = format_excluded_timings(kept, "latency_ms")
    assert note is not None
    assert note.startswith("measured on another; 1 of 5 points were timed on another device")


def test_a_remeasured_point_belongs_to_the_device_of_the_new_measurement() -> None:
    assert timing_device(json.dumps({"device": "gpu", "timed_with": {"device": "cpu"}})) == "cpu"
    assert timing_device(json.dumps({"device": "gpu"})) == "gpu"
    assert timing_device(None) == ""


@pytest.mark.slow
def test_a_report_leaves_out_and_mentions_times_of_another_device(family_copy: Path) -> None:
    pipeline = Pipeline(finished_spec(), family_copy)
    points = pipeline.results_db.table()["point"].tolist()
    for point in points[:2]:
        pipeline.results_db.set_time(point, 1e-9, {"device": "another"})
    family = pipeline.experiments["text2image"]
    table = study_table(pipeline, family)
    assert table[table["ms_per_image"].isna()]["point"].tolist() == points[:2]
    assert len(table) == len(points), "they compete by every other cost"
    report(pipeline, figure_formats=())
    page = (family_copy / "report" / "index.html").read_text(encoding="utf-8")
    assert f"2 of {len(points)} points were timed on another device" in page
    by_ms = pareto(table, "ms_per_image", "mmd_efficientnet")
    assert (by_ms["ms_per_image"] > 1e-9).all()
    assert of_task(pipeline.results_db.table())["ms_per_image"].isna().sum() == 2
    outcome = CliRunner().invoke(app, ["recommend", "--database", str(family_copy / "results.sqlite"), "--budget-nfe", "4"])
    assert f"note: milliseconds measured on {timing_device(table['provenance'].iloc[-1])}; 2 of" in outcome.stderr


def test_the_processor_name_contains_the_instruction_set() -> None:
    assert f"({torch.backends.cpu.get_cpu_capability()}), " in processor_name()


class VirtualClock:
    """Time that passes only in the stages of sampling, with a known cost each."""

    def __init__(self, prompt_s: float, evaluation_s: float, decoded_image_s: float) -> None:
        self.prompt_s, self.evaluation_s, self.decoded_image_s = prompt_s, evaluation_s, decoded_image_s
        self.time_s, self.lock = 0.0, Lock()

    def now(self) -> float:
        return self.time_s

    def pass_time(self, seconds: float) -> None:
        with self.lock:
            self.time_s += seconds

    def costing(self, function: Callable[..., Any], seconds_per_item: float) -> Callable[..., Any]:
        """The function, with a cost for every item of its first argument."""

        def timed(items: Any, *arguments: Any) -> Any:
            self.pass_time(seconds_per_item * len(items))
            return function(items, *arguments)

        return timed


@pytest.mark.parametrize(
    "decoded_image_s",
    [
        pytest.param(0.001, id="decoding worth a tenth", marks=pytest.mark.slow),
        pytest.param(0.05, id="decoding worth five evaluations"),
    ],
)
@pytest.mark.slow
def test_every_point_has_its_true_milliseconds_on_a_virtual_clock(
    finished_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded_image_s: float
) -> None:
    clock = VirtualClock(prompt_s=0.003, evaluation_s=0.01, decoded_image_s=decoded_image_s)
    study = finished_spec(sweep={**BASE["sweep"], "num_steps": [1, 2, 4, 8], "guidance": [1, 1.5, 4]})
    pipeline = Pipeline(study, copy_trained(finished_study / "family", tmp_path / "out"))

    def timed_engine(*arguments: Any, **options: Any) -> Any:
        engine = make_engine(*arguments, **options)
        engine.denoise = clock.costing(engine.denoise, clock.evaluation_s)
        return engine

    monkeypatch.setattr(worker, "make_engine", timed_engine)
    monkeypatch.setattr(sweep_runner, "Worker", partial(worker.Worker, now=clock.now))
    monkeypatch.setattr(generate, "time", SimpleNamespace(perf_counter=clock.now))
    autoencoder, text_encoder = pipeline.assets.load_or_train_autoencoder(), pipeline.assets.text_encoder
    monkeypatch.setattr(autoencoder, "decode", clock.costing(autoencoder.decode, clock.decoded_image_s))
    monkeypatch.setattr(text_encoder, "encode", clock.costing(text_encoder.encode, clock.prompt_s))
    assert pipeline.run()
    table = pipeline.results_db.table()
    assert len(table) == 4 * 3 + 2, "with the setting of the snapshots"
    true_ms = 1000 * (clock.prompt_s + table["nfe"] * clock.evaluation_s + clock.decoded_image_s)
    assert (table["ms_per_image"] / true_ms).tolist() == pytest.approx([1.0] * len(table), rel=0.01)


@pytest.mark.slow
def test_every_point_has_its_true_latency_on_a_virtual_clock(family_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = VirtualClock(prompt_s=0.003, evaluation_s=0.01, decoded_image_s=0.02)
    call_s = 0.07  # a call of the network takes the same time for one row and for two, unlike full batches

    def timed_components(*arguments: Any) -> LoadedModel:
        model = load_components(*arguments)
        denoise = model.network.denoise()

        def timed_denoise(*inputs: Any) -> Any:
            clock.pass_time(call_s)
            return denoise(*inputs)

        monkeypatch.setattr(model.network, "denoise", lambda: timed_denoise)
        monkeypatch.setattr(model.autoencoder, "decode", clock.costing(model.autoencoder.decode, clock.decoded_image_s))
        monkeypatch.setattr(model.text_encoder, "encode", clock.costing(model.text_encoder.encode, clock.prompt_s))
        return model

    monkeypatch.setattr(worker, "load_components", timed_components)
    monkeypatch.setattr(sweep_runner, "Worker", partial(worker.Worker, now=clock.now))
    pipeline = Pipeline(finished_spec(), family_copy)
    assert pipeline.remeasure(pipeline.runs[0]) == 5
    table = pipeline.results_db.table()
    true_ms = 1000 * (clock.prompt_s + table["num_steps"] * call_s + clock.decoded_image_s)
    assert (table["latency_ms"] / true_ms).tolist() == pytest.approx([1.0] * len(table), rel=0.01)
    written = report(pipeline, figure_formats=())
    assert written.table["latency_ms"].tolist() == pytest.approx(table["latency_ms"].tolist())
    page = (family_copy / "report" / "index.html").read_text(encoding="utf-8")
    assert COSTS["latency_ms"].axis in page
    outcome = CliRunner().invoke(app, ["recommend", str(family_copy), "--budget-latency-ms", "95"])
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(outcome.stdout.splitlines()[-1])["configuration"]["num_steps"] == 1, "two steps take 163 ms"
