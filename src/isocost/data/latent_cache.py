"""The latent cache: latent moments, captions and prompt embeddings of a whole data set, in tables of fixed-shape rows.

latents-*    mean, std      float16 [S, C, L, L]   one row per image in the order of the source; zeros for unreadable images
captions-*   numbers        int32 [S, K]           numbers of each image's captions, padded with -1
text-*       token_ids      int32 [S, T]           one row per distinct caption in sorted order; the last is the empty caption
             prompt_embeds  float16 [S, T, D]      optional
isocost.json                                       the index, written last: without it the cache does not exist

Several processes can write one cache together. Shards that a killed process has written are not encoded again.

Shapes: N images, S rows per shard, C latent channels, L latent size, K maximum number of captions of an image, T tokens, D
width of the prompt embeddings, B batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
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
from isocost.models.text_encoder import MiniLMTextEncoder, TokenStatistics
from isocost.utils.json_text import parse_json
from isocost.utils.output_paths import remove_leftovers

CACHE_VERSION = 2
SHARD_SIZE = 4096
ENCODE_BATCH = 256
NULL_CAPTION = ""
INDEX = "isocost.json"

Progress = Callable[[int], None]
Reader = Callable[[Callable[[int], bool]], Iterator[Sample | UnreadableSample | SkippedSample]]
"""Reads the items of a source in order. It may skip decoding the images at positions for which its argument returns False."""


@dataclass(frozen=True)
class ProcessInfo:
    """Rank and number of processes that work together; `wait` is a barrier of all processes."""

    rank: int = 0
    num_processes: int = 1
    wait: Callable[[], None] = lambda: None

    def owns(self, shard: int) -> bool:
        """Whether this process writes a shard of the cache."""
        return shard % self.num_processes == self.rank


@dataclass
class ImageDataset:
    """A data set in memory.

    Attributes:
        images: uint8 [N, 3, R, R].
        captions: of each image.
        labels: attribute labels, int64 [N, A]; None if not all images have them.
        unreadable: images or captions that could not be read.
    """

    images: Tensor
    captions: list[tuple[str, ...]]
    names: list[str]
    labels: Tensor | None
    unreadable: list[UnreadableSample] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, is_needed: Callable[[int], bool]) -> Iterator[Sample | UnreadableSample | SkippedSample]:
        """Read the data set as a source: its images, then the unreadable samples."""
        for position, (name, captions) in enumerate(zip(self.names, self.captions, strict=True)):
            if is_needed(position):
                yield Sample(name, self.images[position].permute(1, 2, 0).numpy(), captions)
            else:
                yield SkippedSample(name, captions)
        yield from self.unreadable

    def random_subset(self, num: int) -> Tensor:
        """Return up to `num` images, uint8 [num, 3, R, R], chosen by a hash of their names, because a source may be sorted."""
        order = sorted(range(len(self)), key=lambda position: name_hash(self.names[position]))
        return self.images[order[:num]]

    def fingerprint(self) -> str:
        """Hash the images and captions."""
        sha = hashlib.sha256(self.images.numpy().tobytes())
        sha.update(json.dumps(self.captions, ensure_ascii=False).encode())
        return sha.hexdigest()[:16]


def load_images(source: SourceSpec, resolution: int, max_unreadable_fraction: float, limit: int | None = None) -> ImageDataset:
    """Read a source into memory.

    The images of `subset: test` come in the order of a hash of their names. Their first images are therefore a random sample,
    even if names are sorted by content.

    Args:
        limit: the maximum number of items to read.

    Raises:
        RunError: more than `max_unreadable_fraction` of the items cannot be read, or none can.
    """
    samples: list[Sample] = []
    unreadable: list[UnreadableSample] = []
    for item in islice(read_source(source, resolution), limit):
        if isinstance(item, UnreadableSample):
            unreadable.append(item)
        elif isinstance(item, Sample):
            samples.append(item)
    _refuse_unreadable(len(samples), unreadable, max_unreadable_fraction)
    if not isinstance(source, ScenesSource) and source.subset == "test":
        samples.sort(key=lambda sample: name_hash(sample.name))
    labels = None
    if all(sample.labels is not None for sample in samples):
        labels = torch.from_numpy(np.stack([sample.labels for sample in samples if sample.labels is not None]))
    captions, names = [sample.captions for sample in samples], [sample.name for sample in samples]
    return ImageDataset(_stacked(samples, resolution), captions, names, labels, unreadable)


def _stacked(samples: list[Sample], resolution: int) -> Tensor:
    """The images of samples as one tensor, uint8 [N, 3, R, R]. The list is emptied, so that memory holds each image once."""
    images = torch.empty(len(samples), 3, resolution, resolution, dtype=torch.uint8)
    while samples:
        images[len(samples) - 1] = torch.from_numpy(samples[-1].image.copy()).permute(2, 0, 1)
        samples.pop()
    return images


def _refuse_unreadable(num_readable: int, unreadable: list[UnreadableSample], max_unreadable_fraction: float) -> None:
    total = num_readable + len(unreadable)
    if not num_readable or len(unreadable) > max_unreadable_fraction * total:
        first = f"; first: {unreadable[0].name}: {unreadable[0].reason}" if unreadable else ""
        limit = f"data.max_unreadable_fraction={max_unreadable_fraction:g}"
        raise RunError(f"{len(unreadable)} of {total} images cannot be read, more than {limit}{first}")


# --- writing ----------------------------------------------------------------------------------------------------------


def estimate_cache_bytes(
    num_images: int,
    latent_shape: tuple[int, int, int],
    num_captions: int,
    text_shape: tuple[int, int],
    with_prompt_embeds: bool,
) -> int:
    """Estimate the bytes of a cache, without file headers.

    Args:
        latent_shape: (C, L, L).
        num_captions: number of distinct captions.
        text_shape: (T, D).
    """
    num_tokens, width = text_shape
    latents = num_images * (4 * int(np.prod(latent_shape)) + 8)
    texts = (num_captions + 1) * (4 * num_tokens + 8 + (2 * num_tokens * width if with_prompt_embeds else 0))
    return latents + texts + 12 * num_images


def count_images_and_captions(read: Reader) -> tuple[int, int]:
    """Count the items of a source, readable or not, and their distinct captions, without decoding images."""
    num_items = 0
    captions: set[str] = set()
    for item in read(lambda position: False):
        num_items += 1
        captions.update(() if isinstance(item, UnreadableSample) else item.captions)
    return num_items, len(captions)


def write_cache(
    store: ShardStore,
    read: Reader,
    autoencoder: Autoencoder,
    text_encoder: MiniLMTextEncoder,
    *,
    with_prompt_embeds: bool = True,
    max_unreadable_fraction: float = 0.0,
    process: ProcessInfo = ProcessInfo(),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Encode every image and every distinct caption once, and write the shards.

    Args:
        process: this process among those that write the cache together.
        progress: called with the number of images that this process has encoded since the last call, then of captions.

    Returns:
        The content of the index. The caller writes it with `write_index`, which makes the cache exist.

    Raises:
        RunError: more than `max_unreadable_fraction` of the source cannot be read, or nothing can; or the store is full.
    """
    try:
        captions = _write_latents(store, read, autoencoder, process, progress)
        process.wait()
        num_shards = -(-len(captions) // SHARD_SIZE)
        shards = [json.loads(store.read(f"latents-{number:05d}.json")) for number in range(num_shards)]
        unreadable = {
            int(item["position"]): UnreadableSample(item["name"], item["reason"]) for shard in shards for item in shard["bad"]
        }
        readable = [captions[position] for position in range(len(captions)) if position not in unreadable]
        _refuse_unreadable(len(readable), list(unreadable.values()), max_unreadable_fraction)
        distinct_captions = sorted({caption for image_captions in readable for caption in image_captions})
        texts = _write_texts(store, [*distinct_captions, NULL_CAPTION], text_encoder, with_prompt_embeds, process, progress)
        tokens = asdict(text_encoder.token_statistics(distinct_captions)) if process.rank == 0 else {}
        process.wait()
        numbers = _write_caption_numbers(store, readable, distinct_captions) if process.rank == 0 else []
    except OSError as error:
        raise RunError(
            f"{store.url}: the latent cache cannot be written ({error}); free some space, and the same command continues it"
        ) from error
    return {
        "num_images": len(readable),
        "num_captions": len(distinct_captions),
        "latent_shape": next(shard["latent_shape"] for shard in shards if shard["latent_shape"]),
        "num_tokens": text_encoder.max_tokens,
        "token_statistics": tokens,
        "cross_attention_dim": text_encoder.cross_attention_dim,
        "with_prompt_embeds": with_prompt_embeds,
        "num_bad": len(unreadable),
        "bad": [
            {"position": position, "name": item.name, "reason": item.reason} for position, item in sorted(unreadable.items())
        ],
        "shard_size": SHARD_SIZE,
        "tables": {
            "latents": [
                {"name": f"latents-{number:05d}.safetensors", "bytes": shard["bytes"]} for number, shard in enumerate(shards)
            ],
            "captions": numbers,
            "text": texts,
        },
    }


def _write_latents(
    store: ShardStore, read: Reader, autoencoder: Autoencoder, process: ProcessInfo, progress: Progress | None
) -> list[tuple[str, ...]]:
    """Write the latent shards of this process.

    Returns:
        The captions of every item of the source; empty for items that cannot be read.
    """
    existing = store.sizes()
    if process.rank == 0 and store.is_local:
        remove_leftovers(Path(store.root), r"\.([a-z]+-[0-9]{5}\.(safetensors|json)|isocost\.json)\.")
    captions: list[tuple[str, ...]] = []

    def is_done(shard: int) -> bool:
        info_file = f"latents-{shard:05d}.json"
        if info_file not in existing:
            return False
        try:
            num_bytes = json.loads(store.read(info_file))["bytes"]
        except (ValueError, KeyError, TypeError, RecursionError):  # a damaged description: the shard is written again
            return False
        return existing.get(f"latents-{shard:05d}.safetensors", 0) == num_bytes

    is_shard_needed: dict[int, bool] = {}

    def is_needed(position: int) -> bool:
        shard = position // SHARD_SIZE
        if shard not in is_shard_needed:
            is_shard_needed[shard] = process.owns(shard) and not is_done(shard)
        return is_shard_needed[shard]

    items: list[Sample | UnreadableSample] = []
    for item in read(is_needed):
        position = len(captions)
        captions.append(() if isinstance(item, UnreadableSample) else item.captions)
        if is_needed(position) and not isinstance(item, SkippedSample):
            items.append(item)
        if len(captions) % SHARD_SIZE == 0 and items:
            _write_latent_shard(store, position // SHARD_SIZE, items, autoencoder, progress)
            items = []
    if items:
        _write_latent_shard(store, (len(captions) - 1) // SHARD_SIZE, items, autoencoder, progress)
    return captions


def _write_latent_shard(
    store: ShardStore, number: int, items: list[Sample | UnreadableSample], autoencoder: Autoencoder, progress: Progress | None
) -> None:
    readable = [(row, item) for row, item in enumerate(items) if isinstance(item, Sample)]
    unreadable = [
        {"position": number * SHARD_SIZE + row, "name": item.name, "reason": item.reason}
        for row, item in enumerate(items)
        if isinstance(item, UnreadableSample)
    ]
    columns: dict[str, Tensor] = {}
    latent_shape: list[int] = []
    for start in range(0, len(readable), ENCODE_BATCH):
        rows = [row for row, _ in readable[start : start + ENCODE_BATCH]]
        stacked = torch.from_numpy(np.stack([item.image for _, item in readable[start : start + ENCODE_BATCH]]))
        for name, values in zip(("mean", "std"), autoencoder.encode(stacked.permute(0, 3, 1, 2).contiguous()), strict=True):
            latent_shape = list(values.shape[1:])
            if name not in columns:
                columns[name] = torch.zeros(len(items), *latent_shape, dtype=torch.float16)
            columns[name][rows] = values.cpu().half()
        if progress is not None:
            progress(len(rows))
    size = write_shard(store, f"latents-{number:05d}.safetensors", columns) if columns else 0
    info = {"bytes": size, "latent_shape": latent_shape, "bad": unreadable}
    info |= {"fallbacks": autoencoder.fallbacks} if autoencoder.fallbacks else {}
    store.write(f"latents-{number:05d}.json", json.dumps(info).encode())


def _write_texts(
    store: ShardStore,
    captions: list[str],
    text_encoder: MiniLMTextEncoder,
    with_prompt_embeds: bool,
    process: ProcessInfo,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    files = []
    existing = store.sizes()
    for number, start in enumerate(range(0, len(captions), SHARD_SIZE)):
        chunk = captions[start : start + SHARD_SIZE]
        name = f"text-{number:05d}.safetensors"
        if process.owns(number) and name not in existing:
            token_ids = text_encoder.tokenize(chunk)
            columns = {"token_ids": torch.from_numpy(token_ids)}
            if with_prompt_embeds:
                prompt_embeds = []
                for batch in np.array_split(token_ids, -(-len(token_ids) // ENCODE_BATCH)):
                    prompt_embeds.append(text_encoder.encode_tokens(batch).half().cpu())
                    if progress is not None:
                        progress(len(batch))
                columns["prompt_embeds"] = torch.cat(prompt_embeds)
            write_shard(store, name, columns)
        files.append(name)
    process.wait()
    return [{"name": name, "bytes": store.size(name)} for name in files]


def _write_caption_numbers(
    store: ShardStore, captions: list[tuple[str, ...]], distinct_captions: list[str]
) -> list[dict[str, Any]]:
    number_of = {caption: number for number, caption in enumerate(distinct_captions)}
    max_captions = max(len(image_captions) for image_captions in captions)
    files = []
    for shard, start in enumerate(range(0, len(captions), SHARD_SIZE)):
        chunk = captions[start : start + SHARD_SIZE]
        numbers = torch.full((len(chunk), max_captions), -1, dtype=torch.int32)
        for row, image_captions in enumerate(chunk):
            values = [number_of[caption] for caption in image_captions]
            numbers[row, : len(image_captions)] = torch.tensor(values, dtype=torch.int32)
        name = f"captions-{shard:05d}.safetensors"
        files.append({"name": name, "bytes": write_shard(store, name, {"numbers": numbers})})
    return files


def write_index(store: ShardStore, index: dict[str, Any]) -> None:
    """Write the index, which makes a cache exist."""
    store.write(INDEX, (json.dumps(index, indent=1, ensure_ascii=False) + "\n").encode())


# --- reading ----------------------------------------------------------------------------------------------------------


class Cache(Protocol):
    """Latent moments and captions of the images of a training."""

    def __len__(self) -> int:
        """Number of images."""

    @property
    def null_caption(self) -> int:
        """Number of the empty caption."""

    @property
    def has_prompt_embeds(self) -> bool:
        """Whether the cache has prompt embeddings in addition to token ids."""

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of images int64 [B]: float32 [B, C, L, L] each."""

    def captions(self, images: Tensor) -> Tensor:
        """Caption numbers of images int64 [B]: int64 [B, K], padded with -1."""

    def token_ids(self, captions: Tensor) -> Tensor:
        """Token ids int32 [B, T] of caption numbers int64 [B]."""

    def prompt_embeds(self, captions: Tensor) -> Tensor:
        """Prompt embeddings float32 [B, T, D] of caption numbers int64 [B]; needs `has_prompt_embeds`."""


class LatentCache(Cache):
    """A latent cache on disk or in an object store.

    Raises:
        RunError: a shard is missing or truncated, or the index is damaged.
    """

    def __init__(self, store: ShardStore | str | Path) -> None:
        self.store = store if isinstance(store, ShardStore) else ShardStore(store)
        try:
            index = self.index = parse_json(self.store.read(INDEX))
            tables, size = index["tables"], index["shard_size"]
            self.num_captions: int = index["num_captions"]
            counts = (size, self.num_captions, index["num_images"], *(item["position"] for item in index["bad"]))
            if not all(type(count) is int and 0 <= count < 2**63 for count in counts) or size < 1:
                raise ValueError("a count is not a number of images, captions or rows")
            if type(index["with_prompt_embeds"]) is not bool:
                raise ValueError("with_prompt_embeds is neither true nor false")
            unreadable = np.array(sorted(item["position"] for item in index["bad"]), dtype=np.int64)
            statistics = index.get("token_statistics")
            self._token_note = TokenStatistics(**statistics).note() if statistics else ""
            self._latents, self._captions, self._text = (
                RowTable(self.store, tables[name], size) for name in ("latents", "captions", "text")
            )
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
            raise RunError(
                f"{self.store.url}/{INDEX}: the index is damaged; remove this file, and the same command writes it again"
            ) from error
        self._next_readable = unreadable - np.arange(len(unreadable))  # index of the first image after each unreadable item

    def __len__(self) -> int:
        return int(self.index["num_images"])

    @property
    def token_note(self) -> str:
        """A warning about captions that the text encoder cuts or does not know; empty if none were counted."""
        return self._token_note

    @property
    def null_caption(self) -> int:
        """Number of the empty caption."""
        return self.num_captions

    @property
    def has_prompt_embeds(self) -> bool:
        """Whether the cache has prompt embeddings in addition to token ids."""
        return bool(self.index["with_prompt_embeds"])

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of images int64 [B]: float32 [B, C, L, L] each."""
        indices = images.numpy()
        positions = indices + np.searchsorted(self._next_readable, indices, side="right")
        rows = self._latents.rows(torch.from_numpy(positions), mean="f", std="f")
        return rows["mean"].float(), rows["std"].float()

    def captions(self, images: Tensor) -> Tensor:
        """Caption numbers of images int64 [B]: int64 [B, K], padded with -1."""
        return self._captions.rows(images, numbers="i")["numbers"].long()

    def token_ids(self, captions: Tensor) -> Tensor:
        """Token ids int32 [B, T] of caption numbers int64 [B]."""
        return self._text.rows(captions, token_ids="i")["token_ids"]

    def prompt_embeds(self, captions: Tensor) -> Tensor:
        """Prompt embeddings float32 [B, T, D] of caption numbers int64 [B]; needs `has_prompt_embeds`."""
        return self._text.rows(captions, prompt_embeds="f")["prompt_embeds"].float()


class MemoryCache(Cache):
    """A cache in memory: encodes a few images with one caption each."""

    def __init__(self, images: Tensor, captions: list[str], autoencoder: Autoencoder, text_encoder: MiniLMTextEncoder) -> None:
        """
        Args:
            images: uint8 [N, 3, R, R].
            captions: one for each image.
        """
        distinct_captions = sorted(set(captions))
        self._tokens = torch.from_numpy(text_encoder.tokenize([*distinct_captions, NULL_CAPTION]))
        self._prompt_embeds = text_encoder.encode_tokens(self._tokens.numpy()).clone().cpu()
        self._numbers = torch.tensor([[distinct_captions.index(caption)] for caption in captions])
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

    def prompt_embeds(self, captions: Tensor) -> Tensor:
        return self._prompt_embeds[captions]
