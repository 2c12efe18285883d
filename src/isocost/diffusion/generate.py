"""Rows in, uint8 pictures out: a checkpoint, its codec and its captions around the engine. No picture needs to touch the disk.

Shapes: N captions, U distinct captions, T tokens, D width of the caption states, R resolution.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from isocost.data.cache import NULL_CAPTION
from isocost.data.codec import Codec, TextCodec
from isocost.diffusion.engine import Denoise, Engine, FinishedRow, Row
from isocost.models.checkpoint import CheckpointInfo

ENCODE_BATCH = 256


@dataclass(frozen=True)
class CaptionStates:
    """States of N captions, each distinct one held once: `distinct` float32 [U, T, D], `number` int64 [N], `null` [T, D]."""

    distinct: Tensor
    number: Tensor
    null: Tensor

    @classmethod
    def of(cls, captions: Sequence[str], text: TextCodec) -> CaptionStates:
        """Encode the captions and the empty one."""
        different = sorted(set(captions))
        position = {caption: number for number, caption in enumerate(different)}
        texts = [*different, NULL_CAPTION]
        batches = [text.encode(texts[start : start + ENCODE_BATCH]) for start in range(0, len(texts), ENCODE_BATCH)]
        states = torch.cat(batches)
        return cls(states[:-1], torch.tensor([position[caption] for caption in captions]), states[-1])

    def __call__(self, captions: Tensor) -> Tensor:
        """Caption indices int64 [R] -> states [R, T, D]."""
        return self.distinct[self.number[captions]]


def make_engine(
    network: nn.Module,
    info: CheckpointInfo,
    captions: CaptionStates,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Engine:
    """An engine around a checkpoint's network."""
    model = info.model
    shape = (model.latent_channels, model.latent_side, model.latent_side)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Engine(_denoise(network), info.prediction, captions, captions.null, shape, batch_size, device, precision)


def generate(engine: Engine, codec: Codec, rows: Iterable[Row]) -> Iterator[tuple[list[FinishedRow], Tensor]]:
    """Run rows and decode what finishes, a batch of the engine's size at a time.

    Yields the finished rows with their pictures uint8 [N, 3, R, R]. A latent that is not finite decodes to mid-grey; its
    row says so.
    """
    waiting: list[FinishedRow] = []
    for finished in engine.run(rows):
        waiting.append(finished)
        if len(waiting) == engine.batch_size:
            yield waiting, _decode(waiting, codec)
            waiting = []
    if waiting:
        yield waiting, _decode(waiting, codec)


def _decode(finished: list[FinishedRow], codec: Codec) -> Tensor:
    latents = torch.stack([row.latent if row.finite else torch.zeros_like(row.latent) for row in finished])
    pictures = codec.decode(latents).cpu()
    for place, row in enumerate(finished):
        if not row.finite:
            pictures[place] = 128
    return pictures


def _denoise(network: nn.Module) -> Denoise:
    def denoise(x: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        return network(x.contiguous(memory_format=torch.channels_last), timesteps, states).sample

    return denoise
