"""The row engine: streams of rows through one network.

Rows that differ in solver, step count, guidance and caption share network calls of one fixed shape and one fused update a
tick, because a solver is a table of numbers (`solvers.py`) and noise belongs to the image (`noise.py`). A network call
has `batch_size` places, one a pass; a row takes one place, or two with guidance, and keeps them until it is finished, when
the next row gets them (`places.py`). Which positions an image may take is a matter of its id alone (`waiting.py`), and a
place that no row needs runs empty: shape and position never change, nor does an image its bits. On a CPU several calls of
that shape run at once, one a core (`lanes.py`): how many does not touch the images either.

Shape letters: P places of all lanes, C H W latent, L D states.
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
from isocost.sampling.request import Conditioning, PerSampleFn, PromptEmbeds, SampleRequest, SampleResult, num_passes
from isocost.sampling.request_queue import RequestQueue
from isocost.sampling.slots import BatchSlots, CoefficientBank

Denoise = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x [P, C + C', H, W] float32, timesteps [P] float32, states [P, L, D], guidance [P] float32) -> raw output [P, C, H, W].

`guidance` is for networks that embed it; others leave it."""


_READ_AHEAD = 16
"""How many times the places' number of rows may wait for a place that is theirs or for an evaluation that they share."""


class Engine:
    """Runs streams of rows through one network.

    Args:
        denoise: the network; its output's type is `prediction`.
        prediction: what the network predicts.
        prompt_embeds: looks captions up.
        null_prompt_embeds: [L, D], the unconditional states; their dtype is the dtype of all states. None for a network without.
        latent_shape: (C, H, W).
        batch_size: places of a network call.
        device: where latents live and the network runs.
        num_parallel_calls: network calls that run at once; the images do not depend on it.
        embeds_guidance: the network takes w itself (guidance-distilled students): one pass at any w.
        beside: for networks of further input channels: image ids int64 [R] on the CPU -> latents [R, C', H, W] that stand
            beside the noisy one (super-resolution's low-resolution image).
        starts: image ids -> start noise [R, C, H, W], in place of that of (seed, image id).
        cache_bytes: memory for outputs of first evaluations, which later rows of the same image take over; 0 shares none.

    Raises:
        ConfigError: batch_size below 1 or an unknown prediction type.
    """

    def __init__(
        self,
        denoise: Denoise,
        prediction_type: PredictionType,
        prompt_embeds: PromptEmbeds,
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
            raise ConfigError(f"batch_size = {batch_size}: a network call needs at least one place")
        x0_coefficients(prediction_type, np.ones(1), np.ones(1))  # refuses an unknown type now, not at the first row
        self.denoise = denoise
        self.prediction_type = prediction_type
        self.device = torch.device(device)
        self.conditions = Conditioning(prompt_embeds, null_prompt_embeds, embeds_guidance)
        self.latent_shape = latent_shape
        self.batch_size = batch_size
        # One row with guidance needs two places; two calls of one place each are a bucket of one.
        self.lanes = CallPool(max(num_parallel_calls, 2) if batch_size == 1 else num_parallel_calls, batch_size, self.device)
        self.cache_bytes = cache_bytes
        self.concat_cond, self.initial_noise = concat_cond, initial_noise

    def run(self, rows: Iterable[SampleRequest]) -> Iterator[SampleResult]:
        """Make the images of `rows` and yield them as they finish. Reads a few batches ahead of the rows in flight.

        Raises:
            ConfigError: a row asks for guidance or no caption, and the network has no null caption.
            RunError: a network call of one place runs out of memory.
        """
        lines = CoefficientBank(self.prediction_type, self.device)
        shared = FirstStepCache(self.cache_bytes)
        num_places, call_size = self.lanes.num_places, self.lanes.call_size
        places = BatchSlots(
            num_places, self.latent_shape, lines, self.conditions, shared, self.batch_size, call_size, self.concat_cond
        )
        most_waiting = _READ_AHEAD * num_places
        waiting = RequestQueue(
            iter(rows), self.conditions, self.latent_shape, self.batch_size, most_waiting, self.device, self.initial_noise
        )
        while True:
            yield from places.refill(waiting)
            if not places.num_busy:
                return
            yield from self._tick(places)

    def passes(self, row: SampleRequest) -> int:
        """Network passes an evaluation of the row."""
        return num_passes(row.guidance, self.conditions.embeds_guidance)

    @torch.inference_mode()
    def _tick(self, places: BatchSlots) -> list[SampleResult]:
        """One network call a lane and one update for every row; returns the rows that have ended."""
        source = places.to_device(places.primary)
        timesteps = places.lines.timesteps[places.to_device(places.current_steps[places.primary])]
        arguments = (places.network_input(source), timesteps, places.states, places.guidance[source])
        output = self.lanes.run(self.denoise, arguments, places.primary_busy).float()
        places.call_size = self.lanes.call_size
        places.cache_first_evaluations(output)
        busy = np.flatnonzero(places.host["busy"])
        places.host["computed"][busy] += places.host["num_passes"][busy]
        places.advance(None, output, output[places.to_device(places.host["secondary"])])
        return places.collect(busy)
