"""Anchors: values that are known beforehand, by closed forms, by the packages that others use, or as published.

Legend: N images or pairs, D features, L classes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from isocost.data.synthetic.scenes import render, scene
from isocost.errors import ConfigError
from isocost.metrics import torch_fidelity_compat as compat
from isocost.metrics.download import find_weights
from isocost.metrics.efficientnet import EfficientNetLite0
from isocost.metrics.frechet import Moments, frechet_distance, frechet_from_moments
from isocost.metrics.image_similarity import inception_score, psnr, ssim
from isocost.metrics.inception import SHA256, Inception
from isocost.metrics.lpips import lpips_of_maps
from isocost.metrics.mmd import squared_mmd
from isocost.metrics.precision_recall import compute_prdc

LPIPS_PUBLISHED = {"ex_p0": 0.722, "ex_p1": 0.138}
"""Distances of the example images from `ex_ref`, as lpips 0.1.4's README prints them, three digits."""
NUM_IMAGES = 128
NUM_FEATURES = 32
NUM_INCEPTION_IMAGES = 64


@dataclass(frozen=True)
class KnownValue:
    """A value that was found, the one that is known, and how far apart the two may lie."""

    what: str
    found: float
    expected: float
    tolerance: float
    source: str

    @property
    def passed(self) -> bool:
        """Whether the two lie within the tolerance; a number that is none passes nothing."""
        return bool(abs(self.found - self.expected) <= self.tolerance)


def relative(what: str, found: float, expected: float, tolerance: float, source: str) -> KnownValue:
    """An anchor whose tolerance is a share of the expected value."""
    return KnownValue(what, found, expected, tolerance * abs(expected), source)


def run_checks(inception: str | None = None) -> list[KnownValue]:
    """All anchors that can be had here; with a place of FID's Inception weights also from images to KID.

    Raises:
        ConfigError: the weights are not to be had, or a package is missing.
    """
    found = [*_closed_forms(), *_lpips(), *_torch_fidelity()]
    return found + (list(_from_images(inception)) if inception is not None else [])


def _closed_forms() -> Iterator[KnownValue]:
    scales = np.arange(1, 9) / 4
    one, other = Moments(np.zeros(8), np.diag(scales**2)), Moments(np.full(8, 0.5), np.diag((scales + 1) ** 2))
    yield relative("Frechet, commuting Gaussians", frechet_from_moments(one, other), 8 * 0.25 + 8, 1e-12, "closed form")
    turn = np.array([[np.cos(0.6), -np.sin(0.6)], [np.sin(0.6), np.cos(0.6)]])
    a, b = np.diag([4.0, 1.0]), turn @ np.diag([9.0, 0.25]) @ turn.T
    # In the plane tr (AB)^½ = (tr AB + 2 (det AB)^½)^½.
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    plane = frechet_from_moments(Moments(np.zeros(2), a), Moments(np.zeros(2), b))
    yield relative("Frechet, Gaussians that do not commute", plane, np.trace(a + b) - 2 * root, 1e-12, "closed form")
    # Kernel (xy + 1)³ of {0, 1} and {1, 2}: 1 + 27 - 2 (1 + 1 + 8 + 27) / 4.
    kernel = squared_mmd(np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]]))
    yield relative("squared MMD of four numbers", kernel, 1 + 27 - 2 * 37 / 4, 1e-12, "by hand")
    classes = np.where(np.tile(np.eye(5), (20, 1)) > 0, 0.0, -800.0)
    yield relative("Inception score of five sure classes", float(inception_score(classes)[0]), 5.0, 1e-12, "closed form")
    line = np.arange(32.0)[:, None]
    own, far = compute_prdc(line, line + 0.25, neighbour=3), compute_prdc(line, line + 1000, neighbour=3)
    yield KnownValue("precision of a set beside itself", float(own.precision.mean()), 1.0, 0.0, "by hand")
    yield KnownValue("coverage of a set far away", float(far.coverage.mean()), 0.0, 0.0, "by hand")
    dark, light = np.full((1, 3, 16, 16), 40, dtype=np.uint8), np.full((1, 3, 16, 16), 56, dtype=np.uint8)
    yield relative("PSNR of 16 levels", float(psnr(dark, light)[0]), 20 * np.log10(255 / 16), 1e-12, "closed form")
    c1 = (0.01 * 255) ** 2
    even = (2 * 40 * 56 + c1) / (40**2 + 56**2 + c1)
    found = float(ssim(torch.from_numpy(dark), torch.from_numpy(light))[0])
    yield relative("SSIM of two even images", found, even, 1e-12, "closed form")


def _lpips() -> Iterator[KnownValue]:
    """The stored maps are AlexNet's on lpips's example images; the heads and the rest are computed here."""
    with resources.as_file(resources.files("isocost.assets") / "lpips_example.safetensors") as file:
        stored = load_file(file)
    maps = {name: [stored[f"{name}.{depth}"] for depth in range(5)] for name in ("ex_ref", *LPIPS_PUBLISHED)}
    for name, published in LPIPS_PUBLISHED.items():
        found = float(lpips_of_maps(maps["ex_ref"], maps[name])[0])
        yield KnownValue(f"LPIPS of the example pair ex_ref, {name}", found, published, 5e-4, "lpips 0.1.4's README")


def _torch_fidelity() -> Iterator[KnownValue]:
    """torch-fidelity's functions on features of the same images: embedded scenes, sharp and with every second pixel gone."""
    try:
        from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
    except ModuleNotFoundError as error:
        raise ConfigError("verify compares with torch-fidelity: pip install torch-fidelity==0.4.0") from error
    sharp = _scenes()
    extractor = EfficientNetLite0(side=64)
    real = extractor(sharp).numpy()[:, :NUM_FEATURES]
    coarse = extractor(sharp[:, :, ::2, ::2]).numpy()[:, :NUM_FEATURES]
    source = f"torch-fidelity 0.4, {NUM_IMAGES} scenes, EfficientNet-lite0"
    a, b = torch.from_numpy(coarse), torch.from_numpy(real)
    # torch-fidelity sums in the precision of the features; float64 on both sides compares the formulas.
    statistics = [metric_fid.fid_features_to_statistics(one.double()) for one in (a, b)]
    theirs = metric_fid.fid_statistics_to_metric(*statistics, False)[metric_fid.KEY_METRIC_FID]
    yield relative("Frechet distance of features", frechet_distance(coarse, real), theirs, 1e-6, source)
    options = {"kid_subsets": 10, "kid_subset_size": 100, "verbose": False, "rng_seed": compat.SEED}
    kid = metric_kid.kid_features_to_metric(a.double(), b.double(), **options)
    ours = compat.kid(coarse, real, num_subsets=10, subset_size=100)
    yield relative("KID of features, mean over subsets", ours.mean, kid[metric_kid.KEY_METRIC_KID_MEAN], 1e-6, source)
    score = metric_isc.isc_features_to_metric(a, 10, True, compat.SEED)[metric_isc.KEY_METRIC_ISC_MEAN]
    mean = compat.inception_score_of_splits(coarse).mean
    yield relative("Inception score of features as logits", mean, score, 1e-6, source)
    prc = metric_prc.prc_features_to_metric(a.double(), b.double(), prc_neighborhood=3, prc_batch_size=10_000, verbose=False)
    precision, recall = compat.precision_recall(coarse, real)
    yield relative("precision of features", precision, prc[metric_prc.KEY_METRIC_PRECISION], 1e-6, source)
    yield relative("recall of features", recall, prc[metric_prc.KEY_METRIC_RECALL], 1e-6, source)


def _from_images(weights: str) -> Iterator[KnownValue]:
    """torch-fidelity's whole way and ours on the same images with the same Inception weights."""
    import torch_fidelity

    extractor, file = Inception(weights), find_weights(weights, known_sha256=SHA256, title="inception")
    sharp = _scenes()[:NUM_INCEPTION_IMAGES]
    coarse = sharp[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3)
    with tempfile.TemporaryDirectory() as folder:
        for name, images in (("sharp", sharp), ("coarse", coarse)):
            (Path(folder) / name).mkdir()
            for number, image in enumerate(images):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(Path(folder) / name / f"{number:04d}.png")
        theirs = torch_fidelity.calculate_metrics(
            input1=f"{folder}/coarse",
            input2=f"{folder}/sharp",
            kid=True,
            kid_subsets=1,
            kid_subset_size=len(sharp),
            isc=True,
            isc_splits=1,
            cuda=False,
            verbose=False,
            cache=False,
            feature_extractor_weights_path=str(file.path),
        )
    features, real = extractor(coarse).cpu().numpy(), extractor(sharp).cpu().numpy()
    source = f"torch-fidelity 0.4, {len(sharp)} scenes"
    # One subset of all images is the squared MMD itself; a Frechet distance of so few would compare rounding errors.
    kid = theirs["kernel_inception_distance_mean"]
    yield relative("KID from images", squared_mmd(features, real), kid, 1e-4, source)
    found = float(inception_score(extractor.logits(features))[0])
    yield relative("Inception score from images", found, theirs["inception_score_mean"], 1e-4, source)


def _scenes() -> torch.Tensor:
    """Embedded images, uint8 [N, 3, 64, 64]."""
    drawn = [render(scene(0, number), 64) for number in range(NUM_IMAGES)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)
