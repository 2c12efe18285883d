"""Distances of real photographs rise with the strength of a degradation, from the baseline of test against training split."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from isocost.config.evaluation import ProtocolSpec
from isocost.evaluation.confidence_intervals import Interval
from isocost.evaluation.evaluator import score
from isocost.evaluation.feature_store import SampleFeatures
from isocost.evaluation.image_sources import SourceImage, iter_samples
from isocost.evaluation.protocol import make_protocol
from isocost.evaluation.reference_set import ReferenceSet
from isocost.evaluation.reference_stats import extract_features
from isocost.metrics.efficientnet import EfficientNetLite0
from isocost.metrics.image_similarity import psnr, ssim
from isocost.metrics.lpips import load_lpips

NUM, NUM_REFERENCE, NUM_PAIRS, NUM_FEATURES, SIDE = 128, 384, 16, 64, 128
NAME = "efficientnet-lite0"
DISTANCES = ("mmd", "frechet", "frechet_infinity")


def blurred(image: Image.Image, radius: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


def noisy(image: Image.Image, deviation: float) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float64)
    noise = np.random.default_rng(int(pixels.sum())).standard_normal(pixels.shape)
    return Image.fromarray((pixels + deviation * noise).round().clip(0, 255).astype(np.uint8))


def jpeg_compressed(image: Image.Image, quality: float) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=int(quality))
    return Image.open(stream).convert("RGB")


Damage = tuple[Callable[[Image.Image, float], Image.Image], tuple[float, ...]]
DAMAGES: dict[str, Damage] = {
    "blur": (blurred, (0.7, 1.4, 2.8)),
    "noise": (noisy, (10, 25, 60)),
    "jpeg": (jpeg_compressed, (40, 20, 10)),
}


def stack(images: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def photographs(source: Path, num: int) -> list[Image.Image]:
    """`num` evenly spaced photographs of a source; they are sorted by kind."""
    samples = list(iter_samples(str(source), SIDE))
    return [Image.fromarray(samples[number * len(samples) // num].image) for number in range(num)]


def first_features(images: Tensor) -> dict[str, np.ndarray]:
    """The first NUM_FEATURES features of each image; a Frechet distance needs twice as many images as features."""
    source = (SourceImage(str(index), str(index), image) for index, image in enumerate(images))
    return {NAME: extract_features(source, {NAME: EfficientNetLite0(side=64)}).features[NAME][:, :NUM_FEATURES]}


@pytest.fixture(scope="module")
def real() -> list[Image.Image]:
    from conftest import SHARED

    if not SHARED.is_dir():
        pytest.skip("no folder of real data next to this checkout")
    return photographs(SHARED / "aerial" / "test-000.tar", NUM)


@pytest.fixture(scope="module")
def reference(real: list[Image.Image]) -> ReferenceSet:
    from conftest import SHARED

    features = first_features(stack(photographs(SHARED / "aerial" / "train-*.tar", NUM_REFERENCE)))
    protocol = make_protocol(
        ProtocolSpec(num_images=NUM, num_bootstrap=50),
        resolution=SIDE,
        extractor="",
        reference="train",
        num_reference=NUM_REFERENCE,
        prompts=[],
    )
    return ReferenceSet(protocol, {NAME: EfficientNetLite0(side=64)}, features, [])


@pytest.fixture(scope="module")
def baseline(real: list[Image.Image], reference: ReferenceSet) -> dict[str, Interval]:
    return score(SampleFeatures(first_features(stack(real))), reference, (*DISTANCES, "sliced_wasserstein"))


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.slow
def test_distances_rise_with_the_damage_from_the_baseline_of_test_against_train(
    kind: str, real: list[Image.Image], reference: ReferenceSet, baseline: dict[str, Interval]
) -> None:
    damage, levels = DAMAGES[kind]
    scores = [baseline]
    for level in levels:
        damaged = stack([damage(image, level) for image in real])
        scores.append(score(SampleFeatures(first_features(damaged)), reference, (*DISTANCES, "sliced_wasserstein")))
    # With 128 images its bias hides weak damage, so only the strongest level is compared.
    sliced = [intervals["sliced_wasserstein_efficientnet"].value for intervals in scores[1:]]
    assert sliced[-1] == max(sliced) > 1.15 * scores[0]["sliced_wasserstein_efficientnet"].value
    for name in baseline:
        if name.startswith("sliced_wasserstein"):
            continue
        values = [intervals[name].value for intervals in scores]
        assert values == sorted(set(values)), (name, values)


@pytest.mark.slow
def test_paired_metrics_get_worse_with_the_damage(real: list[Image.Image], shared: Path) -> None:
    lpips = load_lpips(shared / "lpips" / "alexnet.safetensors")
    originals = stack(real[:NUM_PAIRS])
    for damage, levels in DAMAGES.values():
        losses = []
        for level in levels:
            damaged = stack([damage(image, level) for image in real[:NUM_PAIRS]])
            with torch.inference_mode():
                distance = lpips(*(images.float() / 127.5 - 1 for images in (damaged, originals))).mean()
            losses.append((float(distance), -float(psnr(damaged, originals).mean()), -float(ssim(damaged, originals).mean())))
        for values in zip(*losses, strict=True):
            assert list(values) == sorted(set(values)), values
