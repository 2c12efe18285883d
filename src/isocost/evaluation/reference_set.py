"""The reference side of a protocol: features of real images, the prompts, and the attribute classifier.

Shapes: M reference images, N generated images, D features, A attribute heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from isocost.config.evaluation import ProtocolSpec
from isocost.data.latent_cache import ImageDataset
from isocost.errors import ConfigError
from isocost.evaluation.confidence_intervals import KernelReference
from isocost.evaluation.feature_batches import BatchFunction
from isocost.evaluation.metric_registry import check_metrics
from isocost.evaluation.protocol import Protocol
from isocost.metrics.attribute_classifier import AttributeClassifier, train_attribute_classifier
from isocost.metrics.efficientnet import EfficientNetLite0
from isocost.metrics.extractor_base import FeatureExtractor
from isocost.metrics.feature_extractors import make_extractor
from isocost.metrics.frechet import Moments
from isocost.metrics.inception import Inception
from isocost.metrics.mmd import POLYNOMIAL, Kernel
from isocost.metrics.precision_recall import radii
from isocost.metrics.vit import CLIPFeatureExtractor
from isocost.utils.tensor_files import read_tensors

CLASSIFIER_EPOCHS = 6
VERSION = 1
LABELS_NEEDED = "protocol.alignment needs labels in data.train and data.reference (label_column), or alignment: none"


@dataclass
class ReferenceSet:
    """A protocol with what it compares against.

    Attributes:
        extractors: by name, in the order of the protocol.
        features: float32 [M, D] of the real images, by extractor.
        captions: the N captions to draw, one an image id.
        clip_texts: texts that caption scores compare images with, if they are not the prompts (DreamBooth omits its token).
        labels: int64 [N, A] of those captions, where alignment is measured; -1 where a caption does not say.
        attribute_classifier: reads labels from images; None if alignment is not measured.
        originals: uint8 [N, 3, R, R], what image i is compared with; None if there is no such thing.
        paired_metrics: functions of an image and its original stacked, uint8 [N, 6, R, R] -> [N], by score name.
        kept: precision in which a point keeps its features.
    """

    protocol: Protocol
    extractors: dict[str, FeatureExtractor]
    features: dict[str, np.ndarray]
    prompts: list[str]
    labels: Tensor | None = None
    attribute_classifier: AttributeClassifier | None = None
    feature_dtype: str = "fp32"
    clip_texts: list[str] | None = None
    originals: Tensor | None = None
    paired_metrics: dict[str, BatchFunction] = field(default_factory=dict)
    _cache: dict[tuple[str, ...], Any] = field(default_factory=dict, init=False, repr=False)

    def kernel(self, name: str, kernel: Kernel = POLYNOMIAL) -> KernelReference:
        """The reference side of every kernel interval on an extractor's features, resampled once."""
        protocol = self.protocol
        return self._cached(
            ("mmd", kernel.name, name),
            lambda: KernelReference.of(
                self.features[name], num_bootstrap=protocol.num_bootstrap, seed=protocol.seed, kernel=kernel
            ),
        )

    def moments(self, name: str) -> Moments:
        """Mean, covariance and its root for the Fréchet distance, computed once."""
        return self._cached(("moments", name), lambda: Moments.of(self.features[name]))

    def radii(self, name: str, neighbour: int) -> Tensor:
        """Distance of each real image to its `neighbour`-th nearest real image, float64 [M], computed once."""
        return self._cached(("radii", name, str(neighbour)), lambda: radii(self.features[name], neighbour))

    def prompt_features(self, name: str) -> np.ndarray:
        """Text embeddings of the prompts, float32 [N, D], computed once."""
        return self._cached(("prompts", name), lambda: self.clip(name).encode_text(self.clip_texts or self.prompts).numpy())

    def clip(self, name: str) -> CLIPFeatureExtractor:
        """The extractor called `name`, which reads captions."""
        extractor = self.extractors[name]
        assert isinstance(extractor, CLIPFeatureExtractor), name
        return extractor

    def logits(self, name: str, features: np.ndarray) -> np.ndarray:
        """Class logits [N, L] from the features [N, D] of the extractor called `name`, which is a classifier."""
        extractor = self.extractors[name]
        assert isinstance(extractor, Inception | EfficientNetLite0), name
        return extractor.logits(features)

    def _cached(self, key: tuple[str, ...], make: Callable[[], Any]) -> Any:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]


def make_extractors(spec: ProtocolSpec, device: torch.device | str = "cpu") -> dict[str, FeatureExtractor]:
    """The extractors of a protocol by name, after a check that every metric has features that it can use.

    Raises:
        ConfigError: a distance has none, or weights cannot be had.
    """
    check_metrics(spec.metrics, spec.features)
    return {
        name: make_extractor(name, feature_size=spec.feature_size, weights=spec.weights, device=device)
        for name in spec.features
    }


def select_prompts(reference: ImageDataset, num_images: int) -> tuple[list[str], Tensor | None]:
    """The first caption of each of the first reference images, with their labels int64 [N, A] where known.

    Raises:
        ConfigError: there are fewer reference images than the protocol needs.
    """
    if num_images > len(reference):
        raise ConfigError(
            f"protocol.num_images={num_images} exceeds the {len(reference)} captions of data.reference, and each "
            f"caption is used once: take {len(reference)} or fewer, or a larger reference"
        )
    labels = None if reference.labels is None else reference.labels[:num_images]
    return [prompts[0] for prompts in reference.captions[:num_images]], labels


def write_features(folder: Path, extractor: FeatureExtractor, images: Tensor) -> None:
    """Features of uint8 [M, 3, R, R] as `features.safetensors`."""
    save_file({"features": extractor(images).cpu()}, folder / "features.safetensors")


def read_features(folder: Path) -> np.ndarray:
    """Read float32 [M, D].

    Raises:
        RunError: the file is missing or damaged.
    """
    return read_tensors(folder / "features.safetensors", "features")["features"].numpy()


def require_labels(train: ImageDataset, held_out: ImageDataset) -> None:
    """Raise ConfigError if alignment is required but the images have no labels."""
    if train.labels is None or held_out.labels is None:
        raise ConfigError(LABELS_NEEDED)


def fit_attribute_classifier(
    folder: Path, train: ImageDataset, held_out: ImageDataset, num_classes: tuple[int, ...], seed: int
) -> dict[str, object]:
    """Train the attribute classifier on real images, save it, and return its accuracy on held-out real images."""
    assert train.labels is not None, "require_labels comes first"
    assert held_out.labels is not None, "require_labels comes first"
    classifier = train_attribute_classifier(train.images, train.labels, num_classes, num_epochs=CLASSIFIER_EPOCHS, seed=seed)
    classifier.save(folder)
    accuracy = classifier.accuracy(held_out.images, held_out.labels)
    return {
        "accuracy": float(accuracy.mean()),
        "accuracy_by_head": [float(value) for value in accuracy],
        "held_out": len(held_out),
    }


def num_label_classes(train: ImageDataset) -> tuple[int, ...]:
    """Number of classes of each head, from the labels themselves: one more than the largest."""
    assert train.labels is not None
    return tuple(int(value) + 1 for value in torch.amax(train.labels, dim=0))
