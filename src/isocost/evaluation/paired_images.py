"""Images that have a counterpart: super-resolution against the original, DreamBooth against subject and prompt.

Shapes: N images, K photographs of a subject, R resolution, D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from isocost.config.evaluation import ProtocolSpec
from isocost.errors import ConfigError
from isocost.evaluation.confidence_intervals import Interval, mean_interval
from isocost.evaluation.feature_batches import FixedBatchRunner, Function
from isocost.evaluation.image_sources import SourceImage, image_files, iter_images
from isocost.evaluation.protocol import Protocol
from isocost.evaluation.reference_stats import check_num_images, take
from isocost.metrics.extractor_base import FeatureExtractor
from isocost.metrics.image_similarity import cosine, mean_cosine_to_set, psnr, ssim
from isocost.metrics.lpips import load_lpips
from isocost.metrics.vit import CLIPFeatureExtractor

LPIPS_MIN_SIZE = 64
"""Smaller images are enlarged to it for LPIPS, as its networks see nothing in them."""
CLIP, DINO = "clip-vit-b-32", "dino-vit-s-16"


def paired_image_metrics(
    images: Mapping[str, Callable[[], SourceImage]],
    originals: Iterable[SourceImage],
    names: tuple[str, ...],
    lpips_weights: str | None,
    fixed: Protocol,
) -> dict[str, Interval]:
    """Mean PSNR (dB, over RGB), SSIM and LPIPS (AlexNet) of images and the originals of the same id, with intervals.

    Raises:
        ConfigError: an image has no original, two, or one of another size, or equals it, so that PSNR has no end.
    """
    name_hash = {key: place for place, key in enumerate(sorted(images, key=lambda key: (len(key), key)))}
    blocks = FixedBatchRunner({name: paired_image_metric(name, lpips_weights).function for name in names})
    seen: set[str] = set()
    for original in originals:
        if original.key not in name_hash:
            continue
        if original.key in seen:
            raise ConfigError(f"{original.name}: id {original.key} came twice in the reference")
        seen.add(original.key)
        made = images[original.key]()
        if made.pixels.shape != original.pixels.shape:
            raise ConfigError(
                f"{made.name}: {list(made.pixels.shape[1:])} pixels, its original {list(original.pixels.shape[1:])}"
            )
        blocks.add(name_hash[original.key], torch.cat([made.pixels, original.pixels]))
    _, values = blocks.results()
    absent = [key for key in name_hash if key not in seen]
    if absent:
        raise ConfigError(f"{len(absent)} images have no original in the reference; the first is {absent[0]}")
    equal = int(values["psnr"].isinf().sum()) if "psnr" in values else 0
    if equal:
        raise ConfigError(f"{equal} images equal their originals, and their PSNR has no end: give upscaled images")
    return {
        name: mean_interval(by_pair.double().numpy(), num_bootstrap=fixed.num_bootstrap, seed=fixed.seed)
        for name, by_pair in values.items()
    }


@dataclass(frozen=True)
class PairedImageMetric:
    """A score of an image and its original; `id` says what it depends on.

    `function` takes both in one, uint8 [N, 6, R, R], and gives [N].
    """

    id: str
    function: Function


def paired_image_metric(name: str, lpips_weights: str | None) -> PairedImageMetric:
    """PSNR (dB, over RGB), SSIM, or LPIPS by AlexNet.

    Raises:
        ConfigError: LPIPS' weights cannot be had.
    """
    if name == "psnr":
        return PairedImageMetric("psnr/rgb", lambda pairs: torch.from_numpy(psnr(pairs[:, :3].numpy(), pairs[:, 3:].numpy())))
    if name == "ssim":
        return PairedImageMetric("ssim/rgb", lambda pairs: torch.from_numpy(ssim(pairs[:, :3], pairs[:, 3:])))
    assert name == "lpips", name
    lpips = load_lpips(lpips_weights)

    @torch.inference_mode()
    def compare(pairs: Tensor) -> Tensor:
        return lpips(*(_upsample_for_lpips(one) / 127.5 - 1 for one in pairs.split(3, dim=1)))

    return PairedImageMetric(f"{lpips.id}/least-side={LPIPS_MIN_SIZE}", compare)


def _upsample_for_lpips(images: Tensor) -> Tensor:
    """Bicubic, to `LPIPS_MIN_SIZE` where they are smaller; uint8 [N, 3, H, W] -> float32."""
    height, width = images.shape[-2:]
    times = LPIPS_MIN_SIZE / min(height, width)
    if times <= 1:
        return images.float()
    return functional.interpolate(images.float(), (round(height * times), round(width * times)), mode="bicubic").clamp(0, 255)


@dataclass(frozen=True)
class SubjectScores:
    """CLIP-I, CLIP-T and DINO over all images; `content` names the photographs."""

    scores: dict[str, Interval]
    num_images: int
    num_reference: int
    content: str


def subject_scores(
    images: Path,
    reference: Path,
    prompts: dict[str, str],
    extractors: dict[str, FeatureExtractor],
    spec: ProtocolSpec,
    num_images: int | None,
) -> SubjectScores:
    """Each image SUBJECT/PP_K against all photographs of SUBJECT and against prompt SUBJECT/PP (arXiv 2208.12242).

    The interval resamples images, all subjects together.

    Raises:
        ConfigError: an image's name says no known subject and prompt, or a subject has no photographs.
    """
    files = image_files(images)
    keys = [f"{file.parent.name}/{file.stem}" for file in files]
    for file, key in zip(files, keys, strict=True):
        if key.rpartition("_")[0] not in prompts:
            raise ConfigError(f"{file}: names no subject and prompt; images are SUBJECT/PP_K.png, prompt PP from 00 to 24")
    check_num_images(str(images), len(files), num_images)
    subjects = sorted({key.partition("/")[0] for key in keys})
    values: dict[str, list[float]] = {"clip_i": [], "clip_t": [], "dino": []}
    contents, num_reference = [], 0
    for subject in subjects:
        real = take(iter_images(str(reference / subject), side=None, exact=False), extractors)
        if not len(real):
            raise ConfigError(f"{reference / subject}: no photographs of the subject")
        made = take(iter_images(str(images / subject), side=None, exact=False), extractors)
        values["clip_i"] += mean_cosine_to_set(made.features[CLIP], real.features[CLIP]).tolist()
        values["dino"] += mean_cosine_to_set(made.features[DINO], real.features[DINO]).tolist()
        clip = extractors[CLIP]
        assert isinstance(clip, CLIPFeatureExtractor)
        told = [prompts[f"{subject}/{Path(name).stem.rpartition('_')[0]}"] for name in made.ids]
        values["clip_t"] += cosine(made.features[CLIP], _embedded(clip, told)).tolist()
        contents.append(f"{subject}:{real.content}")
        num_reference += len(real)
    scores = {name: mean_interval(some, num_bootstrap=spec.num_bootstrap, seed=spec.seed) for name, some in values.items()}
    content = hashlib.sha256("\n".join(contents).encode()).hexdigest()[:16]
    return SubjectScores(scores, len(files), num_reference, content)


def _embedded(clip: CLIPFeatureExtractor, prompts: list[str]) -> np.ndarray:
    """float32 [N, D], each distinct caption embedded once."""
    distinct = sorted(set(prompts))
    rows = clip.encode_text(distinct).numpy()
    return rows[[distinct.index(prompt) for prompt in prompts]]
