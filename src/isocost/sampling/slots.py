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
from isocost.diffusion.philox import START_NOISE, normal_noise
from isocost.diffusion.solvers import SamplerTable
from isocost.sampling.first_step_cache import FirstEvaluations, Key
from isocost.sampling.request import ByPicture, Conditions, FinishedRow, Row
from isocost.sampling.request_queue import Waiting, WaitingRow

Indices = NDArray[np.int64]


class Lines:
    """All tables of a stream laid end to end, float32 on the device: one gather serves every row.

    `coefficients` [7, N] holds p, q (`x0 = p x + q output`), a, b, c, d, s; `timesteps` [N]; `is_noisy` [N] on the host.
    Line 0 belongs to no table: it leads an empty place to zero.
    """

    def __init__(self, prediction: PredictionType, device: torch.device) -> None:
        self.prediction = prediction
        self.first_lines: dict[SamplerTable, int] = {}
        self.coefficients = torch.zeros(7, 1, device=device)
        self.timesteps = torch.zeros(1, device=device)
        self.is_noisy = np.zeros(1, dtype=bool)

    def first_line(self, table: SamplerTable) -> int:
        """Where the table's lines begin; a new table is laid behind the others."""
        if table not in self.first_lines:
            p, q = x0_coefficients(self.prediction, table.alpha, table.sigma)
            self.first_lines[table] = len(self.is_noisy)
            coefficients = torch.from_numpy(np.stack([p, q, table.a, table.b, table.c, table.d, table.s])).float()
            self.coefficients = torch.cat([self.coefficients, coefficients.to(self.coefficients.device)], dim=1)
            timesteps = torch.from_numpy(table.timesteps.copy()).float()
            self.timesteps = torch.cat([self.timesteps, timesteps.to(self.timesteps.device)])
            self.is_noisy = np.append(self.is_noisy, table.s != 0)
        return self.first_lines[table]


_INTEGERS = (
    *("first_line", "line", "end_line", "num_passes", "secondary"),
    *("nfe", "computed", "bucket_size", "seed", "picture_id"),
)
_HOST = np.dtype([*((name, np.int64) for name in _INTEGERS), ("busy", bool)])


class Places:
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
        lines: Lines,
        conditions: Conditions,
        shared: FirstEvaluations,
        bucket_size: int,
        call_size: int,
        beside: ByPicture | None = None,
    ) -> None:
        self.latent_shape, self.lines, self.conditions, self.shared = latent_shape, lines, conditions, shared
        self.device, self.call_size = lines.timesteps.device, call_size
        self.rows = np.empty(num_places, dtype=object)
        self.host = np.zeros(num_places, _HOST)
        self.host["secondary"] = self.primary = np.arange(num_places)
        self.vacant = [list(range(position, num_places, bucket_size))[::-1] for position in range(bucket_size)]
        self.x = torch.zeros(num_places, *latent_shape, device=self.device)
        self.x0, self.x0_before = torch.zeros_like(self.x), torch.zeros_like(self.x)
        self.guidance = torch.ones(num_places, device=self.device)
        self._beside_of = beside
        shape = (0, *latent_shape[1:]) if beside is None else beside(torch.zeros(1, dtype=torch.int64)).shape[1:]
        self.beside = torch.zeros(num_places, *shape, device=self.device)
        self.states = conditions.any_states.to(self.device).repeat(num_places, 1, 1)

    @property
    def num_busy(self) -> int:
        """Rows in flight."""
        return int(self.host["busy"].sum())

    @property
    def lines_now(self) -> Indices:
        """The line each primary place stands at; the empty line elsewhere."""
        return np.where(self.host["busy"], self.host["line"], 0)

    @property
    def primary_busy(self) -> NDArray[np.bool_]:
        """Whether each place works for a row."""
        return self.host["busy"][self.primary]

    def refill(self, waiting: Waiting) -> Iterator[FinishedRow]:
        """Put rows into vacant places; yields the rows whose only evaluation was shared."""
        while fresh := self._choose(waiting):
            placed = self._place(fresh)
            if self.shared.capacity:
                yield from self._take_over(placed)

    def _choose(self, waiting: Waiting) -> list[WaitingRow]:
        """The next rows that fit the vacant places. A row whose first evaluation is being computed for another waits."""
        vacant = [len(places) for places in self.vacant]
        if not self.shared.capacity:
            return list(waiting.take(vacant, lambda _: True))
        pending = {key for place in np.flatnonzero(self._at_first_line()) for key in self._keys(self.rows[place])}

        def may_start(one: WaitingRow) -> bool:
            keys = self._keys(one.row)
            return self.shared.has(keys) or pending.isdisjoint(keys)

        chosen = []
        for one in waiting.take(vacant, may_start):
            pending.update(self._keys(one.row))
            chosen.append(one)
        return chosen

    @torch.inference_mode()
    def _place(self, fresh: list[WaitingRow]) -> Indices:
        """Put each row into one or two vacant places; returns the primary ones."""
        placed = []
        wanted: list[tuple[int, int | None]] = []  # place, caption or None for the empty one
        for one in fresh:
            row = one.row
            standing = [self.vacant[position].pop() for position in one.positions]
            place, secondary = standing[0], standing[-1]
            first = self.lines.first_line(row.table)
            end = first + row.table.num_evaluations
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
                row.picture_id,
                True,
            )
            self.rows[place] = row
            self.primary[secondary] = self.primary[place] = place
            wanted.extend((stand, each.caption) for stand, each in zip(standing, one.passes, strict=True))
            placed.append(place)
        primary = np.array(placed)
        on_device = self.to_device(primary)
        self.x[on_device] = torch.stack([one.start for one in fresh])
        # A first line's c and d are 0, but 0 times a former row's infinity is not.
        self.x0[on_device] = self.x0_before[on_device] = 0.0
        weights = [float(self.conditions.weight(one.row)) for one in fresh]
        self.guidance[on_device] = torch.tensor(weights, device=self.device)
        if self._beside_of is not None:
            self.beside[on_device] = self._beside_of(torch.tensor([one.row.picture_id for one in fresh])).to(self.beside)
        self._condition(wanted)
        return primary

    def network_input(self, source: Tensor) -> Tensor:
        """Latents of the primary places `source` [P], and behind them what stands beside each: [P, C + C', H, W]."""
        x = self.x[source]
        return x if self._beside_of is None else torch.cat([x, self.beside[source]], dim=1)

    def _condition(self, wanted: list[tuple[int, int | None]]) -> None:
        for places, states in self.conditions.states(wanted):
            self.states[torch.tensor(places, device=self.device)] = states.to(self.states)

    # --- shared first evaluations ---

    def _keys(self, row: Row) -> tuple[Key, ...]:
        return self.shared.keys(row, self.conditions)

    def _at_first_line(self) -> NDArray[np.bool_]:
        return self.host["busy"] & (self.host["line"] == self.host["first_line"])

    @torch.inference_mode()
    def _take_over(self, placed: Indices) -> list[FinishedRow]:
        """Advance the rows whose first evaluation is there already; returns those that it finishes."""
        known = [place for place in placed if self.shared.has(self._keys(self.rows[place]))]
        if not known:
            return []
        outputs = [self.shared.get(self._keys(self.rows[place])) for place in known]
        at = np.array(known)
        self.advance(at, *(torch.stack([pair[i] for pair in outputs]) for i in (0, -1)))
        return self.collect(at)

    def keep_first_evaluations(self, output: Tensor) -> None:
        """Remember the outputs of rows that stand at their first line."""
        if self.shared.capacity:
            for place in np.flatnonzero(self._at_first_line()):
                both = (output[place], output[self.host["secondary"][place]])
                self.shared.keep(self._keys(self.rows[place]), both)

    # --- the update ---

    @torch.inference_mode()
    def advance(self, at: Indices | None, output: Tensor, unconditional: Tensor) -> None:
        """The update of the rows at these primary places (None: of every place) from their raw outputs [R, C, H, W]."""
        everywhere = np.arange(len(self.host)) if at is None else at
        host = self.host[everywhere]
        on_device = None if at is None else self.to_device(at)
        x, x0_previous, x0_before, guidance = (
            values if on_device is None else values[on_device] for values in (self.x, self.x0, self.x0_before, self.guidance)
        )
        if not self.conditions.embeds_guidance:
            output = unconditional + guidance.view(-1, 1, 1, 1) * (output - unconditional)
        line_now = self.lines_now[everywhere]
        line = self.to_device(line_now)
        p, q, a, b, c, d, s = self.lines.coefficients[:, line].view(7, len(line), 1, 1, 1)
        x0 = p * x + q * output
        x = a * x + b * x0 + c * x0_previous + d * x0_before
        noisy = np.flatnonzero(self.lines.is_noisy[line_now])
        if len(noisy):
            drawn = host[noisy]
            seeds, picture_ids = torch.from_numpy(drawn["seed"].copy()), torch.from_numpy(drawn["picture_id"].copy())
            evaluations = torch.from_numpy(drawn["line"] - drawn["first_line"] + 1 + START_NOISE)
            noise = normal_noise(seeds, picture_ids, evaluations, self.latent_shape, self.device)
            rows = self.to_device(noisy)
            x.index_add_(0, rows, s[rows] * noise)
        if on_device is None:
            self.x, self.x0, self.x0_before = x, x0, self.x0
        else:
            self.x[on_device], self.x0[on_device], self.x0_before[on_device] = x, x0, x0_previous
        moved = everywhere[host["busy"]]
        self.host["line"][moved] += 1
        self.host["nfe"][moved] += self.host["num_passes"][moved]
        self.host["bucket_size"][moved] = np.minimum(self.host["bucket_size"][moved], self.call_size)

    @torch.inference_mode()
    def collect(self, at: Indices) -> list[FinishedRow]:
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
            finished.append(FinishedRow(row, latent, *counts, is_finite, int(record["bucket_size"])))
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
