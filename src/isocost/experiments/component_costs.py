"""GFLOP of a study's text encoder and autoencoder, from its configuration: no weights and no data are needed."""

from __future__ import annotations

from functools import lru_cache

import torch

from isocost.config.model import PCAAutoencoderSpec, PretrainedAutoencoderSpec, TrainedAutoencoderSpec
from isocost.config.sampling import VaeSpec
from isocost.config.study import StudySpec
from isocost.models.component_costs import (
    AutoencoderCost,
    ComponentCosts,
    autoencoder_cost,
    autoencoder_cost_at,
    pca_autoencoder_cost,
    text_encoder_gflop,
)
from isocost.training.autoencoder import build_autoencoder


def study_component_costs(study: StudySpec, vae: VaeSpec, *, with_encoder: bool = False) -> ComponentCosts:
    """Return the costs of a study's text encoder and autoencoder for one image.

    Args:
        study: a study that trains its networks.
        vae: settings of the autoencoder.
        with_encoder: the image is also encoded, as in super-resolution.

    Raises:
        ConfigError: the text encoder or the autoencoder is not there.
    """
    cost = _autoencoder_cost(study, vae)
    return ComponentCosts(text_encoder_gflop(study.text_encoder), cost.encode_gflop if with_encoder else 0.0, cost.decode_gflop)


def _autoencoder_cost(study: StudySpec, vae: VaeSpec) -> AutoencoderCost:
    spec, resolution = study.training_parts.autoencoder, study.data.resolution
    if isinstance(spec, PretrainedAutoencoderSpec):
        return autoencoder_cost_at(spec.path, spec.subfolder, resolution, vae)
    if isinstance(spec, PCAAutoencoderSpec):
        return pca_autoencoder_cost(spec.num_channels, resolution)
    return _trained_autoencoder_cost(spec, resolution, vae)


@lru_cache(maxsize=16)
def _trained_autoencoder_cost(spec: TrainedAutoencoderSpec, resolution: int, vae: VaeSpec) -> AutoencoderCost:
    with torch.device("meta"):
        network = build_autoencoder(spec, resolution)
    return autoencoder_cost(network.config, resolution, vae)
