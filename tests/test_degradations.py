"""Low-resolution images. Oracles: bicubic of PIL, convolution of torch, the published PSNR of bicubic on Set5 and Set14."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch.nn.functional import conv2d, pad

from isocost.config.finetune import DegradationSpec, DegradationStage
from isocost.data import degradations
from isocost.data.degradations import check_scale, degrade, resize
from isocost.errors import ConfigError
from isocost.metrics.image_similarity import psnr
from tiny_configs import scenes

BICUBIC = DegradationSpec(kind="bicubic")


def luminance(image: np.ndarray) -> np.ndarray:
    """MATLAB's rgb2ycbcr, [H, W, 3] -> [H, W]."""
    return 16 + image.astype(np.float64) @ np.array([65.481, 128.553, 24.966]) / 255


@pytest.mark.parametrize("size", [8, 16, 96])
def test_bicubic_equals_that_of_pil(size: int) -> None:
    images = scenes(4, 32)
    ours = resize(images, size)
    for channel, resized in zip(images.flatten(0, 1).numpy(), ours.flatten(0, 1).numpy(), strict=True):
        # In floating point, because PIL clips overshoots between its two passes over bytes.
        theirs = Image.fromarray(channel.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(theirs).clip(0, 255) - resized).max() <= 0.51


@pytest.mark.parametrize(("name", "published_db"), [("Set5", 28.43), ("Set14", 26.09)])
def test_bicubic_has_its_published_psnr(shared: Path, name: str, published_db: float) -> None:
    """PSNR of the luminance without four border pixels, as in the literature (image pairs of SelfExSR)."""
    values = []
    for file in sorted((shared / "sr" / name / "LR").iterdir()):
        low = np.asarray(Image.open(file).convert("RGB"))
        high = np.asarray(Image.open(shared / "sr" / name / "HR" / file.name.replace("LR", "HR")).convert("RGB"))
        size = (4 * low.shape[0], 4 * low.shape[1])
        large = resize(torch.from_numpy(low.copy()).permute(2, 0, 1)[None], size)[0].permute(1, 2, 0).numpy()
        assert large.shape == high.shape
        inner = (slice(4, -4), slice(4, -4))
        values.append(float(psnr(luminance(large)[inner][None], luminance(high)[inner][None])[0]))
    assert np.mean(values) == pytest.approx(published_db, abs=0.05)


def test_a_degradation_is_a_function_of_seed_image_and_draw() -> None:
    images = scenes(6, 32)
    spec = DegradationSpec()
    batch = degrade(images, range(6), spec, 4, seed=3)
    assert batch.shape == (6, 3, 8, 8)
    assert torch.equal(degrade(images[[4, 1]], [4, 1], spec, 4, seed=3), batch[[4, 1]])
    image = images[:1]
    coordinates = [(0, 4, 0), (1, 3, 0), (0, 3, 1)]
    others = [degrade(image, [i], spec, 4, seed=seed, draws=[draw])[0] for i, seed, draw in coordinates]
    assert all(not torch.equal(degraded, batch[0]) for degraded in others)
    assert torch.equal(degrade(image, [0], spec, 4, seed=3, draws=[0])[0], batch[0])


def test_degradations_differ_and_have_a_lower_psnr_than_bicubic() -> None:
    images = scenes(64, 32)
    mild, published = DegradationSpec(first=DegradationStage(blur_sigma=(0.2, 0.5), resize_range=(0.9, 1.1))), DegradationSpec()
    psnr_db = []
    for spec in (BICUBIC, mild, published):
        low = degrade(images, range(64), spec, 4, seed=0)
        psnr_db.append(float(psnr(resize(low, 32).numpy(), images.numpy()).mean()))
    assert psnr_db[0] > psnr_db[1] > psnr_db[2]


def test_a_filter_is_a_convolution_of_the_mirrored_image() -> None:
    values, kernel = torch.rand(3, 16, 12), torch.rand(7, 7)
    expected = conv2d(pad(values[:, None], (3, 3, 3, 3), mode="reflect"), kernel[None, None])[:, 0]
    assert torch.allclose(degradations._filter(values, kernel.numpy()), expected, atol=1e-5)


def test_a_kernel_may_be_larger_than_the_image() -> None:
    assert degradations._mirrored_indices(3, 5).tolist() == [1, 0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2, 1][: 3 + 10]
    blurred = degradations._filter(torch.full((3, 2, 2), 0.5), np.full((21, 21), 1 / 441, dtype=np.float32))
    assert torch.allclose(blurred, torch.full((3, 2, 2), 0.5), atol=1e-5)


@pytest.mark.parametrize("kind", range(6))
def test_kernels_sum_to_one_and_are_symmetric_about_the_centre(kind: int) -> None:
    random = np.random.default_rng(kind)
    for _ in range(20):
        kernel = degradations._blur_kernel(DegradationStage(), random)
        assert kernel.sum() == pytest.approx(1, abs=1e-5)
        assert np.allclose(kernel, kernel[::-1, ::-1], atol=1e-6)


def test_a_scale_must_divide_the_resolution() -> None:
    with pytest.raises(ConfigError, match=r"does not divide data\.resolution 32"):
        check_scale(32, 3, 4)
    with pytest.raises(ConfigError, match="the low resolution 2 is not a multiple of 4"):
        check_scale(32, 16, 4)
    check_scale(32, 4, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"blur_sigma": (3, 1)}, "runs backwards"), ({"resize_probabilities": (0.5, 0.5, 0.5)}, "do not add up to 1")],
)
def test_invalid_ranges_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DegradationStage(**changes)
