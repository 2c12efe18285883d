"""The names of the metrics: what a column of the results database holds, how a figure labels it, and which way is better.

FID and KID are names of Inception features alone; on other features the same distances are called after their features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from isocost.errors import ConfigError

_WORDS = {
    "efficientnet-lite0": ("efficientnet", "EfficientNet-lite0"),
    "inception": ("inception", "Inception"),
    "clip-vit-b-32": ("clip_b32", "CLIP ViT-B/32"),
    "clip-vit-l-14": ("clip_l14", "CLIP ViT-L/14"),
    "clip-vit-l-14-336": ("clip_l14_336", "CLIP ViT-L/14 at 336"),
    "dinov2-vit-b-14": ("dinov2_b14", "DINOv2 ViT-B/14"),
    "dinov2-vit-l-14": ("dinov2_l14", "DINOv2 ViT-L/14"),
    "dino-vit-s-16": ("dino_s16", "DINO ViT-S/16"),
    "pickscore": ("pickscore", "PickScore"),
    "hpsv2": ("hpsv2", "HPSv2"),
}
PREFERENCE = ("pickscore", "hpsv2")
SUBJECT = {"dino-vit-s-16": "dino", "clip-vit-b-32": "clip_i", "efficientnet-lite0": "subject_efficientnet"}
"""DreamBooth's likeness to the subject's images (arXiv 2208.12242, section 4.2), and a stand-in that needs no download."""
CLASSIFIER_SCORE = "classifier_score_efficientnet"
"""The formula of the Inception score on another classifier's classes."""
Better = Literal["lower", "higher"]
_SAYING: dict[str, tuple[tuple[str, ...], Better, str]] = {
    "mmd": (("squared MMD",), "lower", "unbiased MMD², lower is better"),
    "frechet": (("Fréchet distance",), "lower", "biased up by about 1/N, lower is better"),
    "frechet_infinity": (("Fréchet distance at infinite N",), "lower", "extrapolated, lower is better"),
    "precision_recall": (("precision", "recall"), "higher", "share of images, higher is better"),
    "density_coverage": (("density", "coverage"), "higher", "share of images, higher is better"),
    "inception_score": (("Inception score",), "higher", "higher is better"),
    "cmmd": (("CMMD",), "lower", "unbiased MMD² x 1000, lower is better"),
    "prompt_similarity": (("CLIP score",), "higher", "cosine, higher is better"),
    "subject_similarity": (("likeness to the subject",), "higher", "cosine, higher is better"),
}
"""What the metrics of a distance are called, which way is better, and what their axis says."""
_OF_INCEPTION = {"squared MMD": "KID", "Fréchet distance": "FID", "Fréchet distance at infinite N": "FID at infinite N"}


@dataclass(frozen=True)
class Metric:
    """One metric: its key, its words, its direction and the title of its axis."""

    name: str
    label: str
    better: Better
    axis: str


def metrics_of(distance: str, features: str) -> tuple[str, ...]:
    """Names of the metrics that a distance (`protocol.metrics`) gives on features (`protocol.features`); maybe none."""
    short, _ = _WORDS[features]
    is_inception, is_clip = features == "inception", features.startswith("clip")
    return {
        "mmd": ("kid" if is_inception else f"mmd_{short}",),
        "frechet": ("fid" if is_inception else f"frechet_{short}",),
        "frechet_infinity": ("fid_infinity" if is_inception else f"frechet_infinity_{short}",),
        "precision_recall": (f"precision_{short}", f"recall_{short}"),
        "density_coverage": (f"density_{short}", f"coverage_{short}"),
        "inception_score": {"inception": ("inception_score",), "efficientnet-lite0": (CLASSIFIER_SCORE,)}.get(features, ()),
        "cmmd": (("cmmd" if features == "clip-vit-l-14-336" else f"cmmd_{short}"),) if is_clip else (),
        "subject_similarity": (SUBJECT[features],) if features in SUBJECT else (),
        "prompt_similarity": (short,)
        if features in PREFERENCE
        else ((f"clip_score_{short.removeprefix('clip_')}",) if is_clip else ()),
    }[distance]


def check_distances(metrics: Sequence[str], features: Sequence[str]) -> None:
    """Raise ConfigError where a distance has no features that it can be taken on."""
    for distance in metrics:
        if not any(metrics_of(distance, name) for name in features):
            fitting = [name for name in _WORDS if metrics_of(distance, name)]
            raise ConfigError(f"protocol.metrics: {distance} needs one of protocol.features: {', '.join(fitting)}")


def _metrics(distance: str, features: str) -> list[Metric]:
    _, on = _WORDS[features]
    words, better, note = _SAYING[distance]
    if features == "inception":
        words = tuple(_OF_INCEPTION.get(word, word) for word in words)
    if distance == "inception_score" and features != "inception":
        words = ("classifier score",)
    if distance == "prompt_similarity" and features in PREFERENCE:
        words = (on,)
    return [
        Metric(name, word if word == on else f"{word}, {on} features", better, f"{word}, {on} ({note})")
        for name, word in zip(metrics_of(distance, features), words, strict=False)
    ]


def _fixed() -> list[Metric]:
    return [
        Metric(
            "alignment",
            "caption alignment, share of attributes a classifier reads back",
            "higher",
            "caption alignment (share, higher is better)",
        ),
        Metric("psnr", "peak signal-to-noise ratio", "higher", "PSNR (dB, higher is better)"),
        Metric("ssim", "structural similarity", "higher", "SSIM (higher is better)"),
        Metric("lpips", "LPIPS, AlexNet", "lower", "LPIPS, AlexNet (lower is better)"),
        Metric("lpips_vgg", "LPIPS, VGG16", "lower", "LPIPS, VGG16 (lower is better)"),
        Metric("clip_i", "CLIP-I, likeness to the subject's photographs", "higher", "CLIP-I (cosine, higher is better)"),
        Metric("clip_t", "CLIP-T, likeness to the prompt", "higher", "CLIP-T (cosine, higher is better)"),
        Metric("dino", "DINO, likeness to the subject's photographs", "higher", "DINO (cosine, higher is better)"),
    ]


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        *_metrics("mmd", "efficientnet-lite0"),
        *_metrics("frechet", "efficientnet-lite0"),
        *_fixed(),
        *(metric for features in _WORDS for distance in _SAYING for metric in _metrics(distance, features)),
    )
}


def metric_of(name: str) -> Metric:
    """The metric called `name`; ConfigError with the nearest names where there is none."""
    if name not in METRICS:
        nearest = get_close_matches(name, METRICS, n=4, cutoff=0) or list(METRICS)[:4]
        raise ConfigError(f"no metric is called {name!r}; the nearest of {len(METRICS)}: {', '.join(nearest)}")
    return METRICS[name]
