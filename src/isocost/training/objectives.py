"""Training objectives: each makes any rows of any batch, and computes the loss of a network on them.

The n-th image of a training owns its randomness: its index in the data set, latent, noise, timestep, caption and dropout are
functions of (seed, n) only. Neither the number of processes nor the microbatch changes the training data.

Shapes: B rows, C latent channels, L latent size, T tokens, D width of the prompt embeddings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from isocost.config.training import TrainSpec
from isocost.data.latent_cache import Cache
from isocost.data.shuffle import shuffled_indices
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.philox import philox4x32, philox_normal
from isocost.models.text_encoder import MiniLMTextEncoder

LATENT_DRAW, DIFFUSION_NOISE, DRAW_STREAM = 0, 1, 2
"""Philox streams of an image: its latent from the moments, the noise added to it, and the integers of `SampleDraws`."""


@dataclass(frozen=True)
class Batch:
    """Rows of a training batch.

    Attributes:
        noisy: network inputs [B, C, L, L]; [B, 2C, L, L] for super-resolution.
        timesteps: [B].
        prompt_embeds: [B, T, D]; token ids [B, T] where the text encoder is trained.
        target: of the network's output, [B, C, L, L].
        weights: of the rows' losses, [B].
        latents: clean latents [B, C, L, L].
        indices: of the timesteps in the noise schedule, int64 [B].
    """

    noisy: Tensor
    timesteps: Tensor
    prompt_embeds: Tensor
    target: Tensor
    weights: Tensor
    latents: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.noisy)

    def split(self, size: int) -> Iterator[Self]:
        """Yield the rows in order as batches of `size` rows."""
        columns = (getattr(self, column.name) for column in fields(self))
        for chunks in zip(*(column.split(size) for column in columns), strict=True):
            yield type(self)(*chunks)


LowResolution = Callable[[Tensor, Tensor], Tensor]
"""Image indices int64 [B] and their epochs int64 [B] -> latents of the low-resolution images, float32 [B, C, L, L]."""


class Objective(Protocol):
    """Makes batches of a training and computes its loss."""

    def on_train_start(self, averages: Mapping[int, list[Tensor]]) -> None:
        """Called before the first step.

        Args:
            averages: moving averages of the network's trainable parameters by half-life; training updates them in place.
        """

    def batch(self, images_seen: int, rows: range, device: torch.device, dtype: torch.dtype) -> Batch:
        """Make `rows` of the batch that follows `images_seen` images: a pure function that does not depend on other rows."""

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Compute the scalar loss, a mean over the rows."""


class TextToImage:
    """Predict noise, velocity or clean latent from a noisy latent and its caption (arXiv 2006.11239, 2202.00512)."""

    def __init__(
        self, spec: TrainSpec, cache: Cache, schedule: NoiseSchedule, text_encoder: MiniLMTextEncoder | None = None
    ) -> None:
        """
        Args:
            text_encoder: encodes captions in each step; needed only if the cache has no prompt embeddings.
        """
        assert cache.has_prompt_embeds or text_encoder is not None, "a cache without prompt embeddings needs a text encoder"
        self.spec, self.cache, self.schedule, self.text_encoder = spec, cache, schedule, text_encoder
        self.key = training_key(spec.seed)
        self.timesteps = torch.tensor(schedule.timesteps)
        self.loss_weights = torch.from_numpy(loss_weights(schedule, spec))

    def on_train_start(self, averages: Mapping[int, list[Tensor]]) -> None:
        """Do nothing: the loss does not use the averages."""

    def batch(self, images_seen: int, rows: range, device: torch.device, dtype: torch.dtype = torch.float32) -> Batch:
        draws = sample_draws(self.key, torch.arange(images_seen + rows.start, images_seen + rows.stop))
        return self.batch_at((draws.timestep * self.schedule.num_timesteps) >> 32, images_seen, rows, device, dtype)

    def batch_at(self, index: Tensor, images_seen: int, rows: range, device: torch.device, dtype: torch.dtype) -> Batch:
        """Make the rows with their noise at the timesteps `index`, int64 [B]."""
        images = torch.arange(images_seen + rows.start, images_seen + rows.stop)
        image_indices = self._image_indices(images_seen + rows.start, len(rows))
        draws = sample_draws(self.key, images)
        mean, std = (moment.to(device, non_blocking=True) for moment in self.cache.moments(image_indices))
        latents, noise = mean + std * self._noise(images, LATENT_DRAW, mean), self._noise(images, DIFFUSION_NOISE, mean)
        captions = self._captions(image_indices, draws.caption, draws.dropout)
        prompt_embeds = self._prompt_embeds(captions).to(device, dtype, non_blocking=True)
        latents, noise, device_index = latents.to(dtype), noise.to(dtype), index.to(device, non_blocking=True)
        return Batch(
            noisy=self.schedule.add_noise(latents, noise, device_index),
            timesteps=self.timesteps[index].to(device, dtype, non_blocking=True),
            prompt_embeds=prompt_embeds,
            target=self.schedule.training_target(self.spec.prediction_type, latents, noise, device_index),
            weights=(self.loss_weights[index] * self._image_weights(image_indices)).to(device, dtype, non_blocking=True),
            latents=latents,
            indices=device_index,
        )

    @property
    def null_prompt_embeds(self) -> Tensor:
        """Prompt embeddings of the empty caption, [1, T, D]."""
        return self._prompt_embeds(torch.tensor([self.cache.null_caption]))

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        predicted = network(batch.noisy, batch.timesteps, batch.prompt_embeds).sample.to(batch.target.dtype)
        squared_errors = (predicted - batch.target).square()
        return (squared_errors.flatten(1).mean(1) * batch.weights).mean()

    def _image_indices(self, first: int, count: int) -> Tensor:
        """Indices in the data set of the images `first`, ..., `first + count - 1` of the training, int64 [count]."""
        return shuffled_indices(self.spec.seed, first, count, len(self.cache))

    def _image_weights(self, image_indices: Tensor) -> Tensor | float:
        """Weights of the images' losses, float [B] or a scalar; the timesteps' weights are multiplied to them."""
        return 1.0

    def _noise(self, images: Tensor, stream: int, like: Tensor) -> Tensor:
        channels, height, width = like.shape[1:]
        return philox_normal(self.key, images, stream, (channels, height, width), like.device)

    def _captions(self, image_indices: Tensor, caption_draws: Tensor, dropout_draws: Tensor) -> Tensor:
        """One caption number for each image, int64 [B]."""
        candidates = self.cache.captions(image_indices)
        column = (caption_draws * (candidates >= 0).sum(1)) >> 32
        captions = candidates.gather(1, column[:, None])[:, 0]
        return torch.where(dropout_draws < self.spec.caption_dropout * 2**32, self.cache.null_caption, captions)

    def _prompt_embeds(self, captions: Tensor) -> Tensor:
        if self.cache.has_prompt_embeds:
            return self.cache.prompt_embeds(captions)
        assert self.text_encoder is not None
        token_ids = self.cache.token_ids(captions).numpy()
        return self.text_encoder.encode_tokens(token_ids).clone()  # autograd does not take tensors of inference mode


class Superres(TextToImage):
    """Super-resolution: text-to-image with the latent of the upscaled low-resolution image as further input channels.

    arXiv 2404.01367, section 4.3, after arXiv 2112.10752, section 4.4.
    """

    def __init__(
        self,
        spec: TrainSpec,
        cache: Cache,
        schedule: NoiseSchedule,
        low_resolution: LowResolution,
        text_encoder: MiniLMTextEncoder | None = None,
        *,
        captions: Literal["empty", "dataset"] = "empty",
    ) -> None:
        super().__init__(spec, cache, schedule, text_encoder)
        self.low_resolution, self.uses_captions = low_resolution, captions == "dataset"

    def batch_at(self, index: Tensor, images_seen: int, rows: range, device: torch.device, dtype: torch.dtype) -> Batch:
        batch = super().batch_at(index, images_seen, rows, device, dtype)
        first, count = images_seen + rows.start, len(rows)
        image_indices = self._image_indices(first, count)
        epochs = torch.arange(first, first + count) // len(self.cache)
        concat_cond = self.low_resolution(image_indices, epochs).to(batch.noisy, non_blocking=True)
        return replace(batch, noisy=torch.cat([batch.noisy, concat_cond], dim=1))

    def _captions(self, image_indices: Tensor, caption_draws: Tensor, dropout_draws: Tensor) -> Tensor:
        if self.uses_captions:
            return super()._captions(image_indices, caption_draws, dropout_draws)
        return torch.full_like(image_indices, self.cache.null_caption)


class Dreambooth(TextToImage):
    """DreamBooth with prior preservation: images of a subject alternate with images of its class (arXiv 2208.12242, eq. 2).

    The first `num_subject` images of the cache show the subject. The others show the class and were sampled by the model before
    fine-tuning. Each kind is half of a batch, so its losses weigh twice: the loss is the sum of the mean losses of both kinds.
    """

    def __init__(
        self,
        spec: TrainSpec,
        cache: Cache,
        schedule: NoiseSchedule,
        num_subject: int,
        prior_weight: float,
        *,
        trains_text_encoder: bool = False,
    ) -> None:
        """
        Args:
            num_subject: number of images of the subject.
            prior_weight: weight of the class images.
            trains_text_encoder: the network (`UNetWithTextEncoder`) takes token ids instead of prompt embeddings.
        """
        super().__init__(spec, cache, schedule)
        self.trains_text_encoder = trains_text_encoder
        self.num_subject, self.num_prior, self.prior_weight = num_subject, len(cache) - num_subject, prior_weight

    def _image_indices(self, first: int, count: int) -> Tensor:
        if not self.num_prior:
            return shuffled_indices(self.spec.seed, first, count, self.num_subject)
        images = torch.arange(first, first + count)
        pairs = images // 2
        start, stop = int(pairs[0]), int(pairs[-1]) + 1
        subject_indices = shuffled_indices(self.spec.seed, start, stop - start, self.num_subject)[pairs - start]
        class_indices = shuffled_indices(self.spec.seed, start, stop - start, self.num_prior)[pairs - start]
        return torch.where(images % 2 == 0, subject_indices, self.num_subject + class_indices)

    def _image_weights(self, image_indices: Tensor) -> Tensor | float:
        if not self.num_prior:
            return 1.0
        return torch.where(image_indices < self.num_subject, 2.0, 2.0 * self.prior_weight)

    def _prompt_embeds(self, captions: Tensor) -> Tensor:
        return self.cache.token_ids(captions) if self.trains_text_encoder else super()._prompt_embeds(captions)


def training_schedule(spec: TrainSpec) -> NoiseSchedule:
    """Return the noise schedule for the prediction type of a training: rectified flow, or Stable Diffusion's schedule."""
    if spec.prediction_type == "flow_prediction":
        return NoiseSchedule.flow()
    return NoiseSchedule.scaled_linear(rescale_betas_zero_snr=spec.rescale_betas_zero_snr)


def training_key(seed: int) -> int:
    """Return the Philox key of a training; it differs from the keys of sampling."""
    return int.from_bytes(hashlib.sha256(f"training {seed}".encode()).digest()[:8], "little") >> 1


class SampleDraws(NamedTuple):
    """Four independent uniform integers in [0, 2^32) of each image, int64 [B]."""

    timestep: Tensor
    caption: Tensor
    dropout: Tensor
    guidance: Tensor


def sample_draws(key: int, images: Tensor) -> SampleDraws:
    """Return the random integers of images, int64 [B]."""
    counter = torch.stack([images & 0xFFFFFFFF, images >> 32, torch.full_like(images, DRAW_STREAM), torch.zeros_like(images)])
    draws = philox4x32(counter, torch.tensor([[key & 0xFFFFFFFF], [key >> 32]]))
    return SampleDraws(*draws)


def loss_weights(schedule: NoiseSchedule, spec: TrainSpec) -> np.ndarray:
    """Return the weight of the squared error at each timestep, float64 [timesteps]: 1, or min-SNR (arXiv 2303.09556, sec. 3.4).

    With SNR = alpha^2 / sigma^2 and g = `min_snr_gamma`, the error of the clean latent has the weight min(SNR, g). The error of
    epsilon is SNR times the error of the clean latent, the error of v is SNR + 1 times, and the error of a flow sigma^-2 times.
    """
    snr = (schedule.alpha / schedule.sigma) ** 2
    if spec.min_snr_gamma is None:
        return np.ones_like(snr)
    scales = {"epsilon": snr, "v_prediction": snr + 1, "sample": np.ones_like(snr), "flow_prediction": 1 / schedule.sigma**2}
    scale = scales[spec.prediction_type]
    return np.minimum(snr, spec.min_snr_gamma) / scale
