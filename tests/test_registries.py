"""A solver, a metric and a feature extractor from outside the package: each registered once, used from sweep to report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from conftest import tiny_study
from isocost.analysis.recommend import recommend
from isocost.config.sampling import SolverSpec
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.solvers import SolverCoefficients, register_solver, solver_coefficients, unregister_solver
from isocost.errors import ConfigError
from isocost.estimate.accelerators import DEVICES, Cluster
from isocost.estimate.estimator import estimate_study
from isocost.evaluation.metric_registry import METRIC_GROUPS, METRICS, MetricInputs, register_metric
from isocost.metrics.feature_extractors import EXTRACTORS, register_extractor
from isocost.pipeline.pipeline import Pipeline
from isocost.report.build import report
from isocost.utils.registry import Registry


class TileColours:
    """The mean colour of each of 16 tiles."""

    id = "tile-colours/4x4"
    feature_dim = 48

    def __call__(self, images: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)


class GreyLevels(TileColours):
    """The mean grey level of each of 16 tiles."""

    id = "grey-levels/4x4"
    feature_dim = 16

    def __call__(self, images: Tensor) -> Tensor:
        return super().__call__(images).unflatten(1, (3, 16)).mean(1)


@pytest.fixture
def plugin() -> Iterator[None]:
    @register_solver("half-ddim")
    def half_ddim(spec: SolverSpec, num_steps: int, schedule: NoiseSchedule) -> SolverCoefficients:
        return solver_coefficients(SolverSpec(name="ddim", timestep_spacing=spec.timestep_spacing), num_steps, schedule)

    @register_extractor("tile-colours", label="tile colours")
    def tile_colours(feature_size: int, weights: str | None, device: Any) -> Any:
        return TileColours()

    @register_extractor("grey-levels", label="grey levels")
    def grey_levels(feature_size: int, weights: str | None, device: Any) -> Any:
        return GreyLevels()

    @register_metric("extremes", label=("darkest", "lightest"), columns=("darkest", "lightest"), higher_is_better=True)
    def extremes(inputs: MetricInputs) -> tuple[np.ndarray, ...]:
        return inputs.features.min(axis=1).astype(np.float64), inputs.features.max(axis=1).astype(np.float64)

    @register_metric("brightness", label="brightness", higher_is_better=True, note="mean level")
    def brightness(inputs: MetricInputs) -> np.ndarray:
        return inputs.features.mean(axis=1).astype(np.float64)

    yield
    unregister_solver("half-ddim")
    EXTRACTORS.remove("tile-colours")
    EXTRACTORS.remove("grey-levels")
    METRIC_GROUPS.remove("brightness")
    METRIC_GROUPS.remove("extremes")


@pytest.mark.usefixtures("plugin")
def test_registered_names_work_from_sweep_to_report(tmp_path: Path) -> None:
    study = tiny_study(
        family={"widths": [8]},
        train={"num_images": 32, "batch_size": 16, "lr": 1e-3},
        sweep={"num_steps": [2], "guidance": [1, 4], "batch_size": 16, "search": "race", "race": {"rungs": [16, 32]},
               "solvers": [{"name": "ddim"}, {"name": "half-ddim"}]},
        protocol={"num_images": 32, "num_reference": 64, "num_bootstrap": 20, "features": ["tile-colours", "grey-levels"],
                  "metrics": ["mmd", "brightness", "extremes"]},
        report={"metric": "brightness_tile_colours"},
    )  # fmt: skip
    not_counted = estimate_study(study, Cluster(1, DEVICES["H200"])).not_counted
    assert {text for text in not_counted if "tile-colours" in text} == {
        "the time of the extractor tile-colours: it is registered without gflop",
        "the disk space of the features of tile-colours: it is registered without feature_dim",
    }
    pipeline = Pipeline(study, tmp_path / "out")
    assert pipeline.run()
    written = report(pipeline, figure_formats=())
    table = pd.read_parquet(tmp_path / "out" / "table.parquet")
    assert {"mmd_tile_colours", "brightness_tile_colours", "brightness_tile_colours_low"} <= set(table.columns)
    assert table["mmd_grey_levels"].notna().all()
    assert (table["darkest_tile_colours"] < table["lightest_tile_colours"]).all()
    stored = pipeline.results_db.resamples(table["point"].iloc[0])
    assert stored is not None
    for column in ("darkest_tile_colours", "lightest_tile_colours", "brightness_grey_levels", "mmd_grey_levels"):
        assert stored.by_metric[column][0] == table[column].iloc[0]
    for kind, expected in (("shard", {"tile-colours"}), ("point", {"tile-colours", "grey-levels"})):
        folders = list((tmp_path / "out" / "artefacts" / kind).iterdir())
        assert folders
        for folder in folders:
            names = {file.name.rpartition("-")[0] for file in folder.glob("*-0*.safetensors")}
            assert names == expected, "a race extracts only the features that its metric needs"
    by_solver = {name: rows.set_index(["num_steps", "guidance"]) for name, rows in table.groupby("solver")}
    assert set(by_solver) == {"ddim/trailing", "half-ddim/trailing"}
    scores = [rows["brightness_tile_colours"] for rows in by_solver.values()]
    pd.testing.assert_series_equal(*scores), "the same coefficients give the same images"
    assert "brightness" in written.page.read_text(encoding="utf-8")
    best = recommend(table, "nfe", 100, "brightness_tile_colours")
    assert best.value == pytest.approx(table["brightness_tile_colours"].max())
    assert METRICS["brightness_tile_colours"].better == "higher"


@pytest.mark.usefixtures("plugin")
def test_a_name_is_registered_once_and_an_unknown_one_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="solver 'half-ddim' is registered already"):
        register_solver("half-ddim")(lambda *_: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigError, match="did you mean half-ddim"):
        solver_coefficients(SolverSpec(name="half-dim"), 4, NoiseSchedule.scaled_linear())


def test_what_is_removed_is_unknown_again() -> None:
    registry: Registry[int] = Registry("number")
    registry.add("one", 1)
    assert dict(registry) == {"one": 1}
    registry.remove("one")
    with pytest.raises(ConfigError, match="unknown number 'one'"):
        registry["one"]


def test_the_command_lists_the_names(isocost: Any) -> None:
    assert "ddim" in isocost("list", "solvers").answer["solvers"]
    assert "mmd" in isocost("list", "metrics").answer["metrics"]
    assert "inception" in isocost("list", "extractors").answer["extractors"]
