"""What makes two numbers comparable, in one id.

A protocol is the pictures' captions and number, the reference and its number, the resolution, and the feature extractors
with their weights. Its id travels with every score; scores of different ids are never compared or drawn together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from isocost.config.base import digest
from isocost.config.evaluation import ProtocolSpec

BETWEEN_EXTRACTORS = " + "
_WORDS = {
    "num_pictures": "N",
    "num_reference": "number of reference pictures",
    "resolution": "resolution",
    "reference": "reference",
    "captions": "prompts",
    "alignment": "alignment",
    "given": "given pictures",
    "num_bootstrap": "bootstrap resamples",
    "seed": "seed",
}


@dataclass(frozen=True)
class Protocol:
    """Everything that a score depends on besides the generated pictures."""

    num_pictures: int
    num_reference: int
    resolution: int
    extractor: str
    reference: str
    captions: str
    alignment: str
    num_bootstrap: int
    seed: int
    given: str = ""

    @property
    def id(self) -> str:
        """12 hex digits that name the protocol."""
        return digest(self.parts)[:12]

    @property
    def parts(self) -> dict[str, Any]:
        """The fields as plain data, as the ledger keeps them beside the id; `given` where pictures are made from pictures."""
        return {name: value for name, value in asdict(self).items() if name != "given" or value}

    def sentence(self) -> str:
        """The protocol in words, for a report."""
        return (
            f"{self.num_pictures} pictures of {self.resolution} x {self.resolution} pixels against {self.num_reference} "
            f"reference pictures (content {self.reference}), captions {self.captions}, features {self.extractor}, alignment by "
            f"{self.alignment}, {self.num_bootstrap} bootstrap resamples"
        )


def make_protocol(
    spec: ProtocolSpec,
    *,
    resolution: int,
    extractor: str | Sequence[str],
    reference: str,
    num_reference: int,
    captions: Sequence[str],
    probe: str | None = None,
    given: str = "",
) -> Protocol:
    """Fix a protocol on a study's own reference (its content hash), its captions, and the digest of its probe.

    `extractor` is the id of each extractor, and of what compares pictures with their originals; features kept in less than
    float32 add how to it. `given` names the pictures that generated ones are made from.
    """
    listed = hashlib.sha256(json.dumps(list(captions), ensure_ascii=False).encode()).hexdigest()[:12]
    ids = [extractor] if isinstance(extractor, str) else list(extractor)
    kept = "" if spec.kept == "fp32" else f"/kept={spec.kept}"
    return Protocol(
        spec.num_pictures,
        num_reference,
        resolution,
        BETWEEN_EXTRACTORS.join(f"{one}{kept}" for one in ids),
        reference,
        listed,
        spec.alignment if probe is None else f"{spec.alignment}/probe={probe}",
        spec.num_bootstrap,
        spec.seed,
        given,
    )


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """In words, what differs between the parts of two protocols: "N (1000, 5000); resize (...)"; empty where nothing does."""
    told = [
        f"{words} ({one.get(name)}, {other.get(name)})" for name, words in _WORDS.items() if one.get(name) != other.get(name)
    ]
    left, right = (_by_extractor(str(parts.get("extractor", ""))) for parts in (one, other))
    if left.keys() != right.keys():
        told.append(f"features ({', '.join(left)}; {', '.join(right)})")
    for name in left.keys() & right.keys():
        keys = sorted(left[name].keys() | right[name].keys())
        told += [
            f"{key} of {name} ({left[name].get(key, 'none')}, {right[name].get(key, 'none')})"
            for key in keys
            if left[name].get(key) != right[name].get(key)
        ]
    return "; ".join(told)


def _by_extractor(ids: str) -> dict[str, dict[str, str]]:
    """Extractor ids to their parts by name: {"inception-v3-fid": {"weights": ..., "resize": ..., "precision": "fp32"}}."""
    parsed: dict[str, dict[str, str]] = {}
    for one in ids.split(BETWEEN_EXTRACTORS):
        first, *rest = one.split("/")
        name, _, weights = first.partition(":")
        parts = {"weights": weights}
        for part in rest:
            key, equals, value = part.partition("=")
            parts[key if equals else "precision"] = value if equals else part
        parsed[name] = parts
    return parsed
