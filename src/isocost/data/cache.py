"""The latent cache: moments and caption states of a whole data set in fixed-shape shards, read by position.

Which pictures the n-th image of a training is, is a pure function of (seed, n): the same for every size of a family,
after every resume.

Shapes: N pictures, S pictures a shard, C latent channels, L latent side, U distinct captions, K most captions a picture
has, T tokens, D width of the caption states, B batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from isocost.data.codec import Codec, TextCodec
from isocost.data.sources import Bad, Sample, read_source
from isocost.errors import WorkError
from isocost.study import SourceSpec

VERSION = 1
SHARD_SIZE = 4096
ENCODE_BATCH = 256
NULL_CAPTION = ""

Progress = Callable[[int], None]


@dataclass
class PictureSet:
    """Pictures in memory: uint8 [N, 3, R, R], captions of each, labels int64 [N, A] where known, what was skipped."""

    pictures: Tensor
    captions: list[tuple[str, ...]]
    names: list[str]
    labels: Tensor | None
    bad: list[Bad] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.pictures)

    def fingerprint(self) -> str:
        """Content hash of pictures and captions."""
        sha = hashlib.sha256(self.pictures.numpy().tobytes())
        sha.update(json.dumps(self.captions, ensure_ascii=False).encode())
        return sha.hexdigest()[:16]


def load_pictures(source: SourceSpec, resolution: int, max_bad_share: float, limit: int | None = None) -> PictureSet:
    """Read a source into memory.

    Raises:
        WorkError: more than `max_bad_share` of it cannot be read, or nothing can.
    """
    samples: list[Sample] = []
    bad: list[Bad] = []
    for item in islice(read_source(source, resolution), limit):
        if isinstance(item, Bad):
            bad.append(item)
        else:
            samples.append(item)
    total = len(samples) + len(bad)
    if not samples or len(bad) > max_bad_share * total:
        first = f"; first: {bad[0].name}: {bad[0].reason}" if bad else ""
        raise WorkError(f"{len(bad)} of {total} pictures cannot be read, more than data.max_bad_share={max_bad_share:g}{first}")
    stacked = torch.from_numpy(np.stack([sample.picture for sample in samples])).permute(0, 3, 1, 2).contiguous()
    labels = None
    if all(sample.labels is not None for sample in samples):
        labels = torch.from_numpy(np.stack([sample.labels for sample in samples if sample.labels is not None]))
    return PictureSet(stacked, [s.captions for s in samples], [s.name for s in samples], labels, bad)


def write_cache(
    folder: Path, pictures: PictureSet, codec: Codec, text: TextCodec, progress: Progress | None = None
) -> dict[str, Any]:
    """Encode every picture and every distinct caption once; returns what the manifest should say."""
    for number, start in enumerate(range(0, len(pictures), SHARD_SIZE)):
        means, stds = [], []
        for batch in pictures.pictures[start : start + SHARD_SIZE].split(ENCODE_BATCH):
            mean, std = codec.encode(batch)
            means.append(mean.cpu().half())
            stds.append(std.cpu().half())
            if progress is not None:
                progress(len(batch))
        shard = {"mean": torch.cat(means), "std": torch.cat(stds)}
        save_file(shard, folder / f"shard-{number:05d}.safetensors")
    distinct = sorted({caption for captions in pictures.captions for caption in captions})
    number_of = {caption: number for number, caption in enumerate(distinct)}
    most = max(len(captions) for captions in pictures.captions)
    index = torch.full((len(pictures), most), -1, dtype=torch.int32)
    for row, captions in enumerate(pictures.captions):
        index[row, : len(captions)] = torch.tensor([number_of[caption] for caption in captions], dtype=torch.int32)
    token_ids = text.tokenize([*distinct, NULL_CAPTION])
    save_file({"token_ids": torch.from_numpy(token_ids), "caption_index": index}, folder / "captions.safetensors")
    return {
        "num_pictures": len(pictures),
        "num_captions": len(distinct),
        "latent_shape": list(means[-1].shape[1:]),
        "num_tokens": text.max_tokens,
        "context_width": text.context_width,
        "num_bad": len(pictures.bad),
        "bad": [{"name": item.name, "reason": item.reason} for item in pictures.bad[:100]],
    }


def write_states(folder: Path, text: TextCodec, progress: Progress | None = None) -> None:
    """States of every distinct caption and, last, of the empty one: float16 [U + 1, T, D], beside the token ids."""
    token_ids = load_file(folder / "captions.safetensors")["token_ids"].numpy()
    batches = np.array_split(token_ids, -(-len(token_ids) // ENCODE_BATCH))
    states = []
    for batch in batches:
        states.append(text.states(batch).half().cpu())
        if progress is not None:
            progress(len(batch))
    save_file({"states": torch.cat(states)}, folder / "states.safetensors")


class LatentCache:
    """A cache folder opened for training."""

    def __init__(self, folder: Path) -> None:
        shards = [load_file(file) for file in sorted(folder.glob("shard-*.safetensors"))]
        self.mean = torch.cat([shard["mean"] for shard in shards])
        self.std = torch.cat([shard["std"] for shard in shards])
        captions = load_file(folder / "captions.safetensors")
        self.token_ids, self.caption_index = captions["token_ids"], captions["caption_index"].long()
        self.num_captions_of = (self.caption_index >= 0).sum(1)
        states = folder / "states.safetensors"
        self.states = load_file(states)["states"] if states.is_file() else None

    def __len__(self) -> int:
        return len(self.mean)

    def batch(
        self, seed: int, images_seen: int, batch_size: int, caption_dropout: float
    ) -> tuple[Tensor, Tensor, torch.Generator]:
        """The batch that follows `images_seen` images.

        Returns latents float32 [B, C, L, L] drawn from their moments, caption numbers int64 [B] (the last number is the
        empty caption), and the generator to go on drawing from.
        """
        chosen = picture_order(seed, images_seen, batch_size, len(self))
        generator = batch_generator(seed, images_seen)
        mean, std = self.mean[chosen].float(), self.std[chosen].float()
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        pick = (torch.rand(batch_size, generator=generator) * self.num_captions_of[chosen]).long()
        captions = self.caption_index[chosen, pick]
        dropped = torch.rand(batch_size, generator=generator) < caption_dropout
        return latents, torch.where(dropped, len(self.token_ids) - 1, captions), generator


def batch_generator(seed: int, images_seen: int) -> torch.Generator:
    """All randomness of the batch that follows `images_seen` images."""
    key = hashlib.sha256(f"batch {seed} {images_seen}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


def picture_order(seed: int, first: int, count: int, num_pictures: int) -> Tensor:
    """Which pictures are the images `first`, ..., `first + count - 1` of a training: int64 [count].

    Each pass over the data is a permutation of its own.
    """
    positions = np.arange(first, first + count)
    passes, places = positions // num_pictures, positions % num_pictures
    chosen = [_permutation(seed, int(number), num_pictures)[places[passes == number]] for number in np.unique(passes)]
    return torch.from_numpy(np.concatenate(chosen))


@lru_cache(maxsize=2)
def _permutation(seed: int, number: int, num_pictures: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, number])).permutation(num_pictures)
