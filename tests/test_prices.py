"""Money and energy: price files, US dollars per 1,000 images, joules that a device reports or that stay absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import isocost
from conftest import assert_refused
from finished_study import finished_spec
from isocost.analysis.prices import USD_COLUMN, with_usd
from isocost.analysis.recommend import recommend
from isocost.config.prices import load_prices
from isocost.errors import ConfigError
from isocost.pipeline.pipeline import Pipeline
from isocost.report.build import report
from isocost.sampling import latency_stages
from isocost.sweep import worker
from isocost.utils.device import DeviceSample, HostMonitor
from synthetic_results import synthetic_table

METRIC = "mmd_efficientnet"
H100 = "NVIDIA H100 80GB HBM3"


def timed_on(device: str, **columns: Any) -> pd.DataFrame:
    return (
        synthetic_table()
        .drop(columns=[USD_COLUMN, "joules_per_image"])
        .assign(provenance=json.dumps({"device": device}), **columns)
    )


def write_prices(folder: Path, devices: str = "[{device: H100, usd_per_hour: 3.6}]", date: str = '"2026-12-01"') -> Path:
    file = folder / "prices.yaml"
    file.write_text(f"date: {date}\ndevices: {devices}\n", encoding="utf-8")
    return file


# --- US dollars -------------------------------------------------------------------------------------------------------


def test_dollars_are_time_times_price(tmp_path: Path) -> None:
    """At 3.6 US dollars per hour a millisecond costs a millionth of a dollar."""
    table, note = with_usd(timed_on(H100), str(write_prices(tmp_path)))
    assert table[USD_COLUMN].tolist() == pytest.approx((table["ms_per_image"] * 1e-3).tolist())
    assert f"{H100} at 3.6 US dollars per hour" in note
    assert "2026-12-01" in note


def test_points_without_a_time_have_no_price(tmp_path: Path) -> None:
    times = synthetic_table()["ms_per_image"].where(lambda ms: ms.index > 3)
    table, _ = with_usd(timed_on(H100, ms_per_image=times), str(write_prices(tmp_path)))
    assert table[USD_COLUMN].isna().tolist() == times.isna().tolist()


def test_the_longest_name_in_whole_words_gives_the_price(tmp_path: Path) -> None:
    devices = (
        "[{device: A10, usd_per_hour: 1}, {device: a100, usd_per_hour: 2}, {device: NVIDIA A100-SXM4-40GB, usd_per_hour: 3}]"
    )
    prices = load_prices(write_prices(tmp_path, devices))
    names = ("NVIDIA A10", "NVIDIA A100 80GB PCIe", "NVIDIA A100-SXM4-40GB", "NVIDIA RTX A1000", "L4")
    found = [prices.price_of(name) for name in names]
    assert [None if price is None else price.usd_per_hour for price in found] == [1, 2, 3, None, None]


def test_the_shipped_prices_have_a_date_and_sources() -> None:
    prices = load_prices()
    assert prices.date >= "2026"
    assert all(price.source for price in prices.devices)
    assert prices.price_of(H100) is not None


def test_a_report_keeps_its_prices_and_a_file_replaces_them(tmp_path: Path) -> None:
    table = timed_on(H100, usd_per_1000=7.0)
    assert set(with_usd(table, None)[0][USD_COLUMN]) == {7.0}
    replaced, _ = with_usd(table, str(write_prices(tmp_path)))
    assert replaced[USD_COLUMN].tolist() == pytest.approx((table["ms_per_image"] * 1e-3).tolist())


@pytest.mark.parametrize(
    ("devices", "date", "message"),
    [
        ("[]", '"2026-12-01"', "give at least one device"),
        ("[{device: H100}]", '"2026-12-01"', "devices.0.usd_per_hour"),
        ("[{device: H100, usd_per_hour: 0}]", '"2026-12-01"', "usd_per_hour = 0"),
        ("[{device: H100, usd_per_hour: 3, currency: EUR}]", '"2026-12-01"', "currency"),
        ("[{device: H100, usd_per_hour: 3}]", "yesterday", "date = 'yesterday'"),
        ("[{device: L4, usd_per_hour: 3}]", '"2026-12-01"', f"no price for '{H100}'"),
    ],
)
def test_a_wrong_price_file_is_one_line(devices: str, date: str, message: str, tmp_path: Path, isocost: Any) -> None:
    timed_on(H100).to_parquet(tmp_path / "table.parquet")
    file = write_prices(tmp_path, devices, date)
    assert_refused(isocost("recommend", tmp_path, "--budget-usd", "1", "--prices", file), message)


def test_wrong_requests_are_one_line(tmp_path: Path, isocost: Any) -> None:
    timed_on("another device").to_parquet(tmp_path / "table.parquet")
    assert_refused(
        isocost("recommend", tmp_path, "--budget-usd", "1"),
        "the list that comes with isocost has no price for 'another device'",
    )
    assert_refused(isocost("recommend", tmp_path, "--budget-usd", "1", "--prices", tmp_path / "none.yaml"), "no such file")
    assert_refused(isocost("recommend", tmp_path, "--budget-nfe", "1", "--prices", "shipped"), "give --budget-usd too")
    assert_refused(isocost("recommend", tmp_path, "--budget-joules", "1"), "no point has a measured joules_per_image")
    timed_on("another device", ms_per_image=float("nan")).to_parquet(tmp_path / "table.parquet")
    assert_refused(isocost("recommend", tmp_path, "--budget-usd", "1"), "US dollars need ms_per_image, and no point has it")


def test_the_command_recommends_within_dollars(tmp_path: Path, isocost: Any) -> None:
    table = timed_on(H100)
    table.to_parquet(tmp_path / "table.parquet")
    file = write_prices(tmp_path)
    budget = float(table["ms_per_image"].median()) * 1e-3
    outcome = isocost("recommend", tmp_path, "--budget-usd", budget, "--prices", file)
    assert outcome.status == 0, outcome.err
    by_time = recommend(table, "ms_per_image", budget * 1e3, METRIC)
    assert outcome.answer["configuration"]["point"] == by_time.configuration.point
    assert "US dollars per 1,000 images" in outcome.err
    assert f"note: {H100} at 3.6 US dollars per hour" in outcome.err


def test_the_python_interface_takes_prices(tmp_path: Path) -> None:
    table, file = timed_on(H100), write_prices(tmp_path)
    budget = float(table["ms_per_image"].median()) * 1e-3
    advice = isocost.recommend(table, usd=budget, prices=file)
    assert advice.configuration.point == recommend(table, "ms_per_image", budget * 1e3, METRIC).configuration.point
    with pytest.raises(ConfigError, match="give usd= too"):
        isocost.recommend(table, nfe=16, prices=file)


@pytest.mark.slow
def test_the_report_of_a_study_with_prices_has_dollars(family_copy: Path, tmp_path: Path) -> None:
    name = json.loads(Pipeline(finished_spec(), family_copy).results_db.table()["provenance"].iloc[0])["device"]
    file = write_prices(tmp_path, json.dumps([{"device": name.split(",")[0], "usd_per_hour": 0.5}]))
    written = report(Pipeline(finished_spec(report={"prices": str(file)}), family_copy), figure_formats=())
    expected = 1000 * written.table["ms_per_image"] / 3.6e6 * 0.5
    assert written.table[USD_COLUMN].tolist() == pytest.approx(expected.tolist())
    assert "US dollars per 1,000 images" in written.page.read_text(encoding="utf-8")


# --- energy -----------------------------------------------------------------------------------------------------------


class MeteredMonitor(HostMonitor):
    """A host that reports 5 J more at every reading."""

    def __init__(self) -> None:
        super().__init__()
        self.joules = 0.0

    def read(self) -> DeviceSample:
        self.joules += 5.0
        return DeviceSample(energy_j=self.joules)


class Batch:
    """A run of four images."""

    batch_size = 4

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, on_stage_end: Any) -> None:
        self.runs += 1


def test_energy_is_the_difference_of_two_readings_over_the_images_between_them() -> None:
    run, seconds = Batch(), iter([0.0, 0.5, 1.0, 2.5])
    joules, num_images = latency_stages.measure_joules(run, MeteredMonitor(), lambda: next(seconds))  # type: ignore[arg-type]
    assert run.runs == 1 + 3, "one as warm-up, then until two seconds have passed"
    assert num_images == 12
    assert joules == pytest.approx(5.0 / 12)


@pytest.mark.slow
def test_remeasure_records_joules_where_the_device_tells(family_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(finished_spec(), family_copy)
    pipeline.remeasure(pipeline.runs[0])
    assert pipeline.results_db.table()["joules_per_image"].isna().all(), "a CPU reports none: absent, not 0"
    monkeypatch.setattr(worker, "device_monitor", lambda device: MeteredMonitor())
    monkeypatch.setattr(latency_stages, "ENOUGH_ENERGY_S", 0.0)
    pipeline.remeasure(pipeline.runs[0])
    table = pipeline.results_db.table()
    images = table["provenance"].map(lambda text: json.loads(text)["timed_with"]["num_energy_images"])
    assert table["joules_per_image"].tolist() == pytest.approx((5.0 / images).tolist())
    report(pipeline, figure_formats=())
    best = isocost.recommend(isocost.read_results(pipeline.out), joules=5.0)
    assert "J per image" in best.reason


def test_a_table_that_does_not_record_its_device_is_refused_in_one_line() -> None:
    table = synthetic_table().drop(columns=[USD_COLUMN, "joules_per_image"])
    for unknown in (table, table.assign(provenance="")):
        with pytest.raises(ConfigError, match="whose name is not recorded"):
            with_usd(unknown, None)


def test_a_report_skips_devices_without_a_price(tmp_path: Path) -> None:
    table = timed_on(H100)
    table["provenance"] = table["provenance"].where(table.index > 5, json.dumps({"device": "another"}))
    priced, note = with_usd(table, str(write_prices(tmp_path)), skips_unknown=True)
    assert priced[USD_COLUMN].isna().tolist() == (table.index <= 5).tolist()
    assert "no price for another" in note
