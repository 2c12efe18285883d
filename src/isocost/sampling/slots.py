"""The places of network calls, and the rows that stand in them.

Shape letters: P places of all lanes, R rows placed or finished at once, N lines of all tables, C H W latent, L D states.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isocost.config.types import PredictionType
from isocost.diffusion.noise_schedule import x0_coefficients
from isocost.diffusion.philox import INITIAL_NOISE, philox_normal
from isocost.diffusion.solvers import SolverCoefficients
from isocost.sampling.first_step_cache import FirstStepCache, Key
from isocost.sampling.request import Conditioning, PerSampleFn, SampleRequest, SampleResult
from isocost.sampling.request_queue import QueuedRequest, RequestQueue

Indices = NDArray[np.int64]


class CoefficientBank:
    """All tables of a stream laid end to end, float32 on the device: one gather serves every row.

    `coefficients` [7, N] holds p, q (`x0 = p x + q output`), a, b, c, d, s; `timesteps` [N]; `is_noisy` [N] on the host.
    Line 0 belongs to no table: it leads an empty place to zero.
    """

    def __init__(self, prediction_type: PredictionType, device: torch.device) -> None:
        self.prediction_type = prediction_type
        self.first_lines: dict[SolverCoefficients, int] = {}
        self.coefficients = torch.zeros(7, 1, device=device)
        self.timesteps = torch.zeros(1, device=device)
        self.is_noisy = np.zeros(1, dtype=bool)

    def first_step(self, table: SolverCoefficients) -> int:
        """Where the table's lines begin; a new table is laid behind the others."""
        if table not in self.first_lines:
            p, q = x0_coefficients(self.prediction_type, table.alpha, table.sigma)
            self.first_lines[table] = len(self.is_noisy)
            coefficients = torch.from_numpy(np.stack([p, q, table.a, table.b, table.c, table.d, table.s])).float()
            self.coefficients = torch.cat([self.coefficients, coefficients.to(self.coefficients.device)], dim=1)
            timesteps = torch.from_numpy(table.timesteps.copy()).float()
            self.timesteps = torch.cat([self.timesteps, timesteps.to(self.timesteps.device)])
            self.is_noisy = np.append(self.is_noisy, table.s != 0)
        return self.first_lines[table]


_SLOT_INDEX_FIELDS = (
    *("first_step", "line", "end_line", "num_passes", "secondary"),
    *("nfe", "computed", "batch_size", "seed", "sample_index"),
)
SLOT_DTYPE = np.dtype([*((name, np.int64) for name in _SLOT_INDEX_FIELDS), ("busy", bool)])


class BatchSlots:
    """The places of all lanes and the rows in them.

    A row's first place is its primary one: there stand its latent and what the host knows of it, record by record in `host`
    [P]. With guidance a second place makes the unconditional pass from the same latent; `primary` [P] names each place's
    primary one. `states` [P, L, D] are what each place's pass is conditioned on, `beside` [P, C', H, W] what stands beside the
    latent of a primary place.
    """

    def __init__(
        self,
        num_places: int,
        latent_shape: tuple[int, int, int],
        lines: CoefficientBank,
        conditions: Conditioning,
        shared: FirstStepCache,
        batch_size: int,
        call_size: int,
        concat_cond: PerSampleFn | None = None,
    ) -> None:
        self.latent_shape, self.lines, self.conditions, self.shared = latent_shape, lines, conditions, shared
        self.device, self.call_size = lines.timesteps.device, call_size
        self.rows = np.empty(num_places, dtype=object)
        self.host = np.zeros(num_places, SLOT_DTYPE)
        self.host["secondary"] = self.primary = np.arange(num_places)
        self.vacant = [list(range(slot_position, num_places, batch_size))[::-1] for slot_position in range(batch_size)]
        self.x = torch.zeros(num_places, *latent_shape, device=self.device)
        self.x0, self.x0_prev = torch.zeros_like(self.x), torch.zeros_like(self.x)
        self.guidance = torch.ones(num_places, device=self.device)
        self._concat_cond_of = concat_cond
        shape = (0, *latent_shape[1:]) if concat_cond is None else concat_cond(torch.zeros(1, dtype=torch.int64)).shape[1:]
        self.concat_cond = torch.zeros(num_places, *shape, device=self.device)
        self.states = conditions.example_embeds.to(self.device).repeat(num_places, 1, 1)

    @property
    def num_busy(self) -> int:
        """Rows in flight."""
        return int(self.host["busy"].sum())

    @property
    def current_steps(self) -> Indices:
        """The line each primary place stands at; the empty line elsewhere."""
        return np.where(self.host["busy"], self.host["line"], 0)

    @property
    def primary_busy(self) -> NDArray[np.bool_]:
        """Whether each place works for a row."""
        return self.host["busy"][self.primary]

    def refill(self, waiting: RequestQueue) -> Iterator[SampleResult]:
        """Put rows into vacant places; yields the rows whose only evaluation was shared."""
        while fresh := self._choose(waiting):
            placed = self._place(fresh)
            if self.shared.capacity:
                yield from self._reuse_first_step(placed)

    def _choose(self, waiting: RequestQueue) -> list[QueuedRequest]:
        """The next rows that fit the vacant places. A row whose first evaluation is being computed for another waits."""
        vacant = [len(places) for places in self.vacant]
        if not self.shared.capacity:
            return list(waiting.take(vacant, lambda _: True))
        pending = {key for place in np.flatnonzero(self._at_first_step()) for key in self._keys(self.rows[place])}

        def may_start(one: QueuedRequest) -> bool:
            keys = self._keys(one.row)
            return self.shared.has(keys) or pending.isdisjoint(keys)

        chosen = []
        for one in waiting.take(vacant, may_start):
            pending.update(self._keys(one.row))
            chosen.append(one)
        return chosen

    @torch.inference_mode()
    def _place(self, fresh: list[QueuedRequest]) -> Indices:
        """Put each row into one or two vacant places; returns the primary ones."""
        placed = []
        wanted: list[tuple[int, int | None]] = []  # place, caption or None for the empty one
        for one in fresh:
            row = one.row
            standing = [self.vacant[slot_position].pop() for slot_position in one.positions]
            place, secondary = standing[0], standing[-1]
            first = self.lines.first_step(row.table)
            end = first + row.table.num_function_evaluations
            self.host[place] = (
                first,
                first,
                end,
                len(standing),
                secondary,
                0,
                0,
                self.call_size,
                row.seed,
                row.sample_index,
                True,
            )
            self.rows[place] = row
            self.primary[secondary] = self.primary[place] = place
            wanted.extend((stand, each.prompt) for stand, each in zip(standing, one.passes, strict=True))
            placed.append(place)
        primary = np.array(placed)
        on_device = self.to_device(primary)
        self.x[on_device] = torch.stack([one.start for one in fresh])
        # A first line's c and d are 0, but 0 times a former row's infinity is not.
        self.x0[on_device] = self.x0_prev[on_device] = 0.0
        weights = [float(self.conditions.weight(one.row)) for one in fresh]
        self.guidance[on_device] = torch.tensor(weights, device=self.device)
        if self._concat_cond_of is not None:
            self.concat_cond[on_device] = self._concat_cond_of(torch.tensor([one.row.sample_index for one in fresh])).to(
                self.concat_cond
            )
        self._write_prompt_embeds(wanted)
        return primary

    def network_input(self, source: Tensor) -> Tensor:
        """Latents of the primary places `source` [P], and behind them what stands beside each: [P, C + C', H, W]."""
        x = self.x[source]
        return x if self._concat_cond_of is None else torch.cat([x, self.concat_cond[source]], dim=1)

    def _write_prompt_embeds(self, wanted: list[tuple[int, int | None]]) -> None:
        for places, states in self.conditions.states(wanted):
            self.states[torch.tensor(places, device=self.device)] = states.to(self.states)

    # --- shared first evaluations ---

    def _keys(self, row: SampleRequest) -> tuple[Key, ...]:
        return self.shared.keys(row, self.conditions)

    def _at_first_step(self) -> NDArray[np.bool_]:
        return self.host["busy"] & (self.host["line"] == self.host["first_step"])

    @torch.inference_mode()
    def _reuse_first_step(self, placed: Indices) -> list[SampleResult]:
        """Advance the rows whose first evaluation is there already; returns those that it finishes."""
        known = [place for place in placed if self.shared.has(self._keys(self.rows[place]))]
        if not known:
            return []
        outputs = [self.shared.get(self._keys(self.rows[place])) for place in known]
        at = np.array(known)
        self.advance(at, *(torch.stack([pair[i] for pair in outputs]) for i in (0, -1)))
        return self.collect(at)

    def cache_first_evaluations(self, output: Tensor) -> None:
        """Remember the outputs of rows that stand at their first line."""
        if self.shared.capacity:
            for place in np.flatnonzero(self._at_first_step()):
                both = (output[place], output[self.host["secondary"][place]])
                self.shared.keep(self._keys(self.rows[place]), both)

    # --- the update ---

    @torch.inference_mode()
    def advance(self, at: Indices | None, output: Tensor, unconditional: Tensor) -> None:
        """The update of the rows at these primary places (None: of every place) from their raw outputs [R, C, H, W]."""
        everywhere = np.arange(len(self.host)) if at is None else at
        host = self.host[everywhere]
        on_device = None if at is None else self.to_device(at)
        x, x0_previous, x0_prev, guidance = (
            values if on_device is None else values[on_device] for values in (self.x, self.x0, self.x0_prev, self.guidance)
        )
        if not self.conditions.embeds_guidance:
            output = unconditional + guidance.view(-1, 1, 1, 1) * (output - unconditional)
        line_now = self.current_steps[everywhere]
        line = self.to_device(line_now)
        p, q, a, b, c, d, s = self.lines.coefficients[:, line].view(7, len(line), 1, 1, 1)
        x0 = p * x + q * output
        x = a * x + b * x0 + c * x0_previous + d * x0_prev
        noisy = np.flatnonzero(self.lines.is_noisy[line_now])
        if len(noisy):
            drawn = host[noisy]
            seeds, sample_indices = torch.from_numpy(drawn["seed"].copy()), torch.from_numpy(drawn["sample_index"].copy())
            evaluations = torch.from_numpy(drawn["line"] - drawn["first_step"] + 1 + INITIAL_NOISE)
            noise = philox_normal(seeds, sample_indices, evaluations, self.latent_shape, self.device)
            rows = self.to_device(noisy)
            x.index_add_(0, rows, s[rows] * noise)
        if on_device is None:
            self.x, self.x0, self.x0_prev = x, x0, self.x0
        else:
            self.x[on_device], self.x0[on_device], self.x0_prev[on_device] = x, x0, x0_previous
        moved = everywhere[host["busy"]]
        self.host["line"][moved] += 1
        self.host["nfe"][moved] += self.host["num_passes"][moved]
        self.host["batch_size"][moved] = np.minimum(self.host["batch_size"][moved], self.call_size)

    @torch.inference_mode()
    def collect(self, at: Indices) -> list[SampleResult]:
        """Take the rows that have ended out of these primary places, with copies of their latents."""
        ended = at[self.host["line"][at] == self.host["end_line"][at]]
        if not len(ended):
            return []
        latents = self.x[self.to_device(ended)]
        finite = latents.isfinite().flatten(1).all(dim=1).tolist()
        finished = []
        for place, latent, is_finite in zip(ended.tolist(), latents, finite, strict=True):
            record, row = self.host[place], self.rows[place]
            counts = (int(record["nfe"]), int(record["computed"]))
            finished.append(SampleResult(row, latent, *counts, is_finite, int(record["batch_size"])))
            for freed in sorted({place, int(record["secondary"])}, reverse=True):
                self.primary[freed] = self.host["secondary"][freed] = freed
                self.vacant[freed % len(self.vacant)].append(freed)
            self.rows[place] = None
            self.host["busy"][place] = False
        self.x[self.to_device(ended)] = 0.0
        return finished

    def to_device(self, indices: Indices) -> Tensor:
        """Host integers as an index tensor."""
        return torch.from_numpy(np.ascontiguousarray(indices)).to(self.device)
