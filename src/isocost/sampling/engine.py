"""The sampling engine: it runs a stream of requests through one network.

Requests that differ in solver, number of steps, guidance and prompt share network calls of one fixed shape and one update per
tick, because a solver is a table of coefficients (`diffusion/solvers.py`) and noise belongs to the sample
(`diffusion/philox.py`). A network call has `batch_size` slots, one per pass. A request takes one slot, or two with guidance.
When it is finished, its slots go to the next request (`slots.py`). The position of a pass in its call is a function of the
sample index (`request_queue.py`), and a vacant slot runs empty. The shape and the position therefore never change, and neither
do the bits of an image. On a CPU several calls of this shape run in parallel, one per core (`call_pool.py`); their number does
not change the images either.

Shape letters: P slots of all parallel calls, R requests, C H W latent, L D prompt embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

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
    PerSampleFn,
    PromptEmbedsFn,
    SampleRequest,
    SampleResult,
    passes_per_evaluation,
)
from isocost.sampling.request_queue import RequestQueue
from isocost.sampling.slots import BatchSlots, CoefficientBank

Denoise = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x [P, C + C', H, W] float32, timesteps [P] float32, prompt_embeds [P, L, D], guidance [P] float32) -> output [P, C, H, W].

The output is the network's raw output. `guidance` is for networks that embed it; others ignore it."""


_MAX_WAITING_PER_SLOT = 16
"""Requests per slot that may wait for their position or for a shared first evaluation."""


class Engine:
    """Runs streams of requests through one network.

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
        # A request with guidance needs two slots. With a batch size of 1 they are in two calls of one slot each.
        num_calls = max(num_parallel_calls, 2) if batch_size == 1 else num_parallel_calls
        self.call_pool = CallPool(num_calls, batch_size, self.device)
        self.cache_bytes = cache_bytes
        self.concat_cond, self.initial_noise = concat_cond, initial_noise

    def run(self, requests: Iterable[SampleRequest]) -> Iterator[SampleResult]:
        """Generate the images and yield them as they finish. The stream is read a few batches ahead.

        Raises:
            ConfigError: a request needs the empty prompt (for guidance, or as its prompt), and the network has none.
            RunError: a network call of one slot runs out of memory.
        """
        bank = CoefficientBank(self.prediction_type, self.device)
        cache = FirstStepCache(self.cache_bytes)
        num_slots, call_size = self.call_pool.num_slots, self.call_pool.call_size
        slots = BatchSlots(
            num_slots, self.latent_shape, bank, self.conditioning, cache, self.batch_size, call_size, self.concat_cond
        )
        queue = RequestQueue(
            iter(requests),
            self.conditioning,
            self.latent_shape,
            self.batch_size,
            _MAX_WAITING_PER_SLOT * num_slots,
            self.device,
            self.initial_noise,
        )
        while True:
            yield from slots.refill(queue)
            if not slots.num_busy:
                return
            yield from self._tick(slots)

    @property
    def num_slots(self) -> int:
        """Network passes of one evaluation, in all calls that run in parallel."""
        return self.call_pool.num_slots

    def passes_per_evaluation(self, request: SampleRequest) -> int:
        """Network passes per evaluation of the request."""
        return passes_per_evaluation(request.guidance, self.conditioning.embeds_guidance)

    @torch.inference_mode()
    def _tick(self, slots: BatchSlots) -> list[SampleResult]:
        """Run one network call per member of the pool and one update for all requests; return the finished ones."""
        primary = slots.to_device(slots.primary)
        timesteps = slots.bank.timesteps[slots.to_device(slots.current_steps[slots.primary])]
        arguments = (slots.network_input(primary), timesteps, slots.prompt_embeds, slots.guidance[primary])
        output = self.call_pool.run(self.denoise, arguments, slots.primary_busy).float()
        slots.call_size = self.call_pool.call_size
        slots.cache_first_evaluations(output)
        busy = np.flatnonzero(slots.records["busy"])
        slots.records["nfe_executed"][busy] += slots.records["num_passes"][busy]
        slots.advance(None, output, output[slots.to_device(slots.records["secondary"])])
        return slots.pop_finished(busy)
