"""The latency of a checkpoint: measured milliseconds from prompts to images, by stage and by batch size.

Shapes: B images of a batch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from isocost.config.sampling import SolverSpec, VaeSpec
from isocost.diffusion.guidance import GuidanceSchedule, Interval, check_schedule
from isocost.diffusion.solvers import solver_coefficients
from isocost.errors import ConfigError, RunError
from isocost.models.autoencoder import Autoencoder
from isocost.models.checkpoint import Checkpoint, CheckpointInfo, CheckpointSource, load_checkpoint, open_checkpoint
from isocost.models.component_costs import checkpoint_components
from isocost.models.components import load_checkpoint_autoencoder, load_checkpoint_text_encoder
from isocost.sampling.denoiser import Denoiser, SamplingDTypeName, torch_dtype
from isocost.sampling.generate import schedule_of
from isocost.sampling.guides import check_other_checkpoint, check_pair, has_same_text_encoder, weights_of_evaluations
from isocost.sampling.latency_stages import (
    DENOISER,
    END_TO_END,
    GUIDE,
    MIN_REPEATS,
    NUM_WARM_UP,
    BatchedPipeline,
    LoadedGuide,
    LoadedModel,
    Summary,
    time_run,
    time_runs,
)
from isocost.sampling.request import SampleRequest, passes_in_total
from isocost.utils.device import DeviceMonitor, DeviceSample, best_device, device_monitor
from isocost.utils.environment import provenance

logger = logging.getLogger(__name__)

DEFAULT_BATCHES = (1, 4)
DEFAULT_REPEATS = 20
DEFAULT_GUIDANCE, DEFAULT_UPSCALING_GUIDANCE = 2.0, 1.0
NO_GUIDE = "--guide-null-prompt: there is no guide to give the empty prompt to; give --guide, or leave it out"
"""The error for a null prompt of an absent guide."""


@dataclass(frozen=True)
class Memory:
    """Memory of the runs of one batch size. The bytes are None if the system does not report them.

    Attributes:
        kind: the counted memory.
        loaded_bytes: in use after loading, before the first run.
        peak_bytes: largest use during the runs.
        growth_bytes: peak_bytes - loaded_bytes.
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
        stages: by name, in order: `text`, `encoder` (super-resolution), `denoiser`, `decoder`, `whole` (end-to-end).
        ms_per_image: median end-to-end time / B.
        ms_per_evaluation: median time of the denoiser / evaluations of the solver (each with all passes of B images).
        nfe_per_image: network evaluations per image, including guidance's second pass and those of a guide.
        network_calls, network_rows: calls of the network and batch rows in them, counted during one run.
        guide_nfe_per_image, guide_calls, guide_rows: the same numbers for the guide alone; 0 without a guide.
        warm_up_ms: end-to-end times of the warm-up runs. With compilation, the first one compiles.
        energy_j, energy_j_per_image: of the whole device over the measured runs; None if the device does not report it.
        before, after: state of the device before and after the measured runs.
    """

    batch: int
    stages: dict[str, Summary]
    ms_per_image: float
    ms_per_evaluation: float
    nfe_per_image: int
    network_calls: int
    network_rows: int
    guide_nfe_per_image: int
    guide_calls: int
    guide_rows: int
    warm_up_ms: tuple[float, ...]
    memory: Memory
    energy_j: float | None
    energy_j_per_image: float | None
    before: DeviceSample
    after: DeviceSample


@dataclass(frozen=True)
class Latency:
    """The timed checkpoint, the settings, the device and the times. `notes` names missing readings and a busy machine."""

    checkpoint: dict[str, Any]
    settings: dict[str, Any]
    device: dict[str, Any]
    batches: tuple[BatchLatency, ...]
    notes: tuple[str, ...]
    provenance: dict[str, str]

    def document(self) -> dict[str, Any]:
        """Plain data for JSON, with unrounded times. `ms_per_image_by_batch` maps batch sizes to ms per image."""
        by_batch = {str(measured.batch): measured.ms_per_image for measured in self.batches}
        return {**asdict(self), "ms_per_image_by_batch": by_batch}


def latency(
    checkpoint: str | Path,
    *,
    solver: SolverSpec | None = None,
    num_steps: int | None = None,
    guidance: float | None = None,
    guide: str | Path | None = None,
    guide_null_prompt: bool = False,
    guidance_interval: Interval | None = None,
    guidance_schedule: GuidanceSchedule | None = None,
    batches: Sequence[int] = DEFAULT_BATCHES,
    repeats: int = DEFAULT_REPEATS,
    dtype: SamplingDTypeName = "fp32",
    compiled: bool = False,
    device: str | None = None,
) -> Latency:
    """Time a checkpoint: for each batch size, smallest first, `NUM_WARM_UP` warm-up runs and `repeats` measured runs.

    Args:
        checkpoint: a checkpoint folder or a published pipeline.
        solver: by default the checkpoint's own: DDIM, or LCM for a consistency student.
        num_steps: by default 16, and 4 for a few-step student.
        guidance: by default 2, and 1 for super-resolution.
        guide: a checkpoint that runs the second pass of guidance, with the same prompt. Both networks are on the device.
        guide_null_prompt: the guide gets the empty prompt.
        guidance_interval: (low, high) in log-SNR: elsewhere an evaluation takes one pass. None is an open end.
        guidance_schedule: w by log-SNR in place of `guidance`.
        batches: batch sizes.
        repeats: measured runs per batch size.
        dtype: of the denoiser.
        compiled: compile the denoiser, for each batch size.
        device: "cpu" or "cuda"; by default CUDA if there is a CUDA device.

    Raises:
        ConfigError: a checkpoint does not load; the checkpoint, the solver or the device does not support the settings; the
            guide does not fit; or an image contains NaN or inf.
        RunError: a batch does not fit into the device's memory.
    """
    if not batches or min(batches) < 1:
        raise ConfigError(f"batch = {min(batches, default=None)}: give one or more sizes of at least 1 (--batch 1 --batch 4)")
    if repeats < MIN_REPEATS:
        raise ConfigError(f"repeats = {repeats}: a median and its spread need at least {MIN_REPEATS}")
    if guide_null_prompt and guide is None:
        raise ConfigError(NO_GUIDE)
    target = _device(device, dtype)
    opened = load_checkpoint(checkpoint, device=target)
    info = opened.info
    if guidance_schedule is not None:
        guidance = max(weight for _, weight in check_schedule(guidance_schedule))
    if guidance is None:
        guidance = DEFAULT_GUIDANCE if info.scale is None else DEFAULT_UPSCALING_GUIDANCE
    guidance = info.effective_guidance(guidance)
    spec = info.resolve_solver(solver)
    noise = schedule_of(info)
    coefficients = solver_coefficients(spec, spec.steps_or(num_steps, info.num_steps), noise)
    weights = weights_of_evaluations(coefficients, noise, guidance, guidance_interval, guidance_schedule)
    name = None if guide is None else GUIDE
    # rejects an invalid guidance before more is loaded
    SampleRequest(0, 0, coefficients, guidance, guidance_per_evaluation=weights, guide=name)
    guide_source = None if guide is None else open_checkpoint(guide)
    if guide_source is not None:
        check_other_checkpoint(opened, guide_source, str(guide))
    model = load_components(opened, dtype, compiled, target)
    loaded_guide = None
    if guide_source is not None:
        _check_guide(opened, guide_source, str(guide), model.autoencoder)
        loaded_guide = load_guide(guide_source, dtype, compiled, target, model, has_same_text_encoder(opened, guide_source))
    monitor = device_monitor(target)
    loaded_bytes = monitor.memory_bytes()
    measured = []
    for batch_size in sorted(set(batches)):
        if compiled:
            torch.compiler.reset()  # each size has its own shape, and torch stops compiling a function after a few shapes
        try:
            pipeline = BatchedPipeline(model, coefficients, guidance, batch_size, weights, loaded_guide, guide_null_prompt)
            measured.append(_measure(pipeline, repeats, monitor, loaded_bytes))
        except torch.OutOfMemoryError as error:
            raise RunError(f"a batch of {batch_size} does not fit into the device's memory; use a smaller --batch") from error
    main_passes, guide_passes = passes_in_total(weights, model.network.embeds_guidance, guide is not None)
    components = checkpoint_components(opened, None if guide_null_prompt else guide_source)
    gflop_denoiser = main_passes * info.gflop_per_forward
    if guide_source is not None:
        gflop_denoiser += guide_passes * guide_source.info.gflop_per_forward
    settings = {
        "solver": spec.label,
        "replaced_scheduler": info.replaced_scheduler(solver) or None,
        "num_steps": info.num_steps if num_steps is None else num_steps,
        "num_function_evaluations": coefficients.num_function_evaluations,
        "guidance": guidance,
        "guide": None if guide_source is None else _guide_summary(guide_source, str(guide), guide_null_prompt),
        "guidance_interval": guidance_interval,
        "guidance_schedule": guidance_schedule,
        "passes_per_evaluation": max(map(model.passes_per_evaluation, weights)),
        "guided_evaluations": main_passes + guide_passes - len(weights),
        "gflop_per_image": gflop_denoiser + components.total,
        "gflop_parts": {
            "text": components.gflop_text,
            "encoder": components.gflop_encoder,
            "denoiser": gflop_denoiser,
            "decoder": components.gflop_decoder,
        },
        "dtype": {"text": "fp32", "denoiser": dtype, "decoder": "fp32"},
        "compiled": compiled,
        "repeats": repeats,
        "warm_up": NUM_WARM_UP,
        "timer": {"stages": monitor.clock.name, END_TO_END: "perf_counter"},
    }
    summary = {"folder": str(checkpoint), "digest": opened.digest, **_checkpoint_summary(info)}
    notes = (*monitor.notes, *load_notes(measured))
    return Latency(summary, settings, monitor.facts(), tuple(measured), notes, provenance())


def load_components(
    checkpoint: Checkpoint,
    dtype: SamplingDTypeName,
    compiled: bool,
    device: torch.device,
    vae: VaeSpec | None = None,
) -> LoadedModel:
    """Prepare the network of a checkpoint, and load its autoencoder with the settings `vae`, and its text encoder.

    Raises:
        ConfigError: the autoencoder or the text encoder cannot be loaded.
    """
    if compiled:
        torch.compiler.reset()  # torch stops compiling a function after a few shapes, also those of other checkpoints
    autoencoder = load_checkpoint_autoencoder(checkpoint, device, vae)
    network = Denoiser(checkpoint.network, dtype, compiled)
    return LoadedModel(checkpoint.info, network, autoencoder, load_checkpoint_text_encoder(checkpoint, device))


def load_guide(
    guide: CheckpointSource,
    dtype: SamplingDTypeName,
    compiled: bool,
    device: torch.device,
    main: LoadedModel,
    shares_text_encoder: bool,
) -> LoadedGuide:
    """Load a guide onto the device of the network that it guides.

    Args:
        guide: its checkpoint.
        dtype: it computes in it.
        compiled: compile it.
        device: of both networks.
        main: the network that it guides.
        shares_text_encoder: the text encoder of the network is also that of the guide.

    Raises:
        ConfigError: the network or the text encoder of the guide cannot be loaded.
    """
    network = Denoiser(guide.load_network(device, torch_dtype(dtype)), dtype, compiled)
    text_encoder = None if shares_text_encoder else load_checkpoint_text_encoder(guide, device)
    return LoadedGuide(guide.info, network, text_encoder, main)


def _check_guide(main: CheckpointSource, guide: CheckpointSource, name: str, autoencoder: Autoencoder) -> None:
    check_pair(main, guide, name, lambda source: autoencoder if source is main else load_checkpoint_autoencoder(source, "cpu"))


def _device(name: str | None, dtype: SamplingDTypeName) -> torch.device:
    if name not in (None, "cpu", "cuda"):
        raise ConfigError(f"device = {name}: choose cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = cuda: torch finds no CUDA device; use --device cpu")
    device = best_device() if name is None else torch.device(name)
    if dtype == "fp16" and device.type == "cpu":
        raise ConfigError("dtype = fp16: only CUDA devices support it here; on a CPU use --dtype fp32 or bf16")
    return device


def _measure(pipeline: BatchedPipeline, repeats: int, monitor: DeviceMonitor, loaded_bytes: int | None) -> BatchLatency:
    monitor.reset_peak()
    warm_up = tuple(time_run(pipeline, monitor.clock)[END_TO_END] for _ in range(NUM_WARM_UP))
    pipeline.check()
    logger.info(f"batch {pipeline.batch_size}: {repeats} runs, about {repeats * warm_up[-1] / 1000:.1f} s")
    before = monitor.read()
    times = time_runs(pipeline, monitor.clock, repeats)
    after = monitor.read()
    pipeline.check()
    stages = {stage: Summary.from_times(raw_ms) for stage, raw_ms in times.items()}
    peak_bytes = monitor.peak_bytes()
    growth = None if peak_bytes is None or loaded_bytes is None else peak_bytes - loaded_bytes
    energy = None if before.energy_j is None or after.energy_j is None else after.energy_j - before.energy_j
    return BatchLatency(
        batch=pipeline.batch_size,
        stages=stages,
        ms_per_image=stages[END_TO_END].median_ms / pipeline.batch_size,
        ms_per_evaluation=stages[DENOISER].median_ms / pipeline.requests[0].coefficients.num_function_evaluations,
        nfe_per_image=pipeline.results[0].nfe,
        network_calls=pipeline.call_counter.num_calls,
        network_rows=pipeline.call_counter.num_rows,
        guide_nfe_per_image=pipeline.results[0].guide_nfe,
        guide_calls=0 if pipeline.guide_counter is None else pipeline.guide_counter.num_calls,
        guide_rows=0 if pipeline.guide_counter is None else pipeline.guide_counter.num_rows,
        warm_up_ms=warm_up,
        memory=Memory(monitor.memory_kind, loaded_bytes, peak_bytes, growth),
        energy_j=energy,
        energy_j_per_image=None if energy is None else energy / (repeats * pipeline.batch_size),
        before=before,
        after=after,
    )


def load_notes(measured: Sequence[BatchLatency]) -> list[str]:
    """A note if more processes were ready to run than there are cores, because the times then include waiting."""
    samples = [sample for batch in measured for sample in (batch.before, batch.after)]
    loads = [sample.load_average_1m for sample in samples if sample.load_average_1m is not None]
    cores = os.cpu_count()
    if not loads or cores is None or max(loads) <= cores:
        return []
    return [f"load: up to {max(loads):.1f} processes competed for {cores} cores; the machine was not idle"]


def _guide_summary(guide: CheckpointSource, folder: str, null_prompt: bool) -> dict[str, Any]:
    return {"folder": folder, "digest": guide.digest, **_checkpoint_summary(guide.info), "null_prompt": null_prompt}


def _checkpoint_summary(info: CheckpointInfo) -> dict[str, Any]:
    return {
        "task": info.task,
        "size": info.label,
        "distilled": info.distilled or None,
        "resolution": info.resolution,
        "scale": info.scale,
        "num_parameters": info.num_parameters,
        "gflop_per_forward": info.gflop_per_forward,
    }
