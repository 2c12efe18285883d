"""The slots of the network calls and the requests in them.

Shape letters: P slots of all parallel calls, R requests assigned or finished at once, N steps of all solvers, C H W latent, L D
prompt embeddings.
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
    """The coefficients of all solvers of a stream, concatenated: one gather serves every request.

    A step is one row of `SolverCoefficients`, that is one evaluation (Heun needs two per solver step). Step 0 belongs to no
    solver: it maps an empty slot to zero.

    Attributes:
        coefficients: float32 [7, N] on the device: p, q (`x0 = p x + q output`), a, b, c, d, s.
        timesteps: float32 [N] on the device.
        is_noisy: bool [N] on the host, whether the step adds noise.
    """

    def __init__(self, prediction_type: PredictionType, device: torch.device) -> None:
        self.prediction_type = prediction_type
        self.first_steps: dict[SolverCoefficients, int] = {}
        self.coefficients = torch.zeros(7, 1, device=device)
        self.timesteps = torch.zeros(1, device=device)
        self.is_noisy = np.zeros(1, dtype=bool)

    def first_step(self, solver: SolverCoefficients) -> int:
        """Index of the solver's first step; new coefficients are appended."""
        if solver not in self.first_steps:
            p, q = x0_coefficients(self.prediction_type, solver.alpha, solver.sigma)
            self.first_steps[solver] = len(self.is_noisy)
            coefficients = torch.from_numpy(np.stack([p, q, solver.a, solver.b, solver.c, solver.d, solver.s])).float()
            self.coefficients = torch.cat([self.coefficients, coefficients.to(self.coefficients.device)], dim=1)
            timesteps = torch.from_numpy(solver.timesteps.copy()).float()
            self.timesteps = torch.cat([self.timesteps, timesteps.to(self.timesteps.device)])
            self.is_noisy = np.append(self.is_noisy, solver.s != 0)
        return self.first_steps[solver]


_SLOT_INTEGERS = (
    *("first_step", "step", "end_step", "num_passes", "secondary"),
    *("nfe", "nfe_executed", "batch_size", "seed", "sample_index"),
)
SLOT_DTYPE = np.dtype([*((name, np.int64) for name in _SLOT_INTEGERS), ("busy", bool)])


class BatchSlots:
    """The slots of all parallel calls and the requests in them.

    The first slot of a request is its primary slot. It holds the latent and the request's record. With guidance, a secondary
    slot runs the unconditional pass on the same latent.

    Args:
        num_slots: P.
        latent_shape: (C, H, W).
        bank: the coefficients of all solvers.
        conditioning: prompt embeddings and passes.
        first_step_cache: shared first evaluations; a capacity of 0 shares none.
        batch_size: slots of a call.
        call_size: slots of a call that fit into memory; the engine lowers it when memory runs out.
        concat_cond: sample indices -> latents [R, C', H, W] that are concatenated to the noisy latents.

    Attributes:
        records: `SLOT_DTYPE` [P] on the host.
        requests: SampleRequest or None [P], by primary slot.
        primary: int [P], the primary slot of each slot.
        vacant: free slots at each position of a call.
        x, x0_prev, x0_prev2: [P, C, H, W], the latent and the last two predictions of the clean latent.
        concat_cond: [P, C', H, W], by primary slot.
        prompt_embeds: [P, L, D].
    """

    def __init__(
        self,
        num_slots: int,
        latent_shape: tuple[int, int, int],
        bank: CoefficientBank,
        conditioning: Conditioning,
        first_step_cache: FirstStepCache,
        batch_size: int,
        call_size: int,
        concat_cond: PerSampleFn | None = None,
    ) -> None:
        self.latent_shape, self.bank, self.conditioning = latent_shape, bank, conditioning
        self.first_step_cache, self.call_size = first_step_cache, call_size
        self.device = bank.timesteps.device
        self.requests = np.empty(num_slots, dtype=object)
        self.records = np.zeros(num_slots, SLOT_DTYPE)
        self.records["secondary"] = self.primary = np.arange(num_slots)
        self.vacant = [list(range(position, num_slots, batch_size))[::-1] for position in range(batch_size)]
        self.x = torch.zeros(num_slots, *latent_shape, device=self.device)
        self.x0_prev, self.x0_prev2 = torch.zeros_like(self.x), torch.zeros_like(self.x)
        self.guidance = torch.ones(num_slots, device=self.device)
        self._concat_cond_fn = concat_cond
        shape = (0, *latent_shape[1:]) if concat_cond is None else concat_cond(torch.zeros(1, dtype=torch.int64)).shape[1:]
        self.concat_cond = torch.zeros(num_slots, *shape, device=self.device)
        self.prompt_embeds = conditioning.example_embeds.to(self.device).repeat(num_slots, 1, 1)

    @property
    def num_busy(self) -> int:
        """Number of requests in the slots."""
        return int(self.records["busy"].sum())

    @property
    def current_steps(self) -> Indices:
        """[P], the next step of each primary slot; 0, the empty step, elsewhere."""
        return np.where(self.records["busy"], self.records["step"], 0)

    @property
    def primary_busy(self) -> NDArray[np.bool_]:
        """[P], whether each slot, primary or secondary, works for a request."""
        return self.records["busy"][self.primary]

    def refill(self, queue: RequestQueue) -> Iterator[SampleResult]:
        """Fill vacant slots; yield requests that a cached first evaluation finishes at once."""
        while fresh := self._choose(queue):
            slots = self._assign(fresh)
            if self.first_step_cache.capacity:
                yield from self._reuse_first_step(slots)

    def _choose(self, queue: RequestQueue) -> list[QueuedRequest]:
        """The next requests that fit. A request waits while its first evaluation is being computed for another one."""
        num_free = [len(slots) for slots in self.vacant]
        if not self.first_step_cache.capacity:
            return list(queue.pop_fitting(num_free, lambda _: True))
        pending = {key for slot in np.flatnonzero(self._at_first_step()) for key in self._keys(self.requests[slot])}

        def may_start(queued: QueuedRequest) -> bool:
            keys = self._keys(queued.request)
            return self.first_step_cache.has(keys) or pending.isdisjoint(keys)

        chosen = []
        for queued in queue.pop_fitting(num_free, may_start):
            pending.update(self._keys(queued.request))
            chosen.append(queued)
        return chosen

    @torch.inference_mode()
    def _assign(self, fresh: list[QueuedRequest]) -> Indices:
        """Put each request into one or two vacant slots; return the primary slots."""
        primary = []
        slot_prompts: list[tuple[int, int | None]] = []
        for queued in fresh:
            request = queued.request
            slots = [self.vacant[position].pop() for position in queued.positions]
            slot, secondary = slots[0], slots[-1]
            first = self.bank.first_step(request.coefficients)
            end = first + request.coefficients.num_function_evaluations
            counts = (len(slots), secondary, 0, 0, self.call_size)
            self.records[slot] = (first, first, end, *counts, request.seed, request.sample_index, True)
            self.requests[slot] = request
            self.primary[secondary] = self.primary[slot] = slot
            slot_prompts.extend((index, item.prompt) for index, item in zip(slots, queued.passes, strict=True))
            primary.append(slot)
        indices = np.array(primary)
        on_device = self.to_device(indices)
        self.x[on_device] = torch.stack([queued.initial_noise for queued in fresh])
        # c and d are 0 at the first step, but 0 times an infinity that an earlier request left here is NaN.
        self.x0_prev[on_device] = self.x0_prev2[on_device] = 0.0
        weights = [float(self.conditioning.guidance_weight(queued.request)) for queued in fresh]
        self.guidance[on_device] = torch.tensor(weights, device=self.device)
        if self._concat_cond_fn is not None:
            sample_indices = torch.tensor([queued.request.sample_index for queued in fresh])
            self.concat_cond[on_device] = self._concat_cond_fn(sample_indices).to(self.concat_cond)
        for slots, embeds in self.conditioning.embeds_for(slot_prompts):
            self.prompt_embeds[torch.tensor(slots, device=self.device)] = embeds.to(self.prompt_embeds)
        return indices

    def network_input(self, primary: Tensor) -> Tensor:
        """Latents of the slots `primary` [P], followed by their `concat_cond` as further channels: [P, C + C', H, W]."""
        x = self.x[primary]
        return x if self._concat_cond_fn is None else torch.cat([x, self.concat_cond[primary]], dim=1)

    # --- shared first evaluations ---

    def _keys(self, request: SampleRequest) -> tuple[Key, ...]:
        return self.first_step_cache.keys(request, self.conditioning)

    def _at_first_step(self) -> NDArray[np.bool_]:
        return self.records["busy"] & (self.records["step"] == self.records["first_step"])

    @torch.inference_mode()
    def _reuse_first_step(self, slots: Indices) -> list[SampleResult]:
        """Advance the requests whose first evaluation is cached; return those that this finishes."""
        cached = [slot for slot in slots if self.first_step_cache.has(self._keys(self.requests[slot]))]
        if not cached:
            return []
        outputs = [self.first_step_cache.get(self._keys(self.requests[slot])) for slot in cached]
        indices = np.array(cached)
        self.advance(indices, *(torch.stack([pair[i] for pair in outputs]) for i in (0, -1)))
        return self.pop_finished(indices)

    def cache_first_evaluations(self, output: Tensor) -> None:
        """Store the outputs [P, C, H, W] of requests at their first step."""
        if self.first_step_cache.capacity:
            for slot in np.flatnonzero(self._at_first_step()):
                outputs = (output[slot], output[self.records["secondary"][slot]])
                self.first_step_cache.put(self._keys(self.requests[slot]), outputs)

    # --- the update ---

    @torch.inference_mode()
    def advance(self, slots: Indices | None, output: Tensor, unconditional: Tensor) -> None:
        """Apply the solver's update.

        Args:
            slots: primary slots; None updates every slot.
            output: raw network outputs [R, C, H, W]: the conditional ones, or the only ones.
            unconditional: raw outputs [R, C, H, W] of the secondary slots; equal to `output` where a request has one pass.
        """
        indices = np.arange(len(self.records)) if slots is None else slots
        records = self.records[indices]
        on_device = None if slots is None else self.to_device(slots)
        x, x0_prev, x0_prev2, guidance = (
            values if on_device is None else values[on_device]
            for values in (self.x, self.x0_prev, self.x0_prev2, self.guidance)
        )
        if not self.conditioning.embeds_guidance:
            output = unconditional + guidance.view(-1, 1, 1, 1) * (output - unconditional)
        steps = self.current_steps[indices]
        steps_on_device = self.to_device(steps)
        p, q, a, b, c, d, s = self.bank.coefficients[:, steps_on_device].view(7, len(steps_on_device), 1, 1, 1)
        x0 = p * x + q * output
        x = a * x + b * x0 + c * x0_prev + d * x0_prev2
        noisy = np.flatnonzero(self.bank.is_noisy[steps])
        if len(noisy):
            noisy_records = records[noisy]
            seeds = torch.from_numpy(noisy_records["seed"].copy())
            sample_indices = torch.from_numpy(noisy_records["sample_index"].copy())
            evaluations = torch.from_numpy(noisy_records["step"] - noisy_records["first_step"] + 1 + INITIAL_NOISE)
            noise = philox_normal(seeds, sample_indices, evaluations, self.latent_shape, self.device)
            rows = self.to_device(noisy)
            x.index_add_(0, rows, s[rows] * noise)
        if on_device is None:
            self.x, self.x0_prev, self.x0_prev2 = x, x0, self.x0_prev
        else:
            self.x[on_device], self.x0_prev[on_device], self.x0_prev2[on_device] = x, x0, x0_prev
        busy = indices[records["busy"]]
        self.records["step"][busy] += 1
        self.records["nfe"][busy] += self.records["num_passes"][busy]
        self.records["batch_size"][busy] = np.minimum(self.records["batch_size"][busy], self.call_size)

    @torch.inference_mode()
    def pop_finished(self, slots: Indices) -> list[SampleResult]:
        """Remove finished requests from these primary slots; return them with copies of their latents."""
        ended = slots[self.records["step"][slots] == self.records["end_step"][slots]]
        if not len(ended):
            return []
        latents = self.x[self.to_device(ended)]
        finite = latents.isfinite().flatten(1).all(dim=1).tolist()
        results = []
        for slot, latent, is_finite in zip(ended.tolist(), latents, finite, strict=True):
            record, request = self.records[slot], self.requests[slot]
            counts = (int(record["nfe"]), int(record["nfe_executed"]))
            results.append(SampleResult(request, latent, *counts, is_finite, int(record["batch_size"])))
            for freed in sorted({slot, int(record["secondary"])}, reverse=True):
                self.primary[freed] = self.records["secondary"][freed] = freed
                self.vacant[freed % len(self.vacant)].append(freed)
            self.requests[slot] = None
            self.records["busy"][slot] = False
        self.x[self.to_device(ended)] = 0.0
        return results

    def to_device(self, indices: Indices) -> Tensor:
        """Host indices as an index tensor on the device."""
        return torch.from_numpy(np.ascontiguousarray(indices)).to(self.device)
