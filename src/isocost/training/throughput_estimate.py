"""What a training will take on this machine, before it starts: hours from a few measured steps, memory and disk by counting.

Time is that of the network, the optimizer and the averages; reading a latent cache goes on beside a device, and is little on
a CPU. A size that does not fit, or whose few steps would take too long, is not run: its hours follow from its GFLOP at the
rate of the last size that was measured.

Shapes: B rows of a microbatch, C latent channels, L latent side, T tokens, D width of the prompt embeddings.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from isocost.config.model import ModelSpec
from isocost.config.training import TrainSpec
from isocost.models.factory import build_network
from isocost.models.flops import ModelCost, model_cost
from isocost.training.grad_accumulation import free_bytes
from isocost.training.memory_estimate import FLOAT, state_bytes, training_memory
from isocost.training.objectives import Batch, TextToImage
from isocost.training.trainer import Trainer, backward, make_accelerator

NUM_STEPS = 3
MAX_ROWS = 8
"""Rows of the measured microbatch where the study leaves it open."""
LONGEST_SECONDS = 60.0
PROCESSES = (2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Forecast:
    """One size: `memory_bytes` of a process, `disk_bytes` of states and checkpoints at their most.

    `hours` is None where nothing was measured. `remedy` is empty where the size fits, else it says what would.
    """

    size: str
    width: int
    images: int
    images_per_second: float | None
    hours: float | None
    is_measured: bool
    memory_bytes: int
    memory_free: int
    disk_bytes: int
    disk_free: int
    remedy: str

    def __str__(self) -> str:
        rate = "time unknown" if self.hours is None else f"{self.hours:,.1f} h at {self.images_per_second:.3g} images/s"
        how = "" if self.hours is None or self.is_measured else " (by GFLOP, not measured)"
        line = (
            f"{self.size} (width {self.width}): {rate}{how}, {_gb(self.memory_bytes)} of memory, {_gb(self.disk_bytes)} of disk"
        )
        return f"{line}; {self.remedy}" if self.remedy else line


class RandomTask:
    """Batches of random numbers in the shapes of a network."""

    def __init__(self, model: ModelSpec, num_tokens: int) -> None:
        self.model, self.num_tokens = model, num_tokens

    def batch(self, images_seen: int, rows: range, device: torch.device, dtype: torch.dtype = torch.float32) -> Batch:
        """Noisy latents, states and targets drawn from a normal, timestep 0."""
        model = self.model
        latents = torch.randn(
            len(rows), model.latent_channels, model.latent_size, model.latent_size, device=device, dtype=dtype
        )
        states = torch.randn(len(rows), self.num_tokens, model.cross_attention_dim, device=device, dtype=dtype)
        zeros = torch.zeros(len(rows), device=device, dtype=dtype)
        beside = latents.new_zeros(len(rows), model.extra_input_channels, *latents.shape[2:])
        noisy = torch.cat([latents, beside], dim=1)
        return Batch(noisy, zeros, states, latents.clone(), zeros + 1, latents, zeros.long())

    def begin(self, averages: Mapping[int, list[Tensor]]) -> None:
        """Nothing here depends on them."""

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """As in text-to-image training."""
        return TextToImage.loss(self, network, batch)  # type: ignore[arg-type]


class ThroughputEstimator:
    """Forecasts sizes one after the other, from the smallest on."""

    def __init__(self, spec: TrainSpec, num_tokens: int, disk_free: int) -> None:
        self.spec, self.num_tokens, self.disk_free = spec, num_tokens, disk_free
        self.gflop_per_second: float | None = None
        self._measured: dict[ModelSpec, float] = {}

    def __call__(self, model: ModelSpec, images: int, snapshots: tuple[int, ...]) -> Forecast:
        """One size that has `images` to go and keeps a checkpoint at each of `snapshots`."""
        cost = model_cost(model, self.num_tokens)
        rows = self._rows()
        memory, free = training_memory(model, self.spec, rows, self.num_tokens).total, memory_free()
        disk = disk_bytes(self.spec, cost.num_parameters, len(snapshots))
        remedy = "" if memory <= free else suggest_settings(model, self.spec, cost, self.num_tokens, free)
        if disk > self.disk_free:
            remedy += ("; " if remedy else "") + f"{_gb(self.disk_free)} of disk are free: fewer snapshots or kept states"
        rate, is_measured = self._rate(model, cost, rows, fits=memory <= free)
        hours = None if rate is None else images / rate / 3600
        about = (cost.size, model.width, images, rate, hours, is_measured)
        return Forecast(*about, memory, free, disk, self.disk_free, remedy)

    def _rows(self) -> int:
        return min(self.spec.batch_size, MAX_ROWS) if self.spec.microbatch == "auto" else self.spec.microbatch

    def _rate(self, model: ModelSpec, cost: ModelCost, rows: int, fits: bool) -> tuple[float | None, bool]:
        """Images a second, and whether they were measured."""
        if model in self._measured:
            return self._measured[model], True
        gflop = 3 * cost.gflop_per_forward
        known = self.gflop_per_second
        if fits and (known is None or (NUM_STEPS + 1) * rows * gflop / known < LONGEST_SECONDS):
            of_image, of_update = measure(model, self.spec, self.num_tokens, rows)
            rate = 1 / (of_image + of_update / self.spec.batch_size)
            self.gflop_per_second, self._measured[model] = rate * gflop, rate
            return rate, True
        return (None if known is None else known / gflop), False


def suggest_settings(model: ModelSpec, spec: TrainSpec, cost: ModelCost, num_tokens: int, free: int) -> str:
    """The least change after which a training has room where each process has `free` bytes, in words."""

    def fits(one: TrainSpec, processes: int = 1) -> bool:
        shares = processes if one.sharding == "fsdp" else 1
        held = state_bytes(one, cost.num_parameters, processes) + FLOAT * cost.num_parameters // shares
        return held < free and training_memory(model, one, 1, num_tokens, processes).total <= free

    lean = spec.model_copy(update={"gradient_checkpointing": True})
    for one, words in ((spec, "microbatch: 1"), (lean, "gradient_checkpointing: true with microbatch: 1")):
        if fits(one):
            return f"{_gb(free)} of memory are free: train.{words} fits"
    sharded = lean.model_copy(update={"sharding": "fsdp"})
    for number in PROCESSES:
        if fits(sharded, number):
            return (
                f"{_gb(free)} of memory are free: train.sharding: fsdp over {number} processes with as much each, "
                "gradient_checkpointing: true and microbatch: 1 fits"
            )
    return f"{_gb(free)} of memory are free, and no setting fits: take a device with more"


def measure(model: ModelSpec, spec: TrainSpec, num_tokens: int, rows: int) -> tuple[float, float]:
    """Seconds an image takes forward and backward, and seconds of an update of weights and averages; medians of a few."""
    alone = spec.model_copy(update={"batch_size": rows, "microbatch": rows, "tracker": "none", "sharding": "none"})
    with tempfile.TemporaryDirectory() as folder:
        accelerator = make_accelerator(alone, Path(folder), "forecast")
        trainer = Trainer(alone, RandomTask(model, num_tokens), build_network(model), Path(folder), accelerator)
        batch = trainer.batch(0)
        passes, steps = [], []
        for number in range(NUM_STEPS + 1):
            started = _now(accelerator.device)
            backward(trainer.parallel, trainer.task, batch, rows, alone.dtype)
            between = _now(accelerator.device)
            trainer.step(batch, number * rows)
            if number:
                passes.append(between - started)
                steps.append(_now(accelerator.device) - between)
    of_pass = sorted(passes)[len(passes) // 2]
    return of_pass / rows, max(0.0, sorted(steps)[len(steps) // 2] - of_pass)


def oom_message(spec: TrainSpec, cost: ModelCost, num_processes: int, disk_free: int) -> str:
    """A line for a size that cannot fit whatever its activations take, or whose states cannot; empty where nothing is wrong."""
    held, free = state_bytes(spec, cost.num_parameters, num_processes), memory_free()
    disk = disk_bytes(spec, cost.num_parameters, 1)
    if held > free:
        needs = f"{_gb(held)} of memory for weights, moments and averages alone, and {_gb(free)} are free"
    elif disk > disk_free:
        needs = f"{_gb(disk)} of disk for its states, and {_gb(disk_free)} are free"
    else:
        return ""
    return f"{cost.size} (width {cost.width}) takes {needs}: `isocost train STUDY --forecast` says what would fit"


def disk_bytes(spec: TrainSpec, num_parameters: int, num_snapshots: int) -> int:
    """Bytes of states and checkpoints when they are most: a state stays until the next is durable."""
    states = spec.keep_last_states + 1
    if spec.keep_state_every_images is not None:
        states += spec.num_images // spec.keep_state_every_images
    return states * state_bytes(spec, num_parameters) + num_snapshots * FLOAT * num_parameters


def memory_free() -> int:
    """Bytes that a process could still take: of the accelerator, or of the machine."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return free_bytes()


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2g} GB" if num_bytes < 1e11 else f"{num_bytes / 1e9:,.0f} GB"
