"""The latent cache: moments, captions and prompt embeddings of a whole data set, in tables of fixed-shape rows.

latents-*    mean, std  float16 [S, C, L, L]   a row for every image of the source in its order; rows of bad ones are void
captions-*   numbers    int32 [S, K]           which captions an image has, -1 where there are no more
text-*       token_ids  int32 [S, T]           every distinct caption in sorted order, the empty one last
             states     float16 [S, T, D]      on request
isocost.json           written last: a cache without it is not there

Several processes write one cache together, and what a killed one left is not encoded again.

Shapes: N images, S rows a shard, C latent channels, L latent side, U distinct captions, K most captions an image has,
T tokens, D width of the prompt embeddings, B batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from isocost.config.data import ScenesSource, SourceSpec
from isocost.data.datasets import Sample, SkippedSample, UnreadableSample, name_hash, read_source
from isocost.data.row_store import RowTable, ShardStore, write_shard
from isocost.errors import RunError
from isocost.models.autoencoder import Autoencoder
from isocost.models.text_encoder import MiniLMTextEncoder

VERSION = 2
SHARD_SIZE = 4096
ENCODE_BATCH = 256
NULL_CAPTION = ""
INDEX = "isocost.json"

Progress = Callable[[int], None]
Reader = Callable[[Callable[[int], bool]], Iterator[Sample | UnreadableSample | SkippedSample]]
"""Items of a source in order; those at whose position the question is answered False need not be decoded."""


@dataclass(frozen=True)
class ProcessInfo:
    """One process of several that write a cache together; `wait` returns when all have come to it."""

    rank: int = 0
    num_parts: int = 1
    wait: Callable[[], None] = lambda: None

    def has(self, shard: int) -> bool:
        """Whether this process writes the shard."""
        return shard % self.num_parts == self.rank


@dataclass
class ImageDataset:
    """Images in memory: uint8 [N, 3, R, R], captions of each, labels int64 [N, A] where known, what was skipped."""

    images: Tensor
    captions: list[tuple[str, ...]]
    names: list[str]
    labels: Tensor | None
    bad: list[UnreadableSample] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, wanted: Callable[[int], bool]) -> Iterator[Sample | UnreadableSample | SkippedSample]:
        """The set as a source: its images, then what was skipped."""
        for position, (name, captions) in enumerate(zip(self.names, self.captions, strict=True)):
            if wanted(position):
                yield Sample(name, self.images[position].permute(1, 2, 0).numpy(), captions)
            else:
                yield SkippedSample(name, captions)
        yield from self.bad

    def random_subset(self, num: int) -> Tensor:
        """Images uint8 [num, 3, R, R], fewer if there are fewer, by a hash of the names: sources may be sorted by kind."""
        order = sorted(range(len(self)), key=lambda position: name_hash(self.names[position]))
        return self.images[order[:num]]

    def fingerprint(self) -> str:
        """Content hash of images and captions."""
        sha = hashlib.sha256(self.images.numpy().tobytes())
        sha.update(json.dumps(self.captions, ensure_ascii=False).encode())
        return sha.hexdigest()[:16]


def load_images(source: SourceSpec, resolution: int, max_unreadable_fraction: float, limit: int | None = None) -> ImageDataset:
    """Read a source into memory; what is held out by a hash of the names comes in the hash's order.

    The first of them are then a fair draw, also where the names are sorted by what the images show.

    Raises:
        RunError: more than `max_unreadable_fraction` of it cannot be read, or nothing can.
    """
    samples: list[Sample] = []
    bad: list[UnreadableSample] = []
    for item in islice(read_source(source, resolution), limit):
        if isinstance(item, UnreadableSample):
            bad.append(item)
        elif isinstance(item, Sample):
            samples.append(item)
    _refuse_bad(len(samples), bad, max_unreadable_fraction)
    if not isinstance(source, ScenesSource) and source.subset == "test":
        samples.sort(key=lambda sample: name_hash(sample.name))
    stacked = torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2).contiguous()
    labels = None
    if all(sample.labels is not None for sample in samples):
        labels = torch.from_numpy(np.stack([sample.labels for sample in samples if sample.labels is not None]))
    return ImageDataset(stacked, [s.captions for s in samples], [s.name for s in samples], labels, bad)


def _refuse_bad(num_good: int, bad: list[UnreadableSample], max_unreadable_fraction: float) -> None:
    total = num_good + len(bad)
    if not num_good or len(bad) > max_unreadable_fraction * total:
        first = f"; first: {bad[0].name}: {bad[0].reason}" if bad else ""
        raise RunError(
            f"{len(bad)} of {total} images cannot be read, more than data.max_unreadable_fraction={max_unreadable_fraction:g}{first}"
        )


# --- writing ----------------------------------------------------------------------------------------------------------


def forecast_bytes(
    num_images: int, latent_shape: tuple[int, int, int], num_captions: int, text: tuple[int, int], with_states: bool
) -> int:
    """Bytes that a cache will take, within its headers; `text` is (T, D)."""
    latents = num_images * (4 * int(np.prod(latent_shape)) + 8)
    tokens = (num_captions + 1) * (4 * text[0] + 8 + (2 * text[0] * text[1] if with_states else 0))
    return latents + tokens + 12 * num_images


def count(read: Reader) -> tuple[int, int]:
    """Number of items of a source, readable or not, and of their distinct captions; no image is decoded."""
    num_items = 0
    captions: set[str] = set()
    for item in read(lambda position: False):
        num_items += 1
        captions.update(() if isinstance(item, UnreadableSample) else item.captions)
    return num_items, len(captions)


def write_cache(
    place: ShardStore,
    read: Reader,
    autoencoder: Autoencoder,
    text: MiniLMTextEncoder,
    *,
    with_states: bool = True,
    max_unreadable_fraction: float = 0.0,
    part: ProcessInfo = ProcessInfo(),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Encode every image and every distinct caption once; returns what the index should say, which is not written here.

    `progress` is told how many more images this process encoded, then how many more captions.

    Raises:
        RunError: more than `max_unreadable_fraction` of the source cannot be read, or nothing can; or the place is full.
    """
    try:
        captions = _write_latents(place, read, autoencoder, part, progress)
        part.wait()
        shards = [json.loads(place.read(f"latents-{n:05d}.json")) for n in range(-(-len(captions) // SHARD_SIZE))]
        bad = {
            int(item["position"]): UnreadableSample(item["name"], item["reason"]) for shard in shards for item in shard["bad"]
        }
        good = [captions[position] for position in range(len(captions)) if position not in bad]
        _refuse_bad(len(good), list(bad.values()), max_unreadable_fraction)
        distinct = sorted({caption for several in good for caption in several})
        texts = _write_texts(place, [*distinct, NULL_CAPTION], text, with_states, part, progress)
        part.wait()
        numbers = _write_numbers(place, good, distinct) if part.rank == 0 else []
    except OSError as error:
        raise RunError(f"{place.url}: the latent cache cannot be written ({error}); what is written is kept") from error
    return {
        "num_images": len(good),
        "num_captions": len(distinct),
        "latent_shape": next(shard["latent_shape"] for shard in shards if shard["latent_shape"]),
        "num_tokens": text.max_tokens,
        "cross_attention_dim": text.cross_attention_dim,
        "with_states": with_states,
        "num_bad": len(bad),
        "bad": [{"position": at, "name": item.name, "reason": item.reason} for at, item in sorted(bad.items())],
        "shard_size": SHARD_SIZE,
        "tables": {
            "latents": [{"name": f"latents-{n:05d}.safetensors", "bytes": s["bytes"]} for n, s in enumerate(shards)],
            "captions": numbers,
            "text": texts,
        },
    }


def _write_latents(
    place: ShardStore, read: Reader, autoencoder: Autoencoder, part: ProcessInfo, progress: Progress | None
) -> list[tuple[str, ...]]:
    """The shards of this process; returns the captions of every item of the source, none for those it found bad."""
    there = place.sizes()
    captions: list[tuple[str, ...]] = []

    def is_done(shard: int) -> bool:
        about = f"latents-{shard:05d}.json"
        if about not in there:
            return False
        return there.get(f"latents-{shard:05d}.safetensors", 0) == json.loads(place.read(about))["bytes"]

    mine = {}

    def wanted(position: int) -> bool:
        shard = position // SHARD_SIZE
        if shard not in mine:
            mine[shard] = part.has(shard) and not is_done(shard)
        return mine[shard]

    shard: list[Sample | UnreadableSample] = []
    for item in read(wanted):
        position = len(captions)
        captions.append(() if isinstance(item, UnreadableSample) else item.captions)
        if wanted(position) and not isinstance(item, SkippedSample):
            shard.append(item)
        if len(captions) % SHARD_SIZE == 0 and shard:
            _write_latent_shard(place, position // SHARD_SIZE, shard, autoencoder, progress)
            shard = []
    if shard:
        _write_latent_shard(place, (len(captions) - 1) // SHARD_SIZE, shard, autoencoder, progress)
    return captions


def _write_latent_shard(
    place: ShardStore, number: int, shard: list[Sample | UnreadableSample], autoencoder: Autoencoder, progress: Progress | None
) -> None:
    good = [(row, item) for row, item in enumerate(shard) if isinstance(item, Sample)]
    bad = [
        {"position": number * SHARD_SIZE + row, "name": item.name, "reason": item.reason}
        for row, item in enumerate(shard)
        if isinstance(item, UnreadableSample)
    ]
    columns: dict[str, Tensor] = {}
    latent_shape: list[int] = []
    for start in range(0, len(good), ENCODE_BATCH):
        rows = [row for row, _ in good[start : start + ENCODE_BATCH]]
        stacked = torch.from_numpy(np.stack([item.image for _, item in good[start : start + ENCODE_BATCH]]))
        for name, values in zip(("mean", "std"), autoencoder.encode(stacked.permute(0, 3, 1, 2).contiguous()), strict=True):
            latent_shape = list(values.shape[1:])
            if name not in columns:
                columns[name] = torch.zeros(len(shard), *latent_shape, dtype=torch.float16)
            columns[name][rows] = values.cpu().half()
        if progress is not None:
            progress(len(rows))
    size = write_shard(place, f"latents-{number:05d}.safetensors", columns) if columns else 0
    about = {"bytes": size, "latent_shape": latent_shape, "bad": bad}
    place.write(f"latents-{number:05d}.json", json.dumps(about).encode())


def _write_texts(
    place: ShardStore,
    captions: list[str],
    text: MiniLMTextEncoder,
    with_states: bool,
    part: ProcessInfo,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    files = []
    there = place.sizes()
    for number, start in enumerate(range(0, len(captions), SHARD_SIZE)):
        some = captions[start : start + SHARD_SIZE]
        name = f"text-{number:05d}.safetensors"
        if part.has(number) and name not in there:
            token_ids = text.tokenize(some)
            columns = {"token_ids": torch.from_numpy(token_ids)}
            if with_states:
                states = []
                for batch in np.array_split(token_ids, -(-len(token_ids) // ENCODE_BATCH)):
                    states.append(text.states(batch).half().cpu())
                    if progress is not None:
                        progress(len(batch))
                columns["states"] = torch.cat(states)
            write_shard(place, name, columns)
        files.append(name)
    part.wait()
    return [{"name": name, "bytes": place.size(name)} for name in files]


def _write_numbers(place: ShardStore, captions: list[tuple[str, ...]], distinct: list[str]) -> list[dict[str, Any]]:
    number_of = {caption: number for number, caption in enumerate(distinct)}
    most = max(len(several) for several in captions)
    files = []
    for number, start in enumerate(range(0, len(captions), SHARD_SIZE)):
        some = captions[start : start + SHARD_SIZE]
        rows = torch.full((len(some), most), -1, dtype=torch.int32)
        for row, several in enumerate(some):
            rows[row, : len(several)] = torch.tensor([number_of[caption] for caption in several], dtype=torch.int32)
        name = f"captions-{number:05d}.safetensors"
        files.append({"name": name, "bytes": write_shard(place, name, {"numbers": rows})})
    return files


def write_index(place: ShardStore, index: dict[str, Any]) -> None:
    """Make a cache exist."""
    place.write(INDEX, (json.dumps(index, indent=1, ensure_ascii=False) + "\n").encode())


# --- reading ----------------------------------------------------------------------------------------------------------


class Cache(Protocol):
    """What a training draws from."""

    def __len__(self) -> int:
        """Number of images."""

    @property
    def null_caption(self) -> int:
        """Number of the empty caption."""

    @property
    def has_prompt_embeds(self) -> bool:
        """Whether prompt embeddings are there, beside token ids."""

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of images int64 [B]: float32 [B, C, L, L] each."""

    def captions(self, images: Tensor) -> Tensor:
        """Caption numbers of images int64 [B]: int64 [B, K], -1 where an image has no more."""

    def token_ids(self, captions: Tensor) -> Tensor:
        """Token ids int32 [B, T] of caption numbers int64 [B]."""

    def states(self, captions: Tensor) -> Tensor:
        """Prompt embeddings float32 [B, T, D] of caption numbers int64 [B]; needs `has_prompt_embeds`."""


class LatentCache(Cache):
    """A cache opened for training.

    Raises:
        RunError: a shard is missing or cut off.
    """

    def __init__(self, place: ShardStore | str | Path) -> None:
        self.place = place if isinstance(place, ShardStore) else ShardStore(place)
        index = self.index = json.loads(self.place.read(INDEX))
        tables, size = index["tables"], index["shard_size"]
        self._latents, self._captions, self._text = (
            RowTable(self.place, tables[name], size) for name in ("latents", "captions", "text")
        )
        self.num_captions: int = index["num_captions"]
        bad = np.array(sorted(item["position"] for item in index["bad"]), dtype=np.int64)
        self._bad_before = bad - np.arange(len(bad))

    def __len__(self) -> int:
        return int(self.index["num_images"])

    @property
    def null_caption(self) -> int:
        """Number of the empty caption."""
        return self.num_captions

    @property
    def has_prompt_embeds(self) -> bool:
        """Whether prompt embeddings are there, beside token ids."""
        return bool(self.index["with_states"])

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of images int64 [B]: float32 [B, C, L, L] each."""
        numbers = images.numpy()
        rows = self._latents.rows(torch.from_numpy(numbers + np.searchsorted(self._bad_before, numbers, side="right")))
        return rows["mean"].float(), rows["std"].float()

    def captions(self, images: Tensor) -> Tensor:
        """Caption numbers of images int64 [B]: int64 [B, K], -1 where an image has no more."""
        return self._captions.rows(images)["numbers"].long()

    def token_ids(self, captions: Tensor) -> Tensor:
        """Token ids int32 [B, T] of caption numbers int64 [B]."""
        return self._text.rows(captions)["token_ids"]

    def states(self, captions: Tensor) -> Tensor:
        """Prompt embeddings float32 [B, T, D] of caption numbers int64 [B]; needs `has_prompt_embeds`."""
        return self._text.rows(captions)["states"].float()


class MemoryCache(Cache):
    """A few images, one caption each, encoded on the spot."""

    def __init__(self, images: Tensor, captions: list[str], autoencoder: Autoencoder, text: MiniLMTextEncoder) -> None:
        """`images` uint8 [N, 3, R, R]."""
        distinct = sorted(set(captions))
        self._tokens = torch.from_numpy(text.tokenize([*distinct, NULL_CAPTION]))
        self._states = text.states(self._tokens.numpy()).clone().cpu()
        self._numbers = torch.tensor([[distinct.index(caption)] for caption in captions])
        encoded = [autoencoder.encode(batch) for batch in images.split(ENCODE_BATCH)]
        self._mean, self._std = (torch.cat([moments[i] for moments in encoded]).float().cpu() for i in range(2))

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def null_caption(self) -> int:
        return len(self._tokens) - 1

    @property
    def has_prompt_embeds(self) -> bool:
        return True

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self._mean[images], self._std[images]

    def captions(self, images: Tensor) -> Tensor:
        return self._numbers[images]

    def token_ids(self, captions: Tensor) -> Tensor:
        return self._tokens[captions]

    def states(self, captions: Tensor) -> Tensor:
        return self._states[captions]
