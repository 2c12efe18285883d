"""Configuration of the autoencoder, the text encoder and the denoiser."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from isocost.config.base import LocalPath, Spec
from isocost.config.types import (
    MAX_CHANNELS,
    MAX_RESOLUTION,
    MAX_SAMPLES,
    MAX_TOKENS,
    Channels,
    ImagesSeen,
    Layers,
    LearningRate,
    Seed,
    SweepBatch,
    Weight,
)

FamilyKind = Literal["unet", "dit"]
MAX_LATENT_CHANNELS = 1024


# --- autoencoder and text encoder ---


class PCAAutoencoderSpec(Spec):
    """A PCA of image patches, fitted in seconds: `patch` x `patch` pixels to `num_channels` components."""

    kind: Literal["pca"]
    patch: int = Field(ge=2, le=256, description="size of a patch, pixels")
    num_channels: int = Field(ge=1, le=MAX_LATENT_CHANNELS, description="latent channels")
    num_fit_images: int = Field(2000, ge=16, le=MAX_SAMPLES, description="images that the PCA is fitted to")


class TrainedAutoencoderSpec(Spec):
    """A diffusers AutoencoderKL, trained on `data.train` with an L1, a perceptual and a KL loss."""

    kind: Literal["kl"]
    block_widths: tuple[Channels, ...] = Field(
        min_length=1, max_length=10, description="channels per level; each level after the first halves the resolution"
    )
    num_channels: int = Field(ge=1, le=MAX_LATENT_CHANNELS, description="latent channels")
    num_images: ImagesSeen = Field(description="images seen in training")
    batch_size: SweepBatch = 32
    lr: LearningRate = 1e-3
    layers_per_block: Layers = 1
    kl_weight: Weight = 1e-4
    perceptual_weight: Weight = 0.1
    perceptual_fraction: float = Field(1.0, gt=0, le=1, description="fraction of each batch in the perceptual loss")
    perceptual: str = Field(
        "efficientnet-lite0", description="`efficientnet-lite0`, or a safetensors file of AlexNet for LPIPS"
    )
    seed: Seed = 0


class PretrainedAutoencoderSpec(Spec):
    """A pretrained diffusers autoencoder: a Hub id, a local folder, or the built-in `scenes`."""

    kind: Literal["pretrained"]
    path: LocalPath
    subfolder: str | None = None


AutoencoderSpec = Annotated[
    PCAAutoencoderSpec | TrainedAutoencoderSpec | PretrainedAutoencoderSpec, Field(discriminator="kind")
]


class TextEncoderSpec(Spec):
    """A text encoder of the transformers library: a Hub id, a local folder, or `minilm` (extra `demo`)."""

    path: LocalPath = "minilm"
    max_tokens: int = Field(32, ge=4, le=MAX_TOKENS)
    subfolder: str | None = None
    cache_prompt_embeds: bool = Field(
        True, description="store the embeddings of each distinct caption; if false, encode at every step"
    )


# --- denoiser ---


class FamilySpec(Spec):
    """A size family, in which networks differ only in the width c.

    `unet` are U-Nets with block widths [c, 2c, 4c, 4c] (arXiv 2404.01367). U-Nets with fewer levels or layers are another
    family, for machines that cannot run the paper's depth. `dit` are transformers; their depth and heads follow from c
    (`models/dit.py`).
    """

    kind: FamilyKind = "unet"
    widths: tuple[Channels, ...] = Field(description="one network per width c")
    layers_per_block: Layers = 2
    num_levels: int = Field(4, ge=2, le=4, description="the block widths are the first `num_levels` of [c, 2c, 4c, 4c]")
    patch: int | None = Field(
        None,
        ge=1,
        le=MAX_RESOLUTION,
        description="dit: size of a token in the latent; if absent 2, or 1 for latents below 16 x 16",
    )

    @field_validator("widths")
    @classmethod
    def _distinct(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(widths)) != len(widths) or not widths:
            raise ValueError("give at least one width, and each width once")
        return widths

    @model_validator(mode="after")
    def _of_its_kind(self) -> FamilySpec:
        if self.kind == "dit" and (self.layers_per_block, self.num_levels) != (2, 4):
            raise ValueError(
                "layers_per_block and num_levels are for kind: unet; remove them: a transformer's depth follows from its width"
            )
        if self.kind == "unet" and self.patch is not None:
            raise ValueError("patch is for kind: dit; remove it, or choose kind: dit")
        return self


class ModelSpec(Spec):
    """One network.

    Attributes:
        latent_channels, latent_size: shape [C, L, L] of the latent.
        cross_attention_dim: width of the prompt embeddings.
    """

    kind: FamilyKind = "unet"
    width: Channels
    latent_channels: Channels = 4
    latent_size: int = Field(64, ge=1, le=MAX_RESOLUTION)
    cross_attention_dim: Channels = 1024
    extra_input_channels: int = Field(0, ge=0, le=MAX_CHANNELS)
    layers_per_block: Layers = 2
    num_levels: int = Field(4, ge=2, le=4)
    guidance_embed_dim: Channels | None = Field(
        None, description="width of the guidance embedding, for students with w as an input; 1 is w itself"
    )
    adapter: Literal["none", "noisy", "concat_cond"] = Field("none", description="CoDi: input of the second encoder")
    patch: int | None = Field(
        None, ge=1, le=MAX_RESOLUTION, description="dit: size of a token in the latent; chosen by latent_size if absent"
    )

    @property
    def embeds_guidance(self) -> bool:
        """True for a student with w as an input, which needs one pass."""
        return self.guidance_embed_dim is not None
