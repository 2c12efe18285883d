"""The reference side of a protocol: real pictures' features, the captions to draw, and the probe that reads pictures back.

Shapes: M reference pictures, N generated pictures, D features, A attribute heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from isocost.data.cache import PictureSet
from isocost.errors import RequestError
from isocost.metrics.distances import Moments
from isocost.metrics.features import EfficientNetLite0, Extractor
from isocost.metrics.probe import Probe, fit_probe
from isocost.score.intervals import KernelReference
from isocost.score.protocol import Protocol

PROBE_EPOCHS = 6
VERSION = 1
LABELS_NEEDED = "protocol.alignment needs labels in data.train and data.reference (label_column), or alignment: none"


@dataclass
class Reference:
    """A protocol with what it compares against.

    Attributes:
        features: float32 [M, D] of the real pictures.
        captions: the N captions to draw, one a picture id.
        labels: int64 [N, A] of those captions, where alignment is measured.
        probe: reads labels from pictures; None where alignment is not measured.
    """

    protocol: Protocol
    extractor: Extractor
    features: np.ndarray
    captions: list[str]
    labels: Tensor | None
    probe: Probe | None

    @cached_property
    def kernel(self) -> KernelReference:
        """The reference side of every kernel interval, resampled once."""
        return KernelReference.of(self.features, num_bootstrap=self.protocol.num_bootstrap, seed=self.protocol.seed)

    @cached_property
    def moments(self) -> Moments:
        """Mean and covariance for the Frechet distance."""
        return Moments.of(self.features)


def make_extractor(feature_side: int) -> Extractor:
    """The extractor of a protocol."""
    return EfficientNetLite0(side=feature_side)


def captions_to_draw(reference: PictureSet, num_pictures: int) -> tuple[list[str], Tensor | None]:
    """The first caption of each of the first reference pictures, with their labels int64 [N, A] where known.

    Raises:
        RequestError: there are fewer reference pictures than the protocol draws.
    """
    if num_pictures > len(reference):
        raise RequestError(f"protocol.num_pictures={num_pictures} exceeds the {len(reference)} captions of data.reference")
    labels = None if reference.labels is None else reference.labels[:num_pictures]
    return [captions[0] for captions in reference.captions[:num_pictures]], labels


def write_features(folder: Path, extractor: Extractor, pictures: Tensor) -> None:
    """Features of uint8 [M, 3, R, R] as `features.safetensors`."""
    save_file({"features": extractor(pictures).cpu()}, folder / "features.safetensors")


def read_features(folder: Path) -> np.ndarray:
    """float32 [M, D]."""
    return load_file(folder / "features.safetensors")["features"].numpy()


def need_labels(train: PictureSet, held_out: PictureSet) -> None:
    """Raise RequestError where alignment cannot be measured for want of labels."""
    if train.labels is None or held_out.labels is None:
        raise RequestError(LABELS_NEEDED)


def train_probe(
    folder: Path, train: PictureSet, held_out: PictureSet, num_classes: tuple[int, ...], seed: int
) -> dict[str, object]:
    """Fit the probe on real training pictures, save it, and return its accuracy on held-out real pictures for the manifest."""
    assert train.labels is not None, "need_labels comes first"
    assert held_out.labels is not None, "need_labels comes first"
    probe = fit_probe(train.pictures, train.labels, num_classes, num_epochs=PROBE_EPOCHS, seed=seed)
    probe.save(folder)
    accuracy = probe.accuracy(held_out.pictures, held_out.labels)
    return {
        "accuracy": float(accuracy.mean()),
        "accuracy_by_head": [float(value) for value in accuracy],
        "held_out": len(held_out),
    }


def classes_of(train: PictureSet) -> tuple[int, ...]:
    """Number of classes of each head, from the labels themselves: one more than the largest."""
    assert train.labels is not None
    return tuple(int(value) + 1 for value in torch.amax(train.labels, dim=0))
