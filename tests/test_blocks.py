"""Pictures in blocks: the same bits for any portions, order, worker count and company, even where rows of a call differ."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from isocost.config.evaluation import ProtocolSpec
from isocost.errors import WorkError
from isocost.evaluation import feature_batches as blocks
from isocost.evaluation.evaluator import Measuring
from isocost.evaluation.feature_batches import BLOCK, Blocks
from isocost.evaluation.image_sources import Picture
from isocost.evaluation.protocol import make_protocol
from isocost.evaluation.reference_set import Reference
from isocost.evaluation.reference_stats import take
from isocost.metrics.efficientnet import EfficientNetLite0
from small import scenes

NUM = 3 * BLOCK + 9


class Shaky:
    """Features that depend on the row of the call, on its number of rows and on the pictures' size, as on some processors."""

    id = "shaky"
    width = 2

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, pictures: Tensor) -> Tensor:
        self.seen.append(pictures)
        rows = torch.arange(len(pictures)) / 7 + len(pictures) / 3 + pictures.shape[-1] / 11
        return torch.stack([pictures.float().mean((1, 2, 3)), pictures[:, 0, 3, 5].float()], 1) * rows[:, None]


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """uint8 [NUM, 3, 32, 32]"""
    return scenes(NUM, 32)


def portions(seed: int) -> list[list[int]]:
    """All places in some order, in portions of 1 to 50."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(NUM) if seed else np.arange(NUM)
    cuts = np.cumsum(generator.integers(1, 50, size=NUM))
    return [part.tolist() for part in np.split(order, cuts[cuts < NUM])]


def made_of(pictures: Tensor, parts: list[list[int]]) -> tuple[list[int], Tensor, Shaky]:
    shaky = Shaky()
    taken = Blocks({"shaky": shaky})
    for part in parts:
        for place in part:
            taken.add(place, pictures[place])
    places, found = taken.results()
    return places, found["shaky"], shaky


def test_block_k_holds_the_pictures_of_its_places(pictures: Tensor) -> None:
    padded = torch.cat([pictures, pictures.new_zeros(4 * BLOCK - NUM, 3, 32, 32)]).split(BLOCK)
    for seed in range(3):
        places, _, shaky = made_of(pictures, portions(seed))
        assert places == list(range(NUM))
        assert len(shaky.seen) == 4
        assert all(any(torch.equal(block, seen) for seen in shaky.seen) for block in padded)


def test_blocks_run_as_they_fill(pictures: Tensor) -> None:
    shaky = Shaky()
    taken = Blocks({"shaky": shaky})
    for place in range(BLOCK):
        assert not shaky.seen
        taken.add(place, pictures[place])
    assert len(shaky.seen) == 1


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("most_waiting", [5, 40, 1024])
def test_portions_and_order_change_no_bit(
    pictures: Tensor, seed: int, most_waiting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole, _ = made_of(pictures, portions(0))
    monkeypatch.setattr(blocks, "MOST_WAITING", most_waiting)
    assert torch.equal(made_of(pictures, portions(seed))[1], whole)


@pytest.mark.parametrize("num_workers", [2, 3, 7])
def test_the_number_of_workers_changes_no_bit(pictures: Tensor, num_workers: int) -> None:
    _, whole, _ = made_of(pictures, portions(0))
    for worker in range(num_workers):
        places, found, _ = made_of(pictures, [list(range(worker, NUM, num_workers))])
        assert torch.equal(found, whole[places])


def test_missing_pictures_and_other_sizes_change_no_bit_of_the_rest(pictures: Tensor) -> None:
    _, whole, _ = made_of(pictures, portions(0))
    places, found, _ = made_of(pictures, [[place for place in range(NUM) if place % 11]])
    assert torch.equal(found, whole[places])
    places, found, shaky = made_of(pictures, [[5, 40, 77, 100]])
    assert torch.equal(found, whole[places])
    assert len(shaky.seen) == 1  # the rest shares a block
    mixed = Blocks({"shaky": Shaky()})
    for place in range(NUM):
        mixed.add(place, pictures[place, :, :24, :24] if place % 3 else pictures[place])
    places, by_name = mixed.results()
    assert places == list(range(NUM))
    assert torch.equal(by_name["shaky"][::3], whole[::3])


def test_a_picture_that_comes_twice_is_refused(pictures: Tensor) -> None:
    taken = Blocks({"shaky": Shaky()})
    for place in range(BLOCK + 1):
        taken.add(place, pictures[place])
    for place in (3, BLOCK):
        with pytest.raises(WorkError, match=f"picture {place} came twice"):
            taken.add(place, pictures[place])


def test_no_pictures_give_nothing() -> None:
    assert Blocks({"shaky": Shaky()}).results() == ([], {})


def test_a_point_measures_the_same_in_any_portions(pictures: Tensor) -> None:
    spec = ProtocolSpec(num_pictures=NUM)
    protocol = make_protocol(spec, resolution=32, extractor="shaky", reference="", num_reference=NUM, captions=[])
    found = []
    for seed in range(3):
        measuring = Measuring(Reference(protocol, {"efficientnet-lite0": Shaky()}, {}, []))
        for part in portions(seed):
            measuring.add(part, pictures[part])
        found.append(measuring.measured())
    for other in found[1:]:
        assert np.array_equal(other.features["efficientnet-lite0"], found[0].features["efficientnet-lite0"])
        assert np.array_equal(other.ids, np.arange(NUM))


def test_a_folder_measures_as_a_point_does(pictures: Tensor) -> None:
    """One room for both: `take` in any order is `Measuring`, bit for bit, with a real extractor too."""
    keys = [f"p{place}" for place in range(NUM)]
    extractors = {"shaky": Shaky(), "efficientnet-lite0": EfficientNetLite0(side=32)}
    order = np.random.default_rng(1).permutation(NUM)
    taken = take((Picture(keys[place], keys[place], pictures[place]) for place in order), extractors, keys)
    again = take((Picture(key, key, picture) for key, picture in zip(keys, pictures, strict=True)), extractors, keys)
    assert (taken.ids, taken.content) == (again.ids, again.content)
    for name in extractors:
        assert np.array_equal(taken.features[name], again.features[name])
    assert np.array_equal(taken.features["shaky"], made_of(pictures, portions(0))[1].numpy())
