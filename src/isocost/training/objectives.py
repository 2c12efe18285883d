"""What is trained: a task gives any rows of the batch after so many images, and the loss of a network on them.

Image n of a training owns its randomness: its image, latent, noise, timestep, caption and dropout are functions of
(seed, n) alone, so neither the number of processes nor the microbatch changes what is seen.

Shapes: B rows, C latent channels, L latent side, T tokens, D width of the prompt embeddings.
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

LATENT_DRAW, DIFFUSION_NOISE, CHOICES = 0, 1, 2
"""What an image draws: its latent from the moments, the noise that is mixed in, and four words for its choices."""


@dataclass(frozen=True)
class Batch:
    """Network inputs [B, C, L, L], timesteps [B], prompt embeddings [B, T, D], targets [B, C, L, L], loss weights [B].

    Super-resolution's inputs are [B, 2C, L, L]. `latents` [B, C, L, L] are clean; `indices` int64 [B] say where on the
    schedule the inputs stand.
    """

    noisy: Tensor
    timesteps: Tensor
    states: Tensor
    target: Tensor
    weights: Tensor
    latents: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.noisy)

    def split(self, size: int) -> Iterator[Self]:
        """The rows in order, `size` at a time."""
        columns = (getattr(self, column.name) for column in fields(self))
        for parts in zip(*(column.split(size) for column in columns), strict=True):
            yield type(self)(*parts)


LowResolution = Callable[[Tensor, Tensor], Tensor]
"""Images int64 [B] and the passes over the data int64 [B] in which they are seen -> latents float32 [B, C, L, L]."""


class Objective(Protocol):
    """One kind of training."""

    def begin(self, averages: Mapping[int, list[Tensor]]) -> None:
        """Called before the first step with the averages of the network's learning parameters, by half-life, which move on
        as it learns."""

    def batch(self, images_seen: int, rows: range, device: torch.device, dtype: torch.dtype) -> Batch:
        """Some rows of the batch that follows `images_seen` images: a pure function, whatever the other rows are."""

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Scalar loss, a mean over the rows."""


class TextToImage:
    """Predict noise, velocity or clean latent from a noisy latent and its caption (arXiv 2006.11239, 2202.00512)."""

    def __init__(self, spec: TrainSpec, cache: Cache, schedule: NoiseSchedule, text: MiniLMTextEncoder | None = None) -> None:
        """`text` encodes captions in each step; it is needed only where the cache holds no states."""
        assert cache.has_prompt_embeds or text is not None, "a cache without states needs a text encoder"
        self.spec, self.cache, self.schedule, self.text_encoder = spec, cache, schedule, text
        self.key = training_key(spec.seed)
        self.timesteps = torch.tensor(schedule.timesteps)
        self.loss_weights = torch.from_numpy(loss_weights(schedule, spec))

    def begin(self, averages: Mapping[int, list[Tensor]]) -> None:
        """Nothing here depends on them."""

    def batch(self, images_seen: int, rows: range, device: torch.device, dtype: torch.dtype = torch.float32) -> Batch:
        words = choices(self.key, torch.arange(images_seen + rows.start, images_seen + rows.stop))
        return self.batch_at((words.timestep * self.schedule.num_timesteps) >> 32, images_seen, rows, device, dtype)

    def batch_at(self, index: Tensor, images_seen: int, rows: range, device: torch.device, dtype: torch.dtype) -> Batch:
        """The rows noised to these places of the schedule, int64 [B]."""
        images = torch.arange(images_seen + rows.start, images_seen + rows.stop)
        image_indices = self._image_indices(images_seen + rows.start, len(rows))
        words = choices(self.key, images)
        mean, std = (moment.to(device, non_blocking=True) for moment in self.cache.moments(image_indices))
        latents, noise = mean + std * self._noise(images, LATENT_DRAW, mean), self._noise(images, DIFFUSION_NOISE, mean)
        states = self._states(self._captions(image_indices, words.caption, words.dropout)).to(device, dtype, non_blocking=True)
        latents, noise, moved = latents.to(dtype), noise.to(dtype), index.to(device, non_blocking=True)
        return Batch(
            noisy=self.schedule.add_noise(latents, noise, moved),
            timesteps=self.timesteps[index].to(device, dtype, non_blocking=True),
            states=states,
            target=self.schedule.training_target(self.spec.prediction_type, latents, noise, moved),
            weights=(self.loss_weights[index] * self._weights(image_indices)).to(device, dtype, non_blocking=True),
            latents=latents,
            indices=moved,
        )

    @property
    def null_prompt_embeds(self) -> Tensor:
        """States of the empty caption, [1, T, D]."""
        return self._states(torch.tensor([self.cache.null_caption]))

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        predicted = network(batch.noisy, batch.timesteps, batch.states).sample.to(batch.target.dtype)
        squares = (predicted - batch.target).square()
        return (squares.flatten(1).mean(1) * batch.weights).mean()

    def _image_indices(self, first: int, count: int) -> Tensor:
        """Which images images `first`, ... are, int64 [count]."""
        return shuffled_indices(self.spec.seed, first, count, len(self.cache))

    def _weights(self, image_indices: Tensor) -> Tensor | float:
        """What the images' errors weigh beside the timestep's weight, float [B] or for all."""
        return 1.0

    def _noise(self, images: Tensor, purpose: int, like: Tensor) -> Tensor:
        channels, height, width = like.shape[1:]
        return philox_normal(self.key, images, purpose, (channels, height, width), like.device)

    def _captions(self, image_indices: Tensor, pick: Tensor, drop: Tensor) -> Tensor:
        several = self.cache.captions(image_indices)
        chosen = (pick * (several >= 0).sum(1)) >> 32
        captions = several.gather(1, chosen[:, None])[:, 0]
        return torch.where(drop < self.spec.caption_dropout * 2**32, self.cache.null_caption, captions)

    def _states(self, captions: Tensor) -> Tensor:
        if self.cache.has_prompt_embeds:
            return self.cache.states(captions)
        assert self.text_encoder is not None
        return self.text_encoder.states(
            self.cache.token_ids(captions).numpy()
        ).clone()  # made in inference mode, used by autograd


class Superres(TextToImage):
    """Text-to-image whose network also sees the latent of the enlarged low-resolution image, behind the noisy latent.

    arXiv 2404.01367, section 4.3, after arXiv 2112.10752, section 4.4.
    """

    def __init__(
        self,
        spec: TrainSpec,
        cache: Cache,
        schedule: NoiseSchedule,
        low_resolution: LowResolution,
        text: MiniLMTextEncoder | None = None,
        *,
        captions: Literal["empty", "dataset"] = "empty",
    ) -> None:
        super().__init__(spec, cache, schedule, text)
        self.low_resolution, self.captions_given = low_resolution, captions == "dataset"

    def batch_at(self, index: Tensor, images_seen: int, rows: range, device: torch.device, dtype: torch.dtype) -> Batch:
        batch = super().batch_at(index, images_seen, rows, device, dtype)
        first, count = images_seen + rows.start, len(rows)
        image_indices = self._image_indices(first, count)
        passes = torch.arange(first, first + count) // len(self.cache)
        beside = self.low_resolution(image_indices, passes).to(batch.noisy, non_blocking=True)
        return replace(batch, noisy=torch.cat([batch.noisy, beside], dim=1))

    def _captions(self, image_indices: Tensor, pick: Tensor, drop: Tensor) -> Tensor:
        if self.captions_given:
            return super()._captions(image_indices, pick, drop)
        return torch.full_like(image_indices, self.cache.null_caption)


class Dreambooth(TextToImage):
    """A subject's images, and by turns the untuned model's own of its class (arXiv 2208.12242, eq. 2).

    The first `num_subject` images of the cache are the subject's, the others the class's. Both kinds weigh as they would
    in a batch of each: twice their share of the mixed one.
    """

    def __init__(
        self,
        spec: TrainSpec,
        cache: Cache,
        schedule: NoiseSchedule,
        num_subject: int,
        prior_weight: float,
        *,
        tunes_text: bool = False,
    ) -> None:
        """`tunes_text`: the network (`UNetWithTextEncoder`) takes token ids in place of states."""
        super().__init__(spec, cache, schedule)
        self.tunes_text = tunes_text
        self.num_subject, self.num_prior, self.prior_weight = num_subject, len(cache) - num_subject, prior_weight

    def _image_indices(self, first: int, count: int) -> Tensor:
        if not self.num_prior:
            return shuffled_indices(self.spec.seed, first, count, self.num_subject)
        images = torch.arange(first, first + count)
        turns = images // 2
        start, stop = int(turns[0]), int(turns[-1]) + 1
        of_subject = shuffled_indices(self.spec.seed, start, stop - start, self.num_subject)[turns - start]
        of_class = shuffled_indices(self.spec.seed, start, stop - start, self.num_prior)[turns - start]
        return torch.where(images % 2 == 0, of_subject, self.num_subject + of_class)

    def _weights(self, image_indices: Tensor) -> Tensor | float:
        if not self.num_prior:
            return 1.0
        return torch.where(image_indices < self.num_subject, 2.0, 2.0 * self.prior_weight)

    def _states(self, captions: Tensor) -> Tensor:
        return self.cache.token_ids(captions) if self.tunes_text else super()._states(captions)


def training_schedule(spec: TrainSpec) -> NoiseSchedule:
    """The noise schedule that a training's prediction goes with: a straight flow, or Stable Diffusion's."""
    if spec.prediction_type == "flow_prediction":
        return NoiseSchedule.flow()
    return NoiseSchedule.scaled_linear(rescale_betas_zero_snr=spec.rescale_betas_zero_snr)


def training_key(seed: int) -> int:
    """The Philox key of a training, apart from those that images are sampled with."""
    return int.from_bytes(hashlib.sha256(f"training {seed}".encode()).digest()[:8], "little") >> 1


class SampleDraws(NamedTuple):
    """Four independent words in [0, 2^32) of each image, int64 [B]."""

    timestep: Tensor
    caption: Tensor
    dropout: Tensor
    guidance: Tensor


def choices(key: int, images: Tensor) -> SampleDraws:
    """The words of images int64 [B]."""
    counter = torch.stack([images & 0xFFFFFFFF, images >> 32, torch.full_like(images, CHOICES), torch.zeros_like(images)])
    words = philox4x32(counter, torch.tensor([[key & 0xFFFFFFFF], [key >> 32]]))
    return SampleDraws(*words)


def loss_weights(schedule: NoiseSchedule, spec: TrainSpec) -> np.ndarray:
    """Weight of the squared error at each timestep, float64 [timesteps]: 1, or min-SNR's (arXiv 2303.09556, sec. 3.4).

    With SNR = alpha^2 / sigma^2 and g = `min_snr_gamma` the weight of the clean latent's error is min(SNR, g); the error of
    epsilon is SNR times that of the clean latent, the error of v SNR + 1 times, that of a flow (sigma^-2) times.
    """
    snr = (schedule.alpha / schedule.sigma) ** 2
    if spec.min_snr_gamma is None:
        return np.ones_like(snr)
    scales = {"epsilon": snr, "v_prediction": snr + 1, "sample": np.ones_like(snr), "flow_prediction": 1 / schedule.sigma**2}
    scale = scales[spec.prediction_type]
    return np.minimum(snr, spec.min_snr_gamma) / scale
