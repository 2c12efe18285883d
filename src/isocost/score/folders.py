"""Scores of a folder of pictures against another: any pictures, from any model.

Shapes: N pictures, M reference pictures, R resolution, D features.
"""

from __future__ import annotations

import hashlib
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
from isocost.spec import digest
from isocost.store import MANIFEST, read_manifest
from isocost.study import LEAST_PICTURES, ProtocolSpec

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
    files, reference_files = _picture_files(Path(pictures)), _reference_files(Path(reference), extractor)
    features = _features(files, extractor)
    compared = read_features(reference_files) if isinstance(reference_files, Path) else _features(reference_files, extractor)
    reference_digest = hashlib.sha256(compared.tobytes()).hexdigest()[:16]
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


def _reference_files(path: Path, extractor: EfficientNetLite0) -> Path | list[Path]:
    """The folder of an artefact of features, or else the pictures below a folder."""
    folder = path.parent if path.name == FEATURES_FILE else path
    if not (folder / FEATURES_FILE).is_file():
        return _picture_files(path)
    manifest = folder / MANIFEST
    made_by = read_manifest(folder).get("extractor") if manifest.is_file() else None
    if made_by != extractor.id:
        raise RequestError(f"{path}: features of another extractor ({made_by}); this protocol needs {extractor.id}")
    return folder


def _picture_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder of pictures")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES)
    if len(files) < LEAST_PICTURES:
        raise RequestError(f"{folder}: {len(files)} pictures; a distance takes at least {LEAST_PICTURES}")
    return files


def _features(files: list[Path], extractor: EfficientNetLite0) -> np.ndarray:
    """float32 [N, D]. Pictures of one size go through the extractor together; its features do not depend on company."""
    features = np.empty((len(files), extractor.width), dtype=np.float32)
    waiting: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}

    def flush(shape: tuple[int, ...]) -> None:
        places, pictures = zip(*waiting.pop(shape), strict=True)
        features[list(places)] = extractor(torch.stack(pictures)).cpu().numpy()

    for place, file in enumerate(files):
        picture = _square(file)
        waiting.setdefault(picture.shape, []).append((place, picture))
        if len(waiting[picture.shape]) == extractor.BUCKET:
            flush(picture.shape)
    for shape in list(waiting):
        flush(shape)
    return features


def _square(file: Path) -> Tensor:
    """Centre square at its own size, uint8 [3, R, R]."""
    try:
        with Image.open(file) as opened:
            picture = square_rgb(opened, min(opened.size))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError(f"{file}: cannot be read as a picture: {' '.join(str(error).split())[:120]}") from error
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)
