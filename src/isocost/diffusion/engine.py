"""The row engine: every picture is a row with its own sampler, number of steps, guidance and caption.

Rows that differ in all of these share one network call and one fused update a tick, because a sampler is a table of numbers
(`samplers.py`) and noise belongs to the picture (`noise.py`). A finished row's slot is refilled at once. The host knows
every row's line in advance, so it decides with a few NumPy operations and never waits for the device within a tick.

Shape letters: B slots in use, G slots that take two passes, P = B + G passes of a network call, R rows placed or finished
at once, N lines of all tables, C H W latent, L D caption states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isocost.diffusion.noise import START_NOISE, normal_noise, x0_coefficients
from isocost.diffusion.samplers import SamplerTable
from isocost.errors import RequestError
from isocost.study import PredictionType

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [P, C, H, W] float32, timesteps [P], states [P, L, D]) -> raw network output [P, C, H, W]."""

CaptionStates = Callable[[Tensor], Tensor]
"""Caption indices int64 [R] on the CPU -> states [R, L, D] on any device."""

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False, slots=True)
class Row:
    """One picture to make.

    Attributes:
        picture_id: with `seed`, what all of the picture's noise is a function of.
        caption: index into the engine's caption states.
        table: shared between rows (`build_table` gives the same object for the same arguments).
        guidance: w in `uncond + w (cond - uncond)`; 1 takes the conditional pass alone, 0 the unconditional pass alone.
        tag: the caller's own (which point the row belongs to); handed back untouched.
        seed: int64.
    """

    picture_id: int
    caption: int
    table: SamplerTable
    guidance: float
    tag: object = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.guidance < math.inf:
            raise RequestError(f"guidance = {self.guidance}: give a finite number that is not negative")
        if not -(2**63) <= self.seed < 2**63:
            raise RequestError(f"seed = {self.seed}: give an integer of 64 bits")

    @property
    def num_passes(self) -> int:
        """Network passes an evaluation."""
        return 1 if self.guidance in (0, 1) else 2


@dataclass(frozen=True, eq=False, slots=True)
class FinishedRow:
    """A finished picture.

    Attributes:
        row: as it was given.
        latent: float32 [C, H, W] on the engine's device, made in inference mode.
        nfe: network evaluations spent, guidance's second pass counted.
        finite: false where the latent holds an infinity or a NaN.
    """

    row: Row
    latent: Tensor
    nfe: int
    finite: bool


class Engine:
    """Runs streams of rows through one network.

    Args:
        denoise: the network; its output's type is `prediction`.
        prediction: what the network predicts.
        caption_states: looks captions up.
        null_states: [L, D], the unconditional states; their dtype is the dtype of all states.
        latent_shape: (C, H, W).
        batch_size: rows that share a network call; with guidance a call has up to twice as many passes.
        device: where latents live and the network runs.
        precision: "bf16" runs the network under autocast; latents and updates are float32 always.

    Raises:
        RequestError: batch_size below 1 or an unknown prediction type.
    """

    def __init__(
        self,
        denoise: Denoise,
        prediction: PredictionType,
        caption_states: CaptionStates,
        null_states: Tensor,
        latent_shape: tuple[int, int, int],
        batch_size: int,
        device: torch.device | str = "cpu",
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        if batch_size < 1:
            raise RequestError(f"batch_size = {batch_size}: at least one row must fit")
        x0_coefficients(prediction, np.ones(1), np.ones(1))  # refuses an unknown type now, not at the first row
        self.denoise = denoise
        self.prediction = prediction
        self.caption_states = caption_states
        self.device = torch.device(device)
        self.null_states = null_states.to(self.device)
        self.latent_shape = latent_shape
        self.batch_size = batch_size
        self.precision = precision

    def run(self, rows: Iterable[Row]) -> Iterator[FinishedRow]:
        """Make the pictures of `rows` and yield them as they finish. Reads up to one batch ahead of the rows in flight."""
        stream = self._with_start_noise(iter(rows))
        slots = _Slots(self)
        vacant = np.arange(self.batch_size)
        while slots.refill(vacant, list(islice(stream, len(vacant)))):
            vacant = self._tick(slots)
            yield from slots.collect(vacant)

    def _with_start_noise(self, rows: Iterator[Row]) -> Iterator[tuple[Row, Tensor]]:
        # Drawn for a batch of rows at once: for one or two rows it would cost as much as the rest of a tick.
        while chunk := list(islice(rows, self.batch_size)):
            seeds = torch.tensor([row.seed for row in chunk])
            picture_ids = torch.tensor([row.picture_id for row in chunk])
            yield from zip(chunk, normal_noise(seeds, picture_ids, START_NOISE, self.latent_shape, self.device), strict=True)

    @torch.inference_mode()
    def _tick(self, slots: _Slots) -> Indices:
        """One network call and one update for every row; returns the slots whose rows have ended."""
        host, lines, num_rows, num_twice = slots.host, slots.lines, len(slots.rows), len(slots.twice)
        line = torch.from_numpy(host["line"]).to(self.device)
        x, timesteps = slots.x, lines.timesteps[line]
        if num_twice:
            x, timesteps = x[slots.pass_slots], timesteps[slots.pass_slots]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            output = self.denoise(x, timesteps, slots.states[: num_rows + num_twice]).float()
        if num_twice:
            output, unconditional = output[:num_rows], output[num_rows:]
            guided = unconditional + slots.guidance * (output[slots.twice] - unconditional)
            output = output.index_copy(0, slots.twice, guided)

        p, q, a, b, c, d, s = lines.coefficients[:, line].view(7, num_rows, 1, 1, 1)
        x0 = p * slots.x + q * output
        x = a * slots.x + b * x0 + c * slots.x0 + d * slots.x0_before
        noisy = np.flatnonzero(lines.is_noisy[host["line"]])
        if len(noisy):
            drawn = host[noisy]
            seeds, picture_ids = torch.from_numpy(drawn["seed"]), torch.from_numpy(drawn["picture_id"])
            evaluations = torch.from_numpy(drawn["line"] - drawn["first_line"] + 1 + START_NOISE)
            noise = normal_noise(seeds, picture_ids, evaluations, self.latent_shape, self.device)
            on_device = torch.from_numpy(noisy).to(self.device)
            x.index_add_(0, on_device, s[on_device] * noise)
        slots.x, slots.x0, slots.x0_before = x, x0, slots.x0
        host["line"] += 1
        host["nfe"] += host["num_passes"]
        return np.flatnonzero(host["line"] == host["end_line"])


class _Lines:
    """All tables of a stream laid end to end, float32 on the device: one gather serves every row.

    `coefficients` [6, N] holds p, q (`x0 = p x + q output`), a, b, c, s; `timesteps` [N]; `is_noisy` [N] on the host.
    """

    def __init__(self, prediction: PredictionType, device: torch.device) -> None:
        self.prediction = prediction
        self.first_lines: dict[SamplerTable, int] = {}
        self.coefficients = torch.empty(7, 0, device=device)
        self.timesteps = torch.empty(0, device=device)
        self.is_noisy = np.empty(0, dtype=bool)

    def first_line(self, table: SamplerTable) -> int:
        """Where the table's lines begin; a new table is laid behind the others."""
        if table not in self.first_lines:
            self.first_lines[table] = len(self.is_noisy)
            p, q = x0_coefficients(self.prediction, table.alpha, table.sigma)
            coefficients = torch.from_numpy(np.stack([p, q, table.a, table.b, table.c, table.d, table.s])).float()
            self.coefficients = torch.cat([self.coefficients, coefficients.to(self.coefficients.device)], dim=1)
            self.timesteps = torch.cat([self.timesteps, torch.tensor(table.timesteps, device=self.timesteps.device).float()])
            self.is_noisy = np.append(self.is_noisy, table.s != 0)
        return self.first_lines[table]


_INTEGERS = ("first_line", "line", "end_line", "num_passes", "nfe", "seed", "picture_id")
_HOST = np.dtype([*((name, np.int64) for name in _INTEGERS), ("guidance", np.float64)])


class _Slots:
    """The rows in flight. The record array `host` [B] says where each stands; device tensors hold what it computes.

    A network call sees every slot once, then the slots in `twice` [G] once more. `states` [>= B + G, L, D] is laid out for
    it: one state a slot, then null states only, so that a call's states are a slice.
    """

    def __init__(self, engine: Engine) -> None:
        num_slots = engine.batch_size
        self.device, self.null_states, self.caption_states = engine.device, engine.null_states, engine.caption_states
        self.lines = _Lines(engine.prediction, engine.device)
        self.rows = np.empty(num_slots, dtype=object)
        self.host = np.zeros(num_slots, _HOST)
        self.x = torch.zeros(num_slots, *engine.latent_shape, device=engine.device)
        self.x0, self.x0_before = torch.zeros_like(self.x), torch.zeros_like(self.x)
        self.states = self.null_states.repeat(2 * num_slots, 1, 1)

    def refill(self, vacant: Indices, fresh: list[tuple[Row, Tensor]]) -> int:
        """Put fresh rows (with their start noise) into vacant slots, drop the slots that none is left for; rows in flight."""
        if len(vacant):
            if fresh:
                self._place(vacant[: len(fresh)], fresh)
            if len(fresh) < len(vacant):
                self._drop(vacant[len(fresh) :])
            self._lay_out_passes()
        return len(self.rows)

    @torch.inference_mode()
    def collect(self, ended: Indices) -> list[FinishedRow]:
        """The rows of slots that have ended, with copies of their latents."""
        if not len(ended):
            return []
        latents = self.x[self._to_device(ended)]
        finite = latents.isfinite().flatten(1).all(dim=1).tolist()
        nfe = self.host["nfe"][ended].tolist()
        return [FinishedRow(*parts) for parts in zip(self.rows[ended], latents, nfe, finite, strict=True)]

    @torch.inference_mode()
    def _place(self, slots: Indices, fresh: list[tuple[Row, Tensor]]) -> None:
        for slot, (row, _) in zip(slots, fresh, strict=True):
            first, num_lines = self.lines.first_line(row.table), row.table.num_evaluations
            counts = (first, first, first + num_lines, row.num_passes, 0, row.seed, row.picture_id)
            self.rows[slot], self.host[slot] = row, (*counts, row.guidance)
        on_device = self._to_device(slots)
        self.x[on_device] = torch.stack([start for _, start in fresh])
        self.x0[on_device] = self.x0_before[on_device] = (
            0.0  # a first line's c is 0, but 0 times a former row's infinity is not
        )
        self.states[on_device] = self.null_states
        wanted = [(slot, row.caption) for slot, (row, _) in zip(slots, fresh, strict=True) if row.guidance != 0]
        if wanted:
            conditional, captions = torch.tensor(wanted).unbind(1)
            self.states[conditional.to(self.device)] = self.caption_states(captions).to(self.states)

    @torch.inference_mode()
    def _drop(self, slots: Indices) -> None:
        kept = np.setdiff1d(np.arange(len(self.rows)), slots)
        on_device = self._to_device(kept)
        self.rows, self.host = self.rows[kept], self.host[kept]
        self.x, self.x0, self.x0_before = self.x[on_device], self.x0[on_device], self.x0_before[on_device]
        self.states = torch.cat([self.states[on_device], self.null_states.expand(len(kept), -1, -1)])

    def _lay_out_passes(self) -> None:
        twice = np.flatnonzero(self.host["num_passes"] == 2)
        self.twice = self._to_device(twice)
        self.pass_slots = self._to_device(np.concatenate([np.arange(len(self.rows)), twice]))
        self.guidance = torch.from_numpy(self.host["guidance"][twice]).float().to(self.device).view(-1, 1, 1, 1)

    def _to_device(self, indices: Indices) -> Tensor:
        return torch.from_numpy(indices).to(self.device)
