"""What scoring costs: Frechet distance beside scipy.linalg.sqrtm, and features beside the sampling that they are taken of.

    python benchmarks/metrics.py [--quick] [--json]

Random weights and Gaussian features: this measures time, never quality. What is compared runs in turns within one process.
Sampling is the network's passes alone, the cheapest it can be. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from results import Row, print_results, row
from torch import Tensor
from torch.nn import Module

from isocost.config.model import ModelSpec
from isocost.metrics.efficientnet import EfficientNetLite0
from isocost.metrics.frechet import Moments, frechet_from_moments
from isocost.models.unet import build_unet

WIDTH, NUM = 2048, 6000
DEMO_WIDTHS, DEMO_STEPS, DEMO_BATCH = (8, 16, 24), 16, 64
PAPER_WIDTH, PAPER_STEPS = 320, 4


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def timed(call: Callable[[Moments, Moments], float], a: Moments, b: Moments) -> tuple[float, float]:
    """How long a distance takes, and its value."""
    started = time.perf_counter()
    value = call(a, b)
    return time.perf_counter() - started, value


def by_sqrtm(a: Moments, b: Moments) -> float:
    """The Frechet distance as it is mostly written."""
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    offset = a.mean - b.mean
    return float(offset @ offset + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(root.real))


def frechet(turns: int) -> list[Row]:
    """2048 features, covariances of 6,000 images at hand on both sides."""
    generator = np.random.default_rng(0)
    drawn = [
        generator.standard_normal((NUM, WIDTH)) @ (generator.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5) + shift
        for shift in (0.0, 0.1)
    ]
    a, b = (Moments.of(features) for features in drawn)
    frechet_from_moments(a, b)  # warms up; from here on b keeps its root
    fresh_times, stored_times, theirs_times, apart = [], [], [], []
    for _ in range(turns):
        theirs, their_value = timed(by_sqrtm, a, b)
        fresh, fresh_value = timed(frechet_from_moments, a, Moments(b.mean, b.covariance))
        stored, stored_value = timed(frechet_from_moments, a, b)
        for times, one in ((theirs_times, theirs), (fresh_times, fresh), (stored_times, stored)):
            times.append(one)
        apart.append(max(abs(value / their_value - 1) for value in (fresh_value, stored_value)))
    ratios = [[theirs / own for theirs, own in zip(theirs_times, own, strict=True)] for own in (fresh_times, stored_times)]
    return [
        row("Frechet distance at 2048 features", fresh_times, "s"),
        row("the same with the reference's root stored", stored_times, "s"),
        row("scipy.linalg.sqrtm", theirs_times, "s"),
        row("sqrtm over ours", ratios[0], "ratio"),
        row("sqrtm over ours, root stored", ratios[1], "ratio"),
        row("largest relative difference of the values", apart, ""),
    ]


@torch.inference_mode()
def demo_shares(turns: int) -> list[Row]:
    """EfficientNet-lite0 at 64 pixels on 32 x 32 images beside 16 guided steps of the demo's sizes."""
    images = torch.randint(0, 256, (DEMO_BATCH, 3, 32, 32), dtype=torch.uint8)
    extractor, rows = EfficientNetLite0(side=64), []
    for width in DEMO_WIDTHS:
        spec = ModelSpec(width=width, latent_channels=4, latent_size=8, cross_attention_dim=384)
        passes = passes_of(build_unet(spec).eval(), spec, 2 * DEMO_BATCH, 32)
        seconds(passes), seconds(lambda: extractor(images))
        shares = [seconds(lambda: extractor(images)) / (DEMO_STEPS * seconds(passes)) for _ in range(turns)]
        rows.append(row(f"features over sampling, demo width {width}, {DEMO_STEPS} guided steps", shares, "share"))
    return rows


@torch.inference_mode()
def paper_shares(turns: int) -> list[Row]:
    """Inception and CLIP ViT-B/32 of one 512 x 512 image beside one pass of the 866M network, in fp32 on this machine."""
    spec = ModelSpec(width=PAPER_WIDTH, latent_channels=4, latent_size=64, cross_attention_dim=1024)
    passes = passes_of(build_unet(spec).eval(), spec, 1, 77)
    image = torch.randint(0, 256, (1, 3, 512, 512), dtype=torch.uint8)
    inception, clip = random_inception(), random_clip()
    seconds(passes), seconds(lambda: inception(image)), seconds(lambda: clip(image))
    both, sampling = [], []
    for _ in range(turns):
        sampling.append(PAPER_STEPS * seconds(passes))
        both.append(seconds(lambda: inception(image)) + seconds(lambda: clip(image)))
    shares = [features / steps for features, steps in zip(both, sampling, strict=True)]
    return [
        row(f"sampling, 866M, {PAPER_STEPS} steps of one pass, one image", sampling, "s"),
        row("Inception and CLIP ViT-B/32, one image", both, "s"),
        row(f"features over sampling, 866M, {PAPER_STEPS} steps of one pass", shares, "share"),
    ]


def passes_of(network: Module, spec: ModelSpec, batch: int, num_tokens: int) -> Callable[[], Tensor]:
    """One network call on `batch` rows."""
    latents = torch.randn(batch, spec.latent_channels, spec.latent_size, spec.latent_size)
    states = torch.randn(batch, num_tokens, spec.cross_attention_dim)
    return lambda: network(latents, torch.full((batch,), 500), states).sample


def random_inception() -> Callable[[Tensor], Tensor]:
    """torch-fidelity's network without its weights."""
    from unittest import mock

    from torch_fidelity import feature_extractor_inceptionv3 as source

    with (
        mock.patch.object(source, "load_state_dict_from_url", return_value={}),
        mock.patch.object(source.FeatureExtractorInceptionV3, "load_state_dict", return_value=None),
    ):
        return source.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], verbose=False)


def random_clip() -> Callable[[Tensor], Tensor]:
    """CLIP ViT-B/32's image tower without its weights."""
    from transformers import CLIPConfig, CLIPModel

    from isocost.metrics.preprocessing import CLIP_MEAN, CLIP_STD, normalize, resize_shorter_side

    network = CLIPModel(CLIPConfig()).eval()
    return lambda images: (
        network.vision_model(
            pixel_values=normalize(resize_shorter_side(images.float(), 224), CLIP_MEAN, CLIP_STD)
        ).pooler_output
    )


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="one turn, and no 866M network; under a minute")
    options.add_argument("--json", action="store_true", help="the JSON line alone")
    asked = options.parse_args()
    rows = frechet(1 if asked.quick else 3)
    rows += demo_shares(3 if asked.quick else 7)
    if not asked.quick:
        gc.collect()
        rows += paper_shares(3)
    if not asked.json:
        for one in rows:
            print(f"{one['what']}: {one['value']:.4g} {one['unit']}", file=sys.stderr)
    value = {str(one["what"]): float(str(one["value"])) for one in rows}
    targets: list[Row] = [
        target("Frechet distance at 2048 features", value, "< 2 s", lambda v: v < 2),
        target("sqrtm over ours", value, ">= 5", lambda v: v >= 5),
        target("sqrtm over ours, root stored", value, ">= 10", lambda v: v >= 10),
        target("largest relative difference of the values", value, "<= 1e-6", lambda v: v <= 1e-6),
    ]
    share = f"features over sampling, 866M, {PAPER_STEPS} steps of one pass"
    if share in value:
        targets.append(target(share, value, "< 0.03", lambda v: v < 0.03))
    print_results("metrics", rows, targets)


def target(what: str, value: dict[str, float], words: str, met: Callable[[float], bool]) -> Row:
    """A row of `targets`."""
    return {"what": what, "value": value[what], "target": words, "met": bool(met(value[what]))}


if __name__ == "__main__":
    main()
