"""The feature store of a point: features read from shards equal the written ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from isocost.errors import RunError
from isocost.evaluation import feature_store
from isocost.evaluation.feature_store import (
    SampleFeatures,
    read_features,
    read_sample_features,
    write_features,
    write_sample_features,
)

NAMES = ("inception", "clip-vit-b-32")


@pytest.fixture
def features() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: generator.gamma(1.0, size=(50, width)).astype(np.float32) for name, width in zip(NAMES, (20, 7), strict=True)}


def test_features_are_read_back_from_shards(
    tmp_path: Path, features: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "SHARD_SIZE", 16)
    write_features(tmp_path, features)
    assert len(list(tmp_path.glob("inception-*.safetensors"))) == 4
    loaded = read_features(tmp_path, NAMES)
    for name in NAMES:
        assert loaded[name].dtype == np.float32
        assert np.array_equal(loaded[name], features[name])


def test_float16_changes_a_feature_by_no_more_than_documented(tmp_path: Path, features: dict[str, np.ndarray]) -> None:
    features["inception"][0, :3] = 1e-5, 1e-7, 65504
    write_features(tmp_path, features, "fp16")
    for name, loaded in read_features(tmp_path, NAMES).items():
        assert loaded.dtype == np.float32
        assert np.all(np.abs(loaded - features[name]) <= np.maximum(features[name] * 2.0**-11, 2.0**-25))


@pytest.mark.parametrize(("value", "message"), [(np.nan, "1 images have NaN"), (np.inf, "1 images"), (7e4, "too large")])
def test_features_that_cannot_be_saved_give_one_line(
    tmp_path: Path, features: dict[str, np.ndarray], value: float, message: str
) -> None:
    features["inception"][4, 4] = value
    with pytest.raises(RunError, match=f"inception: .*{message}") as refused:
        write_features(tmp_path, features, "fp16")
    assert "\n" not in str(refused.value)


def test_a_points_ids_and_alignment_are_read_back(tmp_path: Path, features: dict[str, np.ndarray]) -> None:
    samples = SampleFeatures(features, np.linspace(0, 1, 50), np.arange(50) * 2)
    write_sample_features(tmp_path, samples)
    loaded = read_sample_features(tmp_path, NAMES)
    assert loaded.ids is not None
    assert loaded.alignment is not None
    assert np.array_equal(loaded.ids, np.arange(50) * 2)
    assert np.array_equal(loaded.alignment, np.linspace(0, 1, 50))
    with pytest.raises(RunError, match="no features of dino"):
        read_sample_features(tmp_path, (*NAMES, "dino-vit-s-16"))
