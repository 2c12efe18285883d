"""What makes two numbers comparable, in one id.

A protocol is the pictures' captions and number, the reference and its number, the resolution, and the feature extractor
with its weights. Its id travels with every score; scores of different ids are never compared or drawn together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from isocost.spec import digest
from isocost.study import ProtocolSpec


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

    @property
    def id(self) -> str:
        """12 hex digits that name the protocol."""
        return digest(asdict(self))[:12]

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
    extractor: str,
    reference: str,
    num_reference: int,
    captions: Sequence[str],
    probe: str | None = None,
) -> Protocol:
    """Fix a protocol on a study's own reference (its content hash), its captions, and the digest of its probe."""
    listed = hashlib.sha256(json.dumps(list(captions), ensure_ascii=False).encode()).hexdigest()[:12]
    return Protocol(
        spec.num_pictures,
        num_reference,
        resolution,
        extractor,
        reference,
        listed,
        spec.alignment if probe is None else f"{spec.alignment}/probe={probe}",
        spec.num_bootstrap,
        spec.seed,
    )
