"""The latent cache: what is stored, in which order it is drawn, and that a batch depends on nothing but its place.

Oracles: safetensors, transformers' own encoder and tokeniser, scipy's tests of distributions.
"""

from __future__ import annotations

import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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
from isocost.data import latent_cache as cache
from isocost.data.datasets import UnreadableSample
from isocost.data.latent_cache import (
    ImageDataset,
    LatentCache,
    ProcessInfo,
    count,
    forecast_bytes,
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
    loaded.bad.append(UnreadableSample("lost.png", "image cannot be read: truncated"))
    return loaded


@pytest.fixture(scope="module")
def autoencoder(images: ImageDataset) -> PCAAutoencoder:
    return PCAAutoencoder.fit(images.images, PATCH, CHANNELS)


class Spread:
    """An autoencoder whose moments are known: means run up with the image, stds with the channel."""

    latent_channels, factor = 2, 16
    stds = torch.tensor([0.5, 2.0])

    def encode(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        mean = batch[:, :1, :1, :1].float().expand(-1, 2, 2, 2)
        return mean, self.stds[:, None, None].expand_as(mean)


def grey_images(*captions: tuple[str, ...]) -> ImageDataset:
    """One image 32 x 32 of grey level n for the n-th captions."""
    levels = torch.arange(len(captions), dtype=torch.uint8)
    names = [str(number) for number in range(len(captions))]
    return ImageDataset(levels[:, None, None, None].expand(-1, 3, R, R).contiguous(), list(captions), names, None)


def opened(folder: Path, images: ImageDataset, autoencoder: Any, text: MiniLMTextEncoder) -> LatentCache:
    place = ShardStore(folder)
    write_index(place, write_cache(place, images.read, autoencoder, text, max_unreadable_fraction=0.5))
    return LatentCache(place)


def shown(drawn: LatentCache, numbers: Tensor, text: MiniLMTextEncoder) -> list[str]:
    """Captions as the tokeniser reads them back."""
    return text.tokenizer.batch_decode(drawn.token_ids(numbers), skip_special_tokens=True)


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_latents_come_back_as_the_autoencoder_gave_them_and_decode_to_the_images(
    images: ImageDataset, autoencoder: PCAAutoencoder, text: MiniLMTextEncoder, tmp_path: Path
) -> None:
    stored = opened(tmp_path, images, autoencoder, text)
    mean, std = autoencoder.encode(images.images)
    assert len(stored) == NUM_IMAGES
    order = shuffled_indices(0, 0, NUM_IMAGES, NUM_IMAGES)
    means, stds = stored.moments(order)
    assert torch.allclose(means, mean[order], atol=4e-3)
    assert torch.equal(stds, std[order])
    decoded, expected = autoencoder.decode(means).int(), autoencoder.decode(mean[order]).int()
    assert (decoded - expected).abs().max() <= 2


@pytest.mark.parametrize(("shard_size", "shards"), [(30, [25]), (10, [10, 10, 5]), (5, [5] * 5), (12, [12, 12, 1])])
def test_shards_have_one_fixed_size_and_draw_the_same_whatever_it_is(
    shard_size: int,
    shards: list[int],
    images: ImageDataset,
    autoencoder: PCAAutoencoder,
    text: MiniLMTextEncoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = replace(images, bad=[])
    whole = opened(tmp_path / "whole", images, autoencoder, text)
    monkeypatch.setattr(cache, "SHARD_SIZE", shard_size)
    monkeypatch.setattr(cache, "ENCODE_BATCH", 4)
    stored = opened(tmp_path / "shards", images, autoencoder, text)
    files = [load_file(file) for file in sorted((tmp_path / "shards").glob("latents-*.safetensors"))]
    assert [len(file["mean"]) for file in files] == [len(file["std"]) for file in files] == shards
    assert {file["mean"].dtype for file in files} == {torch.float16}
    for images_seen in (0, 16, 160):
        chosen = shuffled_indices(3, images_seen, 16, NUM_IMAGES)
        assert torch.allclose(stored.moments(chosen)[0], whole.moments(chosen)[0], atol=4e-3)
        assert torch.equal(stored.captions(chosen), whole.captions(chosen))


def test_the_manifest_says_what_was_written_and_progress_counts_the_images(
    images: ImageDataset, autoencoder: PCAAutoencoder, text: MiniLMTextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SHARD_SIZE", 10)
    monkeypatch.setattr(cache, "ENCODE_BATCH", 4)
    steps: list[int] = []
    place = ShardStore(tmp_path)
    manifest = write_cache(place, images.read, autoencoder, text, max_unreadable_fraction=0.1, progress=steps.append)
    assert sum(steps) == NUM_IMAGES + manifest["num_captions"] + 1
    assert len(steps) > 3
    assert manifest.pop("tables").keys() == {"latents", "captions", "text"}
    assert manifest == {
        "num_images": NUM_IMAGES,
        "num_captions": len({caption for captions in images.captions for caption in captions}),
        "latent_shape": [CHANNELS, R // PATCH, R // PATCH],
        "num_tokens": TOKENS,
        "cross_attention_dim": 384,
        "with_states": True,
        "shard_size": 10,
        "num_bad": 1,
        "bad": [{"position": NUM_IMAGES, "name": "lost.png", "reason": "image cannot be read: truncated"}],
    }
    counted = count(images.read)
    assert counted == (NUM_IMAGES + 1, manifest["num_captions"])
    expected = forecast_bytes(NUM_IMAGES, (CHANNELS, R // PATCH, R // PATCH), counted[1], (TOKENS, 384), True)
    written = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert written == pytest.approx(expected, rel=0.05)


def test_each_distinct_caption_is_stored_once_and_each_image_keeps_its_own_in_order(
    text: MiniLMTextEncoder, tmp_path: Path
) -> None:
    captions = [("zebra", "a dog"), ("a dog",), ("a cat", "zebra", "a dog")]
    stored = opened(tmp_path, grey_images(*captions), Spread(), text)
    numbers = stored.captions(torch.arange(3))
    assert (numbers >= 0).sum(1).tolist() == [2, 1, 3]
    assert [tuple(shown(stored, row[row >= 0], text)) for row in numbers] == captions
    assert (numbers[1, 1:] == -1).all()
    tokeniser = transformers.AutoTokenizer.from_pretrained(minilm_path())
    expected = tokeniser(["a cat", "a dog", "zebra", ""], padding="max_length", truncation=True, max_length=TOKENS)
    assert stored.token_ids(torch.arange(4)).tolist() == expected["input_ids"]


def test_states_are_those_of_transformers_with_the_empty_caption_last(
    text: MiniLMTextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = [("a red circle above two green stars",), ("a dog", "one"), ("a very long " * 10,), ("a dog",)]
    monkeypatch.setattr(cache, "ENCODE_BATCH", 2)
    stored = opened(tmp_path, grey_images(*captions), Spread(), text)
    distinct = sorted({caption for several in captions for caption in several})
    tokeniser = transformers.AutoTokenizer.from_pretrained(minilm_path())
    network = transformers.AutoModel.from_pretrained(minilm_path())
    tokens = tokeniser([*distinct, ""], padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    with torch.inference_mode():
        expected = network(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    states = stored.states(torch.arange(len(distinct) + 1))
    assert states.shape == (len(distinct) + 1, TOKENS, 384)
    assert torch.allclose(states, expected, atol=5e-3)
    assert (expected[0] - expected[-1]).abs().max() > 0.1


# --- the order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_images", [1, 7, 100])
def test_each_pass_shows_every_image_once(num_images: int) -> None:
    order = shuffled_indices(5, 0, 6 * num_images, num_images)
    assert order.dtype == torch.int64
    for one_pass in order.view(6, num_images):
        assert sorted(one_pass.tolist()) == list(range(num_images))


def test_passes_and_seeds_each_have_their_own_order() -> None:
    passes = [tuple(shuffled_indices(seed, number * 30, 30, 30).tolist()) for seed in range(6) for number in range(6)]
    assert len(set(passes)) == 36


@pytest.mark.parametrize("pieces", [(64, 64, 64, 8), (1,) * 200, (200,), (30, 31, 100, 39)])
def test_the_order_is_the_same_however_it_is_split(pieces: tuple[int, ...]) -> None:
    whole = shuffled_indices(2, 11, 200, 30)
    firsts = np.cumsum((11, *pieces))[:-1]
    parts = [shuffled_indices(2, int(first), count, 30) for first, count in zip(firsts, pieces, strict=True)]
    assert torch.equal(torch.cat(parts), whole)


def test_the_order_of_a_huge_set_is_found_at_once_and_keeps_within_it() -> None:
    num_images = 600_000_000
    order = shuffled_indices(1, 3 * num_images - 50_000, 100_000, num_images)
    assert len(order.unique()) > 99_980
    assert 0 <= int(order.min()) < num_images / 100
    assert num_images * 0.99 < int(order.max()) < num_images


def test_every_place_in_a_pass_is_as_likely_for_a_image() -> None:
    """Chi-square over (image, place) of 2000 passes; by the passes' count, (n - 1)^2 degrees of freedom."""
    passes, size = 2000, 8
    order = shuffled_indices(0, 0, passes * size, size).view(passes, size)
    counts = np.stack([np.bincount(order[:, place], minlength=size) for place in range(size)])
    expected = passes / size
    statistic = ((counts - expected) ** 2 / expected).sum()
    low, high = stats.chi2((size - 1) ** 2).ppf([1e-4, 1 - 1e-4])
    assert low < statistic < high


# --- what may go wrong ------------------------------------------------------------------------------------------------


def test_bad_images_leave_no_hole_in_the_numbers(
    text: MiniLMTextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SHARD_SIZE", 4)
    grey = grey_images(*[(f"grey {n}",) for n in range(8)])

    def read(wanted: Any) -> Any:
        for position, item in enumerate(grey.read(wanted)):
            yield UnreadableSample(f"{position}.png", "broken") if position in {0, 3, 4} else item

    place = ShardStore(tmp_path)
    write_index(place, write_cache(place, read, Spread(), text, max_unreadable_fraction=0.5))
    stored = LatentCache(place)
    assert len(stored) == 5
    means, _ = stored.moments(torch.arange(5))
    assert means[:, 0, 0, 0].tolist() == [1, 2, 5, 6, 7]
    assert [shown(stored, row, text)[0] for row in stored.captions(torch.arange(5))] == [f"grey {n}" for n in (1, 2, 5, 6, 7)]
    with pytest.raises(
        RunError, match=r"3 of 8 images cannot be read, more than data\.max_unreadable_fraction=0\.1; first: 0\.png"
    ):
        write_cache(place, read, Spread(), text, max_unreadable_fraction=0.1)


def test_several_processes_write_one_cache_and_what_is_there_is_not_encoded_again(
    images: ImageDataset, autoencoder: PCAAutoencoder, text: MiniLMTextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SHARD_SIZE", 8)
    alone = opened(tmp_path / "alone", images, autoencoder, text)
    place = ShardStore(tmp_path / "together")
    barriers = [threading.Barrier(3) for _ in range(1)]

    def one(rank: int) -> dict[str, Any]:
        part = ProcessInfo(rank, 3, lambda: barriers[0].wait() and None)
        return write_cache(place, images.read, autoencoder, text, max_unreadable_fraction=0.5, part=part)

    with ThreadPoolExecutor(3) as pool:
        write_index(place, next(iter(pool.map(one, range(3)))))
    together = LatentCache(place)
    everyone = torch.arange(len(alone))
    assert torch.allclose(together.moments(everyone)[0], alone.moments(everyone)[0], atol=4e-3)
    assert torch.equal(together.captions(everyone), alone.captions(everyone))
    (tmp_path / "together" / "latents-00001.safetensors").unlink()
    encoded: list[int] = []
    write_cache(place, images.read, autoencoder, text, max_unreadable_fraction=0.5, progress=encoded.append)
    assert encoded == [8]


def test_a_shard_that_was_cut_off_or_damaged_is_one_clear_line(text: MiniLMTextEncoder, tmp_path: Path) -> None:
    stored = opened(tmp_path, grey_images(("a",), ("b",), ("c",)), Spread(), text)
    file = tmp_path / "latents-00000.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with pytest.raises(RunError, match=r"latents-00000\.safetensors: the shard holds \d+ bytes, its index says \d+"):
        LatentCache(tmp_path)
    file.unlink()
    with pytest.raises(RunError, match="the shard is not there"):
        LatentCache(tmp_path)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    stored = LatentCache(tmp_path)
    stored.moments(torch.tensor([0, 1]))
    with pytest.raises(RunError, match="does not match its checksum"):
        stored.moments(torch.tensor([2]))


def test_a_cache_lives_in_an_object_store_as_well(
    images: ImageDataset, autoencoder: PCAAutoencoder, text: MiniLMTextEncoder, tmp_path: Path
) -> None:
    local = opened(tmp_path, images, autoencoder, text)
    place = ShardStore("memory://bucket/caches/one")
    assert not place.is_local
    write_index(place, write_cache(place, images.read, autoencoder, text, max_unreadable_fraction=0.5))
    remote = LatentCache("memory://bucket/caches/one")
    chosen = shuffled_indices(0, 7, 32, NUM_IMAGES)
    assert all(torch.equal(a, b) for a, b in zip(remote.moments(chosen), local.moments(chosen), strict=True))
    assert torch.equal(remote.captions(chosen), local.captions(chosen))
    assert torch.equal(remote.states(torch.tensor([1, 0])), local.states(torch.tensor([1, 0])))


def test_a_full_disk_is_one_clear_line_and_the_same_call_goes_on(
    images: ImageDataset, autoencoder: PCAAutoencoder, text: MiniLMTextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SHARD_SIZE", 8)
    place, writes = ShardStore(tmp_path), []
    write = ShardStore.write

    def full(self: ShardStore, name: str, data: bytes) -> None:
        writes.append(name)
        if len(writes) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, data)

    monkeypatch.setattr(ShardStore, "write", full)
    with pytest.raises(RunError, match=r"cannot be written .*No space left"):
        write_cache(place, images.read, autoencoder, text, max_unreadable_fraction=0.5)
    with pytest.raises(FileNotFoundError):
        LatentCache(place)
    encoded: list[int] = []
    write_index(place, write_cache(place, images.read, autoencoder, text, max_unreadable_fraction=0.5, progress=encoded.append))
    assert encoded[:3] == [8, 8, 1]
    assert len(LatentCache(place)) == NUM_IMAGES


def test_a_fair_draw_of_a_sorted_source_has_all_its_kinds() -> None:
    levels = torch.arange(400) // 200  # the first half of one kind, the second of another
    some = ImageDataset(
        levels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2), [("a",)] * 400, [f"{i:04d}" for i in range(400)], None
    )
    drawn = some.random_subset(100)
    assert drawn.shape == (100, 3, 2, 2)
    assert 30 < int(drawn[:, 0, 0, 0].sum()) < 70
    assert torch.equal(drawn, some.random_subset(100))
    assert len(some.random_subset(1000)) == 400
