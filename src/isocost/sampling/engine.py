"""The row engine: streams of rows through one network.

Rows that differ in sampler, step count, guidance and caption share network calls of one fixed shape and one fused update a
tick, because a sampler is a table of numbers (`samplers.py`) and noise belongs to the picture (`noise.py`). A network call
has `bucket_size` places, one a pass; a row takes one place, or two with guidance, and keeps them until it is finished, when
the next row gets them (`places.py`). Which positions a picture may take is a matter of its id alone (`waiting.py`), and a
place that no row needs runs empty: shape and position never change, nor does a picture its bits. On a CPU several calls of
that shape run at once, one a core (`lanes.py`): how many does not touch the pictures either.

Shape letters: P places of all lanes, C H W latent, L D states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from isocost.config.types import PredictionType
from isocost.diffusion.noise_schedule import x0_coefficients
from isocost.errors import RequestError
from isocost.sampling.call_pool import Lanes
from isocost.sampling.first_step_cache import FirstEvaluations
from isocost.sampling.request import ByPicture, CaptionStates, Conditions, FinishedRow, Row, num_passes
from isocost.sampling.request_queue import Waiting
from isocost.sampling.slots import Lines, Places

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
        caption_states: looks captions up.
        null_states: [L, D], the unconditional states; their dtype is the dtype of all states. None for a network without.
        latent_shape: (C, H, W).
        bucket_size: places of a network call.
        device: where latents live and the network runs.
        num_lanes: network calls that run at once; the pictures do not depend on it.
        embeds_guidance: the network takes w itself (guidance-distilled students): one pass at any w.
        beside: for networks of further input channels: picture ids int64 [R] on the CPU -> latents [R, C', H, W] that stand
            beside the noisy one (super-resolution's low-resolution picture).
        starts: picture ids -> start noise [R, C, H, W], in place of that of (seed, picture id).
        share_bytes: memory for outputs of first evaluations, which later rows of the same picture take over; 0 shares none.

    Raises:
        RequestError: bucket_size below 1 or an unknown prediction type.
    """

    def __init__(
        self,
        denoise: Denoise,
        prediction: PredictionType,
        caption_states: CaptionStates,
        null_states: Tensor | None,
        latent_shape: tuple[int, int, int],
        bucket_size: int,
        device: torch.device | str = "cpu",
        *,
        num_lanes: int = 1,
        embeds_guidance: bool = False,
        beside: ByPicture | None = None,
        starts: ByPicture | None = None,
        share_bytes: int = 0,
    ) -> None:
        if bucket_size < 1:
            raise RequestError(f"bucket_size = {bucket_size}: a network call needs at least one place")
        x0_coefficients(prediction, np.ones(1), np.ones(1))  # refuses an unknown type now, not at the first row
        self.denoise = denoise
        self.prediction = prediction
        self.device = torch.device(device)
        self.conditions = Conditions(caption_states, null_states, embeds_guidance)
        self.latent_shape = latent_shape
        self.bucket_size = bucket_size
        # One row with guidance needs two places; two calls of one place each are a bucket of one.
        self.lanes = Lanes(max(num_lanes, 2) if bucket_size == 1 else num_lanes, bucket_size, self.device)
        self.share_bytes = share_bytes
        self.beside, self.starts = beside, starts

    def run(self, rows: Iterable[Row]) -> Iterator[FinishedRow]:
        """Make the pictures of `rows` and yield them as they finish. Reads a few batches ahead of the rows in flight.

        Raises:
            RequestError: a row asks for guidance or no caption, and the network has no null caption.
            WorkError: a network call of one place runs out of memory.
        """
        lines = Lines(self.prediction, self.device)
        shared = FirstEvaluations(self.share_bytes)
        num_places, call_size = self.lanes.num_places, self.lanes.call_size
        places = Places(num_places, self.latent_shape, lines, self.conditions, shared, self.bucket_size, call_size, self.beside)
        most_waiting = _READ_AHEAD * num_places
        waiting = Waiting(
            iter(rows), self.conditions, self.latent_shape, self.bucket_size, most_waiting, self.device, self.starts
        )
        while True:
            yield from places.refill(waiting)
            if not places.num_busy:
                return
            yield from self._tick(places)

    def passes(self, row: Row) -> int:
        """Network passes an evaluation of the row."""
        return num_passes(row.guidance, self.conditions.embeds_guidance)

    @torch.inference_mode()
    def _tick(self, places: Places) -> list[FinishedRow]:
        """One network call a lane and one update for every row; returns the rows that have ended."""
        source = places.to_device(places.primary)
        timesteps = places.lines.timesteps[places.to_device(places.lines_now[places.primary])]
        arguments = (places.network_input(source), timesteps, places.states, places.guidance[source])
        output = self.lanes.run(self.denoise, arguments, places.primary_busy).float()
        places.call_size = self.lanes.call_size
        places.keep_first_evaluations(output)
        busy = np.flatnonzero(places.host["busy"])
        places.host["computed"][busy] += places.host["num_passes"][busy]
        places.advance(None, output, output[places.to_device(places.host["secondary"])])
        return places.collect(busy)
