"""The latent cache: its content, the order in which a training reads it, and recovery from errors.

Oracles: safetensors, the encoder and tokenizer of transformers, scipy's tests of distributions.
"""

from __future__ import annotations

import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor

from isocost.config.data import ScenesSource
from isocost.config.model import TextEncoderSpec
from isocost.data import latent_cache
from isocost.data.datasets import UnreadableSample
from isocost.data.latent_cache import (
    ImageDataset,
    LatentCache,
    ProcessInfo,
    count_images_and_captions,
    estimate_cache_bytes,
    load_images,
    write_cache,
    write_index,
)
from isocost.data.row_store import ShardStore
from isocost.data.shuffle import shuffled_indices
from isocost.errors import RunError
from isocost.models.autoencoder import PCAAutoencoder
from isocost.models.text_encoder import MiniLMTextEncoder, minilm_path

R, PATCH, CHANNELS, TOKENS = 32, 8, 4, 12
NUM_IMAGES = 25


@pytest.fixture(scope="module")
def text() -> MiniLMTextEncoder:
    return MiniLMTextEncoder(TextEncoderSpec(path="minilm", max_tokens=TOKENS))


@pytest.fixture(scope="module")
def images() -> ImageDataset:
    loaded = load_images(ScenesSource(kind="scenes", num_images=NUM_IMAGES), R, 0)
    loaded.unreadable.append(UnreadableSample("lost.png", "image cannot be read: truncated"))
    return loaded


@pytest.fixture(scope="module")
def autoencoder(images: ImageDataset) -> PCAAutoencoder:
    return PCAAutoencoder.fit(images.images, PATCH, CHANNELS)


class Spread:
    """An autoencoder with known moments: the mean is the image's grey level, the std depends on the channel."""

    latent_channels, factor = 2, 16
    fallbacks: tuple[str, ...] = ()
    stds = torch.tensor([0.5, 2.0])

    def encode(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        mean = batch[:, :1, :1, :1].float().expand(-1, 2, 2, 2)
        return mean, self.stds[:, None, None].expand_as(mean)


def grey_images(*captions: tuple[str, ...]) -> ImageDataset:
    """A data set whose n-th image, 32 x 32, has grey level n."""
    levels = torch.arange(len(captions), dtype=torch.uint8)
    names = [str(number) for number in range(len(captions))]
    return ImageDataset(levels[:, None, None, None].expand(-1, 3, R, R).contiguous(), list(captions), names, None)


def write_and_open(folder: Path, images: ImageDataset, autoencoder: Any, text: MiniLMTextEncoder) -> LatentCache:
    store = ShardStore(folder)
    write_index(store, write_cache(store, images.read, autoencoder, text, max_unreadable_fraction=0.5))
    return LatentCache(store)


def decode_captions(cache: LatentCache, numbers: Tensor, text: MiniLMTextEncoder) -> list[str]:
    """Captions, decoded by the tokenizer from their token ids."""
    return text.tokenizer.batch_decode(cache.token_ids(numbers), skip_special_tokens=True)


# --- content ----------------------------------------------------------------------------------------------------------


def test_latents_are_read_back_as_encoded_and_decode_to_the_images(
    images: ImageDataset, autoencoder: PCAAutoencoder, text: MiniLMTextEncoder, tmp_path: Path
) -> None:
    cache = write_and_open(tmp_path, images, autoencoder, text)
    mean, std = autoencoder.encode(images.images)
    assert len(cache) == NUM_IMAGES
    order = shuffled_indices(0, 0, NUM_IMAGES, NUM_IMAGES)
    means, stds = cache.moments(order)
    assert torch.allclose(means, mean[order], atol=4e-3)
    assert torch.equal(stds, std[order])
    decoded, expected = autoencoder.decode(means).int(), autoencoder.decode(mean[order]).int()
    assert (decoded - expected).abs().max() <= 2


@pytest.mark.parametrize(("shard_size", "shards"), [(30, [25]), (10, [10, 10, 5]), (5, [5] * 5), (12, [12, 12, 1])])
def test_shards_have_a_fixed_size_that_does_not_change_what_is_read(
    shard_size: int,
    shards: list[int],
    images: ImageDataset,
    autoencoder: PCAAutoencoder,
    text: MiniLMTextEncoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = replace(images, unreadable=[])
    original = write_and_open(tmp_path / "whole", images, autoencoder, text)
    monkeypatch.setattr(latent_cache, "SHARD_SIZE", shard_size)
    monkeypatch.setattr(latent_cache, "ENCODE_BATCH", 4)
    cache = write_and_open(tmp_path / "shards", images, autoencoder, text)
    files = [load_file(file) for file in sorted((tmp_path / "shards").glob("latents-*.safetensors"))]
    assert [len(file["mean"]) for file in files] == [len(file["std"]) for file in files] == shards
    assert {file["mean"].dtype for file in files} == {torch.float16}
    for images_seen in (0, 16, 160):
        chosen = shuffled_indices(3, images_seen, 16, NUM_IMAGES)
        assert torch.allclose(cache.moments(chosen)[0], original.moments(chosen)[0], atol=4e-3)
        assert torch.equal(cache.captions(chosen), original.captions(chosen))


def test_the_index_describes_the_cache_and_progress_counts_images_and_captions(
    images: ImageDataset, autoencoder: PCAAutoencoder, text: MiniLMTextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_cache, "SHARD_SIZE", 10)
    monkeypatch.setattr(latent_cache, "ENCODE_BATCH", 4)
    steps: list[int] = []
    store = ShardStore(tmp_path)
    index = write_cache(store, images.read, autoencoder, text, max_unreadable_fraction=0.1, progress=steps.append)
    assert sum(steps) == NUM_IMAGES + index["num_captions"] + 1
    assert len(steps) > 3
    assert index.pop("token_statistics") == asdict(text.token_statistics([c for of_image in images.captions for c in of_image]))
    assert index.pop("tables").keys() == {"latents", "captions", "text"}
    assert index == {
        "num_images": NUM_IMAGES,
        "num_captions": len({caption for captions in images.captions for caption in captions}),
        "latent_shape": [CHANNELS, R // PATCH, R // PATCH],
        "num_tokens": TOKENS,
        "cross_attention_dim": 384,
        "with_prompt_embeds": True,
        "shard_size": 10,
        "num_bad": 1,
        "bad": [{"position": NUM_IMAGES, "name": "lost.png", "reason": "image cannot be read: truncated"}],
    }
    counted = count_images_and_captions(images.read)
    assert counted == (NUM_IMAGES + 1, index["num_captions"])
    expected = estimate_cache_bytes(NUM_IMAGES, (CHANNELS, R // PATCH, R // PATCH), counted[1], (TOKENS, 384), True)
    written = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert written == pytest.approx(expected, rel=0.05)


def test_each_distinct_caption_is_stored_once_and_each_image_has_its_captions_in_order(
    text: MiniLMTextEncoder, tmp_path: Path
) -> None:
    captions = [("zebra", "a dog"), ("a dog",), ("a cat", "zebra", "a dog")]
    cache = write_and_open(tmp_path, grey_images(*captions), Spread(), text)
    numbers = cache.captions(torch.arange(3))
    assert (numbers >= 0).sum(1).tolist() == [2, 1, 3]
    assert [tuple(decode_captions(cache, row[row >= 0], text)) for row in numbers] == captions
    assert (numbers[1, 1:] == -1).all()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path())
    expected = tokenizer(["a cat", "a dog", "zebra", ""], padding="max_length", truncation=True, max_length=TOKENS)
    assert cache.token_ids(torch.arange(4)).tolist() == expected["input_ids"]


def test_prompt_embeddings_equal_those_of_transformers_and_the_empty_caption_is_last(
    text: MiniLMTextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = [("a red circle above two green stars",), ("a dog", "one"), ("a very long " * 10,), ("a dog",)]
    monkeypatch.setattr(latent_cache, "ENCODE_BATCH", 2)
    cache = write_and_open(tmp_path, grey_images(*captions), Spread(), text)
    distinct = sorted({caption for image_captions in captions for caption in image_captions})
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path())
    network = transformers.AutoModel.from_pretrained(minilm_path())
    tokens = tokenizer([*distinct, ""], padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    with torch.inference_mode():
        expected = network(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    prompt_embeds = cache.prompt_embeds(torch.arange(len(distinct) + 1))
    assert prompt_embeds.shape == (len(distinct) + 1, TOKENS, 384)
    assert torch.allclose(prompt_embeds, expected, atol=5e-3)
    assert (expected[0] - expected[-1]).abs().max() > 0.1


# --- the order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_images", [1, 7, 100])
def test_each_epoch_has_every_image_once(num_images: int) -> None:
    order = shuffled_indices(5, 0, 6 * num_images, num_images)
    assert order.dtype == torch.int64
    for epoch in order.view(6, num_images):
        assert sorted(epoch.tolist()) == list(range(num_images))


def test_epochs_and_seeds_each_have_their_own_order() -> None:
    orders = [tuple(shuffled_indices(seed, epoch * 30, 30, 30).tolist()) for seed in range(6) for epoch in range(6)]
    assert len(set(orders)) == 36


@pytest.mark.parametrize("pieces", [(64, 64, 64, 8), (1,) * 200, (200,), (30, 31, 100, 39)])
def test_the_order_does_not_depend_on_how_it_is_split(pieces: tuple[int, ...]) -> None:
    whole = shuffled_indices(2, 11, 200, 30)
    firsts = np.cumsum((11, *pieces))[:-1]
    parts = [shuffled_indices(2, int(first), count, 30) for first, count in zip(firsts, pieces, strict=True)]
    assert torch.equal(torch.cat(parts), whole)


def test_the_order_of_a_huge_data_set_is_fast_and_stays_within_it() -> None:
    num_images = 600_000_000
    order = shuffled_indices(1, 3 * num_images - 50_000, 100_000, num_images)
    assert len(order.unique()) > 99_980
    assert 0 <= int(order.min()) < num_images / 100
    assert num_images * 0.99 < int(order.max()) < num_images


def test_every_position_in_an_epoch_is_equally_likely_for_an_image() -> None:
    """Chi-square over (image, position) of 2000 epochs, with (n - 1)^2 degrees of freedom."""
    epochs, size = 2000, 8
    order = shuffled_indices(0, 0, epochs * size, size).view(epochs, size)
    counts = np.stack([np.bincount(order[:, position], minlength=size) for position in range(size)])
    expected = epochs / size
    statistic = ((counts - expected) ** 2 / expected).sum()
    low, high = stats.chi2((size - 1) ** 2).ppf([1e-4, 1 - 1e-4])
    assert low < statistic < high


# --- errors -----------------------------------------------------------------------------------------------------------


def test_unreadable_images_leave_no_gap_in_the_indices(
    text: MiniLMTextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_cache, "SHARD_SIZE", 4)
    images = grey_images(*[(f"grey {n}",) for n in range(8)])

    def read(is_needed: Any) -> Any:
        for position, item in enumerate(images.read(is_needed)):
            yield UnreadableSample(f"{position}.png", "broken") if position in {0, 3, 4} else item

    store = ShardStore(tmp_path)
    write_index(store, write_cache(store, read, Spread(), text, max_unreadable_fraction=0.5))
    cache = LatentCache(store)
    assert len(cache) == 5
    means, _ = cache.moments(torch.arange(5))
    assert means[:, 0, 0, 0].tolist() == [1, 2, 5, 6, 7]
    assert [decode_captions(cache, row, text)[0] for row in cache.captions(torch.arange(5))] == [
        f"grey {n}" for n in (1, 2, 5, 6, 7)
    ]
    with pytest.raises(
        RunError, match=r"3 of 8 images cannot be read, more than data\.max_unreadable_fraction=0\.1; first: 0\.png"
    ):
        write_cache(store, read, Spread(), text, max_unreadable_fraction=0.1)


def test_several_processes_write_one_cache_and_existing_shards_are_not_encoded_again(
    images: ImageDataset, autoencoder: PCAAutoencoder, text: MiniLMTextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_cache, "SHARD_SIZE", 8)
    single_process = write_and_open(tmp_path / "alone", images, autoencoder, text)
    store = ShardStore(tmp_path / "together")
    barriers = [threading.Barrier(3) for _ in range(1)]

    def write_as_rank(rank: int) -> dict[str, Any]:
        process = ProcessInfo(rank, 3, lambda: barriers[0].wait() and None)
        return write_cache(store, images.read, autoencoder, text, max_unreadable_fraction=0.5, process=process)

    with ThreadPoolExecutor(3) as pool:
        write_index(store, next(iter(pool.map(write_as_rank, range(3)))))
    three_processes = LatentCache(store)
    all_images = torch.arange(len(single_process))
    assert torch.allclose(three_processes.moments(all_images)[0], single_process.moments(all_images)[0], atol=4e-3)
    assert torch.equal(three_processes.captions(all_images), single_process.captions(all_images))
    (tmp_path / "together" / "latents-00001.safetensors").unlink()
    encoded: list[int] = []
    write_cache(store, images.read, autoencoder, text, max_unreadable_fraction=0.5, progress=encoded.append)
    assert encoded == [8]


def test_a_truncated_missing_or_damaged_shard_is_a_clear_error(text: MiniLMTextEncoder, tmp_path: Path) -> None:
    cache = write_and_open(tmp_path, grey_images(("a",), ("b",), ("c",)), Spread(), text)
    file = tmp_path / "latents-00000.safetensors"
    original = file.read_bytes()
    file.write_bytes(original[:-5])
    with pytest.raises(RunError, match=r"latents-00000\.safetensors: the shard has \d+ bytes, the index expects \d+"):
        LatentCache(tmp_path)
    file.unlink()
    with pytest.raises(RunError, match="the shard is missing"):
        LatentCache(tmp_path)
    file.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    cache = LatentCache(tmp_path)
    cache.moments(torch.tensor([0, 1]))
    with pytest.raises(RunError, match="does not match its checksum"):
        cache.moments(torch.tensor([2]))


def test_an_object_store_can_hold_a_cache(
    images: ImageDataset, autoencoder: PCAAutoencoder, text: MiniLMTextEncoder, tmp_path: Path
) -> None:
    local = write_and_open(tmp_path, images, autoencoder, text)
    store = ShardStore("memory://bucket/caches/one")
    assert not store.is_local
    write_index(store, write_cache(store, images.read, autoencoder, text, max_unreadable_fraction=0.5))
    remote = LatentCache("memory://bucket/caches/one")
    chosen = shuffled_indices(0, 7, 32, NUM_IMAGES)
    assert all(torch.equal(a, b) for a, b in zip(remote.moments(chosen), local.moments(chosen), strict=True))
    assert torch.equal(remote.captions(chosen), local.captions(chosen))
    assert torch.equal(remote.prompt_embeds(torch.tensor([1, 0])), local.prompt_embeds(torch.tensor([1, 0])))


def test_a_full_disk_is_a_clear_error_and_the_same_call_continues(
    images: ImageDataset, autoencoder: PCAAutoencoder, text: MiniLMTextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_cache, "SHARD_SIZE", 8)
    store, writes = ShardStore(tmp_path), []
    write = ShardStore.write

    def full(self: ShardStore, name: str, data: bytes) -> None:
        writes.append(name)
        if len(writes) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, data)

    monkeypatch.setattr(ShardStore, "write", full)
    with pytest.raises(RunError, match=r"cannot be written .*No space left"):
        write_cache(store, images.read, autoencoder, text, max_unreadable_fraction=0.5)
    with pytest.raises(FileNotFoundError):
        LatentCache(store)
    encoded: list[int] = []
    write_index(store, write_cache(store, images.read, autoencoder, text, max_unreadable_fraction=0.5, progress=encoded.append))
    assert encoded[:3] == [8, 8, 1]
    assert len(LatentCache(store)) == NUM_IMAGES


def test_a_random_subset_of_a_sorted_source_has_all_its_kinds() -> None:
    levels = torch.arange(400) // 200  # the first half of one kind, the second of another
    dataset = ImageDataset(
        levels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2), [("a",)] * 400, [f"{i:04d}" for i in range(400)], None
    )
    subset = dataset.random_subset(100)
    assert subset.shape == (100, 3, 2, 2)
    assert 30 < int(subset[:, 0, 0, 0].sum()) < 70
    assert torch.equal(subset, dataset.random_subset(100))
    assert len(dataset.random_subset(1000)) == 400
