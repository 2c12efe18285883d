"""Fixed feature batches: equal bits for any grouping, order and number of workers, even if rows of a call differ."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from isocost.config.evaluation import ProtocolSpec
from isocost.errors import RunError
from isocost.evaluation import feature_batches
from isocost.evaluation.evaluator import FeatureCollector
from isocost.evaluation.feature_batches import FEATURE_BATCH, FixedBatchRunner
from isocost.evaluation.image_sources import SourceImage
from isocost.evaluation.protocol import make_protocol
from isocost.evaluation.reference_set import ReferenceSet
from isocost.evaluation.reference_stats import extract_features
from isocost.metrics.efficientnet import EfficientNetLite0
from tiny_configs import scenes

NUM = 3 * FEATURE_BATCH + 9


class RowDependent:
    """Features that depend on the row in the call, on its number of rows and on the image size, as on some processors."""

    id = "row-dependent"
    feature_dim = 2

    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.batches.append(images)
        rows = torch.arange(len(images)) / 7 + len(images) / 3 + images.shape[-1] / 11
        return torch.stack([images.float().mean((1, 2, 3)), images[:, 0, 3, 5].float()], 1) * rows[:, None]


@pytest.fixture(scope="module")
def images() -> Tensor:
    """uint8 [NUM, 3, 32, 32]"""
    return scenes(NUM, 32)


def random_groups(seed: int) -> list[list[int]]:
    """All indices in groups of 1 to 50; in ascending order for seed 0, else in random order."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(NUM) if seed else np.arange(NUM)
    cuts = np.cumsum(generator.integers(1, 50, size=NUM))
    return [group.tolist() for group in np.split(order, cuts[cuts < NUM])]


def run(images: Tensor, groups: list[list[int]]) -> tuple[list[int], Tensor, RowDependent]:
    function = RowDependent()
    runner = FixedBatchRunner({"features": function})
    for group in groups:
        for index in group:
            runner.add(index, images[index])
    indices, outputs = runner.results()
    return indices, outputs["features"], function


def test_batch_k_has_the_images_with_its_indices(images: Tensor) -> None:
    padded = torch.cat([images, images.new_zeros(4 * FEATURE_BATCH - NUM, 3, 32, 32)]).split(FEATURE_BATCH)
    for seed in range(3):
        indices, _, function = run(images, random_groups(seed))
        assert indices == list(range(NUM))
        assert len(function.batches) == 4
        assert all(any(torch.equal(expected, batch) for batch in function.batches) for expected in padded)


def test_a_batch_runs_when_it_is_full(images: Tensor) -> None:
    function = RowDependent()
    runner = FixedBatchRunner({"features": function})
    for index in range(FEATURE_BATCH):
        assert not function.batches
        runner.add(index, images[index])
    assert len(function.batches) == 1


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("max_buffered", [5, 40, 1024])
def test_grouping_and_order_change_no_bit(
    images: Tensor, seed: int, max_buffered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected, _ = run(images, random_groups(0))
    monkeypatch.setattr(feature_batches, "MAX_BUFFERED", max_buffered)
    assert torch.equal(run(images, random_groups(seed))[1], expected)


@pytest.mark.parametrize("num_workers", [2, 3, 7])
def test_the_number_of_workers_changes_no_bit(images: Tensor, num_workers: int) -> None:
    _, expected, _ = run(images, random_groups(0))
    for worker in range(num_workers):
        indices, features, _ = run(images, [list(range(worker, NUM, num_workers))])
        assert torch.equal(features, expected[indices])


def test_missing_images_and_other_sizes_change_no_bit_of_other_images(images: Tensor) -> None:
    _, expected, _ = run(images, random_groups(0))
    indices, features, _ = run(images, [[index for index in range(NUM) if index % 11]])
    assert torch.equal(features, expected[indices])
    indices, features, function = run(images, [[5, 40, 77, 100]])
    assert torch.equal(features, expected[indices])
    assert len(function.batches) == 1  # the remaining images share a batch
    runner = FixedBatchRunner({"features": RowDependent()})
    for index in range(NUM):
        runner.add(index, images[index, :, :24, :24] if index % 3 else images[index])
    indices, outputs = runner.results()
    assert indices == list(range(NUM))
    assert torch.equal(outputs["features"][::3], expected[::3])


def test_an_image_that_is_added_twice_is_refused(images: Tensor) -> None:
    runner = FixedBatchRunner({"features": RowDependent()})
    for index in range(FEATURE_BATCH + 1):
        runner.add(index, images[index])
    for index in (3, FEATURE_BATCH):
        with pytest.raises(RunError, match=f"image {index} was added twice"):
            runner.add(index, images[index])


def test_no_images_give_no_results() -> None:
    assert FixedBatchRunner({"features": RowDependent()}).results() == ([], {})


def test_a_points_features_are_the_same_for_any_grouping(images: Tensor) -> None:
    spec = ProtocolSpec(num_images=NUM)
    protocol = make_protocol(spec, resolution=32, extractor="row-dependent", reference="", num_reference=NUM, prompts=[])
    results = []
    for seed in range(3):
        collector = FeatureCollector(ReferenceSet(protocol, {"efficientnet-lite0": RowDependent()}, {}, []))
        for group in random_groups(seed):
            collector.add(group, images[group])
        results.append(collector.features())
    for result in results[1:]:
        assert np.array_equal(result.features["efficientnet-lite0"], results[0].features["efficientnet-lite0"])
        assert np.array_equal(result.ids, np.arange(NUM))


def test_a_folder_has_the_same_features_as_a_point(images: Tensor) -> None:
    """`extract_features` in any order gives the bits of `FixedBatchRunner`, with a real extractor too."""
    keys = [f"p{index}" for index in range(NUM)]
    extractors = {"row-dependent": RowDependent(), "efficientnet-lite0": EfficientNetLite0(side=32)}
    order = np.random.default_rng(1).permutation(NUM)
    shuffled = extract_features((SourceImage(keys[i], keys[i], images[i]) for i in order), extractors, keys)
    straight = extract_features(
        (SourceImage(key, key, image) for key, image in zip(keys, images, strict=True)), extractors, keys
    )
    assert (shuffled.ids, shuffled.content) == (straight.ids, straight.content)
    for name in extractors:
        assert np.array_equal(shuffled.features[name], straight.features[name])
    assert np.array_equal(shuffled.features["row-dependent"], run(images, random_groups(0))[1].numpy())
