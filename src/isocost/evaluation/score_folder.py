"""Scores of any set of images against a reference, under a protocol preset.

Shapes: N images, M reference images, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from isocost.config.evaluation import MIN_IMAGES, ProtocolSpec
from isocost.errors import ConfigError
from isocost.evaluation.confidence_intervals import Interval
from isocost.evaluation.evaluator import frechet_is_biased, score
from isocost.evaluation.feature_store import SampleFeatures
from isocost.evaluation.image_sources import ARRAY_SUFFIXES, images_by_id, iter_images
from isocost.evaluation.paired_images import paired_image_metrics, subject_scores
from isocost.evaluation.prompt_lists import read_prompt_list
from isocost.evaluation.protocol import Protocol, make_protocol
from isocost.evaluation.protocol_presets import PRESETS, ProtocolPreset, protocol_preset
from isocost.evaluation.reference_set import ReferenceSet, make_extractors
from isocost.evaluation.reference_stats import (
    FeatureSet,
    build_statistics,
    check_num_images,
    extract_features,
    read_statistics,
    reference_images,
)
from isocost.metrics.extractor_base import FeatureExtractor
from isocost.utils.device import best_device

__all__ = ["PRESETS", "FolderScore", "make_reference", "score_folder"]
LPIPS = "lpips"


@dataclass(frozen=True)
class FolderScore:
    """Scores of one set of images.

    Attributes:
        protocol: "name@version:id"; the version only if the preset fixes the number of images.
        extractor: ids of the feature extractors.
        num_images: number of scored images.
        num_reference: number of reference images.
        scores: value and interval by metric.
        notes: warnings for the user.
        parts: everything that the protocol's id depends on.
    """

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
        images: a folder, or a .npy or .npz file of uint8 [N, H, W, 3] in the order of the prompts.
        reference: a folder of images, tar shards, `hub:NAME:SPLIT`, `scenes:NUMBER`, statistics of `isocost reference`,
            or the reference features that a study saved.
        protocol: a name of `PRESETS`.
        prompts: source of the protocol's prompts, if it has prompts.
        weights: sources of weights by extractor name, and of AlexNet under "lpips"; by default the published weights.

    Raises:
        ConfigError: an input is missing, has the wrong number, size or type, or was made with other weights.
    """
    preset = protocol_preset(protocol)
    lpips_weights, spec = with_weights(preset.spec, weights)
    extractors = make_extractors(spec, best_device())
    prompts_by_id = read_protocol_prompts(preset, prompts)
    if preset.compares == "subjects":
        assert prompts_by_id is not None
        return _score_subjects(preset, spec, Path(images), Path(reference), prompts_by_id, extractors)
    generated = _generated_features(str(images), preset, extractors, prompts_by_id)
    reference_ids = list(prompts_by_id) if prompts_by_id is not None and preset.reference_ids else None
    real = read_reference_features(str(reference), preset, extractors, reference_ids)
    minimum = MIN_IMAGES if preset.num_images is None else 0
    check_num_images(str(images), len(generated), preset.num_images, minimum)
    check_num_images(str(reference), len(real), preset.num_reference, minimum)
    prompt_list = list(prompts_by_id.values()) if prompts_by_id is not None else []
    full_protocol = make_protocol(
        spec.model_copy(update={"num_images": len(generated)}),
        resolution=preset.resolution or 0,
        extractor=[extractor.id for extractor in extractors.values()],
        reference=real.content,
        num_reference=len(real),
        prompts=prompt_list,
    )
    reference_set = ReferenceSet(full_protocol, extractors, real.features, prompt_list)
    scores = score(SampleFeatures(generated.features), reference_set, spec.metrics)
    if preset.paired_image_metrics:
        generated_images = images_by_id(str(images), resolution=preset.resolution, exact=True)
        originals = reference_images(str(reference), preset)
        scores |= paired_image_metrics(generated_images, originals, preset.paired_image_metrics, lpips_weights, full_protocol)
    scored = _folder_score(preset, full_protocol, extractors, len(generated), len(real), scores)
    return replace(scored, notes=(*scored.notes, *_size_notes(generated, real)))


def _size_notes(generated: FeatureSet, real: FeatureSet) -> list[str]:
    """A note if the images do not all have one size: the extractor resizes each, and a score contains the difference."""
    if generated.sizes is None or real.sizes is None or len(generated.sizes | real.sizes) < 2:
        return []
    texts = [_format_sizes(features.sizes or frozenset()) for features in (generated, real)]
    return [
        f"the images have {texts[0]} pixels, the reference {texts[1]}: the extractor resizes them, which changes the scores"
    ]


def _format_sizes(sizes: frozenset[tuple[int, int]]) -> str:
    first, *others = sorted(sizes)
    height, width = first
    return f"{width} x {height}" + (
        f" and {len(others)} other sizes of" if len(others) > 1 else " and another size of" if others else ""
    )


def make_reference(
    images: str | Path,
    out: str | Path,
    protocol: str,
    *,
    prompts: str | None = None,
    weights: Mapping[str, str] | None = None,
) -> FeatureSet:
    """Compute the reference statistics of a protocol preset and write them to the new folder `out`.

    Args:
        images: a folder of real images, tar shards, `hub:NAME:SPLIT` or `scenes:NUMBER`.
        out: a folder that does not exist.
        protocol: a name of `PRESETS`.
        prompts: source of the protocol's prompts, if their ids select the reference images.
        weights: sources of weights by extractor name; by default the published weights.

    Raises:
        ConfigError: the images do not fit the protocol, or `out` exists already.
    """
    preset = protocol_preset(protocol)
    if preset.compares == "subjects":
        raise ConfigError(f"protocol '{protocol}' needs no statistics; give the folder of photographs as --reference")
    _, spec = with_weights(preset.spec, weights)
    prompts_by_id = read_protocol_prompts(preset, prompts) if preset.reference_ids else None
    ids = None if prompts_by_id is None else list(prompts_by_id)
    return build_statistics(str(images), Path(out), preset, make_extractors(spec, best_device()), ids)


def _score_subjects(
    preset: ProtocolPreset,
    spec: ProtocolSpec,
    images: Path,
    reference: Path,
    prompts: dict[str, str],
    extractors: dict[str, FeatureExtractor],
) -> FolderScore:
    """DreamBooth's scores of SUBJECT/PP_K.png against SUBJECT/*.jpg and the prompts (arXiv 2208.12242, section 4.2)."""
    comparison = subject_scores(images, reference, prompts, extractors, spec, preset.num_images)
    full_protocol = make_protocol(
        spec.model_copy(update={"num_images": comparison.num_images}),
        resolution=preset.resolution or 0,
        extractor=[extractor.id for extractor in extractors.values()],
        reference=comparison.content,
        num_reference=comparison.num_reference,
        prompts=list(prompts.values()),
    )
    num_images, num_reference = comparison.num_images, comparison.num_reference
    return _folder_score(preset, full_protocol, extractors, num_images, num_reference, comparison.scores)


def _folder_score(
    preset: ProtocolPreset,
    protocol: Protocol,
    extractors: dict[str, FeatureExtractor],
    num_images: int,
    num_reference: int,
    scores: dict[str, Interval],
) -> FolderScore:
    notes = []
    for extractor in extractors.values():
        fewest = min(num_images, num_reference)
        if "frechet" in preset.spec.metrics and frechet_is_biased(fewest, extractor.feature_dim):
            notes.append(
                f"Frechet distance from {fewest} images, fewer than twice its {extractor.feature_dim} features: "
                "biased upwards, compare at equal numbers of images only"
            )
    title = preset.title if preset.num_images is not None else preset.name
    ids = " + ".join(extractor.id for extractor in extractors.values())
    parts = {"name": preset.title, **protocol.parts}
    return FolderScore(f"{title}:{protocol.id}", ids, num_images, num_reference, scores, tuple(notes), parts)


def with_weights(spec: ProtocolSpec, weights: Mapping[str, str] | None) -> tuple[str | None, ProtocolSpec]:
    """The source of LPIPS's convolutions, and the spec with the sources of its extractors' weights.

    Raises:
        ConfigError: a source is for a network that the protocol does not use.
    """
    sources = dict(weights or {})
    lpips_weights = sources.pop(LPIPS, None)
    unknown = set(sources) - set(spec.features)
    if unknown:
        raise ConfigError(f"weights: {unknown.pop()} is not used; this protocol uses {', '.join((*spec.features, LPIPS))}")
    ordered = {name: sources[name] for name in spec.features if name in sources}
    return lpips_weights, spec.model_copy(update={"weights": ordered})


def read_protocol_prompts(preset: ProtocolPreset, source: str | None) -> dict[str, str] | None:
    """The protocol's prompts by id; None if it has none.

    Raises:
        ConfigError: prompts are missing, are not those of the protocol, or the protocol has none.
    """
    if preset.prompts is None:
        if source is not None:
            raise ConfigError(f"--prompts {source}: protocol '{preset.name}' has no prompts; omit the option")
        return None
    if source is None and preset.prompts.source.startswith("scenes:"):
        source = preset.prompts.source.split(": ")[0]
    if source is None:
        raise ConfigError(f"protocol '{preset.name}' needs --prompts: {preset.prompts.source}")
    return read_prompt_list(source, preset.prompts)


def _generated_features(
    source: str, preset: ProtocolPreset, extractors: dict[str, FeatureExtractor], prompts: dict[str, str] | None
) -> FeatureSet:
    ids = None if prompts is None else list(prompts)
    if source.endswith(ARRAY_SUFFIXES) and ids is not None:
        ids = [str(index) for index in range(len(ids))]
    exact = preset.resolution is not None
    return extract_features(iter_images(source, resolution=preset.resolution, exact=exact, ids=ids), extractors, ids)


def read_reference_features(
    source: str, preset: ProtocolPreset, extractors: dict[str, FeatureExtractor], ids: list[str] | None
) -> FeatureSet:
    """Features of the reference images in `source`, saved or computed now.

    Raises:
        ConfigError: the source is missing, or does not fit the protocol.
    """
    saved = read_statistics(Path(source), extractors)
    return saved if saved is not None else extract_features(reference_images(source, preset, ids), extractors, ids)
