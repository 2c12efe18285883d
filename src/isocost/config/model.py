"""Configuration of the autoencoder, the text encoder and the denoising network."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from isocost.config.base import Spec

FamilyKind = Literal["unet", "dit"]


# --- autoencoder and captions -----------------------------------------------------------------------------------------------


class PCAAutoencoderSpec(Spec):
    """Patch PCA fitted in seconds: `patch` x `patch` pixels to `num_channels` components. The baseline."""

    kind: Literal["pca"]
    patch: int = Field(ge=2)
    num_channels: int = Field(ge=1)
    num_fit_images: int = Field(2000, ge=16)


class TrainedAutoencoderSpec(Spec):
    """A diffusers AutoencoderKL trained on the study's own images: L1 + perceptual + KL."""

    kind: Literal["kl"]
    block_widths: tuple[int, ...] = Field(description="channels by level; each level after the first halves the side")
    num_channels: int = Field(ge=1)
    num_images: int = Field(ge=1, description="images shown in training")
    batch_size: int = Field(32, ge=1)
    lr: float = Field(1e-3, gt=0)
    layers_per_block: int = Field(1, ge=1)
    kl_weight: float = Field(1e-4, ge=0)
    perceptual_weight: float = Field(0.1, ge=0)
    perceptual_fraction: float = Field(1.0, gt=0, le=1, description="share of each batch that the perceptual term sees")
    perceptual: str = Field("efficientnet-lite0", description="that, or a safetensors file of AlexNet for LPIPS")
    seed: int = 0


class PretrainedAutoencoderSpec(Spec):
    """Any diffusers autoencoder: a Hub id, a local folder, or `scenes` (shipped with isocost)."""

    kind: Literal["pretrained"]
    path: str
    subfolder: str | None = None


AutoencoderSpec = Annotated[
    PCAAutoencoderSpec | TrainedAutoencoderSpec | PretrainedAutoencoderSpec, Field(discriminator="kind")
]


class TextEncoderSpec(Spec):
    """Captions to states through a transformers text encoder: a Hub id, a local folder, or `minilm` (extra `demo`)."""

    path: str = "minilm"
    max_tokens: int = Field(32, ge=4)
    subfolder: str | None = None
    cache_prompt_embeds: bool = Field(True, description="keep the states of every distinct caption; else encode in each step")


# --- models -----------------------------------------------------------------------------------------------------------


class FamilySpec(Spec):
    """Networks that differ in one dial, the width c: U-Nets of block widths [c, 2c, 4c, 4c] (arXiv 2404.01367), or `dit`.

    U-Nets of fewer levels or layers are another family, for trials where the paper's depth does not fit the machine. `dit` are
    transformers whose depth and heads follow from c (`models/dit.py`).
    """

    kind: FamilyKind = "unet"
    widths: tuple[int, ...]
    layers_per_block: int = Field(2, ge=1)
    num_levels: int = Field(4, ge=2, le=4, description="block widths are the first of [c, 2c, 4c, 4c]")
    patch: int | None = Field(None, ge=1, description="dit: side of a token in the latent; 2, or 1 where that is below 16")

    @field_validator("widths")
    @classmethod
    def _distinct(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(widths)) != len(widths) or not widths:
            raise ValueError("widths must be given, each once")
        return widths

    @model_validator(mode="after")
    def _of_its_kind(self) -> FamilySpec:
        if self.kind == "dit" and (self.layers_per_block, self.num_levels) != (2, 4):
            raise ValueError("layers_per_block and num_levels are a U-Net's; a transformer's depth follows from its width")
        if self.kind == "unet" and self.patch is not None:
            raise ValueError("patch is a transformer's; leave it out, or take kind: dit")
        return self


class ModelSpec(Spec):
    """One network: width, depth, latent shape [channels, side, side], width of the prompt embeddings."""

    kind: FamilyKind = "unet"
    width: int
    latent_channels: int = 4
    latent_size: int = 64
    cross_attention_dim: int = 1024
    extra_input_channels: int = 0
    layers_per_block: int = 2
    num_levels: int = 4
    guidance_embed_dim: int | None = Field(
        None, description="of the guidance embedding, for students that take w; 1 is w itself"
    )
    adapter: Literal["none", "noisy", "concat_cond"] = Field("none", description="a second encoder, and what it sees")
    patch: int | None = Field(None, description="of a transformer; by the latent side where absent")

    @property
    def embeds_guidance(self) -> bool:
        """True for a student that takes w as an input: one pass is enough."""
        return self.guidance_embed_dim is not None
