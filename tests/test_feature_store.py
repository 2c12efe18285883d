"""What a point keeps of its images: shards of features that come back as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from isocost.errors import RunError
from isocost.evaluation import feature_store as kept
from isocost.evaluation.feature_store import SampleFeatures, read_features, read_measured, write_features, write_measured

NAMES = ("inception", "clip-vit-b-32")


@pytest.fixture
def features() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: generator.gamma(1.0, size=(50, width)).astype(np.float32) for name, width in zip(NAMES, (20, 7), strict=True)}


def test_features_come_back_from_their_shards(
    tmp_path: Path, features: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "SHARD_SIZE", 16)
    write_features(tmp_path, features)
    assert len(list(tmp_path.glob("inception-*.safetensors"))) == 4
    again = read_features(tmp_path, NAMES)
    for name in NAMES:
        assert again[name].dtype == np.float32
        assert np.array_equal(again[name], features[name])


def test_float16_moves_a_feature_by_no_more_than_is_said(tmp_path: Path, features: dict[str, np.ndarray]) -> None:
    features["inception"][0, :3] = 1e-5, 1e-7, 65504
    write_features(tmp_path, features, "fp16")
    for name, again in read_features(tmp_path, NAMES).items():
        assert again.dtype == np.float32
        assert np.all(np.abs(again - features[name]) <= np.maximum(features[name] * 2.0**-11, 2.0**-25))


@pytest.mark.parametrize(("value", "said"), [(np.nan, "1 images have features"), (np.inf, "1 images"), (7e4, "too large")])
def test_what_cannot_be_kept_is_one_line(tmp_path: Path, features: dict[str, np.ndarray], value: float, said: str) -> None:
    features["inception"][4, 4] = value
    with pytest.raises(RunError, match=f"inception: .*{said}") as refused:
        write_features(tmp_path, features, "fp16")
    assert "\n" not in str(refused.value)


def test_a_point_comes_back_with_ids_and_alignment(tmp_path: Path, features: dict[str, np.ndarray]) -> None:
    measured = SampleFeatures(features, np.linspace(0, 1, 50), np.arange(50) * 2)
    write_measured(tmp_path, measured)
    again = read_measured(tmp_path, NAMES)
    assert again.ids is not None
    assert again.alignment is not None
    assert np.array_equal(again.ids, np.arange(50) * 2)
    assert np.array_equal(again.alignment, np.linspace(0, 1, 50))
    with pytest.raises(RunError, match="no features of dino"):
        read_measured(tmp_path, (*NAMES, "dino-vit-s-16"))


def test_a_point_of_one_file_is_read(tmp_path: Path, features: dict[str, np.ndarray]) -> None:
    matrix = torch.from_numpy(features["inception"])
    save_file({"features": matrix, "alignment": torch.ones(50).double()}, tmp_path / "measured.safetensors")
    again = read_measured(tmp_path, ("inception",))
    assert np.array_equal(again.features["inception"], features["inception"])
    assert again.alignment is not None
    assert again.ids is None
