"""The attribute classifier: it recognises planted labels, depends on its arguments only, and is saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from isocost.errors import ConfigError
from isocost.metrics.attribute_classifier import (
    BATCH_SIZE,
    AttributeClassifier,
    AttributeClassifierNetwork,
    train_attribute_classifier,
)

COLOURS = torch.tensor([[220, 40, 40], [40, 200, 60], [50, 70, 230]], dtype=torch.uint8)
HEADS = (3, 2, 2)


def planted(num: int, seed: int, side: int = 32) -> tuple[Tensor, Tensor]:
    """A coloured square on noise, uint8 [num, 3, side, side], with labels [num, 3]: colour, left or right, up or down."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(90, 166, (num, 3, side, side), dtype=torch.uint8, generator=generator)
    labels = torch.stack([torch.randint(0, count, (num,), generator=generator) for count in HEADS], 1)
    box, half = side // 4, side // 2
    for image, (colour, right, down) in zip(images, labels.tolist(), strict=True):
        x, y = torch.randint(0, half - box + 1, (2,), generator=generator).tolist()
        image[:, y + down * half :, x + right * half :][:, :box, :box] = COLOURS[colour, :, None, None]
    return images, labels


@pytest.fixture(scope="module")
def fitted() -> AttributeClassifier:
    return train_attribute_classifier(*planted(512, 0), HEADS, num_epochs=6)


def untrained(side: int = 32, num_classes: tuple[int, ...] = HEADS) -> AttributeClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AttributeClassifier(AttributeClassifierNetwork(side, num_classes))


# --- training ---------------------------------------------------------------------------------------------------------


def test_planted_colour_and_position_are_recognised_in_new_images(fitted: AttributeClassifier) -> None:
    accuracy = fitted.accuracy(*planted(200, 1))
    assert accuracy.shape == (3,)
    assert (accuracy > 0.95).all()


def test_a_label_that_is_not_in_the_image_is_not_recognised() -> None:
    images, labels = planted(512, 0)
    labels[:, 1] = torch.randint(0, 2, (512,), generator=torch.Generator().manual_seed(3))
    classifier = train_attribute_classifier(images, labels[:, :2], (3, 2), num_epochs=3)
    fresh, of_fresh = planted(200, 1)
    colour, chance = classifier.accuracy(fresh, torch.stack([of_fresh[:, 0], torch.arange(200) % 2], 1))
    assert colour > 0.9
    assert 0.3 < chance < 0.7


def test_larger_images_are_classified_too() -> None:
    classifier = train_attribute_classifier(*planted(256, 0, side=64), HEADS, num_epochs=8)
    assert (classifier.accuracy(*planted(100, 1, side=64)) > 0.9).all()


def test_alignment_falls_with_noise(fitted: AttributeClassifier) -> None:
    images, labels = planted(200, 1)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    means = [
        fitted.alignment((images + deviation * noise).clamp(0, 255).to(torch.uint8), labels).mean()
        for deviation in (0, 150, 1000)
    ]
    assert means[0] > means[1] > means[2]
    assert means[2] < 0.6


def test_training_is_a_function_of_its_arguments() -> None:
    images, labels = planted(192, 0)
    torch.manual_seed(1)
    first = train_attribute_classifier(images, labels, HEADS, num_epochs=2, seed=5)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    again = train_attribute_classifier(images, labels, HEADS, num_epochs=2, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = train_attribute_classifier(images, labels, HEADS, num_epochs=2, seed=6)
    weights = [classifier.network.state_dict() for classifier in (first, again, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["heads.0.weight"], weights[2]["heads.0.weight"])


def test_training_does_not_change_images_and_labels() -> None:
    images, labels = planted(128, 0)
    copies = images.clone(), labels.clone()
    train_attribute_classifier(images, labels, HEADS, num_epochs=1)
    assert torch.equal(images, copies[0])
    assert torch.equal(labels, copies[1])


# --- predicting -------------------------------------------------------------------------------------------------------


def test_predictions_are_one_class_per_head(fitted: AttributeClassifier) -> None:
    images, labels = planted(50, 1)
    predicted = fitted.predict(images)
    assert predicted.shape == labels.shape
    assert predicted.dtype == torch.int64
    assert (predicted >= 0).all()
    assert (predicted < torch.tensor(HEADS)).all()


@pytest.mark.parametrize("side", [32, 48, 80, 256])
def test_every_multiple_of_16_is_an_image_size(side: int) -> None:
    assert untrained(side).predict(planted(3, 0, side)[0]).shape == (3, 3)


def test_alignment_and_accuracy_are_means_of_one_table(fitted: AttributeClassifier) -> None:
    images, labels = planted(60, 1)
    labels[:20, 0] = (labels[:20, 0] + 1) % 3
    correct = (fitted.predict(images) == labels).numpy()
    np.testing.assert_allclose(fitted.accuracy(images, labels), correct.mean(0))
    np.testing.assert_allclose(fitted.alignment(images, labels), correct.mean(1))
    assert fitted.alignment(images, labels)[:20].mean() < 0.75


def test_predictions_do_not_depend_on_other_images(fitted: AttributeClassifier) -> None:
    images, _ = planted(2 * BATCH_SIZE + 20, 1)
    together = fitted.predict(images)
    assert torch.equal(fitted.predict(images.flip(0)).flip(0), together)
    few = [0, 17, 2 * BATCH_SIZE + 3]
    assert torch.equal(torch.cat([fitted.predict(images[index : index + 1]) for index in few]), together[few])


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_saved_classifier_predicts_the_same(fitted: AttributeClassifier, tmp_path: Path) -> None:
    fitted.save(tmp_path / "deep" / "classifier")
    loaded = AttributeClassifier.load(tmp_path / "deep" / "classifier")
    images, _ = planted(100, 1)
    assert torch.equal(loaded.predict(images), fitted.predict(images))
    assert not loaded.network.training
    assert json.loads((tmp_path / "deep" / "classifier" / "classifier.json").read_text()) == {
        "side": 32,
        "num_classes": [3, 2, 2],
    }


def test_a_saved_classifier_can_be_overwritten(fitted: AttributeClassifier, tmp_path: Path) -> None:
    untrained(48, (5,)).save(tmp_path)
    fitted.save(tmp_path)
    assert AttributeClassifier.load(tmp_path).network.num_classes == HEADS


@pytest.mark.parametrize("missing", ["classifier.json", "classifier.safetensors"])
def test_a_folder_without_a_complete_classifier_is_refused(tmp_path: Path, missing: str) -> None:
    untrained().save(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ConfigError, match=missing):
        AttributeClassifier.load(tmp_path)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_fewer_images_than_a_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match=f"127.*{BATCH_SIZE}"):
        train_attribute_classifier(*planted(127, 0), HEADS, num_epochs=1)


@pytest.mark.parametrize("side", [16, 40, 100])
def test_an_image_size_that_the_stem_cannot_divide_is_refused(side: int) -> None:
    with pytest.raises(ConfigError, match=f"multiple of 16.*{side}"):
        train_attribute_classifier(*planted(128, 0, side=side), HEADS, num_epochs=1)


@pytest.mark.parametrize(
    ("head", "label"), [(0, 3), (1, -1), (2, 2)], ids=["above the classes", "negative", "above the classes of the last head"]
)
def test_labels_outside_their_classes_are_refused_by_head(head: int, label: int) -> None:
    images, labels = planted(128, 0)
    labels[77, head] = label
    with pytest.raises(ConfigError, match=f"head {head}.*{label}"):
        train_attribute_classifier(images, labels, HEADS, num_epochs=1)


@pytest.mark.parametrize("selection", [(slice(0, 100), slice(None)), (slice(None), slice(0, 2)), (slice(None), 0)])
def test_labels_that_do_not_fit_images_and_heads_are_refused(
    selection: tuple[slice, slice | int], fitted: AttributeClassifier
) -> None:
    images, labels = planted(128, 0)
    for refused_call in (
        lambda: train_attribute_classifier(images, labels[selection], HEADS, num_epochs=1),
        lambda: fitted.accuracy(images, labels[selection]),
        lambda: fitted.alignment(images, labels[selection]),
    ):
        with pytest.raises(ConfigError, match=r"labels must be \[128, 3\]"):
            refused_call()


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(4, 3, 64, 64, dtype=torch.uint8),
        torch.zeros(4, 3, 32, 48, dtype=torch.uint8),
        torch.zeros(4, 1, 32, 32, dtype=torch.uint8),
        torch.zeros(4, 3, 32, 32),
        torch.zeros(3, 32, 32, dtype=torch.uint8),
    ],
    ids=["other side", "not square", "grey", "float", "no batch"],
)
def test_images_of_another_type_or_size_are_refused(wrong: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"uint8 \[N, 3, 32, 32\]"):
        untrained().predict(wrong)


def test_images_that_are_not_square_are_refused_in_training() -> None:
    with pytest.raises(ConfigError, match="uint8"):
        train_attribute_classifier(
            torch.zeros(128, 3, 32, 48, dtype=torch.uint8), torch.zeros(128, 1, dtype=torch.int64), (2,), num_epochs=1
        )
