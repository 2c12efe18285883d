"""Scores of anybody's pictures against a reference under a named protocol.

Shapes: N pictures, M reference pictures, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isocost.config.evaluation import LEAST_PICTURES, FeatureName, ProtocolSpec
from isocost.errors import RequestError
from isocost.evaluation.caption_lists import read_captions
from isocost.evaluation.confidence_intervals import Interval
from isocost.evaluation.evaluator import frechet_is_flagged, score
from isocost.evaluation.feature_store import Measured
from isocost.evaluation.image_sources import ARRAY_SUFFIXES, pictures_by_key, pictures_of
from isocost.evaluation.paired_images import pair_scores, subject_scores
from isocost.evaluation.protocol import make_protocol
from isocost.evaluation.protocol_presets import PROTOCOLS, NamedProtocol, named_protocol
from isocost.evaluation.reference_set import Reference, make_extractors
from isocost.evaluation.reference_stats import Taken, build_statistics, check_number, read_statistics, reference_pictures, take
from isocost.metrics.extractor_base import Extractor
from isocost.utils.device import best_device

__all__ = ["PROTOCOLS", "FolderScore", "make_reference", "score_folder"]
LPIPS = "lpips"


@dataclass(frozen=True)
class FolderScore:
    """Scores of one set of pictures, with what made them; `protocol` is name@version:id, `parts` what the id stands for."""

    protocol: str
    extractor: str
    num_pictures: int
    num_reference: int
    scores: dict[str, Interval]
    notes: tuple[str, ...]
    parts: dict[str, Any]


def score_folder(
    pictures: str | Path,
    reference: str | Path,
    protocol: str,
    *,
    captions: str | None = None,
    weights: Mapping[str, str] | None = None,
) -> FolderScore:
    """Score pictures against a reference.

    Args:
        pictures: a folder, or a .npy or .npz of uint8 [N, H, W, 3] in the order of the captions.
        reference: a folder of pictures, tar shards, `hub:NAME:SPLIT`, `scenes:NUMBER`, statistics of `isocost reference`,
            or the features that a study keeps.
        protocol: a name of `PROTOCOLS`.
        captions: where the protocol's captions lie; it says what they are.
        weights: places of weights by extractor, and of AlexNet under `lpips`, where the published ones are not to be fetched.

    Raises:
        RequestError: something is missing, of the wrong number, size or kind, or made by other weights.
    """
    named = named_protocol(protocol)
    lpips, spec = _with_weights(named.spec, weights)
    extractors = make_extractors(spec, best_device())
    listed = _captions(named, captions)
    if named.compares == "subjects":
        assert listed is not None
        return subjects_score(named, spec, Path(pictures), Path(reference), listed, extractors)
    generated = _generated(str(pictures), named, extractors, listed)
    real = _reference(str(reference), named, extractors, None if listed is None or not named.reference_ids else list(listed))
    least = LEAST_PICTURES if named.num_pictures is None else 0
    check_number(str(pictures), len(generated), named.num_pictures, least)
    check_number(str(reference), len(real), named.num_reference, least)
    words = list(listed.values()) if listed is not None else []
    fixed = make_protocol(
        spec.model_copy(update={"num_pictures": len(generated)}),
        resolution=named.resolution or 0,
        extractor=[extractor.id for extractor in extractors.values()],
        reference=real.content,
        num_reference=len(real),
        captions=words,
    )
    against = Reference(fixed, extractors, real.features, words)
    scores = score(Measured(generated.features), against, spec.distances)
    if named.pair_scores:
        pairs = pictures_by_key(str(pictures), side=named.resolution, exact=True)
        scores.update(pair_scores(pairs, reference_pictures(str(reference), named), named.pair_scores, lpips, fixed))
    return _answer(named, fixed.id, fixed.parts, extractors, len(generated), len(real), scores)


def make_reference(
    pictures: str | Path,
    out: str | Path,
    protocol: str,
    *,
    captions: str | None = None,
    weights: Mapping[str, str] | None = None,
) -> Taken:
    """Reference statistics of a named protocol, taken once of real pictures and written to a new folder `out`.

    Raises:
        RequestError: the pictures are not what the protocol asks for, or `out` is there already.
    """
    named = named_protocol(protocol)
    if named.compares == "subjects":
        raise RequestError(f"protocol '{protocol}' compares with photographs by subject and takes their folder as it is")
    _, spec = _with_weights(named.spec, weights)
    listed = _captions(named, captions) if named.reference_ids else None
    ids = None if listed is None else list(listed)
    return build_statistics(str(pictures), Path(out), named, make_extractors(spec, best_device()), ids)


def subjects_score(
    named: NamedProtocol,
    spec: ProtocolSpec,
    pictures: Path,
    reference: Path,
    prompts: dict[str, str],
    extractors: dict[str, Extractor],
) -> FolderScore:
    """DreamBooth's scores of SUBJECT/PP_K.png against SUBJECT/*.jpg and the prompts (arXiv 2208.12242, section 4.2)."""
    found = subject_scores(pictures, reference, prompts, extractors, spec, named.num_pictures)
    fixed = make_protocol(
        spec.model_copy(update={"num_pictures": found.num_pictures}),
        resolution=named.resolution or 0,
        extractor=[extractor.id for extractor in extractors.values()],
        reference=found.content,
        num_reference=found.num_reference,
        captions=list(prompts.values()),
    )
    return _answer(named, fixed.id, fixed.parts, extractors, found.num_pictures, found.num_reference, found.scores)


def _answer(
    named: NamedProtocol,
    protocol: str,
    parts: dict[str, Any],
    extractors: dict[str, Extractor],
    num: int,
    num_reference: int,
    scores: dict[str, Interval],
) -> FolderScore:
    notes = []
    for extractor in extractors.values():
        least = min(num, num_reference)
        if "frechet" in named.spec.distances and frechet_is_flagged(least, extractor.width):
            notes.append(
                f"Frechet from {least} pictures, fewer than twice its {extractor.width} features: "
                "biased upwards, compare at equal numbers only"
            )
    title = named.title if named.num_pictures is not None else named.name
    ids = " + ".join(extractor.id for extractor in extractors.values())
    whole = {"name": named.title, **parts}
    return FolderScore(f"{title}:{protocol}", ids, num, num_reference, scores, tuple(notes), whole)


def _with_weights(spec: ProtocolSpec, weights: Mapping[str, str] | None) -> tuple[str | None, ProtocolSpec]:
    """The place of LPIPS's convolutions, and the spec with the places of its extractors."""
    places = dict(weights or {})
    lpips = places.pop(LPIPS, None)
    unknown = set(places) - set(spec.features)
    if unknown:
        raise RequestError(
            f"weights: {unknown.pop()} is not used here; this protocol uses {', '.join((*spec.features, LPIPS))}"
        )
    typed: dict[FeatureName, str] = {name: places[name] for name in spec.features if name in places}
    return lpips, spec.model_copy(update={"weights": typed})


def _captions(named: NamedProtocol, place: str | None) -> dict[str, str] | None:
    if named.captions is None:
        if place is not None:
            raise RequestError(f"--captions {place}: protocol '{named.name}' has no captions; leave it out")
        return None
    if place is None and named.captions.source.startswith("scenes:"):
        place = named.captions.source.split(": ")[0]
    if place is None:
        raise RequestError(f"protocol '{named.name}' needs --captions: {named.captions.source}")
    return read_captions(place, named.captions)


def _generated(place: str, named: NamedProtocol, extractors: dict[str, Extractor], listed: dict[str, str] | None) -> Taken:
    ids = None if listed is None else list(listed)
    if place.endswith(ARRAY_SUFFIXES) and ids is not None:
        ids = [str(number) for number in range(len(ids))]
    exact = named.resolution is not None
    return take(pictures_of(place, side=named.resolution, exact=exact, ids=ids), extractors, ids)


def _reference(place: str, named: NamedProtocol, extractors: dict[str, Extractor], ids: list[str] | None) -> Taken:
    kept = read_statistics(Path(place), extractors)
    return kept if kept is not None else take(reference_pictures(place, named, ids), extractors, ids)
