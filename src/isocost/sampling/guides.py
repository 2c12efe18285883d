"""Guide networks: the checks that a checkpoint can guide another one, and the guide as a part of the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from isocost.config.types import DTypeName
from isocost.diffusion.guidance import GuidanceSchedule, Interval, check_interval, guidance_per_evaluation
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.philox import INITIAL_NOISE, philox_normal
from isocost.diffusion.solvers import SolverCoefficients
from isocost.errors import ConfigError
from isocost.models.autoencoder import Autoencoder
from isocost.models.checkpoint import CheckpointInfo, CheckpointSource
from isocost.sampling.denoiser import Denoiser
from isocost.sampling.engine import GuideNetwork
from isocost.sampling.generate import CachedPromptKV, PromptEmbeds, schedule_of

LATENT_SIZE = 8
MAX_GREY_LEVELS = 2.0
"""Mean difference of two decoded images up to which two autoencoders are one, stored in different dtypes."""


def check_guide(main: CheckpointInfo, guide: CheckpointInfo) -> None:
    """Check that a checkpoint can guide another one: the same shape of latents and the same noise schedule.

    The prediction types may differ; then both predictions are converted to x0.

    Raises:
        ConfigError: a shape or the noise schedule differs, or one of the two has its guidance as an input.
    """
    pair = f"{guide.label} cannot guide {main.label}"
    for info in (main, guide):
        if info.model.embeds_guidance:
            raise ConfigError(
                f"{pair}: {info.label} was trained with its guidance as an input; choose a model that was not distilled"
            )
    shapes = [f"{model.latent_channels} x {model.latent_size} x {model.latent_size}" for model in (main.model, guide.model)]
    if shapes[0] != shapes[1]:
        raise ConfigError(f"{pair}: its latents are {shapes[1]}, not {shapes[0]}; choose a guide of the same latent space")
    if main.model.extra_input_channels != guide.model.extra_input_channels:
        raise ConfigError(
            f"{pair}: one of them has a low-resolution image as an input, the other has not; choose a guide of the same task"
        )
    schedules = schedule_of(main), schedule_of(guide)
    if not all(
        np.array_equal(getattr(schedules[0], name), getattr(schedules[1], name)) for name in ("alpha", "sigma", "timesteps")
    ):
        raise ConfigError(f"{pair}: it was trained on another noise schedule; choose a guide with the same schedule")


@torch.inference_mode()
def check_same_latent_space(main: Autoencoder, guide: Autoencoder, guide_name: str) -> None:
    """Check that the autoencoders of two checkpoints decode the same latent to the same image.

    Raises:
        ConfigError: they do not.
    """
    problem = f"guide {guide_name}: its autoencoder decodes other images; choose a guide of the same latent space"
    if (main.latent_channels, main.factor) != (guide.latent_channels, guide.factor):
        raise ConfigError(problem)
    shape = (main.latent_channels, LATENT_SIZE, LATENT_SIZE)
    latent = philox_normal(torch.tensor([0]), torch.tensor([0]), INITIAL_NOISE, shape, torch.device("cpu"))
    first, second = (autoencoder.decode(latent).float().cpu() for autoencoder in (main, guide))
    if (first - second).abs().mean() > MAX_GREY_LEVELS:
        raise ConfigError(problem)


def check_pair(
    main: CheckpointSource,
    guide: CheckpointSource,
    guide_name: str,
    load_autoencoder: Callable[[CheckpointSource], Autoencoder],
) -> None:
    """Check that a checkpoint can guide another one, by the metadata and the autoencoders of both.

    Args:
        main: the checkpoint that is guided.
        guide: its guide.
        guide_name: the guide as the request names it.
        load_autoencoder: returns the autoencoder of one of the two.

    Raises:
        ConfigError: the guide is the same checkpoint, or has another latent space or noise schedule.
    """
    check_other_checkpoint(main, guide, guide_name)
    if not has_same_autoencoder(main, guide):
        check_same_latent_space(load_autoencoder(main), load_autoencoder(guide), guide_name)


def check_other_checkpoint(main: CheckpointSource, guide: CheckpointSource, guide_name: str) -> None:
    """Check that a checkpoint can guide another one, by the metadata of both, before their parts are loaded.

    Args:
        main: the checkpoint that is guided.
        guide: its guide.
        guide_name: the guide as the request names it.

    Raises:
        ConfigError: the guide is the same checkpoint, or has another shape of latents or noise schedule.
    """
    if guide.digest == main.digest:
        raise ConfigError(f"guide {guide_name}: a model cannot guide itself; give a smaller or less trained one")
    check_guide(main.info, guide.info)


def has_same_autoencoder(main: CheckpointSource, guide: CheckpointSource) -> bool:
    """Whether two checkpoints that isocost trained name the same autoencoder, so that their images need no comparison."""
    if main.info.pretrained is not None or guide.info.pretrained is not None:
        return False
    names = [(Path(source.autoencoder_path).resolve(), source.info.autoencoder_subfolder) for source in (main, guide)]
    return names[0] == names[1]


def has_same_text_encoder(main: CheckpointSource, guide: CheckpointSource) -> bool:
    """Whether two checkpoints that isocost trained name the same text encoder, so that a prompt is encoded once for both."""
    return main.info.pretrained is None and guide.info.pretrained is None and main.text_encoder == guide.text_encoder


def weights_of_evaluations(
    coefficients: SolverCoefficients,
    noise: NoiseSchedule,
    guidance: float,
    interval: Interval | None = None,
    schedule: GuidanceSchedule | None = None,
) -> tuple[float, ...]:
    """Return the guidance weight of every evaluation of a solver; see `guidance_per_evaluation`.

    Args:
        coefficients: of the solver.
        noise: noise schedule of the network.
        guidance: w, where no schedule is given.
        interval: noise levels with guidance; None is all.
        schedule: w by noise level.

    Raises:
        ConfigError: the interval is empty, or lies outside of the noise schedule.
    """
    if interval is not None:
        check_interval(interval, noise)
    return guidance_per_evaluation(coefficients.alpha, coefficients.sigma, guidance, interval, schedule)


def make_guide(
    network: nn.Module | Denoiser,
    info: CheckpointInfo,
    prompts: PromptEmbeds,
    *,
    dtype: DTypeName = "fp32",
    compiled: bool = False,
) -> GuideNetwork:
    """Make a guide for an engine of a checkpoint's network, which is changed in place.

    Args:
        network: the guide. A `Denoiser` has its dtype and compilation.
        info: its checkpoint.
        prompts: the prompts of the engine, as embeddings for the guide.
        dtype: the guide computes in it.
        compiled: compile the guide for one shape.
    """
    denoiser = network if isinstance(network, Denoiser) else Denoiser(network, dtype, compiled)
    keys_values = CachedPromptKV(prompts, denoiser)
    return GuideNetwork(denoiser.denoise(), info.prediction_type, keys_values, keys_values.null)
