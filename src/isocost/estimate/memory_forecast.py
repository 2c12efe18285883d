"""A forecast of the device memory that a published checkpoint takes, from its configs. Nothing is loaded.

The weights are exact: parameters counted on the meta device, in the dtype in which they are read. The activations are the
largest sum of tensors that exist at the same time (`models/memory.py`). Work memory of single operations, the first calls of
torch and of the CUDA driver, and the fragmentation of an allocator are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from isocost.config.sampling import VaeSpec
from isocost.config.sweep import SweepSpec
from isocost.models.autoencoder import DTYPES, images_per_call
from isocost.models.checkpoint import CheckpointInfo
from isocost.models.decoder_memory import autoencoder_on_meta, decoder_bytes
from isocost.models.memory import weight_bytes
from isocost.models.pretrained.architectures import denoiser_memory
from isocost.models.pretrained.files import MODEL_INDEX, read_config
from isocost.models.pretrained.pipeline_config import family_at, find_base_folder, num_tokens_of, text_encoder_classes
from isocost.models.pretrained.prompt_encoder import encoder_on_meta
from isocost.sampling.denoiser import SamplingDTypeName, torch_dtype
from isocost.sampling.generate import MAX_CACHED_KV_BYTES
from isocost.sampling.request import passes_per_evaluation
from isocost.sweep.worker import FIRST_STEP_CACHE_BYTES
from isocost.utils.device import free_memory_bytes

GIB = 2**30


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes of device memory of a checkpoint.

    Attributes:
        checkpoint: its label.
        dtype, vae_dtype: of the denoiser and of the autoencoder. Text encoders run in fp32.
        text_encoder_bytes, denoiser_bytes, autoencoder_bytes: of the weights.
        denoiser_activation_bytes, decoder_activation_bytes: of the largest calls.
        cache_bytes: prompt embeddings, and upper limits of the caches of a sweep.
        total_bytes: largest sum of what exists at the same time. A sweep releases the text encoders before it samples.
        guide_bytes: weights of a guide and of its text encoders; None without a guide.
    """

    checkpoint: str
    dtype: str
    vae_dtype: str
    text_encoder_bytes: int
    denoiser_bytes: int
    autoencoder_bytes: int
    denoiser_activation_bytes: int
    decoder_activation_bytes: int
    cache_bytes: int
    total_bytes: int
    guide_bytes: int | None = None

    def plain(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        guide = "" if self.guide_bytes is None else f" Guide with its text encoder: {_gib(self.guide_bytes)}."
        return (
            f"{self.checkpoint}: about {_gib(self.total_bytes)} of device memory. Weights: text encoder "
            f"{_gib(self.text_encoder_bytes)} (fp32), denoiser {_gib(self.denoiser_bytes)} ({self.dtype}), autoencoder "
            f"{_gib(self.autoencoder_bytes)} ({self.vae_dtype}). Activations: denoiser {_gib(self.denoiser_activation_bytes)}, "
            f"decoder {_gib(self.decoder_activation_bytes)}. Caches: {_gib(self.cache_bytes)}.{guide}".removesuffix(".")
        )

    def warning(self, device: torch.device) -> str | None:
        """One line if the total exceeds the free memory of a device; else None."""
        free = free_memory_bytes(device)
        if self.total_bytes <= free:
            return None
        return (
            f"{self.checkpoint}: needs about {_gib(self.total_bytes)}, and {device} has {_gib(free)} free; use dtype bf16, "
            "a smaller batch, vae dtype bf16 or a vae tile size"
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.3g} GiB" if num_bytes >= GIB / 1000 else "< 0.001 GiB"


def forecast_sweep(info: CheckpointInfo, sweep: SweepSpec, num_images: int, device: torch.device) -> MemoryForecast:
    """Forecast the memory of a sweep over a published checkpoint.

    Args:
        info: metadata of the checkpoint.
        sweep: the sweep.
        num_images: images of a point; the number of prompts is at most this.
        device: where it will run. A CPU runs one network call per thread.
    """
    parts = _count(info, sweep.dtype, sweep.vae, sweep.batch_size, device)
    model = info.model
    latent_bytes = model.latent_channels * model.latent_size**2 * torch.float32.itemsize
    keys_values = num_images * parts.key_value_bytes
    caches = (
        num_images * parts.packed_bytes
        + (keys_values if keys_values <= MAX_CACHED_KV_BYTES else 0)
        + min(FIRST_STEP_CACHE_BYTES, 2 * num_images * latent_bytes)
    )
    sampling = parts.denoiser + parts.autoencoder + parts.denoiser_activations + parts.decoder_activations + caches
    return parts.forecast(info.label, sweep.dtype, sweep.vae, caches, max(parts.text_encoder, sampling))


def forecast_batches(
    info: CheckpointInfo,
    batches: Sequence[int],
    guidance: float,
    dtype: SamplingDTypeName,
    device: torch.device,
    guide: CheckpointInfo | None = None,
) -> MemoryForecast:
    """Forecast the memory of a published checkpoint whose parts are all loaded, for the largest of some batch sizes.

    Args:
        info: metadata of the checkpoint.
        batches: numbers of images.
        guidance: w, which decides the network passes of an evaluation.
        dtype: of the denoiser.
        device: where it will run.
        guide: metadata of a published checkpoint that guides it. Its autoencoder is not loaded.
    """
    passes = 1 if guide is not None else passes_per_evaluation(info.effective_guidance(guidance), info.model.embeds_guidance)
    parts = _count(info, dtype, VaeSpec(), max(batches) * passes, device, num_parallel_calls=1)
    caches = max(batches) * (parts.packed_bytes + parts.key_value_bytes)
    activations = max(parts.denoiser_activations, parts.decoder_activations)
    total = parts.text_encoder + parts.denoiser + parts.autoencoder
    guide_bytes = None
    if guide is not None:
        guide_parts = _count(guide, dtype, VaeSpec(), max(batches), device, num_parallel_calls=1)
        guide_bytes = guide_parts.text_encoder + guide_parts.denoiser
        caches += max(batches) * (guide_parts.packed_bytes + guide_parts.key_value_bytes)
        activations = max(activations, guide_parts.denoiser_activations)
        total += guide_bytes
    forecast = parts.forecast(info.label, dtype, VaeSpec(), caches, total + activations + caches)
    return replace(forecast, guide_bytes=guide_bytes)


@dataclass(frozen=True)
class _Parts:
    text_encoder: int
    denoiser: int
    autoencoder: int
    denoiser_activations: int
    decoder_activations: int
    packed_bytes: int
    key_value_bytes: int

    def forecast(self, label: str, dtype: str, vae: VaeSpec, caches: int, total: int) -> MemoryForecast:
        weights = (self.text_encoder, self.denoiser, self.autoencoder)
        return MemoryForecast(
            label, dtype, vae.dtype, *weights, self.denoiser_activations, self.decoder_activations, caches, total
        )


def _count(
    info: CheckpointInfo,
    dtype: SamplingDTypeName,
    vae: VaeSpec,
    batch: int,
    device: torch.device,
    num_parallel_calls: int | None = None,
) -> _Parts:
    assert info.pretrained is not None, "a forecast is for published checkpoints"
    folder = find_base_folder(info.pretrained.path)
    family, num_tokens = family_at(folder), num_tokens_of(family_at(folder), folder)[0]
    classes = text_encoder_classes(family, read_config(folder / MODEL_INDEX), folder)
    encoders = [encoder_on_meta(folder / name, class_name) for name, class_name in classes.items()]
    vae_config = read_config(folder / "vae" / "config.json")
    network = denoiser_memory(
        family,
        read_config(folder / family.denoiser_folder / "config.json"),
        num_tokens,
        info.resolution,
        info.model.latent_size,
        batch,
        torch_dtype(dtype),
    )
    if num_parallel_calls is None:
        num_parallel_calls = torch.get_num_threads() if device.type == "cpu" else 1
    return _Parts(
        sum(weight_bytes(encoder, torch.float32) for encoder in encoders),
        network.weight_bytes,
        weight_bytes(autoencoder_on_meta(vae_config), DTYPES[vae.dtype]),
        num_parallel_calls * network.activation_bytes,
        decoder_bytes(vae_config, info.resolution, images_per_call(info.resolution), vae),
        network.packed_bytes,
        network.key_value_width * num_tokens * torch_dtype(dtype).itemsize,
    )
