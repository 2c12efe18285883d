"""The sampling engine: it runs a stream of requests through one network, and through guide networks where requests name one.

Requests that differ in solver, number of steps, guidance and prompt share network calls of one fixed shape and one update per
tick, because a solver is a table of coefficients (`diffusion/solvers.py`) and noise belongs to the sample
(`diffusion/philox.py`). A network call has `batch_size` slots, one per pass. A step of a request takes one slot, or two with
guidance; a step outside its guidance interval gives the second one back (`slots.py`). A guide has calls of its own. The
position of a pass in its call is a function of the sample index (`request_queue.py`), and a vacant slot runs empty. The shape
and the position therefore never change, and neither do the bits of an image. On a CPU several calls of this shape run in
parallel, one per core (`call_pool.py`); their number does not change the images either.

Shape letters: P slots of all parallel calls, R requests, C H W latent, L D prompt embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from isocost.config.types import PredictionType
from isocost.diffusion.noise_schedule import x0_coefficients
from isocost.errors import ConfigError
from isocost.sampling.call_pool import CallPool
from isocost.sampling.first_step_cache import FirstStepCache
from isocost.sampling.request import (
    Conditioning,
    Denoise,
    PerSampleFn,
    PromptEmbedsFn,
    SampleRequest,
    SampleResult,
)
from isocost.sampling.request_queue import RequestQueue
from isocost.sampling.slots import CoefficientBank, NetworkSlots, RequestStates

_MAX_WAITING_PER_SLOT = 16
"""Requests per slot that may wait for their position or for a shared first evaluation."""


@dataclass(frozen=True)
class GuideNetwork:
    """A second network for guidance, of the same latent space and noise schedule as the main one.

    Attributes:
        denoise: the network.
        prediction_type: type of its output; it may differ from that of the main network.
        prompt_embeds: prompt indices of the main network -> prompt embeddings of the guide.
        null_prompt_embeds: [L, D], its embeddings of the empty prompt.
    """

    denoise: Denoise
    prediction_type: PredictionType
    prompt_embeds: PromptEmbedsFn
    null_prompt_embeds: Tensor | None


class Engine:
    """Runs streams of requests through one network and its guides.

    Args:
        denoise: the network.
        prediction_type: type of the network's output.
        prompt_embeds: prompt indices -> prompt embeddings.
        null_prompt_embeds: [L, D], the embeddings of the empty prompt. Their dtype is the dtype of all embeddings. None for a
            network without an empty prompt.
        latent_shape: (C, H, W).
        batch_size: slots of a network call.
        device: of the latents and the network.
        num_parallel_calls: network calls that run at the same time. The images do not depend on it.
        embeds_guidance: the network takes w as an input (guidance-distilled students), so one pass is enough at any w.
        concat_cond: for networks with extra input channels: sample indices int64 [R] on the CPU -> latents [R, C', H, W] that
            are concatenated to the noisy latents (the low-resolution image in super-resolution).
        initial_noise: sample indices -> initial noise [R, C, H, W]; by default it is drawn from (seed, sample index).
        cache_bytes: memory for outputs of first evaluations, which later requests for the same image reuse; 0 disables it.
        guides: networks that requests can name as their guide.
        skips_empty_slots: leave out the empty slots of a call. One caller then waits less for a step without guidance, but an
            image is rounded differently depending on the other images of its calls.

    Raises:
        ConfigError: batch_size is below 1, or the prediction type is unknown.
    """

    def __init__(
        self,
        denoise: Denoise,
        prediction_type: PredictionType,
        prompt_embeds: PromptEmbedsFn,
        null_prompt_embeds: Tensor | None,
        latent_shape: tuple[int, int, int],
        batch_size: int,
        device: torch.device | str = "cpu",
        *,
        num_parallel_calls: int = 1,
        embeds_guidance: bool = False,
        concat_cond: PerSampleFn | None = None,
        initial_noise: PerSampleFn | None = None,
        cache_bytes: int = 0,
        guides: Mapping[str, GuideNetwork] | None = None,
        skips_empty_slots: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size = {batch_size}: a network call needs at least one slot")
        x0_coefficients(prediction_type, np.ones(1), np.ones(1))  # rejects an unknown type now, not at the first request
        self.denoise = denoise
        self.prediction_type = prediction_type
        self.device = torch.device(device)
        self.conditioning = Conditioning(prompt_embeds, null_prompt_embeds, embeds_guidance)
        self.latent_shape = latent_shape
        self.batch_size = batch_size
        # A step with guidance needs two slots. With a batch size of 1 they are in two calls of one slot each.
        num_calls = max(num_parallel_calls, 2) if batch_size == 1 else num_parallel_calls
        self.call_pool = CallPool(num_calls, batch_size, self.device, skips_empty_slots)
        self.guides: dict[str, GuideNetwork] = {}
        self.guide_call_pools: dict[str, CallPool] = {}
        for name, guide in (guides or {}).items():
            self.add_guide(name, guide)
        self.cache_bytes = cache_bytes
        self.concat_cond, self.initial_noise = concat_cond, initial_noise

    def add_guide(self, name: str, guide: GuideNetwork) -> None:
        """Add a network that later requests can name as their guide."""
        self.guides[name] = guide
        self.guide_call_pools[name] = CallPool(
            self.call_pool.num_calls, self.batch_size, self.device, self.call_pool.skips_empty_slots
        )

    def run(self, requests: Iterable[SampleRequest]) -> Iterator[SampleResult]:
        """Generate the images and yield them as they finish. The stream is read a few batches ahead.

        Raises:
            ConfigError: a request needs the empty prompt (for guidance, or as its prompt), and the network has none.
            RunError: a network call of one slot runs out of memory.
        """
        main = self._slots(self.denoise, self.prediction_type, self.conditioning, self.call_pool)
        guides = {
            name: self._slots(
                guide.denoise,
                guide.prediction_type,
                Conditioning(guide.prompt_embeds, guide.null_prompt_embeds),
                self.guide_call_pools[name],
            )
            for name, guide in self.guides.items()
        }
        bank, cache = CoefficientBank(self.prediction_type, self.device), FirstStepCache(self.cache_bytes)
        states = RequestStates(self.latent_shape, bank, main, guides, cache, self.concat_cond)
        queue = RequestQueue(
            iter(requests),
            self.conditioning,
            {name: slots.conditioning for name, slots in guides.items()},
            self.latent_shape,
            self.batch_size,
            _MAX_WAITING_PER_SLOT * self.num_slots,
            self.device,
            self.initial_noise,
        )
        while True:
            yield from states.refill(queue)
            if not states.num_busy:
                return
            yield from states.tick()

    def _slots(
        self, denoise: Denoise, prediction_type: PredictionType, conditioning: Conditioning, call_pool: CallPool
    ) -> NetworkSlots:
        return NetworkSlots(denoise, prediction_type, conditioning, call_pool, self.batch_size, self.device)

    @property
    def num_slots(self) -> int:
        """Network passes of one evaluation, in all calls that run in parallel."""
        return self.call_pool.num_slots
