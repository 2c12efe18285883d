"""The Python interface in a notebook: a study, results, a checkpoint loaded once, scores of arrays and folders, plots."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

import isocost
from conftest import plain_study
from finished_study import plain_finished
from isocost.errors import ConfigError
from isocost.metrics.feature_extractors import EXTRACTORS, register_extractor
from synthetic_results import synthetic_guides, synthetic_table
from tiny_configs import save, scenes

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def result(family_copy: Path) -> isocost.StudyResult:
    return isocost.run(isocost.Study.from_dict(plain_finished()), family_copy, device="cpu", figure_formats=())


@pytest.fixture(scope="module")
def checkpoint(result: isocost.StudyResult) -> Path:
    return result.out / "artefacts" / "checkpoint" / str(result.results["checkpoint"].iloc[-1])


def test_a_study_gives_results_a_recommendation_and_plots(result: isocost.StudyResult) -> None:
    assert {"size", "solver", "num_steps", "guidance", "nfe", "gflop", "mmd_efficientnet"} <= set(result.results.columns)
    assert result.results.equals(isocost.read_results(result.out)) or len(result.results) == len(
        isocost.read_results(result.out)
    )
    assert result.recommend(nfe=4).configuration.num_steps in (1, 2)
    assert result.plot("quality_vs_cost", cost="nfe").axes
    assert result.page.is_file()
    assert result._repr_markdown_() == result.summary


def test_a_study_is_read_from_yaml_with_overrides() -> None:
    root = Path(__file__).resolve().parents[1]
    study = isocost.Study.from_yaml(root / "studies" / "fashion.yaml", {"train.lr": 2e-4})
    assert isinstance(study, isocost.Study)
    assert study.train is not None
    assert study.train.lr == 2e-4
    with pytest.raises(isocost.ConfigError, match=r"study: train\.lr = -1"):
        isocost.Study.from_dict(plain_study(train={"num_images": 64, "lr": -1}))


def test_budgets_are_keywords() -> None:
    table = synthetic_table()
    one = isocost.recommend(table, nfe=16)
    assert one.cost == "nfe"
    both = isocost.recommend(table, nfe=16, gflop=1000, require={"alignment": 0.1})
    assert both.configuration == one.configuration
    with pytest.raises(
        isocost.ConfigError, match=r"unknown budget 'evaluations'; give one or more of .*nfe, gflop, ms, latency_ms"
    ):
        isocost.recommend(table, evaluations=4)
    with pytest.raises(isocost.ConfigError, match="no budget"):
        isocost.recommend(table)
    with pytest.raises(isocost.ConfigError, match="memory_gib needs a second budget"):
        isocost.recommend(table, memory_gib=4)


def test_a_checkpoint_loads_once_and_samples_the_same_images_again(checkpoint: Path) -> None:
    model = isocost.load_checkpoint(checkpoint, device="cpu", dtype=torch.float32)
    settings: dict[str, Any] = {"solver": "dpmsolver++2m", "num_steps": 2, "guidance": 3.0, "seed": 5}
    first = model.sample(["a red ring", "a star"], num_images=2, **settings)
    second = model.sample(["a red ring", "a star"], num_images=2, **settings)
    fresh = isocost.sample(checkpoint, ["a red ring", "a star"], num_images=2, **settings)
    assert np.array_equal(first.array, second.array)
    assert np.array_equal(first.array, fresh.array)
    assert first.array.shape == (2, 2, 32, 32, 3)
    assert len(first.images) == 4
    assert all(isinstance(image, Image.Image) for image in first.images)
    assert first._repr_png_().startswith(b"\x89PNG")
    assert model.sample("a star", num_steps=1).array.shape == (1, 1, 32, 32, 3)
    assert "fp32" in repr(model)


@pytest.mark.slow
def test_a_transformer_samples_the_same_images_again(tmp_path: Path) -> None:
    study = isocost.Study.from_dict(
        plain_study(family={"kind": "dit", "widths": [16]}, train={"num_images": 16, "batch_size": 16})
        | {"sweep": {"num_steps": [1], "guidance": [1], "batch_size": 16}}
    )
    run = isocost.run(study, tmp_path / "out", figure_formats=())
    model = isocost.load_checkpoint(run.out / "artefacts" / "checkpoint" / str(run.results["checkpoint"].iloc[0]))
    first, second = (model.sample("a star", num_steps=2, seed=1).array for _ in range(2))
    assert np.array_equal(first, second)


def test_mistakes_about_a_checkpoint_are_one_line(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(isocost.ConfigError, match="dtype = fp8: give fp32 or bf16"):
        isocost.load_checkpoint(checkpoint, dtype="fp8")
    with pytest.raises(isocost.ConfigError, match="device = cuda:7: not available here"):
        isocost.load_checkpoint(checkpoint, device="cuda:7")
    with pytest.raises(isocost.ConfigError, match="no such"):
        isocost.load_checkpoint(tmp_path / "absent")
    with pytest.raises(isocost.ConfigError, match="did you mean euler"):
        isocost.load_checkpoint(checkpoint).sample("a star", solver="eular")


# --- scores -----------------------------------------------------------------------------------------------------------


class TileColours:
    """The mean colour of each of 16 tiles."""

    id = "tile-colours/4x4"
    feature_dim = 48

    def __call__(self, images: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)


@pytest.fixture
def tile_colours() -> Any:
    register_extractor("tile-colours")(lambda feature_size, weights, device: TileColours())
    yield
    EXTRACTORS.remove("tile-colours")


@pytest.mark.usefixtures("tile_colours")
def test_arrays_tensors_images_and_folders_have_the_same_score(tmp_path: Path) -> None:
    generated, real = scenes(40, 32, seed=1), scenes(40, 32, seed=2)
    folder = save(tmp_path / "generated", generated, [f"{number:03d}" for number in range(40)])
    arrays = generated.permute(0, 2, 3, 1).numpy()
    forms = (generated, arrays, [Image.fromarray(image) for image in arrays], folder, str(folder))
    scores = [isocost.score(form, real, ["mmd", "precision_recall"], features=["tile-colours"]) for form in forms]
    assert set(scores[0]) == {"mmd_tile_colours", "precision_tile_colours", "recall_tile_colours"}
    for other in scores[1:]:
        assert other == scores[0]
    interval = scores[0]["mmd_tile_colours"]
    assert interval.low <= interval.value <= interval.high
    same = isocost.score(real, real, features=["tile-colours"])["mmd_tile_colours"]
    assert same.value < interval.value


@pytest.mark.usefixtures("tile_colours")
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((40, 3, 32, 32), np.uint8), r"an array of uint8 \[40, 3, 32, 32\]; give uint8 \[N, H, W, 3\]"),
        (torch.zeros(40, 3, 32, 32), r"a tensor of torch.float32"),
        (torch.zeros(3, 3, 32, 32, dtype=torch.uint8), "images: 3 images; give at least 32"),
        ([Image.new("RGBA", (32, 32))] * 40, "mode RGBA; convert it to RGB first"),
        ([1] * 40, "a int; give a folder"),
    ],
)
def test_images_of_another_kind_are_refused(images: Any, message: str) -> None:
    with pytest.raises(isocost.ConfigError, match=message):
        isocost.score(images, scenes(40, 32), features=["tile-colours"])


def test_names_are_listed_and_unknown_ones_refused() -> None:
    assert "dpmsolver++2m" in isocost.list_solvers()
    assert "frechet" in isocost.list_metrics()
    assert "inception" in isocost.list_extractors()
    table, guided = synthetic_table(), synthetic_guides(0.02)
    for name in isocost.list_plots():
        assert isocost.plot(name, guided if name.startswith("guide_") else table).axes, name
    with pytest.raises(isocost.ConfigError, match="no point with a guide has both"):
        isocost.plot("guide_frontier", table, cost="nfe")
    with pytest.raises(isocost.ConfigError, match="unknown plot 'quality'; known: quality_vs_cost"):
        isocost.plot("quality", table)
    with pytest.raises(isocost.ConfigError, match="unknown metric 'fidd'"):
        isocost.score(scenes(40, 32), scenes(40, 32), ["fidd"])


# --- the package ------------------------------------------------------------------------------------------------------


def test_the_version_is_that_of_the_package(isocost: Any) -> None:
    import isocost as package

    assert package.__version__ == isocost("--version").out.split()[-1]


def test_importing_the_package_loads_neither_torch_nor_pandas() -> None:
    code = "import isocost, sys; assert not {'torch', 'pandas', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_results_are_documented_columns(result: Any) -> None:
    assert isinstance(result.results, pd.DataFrame)
    for name in ("nfe", "gflop", "normalized_cost", "ms_per_image"):
        assert result.results[name].notna().all(), name
    assert result.results["latency_ms"].isna().all(), "only `isocost remeasure` measures it"
    with pytest.raises(ConfigError, match=r"no point has a measured latency_ms; `isocost remeasure STUDY`"):
        result.recommend(latency_ms=20)
