"""Scores of anybody's images against a reference under a named protocol.

Shapes: N images, M reference images, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isocost.config.evaluation import MIN_IMAGES, ExtractorName, ProtocolSpec
from isocost.errors import ConfigError
from isocost.evaluation.confidence_intervals import Interval
from isocost.evaluation.evaluator import frechet_is_biased, score
from isocost.evaluation.feature_store import SampleFeatures
from isocost.evaluation.image_sources import ARRAY_SUFFIXES, images_by_key, iter_images
from isocost.evaluation.paired_images import paired_image_metrics, subject_scores
from isocost.evaluation.prompt_lists import read_prompt_list
from isocost.evaluation.protocol import make_protocol
from isocost.evaluation.protocol_presets import PRESETS, ProtocolPreset, protocol_preset
from isocost.evaluation.reference_set import ReferenceSet, make_extractors
from isocost.evaluation.reference_stats import (
    FeatureSet,
    build_statistics,
    check_num_images,
    read_statistics,
    reference_images,
    take,
)
from isocost.metrics.extractor_base import FeatureExtractor
from isocost.utils.device import best_device

__all__ = ["PRESETS", "FolderScore", "make_reference", "score_folder"]
LPIPS = "lpips"


@dataclass(frozen=True)
class FolderScore:
    """Scores of one set of images, with what made them; `protocol` is name@version:id, `parts` what the id stands for."""

    protocol: str
    extractor: str
    num_images: int
    num_reference: int
    scores: dict[str, Interval]
    notes: tuple[str, ...]
    parts: dict[str, Any]


def score_folder(
    images: str | Path,
    reference: str | Path,
    protocol: str,
    *,
    prompts: str | None = None,
    weights: Mapping[str, str] | None = None,
) -> FolderScore:
    """Score images against a reference.

    Args:
        images: a folder, or a .npy or .npz of uint8 [N, H, W, 3] in the order of the captions.
        reference: a folder of images, tar shards, `hub:NAME:SPLIT`, `scenes:NUMBER`, statistics of `isocost reference`,
            or the features that a study keeps.
        protocol: a name of `PROTOCOLS`.
        captions: where the protocol's captions lie; it says what they are.
        weights: places of weights by extractor, and of AlexNet under `lpips`, where the published ones are not to be fetched.

    Raises:
        ConfigError: something is missing, of the wrong number, size or kind, or made by other weights.
    """
    named = protocol_preset(protocol)
    lpips, spec = _with_weights(named.spec, weights)
    extractors = make_extractors(spec, best_device())
    listed = _captions(named, prompts)
    if named.compares == "subjects":
        assert listed is not None
        return subjects_score(named, spec, Path(images), Path(reference), listed, extractors)
    generated = _generated(str(images), named, extractors, listed)
    real = _reference(str(reference), named, extractors, None if listed is None or not named.reference_ids else list(listed))
    least = MIN_IMAGES if named.num_images is None else 0
    check_num_images(str(images), len(generated), named.num_images, least)
    check_num_images(str(reference), len(real), named.num_reference, least)
    words = list(listed.values()) if listed is not None else []
    fixed = make_protocol(
        spec.model_copy(update={"num_images": len(generated)}),
        resolution=named.resolution or 0,
        extractor=[extractor.id for extractor in extractors.values()],
        reference=real.content,
        num_reference=len(real),
        prompts=words,
    )
    against = ReferenceSet(fixed, extractors, real.features, words)
    scores = score(SampleFeatures(generated.features), against, spec.metrics)
    if named.paired_image_metrics:
        pairs = images_by_key(str(images), side=named.resolution, exact=True)
        scores.update(
            paired_image_metrics(pairs, reference_images(str(reference), named), named.paired_image_metrics, lpips, fixed)
        )
    return _answer(named, fixed.id, fixed.parts, extractors, len(generated), len(real), scores)


def make_reference(
    images: str | Path,
    out: str | Path,
    protocol: str,
    *,
    prompts: str | None = None,
    weights: Mapping[str, str] | None = None,
) -> FeatureSet:
    """Reference statistics of a named protocol, taken once of real images and written to a new folder `out`.

    Raises:
        ConfigError: the images are not what the protocol asks for, or `out` is there already.
    """
    named = protocol_preset(protocol)
    if named.compares == "subjects":
        raise ConfigError(f"protocol '{protocol}' compares with photographs by subject and takes their folder as it is")
    _, spec = _with_weights(named.spec, weights)
    listed = _captions(named, prompts) if named.reference_ids else None
    ids = None if listed is None else list(listed)
    return build_statistics(str(images), Path(out), named, make_extractors(spec, best_device()), ids)


def subjects_score(
    named: ProtocolPreset,
    spec: ProtocolSpec,
    images: Path,
    reference: Path,
    prompts: dict[str, str],
    extractors: dict[str, FeatureExtractor],
) -> FolderScore:
    """DreamBooth's scores of SUBJECT/PP_K.png against SUBJECT/*.jpg and the prompts (arXiv 2208.12242, section 4.2)."""
    found = subject_scores(images, reference, prompts, extractors, spec, named.num_images)
    fixed = make_protocol(
        spec.model_copy(update={"num_images": found.num_images}),
        resolution=named.resolution or 0,
        extractor=[extractor.id for extractor in extractors.values()],
        reference=found.content,
        num_reference=found.num_reference,
        prompts=list(prompts.values()),
    )
    return _answer(named, fixed.id, fixed.parts, extractors, found.num_images, found.num_reference, found.scores)


def _answer(
    named: ProtocolPreset,
    protocol: str,
    parts: dict[str, Any],
    extractors: dict[str, FeatureExtractor],
    num: int,
    num_reference: int,
    scores: dict[str, Interval],
) -> FolderScore:
    notes = []
    for extractor in extractors.values():
        least = min(num, num_reference)
        if "frechet" in named.spec.metrics and frechet_is_biased(least, extractor.width):
            notes.append(
                f"Frechet from {least} images, fewer than twice its {extractor.width} features: "
                "biased upwards, compare at equal numbers only"
            )
    title = named.title if named.num_images is not None else named.name
    ids = " + ".join(extractor.id for extractor in extractors.values())
    whole = {"name": named.title, **parts}
    return FolderScore(f"{title}:{protocol}", ids, num, num_reference, scores, tuple(notes), whole)


def _with_weights(spec: ProtocolSpec, weights: Mapping[str, str] | None) -> tuple[str | None, ProtocolSpec]:
    """The place of LPIPS's convolutions, and the spec with the places of its extractors."""
    places = dict(weights or {})
    lpips = places.pop(LPIPS, None)
    unknown = set(places) - set(spec.features)
    if unknown:
        raise ConfigError(f"weights: {unknown.pop()} is not used here; this protocol uses {', '.join((*spec.features, LPIPS))}")
    typed: dict[ExtractorName, str] = {name: places[name] for name in spec.features if name in places}
    return lpips, spec.model_copy(update={"weights": typed})


def _captions(named: ProtocolPreset, place: str | None) -> dict[str, str] | None:
    if named.prompts is None:
        if place is not None:
            raise ConfigError(f"--prompts {place}: protocol '{named.name}' has no captions; leave it out")
        return None
    if place is None and named.prompts.source.startswith("scenes:"):
        place = named.prompts.source.split(": ")[0]
    if place is None:
        raise ConfigError(f"protocol '{named.name}' needs --prompts: {named.prompts.source}")
    return read_prompt_list(place, named.prompts)


def _generated(
    place: str, named: ProtocolPreset, extractors: dict[str, FeatureExtractor], listed: dict[str, str] | None
) -> FeatureSet:
    ids = None if listed is None else list(listed)
    if place.endswith(ARRAY_SUFFIXES) and ids is not None:
        ids = [str(number) for number in range(len(ids))]
    exact = named.resolution is not None
    return take(iter_images(place, side=named.resolution, exact=exact, ids=ids), extractors, ids)


def _reference(place: str, named: ProtocolPreset, extractors: dict[str, FeatureExtractor], ids: list[str] | None) -> FeatureSet:
    feature_dtype = read_statistics(Path(place), extractors)
    return feature_dtype if feature_dtype is not None else take(reference_images(place, named, ids), extractors, ids)
