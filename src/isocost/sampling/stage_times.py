"""Milliseconds of the stages of sampling, each measured separately on full batches.

A sweep generates the images of many points in one stream, and decodes while it denoises. Its own duration cannot be divided
among the points: decoding belongs to an image, and evaluations belong to a number of steps. So the stages are measured before
the stream starts, and the time of a point follows from its number of evaluations.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

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
    """

    ms_per_prompt: float
    ms_per_evaluation: float
    ms_per_decoded_image: float

    def ms_per_image(self, num_function_evaluations: float) -> float:
        """Milliseconds of an image: its prompt, its evaluations and its decoding."""
        return self.ms_per_prompt + num_function_evaluations * self.ms_per_evaluation + self.ms_per_decoded_image

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
    clock = device_monitor(engine.device).clock
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

    def milliseconds(stage: Callable[[], int]) -> float:
        """Median milliseconds per unit of work; `stage` returns the number of units it did."""
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

    return StageTimes(ms_per_prompt, milliseconds(evaluate), milliseconds(decode))
