"""Disk that a study takes, by counting: what a point keeps, and what the latent cache holds."""

from __future__ import annotations

from isocost.forecasting.shapes import feature_width
from isocost.materials import NUM_KEPT
from isocost.stages import ProtocolSpec, ScenesSource, SourceSpec

_INT64 = 8
_OF_KEPT = {"fp32": 4, "fp16": 2}


def point_bytes(protocol: ProtocolSpec, num_pictures: int, resolution: int) -> int:
    """Bytes that a point keeps, within its headers: features, ids, alignment and pair scores of its pictures, a few whole."""
    by_picture = _INT64 * (1 + len(protocol.pairs) + (protocol.alignment != "none"))
    of_features = feature_width(protocol) * _OF_KEPT[protocol.kept]
    return num_pictures * (of_features + by_picture) + min(num_pictures, NUM_KEPT) * 3 * resolution**2


def most_pictures(source: SourceSpec) -> int | None:
    """How many pictures a source holds at most, by the study alone; None where it does not say."""
    return source.num_pictures if isinstance(source, ScenesSource) else source.limit
