"""What makes two numbers comparable, in one id.

A protocol is the images' captions and number, the reference and its number, the resolution, and the feature extractors
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
    "num_images": "N",
    "num_reference": "number of reference images",
    "resolution": "resolution",
    "reference": "reference",
    "prompts": "prompts",
    "alignment": "alignment",
    "inputs": "inputs images",
    "num_bootstrap": "bootstrap resamples",
    "seed": "seed",
}


@dataclass(frozen=True)
class Protocol:
    """Everything that a score depends on besides the generated images."""

    num_images: int
    num_reference: int
    resolution: int
    extractor: str
    reference: str
    prompts: str
    alignment: str
    num_bootstrap: int
    seed: int
    inputs: str = ""

    @property
    def id(self) -> str:
        """12 hex digits that name the protocol."""
        return digest(self.parts)[:12]

    @property
    def parts(self) -> dict[str, Any]:
        """The fields as plain data, as the results database keeps them beside the id; `inputs` where images are made from images."""
        return {name: value for name, value in asdict(self).items() if name != "inputs" or value}

    def sentence(self) -> str:
        """The protocol in words, for a report."""
        return (
            f"{self.num_images} images of {self.resolution} x {self.resolution} pixels against {self.num_reference} "
            f"reference images (content {self.reference}), captions {self.prompts}, features {self.extractor}, alignment by "
            f"{self.alignment}, {self.num_bootstrap} bootstrap resamples"
        )


def make_protocol(
    spec: ProtocolSpec,
    *,
    resolution: int,
    extractor: str | Sequence[str],
    reference: str,
    num_reference: int,
    prompts: Sequence[str],
    probe: str | None = None,
    inputs: str = "",
) -> Protocol:
    """Fix a protocol on a study's own reference (its content hash), its captions, and the digest of its probe.

    `extractor` is the id of each extractor, and of what compares images with their originals; features kept in less than
    float32 add how to it. `inputs` names the images that generated ones are made from.
    """
    listed = hashlib.sha256(json.dumps(list(prompts), ensure_ascii=False).encode()).hexdigest()[:12]
    ids = [extractor] if isinstance(extractor, str) else list(extractor)
    feature_dtype = "" if spec.feature_dtype == "fp32" else f"/dtype={spec.feature_dtype}"
    return Protocol(
        spec.num_images,
        num_reference,
        resolution,
        BETWEEN_EXTRACTORS.join(f"{one}{feature_dtype}" for one in ids),
        reference,
        listed,
        spec.alignment if probe is None else f"{spec.alignment}/probe={probe}",
        spec.num_bootstrap,
        spec.seed,
        inputs,
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
