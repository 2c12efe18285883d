"""How long a checkpoint takes: measured milliseconds from captions to images, by stage and by batch size.

Shapes: B images of a batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from isocost.config.sampling import SolverSpec
from isocost.diffusion.solvers import solver_coefficients
from isocost.errors import ConfigError, RunError
from isocost.models.checkpoint import CheckpointInfo, load_checkpoint
from isocost.models.components import load_checkpoint_autoencoder, load_checkpoint_text_encoder
from isocost.sampling.denoiser import Denoiser, SamplingDTypeName
from isocost.sampling.generate import schedule_of
from isocost.sampling.latency_stages import (
    DENOISER,
    END_TO_END,
    MIN_REPEATS,
    NUM_WARM_UP,
    BatchedPipeline,
    LoadedModel,
    Summary,
    time_pass,
    time_passes,
)
from isocost.sampling.request import SampleRequest
from isocost.utils.device import DeviceMonitor, DeviceSample, best_device, device_monitor
from isocost.utils.environment import provenance
from isocost.utils.progress import say

DEFAULT_BATCHES = (1, 4)
DEFAULT_REPEATS = 20
DEFAULT_GUIDANCE, DEFAULT_GUIDANCE_OF_UPSCALING = 2.0, 1.0


@dataclass(frozen=True)
class Memory:
    """Bytes in use when everything was loaded and no pass was made, the most during a batch size's passes, the difference.

    `kind` says what is counted; all are None where the system tells nothing.
    """

    kind: str | None
    loaded_bytes: int | None
    peak_bytes: int | None
    growth_bytes: int | None


@dataclass(frozen=True)
class BatchLatency:
    """Times of one batch size.

    Attributes:
        batch: B.
        stages: by name, in order: `text`, `encoder` (super-resolution), `denoiser`, `decoder`, and the `whole`.
        ms_per_image: the whole's median over B.
        ms_per_evaluation: the denoiser's median over the solver's evaluations, B images and all their passes at once.
        nfe_per_image: network evaluations of an image, guidance's second pass counted.
        network_calls, network_rows: calls of the network and rows in them, counted over one pass of the batch.
        warm_up_ms: the whole of each pass that was not counted; the first one compiles where that is asked for.
        energy_j, energy_j_per_image: of the whole device over the measured passes; None where it tells none.
        before, after: what the device told around the measured passes.
    """

    batch: int
    stages: dict[str, Summary]
    ms_per_image: float
    ms_per_evaluation: float
    nfe_per_image: int
    network_calls: int
    network_rows: int
    warm_up_ms: tuple[float, ...]
    memory: Memory
    energy_j: float | None
    energy_j_per_image: float | None
    before: DeviceSample
    after: DeviceSample


@dataclass(frozen=True)
class Latency:
    """What was timed, on what, and the times by batch size; `notes` says what the device does not tell, and of its load."""

    checkpoint: dict[str, Any]
    settings: dict[str, Any]
    device: dict[str, Any]
    batches: tuple[BatchLatency, ...]
    notes: tuple[str, ...]
    provenance: dict[str, str]

    def document(self) -> dict[str, Any]:
        """Plain data for JSON, every time unrounded; `ms_per_image_by_batch` is the batch curve."""
        curve = {str(one.batch): one.ms_per_image for one in self.batches}
        return {**asdict(self), "ms_per_image_by_batch": curve}


def latency(
    checkpoint: str | Path,
    *,
    solver: SolverSpec | None = None,
    num_steps: int | None = None,
    guidance: float | None = None,
    batches: Sequence[int] = DEFAULT_BATCHES,
    repeats: int = DEFAULT_REPEATS,
    dtype: SamplingDTypeName = "fp32",
    compiled: bool = False,
    device: str | None = None,
) -> Latency:
    """Time one checkpoint: each batch size, the smallest first, `NUM_WARM_UP` passes to warm up and `repeats` measured ones.

    Where nothing else is said a few-step student has its own solver and takes 4 steps, others 16 of DDIM; guidance is 2, and 1
    for super-resolution; the device is CUDA's where there is one.

    Raises:
        ConfigError: the checkpoint does not load; it, the solver or the device does not take these settings; or an image
            is not finite numbers.
        RunError: a batch does not fit into the device's memory.
    """
    if not batches or min(batches) < 1:
        raise ConfigError(f"batch = {min(batches, default=None)}: give one or more sizes of at least 1 (--batch 1 --batch 4)")
    if repeats < MIN_REPEATS:
        raise ConfigError(f"repeats = {repeats}: a median and its spread take at least {MIN_REPEATS}")
    where = _device(device, dtype)
    opened = load_checkpoint(checkpoint, device=where.type)
    info = opened.info
    if guidance is None:
        guidance = DEFAULT_GUIDANCE if info.scale is None else DEFAULT_GUIDANCE_OF_UPSCALING
    info.check_guidance(guidance)
    spec = solver or info.solver
    table = solver_coefficients(spec, info.num_steps if num_steps is None else num_steps, schedule_of(info))
    SampleRequest(0, 0, table, guidance)  # Refuses a guidance that no image takes before more is loaded.
    autoencoder = load_checkpoint_autoencoder(opened, where)
    network = Denoiser(opened.network, dtype, compiled)
    prepared = LoadedModel(info, network, autoencoder, load_checkpoint_text_encoder(opened, where))
    monitor = device_monitor(where)
    loaded = monitor.memory_bytes()
    measured = []
    for size in sorted(set(batches)):
        if compiled:
            torch.compiler.reset()  # Each size is a shape of its own; torch gives up compiling after a few of one function.
        try:
            measured.append(_measure(BatchedPipeline(prepared, table, guidance, size), repeats, monitor, loaded))
        except torch.OutOfMemoryError as error:
            raise RunError(f"a batch of {size} does not fit into the device's memory; take a smaller --batch") from error
    settings = {
        "solver": spec.label,
        "num_steps": info.num_steps if num_steps is None else num_steps,
        "num_function_evaluations": table.num_function_evaluations,
        "guidance": guidance,
        "passes_per_evaluation": prepared.passes(guidance),
        "gflop_per_image": measured[0].nfe_per_image * info.gflop_per_forward,
        "dtype": {"text": "fp32", "denoiser": dtype, "decoder": "fp32"},
        "compiled": compiled,
        "repeats": repeats,
        "warm_up": NUM_WARM_UP,
        "timer": {"stages": monitor.clock.name, END_TO_END: "perf_counter"},
    }
    told = {"folder": str(checkpoint), "digest": opened.digest, **_told(info)}
    notes = (*monitor.notes, *notes_of_load(measured))
    return Latency(told, settings, monitor.facts(), tuple(measured), notes, provenance())


def _device(name: str | None, dtype: SamplingDTypeName) -> torch.device:
    if name not in (None, "cpu", "cuda"):
        raise ConfigError(f"device = {name}: cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = cuda: torch sees no CUDA device here; take --device cpu")
    device = best_device() if name is None else torch.device(name)
    if dtype == "fp16" and device.type == "cpu":
        raise ConfigError("dtype = fp16: for CUDA devices alone; on a CPU take --dtype fp32 or bf16")
    return device


def _measure(work: BatchedPipeline, repeats: int, monitor: DeviceMonitor, loaded: int | None) -> BatchLatency:
    monitor.reset_peak()
    warm_up = tuple(time_pass(work, monitor.clock)[END_TO_END] for _ in range(NUM_WARM_UP))
    work.check()
    say(f"batch {work.size}: {repeats} passes, about {repeats * warm_up[-1] / 1000:.1f} s")
    before = monitor.read()
    raw = time_passes(work, monitor.clock, repeats)
    after = monitor.read()
    work.check()
    stages = {stage: Summary.of(times) for stage, times in raw.items()}
    peak = monitor.peak_bytes()
    growth = None if peak is None or loaded is None else peak - loaded
    energy = None if before.energy_j is None or after.energy_j is None else after.energy_j - before.energy_j
    return BatchLatency(
        batch=work.size,
        stages=stages,
        ms_per_image=stages[END_TO_END].median_ms / work.size,
        ms_per_evaluation=stages[DENOISER].median_ms / work.rows[0].table.num_function_evaluations,
        nfe_per_image=work.finished[0].nfe,
        network_calls=work.calls.num_calls,
        network_rows=work.calls.num_rows,
        warm_up_ms=warm_up,
        memory=Memory(monitor.memory_kind, loaded, peak, growth),
        energy_j=energy,
        energy_j_per_image=None if energy is None else energy / (repeats * work.size),
        before=before,
        after=after,
    )


def notes_of_load(measured: Sequence[BatchLatency]) -> list[str]:
    """A note where more processes wanted a core than there are: the times include theirs."""
    loads = [one.load_average_1m for each in measured for one in (each.before, each.after) if one.load_average_1m is not None]
    cores = os.cpu_count()
    if not loads or cores is None or max(loads) <= cores:
        return []
    return [f"load: up to {max(loads):.1f} processes wanted one of {cores} cores; the times are not of a quiet machine"]


def _told(info: CheckpointInfo) -> dict[str, Any]:
    """What the checkpoint says of itself."""
    return {
        "task": info.task,
        "size": info.label,
        "distilled": info.distilled or None,
        "resolution": info.resolution,
        "scale": info.scale,
        "num_parameters": info.num_parameters,
        "gflop_per_forward": info.gflop_per_forward,
    }
