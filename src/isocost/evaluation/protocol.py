"""The evaluation protocol: everything besides the images that a score depends on, and an id for it.

A protocol fixes the prompts and their number, the reference images and their number, the resolution, and the feature
extractors with their weights. Every score carries the protocol's id. Scores with different ids are never compared or
plotted together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from isocost.config.base import digest
from isocost.config.evaluation import ProtocolSpec

EXTRACTOR_SEPARATOR = " + "
_FIELD_LABELS = {
    "num_images": "N",
    "num_reference": "number of reference images",
    "resolution": "resolution",
    "reference": "reference",
    "prompts": "prompts",
    "alignment": "alignment",
    "inputs": "input images",
    "num_bootstrap": "bootstrap resamples",
    "seed": "seed",
}


@dataclass(frozen=True)
class Protocol:
    """Everything that a score depends on besides the generated images.

    Attributes:
        num_images: N, generated images.
        num_reference: M, reference images.
        resolution: height and width of the images in pixels; 0 if it is not fixed.
        extractor: ids of the feature extractors and paired metrics, joined by `EXTRACTOR_SEPARATOR`.
        reference: content hash of the reference images.
        prompts: hash of the prompts.
        alignment: kind of labels, and the digest of the attribute classifier.
        num_bootstrap: R, bootstrap resamples.
        seed: of the resamples.
        inputs: identifies the images from which images are generated (super-resolution); empty without such images.
    """

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
        """Digest of the protocol, 12 hex digits."""
        return digest(self.parts)[:12]

    @property
    def parts(self) -> dict[str, Any]:
        """The fields as plain data, as saved with the id in the results database; without `inputs` if it is empty."""
        return {name: value for name, value in asdict(self).items() if name != "inputs" or value}

    def sentence(self) -> str:
        """Describe the protocol in one sentence, for a report."""
        return (
            f"{self.num_images} images of {self.resolution} x {self.resolution} pixels against {self.num_reference} "
            f"reference images (content {self.reference}), prompts {self.prompts}, features {self.extractor}, alignment "
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
    attribute_classifier: str | None = None,
    inputs: str = "",
) -> Protocol:
    """Make the protocol of given reference images and prompts.

    Args:
        spec: numbers of images and resamples, seed, kind of alignment, and dtype of saved features.
        resolution: height and width of the images in pixels.
        extractor: ids of the feature extractors and paired metrics. A `feature_dtype` other than fp32 is appended to each.
        reference: content hash of the reference images.
        num_reference: number of reference images.
        prompts: in order.
        attribute_classifier: digest of the attribute classifier; None without alignment.
        inputs: identifies the images from which images are generated.
    """
    prompts_hash = hashlib.sha256(json.dumps(list(prompts), ensure_ascii=False).encode()).hexdigest()[:12]
    ids = [extractor] if isinstance(extractor, str) else list(extractor)
    feature_dtype = "" if spec.feature_dtype == "fp32" else f"/dtype={spec.feature_dtype}"
    return Protocol(
        spec.num_images,
        num_reference,
        resolution,
        EXTRACTOR_SEPARATOR.join(f"{extractor_id}{feature_dtype}" for extractor_id in ids),
        reference,
        prompts_hash,
        spec.alignment if attribute_classifier is None else f"{spec.alignment}/probe={attribute_classifier}",
        spec.num_bootstrap,
        spec.seed,
        inputs,
    )


def format_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Describe the differences between the parts of two protocols; empty if there are none.

    Example: "N (1000, 5000); resize of inception-v3-fid (bilinear, bicubic)".
    """
    differences = [
        f"{label} ({first.get(field)}, {second.get(field)})"
        for field, label in _FIELD_LABELS.items()
        if first.get(field) != second.get(field)
    ]
    left, right = (_parse_extractor_ids(str(parts.get("extractor", ""))) for parts in (first, second))
    if left.keys() != right.keys():
        differences.append(f"features ({', '.join(left)}; {', '.join(right)})")
    for name in left.keys() & right.keys():
        keys = sorted(left[name].keys() | right[name].keys())
        differences += [
            f"{key} of {name} ({left[name].get(key, 'none')}, {right[name].get(key, 'none')})"
            for key in keys
            if left[name].get(key) != right[name].get(key)
        ]
    return "; ".join(differences)


def _parse_extractor_ids(ids: str) -> dict[str, dict[str, str]]:
    """Parts of extractor ids by name: {"inception-v3-fid": {"weights": ..., "resize": ..., "precision": "fp32"}}."""
    parsed: dict[str, dict[str, str]] = {}
    for extractor_id in ids.split(EXTRACTOR_SEPARATOR):
        head, *settings = extractor_id.split("/")
        name, _, weights = head.partition(":")
        parts = {"weights": weights}
        for setting in settings:
            key, equals, value = setting.partition("=")
            parts[key if equals else "precision"] = value if equals else setting
        parsed[name] = parts
    return parsed
