"""Estimate a training on this machine before it starts: hours from a few measured steps, memory and disk by counting.

The time covers the network, the optimizer and the averages. Reading the latent cache is not included: it overlaps with the work
of an accelerator, and takes little time on a CPU. A size that does not fit into memory, or whose measurement would take too
long, is not run; its hours follow from its GFLOP at the throughput of the last measured size.

Shapes: B rows of a microbatch, C latent channels, L latent size, T tokens, D width of the prompt embeddings.
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
"""Maximum rows of the measured microbatch if the study sets `microbatch: auto`."""
MAX_MEASURE_SECONDS = 60.0
PROCESS_COUNTS = (2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class ThroughputEstimate:
    """Estimate for one network size.

    Attributes:
        images: images still to train on.
        hours: None if no size could be measured.
        is_measured: whether this size was measured; otherwise hours follow from GFLOP.
        memory_bytes: of a process.
        disk_bytes: the maximum that training states and checkpoints take together.
        remedy: settings with which the size fits; empty if it fits already.
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
        duration = "time unknown" if self.hours is None else f"{self.hours:,.1f} h at {self.images_per_second:.3g} images/s"
        source = "" if self.hours is None or self.is_measured else " (by GFLOP, not measured)"
        resources = f"{_gb(self.memory_bytes)} of memory, {_gb(self.disk_bytes)} of disk"
        line = f"{self.size} (width {self.width}): {duration}{source}, {resources}"
        return f"{line}; {self.remedy}" if self.remedy else line


class RandomObjective:
    """An objective whose batches are random numbers in the shapes of a network."""

    def __init__(self, model: ModelSpec, num_tokens: int) -> None:
        self.model, self.num_tokens = model, num_tokens

    def batch(self, images_seen: int, rows: range, device: torch.device, dtype: torch.dtype = torch.float32) -> Batch:
        """Make noisy latents, prompt embeddings and targets from a normal distribution, all at timestep 0."""
        model = self.model
        latents = torch.randn(
            len(rows), model.latent_channels, model.latent_size, model.latent_size, device=device, dtype=dtype
        )
        prompt_embeds = torch.randn(len(rows), self.num_tokens, model.cross_attention_dim, device=device, dtype=dtype)
        zeros = torch.zeros(len(rows), device=device, dtype=dtype)
        concat_cond = latents.new_zeros(len(rows), model.extra_input_channels, *latents.shape[2:])
        noisy = torch.cat([latents, concat_cond], dim=1)
        return Batch(noisy, zeros, prompt_embeds, latents.clone(), zeros + 1, latents, zeros.long())

    def on_train_start(self, averages: Mapping[int, list[Tensor]]) -> None:
        """Do nothing: the loss does not use the averages."""

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Compute the loss of text-to-image training."""
        return TextToImage.loss(self, network, batch)  # type: ignore[arg-type]


class ThroughputEstimator:
    """Estimates network sizes one after another, from the smallest on."""

    def __init__(self, spec: TrainSpec, num_tokens: int, disk_free: int) -> None:
        self.spec, self.num_tokens, self.disk_free = spec, num_tokens, disk_free
        self.gflop_per_second: float | None = None
        self._measured: dict[ModelSpec, float] = {}

    def __call__(self, model: ModelSpec, images: int, snapshots: tuple[int, ...]) -> ThroughputEstimate:
        """Estimate one size.

        Args:
            images: images still to train on.
            snapshots: images seen at which a checkpoint is saved.
        """
        cost = model_cost(model, self.num_tokens)
        rows = self._num_rows()
        memory, free = training_memory(model, self.spec, rows, self.num_tokens).total, memory_free()
        disk = disk_bytes(self.spec, cost.num_parameters, len(snapshots))
        remedy = "" if memory <= free else suggest_settings(model, self.spec, cost, self.num_tokens, free)
        if disk > self.disk_free:
            remedy += "; " if remedy else ""
            remedy += f"{_gb(self.disk_free)} of disk are free: take fewer train.snapshots or a smaller train.keep_last_states"
        images_per_second, is_measured = self._images_per_second(model, cost, rows, fits=memory <= free)
        hours = None if images_per_second is None else images / images_per_second / 3600
        size_and_time = (cost.size, model.width, images, images_per_second, hours, is_measured)
        return ThroughputEstimate(*size_and_time, memory, free, disk, self.disk_free, remedy)

    def _num_rows(self) -> int:
        return min(self.spec.batch_size, MAX_ROWS) if self.spec.microbatch == "auto" else self.spec.microbatch

    def _images_per_second(self, model: ModelSpec, cost: ModelCost, rows: int, fits: bool) -> tuple[float | None, bool]:
        """Images per second, and whether they were measured."""
        if model in self._measured:
            return self._measured[model], True
        gflop = 3 * cost.gflop_per_forward
        throughput = self.gflop_per_second
        if fits and (throughput is None or (NUM_STEPS + 1) * rows * gflop / throughput < MAX_MEASURE_SECONDS):
            image_s, update_s = measure_step_times(model, self.spec, self.num_tokens, rows)
            rate = 1 / (image_s + update_s / self.spec.batch_size)
            self.gflop_per_second, self._measured[model] = rate * gflop, rate
            return rate, True
        return (None if throughput is None else throughput / gflop), False


def suggest_settings(model: ModelSpec, spec: TrainSpec, cost: ModelCost, num_tokens: int, free: int) -> str:
    """Describe the smallest change of settings with which the training fits into `free` bytes per process."""

    def fits(candidate: TrainSpec, num_processes: int = 1) -> bool:
        num_shards = num_processes if candidate.sharding == "fsdp" else 1
        minimum = state_bytes(candidate, cost.num_parameters, num_processes) + FLOAT * cost.num_parameters // num_shards
        return minimum < free and training_memory(model, candidate, 1, num_tokens, num_processes).total <= free

    lean = spec.model_copy(update={"gradient_checkpointing": True})
    if fits(spec):
        return f"{_gb(free)} of memory are free; it fits with train.microbatch: 1"
    if fits(lean):
        return f"{_gb(free)} of memory are free; it fits with train.gradient_checkpointing: true and train.microbatch: 1"
    sharded = lean.model_copy(update={"sharding": "fsdp"})
    for num_processes in PROCESS_COUNTS:
        if fits(sharded, num_processes):
            return (
                f"{_gb(free)} of memory are free; it fits with train.sharding: fsdp over {num_processes} processes with "
                f"{_gb(free)} each, train.gradient_checkpointing: true and train.microbatch: 1"
            )
    return f"{_gb(free)} of memory are free, and no setting fits; take a device with more memory"


def measure_step_times(model: ModelSpec, spec: TrainSpec, num_tokens: int, rows: int) -> tuple[float, float]:
    """Measure training steps on random numbers in a single process.

    Args:
        rows: images of the measured batch.

    Returns:
        Seconds per image for forward and backward, and seconds per update of weights and averages; medians of `NUM_STEPS`
        steps.
    """
    spec = spec.model_copy(update={"batch_size": rows, "microbatch": rows, "tracker": "none", "sharding": "none"})
    with tempfile.TemporaryDirectory() as folder:
        accelerator = make_accelerator(spec, Path(folder), "estimate")
        trainer = Trainer(spec, RandomObjective(model, num_tokens), build_network(model), Path(folder), accelerator)
        batch = trainer.batch(0)
        pass_times, step_times = [], []
        for step in range(NUM_STEPS + 1):
            start = _now(accelerator.device)
            backward(trainer.model, trainer.objective, batch, rows, spec.dtype)
            middle = _now(accelerator.device)
            trainer.step(batch, step * rows)
            if step:  # the first step warms up
                pass_times.append(middle - start)
                step_times.append(_now(accelerator.device) - middle)
    pass_s, step_s = (sorted(times)[len(times) // 2] for times in (pass_times, step_times))
    return pass_s / rows, max(0.0, step_s - pass_s)


def oom_message(spec: TrainSpec, cost: ModelCost, num_processes: int, disk_free: int) -> str:
    """Return a warning if weights, moments and averages exceed the free memory, or training states the free disk; else ""."""
    state_memory, free = state_bytes(spec, cost.num_parameters, num_processes), memory_free()
    disk = disk_bytes(spec, cost.num_parameters, 1)
    if state_memory > free:
        problem = f"needs {_gb(state_memory)} of memory just for weights, moments and averages, but {_gb(free)} are free"
    elif disk > disk_free:
        problem = f"needs {_gb(disk)} of disk for its training states, but {_gb(disk_free)} are free"
    else:
        return ""
    return f"{cost.size} (width {cost.width}) {problem}; `isocost train STUDY --estimate` lists settings that fit"


def disk_bytes(spec: TrainSpec, num_parameters: int, num_snapshots: int) -> int:
    """Return the maximum bytes of training states and checkpoints: a state stays until the next one is durable."""
    num_states = spec.keep_last_states + 1
    if spec.keep_state_every_images is not None:
        num_states += spec.num_images // spec.keep_state_every_images
    return num_states * state_bytes(spec, num_parameters) + num_snapshots * FLOAT * num_parameters


def memory_free() -> int:
    """Return the free memory of the accelerator, or of the machine if there is none, bytes."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return free_bytes()


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2g} GB" if num_bytes < 1e11 else f"{num_bytes / 1e9:,.0f} GB"
