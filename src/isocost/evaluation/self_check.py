"""Checks of the metrics against known values: closed forms, results of reference packages, and published numbers.

Shapes: N images or pairs, D features, L classes.
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
"""Distances of the example images from `ex_ref` in the README of lpips 0.1.4, with three digits."""
NUM_IMAGES = 128
NUM_FEATURES = 32
NUM_INCEPTION_IMAGES = 64


@dataclass(frozen=True)
class KnownValue:
    """A computed value and the known value that it must equal within a tolerance.

    Attributes:
        what: the checked quantity.
        computed: the value that isocost computes.
        expected: the known value.
        tolerance: largest allowed absolute difference.
        source: origin of the known value.
    """

    what: str
    computed: float
    expected: float
    tolerance: float
    source: str

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; NaN never passes."""
        return bool(abs(self.computed - self.expected) <= self.tolerance)


def _with_relative_tolerance(what: str, computed: float, expected: float, tolerance: float, source: str) -> KnownValue:
    return KnownValue(what, computed, expected, tolerance * abs(expected), source)


def run_checks(inception: str | None = None) -> list[KnownValue]:
    """Compute all known values.

    Args:
        inception: source of FID's Inception weights. With it, KID and Inception score from images are checked too.

    Raises:
        ConfigError: the weights cannot be loaded, or a package is missing.
    """
    checks = [*_closed_forms(), *_lpips(), *_torch_fidelity()]
    return checks + (list(_from_images(inception)) if inception is not None else [])


def _closed_forms() -> Iterator[KnownValue]:
    scales = np.arange(1, 9) / 4
    first, second = Moments(np.zeros(8), np.diag(scales**2)), Moments(np.full(8, 0.5), np.diag((scales + 1) ** 2))
    yield _with_relative_tolerance(
        "Frechet, commuting Gaussians", frechet_from_moments(first, second), 8 * 0.25 + 8, 1e-12, "closed form"
    )
    rotation = np.array([[np.cos(0.6), -np.sin(0.6)], [np.sin(0.6), np.cos(0.6)]])
    a, b = np.diag([4.0, 1.0]), rotation @ np.diag([9.0, 0.25]) @ rotation.T
    # In two dimensions tr (AB)^½ = (tr AB + 2 (det AB)^½)^½.
    trace_of_root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    plane = frechet_from_moments(Moments(np.zeros(2), a), Moments(np.zeros(2), b))
    yield _with_relative_tolerance(
        "Frechet, Gaussians that do not commute", plane, np.trace(a + b) - 2 * trace_of_root, 1e-12, "closed form"
    )
    # Kernel (xy + 1)³ of {0, 1} and {1, 2}: 1 + 27 - 2 (1 + 1 + 8 + 27) / 4.
    kernel = squared_mmd(np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]]))
    yield _with_relative_tolerance("squared MMD of four numbers", kernel, 1 + 27 - 2 * 37 / 4, 1e-12, "closed form")
    classes = np.where(np.tile(np.eye(5), (20, 1)) > 0, 0.0, -800.0)
    yield _with_relative_tolerance(
        "Inception score of five certain classes", float(inception_score(classes)[0]), 5.0, 1e-12, "closed form"
    )
    line = np.arange(32.0)[:, None]
    near, far = compute_prdc(line, line + 0.25, k=3), compute_prdc(line, line + 1000, k=3)
    yield KnownValue("precision of a slightly shifted set", float(near.precision.mean()), 1.0, 0.0, "closed form")
    yield KnownValue("coverage of a set far away", float(far.coverage.mean()), 0.0, 0.0, "closed form")
    dark, light = np.full((1, 3, 16, 16), 40, dtype=np.uint8), np.full((1, 3, 16, 16), 56, dtype=np.uint8)
    yield _with_relative_tolerance(
        "PSNR of 16 levels", float(psnr(dark, light)[0]), 20 * np.log10(255 / 16), 1e-12, "closed form"
    )
    c1 = (0.01 * 255) ** 2
    luminance_term = (2 * 40 * 56 + c1) / (40**2 + 56**2 + c1)
    computed = float(ssim(torch.from_numpy(dark), torch.from_numpy(light))[0])
    yield _with_relative_tolerance("SSIM of two uniform images", computed, luminance_term, 1e-12, "closed form")


def _lpips() -> Iterator[KnownValue]:
    """LPIPS of the package's example images, from stored AlexNet feature maps; the heads are computed here."""
    with resources.as_file(resources.files("isocost.assets") / "lpips_example.safetensors") as file:
        stored = load_file(file)
    maps = {name: [stored[f"{name}.{depth}"] for depth in range(5)] for name in ("ex_ref", *LPIPS_PUBLISHED)}
    for name, published in LPIPS_PUBLISHED.items():
        computed = float(lpips_of_maps(maps["ex_ref"], maps[name])[0])
        yield KnownValue(f"LPIPS of the example pair ex_ref, {name}", computed, published, 5e-4, "lpips 0.1.4's README")


def _torch_fidelity() -> Iterator[KnownValue]:
    """torch-fidelity's functions on the same features of embedded scenes, sharp and with every second pixel removed."""
    try:
        from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
    except ModuleNotFoundError as error:
        raise ConfigError("isocost verify needs torch-fidelity: pip install torch-fidelity==0.4.0") from error
    sharp = _scenes()
    extractor = EfficientNetLite0(side=64)
    real = extractor(sharp).numpy()[:, :NUM_FEATURES]
    coarse = extractor(sharp[:, :, ::2, ::2]).numpy()[:, :NUM_FEATURES]
    source = f"torch-fidelity 0.4, {NUM_IMAGES} scenes, EfficientNet-lite0"
    a, b = torch.from_numpy(coarse), torch.from_numpy(real)
    # torch-fidelity sums in the dtype of the features; float64 features make only the formulas differ.
    statistics = [metric_fid.fid_features_to_statistics(features.double()) for features in (a, b)]
    theirs = metric_fid.fid_statistics_to_metric(*statistics, False)[metric_fid.KEY_METRIC_FID]
    yield _with_relative_tolerance("Frechet distance of features", frechet_distance(coarse, real), theirs, 1e-6, source)
    options = {"kid_subsets": 10, "kid_subset_size": 100, "verbose": False, "rng_seed": compat.SEED}
    kid = metric_kid.kid_features_to_metric(a.double(), b.double(), **options)
    ours = compat.kid(coarse, real, num_subsets=10, subset_size=100)
    yield _with_relative_tolerance(
        "KID of features, mean over subsets", ours.mean, kid[metric_kid.KEY_METRIC_KID_MEAN], 1e-6, source
    )
    score = metric_isc.isc_features_to_metric(a, 10, True, compat.SEED)[metric_isc.KEY_METRIC_ISC_MEAN]
    mean = compat.inception_score_of_splits(coarse).mean
    yield _with_relative_tolerance("Inception score of features as logits", mean, score, 1e-6, source)
    prc = metric_prc.prc_features_to_metric(a.double(), b.double(), prc_neighborhood=3, prc_batch_size=10_000, verbose=False)
    precision, recall = compat.precision_recall(coarse, real)
    yield _with_relative_tolerance("precision of features", precision, prc[metric_prc.KEY_METRIC_PRECISION], 1e-6, source)
    yield _with_relative_tolerance("recall of features", recall, prc[metric_prc.KEY_METRIC_RECALL], 1e-6, source)


def _from_images(weights: str) -> Iterator[KnownValue]:
    """torch-fidelity's and our KID and Inception score of the same images with the same Inception weights."""
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
    # KID with one subset of all images is the squared MMD. No Frechet distance: of so few images it compares rounding errors.
    kid = theirs["kernel_inception_distance_mean"]
    yield _with_relative_tolerance("KID from images", squared_mmd(features, real), kid, 1e-4, source)
    computed = float(inception_score(extractor.logits(features))[0])
    yield _with_relative_tolerance("Inception score from images", computed, theirs["inception_score_mean"], 1e-4, source)


def _scenes() -> torch.Tensor:
    """Images of embedded scenes, uint8 [N, 3, 64, 64]."""
    images = [render(scene(0, number), 64) for number in range(NUM_IMAGES)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
