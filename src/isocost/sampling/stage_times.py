"""Milliseconds of the stages of sampling, each measured separately on full batches.

A sweep generates the images of many points in one stream, and decodes while it denoises. Its own duration cannot be divided
among the points: decoding belongs to an image, and evaluations belong to a number of steps. So the stages are measured before
the stream starts, and the time of a point follows from its number of evaluations.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from isocost.models.autoencoder import Autoencoder, images_per_call
from isocost.sampling.engine import Engine
from isocost.sampling.request import SampleRequest, SampleResult
from isocost.utils.device import device_monitor

MIN_REPEATS, MAX_REPEATS = 2, 5
ENOUGH_SECONDS = 0.2
"""The measurement of a stage is repeated until it has taken this time in all."""


@dataclass(frozen=True)
class StageTimes:
    """Milliseconds of each stage, by throughput on full batches.

    Attributes:
        ms_per_prompt: text encoder, per prompt.
        ms_per_evaluation: network, per evaluation of one image.
        ms_per_decoded_image: decoder, per image.
        ms_per_guide_evaluation: guide network, per evaluation of one image.
    """

    ms_per_prompt: float
    ms_per_evaluation: float
    ms_per_decoded_image: float
    ms_per_guide_evaluation: float = 0.0

    def ms_per_image(self, num_evaluations: float, num_guide_evaluations: float = 0) -> float:
        """Milliseconds of an image: its prompt, its evaluations and those of its guide, and its decoding."""
        evaluating = num_evaluations * self.ms_per_evaluation + num_guide_evaluations * self.ms_per_guide_evaluation
        return self.ms_per_prompt + evaluating + self.ms_per_decoded_image

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def measure_stage_times(
    engine: Engine,
    autoencoder: Autoencoder,
    requests: Sequence[SampleRequest],
    ms_per_prompt: float,
    now: Callable[[], float] = time.perf_counter,
) -> StageTimes:
    """Measure the network and the decoder after one run of each as warm-up.

    Args:
        engine: the engine of the sweep.
        autoencoder: decodes the latents.
        requests: a full batch. Their first evaluations must not be in the engine's cache, so give each call seeds of its own.
        ms_per_prompt: time of the text encoder, which runs before the sweep.
        now: seconds since an arbitrary origin.
    """
    results: list[SampleResult] = []

    def evaluate() -> int:
        results[:] = engine.run(requests)
        return sum(result.nfe_executed for result in results)

    def decode() -> int:
        first = results[0].latent
        batch = images_per_call(first.shape[-1] * autoencoder.factor)
        latents = torch.stack([result.latent.nan_to_num() for result in results[:batch]])
        autoencoder.decode(torch.cat([latents, first.new_zeros(batch - len(latents), *first.shape)])).cpu()
        return batch

    return StageTimes(ms_per_prompt, _milliseconds(evaluate, engine, now), _milliseconds(decode, engine, now))


def measure_guide(
    times: StageTimes, engine: Engine, requests: Sequence[SampleRequest], now: Callable[[], float] = time.perf_counter
) -> StageTimes:
    """Add the time of a guide to the times of the other stages.

    Args:
        times: of the other stages.
        engine: the engine of the sweep.
        requests: a full batch with the guide.
        now: seconds since an arbitrary origin.
    """
    guide_evaluations = 0.0

    def evaluate() -> int:
        nonlocal guide_evaluations
        results = list(engine.run(requests))
        guide_evaluations = sum(result.guide_nfe for result in results) / len(results)
        return len(results)

    ms_of_both = _milliseconds(evaluate, engine, now)
    main_evaluations = requests[0].coefficients.num_function_evaluations
    ms_of_guide = max(0.0, ms_of_both - main_evaluations * times.ms_per_evaluation)
    return replace(times, ms_per_guide_evaluation=ms_of_guide / guide_evaluations)


def _milliseconds(stage: Callable[[], int], engine: Engine, now: Callable[[], float]) -> float:
    """Median milliseconds per unit of work, of which `stage` returns the number, after one run as warm-up."""
    clock = device_monitor(engine.device).clock
    stage()
    durations: list[float] = []
    per_unit: list[float] = []
    while len(durations) < MIN_REPEATS or (sum(durations) < ENOUGH_SECONDS and len(durations) < MAX_REPEATS):
        clock.wait()
        started = now()
        num_units = stage()
        clock.wait()
        durations.append(now() - started)
        per_unit.append(1000 * durations[-1] / num_units)
    return statistics.median(per_unit)
