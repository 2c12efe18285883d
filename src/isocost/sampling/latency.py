"""How long a checkpoint takes: measured milliseconds from captions to pictures, by stage and by batch size.

Shapes: B pictures of a batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from isocost.config.sampling import SamplerSpec
from isocost.diffusion.solvers import build_table
from isocost.errors import RequestError, WorkError
from isocost.models.checkpoint import CheckpointInfo, load_checkpoint
from isocost.models.components import codec_of, text_of
from isocost.sampling.denoiser import NetworkPrecision, SamplingNetwork
from isocost.sampling.generate import schedule_of
from isocost.sampling.latency_stages import (
    DENOISER,
    LEAST_REPEATS,
    NUM_WARM_UP,
    WHOLE,
    BatchWork,
    Prepared,
    Summary,
    time_pass,
    time_passes,
)
from isocost.sampling.request import Row
from isocost.utils.device import Instruments, Reading, best_device, instruments_of
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
        ms_per_picture: the whole's median over B.
        ms_per_evaluation: the denoiser's median over the sampler's evaluations, B pictures and all their passes at once.
        nfe_per_picture: network evaluations of a picture, guidance's second pass counted.
        network_calls, network_rows: calls of the network and rows in them, counted over one pass of the batch.
        warm_up_ms: the whole of each pass that was not counted; the first one compiles where that is asked for.
        energy_j, energy_j_per_picture: of the whole device over the measured passes; None where it tells none.
        before, after: what the device told around the measured passes.
    """

    batch: int
    stages: dict[str, Summary]
    ms_per_picture: float
    ms_per_evaluation: float
    nfe_per_picture: int
    network_calls: int
    network_rows: int
    warm_up_ms: tuple[float, ...]
    memory: Memory
    energy_j: float | None
    energy_j_per_picture: float | None
    before: Reading
    after: Reading


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
        """Plain data for JSON, every time unrounded; `ms_per_picture_by_batch` is the batch curve."""
        curve = {str(one.batch): one.ms_per_picture for one in self.batches}
        return {**asdict(self), "ms_per_picture_by_batch": curve}


def latency(
    checkpoint: str | Path,
    *,
    sampler: SamplerSpec | None = None,
    num_steps: int | None = None,
    guidance: float | None = None,
    batches: Sequence[int] = DEFAULT_BATCHES,
    repeats: int = DEFAULT_REPEATS,
    precision: NetworkPrecision = "fp32",
    compiled: bool = False,
    device: str | None = None,
) -> Latency:
    """Time one checkpoint: each batch size, the smallest first, `NUM_WARM_UP` passes to warm up and `repeats` measured ones.

    Where nothing else is said a few-step student has its own sampler and takes 4 steps, others 16 of DDIM; guidance is 2, and 1
    for super-resolution; the device is CUDA's where there is one.

    Raises:
        RequestError: the checkpoint does not load; it, the sampler or the device does not take these settings; or a picture
            is not finite numbers.
        WorkError: a batch does not fit into the device's memory.
    """
    if not batches or min(batches) < 1:
        raise RequestError(f"batch = {min(batches, default=None)}: give one or more sizes of at least 1 (--batch 1 --batch 4)")
    if repeats < LEAST_REPEATS:
        raise RequestError(f"repeats = {repeats}: a median and its spread take at least {LEAST_REPEATS}")
    where = _device(device, precision)
    opened = load_checkpoint(checkpoint, device=where.type)
    info = opened.info
    if guidance is None:
        guidance = DEFAULT_GUIDANCE if info.scale is None else DEFAULT_GUIDANCE_OF_UPSCALING
    info.check_guidance(guidance)
    spec = sampler or info.sampler
    table = build_table(spec, info.num_steps if num_steps is None else num_steps, schedule_of(info))
    Row(0, 0, table, guidance)  # Refuses a guidance that no picture takes before more is loaded.
    codec = codec_of(opened, where)
    network = SamplingNetwork(opened.network, precision, compiled)
    prepared = Prepared(info, network, codec, text_of(opened, where))
    instruments = instruments_of(where)
    loaded = instruments.memory_bytes()
    measured = []
    for size in sorted(set(batches)):
        if compiled:
            torch.compiler.reset()  # Each size is a shape of its own; torch gives up compiling after a few of one function.
        try:
            measured.append(_measure(BatchWork(prepared, table, guidance, size), repeats, instruments, loaded))
        except torch.OutOfMemoryError as error:
            raise WorkError(f"a batch of {size} does not fit into the device's memory; take a smaller --batch") from error
    settings = {
        "sampler": spec.label,
        "num_steps": info.num_steps if num_steps is None else num_steps,
        "num_evaluations": table.num_evaluations,
        "guidance": guidance,
        "passes_per_evaluation": prepared.passes(guidance),
        "gflop_per_picture": measured[0].nfe_per_picture * info.gflop_per_forward,
        "precision": {"text": "fp32", "denoiser": precision, "decoder": "fp32"},
        "compiled": compiled,
        "repeats": repeats,
        "warm_up": NUM_WARM_UP,
        "timer": {"stages": instruments.clock.name, WHOLE: "perf_counter"},
    }
    told = {"folder": str(checkpoint), "digest": opened.digest, **_told(info)}
    notes = (*instruments.notes, *notes_of_load(measured))
    return Latency(told, settings, instruments.facts(), tuple(measured), notes, provenance())


def _device(name: str | None, precision: NetworkPrecision) -> torch.device:
    if name not in (None, "cpu", "cuda"):
        raise RequestError(f"device = {name}: cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise RequestError("device = cuda: torch sees no CUDA device here; take --device cpu")
    device = best_device() if name is None else torch.device(name)
    if precision == "fp16" and device.type == "cpu":
        raise RequestError("precision = fp16: for CUDA devices alone; on a CPU take --precision fp32 or bf16")
    return device


def _measure(work: BatchWork, repeats: int, instruments: Instruments, loaded: int | None) -> BatchLatency:
    instruments.reset_peak()
    warm_up = tuple(time_pass(work, instruments.clock)[WHOLE] for _ in range(NUM_WARM_UP))
    work.check()
    say(f"batch {work.size}: {repeats} passes, about {repeats * warm_up[-1] / 1000:.1f} s")
    before = instruments.read()
    raw = time_passes(work, instruments.clock, repeats)
    after = instruments.read()
    work.check()
    stages = {stage: Summary.of(times) for stage, times in raw.items()}
    peak = instruments.peak_bytes()
    growth = None if peak is None or loaded is None else peak - loaded
    energy = None if before.energy_j is None or after.energy_j is None else after.energy_j - before.energy_j
    return BatchLatency(
        batch=work.size,
        stages=stages,
        ms_per_picture=stages[WHOLE].median_ms / work.size,
        ms_per_evaluation=stages[DENOISER].median_ms / work.rows[0].table.num_evaluations,
        nfe_per_picture=work.finished[0].nfe,
        network_calls=work.calls.num_calls,
        network_rows=work.calls.num_rows,
        warm_up_ms=warm_up,
        memory=Memory(instruments.memory_kind, loaded, peak, growth),
        energy_j=energy,
        energy_j_per_picture=None if energy is None else energy / (repeats * work.size),
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
