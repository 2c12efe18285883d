"""Pictures that have a counterpart: super-resolution against the original, DreamBooth against subject and prompt.

Shapes: N pictures, K photographs of a subject, R resolution, D features.
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
from isocost.errors import RequestError
from isocost.evaluation.confidence_intervals import Interval, mean_interval
from isocost.evaluation.feature_batches import Blocks, Function
from isocost.evaluation.image_sources import Picture, picture_files, pictures_of
from isocost.evaluation.protocol import Protocol
from isocost.evaluation.reference_stats import check_number, take
from isocost.metrics.extractor_base import Extractor
from isocost.metrics.image_similarity import cosine, mean_cosine_to_set, psnr, ssim
from isocost.metrics.lpips import load_lpips
from isocost.metrics.vit import ClipTower

LPIPS_LEAST_SIDE = 64
"""Smaller pictures are enlarged to it for LPIPS, as its networks see nothing in them."""
CLIP, DINO = "clip-vit-b-32", "dino-vit-s-16"


def pair_scores(
    pictures: Mapping[str, Callable[[], Picture]],
    originals: Iterable[Picture],
    names: tuple[str, ...],
    lpips_weights: str | None,
    fixed: Protocol,
) -> dict[str, Interval]:
    """Mean PSNR (dB, over RGB), SSIM and LPIPS (AlexNet) of pictures and the originals of the same id, with intervals.

    Raises:
        RequestError: a picture has no original, two, or one of another size, or equals it, so that PSNR has no end.
    """
    place_of = {key: place for place, key in enumerate(sorted(pictures, key=lambda key: (len(key), key)))}
    blocks = Blocks({name: pair_score(name, lpips_weights).function for name in names})
    seen: set[str] = set()
    for original in originals:
        if original.key not in place_of:
            continue
        if original.key in seen:
            raise RequestError(f"{original.name}: id {original.key} came twice in the reference")
        seen.add(original.key)
        made = pictures[original.key]()
        if made.pixels.shape != original.pixels.shape:
            raise RequestError(
                f"{made.name}: {list(made.pixels.shape[1:])} pixels, its original {list(original.pixels.shape[1:])}"
            )
        blocks.add(place_of[original.key], torch.cat([made.pixels, original.pixels]))
    _, values = blocks.results()
    absent = [key for key in place_of if key not in seen]
    if absent:
        raise RequestError(f"{len(absent)} pictures have no original in the reference; the first is {absent[0]}")
    equal = int(values["psnr"].isinf().sum()) if "psnr" in values else 0
    if equal:
        raise RequestError(f"{equal} pictures equal their originals, and their PSNR has no end: give upscaled pictures")
    return {
        name: mean_interval(by_pair.double().numpy(), num_bootstrap=fixed.num_bootstrap, seed=fixed.seed)
        for name, by_pair in values.items()
    }


@dataclass(frozen=True)
class PairScore:
    """A score of a picture and its original; `id` says what it depends on.

    `function` takes both in one, uint8 [N, 6, R, R], and gives [N].
    """

    id: str
    function: Function


def pair_score(name: str, lpips_weights: str | None) -> PairScore:
    """PSNR (dB, over RGB), SSIM, or LPIPS by AlexNet.

    Raises:
        RequestError: LPIPS' weights cannot be had.
    """
    if name == "psnr":
        return PairScore("psnr/rgb", lambda pairs: torch.from_numpy(psnr(pairs[:, :3].numpy(), pairs[:, 3:].numpy())))
    if name == "ssim":
        return PairScore("ssim/rgb", lambda pairs: torch.from_numpy(ssim(pairs[:, :3], pairs[:, 3:])))
    assert name == "lpips", name
    lpips = load_lpips(lpips_weights)

    @torch.inference_mode()
    def compare(pairs: Tensor) -> Tensor:
        return lpips(*(_enlarged(one) / 127.5 - 1 for one in pairs.split(3, dim=1)))

    return PairScore(f"{lpips.id}/least-side={LPIPS_LEAST_SIDE}", compare)


def _enlarged(pictures: Tensor) -> Tensor:
    """Bicubic, to `LPIPS_LEAST_SIDE` where they are smaller; uint8 [N, 3, H, W] -> float32."""
    height, width = pictures.shape[-2:]
    times = LPIPS_LEAST_SIDE / min(height, width)
    if times <= 1:
        return pictures.float()
    return functional.interpolate(pictures.float(), (round(height * times), round(width * times)), mode="bicubic").clamp(0, 255)


@dataclass(frozen=True)
class SubjectScores:
    """CLIP-I, CLIP-T and DINO over all pictures; `content` names the photographs."""

    scores: dict[str, Interval]
    num_pictures: int
    num_reference: int
    content: str


def subject_scores(
    pictures: Path,
    reference: Path,
    prompts: dict[str, str],
    extractors: dict[str, Extractor],
    spec: ProtocolSpec,
    num_pictures: int | None,
) -> SubjectScores:
    """Each picture SUBJECT/PP_K against all photographs of SUBJECT and against prompt SUBJECT/PP (arXiv 2208.12242).

    The interval resamples pictures, all subjects together.

    Raises:
        RequestError: a picture's name says no known subject and prompt, or a subject has no photographs.
    """
    files = picture_files(pictures)
    keys = [f"{file.parent.name}/{file.stem}" for file in files]
    for file, key in zip(files, keys, strict=True):
        if key.rpartition("_")[0] not in prompts:
            raise RequestError(f"{file}: names no subject and prompt; pictures are SUBJECT/PP_K.png, prompt PP from 00 to 24")
    check_number(str(pictures), len(files), num_pictures)
    subjects = sorted({key.partition("/")[0] for key in keys})
    values: dict[str, list[float]] = {"clip_i": [], "clip_t": [], "dino": []}
    contents, num_reference = [], 0
    for subject in subjects:
        real = take(pictures_of(str(reference / subject), side=None, exact=False), extractors)
        if not len(real):
            raise RequestError(f"{reference / subject}: no photographs of the subject")
        made = take(pictures_of(str(pictures / subject), side=None, exact=False), extractors)
        values["clip_i"] += mean_cosine_to_set(made.features[CLIP], real.features[CLIP]).tolist()
        values["dino"] += mean_cosine_to_set(made.features[DINO], real.features[DINO]).tolist()
        clip = extractors[CLIP]
        assert isinstance(clip, ClipTower)
        told = [prompts[f"{subject}/{Path(name).stem.rpartition('_')[0]}"] for name in made.ids]
        values["clip_t"] += cosine(made.features[CLIP], _embedded(clip, told)).tolist()
        contents.append(f"{subject}:{real.content}")
        num_reference += len(real)
    scores = {name: mean_interval(some, num_bootstrap=spec.num_bootstrap, seed=spec.seed) for name, some in values.items()}
    content = hashlib.sha256("\n".join(contents).encode()).hexdigest()[:16]
    return SubjectScores(scores, len(files), num_reference, content)


def _embedded(clip: ClipTower, captions: list[str]) -> np.ndarray:
    """float32 [N, D], each distinct caption embedded once."""
    distinct = sorted(set(captions))
    rows = clip.captions(distinct).numpy()
    return rows[[distinct.index(caption) for caption in captions]]
