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
from isocost.config.model import TextSpec
from isocost.data import latent_cache as cache
from isocost.data.datasets import Bad
from isocost.data.latent_cache import (
    LatentCache,
    Part,
    PictureSet,
    count,
    forecast_bytes,
    load_pictures,
    write_cache,
    write_index,
)
from isocost.data.row_store import Place
from isocost.data.shuffle import picture_order
from isocost.errors import WorkError
from isocost.models.autoencoder import LinearCodec
from isocost.models.text_encoder import TextCodec, minilm_path

R, PATCH, CHANNELS, TOKENS = 32, 8, 4, 12
NUM_PICTURES = 25


@pytest.fixture(scope="module")
def text() -> TextCodec:
    return TextCodec(TextSpec(path="minilm", max_tokens=TOKENS))


@pytest.fixture(scope="module")
def pictures() -> PictureSet:
    loaded = load_pictures(ScenesSource(kind="scenes", num_pictures=NUM_PICTURES), R, 0)
    loaded.bad.append(Bad("lost.png", "picture cannot be read: truncated"))
    return loaded


@pytest.fixture(scope="module")
def codec(pictures: PictureSet) -> LinearCodec:
    return LinearCodec.fit(pictures.pictures, PATCH, CHANNELS)


class Spread:
    """A codec whose moments are known: means run up with the picture, stds with the channel."""

    latent_channels, factor = 2, 16
    stds = torch.tensor([0.5, 2.0])

    def encode(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        mean = batch[:, :1, :1, :1].float().expand(-1, 2, 2, 2)
        return mean, self.stds[:, None, None].expand_as(mean)


def grey_pictures(*captions: tuple[str, ...]) -> PictureSet:
    """One picture 32 x 32 of grey level n for the n-th captions."""
    levels = torch.arange(len(captions), dtype=torch.uint8)
    names = [str(number) for number in range(len(captions))]
    return PictureSet(levels[:, None, None, None].expand(-1, 3, R, R).contiguous(), list(captions), names, None)


def opened(folder: Path, pictures: PictureSet, codec: Any, text: TextCodec) -> LatentCache:
    place = Place(folder)
    write_index(place, write_cache(place, pictures.read, codec, text, max_bad_share=0.5))
    return LatentCache(place)


def shown(drawn: LatentCache, numbers: Tensor, text: TextCodec) -> list[str]:
    """Captions as the tokeniser reads them back."""
    return text.tokenizer.batch_decode(drawn.token_ids(numbers), skip_special_tokens=True)


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_latents_come_back_as_the_codec_gave_them_and_decode_to_the_pictures(
    pictures: PictureSet, codec: LinearCodec, text: TextCodec, tmp_path: Path
) -> None:
    stored = opened(tmp_path, pictures, codec, text)
    mean, std = codec.encode(pictures.pictures)
    assert len(stored) == NUM_PICTURES
    order = picture_order(0, 0, NUM_PICTURES, NUM_PICTURES)
    means, stds = stored.moments(order)
    assert torch.allclose(means, mean[order], atol=4e-3)
    assert torch.equal(stds, std[order])
    decoded, expected = codec.decode(means).int(), codec.decode(mean[order]).int()
    assert (decoded - expected).abs().max() <= 2


@pytest.mark.parametrize(("shard_size", "shards"), [(30, [25]), (10, [10, 10, 5]), (5, [5] * 5), (12, [12, 12, 1])])
def test_shards_have_one_fixed_size_and_draw_the_same_whatever_it_is(
    shard_size: int,
    shards: list[int],
    pictures: PictureSet,
    codec: LinearCodec,
    text: TextCodec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pictures = replace(pictures, bad=[])
    whole = opened(tmp_path / "whole", pictures, codec, text)
    monkeypatch.setattr(cache, "SHARD_SIZE", shard_size)
    monkeypatch.setattr(cache, "ENCODE_BATCH", 4)
    stored = opened(tmp_path / "shards", pictures, codec, text)
    files = [load_file(file) for file in sorted((tmp_path / "shards").glob("latents-*.safetensors"))]
    assert [len(file["mean"]) for file in files] == [len(file["std"]) for file in files] == shards
    assert {file["mean"].dtype for file in files} == {torch.float16}
    for images_seen in (0, 16, 160):
        chosen = picture_order(3, images_seen, 16, NUM_PICTURES)
        assert torch.allclose(stored.moments(chosen)[0], whole.moments(chosen)[0], atol=4e-3)
        assert torch.equal(stored.captions(chosen), whole.captions(chosen))


def test_the_manifest_says_what_was_written_and_progress_counts_the_pictures(
    pictures: PictureSet, codec: LinearCodec, text: TextCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SHARD_SIZE", 10)
    monkeypatch.setattr(cache, "ENCODE_BATCH", 4)
    steps: list[int] = []
    place = Place(tmp_path)
    manifest = write_cache(place, pictures.read, codec, text, max_bad_share=0.1, progress=steps.append)
    assert sum(steps) == NUM_PICTURES + manifest["num_captions"] + 1
    assert len(steps) > 3
    assert manifest.pop("tables").keys() == {"latents", "captions", "text"}
    assert manifest == {
        "num_pictures": NUM_PICTURES,
        "num_captions": len({caption for captions in pictures.captions for caption in captions}),
        "latent_shape": [CHANNELS, R // PATCH, R // PATCH],
        "num_tokens": TOKENS,
        "context_width": 384,
        "with_states": True,
        "shard_size": 10,
        "num_bad": 1,
        "bad": [{"position": NUM_PICTURES, "name": "lost.png", "reason": "picture cannot be read: truncated"}],
    }
    counted = count(pictures.read)
    assert counted == (NUM_PICTURES + 1, manifest["num_captions"])
    expected = forecast_bytes(NUM_PICTURES, (CHANNELS, R // PATCH, R // PATCH), counted[1], (TOKENS, 384), True)
    written = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert written == pytest.approx(expected, rel=0.05)


def test_each_distinct_caption_is_stored_once_and_each_picture_keeps_its_own_in_order(text: TextCodec, tmp_path: Path) -> None:
    captions = [("zebra", "a dog"), ("a dog",), ("a cat", "zebra", "a dog")]
    stored = opened(tmp_path, grey_pictures(*captions), Spread(), text)
    numbers = stored.captions(torch.arange(3))
    assert (numbers >= 0).sum(1).tolist() == [2, 1, 3]
    assert [tuple(shown(stored, row[row >= 0], text)) for row in numbers] == captions
    assert (numbers[1, 1:] == -1).all()
    tokeniser = transformers.AutoTokenizer.from_pretrained(minilm_path())
    expected = tokeniser(["a cat", "a dog", "zebra", ""], padding="max_length", truncation=True, max_length=TOKENS)
    assert stored.token_ids(torch.arange(4)).tolist() == expected["input_ids"]


def test_states_are_those_of_transformers_with_the_empty_caption_last(
    text: TextCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = [("a red circle above two green stars",), ("a dog", "one"), ("a very long " * 10,), ("a dog",)]
    monkeypatch.setattr(cache, "ENCODE_BATCH", 2)
    stored = opened(tmp_path, grey_pictures(*captions), Spread(), text)
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


@pytest.mark.parametrize("num_pictures", [1, 7, 100])
def test_each_pass_shows_every_picture_once(num_pictures: int) -> None:
    order = picture_order(5, 0, 6 * num_pictures, num_pictures)
    assert order.dtype == torch.int64
    for one_pass in order.view(6, num_pictures):
        assert sorted(one_pass.tolist()) == list(range(num_pictures))


def test_passes_and_seeds_each_have_their_own_order() -> None:
    passes = [tuple(picture_order(seed, number * 30, 30, 30).tolist()) for seed in range(6) for number in range(6)]
    assert len(set(passes)) == 36


@pytest.mark.parametrize("pieces", [(64, 64, 64, 8), (1,) * 200, (200,), (30, 31, 100, 39)])
def test_the_order_is_the_same_however_it_is_split(pieces: tuple[int, ...]) -> None:
    whole = picture_order(2, 11, 200, 30)
    firsts = np.cumsum((11, *pieces))[:-1]
    parts = [picture_order(2, int(first), count, 30) for first, count in zip(firsts, pieces, strict=True)]
    assert torch.equal(torch.cat(parts), whole)


def test_the_order_of_a_huge_set_is_found_at_once_and_keeps_within_it() -> None:
    num_pictures = 600_000_000
    order = picture_order(1, 3 * num_pictures - 50_000, 100_000, num_pictures)
    assert len(order.unique()) > 99_980
    assert 0 <= int(order.min()) < num_pictures / 100
    assert num_pictures * 0.99 < int(order.max()) < num_pictures


def test_every_place_in_a_pass_is_as_likely_for_a_picture() -> None:
    """Chi-square over (picture, place) of 2000 passes; by the passes' count, (n - 1)^2 degrees of freedom."""
    passes, size = 2000, 8
    order = picture_order(0, 0, passes * size, size).view(passes, size)
    counts = np.stack([np.bincount(order[:, place], minlength=size) for place in range(size)])
    expected = passes / size
    statistic = ((counts - expected) ** 2 / expected).sum()
    low, high = stats.chi2((size - 1) ** 2).ppf([1e-4, 1 - 1e-4])
    assert low < statistic < high


# --- what may go wrong ------------------------------------------------------------------------------------------------


def test_bad_pictures_leave_no_hole_in_the_numbers(text: TextCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SHARD_SIZE", 4)
    grey = grey_pictures(*[(f"grey {n}",) for n in range(8)])

    def read(wanted: Any) -> Any:
        for position, item in enumerate(grey.read(wanted)):
            yield Bad(f"{position}.png", "broken") if position in {0, 3, 4} else item

    place = Place(tmp_path)
    write_index(place, write_cache(place, read, Spread(), text, max_bad_share=0.5))
    stored = LatentCache(place)
    assert len(stored) == 5
    means, _ = stored.moments(torch.arange(5))
    assert means[:, 0, 0, 0].tolist() == [1, 2, 5, 6, 7]
    assert [shown(stored, row, text)[0] for row in stored.captions(torch.arange(5))] == [f"grey {n}" for n in (1, 2, 5, 6, 7)]
    with pytest.raises(WorkError, match=r"3 of 8 pictures cannot be read, more than data\.max_bad_share=0\.1; first: 0\.png"):
        write_cache(place, read, Spread(), text, max_bad_share=0.1)


def test_several_processes_write_one_cache_and_what_is_there_is_not_encoded_again(
    pictures: PictureSet, codec: LinearCodec, text: TextCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SHARD_SIZE", 8)
    alone = opened(tmp_path / "alone", pictures, codec, text)
    place = Place(tmp_path / "together")
    barriers = [threading.Barrier(3) for _ in range(1)]

    def one(rank: int) -> dict[str, Any]:
        part = Part(rank, 3, lambda: barriers[0].wait() and None)
        return write_cache(place, pictures.read, codec, text, max_bad_share=0.5, part=part)

    with ThreadPoolExecutor(3) as pool:
        write_index(place, next(iter(pool.map(one, range(3)))))
    together = LatentCache(place)
    everyone = torch.arange(len(alone))
    assert torch.allclose(together.moments(everyone)[0], alone.moments(everyone)[0], atol=4e-3)
    assert torch.equal(together.captions(everyone), alone.captions(everyone))
    (tmp_path / "together" / "latents-00001.safetensors").unlink()
    encoded: list[int] = []
    write_cache(place, pictures.read, codec, text, max_bad_share=0.5, progress=encoded.append)
    assert encoded == [8]


def test_a_shard_that_was_cut_off_or_damaged_is_one_clear_line(text: TextCodec, tmp_path: Path) -> None:
    stored = opened(tmp_path, grey_pictures(("a",), ("b",), ("c",)), Spread(), text)
    file = tmp_path / "latents-00000.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with pytest.raises(WorkError, match=r"latents-00000\.safetensors: the shard holds \d+ bytes, its index says \d+"):
        LatentCache(tmp_path)
    file.unlink()
    with pytest.raises(WorkError, match="the shard is not there"):
        LatentCache(tmp_path)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    stored = LatentCache(tmp_path)
    stored.moments(torch.tensor([0, 1]))
    with pytest.raises(WorkError, match="does not match its checksum"):
        stored.moments(torch.tensor([2]))


def test_a_cache_lives_in_an_object_store_as_well(
    pictures: PictureSet, codec: LinearCodec, text: TextCodec, tmp_path: Path
) -> None:
    local = opened(tmp_path, pictures, codec, text)
    place = Place("memory://bucket/caches/one")
    assert not place.is_local
    write_index(place, write_cache(place, pictures.read, codec, text, max_bad_share=0.5))
    remote = LatentCache("memory://bucket/caches/one")
    chosen = picture_order(0, 7, 32, NUM_PICTURES)
    assert all(torch.equal(a, b) for a, b in zip(remote.moments(chosen), local.moments(chosen), strict=True))
    assert torch.equal(remote.captions(chosen), local.captions(chosen))
    assert torch.equal(remote.states(torch.tensor([1, 0])), local.states(torch.tensor([1, 0])))


def test_a_full_disk_is_one_clear_line_and_the_same_call_goes_on(
    pictures: PictureSet, codec: LinearCodec, text: TextCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SHARD_SIZE", 8)
    place, writes = Place(tmp_path), []
    write = Place.write

    def full(self: Place, name: str, data: bytes) -> None:
        writes.append(name)
        if len(writes) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, data)

    monkeypatch.setattr(Place, "write", full)
    with pytest.raises(WorkError, match=r"cannot be written .*No space left"):
        write_cache(place, pictures.read, codec, text, max_bad_share=0.5)
    with pytest.raises(FileNotFoundError):
        LatentCache(place)
    encoded: list[int] = []
    write_index(place, write_cache(place, pictures.read, codec, text, max_bad_share=0.5, progress=encoded.append))
    assert encoded[:3] == [8, 8, 1]
    assert len(LatentCache(place)) == NUM_PICTURES


def test_a_fair_draw_of_a_sorted_source_has_all_its_kinds() -> None:
    levels = torch.arange(400) // 200  # the first half of one kind, the second of another
    some = PictureSet(
        levels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2), [("a",)] * 400, [f"{i:04d}" for i in range(400)], None
    )
    drawn = some.fair_draw(100)
    assert drawn.shape == (100, 3, 2, 2)
    assert 30 < int(drawn[:, 0, 0, 0].sum()) < 70
    assert torch.equal(drawn, some.fair_draw(100))
    assert len(some.fair_draw(1000)) == 400
