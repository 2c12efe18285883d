"""Requests in, uint8 images out: the engine together with a checkpoint's autoencoder and its prompt embeddings.

Shapes: N prompts, U distinct prompts, R requests, T tokens, D width of the prompt embeddings, K width of their keys and values,
S resolution.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isocost.config.types import DTypeName
from isocost.data.latent_cache import NULL_CAPTION
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.models.autoencoder import Autoencoder, images_per_call
from isocost.models.checkpoint import CheckpointInfo
from isocost.models.text_encoder import TextEncoder
from isocost.sampling.denoiser import Denoiser
from isocost.sampling.engine import Engine
from isocost.sampling.request import PerSampleFn, SampleRequest, SampleResult
from isocost.utils.warn_once import warn_once

ENCODE_BATCH = 256
MAX_DECODE_IN_FLIGHT = 2
MAX_PENDING_BATCHES = 4
MAX_CACHED_KV_BYTES = 2**29


@dataclass(frozen=True)
class PromptEmbeds:
    """Embeddings of N prompts; each distinct prompt is stored once.

    Attributes:
        distinct: float32 [U, T, D].
        index: int64 [N], row of each prompt in `distinct`.
        null: float32 [T, D], the embeddings of the empty prompt.
        ms_per_prompt: measured milliseconds of the text encoder per text.
    """

    distinct: Tensor
    index: Tensor
    null: Tensor
    ms_per_prompt: float = 0.0

    @classmethod
    def encode(cls, prompts: Sequence[str], text_encoder: TextEncoder) -> PromptEmbeds:
        """Encode the prompts and the empty prompt; a warning counts the prompts that the encoder cuts or does not know."""
        if note := text_encoder.token_statistics(prompts).note():
            warn_once(f"prompts: {note}")
        distinct = sorted(set(prompts))
        index_of = {prompt: index for index, prompt in enumerate(distinct)}
        texts = [*distinct, NULL_CAPTION]
        started = time.perf_counter()
        batches = [text_encoder.encode(texts[start : start + ENCODE_BATCH]) for start in range(0, len(texts), ENCODE_BATCH)]
        embeds = torch.cat(batches)
        ms_per_prompt = 1000 * (time.perf_counter() - started) / len(texts)
        null = torch.zeros_like(embeds[-1]) if text_encoder.null_is_zero else embeds[-1]
        index = torch.tensor([index_of[prompt] for prompt in prompts], dtype=torch.int64)
        return cls(embeds[:-1], index, null, ms_per_prompt)

    def __call__(self, prompts: Tensor) -> Tensor:
        """Prompt indices int64 [R] -> prompt embeddings [R, T, D]."""
        return self.distinct[self.index[prompts]]


class CachedPromptKV:
    """Keys and values of the prompts in the cross-attention of a network.

    The keys and values of all distinct prompts are cached if they fit into `MAX_CACHED_KV_BYTES`. Then they are computed once
    per prompt. If they do not fit, nothing is cached, and they are computed at every call.
    """

    def __init__(self, prompts: PromptEmbeds, network: Denoiser) -> None:
        self.prompts, self.network = prompts, network
        num_distinct, num_tokens, _ = prompts.distinct.shape
        width = network.cross_attention_dim
        fits = num_distinct * num_tokens * width * network.dtype.itemsize <= MAX_CACHED_KV_BYTES
        self.cache = torch.empty(num_distinct if fits else 0, num_tokens, width, dtype=network.dtype, device=network.device)
        self.is_cached = torch.zeros(len(self.cache), dtype=torch.bool)

    @property
    def null(self) -> Tensor:
        """Keys and values of the empty prompt, [T, K]."""
        return self.network.project(self.prompts.null[None])[0]

    def __call__(self, prompts: Tensor) -> Tensor:
        """Prompt indices int64 [R] -> keys and values [R, T, K]."""
        indices = self.prompts.index[prompts]
        if not len(self.cache):
            return self.network.project(self.prompts.distinct[indices])
        missing = indices[~self.is_cached[indices]].unique()
        if len(missing):
            self.cache[missing.to(self.cache.device)] = self.network.project(self.prompts.distinct[missing])
            self.is_cached[missing] = True
        return self.cache[indices.to(self.cache.device)]


def make_engine(
    network: nn.Module | Denoiser,
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
    """Build an engine around a checkpoint's network, which is changed in place. On a CPU every thread of torch runs a call.

    The arguments are those of `Denoiser` and `Engine`. A `Denoiser` serves any number of engines one after another.
    """
    denoiser = network if isinstance(network, Denoiser) else Denoiser(network, dtype, compiled)
    keys_values = CachedPromptKV(prompts, denoiser)
    model = info.model
    return Engine(
        denoiser.denoise(),
        info.prediction_type,
        keys_values,
        keys_values.null,
        (model.latent_channels, model.latent_size, model.latent_size),
        batch_size,
        denoiser.device,
        num_parallel_calls=torch.get_num_threads() if denoiser.device.type == "cpu" else 1,
        embeds_guidance=denoiser.embeds_guidance,
        concat_cond=concat_cond,
        initial_noise=initial_noise,
        cache_bytes=cache_bytes,
    )


def schedule_of(info: CheckpointInfo) -> NoiseSchedule:
    """The noise schedule that a checkpoint was trained on."""
    if info.pretrained is not None:
        return NoiseSchedule.from_spec(info.pretrained.noise)
    if info.prediction_type == "flow_prediction":
        return NoiseSchedule.flow()
    return NoiseSchedule.scaled_linear(rescale_betas_zero_snr=info.rescale_betas_zero_snr)


@dataclass(frozen=True)
class GeneratedBatch:
    """Finished requests with their images.

    Attributes:
        results: of the images, in their order.
        images: uint8 [len(results), 3, S, S].
        nonfinite: results whose latent contains NaN or inf; they have no image.
    """

    results: list[SampleResult]
    images: Tensor
    nonfinite: list[SampleResult]


def generate(engine: Engine, autoencoder: Autoencoder, requests: Iterable[SampleRequest]) -> Iterator[GeneratedBatch]:
    """Run requests and decode their latents while the next images are denoised; see `decode_results`."""
    return decode_results(engine.run(requests), engine.latent_shape[-1], autoencoder)


def decode_results(results: Iterable[SampleResult], latent_size: int, autoencoder: Autoencoder) -> Iterator[GeneratedBatch]:
    """Decode latents, `images_per_call` at a time, while the next results are computed.

    A latent with NaN or inf is never decoded; it is yielded as `nonfinite`.

    Args:
        results: finished requests.
        latent_size: size of their latents.
        autoencoder: decodes them.
    """
    with ThreadPoolExecutor(1, "decode") as executor:
        batches = _DecodeBatches(images_per_call(latent_size * autoencoder.factor))
        in_flight: deque[tuple[list[SampleResult], Future[Tensor]]] = deque()
        for result in results:
            if not result.finite:
                yield GeneratedBatch([], torch.empty(0, 3, 0, 0, dtype=torch.uint8), [result])
                continue
            for batch in batches.add(result):
                in_flight.append((list(batch.values()), executor.submit(_decode, batch, batches.size, autoencoder)))
            while in_flight and (in_flight[0][1].done() or len(in_flight) > MAX_DECODE_IN_FLIGHT):
                decoded, images = in_flight.popleft()
                yield GeneratedBatch(decoded, images.result(), [])
        for batch in batches.remaining():
            in_flight.append((list(batch.values()), executor.submit(_decode, batch, batches.size, autoencoder)))
        for decoded, images in in_flight:
            yield GeneratedBatch(decoded, images.result(), [])


DecodeBatch = dict[int, SampleResult]
"""Results to decode in one call, by their position in the call."""


class _DecodeBatches:
    """Decoder calls that are being filled. As in the engine, the position of an image is a function of its sample index."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._pending: deque[DecodeBatch] = deque()

    def add(self, result: SampleResult) -> Iterator[DecodeBatch]:
        """Add a result to the first batch whose position is free; yield the batches to decode now."""
        position = result.request.sample_index % self.size
        batch = next((batch for batch in self._pending if position not in batch), None)
        if batch is None:
            batch = {}
            self._pending.append(batch)
        batch[position] = result
        if len(batch) == self.size:
            self._pending.remove(batch)
            yield batch
        elif len(self._pending) > MAX_PENDING_BATCHES:
            yield self._pending.popleft()

    def remaining(self) -> Iterator[DecodeBatch]:
        """The batches that are not full."""
        return iter(self._pending)


@torch.inference_mode()
def _decode(batch: DecodeBatch, size: int, autoencoder: Autoencoder) -> Tensor:
    """uint8 [len(batch), 3, S, S] on the CPU, in the batch's order. Every call decodes exactly `size` latents."""
    positions = list(batch)
    first = batch[positions[0]].latent
    latents = first.new_zeros(size, *first.shape)
    latents[positions] = torch.stack([result.latent for result in batch.values()])
    return autoencoder.decode(latents)[positions].cpu()
