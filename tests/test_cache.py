"""The latent cache: what is stored, in which order it is drawn, and that a batch depends on nothing but its place.

Oracles: safetensors, transformers' own encoder and tokeniser, scipy's tests of distributions.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor

from isocost.data import cache
from isocost.data.cache import LatentCache, PictureSet, batch_generator, load_pictures, picture_order, write_cache, write_states
from isocost.data.codec import LinearCodec, TextCodec, minilm_path
from isocost.data.sources import Bad
from isocost.study import ScenesSource, TextSpec

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
    folder.mkdir(exist_ok=True)
    write_cache(folder, pictures, codec, text)
    return LatentCache(folder)


def shown(drawn: LatentCache, numbers: Tensor, text: TextCodec) -> list[str]:
    """Captions as the tokeniser reads them back."""
    return text.tokenizer.batch_decode(drawn.token_ids[numbers], skip_special_tokens=True)


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_latents_come_back_as_the_codec_gave_them_and_decode_to_the_pictures(
    pictures: PictureSet, codec: LinearCodec, text: TextCodec, tmp_path: Path
) -> None:
    stored = opened(tmp_path, pictures, codec, text)
    mean, std = codec.encode(pictures.pictures)
    assert len(stored) == NUM_PICTURES
    assert torch.allclose(stored.mean.float(), mean, atol=4e-3)
    assert torch.equal(stored.std.float(), std)
    latents, _, _ = stored.batch(0, 0, NUM_PICTURES, 0.0)
    order = picture_order(0, 0, NUM_PICTURES, NUM_PICTURES)
    decoded, expected = codec.decode(latents).int(), codec.decode(mean[order]).int()
    assert (decoded - expected).abs().max() <= 2


@pytest.mark.parametrize(("shard_size", "shards"), [(25, [25]), (10, [10, 10, 5]), (5, [5] * 5), (12, [12, 12, 1])])
def test_shards_have_one_fixed_size_and_draw_the_same_whatever_it_is(
    shard_size: int,
    shards: list[int],
    pictures: PictureSet,
    codec: LinearCodec,
    text: TextCodec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "whole").mkdir()
    whole = opened(tmp_path / "whole", pictures, codec, text)
    monkeypatch.setattr(cache, "SHARD_SIZE", shard_size)
    monkeypatch.setattr(cache, "ENCODE_BATCH", 4)
    stored = opened(tmp_path / "shards", pictures, codec, text)
    files = [load_file(file) for file in sorted((tmp_path / "shards").glob("shard-*.safetensors"))]
    assert [len(file["mean"]) for file in files] == [len(file["std"]) for file in files] == shards
    assert {file["mean"].dtype for file in files} == {torch.float16}
    for images_seen in (0, 16, 160):
        (latents, captions, _), (other, other_captions, _) = (one.batch(3, images_seen, 16, 0.2) for one in (stored, whole))
        assert torch.allclose(latents, other, atol=4e-3)
        assert torch.equal(captions, other_captions)


def test_the_manifest_says_what_was_written_and_progress_counts_the_pictures(
    pictures: PictureSet, codec: LinearCodec, text: TextCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SHARD_SIZE", 10)
    monkeypatch.setattr(cache, "ENCODE_BATCH", 4)
    steps: list[int] = []
    manifest = write_cache(tmp_path, pictures, codec, text, steps.append)
    assert sum(steps) == NUM_PICTURES
    assert len(steps) > 3
    assert manifest == {
        "num_pictures": NUM_PICTURES,
        "num_captions": len({caption for captions in pictures.captions for caption in captions}),
        "latent_shape": [CHANNELS, R // PATCH, R // PATCH],
        "num_tokens": TOKENS,
        "context_width": 384,
        "num_bad": 1,
        "bad": [{"name": "lost.png", "reason": "picture cannot be read: truncated"}],
    }
    states: list[int] = []
    write_states(tmp_path, text, states.append)
    assert sum(states) == manifest["num_captions"] + 1


def test_each_distinct_caption_is_stored_once_and_each_picture_keeps_its_own_in_order(text: TextCodec, tmp_path: Path) -> None:
    captions = [("zebra", "a dog"), ("a dog",), ("a cat", "zebra", "a dog")]
    stored = opened(tmp_path, grey_pictures(*captions), Spread(), text)
    assert stored.num_captions_of.tolist() == [2, 1, 3]
    assert stored.caption_index.shape == (3, 3)
    assert [
        tuple(shown(stored, row[:number], text))
        for row, number in zip(stored.caption_index, stored.num_captions_of, strict=True)
    ] == captions
    assert (stored.caption_index[1, 1:] == -1).all()
    tokeniser = transformers.AutoTokenizer.from_pretrained(minilm_path())
    expected = tokeniser(["a cat", "a dog", "zebra", ""], padding="max_length", truncation=True, max_length=TOKENS)
    assert stored.token_ids.tolist() == expected["input_ids"]


def test_states_are_those_of_transformers_with_the_empty_caption_last(
    text: TextCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = [("a red circle above two green stars",), ("a dog", "one"), ("a very long " * 10,), ("a dog",)]
    assert opened(tmp_path, grey_pictures(*captions), Spread(), text).states is None
    monkeypatch.setattr(cache, "ENCODE_BATCH", 2)
    write_states(tmp_path, text)
    stored = LatentCache(tmp_path)
    distinct = sorted({caption for several in captions for caption in several})
    tokeniser = transformers.AutoTokenizer.from_pretrained(minilm_path())
    network = transformers.AutoModel.from_pretrained(minilm_path())
    tokens = tokeniser([*distinct, ""], padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    with torch.inference_mode():
        expected = network(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    assert stored.states.shape == (len(distinct) + 1, TOKENS, 384)
    assert torch.allclose(stored.states.float(), expected, atol=5e-3)
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


def test_the_order_does_not_depend_on_what_was_asked_before() -> None:
    late_first = picture_order(2, 3000, 10, 30), picture_order(2, 0, 10, 30)
    cache._permutation.cache_clear()
    early_first = picture_order(2, 0, 10, 30), picture_order(2, 3000, 10, 30)
    assert all(torch.equal(*pair) for pair in zip(late_first, reversed(early_first), strict=True))


def test_every_place_in_a_pass_is_as_likely_for_a_picture() -> None:
    """Chi-square over (picture, place) of 2000 passes; by the passes' count, (n - 1)^2 degrees of freedom."""
    passes, size = 2000, 8
    order = picture_order(0, 0, passes * size, size).view(passes, size)
    counts = np.stack([np.bincount(order[:, place], minlength=size) for place in range(size)])
    expected = passes / size
    statistic = ((counts - expected) ** 2 / expected).sum()
    low, high = stats.chi2((size - 1) ** 2).ppf([1e-4, 1 - 1e-4])
    assert low < statistic < high


# --- the batch --------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(text: TextCodec, tmp_path: Path) -> LatentCache:
    """Ten pictures; the n-th has 1 + n % 3 captions."""
    several = [tuple(f"caption {n} {k}" for k in range(1 + n % 3)) for n in range(10)]
    return opened(tmp_path, grey_pictures(*several), Spread(), text)


def test_a_batch_depends_on_its_seed_and_place_only(stored: LatentCache) -> None:
    first = stored.batch(1, 48, 16, 0.3)
    torch.manual_seed(123)
    np.random.seed(123)  # noqa: NPY002
    for other in [(1, 0), (2, 48), (1, 64)]:
        latents, captions, _ = stored.batch(*other, 16, 0.3)
        assert not torch.equal(latents, first[0])
        assert not torch.equal(captions, first[1])
    again = stored.batch(1, 48, 16, 0.3)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert torch.equal(*(torch.rand(5, generator=one[2]) for one in (first, again)))


def test_drawing_a_batch_leaves_global_randomness_alone(stored: LatentCache) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    stored.batch(0, 0, 16, 0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_generator_goes_on_where_the_batch_stopped(stored: LatentCache) -> None:
    """What the training draws next has nothing in common with the noise that drew the latents."""
    latents, _, generator = stored.batch(0, 0, 512, 0.0)
    noise = (latents - picture_order(0, 0, 512, 10)[:, None, None, None]) / Spread.stds[:, None, None]
    further = torch.randn(latents.shape, generator=generator)
    assert abs(np.corrcoef(noise.flatten(), further.flatten())[0, 1]) < 5 / noise.numel() ** 0.5


def test_generators_of_other_seeds_and_places_are_others() -> None:
    draws = {torch.rand(1, generator=batch_generator(seed, seen)).item() for seed in range(20) for seen in range(20)}
    assert len(draws) == 400


def test_a_batch_holds_the_pictures_of_the_order_with_captions_of_their_own(stored: LatentCache, text: TextCodec) -> None:
    stored.std.zero_()
    for images_seen in (0, 16, 32):
        latents, captions, _ = stored.batch(4, images_seen, 16, 0.0)
        order = picture_order(4, images_seen, 16, 10)
        assert latents.dtype == torch.float32
        assert latents[:, 0, 0, 0].tolist() == order.tolist()
        assert [int(caption.split()[1]) for caption in shown(stored, captions, text)] == order.tolist()


def test_latents_are_drawn_from_their_moments(stored: LatentCache) -> None:
    """Kolmogorov-Smirnov against the normal; and no two pictures or batches share their noise."""
    drawn, order = [], []
    for images_seen in range(0, 3200, 32):
        drawn.append(stored.batch(0, images_seen, 32, 0.1)[0])
        order.append(picture_order(0, images_seen, 32, 10))
    noise = (torch.cat(drawn) - torch.cat(order)[:, None, None, None]) / Spread.stds[:, None, None]
    for channel in range(2):
        assert stats.kstest(noise[:, channel].flatten().numpy(), "norm").pvalue > 1e-4
    assert len(noise.flatten().unique()) > 0.99 * noise.numel()
    rows = noise.flatten(1).double().numpy()
    assert np.abs(np.corrcoef(rows.T) - np.eye(rows.shape[1])).max() < 5 / len(rows) ** 0.5
    assert abs(np.corrcoef(rows[:-1].flatten(), rows[1:].flatten())[0, 1]) < 5 / rows.size**0.5


def test_each_caption_of_a_picture_is_as_likely(stored: LatentCache) -> None:
    counts: Counter[int] = Counter()
    for images_seen in range(0, 9600, 64):
        counts.update(stored.batch(7, images_seen, 64, 0.0)[1].tolist())
    for row, number in zip(stored.caption_index, stored.num_captions_of.tolist(), strict=True):
        observed = [counts[int(caption)] for caption in row[:number]]
        assert sum(observed) == 960
        assert number == 1 or stats.chisquare(observed).pvalue > 1e-4
    assert sum(counts.values()) == 9600


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_captions_are_dropped_at_their_rate_for_the_empty_one(rate: float, stored: LatentCache, text: TextCodec) -> None:
    empty = len(stored.token_ids) - 1
    assert shown(stored, torch.tensor([empty]), text) == [""]
    drawn = torch.cat([stored.batch(0, images_seen, 64, rate)[1] for images_seen in range(0, 6400, 64)])
    assert stats.binomtest(int((drawn == empty).sum()), len(drawn), rate).pvalue > 1e-4
    assert "" not in shown(stored, drawn[drawn != empty], text)


def test_dropping_captions_changes_neither_latents_nor_the_captions_that_stay(stored: LatentCache) -> None:
    latents, captions, _ = stored.batch(0, 0, 64, 0.0)
    same_latents, thinned, _ = stored.batch(0, 0, 64, 0.5)
    assert torch.equal(latents, same_latents)
    stay = thinned != len(stored.token_ids) - 1
    assert 10 < stay.sum() < 54
    assert torch.equal(captions[stay], thinned[stay])
