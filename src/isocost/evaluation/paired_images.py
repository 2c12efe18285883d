"""Scores of images with counterparts: super-resolution against originals, DreamBooth against subject photographs and prompts.

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
from isocost.data.image_files import list_images
from isocost.errors import ConfigError
from isocost.evaluation.confidence_intervals import Interval, mean_interval
from isocost.evaluation.feature_batches import BatchFunction, FixedBatchRunner
from isocost.evaluation.image_sources import SourceImage, iter_images
from isocost.evaluation.protocol import Protocol
from isocost.evaluation.reference_stats import check_num_images, extract_features
from isocost.metrics.extractor_base import FeatureExtractor
from isocost.metrics.image_similarity import cosine, mean_cosine_to_set, psnr, ssim
from isocost.metrics.lpips import load_lpips
from isocost.metrics.vit import CLIPFeatureExtractor

LPIPS_MIN_SIZE = 64
"""Smaller images are upsampled to this size for LPIPS, because its networks are too deep for them."""
CLIP, DINO = "clip-vit-b-32", "dino-vit-s-16"


def paired_image_metrics(
    images: Mapping[str, Callable[[], SourceImage]],
    originals: Iterable[SourceImage],
    names: tuple[str, ...],
    lpips_weights: str | None,
    protocol: Protocol,
) -> dict[str, Interval]:
    """Mean PSNR (dB, over RGB), SSIM and LPIPS (AlexNet) of images against the originals with the same id, with intervals.

    Args:
        images: functions that read the images, by id.
        originals: the reference images; those without an image are ignored.
        names: of "psnr", "ssim", "lpips".
        lpips_weights: source of the AlexNet weights; None for torchvision's.
        protocol: number and seed of the bootstrap resamples.

    Raises:
        ConfigError: an image has no original, has two, has another size, or equals its original (its PSNR is infinite).
    """
    index_of_id = {key: index for index, key in enumerate(sorted(images, key=lambda key: (len(key), key)))}
    runner = FixedBatchRunner({name: paired_image_metric(name, lpips_weights).function for name in names})
    seen: set[str] = set()
    for original in originals:
        if original.id not in index_of_id:
            continue
        if original.id in seen:
            raise ConfigError(f"{original.name}: id {original.id} appears twice in the reference")
        seen.add(original.id)
        image = images[original.id]()
        if image.pixels.shape != original.pixels.shape:
            raise ConfigError(
                f"{image.name}: {list(image.pixels.shape[1:])} pixels, but its original has {list(original.pixels.shape[1:])}"
            )
        runner.add(index_of_id[original.id], torch.cat([image.pixels, original.pixels]))
    _, values = runner.results()
    missing = [key for key in index_of_id if key not in seen]
    if missing:
        raise ConfigError(f"{len(missing)} images have no original in the reference; the first is {missing[0]}")
    num_equal = int(values["psnr"].isinf().sum()) if "psnr" in values else 0
    if num_equal:
        raise ConfigError(f"{num_equal} images equal their originals, so their PSNR is infinite: give upscaled images")
    return {
        name: mean_interval(per_pair.double().numpy(), num_bootstrap=protocol.num_bootstrap, seed=protocol.seed)
        for name, per_pair in values.items()
    }


@dataclass(frozen=True)
class PairedImageMetric:
    """A score of an image against its original.

    Attributes:
        id: identifies everything that the score depends on; part of a protocol's id.
        function: maps images and originals, concatenated along channels as uint8 [N, 6, R, R], to scores [N].
    """

    id: str
    function: BatchFunction


def paired_image_metric(name: str, lpips_weights: str | None) -> PairedImageMetric:
    """Make the metric "psnr" (dB, over RGB), "ssim" or "lpips" (AlexNet).

    Raises:
        ConfigError: the weights of LPIPS cannot be loaded.
    """
    if name == "psnr":
        return PairedImageMetric("psnr/rgb", lambda pairs: torch.from_numpy(psnr(pairs[:, :3].numpy(), pairs[:, 3:].numpy())))
    if name == "ssim":
        return PairedImageMetric("ssim/rgb", lambda pairs: torch.from_numpy(ssim(pairs[:, :3], pairs[:, 3:])))
    assert name == "lpips", name
    lpips = load_lpips(lpips_weights)

    @torch.inference_mode()
    def compare(pairs: Tensor) -> Tensor:
        return lpips(*(_upsample_for_lpips(images) / 127.5 - 1 for images in pairs.split(3, dim=1)))

    return PairedImageMetric(f"{lpips.id}/least-side={LPIPS_MIN_SIZE}", compare)


def _upsample_for_lpips(images: Tensor) -> Tensor:
    """Images uint8 [N, 3, H, W] as float32, upsampled (bicubic) if their shorter side is below `LPIPS_MIN_SIZE`."""
    height, width = images.shape[-2:]
    factor = LPIPS_MIN_SIZE / min(height, width)
    if factor <= 1:
        return images.float()
    return functional.interpolate(images.float(), (round(height * factor), round(width * factor)), mode="bicubic").clamp(0, 255)


@dataclass(frozen=True)
class SubjectComparison:
    """DreamBooth scores of a folder of images.

    Attributes:
        scores: `clip_i`, `clip_t` and `dino` over all images.
        num_images: number of images.
        num_reference: number of photographs of all subjects.
        content: hash of the photographs, 16 hex digits.
    """

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
) -> SubjectComparison:
    """Compare each image SUBJECT/PP_K with all photographs of SUBJECT and with prompt SUBJECT/PP (arXiv 2208.12242).

    The intervals resample the images of all subjects together.

    Args:
        images: folder with one subfolder per subject.
        reference: folder with the photographs of each subject in a subfolder.
        prompts: by id SUBJECT/PP.
        extractors: with CLIP and DINO.
        spec: number and seed of the bootstrap resamples.
        num_images: required number of images; None for any.

    Raises:
        ConfigError: the name of an image has no known subject and prompt, a subject has no photographs, or the number of
            images is wrong.
    """
    files = list_images(images)
    keys = [f"{file.parent.name}/{file.stem}" for file in files]
    for file, key in zip(files, keys, strict=True):
        if key.rpartition("_")[0] not in prompts:
            raise ConfigError(f"{file}: unknown subject or prompt; name images SUBJECT/PP_K.png, with prompt PP from 00 to 24")
    check_num_images(str(images), len(files), num_images)
    subjects = sorted({key.partition("/")[0] for key in keys})
    values: dict[str, list[float]] = {"clip_i": [], "clip_t": [], "dino": []}
    contents, num_reference = [], 0
    for subject in subjects:
        real = extract_features(iter_images(str(reference / subject), resolution=None, exact=False), extractors)
        if not len(real):
            raise ConfigError(f"{reference / subject}: no photographs of the subject; put its images into this folder")
        generated = extract_features(iter_images(str(images / subject), resolution=None, exact=False), extractors)
        values["clip_i"] += mean_cosine_to_set(generated.features[CLIP], real.features[CLIP]).tolist()
        values["dino"] += mean_cosine_to_set(generated.features[DINO], real.features[DINO]).tolist()
        clip = extractors[CLIP]
        assert isinstance(clip, CLIPFeatureExtractor)
        image_prompts = [prompts[f"{subject}/{Path(name).stem.rpartition('_')[0]}"] for name in generated.ids]
        values["clip_t"] += cosine(generated.features[CLIP], _encode_prompts(clip, image_prompts)).tolist()
        contents.append(f"{subject}:{real.content}")
        num_reference += len(real)
    scores = {
        name: mean_interval(per_image, num_bootstrap=spec.num_bootstrap, seed=spec.seed) for name, per_image in values.items()
    }
    content = hashlib.sha256("\n".join(contents).encode()).hexdigest()[:16]
    return SubjectComparison(scores, len(files), num_reference, content)


def _encode_prompts(clip: CLIPFeatureExtractor, prompts: list[str]) -> np.ndarray:
    """Text embeddings float32 [N, D]; each distinct prompt is encoded once."""
    distinct = sorted(set(prompts))
    embeddings = clip.encode_text(distinct).numpy()
    return embeddings[[distinct.index(prompt) for prompt in prompts]]
