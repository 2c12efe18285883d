"""Scores of a folder of pictures against another: any pictures, from any model.

Shapes: N pictures, M reference pictures, R resolution, D features.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from isocost.data.sources import PICTURE_SUFFIXES, square_rgb
from isocost.errors import RequestError
from isocost.metrics.features import EfficientNetLite0
from isocost.score.intervals import Interval, KernelReference, frechet_interval, kernel_interval
from isocost.score.reference import read_features
from isocost.score.score import frechet_is_flagged
from isocost.study import LEAST_PICTURES, ProtocolSpec, digest

FEATURES_FILE = "features.safetensors"
PROTOCOLS = {
    "kernel-efficientnet-64": ProtocolSpec(feature_side=64, distances=("kernel",)),
    "kernel-efficientnet-224": ProtocolSpec(feature_side=224, distances=("kernel",)),
    "frechet-efficientnet-64": ProtocolSpec(feature_side=64, distances=("kernel", "frechet")),
    "frechet-efficientnet-224": ProtocolSpec(feature_side=224, distances=("kernel", "frechet")),
}


@dataclass(frozen=True)
class FolderScore:
    """Scores of one folder, with what made them."""

    protocol: str
    extractor: str
    num_pictures: int
    num_reference: int
    scores: dict[str, Interval]
    notes: tuple[str, ...]


def score_folder(pictures: str | Path, reference: str | Path, protocol: str) -> FolderScore:
    """Compare the pictures below a folder with those below another, or with a `features.safetensors` folder of isocost.

    Pictures are cropped to their centre square; the extractor resizes them.

    Raises:
        RequestError: a folder is missing or holds too few pictures, the protocol is unknown, or features do not fit it.
    """
    if protocol not in PROTOCOLS:
        raise RequestError(f"protocol '{protocol}': choose one of {', '.join(PROTOCOLS)}")
    spec = PROTOCOLS[protocol]
    extractor = EfficientNetLite0(side=spec.feature_side)
    features, _ = _features(Path(pictures), extractor)
    compared, reference_digest = _reference_features(Path(reference), extractor)
    scores: dict[str, Interval] = {}
    notes = []
    against = KernelReference.of(compared, num_bootstrap=spec.num_bootstrap, seed=spec.seed)
    scores["kernel_efficientnet"] = kernel_interval(features, against)
    if "frechet" in spec.distances:
        scores["frechet_efficientnet"] = frechet_interval(features, compared)
        if frechet_is_flagged(min(len(features), len(compared)), extractor.width):
            notes.append(
                f"Frechet from {min(len(features), len(compared))} pictures, fewer than twice its {extractor.width} features: "
                "biased upwards, compare at equal numbers only"
            )
    name = digest({"protocol": protocol, "extractor": extractor.id, "n": len(features), "reference": reference_digest})[:12]
    return FolderScore(f"{protocol}:{name}", extractor.id, len(features), len(compared), scores, tuple(notes))


def _reference_features(path: Path, extractor: EfficientNetLite0) -> tuple[np.ndarray, str]:
    folder = path.parent if path.name == FEATURES_FILE else path
    if (folder / FEATURES_FILE).is_file():
        manifest = folder / "isocost.json"
        made_by = json.loads(manifest.read_text(encoding="utf-8")).get("extractor") if manifest.is_file() else None
        if made_by != extractor.id:
            raise RequestError(f"{path}: features of another extractor ({made_by}); this protocol needs {extractor.id}")
        features = read_features(folder)
        return features, hashlib.sha256(features.tobytes()).hexdigest()[:16]
    return _features(path, extractor)


def _features(folder: Path, extractor: EfficientNetLite0) -> tuple[np.ndarray, str]:
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder of pictures")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES)
    if len(files) < LEAST_PICTURES:
        raise RequestError(f"{folder}: {len(files)} pictures; a distance takes at least {LEAST_PICTURES}")
    sha = hashlib.sha256()
    features = []
    for start in range(0, len(files), extractor.BUCKET):
        batch = [_square(file) for file in files[start : start + extractor.BUCKET]]
        for picture in batch:
            sha.update(picture.numpy().tobytes())
        same = len({picture.shape for picture in batch}) == 1
        groups = [torch.stack(batch)] if same else [picture[None] for picture in batch]
        features += [extractor(group).cpu() for group in groups]
    return torch.cat(features).numpy(), sha.hexdigest()[:16]


def _square(file: Path) -> Tensor:
    """Centre square at its own size, uint8 [3, R, R]."""
    try:
        with Image.open(file) as opened:
            picture = square_rgb(opened, min(opened.size))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError(f"{file}: cannot be read as a picture: {' '.join(str(error).split())[:120]}") from error
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)
