"""Guide networks: the checks that a checkpoint can guide another one, and the guide as a part of the engine."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from isocost.config.types import DTypeName
from isocost.diffusion.philox import INITIAL_NOISE, philox_normal
from isocost.errors import ConfigError
from isocost.models.autoencoder import Autoencoder
from isocost.models.checkpoint import CheckpointInfo
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
    shapes = [(model.latent_channels, model.latent_size, model.extra_input_channels) for model in (main.model, guide.model)]
    if shapes[0] != shapes[1]:
        texts = [f"{channels} x {size} x {size}" for channels, size, _ in shapes]
        raise ConfigError(f"{pair}: its latents are {texts[1]}, not {texts[0]}; choose a guide of the same latent space")
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
