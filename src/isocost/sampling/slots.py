"""The requests that are being denoised, and the slots of the network calls in which their passes run.

A request keeps its state (latent and last predictions) from start to end. Slots are given anew before each tick: a step with
guidance takes two slots, a step without it one. The oldest request comes first, so it is never blocked by a younger one. A pass
keeps its slot from tick to tick where possible, because new prompt embeddings must be copied into another slot.

Shape letters: P slots of all parallel calls of one network, S states, R requests that advance at once, N steps of all solvers,
C H W latent, L D prompt embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isocost.config.types import PredictionType
from isocost.diffusion.noise_schedule import x0_coefficients
from isocost.diffusion.philox import INITIAL_NOISE, philox_normal
from isocost.diffusion.solvers import SolverCoefficients
from isocost.sampling.call_pool import CallPool
from isocost.sampling.first_step_cache import FirstStepCache, Key
from isocost.sampling.request import (
    Conditioning,
    ConditioningPass,
    Denoise,
    PerSampleFn,
    SampleRequest,
    SampleResult,
)
from isocost.sampling.request_queue import FreeSlots, QueuedRequest, RequestQueue, slot_position

Indices = NDArray[np.int64]
CACHED = -1
"""In place of a slot: the output of the pass is in the cache of first evaluations."""
STATES_PER_SLOT = 2
"""Requests that may be under way per slot of the main network; those beyond one per slot wait for a slot."""


class CoefficientBank:
    """The coefficients of all solvers of a stream with their guidance, concatenated: one gather serves every request.

    A step is one row of `SolverCoefficients`, that is one evaluation (Heun needs two per solver step). Step 0 belongs to no
    solver; empty slots have it.

    Attributes:
        coefficients: float32 [10, N] on the device: p, q (`x0 = p x + q output`), a, b, c, d, s, w, and p, q of the network
            that runs the second pass.
        timesteps: float32 [N] on the device.
        weights: [N] on the host, w of each step.
        is_noisy: bool [N] on the host, whether the step adds noise.
    """

    def __init__(self, prediction_type: PredictionType, device: torch.device) -> None:
        self.prediction_type = prediction_type
        self.first_steps: dict[tuple[SolverCoefficients, tuple[float, ...], PredictionType], int] = {}
        self.coefficients = torch.zeros(10, 1, device=device)
        self.coefficients[7] = 1.0
        self.timesteps = torch.zeros(1, device=device)
        self.weights: list[float] = [1.0]
        self.is_noisy = np.zeros(1, dtype=bool)

    def first_step(self, request: SampleRequest, second_prediction: PredictionType) -> int:
        """Index of the request's first step; new coefficients are appended."""
        solver, weights = request.coefficients, request.weights
        key = (solver, weights, second_prediction)
        if key not in self.first_steps:
            main = x0_coefficients(self.prediction_type, solver.alpha, solver.sigma)
            second = x0_coefficients(second_prediction, solver.alpha, solver.sigma)
            self.first_steps[key] = len(self.is_noisy)
            rows = np.stack([*main, solver.a, solver.b, solver.c, solver.d, solver.s, np.array(weights), *second])
            coefficients = torch.from_numpy(rows).float()
            self.coefficients = torch.cat([self.coefficients, coefficients.to(self.coefficients.device)], dim=1)
            timesteps = torch.from_numpy(solver.timesteps.copy()).float()
            self.timesteps = torch.cat([self.timesteps, timesteps.to(self.timesteps.device)])
            self.weights.extend(weights)
            self.is_noisy = np.append(self.is_noisy, solver.s != 0)
        return self.first_steps[key]


@dataclass(eq=False)
class NetworkSlots:
    """The slots of one network.

    Attributes:
        denoise: the network.
        prediction_type: type of its output.
        conditioning: its prompt embeddings.
        call_pool: its parallel calls.
        batch_size: slots of a call.
        states: int [P], the state whose pass runs in each slot at this tick; -1 is empty.
        prompt_embeds: [P, L, D].
    """

    denoise: Denoise
    prediction_type: PredictionType
    conditioning: Conditioning
    call_pool: CallPool
    batch_size: int
    device: torch.device

    def __post_init__(self) -> None:
        num_slots = self.call_pool.num_slots
        self.states: Indices = np.full(num_slots, -1)
        self.prompt_embeds = self.conditioning.example_embeds.to(self.device).repeat(num_slots, 1, 1)
        self._pass_of_slot: list[_PassKey | None] = [None] * num_slots
        self._slot_of_pass: dict[_PassKey, int] = {}
        self._free: list[list[int]] = []
        self._new: list[tuple[int, int | None]] = []
        self.clear(set())

    def clear(self, kept: set[_PassKey]) -> None:
        """Free all slots. A later `take` of one of the `kept` passes gets the slot in which it ran before, if it is free."""
        for key in [key for key in self._slot_of_pass if key not in kept]:
            self._pass_of_slot[self._slot_of_pass.pop(key)] = None
        num_slots = self.call_pool.num_slots
        self.states = np.full(num_slots, -1)
        self._free = [list(range(position, num_slots, self.batch_size)) for position in range(self.batch_size)]

    def num_free(self) -> list[int]:
        """Number of free slots at each position."""
        return [len(slots) for slots in self._free]

    def has_free(self, position: int, number: int = 1) -> bool:
        return len(self._free[position]) >= number

    def take(self, key: _PassKey, position: int, state: int, prompt: int | None) -> int:
        """Give a slot at `position` to a pass; `has_free` was true."""
        free = self._free[position]
        slot = self._slot_of_pass.get(key)
        if slot is None or slot not in free:
            slot = next((slot for slot in free if self._pass_of_slot[slot] is None), free[0])
            if (evicted := self._pass_of_slot[slot]) is not None:
                del self._slot_of_pass[evicted]
            if key in self._slot_of_pass:
                self._pass_of_slot[self._slot_of_pass[key]] = None
            self._pass_of_slot[slot], self._slot_of_pass[key] = key, slot
            self._new.append((slot, prompt))
        free.remove(slot)
        self.states[slot] = state
        return slot

    def copy_prompt_embeds(self) -> None:
        """Copy the embeddings of passes that got another slot."""
        latest = dict(self._new)
        self._new.clear()
        for slots, embeds in self.conditioning.embeds_for(list(latest.items())):
            self.prompt_embeds[torch.tensor(slots, device=self.device)] = embeds.to(self.prompt_embeds)


_PassKey = tuple[int, ConditioningPass]
"""Arrival index of a request, and one of its passes."""

_STATE_INTEGERS = ("first_step", "step", "end_step", "nfe", "guide_nfe", "nfe_executed", "batch_size", "seed", "sample_index")
STATE_DTYPE = np.dtype([*((name, np.int64) for name in _STATE_INTEGERS), ("busy", bool)])


@dataclass
class _Tick:
    """The passes of one tick.

    Attributes:
        states: int [R], the states that advance.
        passes: the passes of each.
        slots: their slots; -1 for a pass whose output is in the cache of first evaluations.
    """

    states: list[int]
    passes: list[tuple[ConditioningPass, ...]]
    slots: list[tuple[int, ...]]


class RequestStates:
    """The requests under way.

    Args:
        latent_shape: (C, H, W).
        bank: the coefficients of all solvers.
        main: slots of the main network.
        guides: slots of the guides by name.
        first_step_cache: shared first evaluations; a capacity of 0 shares none.
        concat_cond: sample indices -> latents [R, C', H, W] that are concatenated to the noisy latents.

    Attributes:
        records: `STATE_DTYPE` [S] on the host.
        requests: SampleRequest or None [S].
        x, x0_prev, x0_prev2: [S + 1, C, H, W], the latent and the last two predictions of the clean latent. The last row is
            that of empty slots: zero.
        concat_cond: [S + 1, C', H, W].
    """

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        bank: CoefficientBank,
        main: NetworkSlots,
        guides: Mapping[str, NetworkSlots],
        first_step_cache: FirstStepCache,
        concat_cond: PerSampleFn | None = None,
    ) -> None:
        self.latent_shape, self.bank, self.first_step_cache = latent_shape, bank, first_step_cache
        self.main = main
        self.networks: dict[str | None, NetworkSlots] = {None: main}
        self.networks.update(guides)
        self.device = bank.timesteps.device
        num_states = STATES_PER_SLOT * main.call_pool.num_slots
        self.requests = np.empty(num_states, dtype=object)
        self.arrivals = np.zeros(num_states, np.int64)
        self.records = np.zeros(num_states, STATE_DTYPE)
        self.x = torch.zeros(num_states + 1, *latent_shape, device=self.device)
        self.x0_prev, self.x0_prev2 = torch.zeros_like(self.x), torch.zeros_like(self.x)
        self._concat_cond_fn = concat_cond
        shape = (0, *latent_shape[1:]) if concat_cond is None else concat_cond(torch.zeros(1, dtype=torch.int64)).shape[1:]
        self.concat_cond = torch.zeros(num_states + 1, *shape, device=self.device)
        self._tick = _Tick([], [], [])

    @property
    def num_busy(self) -> int:
        """Number of requests under way."""
        return int(self.records["busy"].sum())

    def refill(self, queue: RequestQueue) -> Iterator[SampleResult]:
        """Give the slots to the passes of this tick and start requests in free ones.

        Yields requests that a cached first evaluation finishes at once.
        """
        self._give_slots()
        while started := self._start(self._choose(queue)):
            if self.first_step_cache.capacity:
                yield from self._reuse_first_step(started)
            self._give_slots()
        for network in self.networks.values():
            network.copy_prompt_embeds()

    def _passes(self, state: int) -> tuple[ConditioningPass, ...]:
        """The passes of the next evaluation of a state."""
        return self.main.conditioning.passes(self.requests[state], self.bank.weights[self.records["step"][state]])

    def _give_slots(self) -> None:
        """Give slots to the passes of all states, the oldest request first; a state whose passes do not fit waits."""
        busy = np.flatnonzero(self.records["busy"])
        ordered = busy[np.argsort(self.arrivals[busy])].tolist()
        passes_of = {state: self._passes(state) for state in ordered}
        cached = {state: self._cached_passes(state, passes) for state, passes in passes_of.items()}
        needed: dict[str | None, set[_PassKey]] = {guide: set() for guide in self.networks}
        for state, passes in passes_of.items():
            for item in passes:
                if item not in cached[state]:
                    needed[item.guide].add((int(self.arrivals[state]), item))
        for guide, network in self.networks.items():
            network.clear(needed[guide])
        self._tick = _Tick([], [], [])
        for state, passes in passes_of.items():
            request: SampleRequest = self.requests[state]
            positions = {
                item: (self.networks[item.guide], slot_position(request, item, self.main.batch_size))
                for item in passes
                if item not in cached[state]
            }
            taken = list(positions.values())
            if all(network.has_free(position, taken.count((network, position))) for network, position in taken):
                arrival, slots = int(self.arrivals[state]), []
                for item in passes:
                    if item in positions:
                        network, position = positions[item]
                        slots.append(network.take((arrival, item), position, state, item.prompt))
                    else:
                        slots.append(CACHED)
                self._tick.states.append(state)
                self._tick.passes.append(passes)
                self._tick.slots.append(tuple(slots))

    def _choose(self, queue: RequestQueue) -> list[QueuedRequest]:
        """The next requests that fit. A request waits while its first evaluation is being computed for another one."""
        num_free: FreeSlots = {guide: network.num_free() for guide, network in self.networks.items()}
        num_states = len(self.records) - self.num_busy
        chosen: list[QueuedRequest] = []
        shares = self.first_step_cache.capacity > 0
        at_first_step = np.flatnonzero(self._at_first_step()) if shares else ()
        pending = {
            key for state in at_first_step for key in self._keys(self.requests[state]) if not self.first_step_cache.has((key,))
        }

        def may_start(queued: QueuedRequest) -> bool:
            if len(chosen) >= num_states:
                return False
            return not shares or pending.isdisjoint(self._keys(queued.request))

        for queued in queue.pop_fitting(num_free, may_start):
            if shares:
                pending.update(key for key in self._keys(queued.request) if not self.first_step_cache.has((key,)))
            chosen.append(queued)
        return chosen

    @torch.inference_mode()
    def _start(self, fresh: list[QueuedRequest]) -> list[int]:
        """Give each request a state; return the states."""
        if not fresh:
            return []
        states = np.flatnonzero(~self.records["busy"])[: len(fresh)].tolist()
        for state, queued in zip(states, fresh, strict=True):
            request = queued.request
            second = self.networks[request.guide].prediction_type
            first = self.bank.first_step(request, second)
            end = first + request.coefficients.num_function_evaluations
            self.records[state] = (first, first, end, 0, 0, 0, self._call_size(), request.seed, request.sample_index, True)
            self.requests[state] = request
            self.arrivals[state] = queued.arrival_index
        on_device = self.to_device(np.array(states))
        self.x[on_device] = torch.stack([queued.initial_noise for queued in fresh])
        # c and d are 0 at the first step, but 0 times an infinity that an earlier request left here is NaN.
        self.x0_prev[on_device] = self.x0_prev2[on_device] = 0.0
        if self._concat_cond_fn is not None:
            sample_indices = torch.tensor([queued.request.sample_index for queued in fresh])
            self.concat_cond[on_device] = self._concat_cond_fn(sample_indices).to(self.concat_cond)
        return states

    def _call_size(self) -> int:
        """Slots of a call that fit into memory, the smallest number of all networks."""
        return min(network.call_pool.call_size for network in self.networks.values())

    # --- shared first evaluations ---

    def _keys(self, request: SampleRequest) -> tuple[Key, ...]:
        return self.first_step_cache.keys(request, self.main.conditioning)

    def _at_first_step(self) -> NDArray[np.bool_]:
        return self.records["busy"] & (self.records["step"] == self.records["first_step"])

    def _cached_passes(self, state: int, passes: tuple[ConditioningPass, ...]) -> set[ConditioningPass]:
        """The passes of a first evaluation whose output another request has computed."""
        if not self.first_step_cache.capacity or self.records["step"][state] != self.records["first_step"][state]:
            return set()
        keys = self._keys(self.requests[state])
        return {item for item, key in zip(passes, keys, strict=True) if self.first_step_cache.has((key,))}

    @torch.inference_mode()
    def _reuse_first_step(self, states: list[int]) -> list[SampleResult]:
        """Advance the requests whose first evaluation is cached; return those that this finishes."""
        cached = [state for state in states if self.first_step_cache.has(self._keys(self.requests[state]))]
        if not cached:
            return []
        outputs = [self.first_step_cache.get(self._keys(self.requests[state])) for state in cached]
        first, second = (torch.stack([pair[i] for pair in outputs]) for i in (0, -1))
        self._advance(np.array(cached), [self._passes(state) for state in cached], first, second)
        return self._pop_finished(np.array(cached))

    # --- one tick ---

    @torch.inference_mode()
    def tick(self) -> list[SampleResult]:
        """Run the passes that have slots, advance their requests, and return the finished ones."""
        tick = self._tick
        states = np.array(tick.states)
        outputs = {guide: self._run(network) for guide, network in self.networks.items() if (network.states >= 0).any()}
        first = self._gather(outputs, 0, torch.zeros(len(states), *self.latent_shape, device=self.device))
        second = self._gather(outputs, 1, first.clone())
        if self.first_step_cache.capacity:
            at_first_step = self._at_first_step()
            for row, state in enumerate(tick.states):
                if at_first_step[state]:
                    self.first_step_cache.put(self._keys(self.requests[state]), (first[row], second[row]))
        for state, slots in zip(tick.states, tick.slots, strict=True):
            self.records["nfe_executed"][state] += sum(slot != CACHED for slot in slots)
        self._advance(states, tick.passes, first, second)
        return self._pop_finished(states)

    def _gather(self, outputs: Mapping[str | None, Tensor], which: int, target: Tensor) -> Tensor:
        """Write raw outputs of the first or the second passes into `target` [R, C, H, W], where there is such a pass."""
        rows_of: dict[str | None, list[tuple[int, int]]] = {}
        for row, (passes, slots) in enumerate(zip(self._tick.passes, self._tick.slots, strict=True)):
            if which >= len(passes):
                continue
            if slots[which] == CACHED:
                keys = self._keys(self.requests[self._tick.states[row]])
                target[row] = self.first_step_cache.get(keys[which : which + 1])[0]
            else:
                rows_of.setdefault(passes[which].guide, []).append((row, slots[which]))
        for guide, rows in rows_of.items():
            indices = self.to_device(np.array(rows).T)
            target[indices[0]] = outputs[guide][indices[1]]
        return target

    def _run(self, network: NetworkSlots) -> Tensor:
        """One call per member of a network's pool, with empty slots: raw outputs float32 [P, C, H, W]."""
        is_busy = network.states >= 0
        states = np.where(is_busy, network.states, len(self.records))
        steps = np.append(self.records["step"], 0)[states]
        states_on_device, steps_on_device = self.to_device(states), self.to_device(steps)
        x = self.x[states_on_device]
        if self._concat_cond_fn is not None:
            x = torch.cat([x, self.concat_cond[states_on_device]], dim=1)
        weights = self.bank.coefficients[7, steps_on_device]
        arguments = (x, self.bank.timesteps[steps_on_device], network.prompt_embeds, weights)
        return network.call_pool.run(network.denoise, arguments, is_busy).float()

    def _advance(self, states: Indices, passes: Sequence[tuple[ConditioningPass, ...]], first: Tensor, second: Tensor) -> None:
        """Apply the solver's update.

        Args:
            states: int [R].
            passes: of each state.
            first: raw network outputs [R, C, H, W] of the first passes.
            second: raw outputs [R, C, H, W] of the second passes; equal to `first` where a request has one pass.
        """
        records = self.records[states]
        on_device, steps_on_device = self.to_device(states), self.to_device(records["step"])
        x, x0_prev, x0_prev2 = (values[on_device] for values in (self.x, self.x0_prev, self.x0_prev2))
        gathered = self.bank.coefficients[:, steps_on_device].view(10, len(states), 1, 1, 1)
        p, q, a, b, c, d, s, w, second_p, second_q = gathered
        output = first if self.main.conditioning.embeds_guidance else second + w * (first - second)
        x0 = p * x + q * output
        converted = self._rows_of_other_prediction(passes)
        if len(converted):
            rows = self.to_device(converted)
            guide_x0 = second_p[rows] * x[rows] + second_q[rows] * second[rows]
            x0[rows] = guide_x0 + w[rows] * (p[rows] * x[rows] + q[rows] * first[rows] - guide_x0)
        x = a * x + b * x0 + c * x0_prev + d * x0_prev2
        noisy = np.flatnonzero(self.bank.is_noisy[records["step"]])
        if len(noisy):
            noisy_records = records[noisy]
            seeds = torch.from_numpy(noisy_records["seed"].copy())
            sample_indices = torch.from_numpy(noisy_records["sample_index"].copy())
            evaluations = torch.from_numpy(noisy_records["step"] - noisy_records["first_step"] + 1 + INITIAL_NOISE)
            noise = philox_normal(seeds, sample_indices, evaluations, self.latent_shape, self.device)
            rows = self.to_device(noisy)
            x.index_add_(0, rows, s[rows] * noise)
        self.x[on_device], self.x0_prev[on_device], self.x0_prev2[on_device] = x, x0, x0_prev
        self.records["step"][states] += 1
        self.records["nfe"][states] += [len(items) for items in passes]
        self.records["guide_nfe"][states] += [sum(item.guide is not None for item in items) for items in passes]
        self.records["batch_size"][states] = np.minimum(self.records["batch_size"][states], self._call_size())

    def _rows_of_other_prediction(self, passes: Sequence[tuple[ConditioningPass, ...]]) -> Indices:
        """Rows whose second pass has another prediction type than the main network, so that both are converted to x0."""
        rows = [
            row
            for row, items in enumerate(passes)
            if len(items) == 2 and self.networks[items[1].guide].prediction_type != self.main.prediction_type
        ]
        return np.array(rows, np.int64)

    def _pop_finished(self, states: Indices) -> list[SampleResult]:
        """Remove finished requests from these states; return them with copies of their latents."""
        ended = states[self.records["step"][states] == self.records["end_step"][states]]
        if not len(ended):
            return []
        latents = self.x[self.to_device(ended)]
        finite = latents.isfinite().flatten(1).all(dim=1).tolist()
        results = []
        for state, latent, is_finite in zip(ended.tolist(), latents, finite, strict=True):
            record, request = self.records[state], self.requests[state]
            nfe, executed, guide_nfe = (int(record[name]) for name in ("nfe", "nfe_executed", "guide_nfe"))
            results.append(SampleResult(request, latent, nfe, executed, is_finite, int(record["batch_size"]), guide_nfe))
            self.requests[state] = None
            self.records["busy"][state] = False
        return results

    def to_device(self, indices: Indices) -> Tensor:
        """Host indices as an index tensor on the device."""
        return torch.from_numpy(indices.copy()).to(self.device)
