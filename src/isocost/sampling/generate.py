"""Rows in, uint8 images out: a checkpoint, its autoencoder and its captions around the engine. No image needs to touch the disk.

Shapes: N captions, U distinct captions, T tokens, D width of the prompt embeddings, K width of their keys and values, R
resolution.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isocost.config.types import DTypeName
from isocost.data.latent_cache import NULL_CAPTION
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.models.autoencoder import Autoencoder
from isocost.models.checkpoint import CheckpointInfo
from isocost.models.text_encoder import TextEncoder
from isocost.sampling.denoiser import Denoiser
from isocost.sampling.engine import Engine
from isocost.sampling.request import PerSampleFn, SampleRequest, SampleResult

ENCODE_BATCH = 256
DECODE_BATCH = 32
MAX_DECODE_IN_FLIGHT = 2
MAX_PENDING_BATCHES = 4
PROJECTED_BYTES = 2**29


@dataclass(frozen=True)
class PromptEmbeds:
    """States of N captions, each distinct one held once: `distinct` float32 [U, T, D], `number` int64 [N], `null` [T, D]."""

    distinct: Tensor
    number: Tensor
    null: Tensor

    @classmethod
    def of(cls, prompts: Sequence[str], text: TextEncoder) -> PromptEmbeds:
        """Encode the captions and the empty one."""
        different = sorted(set(prompts))
        slot_position = {prompt: number for number, prompt in enumerate(different)}
        texts = [*different, NULL_CAPTION]
        batches = [text.encode(texts[start : start + ENCODE_BATCH]) for start in range(0, len(texts), ENCODE_BATCH)]
        states = torch.cat(batches)
        null = torch.zeros_like(states[-1]) if text.null_is_zero else states[-1]
        return cls(states[:-1], torch.tensor([slot_position[prompt] for prompt in prompts], dtype=torch.int64), null)

    def __call__(self, prompts: Tensor) -> Tensor:
        """Caption indices int64 [R] -> states [R, T, D]."""
        return self.distinct[self.number[prompts]]


class CachedPromptKV:
    """Captions as a network's keys and values, each projected once where all of them fit into `PROJECTED_BYTES`."""

    def __init__(self, prompts: PromptEmbeds, network: Denoiser) -> None:
        self.prompts, self.network = prompts, network
        num_distinct, num_tokens, _ = prompts.distinct.shape
        width = network.cross_attention_dim
        fits = num_distinct * num_tokens * width * network.dtype.itemsize <= PROJECTED_BYTES
        self.kept = torch.empty(num_distinct if fits else 0, num_tokens, width, dtype=network.dtype, device=network.device)
        self.is_known = torch.zeros(len(self.kept), dtype=torch.bool)

    @property
    def null(self) -> Tensor:
        """The empty caption, [T, K]."""
        return self.network.project(self.prompts.null[None])[0]

    def __call__(self, prompts: Tensor) -> Tensor:
        """Caption indices int64 [R] -> keys and values [R, T, K]."""
        distinct = self.prompts.number[prompts]
        if not len(self.kept):
            return self.network.project(self.prompts.distinct[distinct])
        fresh = distinct[~self.is_known[distinct]].unique()
        if len(fresh):
            self.kept[fresh.to(self.kept.device)] = self.network.project(self.prompts.distinct[fresh])
            self.is_known[fresh] = True
        return self.kept[distinct.to(self.kept.device)]


def make_engine(
    network: nn.Module,
    info: CheckpointInfo,
    prompts: PromptEmbeds,
    *,
    batch_size: int,
    dtype: DTypeName = "fp32",
    compiled: bool = False,
    cache_bytes: int = 0,
    concat_cond: PerSampleFn | None = None,
    initial_noise: PerSampleFn | None = None,
) -> Engine:
    """An engine around a checkpoint's network, which it changes in place. On a CPU a lane for each of torch's threads."""
    prepared = Denoiser(network, dtype, compiled)
    projected = CachedPromptKV(prompts, prepared)
    model = info.model
    return Engine(
        prepared.denoise(),
        info.prediction_type,
        projected,
        projected.null,
        (model.latent_channels, model.latent_size, model.latent_size),
        batch_size,
        prepared.device,
        num_parallel_calls=torch.get_num_threads() if prepared.device.type == "cpu" else 1,
        embeds_guidance=prepared.embeds_guidance,
        concat_cond=concat_cond,
        initial_noise=initial_noise,
        cache_bytes=cache_bytes,
    )


def schedule_of(info: CheckpointInfo) -> NoiseSchedule:
    """The noise schedule that a checkpoint was trained on."""
    if info.pretrained is not None:
        return NoiseSchedule.of(info.pretrained.noise)
    if info.prediction_type == "flow_prediction":
        return NoiseSchedule.flow()
    return NoiseSchedule.scaled_linear(rescale_betas_zero_snr=info.rescale_betas_zero_snr)


@dataclass(frozen=True)
class GeneratedBatch:
    """Finished rows with their images uint8 [N, 3, R, R]. A row that is not finite numbers has no image."""

    rows: list[SampleResult]
    images: Tensor
    broken: list[SampleResult]


def generate(engine: Engine, autoencoder: Autoencoder, rows: Iterable[SampleRequest]) -> Iterator[GeneratedBatch]:
    """Run rows and decode what finishes, `DECODE_BATCH` at a time, while the next images are denoised.

    A latent that is not finite numbers is never decoded: it is handed on as broken.
    """
    with ThreadPoolExecutor(1, "decode") as decoder:
        batches = _DecodeBatches()
        decoding: deque[tuple[list[SampleResult], Future[Tensor]]] = deque()
        for finished in engine.run(rows):
            if not finished.finite:
                yield GeneratedBatch([], torch.empty(0, 3, 0, 0, dtype=torch.uint8), [finished])
                continue
            for batch in batches.add(finished):
                decoding.append((list(batch.values()), decoder.submit(_decode, batch, autoencoder)))
            while decoding and (decoding[0][1].done() or len(decoding) > MAX_DECODE_IN_FLIGHT):
                ready, images = decoding.popleft()
                yield GeneratedBatch(ready, images.result(), [])
        for batch in batches.rest():
            decoding.append((list(batch.values()), decoder.submit(_decode, batch, autoencoder)))
        for ready, images in decoding:
            yield GeneratedBatch(ready, images.result(), [])


Batch = dict[int, SampleResult]
"""Rows to decode at once, by their place in the call."""


class _DecodeBatches:
    """Calls of the decoder that fill up. An image's place in its call is its id's, as in the engine's calls (`waiting.py`)."""

    def __init__(self) -> None:
        self._filling: deque[Batch] = deque()

    def add(self, finished: SampleResult) -> Iterator[Batch]:
        """Put a row into the first batch where its place is free; gives the batches that are to be decoded now."""
        place = finished.row.sample_index % DECODE_BATCH
        batch = next((batch for batch in self._filling if place not in batch), None)
        if batch is None:
            batch = {}
            self._filling.append(batch)
        batch[place] = finished
        if len(batch) == DECODE_BATCH:
            self._filling.remove(batch)
            yield batch
        elif len(self._filling) > MAX_PENDING_BATCHES:
            yield self._filling.popleft()

    def rest(self) -> Iterator[Batch]:
        """The batches that did not fill up."""
        return iter(self._filling)


@torch.inference_mode()
def _decode(batch: Batch, autoencoder: Autoencoder) -> Tensor:
    """uint8 [N, 3, R, R] on the CPU, in the batch's order. Always `DECODE_BATCH` latents at once."""
    places = list(batch)
    some = batch[places[0]].latent
    latents = some.new_zeros(DECODE_BATCH, *some.shape)
    latents[places] = torch.stack([row.latent for row in batch.values()])
    return autoencoder.decode(latents)[places].cpu()
