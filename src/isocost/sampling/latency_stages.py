"""Stage times of a batch of images, in milliseconds, from prompts to uint8 images in host memory.

A run is the work for one caller: tokenise and encode the prompts, (super-resolution) encode the small images, denoise, decode.
The stages are timestamps within the run, so they add up to the end-to-end time except for the time of the timestamps. The
network calls are those of the engine: one call per evaluation, with a slot for every pass of every image that the evaluation
takes. A guide has a call of its own, in the evaluations with guidance.

Shapes: B images of a batch, C L latent, T tokens, D width of the prompt embeddings, R resolution.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from isocost.data.degradations import encode_enlarged
from isocost.diffusion.solvers import SolverCoefficients
from isocost.errors import ConfigError
from isocost.models.autoencoder import Autoencoder, images_per_call
from isocost.models.checkpoint import CheckpointInfo
from isocost.models.text_encoder import TextEncoder
from isocost.sampling.denoiser import Denoiser
from isocost.sampling.engine import Engine, GuideNetwork
from isocost.sampling.generate import PromptEmbeds
from isocost.sampling.request import Denoise, SampleRequest, SampleResult, passes_per_evaluation
from isocost.utils.device import DeviceMonitor, HostTimer, Timer

TEXT, ENCODER, DENOISER, DECODER, END_TO_END = "text", "encoder", "denoiser", "decoder", "whole"
GUIDE = "guide"
"""Name of the guide in the engine."""
NUM_WARM_UP = 3
MIN_REPEATS = 3
MAX_REPEATS, ENOUGH_MS = 20, 1000.0
"""Limits of the repeats in `measure_latency_ms`."""
ENOUGH_ENERGY_S = 2.0
"""Shortest measurement of energy in seconds."""

StageCallback = Callable[[str], None]
"""Called with the name of a stage when the stage has ended."""
TimedRun = Callable[[StageCallback], None]
"""Executes all stages in order and calls the callback after each one."""


# --- times ---


@dataclass(frozen=True)
class Summary:
    """Times of one stage.

    Attributes:
        median_ms: median.
        mad_ms: median absolute deviation from the median.
        p90_ms: 90th percentile, interpolated linearly between two times.
        raw_ms: all times, in the order of the measurement, unrounded.
    """

    median_ms: float
    mad_ms: float
    p90_ms: float
    raw_ms: tuple[float, ...]

    @classmethod
    def from_times(cls, raw_ms: list[float]) -> Summary:
        """Summarise times in milliseconds.

        Raises:
            ConfigError: there are fewer than `MIN_REPEATS` times.
        """
        if len(raw_ms) < MIN_REPEATS:
            raise ConfigError(f"{len(raw_ms)} times: a median and its spread need at least {MIN_REPEATS}")
        values = np.array(raw_ms)
        median = float(np.median(values))
        deviation = float(np.median(np.abs(values - median)))
        return cls(median, deviation, float(np.percentile(values, 90)), tuple(raw_ms))


def time_run(run: TimedRun, clock: Timer, host_clock: Timer | None = None) -> dict[str, float]:
    """Time the stages of one run.

    Args:
        run: the run.
        clock: times the stages.
        host_clock: times the end-to-end time; `HostTimer` by default.

    Returns:
        Milliseconds by stage, and end-to-end.
    """
    host_clock = host_clock or HostTimer()
    names: list[str] = []
    clock.wait()
    started = host_clock.record()
    timestamps = [clock.record()]

    def on_stage_end(stage: str) -> None:
        names.append(stage)
        timestamps.append(clock.record())

    run(on_stage_end)
    clock.wait()
    end_to_end = host_clock.elapsed_ms(started, host_clock.record())
    stages = {name: clock.elapsed_ms(*ends) for name, ends in zip(names, pairwise(timestamps), strict=True)}
    return {**stages, END_TO_END: end_to_end}


def time_runs(run: TimedRun, clock: Timer, repeats: int, host_clock: Timer | None = None) -> dict[str, list[float]]:
    """Milliseconds of `repeats` runs: one list per stage and one end-to-end."""
    times = [time_run(run, clock, host_clock) for _ in range(repeats)]
    return {stage: [single[stage] for single in times] for stage in times[0]}


def measure_latency_ms(run: TimedRun, clock: Timer, host_clock: Timer | None = None) -> tuple[float, int]:
    """Measure the end-to-end time of a run after `NUM_WARM_UP` runs as warm-up.

    The measurement is repeated until it has taken `ENOUGH_MS` in all, between `MIN_REPEATS` and `MAX_REPEATS` times.

    Returns:
        Median in milliseconds, and the number of measured runs.
    """
    for _ in range(NUM_WARM_UP):
        time_run(run, clock, host_clock)
    times: list[float] = []
    while len(times) < MIN_REPEATS or (sum(times) < ENOUGH_MS and len(times) < MAX_REPEATS):
        times.append(time_run(run, clock, host_clock)[END_TO_END])
    return Summary.from_times(times).median_ms, len(times)


def measure_joules(
    run: BatchedPipeline, monitor: DeviceMonitor, now: Callable[[], float] = time.perf_counter
) -> tuple[float, int]:
    """Measure the energy of the images of a run after one run as warm-up.

    The counter of a device changes several times a second, so runs are repeated for at least `ENOUGH_ENERGY_S` seconds.

    Args:
        run: images of one batch.
        monitor: of a device that reports its energy.
        now: seconds since an arbitrary origin.

    Returns:
        Joules of the whole device per image, and the number of measured images.
    """
    run(lambda stage: None)
    monitor.clock.wait()
    before, started, num_images = monitor.read().energy_j, now(), 0
    while num_images == 0 or now() - started < ENOUGH_ENERGY_S:
        run(lambda stage: None)
        num_images += run.batch_size
        monitor.clock.wait()
    after = monitor.read().energy_j
    assert before is not None, "the caller has read it"
    assert after is not None, "the caller has read it"
    return (after - before) / num_images, num_images


# --- the timed work ---


class CallCounter:
    """A network for the engine that counts its calls and the batch rows in them."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise = denoise
        self.num_calls = self.num_rows = 0
        self._lock = Lock()

    def __call__(self, x: Tensor, timesteps: Tensor, prompt_embeds: Tensor, guidance: Tensor) -> Tensor:
        """As `isocost.sampling.engine.Denoise`."""
        with self._lock:  # an engine calls it from several threads
            self.num_calls += 1
            self.num_rows += len(x)
        return self.denoise(x, timesteps, prompt_embeds, guidance)


class LoadedModel:
    """A checkpoint with its autoencoder and text encoder, on one device.

    The text encoder and the autoencoder compute in float32, as in all sampling; the network computes in its own dtype. The
    empty prompt belongs to the checkpoint: it is encoded and projected here, once.
    """

    def __init__(self, info: CheckpointInfo, network: Denoiser, autoencoder: Autoencoder, text_encoder: TextEncoder) -> None:
        self.info, self.network, self.autoencoder, self.text_encoder = info, network, autoencoder, text_encoder
        self.null = _null_prompt(network, text_encoder)

    def passes_per_evaluation(self, guidance: float) -> int:
        """Network passes per evaluation of the solver."""
        return passes_per_evaluation(guidance, self.network.embeds_guidance)


class LoadedGuide:
    """A guide on the device of the network that it guides. It needs no autoencoder.

    Attributes:
        text_encoder: its own text encoder; None if it is that of the network.
        null: keys and values of the empty prompt, [T, K].
    """

    def __init__(self, info: CheckpointInfo, network: Denoiser, text_encoder: TextEncoder | None, main: LoadedModel) -> None:
        """
        Args:
            info: metadata of the guide's checkpoint.
            network: the guide.
            text_encoder: see the attribute.
            main: the network that it guides.
        """
        self.info, self.network, self.text_encoder = info, network, text_encoder
        self.null = _null_prompt(network, text_encoder or main.text_encoder)


def _null_prompt(network: Denoiser, text_encoder: TextEncoder) -> Tensor:
    return network.project(PromptEmbeds.encode((), text_encoder).null[None])[0]


class BatchedPipeline:
    """A `TimedRun` over a batch of B images; each has its own prompt and, for super-resolution, its own small image.

    Args:
        model: the network with its autoencoder and text encoder.
        coefficients: of the solver.
        guidance: w.
        batch_size: B.
        guidance_per_evaluation: w at each evaluation of the solver; None is `guidance` at each.
        guide: the network that runs the second passes; None is the network itself with the empty prompt.
        guide_is_unconditional: the guide gets the empty prompt.

    Attributes:
        requests: of the images.
        results: of the last run, in the order of the images.
        images: of the last run, uint8 [B, 3, R, R] on the CPU.
        call_counter: calls of the network in the last run.
        guide_counter: calls of the guide in the last run; None without a guide.

    Raises:
        ConfigError: the batch size is below 1, or a request does not accept the guidance.
    """

    def __init__(
        self,
        model: LoadedModel,
        coefficients: SolverCoefficients,
        guidance: float,
        batch_size: int,
        guidance_per_evaluation: tuple[float, ...] | None = None,
        guide: LoadedGuide | None = None,
        guide_is_unconditional: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch = {batch_size}: give a size of at least 1")
        self.model, self.batch_size = model, batch_size
        info, network = model.info, model.network
        self.prompts = [f"a red circle and {number} blue squares on a white background" for number in range(batch_size)]
        self.requests = [
            SampleRequest(
                number,
                number,
                coefficients,
                guidance,
                guidance_per_evaluation=guidance_per_evaluation,
                guide=None if guide is None else GUIDE,
                guide_is_unconditional=guide_is_unconditional,
            )
            for number in range(batch_size)
        ]
        self.guide = guide
        has_guide_prompts = guide is not None and not guide_is_unconditional
        self._guide_text_encoder = guide.text_encoder if guide is not None and has_guide_prompts else None
        weights = self.requests[0].weights
        num_passes = 1 if guide is not None else max(map(model.passes_per_evaluation, weights))
        size = info.resolution // (info.scale or 1)
        generator = torch.Generator().manual_seed(0)
        self.low_resolution = torch.randint(0, 256, (batch_size, 3, size, size), generator=generator, dtype=torch.uint8)
        self.call_counter = CallCounter(network.denoise())
        self.results: list[SampleResult] = []
        self.images = torch.empty(0, 3, info.resolution, info.resolution, dtype=torch.uint8)
        self._prompt_embeds = self._guide_prompt_embeds = torch.empty(0)
        shape = (info.model.latent_channels, info.model.latent_size, info.model.latent_size)
        self._concat_cond = torch.zeros(batch_size, *shape, device=network.device)
        self._engine = Engine(
            self.call_counter,
            info.prediction_type,
            lambda indices: network.project(self._prompt_embeds[indices.to(self._prompt_embeds.device)]),
            model.null,
            shape,
            batch_size * num_passes,
            network.device,
            embeds_guidance=network.embeds_guidance,
            concat_cond=None if info.scale is None else lambda ids: self._concat_cond[ids.to(self._concat_cond.device)],
            skips_empty_slots=True,
        )
        self.guide_counter = None if guide is None else self._add_guide(guide)

    def _add_guide(self, guide: LoadedGuide) -> CallCounter:
        counter, network = CallCounter(guide.network.denoise()), guide.network

        def prompt_embeds(indices: Tensor) -> Tensor:
            embeds = self._prompt_embeds if self._guide_text_encoder is None else self._guide_prompt_embeds
            return network.project(embeds[indices.to(embeds.device)])

        self._engine.add_guide(GUIDE, GuideNetwork(counter, guide.info.prediction_type, prompt_embeds, guide.null))
        return counter

    def __call__(self, on_stage_end: StageCallback) -> None:
        """Run from prompts to images once."""
        for counter in filter(None, (self.call_counter, self.guide_counter)):
            counter.num_calls = counter.num_rows = 0
        info, autoencoder, device = self.model.info, self.model.autoencoder, self.model.network.device
        self._prompt_embeds = self.model.text_encoder.encode(self.prompts)
        if self._guide_text_encoder is not None:
            self._guide_prompt_embeds = self._guide_text_encoder.encode(self.prompts)
        on_stage_end(TEXT)
        if info.scale is not None:
            chunks = self.low_resolution.to(device).split(images_per_call(info.resolution))
            self._concat_cond = torch.cat([encode_enlarged(autoencoder, chunk, info.resolution) for chunk in chunks])
            on_stage_end(ENCODER)
        self.results = sorted(self._engine.run(self.requests), key=lambda result: result.request.sample_index)
        on_stage_end(DENOISER)
        latents = torch.stack([result.latent for result in self.results])
        self.images = torch.cat(
            [autoencoder.decode(chunk).cpu() for chunk in latents.nan_to_num().split(images_per_call(info.resolution))]
        )
        on_stage_end(DECODER)

    def check(self) -> None:
        """
        Raises:
            ConfigError: an image of the last run contains NaN or inf.
        """
        nonfinite = [result.request.sample_index for result in self.results if not result.finite]
        if nonfinite:
            raise ConfigError(
                f"image {nonfinite[0]} of {self.batch_size} contains NaN or inf; lower the guidance or use dtype fp32"
            )
