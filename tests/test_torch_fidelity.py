"""Comparison of the distances and Inception with torch-fidelity 0.4, on the same features and from the same images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from isocost.config.data import ScenesSource
from isocost.data.latent_cache import load_images
from isocost.errors import ConfigError
from isocost.evaluation.self_check import run_checks
from isocost.metrics import inception
from isocost.metrics import torch_fidelity_compat as compat
from isocost.metrics.download import file_sha256
from isocost.metrics.frechet import frechet_distance
from isocost.metrics.image_similarity import inception_score
from isocost.metrics.inception import Inception


def features(num: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    """float32 [num, width], non-negative as pooled features are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(9)) / width**0.5
    return (torch.randn(num, width, generator=generator) @ mixing + shift).relu()


@pytest.fixture(scope="module")
def images() -> Tensor:
    """uint8 [48, 3, 40, 40]"""
    return load_images(ScenesSource(kind="scenes", num_images=48), 40, 0).images


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in torch-fidelity's own format: the state dict of its class, saved by torch."""
    file = tmp_path_factory.mktemp("weights") / Path(inception.URL).name
    with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], verbose=False)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")  # keeps features from dying out over 48 layers
    torch.save(network.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def ours(inception_file: Path) -> Inception:
    extractor = Inception(with_hash(inception_file))
    extractor.BATCH_SIZE = 4
    return extractor


def with_hash(file: Path) -> str:
    return f"{file}#sha256={file_sha256(file)}"


# --- the same features ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [16, 64, 256])
def test_fid_equals_torch_fidelity(width: int) -> None:
    a, b = features(2 * width, width, 0, 0.2), features(3 * width, width, 1)
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(x) for x in (a, b)), False)[KEY_METRIC_FID]
    assert frechet_distance(a.numpy(), b.numpy()) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.slow
def test_fid_equals_torch_fidelity_at_2048_features() -> None:
    a, b = features(4096, 2048, 0, 0.2), features(4096, 2048, 1)
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(x) for x in (a, b)), False)[KEY_METRIC_FID]
    assert frechet_distance(a.numpy(), b.numpy()) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize(("subsets", "size", "seed"), [(10, 50, 2020), (3, 120, 2020), (10, 50, 7)])
def test_kid_draws_the_subsets_of_torch_fidelity(subsets: int, size: int, seed: int) -> None:
    a, b = features(120, 32, 0, 0.2).double(), features(150, 32, 1).double()
    theirs = kid_features_to_metric(a, b, kid_subsets=subsets, kid_subset_size=size, rng_seed=seed, verbose=False)
    ours = compat.kid(a.numpy(), b.numpy(), num_subsets=subsets, subset_size=size, seed=seed)
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    assert ours.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-6)


def test_kid_of_subsets_larger_than_a_set_is_refused() -> None:
    with pytest.raises(ValueError, match="subsets of 1000 cannot be drawn from 120"):
        compat.kid(np.ones((120, 3)), np.ones((2000, 3)))


@pytest.mark.parametrize(("splits", "shuffle", "seed"), [(10, True, 2020), (1, False, 2020), (7, True, 5)])
def test_the_inception_score_has_the_splits_of_torch_fidelity(splits: int, shuffle: bool, seed: int) -> None:
    logits = 3 * features(203, 40, 2)
    theirs = isc_features_to_metric(logits, splits, shuffle, seed)
    ours = compat.inception_score_of_splits(logits.numpy(), num_splits=splits, shuffle=shuffle, seed=seed)
    assert ours.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert ours.std == pytest.approx(theirs["inception_score_std"], rel=1e-6, abs=1e-12)
    if splits == 1:
        assert inception_score(logits.numpy())[0] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("save_cpu_ram", [False, True])
def test_precision_and_recall_equal_torch_fidelity(k: int, save_cpu_ram: bool) -> None:
    a, b = features(300, 8, 0, 0.4), features(260, 8, 1)
    options = {"prc_neighborhood": k, "prc_batch_size": 100, "save_cpu_ram": save_cpu_ram, "verbose": False}
    theirs = prc_features_to_metric(a.double(), b.double(), **options)
    precision, recall = compat.precision_recall(a.numpy(), b.numpy(), k=k)
    assert 0.05 < recall < 0.99
    # torch-fidelity averages float32 numbers.
    assert precision == pytest.approx(theirs["precision"], rel=1e-6)
    assert recall == pytest.approx(theirs["recall"], rel=1e-6)


# --- the same images --------------------------------------------------------------------------------------------------


def test_the_weights_are_the_file_of_torch_fidelity() -> None:
    assert inception.URL == URL_INCEPTION_V3
    assert inception.SHA256.startswith(Path(inception.URL).stem.rpartition("-")[2])


@pytest.mark.slow
def test_inception_features_equal_torch_fidelity(ours: Inception, inception_file: Path, images: Tensor) -> None:
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_file), verbose=False
    )
    pooled, logits = theirs(images[:6])
    extracted = ours(images[:6])
    assert extracted.shape == (6, 2048)
    assert extracted.std() > 0
    torch.testing.assert_close(extracted, pooled, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ours.logits(extracted.numpy()), logits.numpy(), rtol=1e-4, atol=1e-5)
    assert file_sha256(inception_file)[:16] in ours.id


@pytest.mark.slow
def test_scores_from_images_equal_torch_fidelity(ours: Inception, inception_file: Path, images: Tensor, tmp_path: Path) -> None:
    coarse = images[:, :, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3)
    for name, subset in (("real", images[:10]), ("generated", coarse[10:20])):
        (tmp_path / name).mkdir()
        for number, image in enumerate(subset.permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image).save(tmp_path / name / f"{number:03d}.png")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "generated"),
        input2=str(tmp_path / "real"),
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        kid_subset_size=8,
        kid_subsets=5,
        isc_splits=3,
        cuda=False,
        verbose=False,
        cache=False,
        feature_extractor="inception-v3-compat",
        save_cpu_ram=True,
        feature_extractor_weights_path=str(inception_file),
    )
    real, generated = (ours(subset).numpy() for subset in (images[:10], coarse[10:20]))
    assert frechet_distance(generated, real) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    kid = compat.kid(generated, real, num_subsets=5, subset_size=8)
    assert kid.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4, abs=1e-9)
    score = compat.inception_score_of_splits(ours.logits(generated), num_splits=3)
    assert score.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    precision, recall = compat.precision_recall(generated, real)
    assert (precision, recall) == (pytest.approx(theirs["precision"], rel=1e-4), pytest.approx(theirs["recall"], rel=1e-4))


@pytest.mark.slow
def test_an_images_features_are_the_same_bits_in_any_batch_at_its_row(ours: Inception, images: Tensor) -> None:
    expected = ours(images[:6])
    assert torch.equal(ours(images[[9, 5]])[1], expected[5])
    assert torch.equal(ours(images[[4, 20, 7, 3]])[[0, 3]], expected[[4, 3]])


def test_loading_inception_does_not_change_the_random_state(inception_file: Path) -> None:
    torch.manual_seed(3)
    Inception(with_hash(inception_file))
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))


def test_weights_of_another_hash_are_refused_unless_the_hash_is_given(inception_file: Path) -> None:
    with pytest.raises(ConfigError, match="expected 6726825d0af5f729"):
        Inception(str(inception_file))
    with pytest.raises(ConfigError, match="expected 0000000000000000"):
        Inception(f"{inception_file}#sha256={'0' * 64}")


def test_weights_that_cannot_be_downloaded_name_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ConfigError, match=r"cannot be downloaded \(no route\); put the file at .*6726825d.pth"):
        Inception()


# --- verify -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_check_passes(inception_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isocost.evaluation.self_check.NUM_INCEPTION_IMAGES", 4)
    checks = run_checks(with_hash(inception_file))
    assert [check.what for check in checks if not check.passed] == []
    assert len(checks) == 17
    assert {"KID from images", "Inception score from images"} <= {check.what for check in checks}
