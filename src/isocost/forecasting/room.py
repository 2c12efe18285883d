"""Whether a training fits a device, and what to change where it does not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from isocost.forecasting.devices import Cluster
from isocost.models.cost import model_cost
from isocost.stages import ModelSpec, TrainSpec
from isocost.train.forecast import what_fits
from isocost.train.memory import FLOAT, state_bytes, training_memory


@dataclass(frozen=True)
class Room:
    """What a process holds at the end of a backward pass, in bytes: weights, gradients, moments and averages.

    `fits` is with the activations of a microbatch: of `train.microbatch`, or of one image where that is "auto". `remedy` says
    what to change where it does not.
    """

    held_bytes: int
    fits: bool
    remedy: str


def rooms(models: Iterable[ModelSpec], spec: TrainSpec, num_tokens: int, cluster: Cluster) -> dict[ModelSpec, Room]:
    """Networks that differ in width alone: where one fits, narrower ones do, so they are tried from the widest on."""
    free, shares = cluster.device.memory_bytes, cluster.number if spec.sharding == "fsdp" else 1
    rows = 1 if spec.microbatch == "auto" else spec.microbatch
    found: dict[ModelSpec, Room] = {}
    fits = False
    for model in sorted(models, key=lambda model: model.width, reverse=True):
        cost = model_cost(model, num_tokens)
        held = state_bytes(spec, cost.num_parameters, cluster.number) + FLOAT * cost.num_parameters // shares
        if not fits and held < free:
            fits = training_memory(model, spec, rows, num_tokens, cluster.number).total <= free
        found[model] = Room(held, fits, "" if fits else what_fits(model, spec, cost, num_tokens, free))
    return found
