"""`remeasure` measures the milliseconds of every point again and changes nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import plain_study
from finished_study import finished_spec
from isocost.errors import ConfigError
from isocost.pipeline.pipeline import Pipeline
from isocost.sweep.worker import Worker
from isocost.utils.environment import provenance

LOADED_MS = 1e6


@pytest.fixture(scope="module")
def swept(family_copy: Path) -> Pipeline:
    return Pipeline(finished_spec(), family_copy)


@pytest.mark.slow
def test_every_point_is_timed_again_and_nothing_else_changes(swept: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    before = swept.results_db.table().set_index("point")
    for point in before.index:
        swept.results_db.set_time(point, LOADED_MS, {})
    timed: dict[str, list[Any]] = {"measure_ms_per_image": [], "measure_latency_ms": []}
    for name, points in timed.items():
        time_one = getattr(Worker, name)
        monkeypatch.setattr(
            Worker, name, lambda self, point, time_one=time_one, points=points: points.append(point) or time_one(self, point)
        )
    assert swept.remeasure(swept.runs[0]) == len(before) > 0
    after = swept.results_db.table().set_index("point")
    assert (after["ms_per_image"] > 0).all()
    assert (after["ms_per_image"] < LOADED_MS / 10).all()
    assert before["latency_ms"].isna().all(), "a sweep does not measure it"
    assert (after["latency_ms"] > 0).all()
    provenances = after["provenance"].map(json.loads)
    assert {item["timed_with"]["device"] for item in provenances} == {provenance()["device"]}
    assert {item["timed_with"]["num_images"] for item in provenances} == {32}, "full calls of the decoder"
    assert all(item["timed_with"]["num_latency_runs"] >= 3 for item in provenances)
    same = [name for name in before.columns if name not in ("ms_per_image", "latency_ms", "provenance")]
    assert before[same].equals(after[same])
    assert [json.loads(row)["device"] for row in before["provenance"]] == [item["device"] for item in provenances]
    works = after.groupby(["solver", "num_steps", "nfe"])[["ms_per_image", "latency_ms"]].nunique()
    assert (works == 1).all(axis=None), "points with the same passes share one measurement"
    assert [len(points) for points in timed.values()] == [len(works)] * 2
    assert len(works) < len(after)


@pytest.mark.slow
def test_more_steps_take_longer(swept: Pipeline) -> None:
    swept.remeasure(swept.runs[0])
    ms = swept.results_db.table().groupby("nfe")["ms_per_image"].first()
    assert ms.iloc[-1] > ms.iloc[0]


def test_points_that_get_a_further_metric_keep_their_measured_times(swept: Pipeline) -> None:
    for point in swept.results_db.points():
        swept.results_db.set_time(point, 5.0, {"device": "another"}, latency_ms=7.0)
    protocol = {**plain_study()["protocol"], "metrics": ["mmd", "precision_recall"]}
    assert Pipeline(finished_spec(protocol=protocol), swept.out).run()
    table = swept.results_db.table()
    assert table["precision_efficientnet"].notna().all()
    assert set(table["ms_per_image"]) == {5.0}
    assert set(table["latency_ms"]) == {7.0}
    assert {json.loads(text)["timed_with"]["device"] for text in table["provenance"]} == {"another"}


def test_without_the_checkpoint_nothing_is_timed(swept: Pipeline) -> None:
    for name in swept.runs[0].checkpoints.values():
        swept.store.remove("checkpoint", name)
    with pytest.raises(ConfigError, match="no checkpoint"):
        swept.remeasure(swept.runs[0])
