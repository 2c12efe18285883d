"""Images in blocks: the same bits for any portions, order, worker count and company, even where rows of a call differ."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from isocost.config.evaluation import ProtocolSpec
from isocost.errors import RunError
from isocost.evaluation import feature_batches as blocks
from isocost.evaluation.evaluator import FeatureCollector
from isocost.evaluation.feature_batches import FEATURE_BATCH, FixedBatchRunner
from isocost.evaluation.image_sources import SourceImage
from isocost.evaluation.protocol import make_protocol
from isocost.evaluation.reference_set import ReferenceSet
from isocost.evaluation.reference_stats import take
from isocost.metrics.efficientnet import EfficientNetLite0
from tiny_configs import scenes

NUM = 3 * FEATURE_BATCH + 9


class Shaky:
    """Features that depend on the row of the call, on its number of rows and on the images' size, as on some processors."""

    id = "shaky"
    width = 2

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        rows = torch.arange(len(images)) / 7 + len(images) / 3 + images.shape[-1] / 11
        return torch.stack([images.float().mean((1, 2, 3)), images[:, 0, 3, 5].float()], 1) * rows[:, None]


@pytest.fixture(scope="module")
def images() -> Tensor:
    """uint8 [NUM, 3, 32, 32]"""
    return scenes(NUM, 32)


def portions(seed: int) -> list[list[int]]:
    """All places in some order, in portions of 1 to 50."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(NUM) if seed else np.arange(NUM)
    cuts = np.cumsum(generator.integers(1, 50, size=NUM))
    return [part.tolist() for part in np.split(order, cuts[cuts < NUM])]


def made_of(images: Tensor, parts: list[list[int]]) -> tuple[list[int], Tensor, Shaky]:
    shaky = Shaky()
    taken = FixedBatchRunner({"shaky": shaky})
    for part in parts:
        for place in part:
            taken.add(place, images[place])
    places, found = taken.results()
    return places, found["shaky"], shaky


def test_block_k_holds_the_images_of_its_places(images: Tensor) -> None:
    padded = torch.cat([images, images.new_zeros(4 * FEATURE_BATCH - NUM, 3, 32, 32)]).split(FEATURE_BATCH)
    for seed in range(3):
        places, _, shaky = made_of(images, portions(seed))
        assert places == list(range(NUM))
        assert len(shaky.seen) == 4
        assert all(any(torch.equal(block, seen) for seen in shaky.seen) for block in padded)


def test_blocks_run_as_they_fill(images: Tensor) -> None:
    shaky = Shaky()
    taken = FixedBatchRunner({"shaky": shaky})
    for place in range(FEATURE_BATCH):
        assert not shaky.seen
        taken.add(place, images[place])
    assert len(shaky.seen) == 1


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("most_waiting", [5, 40, 1024])
def test_portions_and_order_change_no_bit(
    images: Tensor, seed: int, most_waiting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole, _ = made_of(images, portions(0))
    monkeypatch.setattr(blocks, "MAX_BUFFERED", most_waiting)
    assert torch.equal(made_of(images, portions(seed))[1], whole)


@pytest.mark.parametrize("num_workers", [2, 3, 7])
def test_the_number_of_workers_changes_no_bit(images: Tensor, num_workers: int) -> None:
    _, whole, _ = made_of(images, portions(0))
    for worker in range(num_workers):
        places, found, _ = made_of(images, [list(range(worker, NUM, num_workers))])
        assert torch.equal(found, whole[places])


def test_missing_images_and_other_sizes_change_no_bit_of_the_rest(images: Tensor) -> None:
    _, whole, _ = made_of(images, portions(0))
    places, found, _ = made_of(images, [[place for place in range(NUM) if place % 11]])
    assert torch.equal(found, whole[places])
    places, found, shaky = made_of(images, [[5, 40, 77, 100]])
    assert torch.equal(found, whole[places])
    assert len(shaky.seen) == 1  # the rest shares a block
    mixed = FixedBatchRunner({"shaky": Shaky()})
    for place in range(NUM):
        mixed.add(place, images[place, :, :24, :24] if place % 3 else images[place])
    places, by_name = mixed.results()
    assert places == list(range(NUM))
    assert torch.equal(by_name["shaky"][::3], whole[::3])


def test_a_image_that_comes_twice_is_refused(images: Tensor) -> None:
    taken = FixedBatchRunner({"shaky": Shaky()})
    for place in range(FEATURE_BATCH + 1):
        taken.add(place, images[place])
    for place in (3, FEATURE_BATCH):
        with pytest.raises(RunError, match=f"image {place} came twice"):
            taken.add(place, images[place])


def test_no_images_give_nothing() -> None:
    assert FixedBatchRunner({"shaky": Shaky()}).results() == ([], {})


def test_a_point_measures_the_same_in_any_portions(images: Tensor) -> None:
    spec = ProtocolSpec(num_images=NUM)
    protocol = make_protocol(spec, resolution=32, extractor="shaky", reference="", num_reference=NUM, prompts=[])
    found = []
    for seed in range(3):
        measuring = FeatureCollector(ReferenceSet(protocol, {"efficientnet-lite0": Shaky()}, {}, []))
        for part in portions(seed):
            measuring.add(part, images[part])
        found.append(measuring.measured())
    for other in found[1:]:
        assert np.array_equal(other.features["efficientnet-lite0"], found[0].features["efficientnet-lite0"])
        assert np.array_equal(other.ids, np.arange(NUM))


def test_a_folder_measures_as_a_point_does(images: Tensor) -> None:
    """One room for both: `take` in any order is `Measuring`, bit for bit, with a real extractor too."""
    keys = [f"p{place}" for place in range(NUM)]
    extractors = {"shaky": Shaky(), "efficientnet-lite0": EfficientNetLite0(side=32)}
    order = np.random.default_rng(1).permutation(NUM)
    taken = take((SourceImage(keys[place], keys[place], images[place]) for place in order), extractors, keys)
    again = take((SourceImage(key, key, image) for key, image in zip(keys, images, strict=True)), extractors, keys)
    assert (taken.ids, taken.content) == (again.ids, again.content)
    for name in extractors:
        assert np.array_equal(taken.features[name], again.features[name])
    assert np.array_equal(taken.features["shaky"], made_of(images, portions(0))[1].numpy())
