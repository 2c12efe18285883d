"""Time of scoring: the Frechet distance against scipy.linalg.sqrtm, and feature extraction against sampling.

    python benchmarks/metrics.py [--quick] [--json]

Weights are random and features are Gaussian, so only time is measured, not quality. Compared functions run in turns within
one process. The time of sampling is that of the forward passes only, a lower bound. The last line is JSON.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import scipy.linalg
import torch
from results import Row, argument_parser, print_results, row
from torch import Tensor
from torch.nn import Module

from isocost.config.model import ModelSpec
from isocost.metrics.efficientnet import EfficientNetLite0
from isocost.metrics.frechet import Moments, frechet_from_moments
from isocost.models.unet import build_unet

FEATURES, NUM_IMAGES = 2048, 6000
QUICK_FEATURES, QUICK_NUM_IMAGES = 512, 1500
DEMO_WIDTHS, DEMO_STEPS, DEMO_BATCH = (8, 16, 24), 16, 64
PAPER_WIDTH, PAPER_STEPS = 320, 4


def seconds(call: Callable[[], object]) -> float:
    """Time of a call in seconds."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def timed(distance: Callable[[Moments, Moments], float], a: Moments, b: Moments) -> tuple[float, float]:
    """Time and value of a distance."""
    started = time.perf_counter()
    value = distance(a, b)
    return time.perf_counter() - started, value


def sqrtm_distance(a: Moments, b: Moments) -> float:
    """Frechet distance in its usual implementation."""
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    offset = a.mean - b.mean
    return float(offset @ offset + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(root.real))


def frechet(num_features: int, num_images: int, turns: int) -> list[Row]:
    """Times of Frechet distances between moments that are known on both sides."""
    generator = np.random.default_rng(0)

    def random_moments(shift: float) -> Moments:
        features = generator.standard_normal((num_images, num_features))
        mixing = generator.standard_normal((num_features, num_features)) / num_features**0.5
        return Moments.of(features @ mixing + shift)

    a, b = random_moments(0.0), random_moments(0.1)
    frechet_from_moments(a, b)  # warm-up; b stores its root from now on
    times: dict[str, list[float]] = {"isocost": [], "isocost, stored root": [], "sqrtm": []}
    differences = []
    for _ in range(turns):
        results = {
            "sqrtm": timed(sqrtm_distance, a, b),
            "isocost": timed(frechet_from_moments, a, Moments(b.mean, b.covariance)),
            "isocost, stored root": timed(frechet_from_moments, a, b),
        }
        for name, (duration, _value) in results.items():
            times[name].append(duration)
        differences.append(max(abs(value / results["sqrtm"][1] - 1) for _, value in results.values()))

    def speed_up(name: str) -> list[float]:
        return [sqrtm / duration for sqrtm, duration in zip(times["sqrtm"], times[name], strict=True)]

    return [
        row(f"Frechet distance with {num_features} features", times["isocost"], "s"),
        row(f"Frechet distance with {num_features} features, stored root", times["isocost, stored root"], "s"),
        row(f"scipy.linalg.sqrtm with {num_features} features", times["sqrtm"], "s"),
        row("sqrtm / isocost", speed_up("isocost"), "ratio"),
        row("sqrtm / isocost with stored root", speed_up("isocost, stored root"), "ratio"),
        row("largest relative difference of the values", differences, ""),
    ]


@torch.inference_mode()
def demo_ratios(widths: Sequence[int], turns: int) -> list[Row]:
    """EfficientNet-lite0 at 64 pixels on 32 x 32 images against 16 guided steps of the demo's sizes."""
    images = torch.randint(0, 256, (DEMO_BATCH, 3, 32, 32), dtype=torch.uint8)
    extractor, rows = EfficientNetLite0(side=64), []
    for width in widths:
        spec = ModelSpec(width=width, latent_channels=4, latent_size=8, cross_attention_dim=384)
        forward = forward_pass(build_unet(spec).eval(), spec, 2 * DEMO_BATCH, 32)
        seconds(forward), seconds(lambda: extractor(images))
        ratios = [seconds(lambda: extractor(images)) / (DEMO_STEPS * seconds(forward)) for _ in range(turns)]
        rows.append(row(f"features / sampling, demo width {width}, {DEMO_STEPS} guided steps", ratios, "ratio"))
    return rows


@torch.inference_mode()
def paper_ratios(turns: int) -> list[Row]:
    """Inception and CLIP ViT-B/32 on one 512 x 512 image against forward passes of the 866M network, in fp32."""
    spec = ModelSpec(width=PAPER_WIDTH, latent_channels=4, latent_size=64, cross_attention_dim=1024)
    forward = forward_pass(build_unet(spec).eval(), spec, 1, 77)
    image = torch.randint(0, 256, (1, 3, 512, 512), dtype=torch.uint8)
    inception, clip = random_inception(), random_clip()
    seconds(forward), seconds(lambda: inception(image)), seconds(lambda: clip(image))
    features, sampling = [], []
    for _ in range(turns):
        sampling.append(PAPER_STEPS * seconds(forward))
        features.append(seconds(lambda: inception(image)) + seconds(lambda: clip(image)))
    ratios = [numerator / denominator for numerator, denominator in zip(features, sampling, strict=True)]
    return [
        row(f"sampling one image, 866M, {PAPER_STEPS} steps of one pass", sampling, "s"),
        row("Inception and CLIP ViT-B/32, one image", features, "s"),
        row(f"features / sampling, 866M, {PAPER_STEPS} steps of one pass", ratios, "ratio"),
    ]


def forward_pass(network: Module, spec: ModelSpec, batch: int, num_tokens: int) -> Callable[[], Tensor]:
    """A function that runs one forward pass of `batch` samples."""
    latents = torch.randn(batch, spec.latent_channels, spec.latent_size, spec.latent_size)
    prompt_embeds = torch.randn(batch, num_tokens, spec.cross_attention_dim)
    return lambda: network(latents, torch.full((batch,), 500), prompt_embeds).sample


def random_inception() -> Callable[[Tensor], Tensor]:
    """torch-fidelity's network with random weights."""
    from unittest import mock

    from torch_fidelity import feature_extractor_inceptionv3 as source

    with (
        mock.patch.object(source, "load_state_dict_from_url", return_value={}),
        mock.patch.object(source.FeatureExtractorInceptionV3, "load_state_dict", return_value=None),
    ):
        return source.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], verbose=False)


def random_clip() -> Callable[[Tensor], Tensor]:
    """CLIP ViT-B/32's image encoder with random weights."""
    from transformers import CLIPConfig, CLIPModel

    from isocost.metrics.preprocessing import CLIP_MEAN, CLIP_STD, normalize, resize_shorter_side

    network = CLIPModel(CLIPConfig()).eval()
    return lambda images: (
        network.vision_model(
            pixel_values=normalize(resize_shorter_side(images.float(), 224), CLIP_MEAN, CLIP_STD)
        ).pooler_output
    )


def main() -> None:
    quick = f"{QUICK_FEATURES} features, one demo size, without the 866M network; under a minute"
    arguments = argument_parser(__doc__, quick=quick).parse_args()
    rows: list[Row] = []

    def add(measured: list[Row]) -> None:
        rows.extend(measured)
        if not arguments.json:
            for row in measured:
                print(f"{row['what']}: {row['value']:.4g} {row['unit']}", file=sys.stderr, flush=True)

    num_features = QUICK_FEATURES if arguments.quick else FEATURES
    add(frechet(num_features, QUICK_NUM_IMAGES if arguments.quick else NUM_IMAGES, turns=1 if arguments.quick else 3))
    add(demo_ratios(DEMO_WIDTHS[:1] if arguments.quick else DEMO_WIDTHS, turns=2 if arguments.quick else 7))
    if not arguments.quick:
        gc.collect()
        add(paper_ratios(3))
    values = {str(row["what"]): float(str(row["value"])) for row in rows}
    targets: list[Row] = [
        target(f"Frechet distance with {num_features} features", values, "< 2 s", lambda value: value < 2),
        target("sqrtm / isocost", values, ">= 5", lambda value: value >= 5),
        target("sqrtm / isocost with stored root", values, ">= 10", lambda value: value >= 10),
        target("largest relative difference of the values", values, "<= 1e-6", lambda value: value <= 1e-6),
    ]
    paper_ratio = f"features / sampling, 866M, {PAPER_STEPS} steps of one pass"
    if paper_ratio in values:
        targets.append(target(paper_ratio, values, "< 0.03", lambda value: value < 0.03))
    print_results("metrics", rows, targets)


def target(what: str, values: dict[str, float], condition: str, is_met: Callable[[float], bool]) -> Row:
    """An entry of `targets`."""
    return {"what": what, "value": values[what], "target": condition, "met": bool(is_met(values[what]))}


if __name__ == "__main__":
    main()
