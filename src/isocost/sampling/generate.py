"""Rows in, uint8 pictures out: a checkpoint, its codec and its captions around the engine. No picture needs to touch the disk.

Shapes: N captions, U distinct captions, T tokens, D width of the caption states, K width of their keys and values, R
resolution.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isocost.config.types import Precision
from isocost.data.latent_cache import NULL_CAPTION
from isocost.diffusion.noise_schedule import Schedule
from isocost.models.autoencoder import Codec
from isocost.models.checkpoint import CheckpointInfo
from isocost.models.text_encoder import CaptionEncoder
from isocost.sampling.denoiser import SamplingNetwork
from isocost.sampling.engine import Engine
from isocost.sampling.request import ByPicture, FinishedRow, Row

ENCODE_BATCH = 256
DECODE_BATCH = 32
MOST_DECODING = 2
MOST_FILLING = 4
PROJECTED_BYTES = 2**29


@dataclass(frozen=True)
class CaptionStates:
    """States of N captions, each distinct one held once: `distinct` float32 [U, T, D], `number` int64 [N], `null` [T, D]."""

    distinct: Tensor
    number: Tensor
    null: Tensor

    @classmethod
    def of(cls, captions: Sequence[str], text: CaptionEncoder) -> CaptionStates:
        """Encode the captions and the empty one."""
        different = sorted(set(captions))
        position = {caption: number for number, caption in enumerate(different)}
        texts = [*different, NULL_CAPTION]
        batches = [text.encode(texts[start : start + ENCODE_BATCH]) for start in range(0, len(texts), ENCODE_BATCH)]
        states = torch.cat(batches)
        null = torch.zeros_like(states[-1]) if text.null_is_zero else states[-1]
        return cls(states[:-1], torch.tensor([position[caption] for caption in captions], dtype=torch.int64), null)

    def __call__(self, captions: Tensor) -> Tensor:
        """Caption indices int64 [R] -> states [R, T, D]."""
        return self.distinct[self.number[captions]]


class ProjectedCaptions:
    """Captions as a network's keys and values, each projected once where all of them fit into `PROJECTED_BYTES`."""

    def __init__(self, captions: CaptionStates, network: SamplingNetwork) -> None:
        self.captions, self.network = captions, network
        num_distinct, num_tokens, _ = captions.distinct.shape
        width = network.context_width
        fits = num_distinct * num_tokens * width * network.dtype.itemsize <= PROJECTED_BYTES
        self.kept = torch.empty(num_distinct if fits else 0, num_tokens, width, dtype=network.dtype, device=network.device)
        self.is_known = torch.zeros(len(self.kept), dtype=torch.bool)

    @property
    def null(self) -> Tensor:
        """The empty caption, [T, K]."""
        return self.network.project(self.captions.null[None])[0]

    def __call__(self, captions: Tensor) -> Tensor:
        """Caption indices int64 [R] -> keys and values [R, T, K]."""
        distinct = self.captions.number[captions]
        if not len(self.kept):
            return self.network.project(self.captions.distinct[distinct])
        fresh = distinct[~self.is_known[distinct]].unique()
        if len(fresh):
            self.kept[fresh.to(self.kept.device)] = self.network.project(self.captions.distinct[fresh])
            self.is_known[fresh] = True
        return self.kept[distinct.to(self.kept.device)]


def make_engine(
    network: nn.Module,
    info: CheckpointInfo,
    captions: CaptionStates,
    *,
    bucket_size: int,
    precision: Precision = "fp32",
    compiled: bool = False,
    share_bytes: int = 0,
    beside: ByPicture | None = None,
    starts: ByPicture | None = None,
) -> Engine:
    """An engine around a checkpoint's network, which it changes in place. On a CPU a lane for each of torch's threads."""
    prepared = SamplingNetwork(network, precision, compiled)
    projected = ProjectedCaptions(captions, prepared)
    model = info.model
    return Engine(
        prepared.denoise(),
        info.prediction,
        projected,
        projected.null,
        (model.latent_channels, model.latent_side, model.latent_side),
        bucket_size,
        prepared.device,
        num_lanes=torch.get_num_threads() if prepared.device.type == "cpu" else 1,
        embeds_guidance=prepared.embeds_guidance,
        beside=beside,
        starts=starts,
        share_bytes=share_bytes,
    )


def schedule_of(info: CheckpointInfo) -> Schedule:
    """The noise schedule that a checkpoint was trained on."""
    if info.given is not None:
        return Schedule.of(info.given.noise)
    if info.prediction == "flow_prediction":
        return Schedule.flow()
    return Schedule.scaled_linear(zero_terminal_snr=info.zero_terminal_snr)


@dataclass(frozen=True)
class Drawn:
    """Finished rows with their pictures uint8 [N, 3, R, R]. A row that is not finite numbers has no picture."""

    rows: list[FinishedRow]
    pictures: Tensor
    broken: list[FinishedRow]


def generate(engine: Engine, codec: Codec, rows: Iterable[Row]) -> Iterator[Drawn]:
    """Run rows and decode what finishes, `DECODE_BATCH` at a time, while the next pictures are denoised.

    A latent that is not finite numbers is never decoded: it is handed on as broken.
    """
    with ThreadPoolExecutor(1, "decode") as decoder:
        batches = _DecodeBatches()
        decoding: deque[tuple[list[FinishedRow], Future[Tensor]]] = deque()
        for finished in engine.run(rows):
            if not finished.finite:
                yield Drawn([], torch.empty(0, 3, 0, 0, dtype=torch.uint8), [finished])
                continue
            for batch in batches.add(finished):
                decoding.append((list(batch.values()), decoder.submit(_decode, batch, codec)))
            while decoding and (decoding[0][1].done() or len(decoding) > MOST_DECODING):
                ready, pictures = decoding.popleft()
                yield Drawn(ready, pictures.result(), [])
        for batch in batches.rest():
            decoding.append((list(batch.values()), decoder.submit(_decode, batch, codec)))
        for ready, pictures in decoding:
            yield Drawn(ready, pictures.result(), [])


Batch = dict[int, FinishedRow]
"""Rows to decode at once, by their place in the call."""


class _DecodeBatches:
    """Calls of the decoder that fill up. A picture's place in its call is its id's, as in the engine's calls (`waiting.py`)."""

    def __init__(self) -> None:
        self._filling: deque[Batch] = deque()

    def add(self, finished: FinishedRow) -> Iterator[Batch]:
        """Put a row into the first batch where its place is free; gives the batches that are to be decoded now."""
        place = finished.row.picture_id % DECODE_BATCH
        batch = next((batch for batch in self._filling if place not in batch), None)
        if batch is None:
            batch = {}
            self._filling.append(batch)
        batch[place] = finished
        if len(batch) == DECODE_BATCH:
            self._filling.remove(batch)
            yield batch
        elif len(self._filling) > MOST_FILLING:
            yield self._filling.popleft()

    def rest(self) -> Iterator[Batch]:
        """The batches that did not fill up."""
        return iter(self._filling)


@torch.inference_mode()
def _decode(batch: Batch, codec: Codec) -> Tensor:
    """uint8 [N, 3, R, R] on the CPU, in the batch's order. Always `DECODE_BATCH` latents at once."""
    places = list(batch)
    some = batch[places[0]].latent
    latents = some.new_zeros(DECODE_BATCH, *some.shape)
    latents[places] = torch.stack([row.latent for row in batch.values()])
    return codec.decode(latents)[places].cpu()
