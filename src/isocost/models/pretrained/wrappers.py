"""Denoisers of published pipelines with the call signature of a U-Net.

Some denoisers need a pooled prompt embedding or an attention mask in addition to the prompt embeddings. These are packed into
one tensor, which the engine passes on unchanged:

- with a pooled embedding: [T + ceil(P / D), D], the prompt embeddings followed by the pooled embedding, padded with zeros
  and split into rows of D;
- with a mask: [T, D + 1], the mask in the last column.

Shapes: B batch, C latent channels, L latent size, T tokens, D width of the prompt embeddings, P width of the pooled embedding,
G width of the guidance embedding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as functional
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

FLUX_PATCH = 2
"""Side of a Flux patch in latent positions."""
FLUX_TIME = 1000.0
"""Diffusers' Flux pipeline divides timesteps by this number."""


def pack_pooled(prompt_embeds: Tensor, pooled: Tensor) -> Tensor:
    """Pack prompt embeddings [B, T, D] and pooled embeddings [B, P] to [B, T + ceil(P / D), D]."""
    width = prompt_embeds.shape[-1]
    padded = functional.pad(pooled, (0, -pooled.shape[-1] % width))
    return torch.cat([prompt_embeds, padded.unflatten(-1, (-1, width))], dim=1)


def unpack_pooled(packed: Tensor, pooled_width: int) -> tuple[Tensor, Tensor]:
    """Invert `pack_pooled`: prompt embeddings [B, T, D] and pooled embeddings [B, P]."""
    num_rows = math.ceil(pooled_width / packed.shape[-1])
    return packed[:, :-num_rows], packed[:, -num_rows:].flatten(1)[:, :pooled_width]


def pack_mask(prompt_embeds: Tensor, mask: Tensor) -> Tensor:
    """Pack prompt embeddings [B, T, D] and a mask [B, T] of zeros and ones to [B, T, D + 1]."""
    return torch.cat([prompt_embeds, mask.to(prompt_embeds)[..., None]], dim=-1)


class ConditionedDenoiser(nn.Module):
    """A denoiser with the call signature of a U-Net that takes packed prompt embeddings.

    Attributes:
        guidance_embed_dim: width G of the guidance embedding; None if guidance is not an input.
        packed_width: size of the last axis of the packed prompt embeddings.
        num_channels: latent channels C.
    """

    guidance_embed_dim: int | None = None
    packed_width: int
    num_channels: int

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, timestep_cond: Tensor | None = None
    ) -> UNet2DConditionOutput:
        """Apply the network.

        Args:
            sample: noisy latents [B, C, L, L].
            timestep: [B].
            encoder_hidden_states: packed prompt embeddings.
            timestep_cond: guidance embedding [B, G].

        Returns:
            An output whose `sample` is [B, C, L, L].
        """
        return UNet2DConditionOutput(sample=self.output(sample, timestep, encoder_hidden_states, timestep_cond))

    def output(self, sample: Tensor, timestep: Tensor, packed: Tensor, guidance_embeds: Tensor | None) -> Tensor:
        """Output [B, C, L, L] of the wrapped network."""
        raise AssertionError("subclasses implement this method")


class SDXLNetwork(ConditionedDenoiser):
    """Stable Diffusion XL's U-Net with pooled embedding and size conditioning (arXiv 2307.01952, section 2.2).

    The size conditioning is that of an image that was neither enlarged nor cropped, the default of diffusers' pipeline.
    """

    def __init__(self, unet: UNet2DConditionModel, resolution: int) -> None:
        super().__init__()
        self.unet = unet
        config: Any = unet.config
        self.guidance_embed_dim = config.time_cond_proj_dim
        self.packed_width, self.num_channels = int(config.cross_attention_dim), int(config.in_channels)
        self.pooled_width = int(config.projection_class_embeddings_input_dim) - 6 * int(config.addition_time_embed_dim)
        self.time_ids = (resolution, resolution, 0, 0, resolution, resolution)

    def output(self, sample: Tensor, timestep: Tensor, packed: Tensor, guidance_embeds: Tensor | None) -> Tensor:
        prompt_embeds, pooled = unpack_pooled(packed, self.pooled_width)
        time_ids = torch.tensor(self.time_ids, dtype=torch.float32, device=sample.device).expand(len(sample), -1)
        conditions = {"text_embeds": pooled, "time_ids": time_ids}
        output: Tensor = self.unet(
            sample, timestep, prompt_embeds, timestep_cond=guidance_embeds, added_cond_kwargs=conditions
        ).sample
        return output


class PixArtNetwork(ConditionedDenoiser):
    """PixArt's transformer with masked prompt embeddings (arXiv 2310.00426). The predicted variance is dropped."""

    def __init__(self, transformer: PixArtTransformer2DModel, resolution: int) -> None:
        super().__init__()
        self.transformer = transformer
        config: Any = transformer.config
        self.packed_width = int(config.caption_channels) + 1
        self.num_channels, self.resolution = int(config.in_channels), resolution

    def output(self, sample: Tensor, timestep: Tensor, packed: Tensor, guidance_embeds: Tensor | None) -> Tensor:
        conditions: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.transformer.use_additional_conditions:
            conditions["resolution"] = sample.new_full((len(sample), 2), self.resolution)
            conditions["aspect_ratio"] = sample.new_ones(len(sample), 1)
        output: Tensor = self.transformer(
            sample,
            encoder_hidden_states=packed[..., :-1],
            encoder_attention_mask=packed[..., -1],
            timestep=timestep,
            added_cond_kwargs=conditions,
        ).sample
        return output[:, : self.num_channels]


class SD3Network(ConditionedDenoiser):
    """Stable Diffusion 3's transformer with the embeddings of three text encoders and a pooled embedding (arXiv 2403.03206)."""

    def __init__(self, transformer: SD3Transformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer
        config: Any = transformer.config
        self.packed_width, self.pooled_width = int(config.joint_attention_dim), int(config.pooled_projection_dim)
        self.num_channels = int(config.in_channels)

    def output(self, sample: Tensor, timestep: Tensor, packed: Tensor, guidance_embeds: Tensor | None) -> Tensor:
        prompt_embeds, pooled = unpack_pooled(packed, self.pooled_width)
        output: Tensor = self.transformer(
            hidden_states=sample, timestep=timestep, encoder_hidden_states=prompt_embeds, pooled_projections=pooled
        ).sample
        return output


class FluxNetwork(ConditionedDenoiser):
    """Flux's transformer with T5's embeddings and CLIP's pooled embedding (Black Forest Labs, FLUX.1).

    A patch covers 2 x 2 latent positions. The guidance-distilled network ("dev") takes w itself and embeds it, so its
    `guidance_embed_dim` is 1.
    """

    def __init__(self, transformer: FluxTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer
        config: Any = transformer.config
        self.packed_width, self.pooled_width = int(config.joint_attention_dim), int(config.pooled_projection_dim)
        self.num_channels = int(config.in_channels) // FLUX_PATCH**2
        self.guidance_embed_dim = 1 if config.guidance_embeds else None

    def output(self, sample: Tensor, timestep: Tensor, packed: Tensor, guidance_embeds: Tensor | None) -> Tensor:
        prompt_embeds, pooled = unpack_pooled(packed, self.pooled_width)
        height, width = (size // FLUX_PATCH for size in sample.shape[-2:])
        output: Tensor = self.transformer(
            hidden_states=patchify(sample),
            timestep=timestep / FLUX_TIME,
            guidance=None if guidance_embeds is None else guidance_embeds[:, 0],
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled,
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=sample.device),
            img_ids=_patch_positions(height, width, sample.device),
        ).sample
        return unpatchify(output, height, width)


def patchify(latents: Tensor) -> Tensor:
    """Rearrange latents [B, C, L, L] to Flux's patches of 2 x 2 positions, [B, L L / 4, 4 C]."""
    blocks = latents.unflatten(3, (-1, FLUX_PATCH)).unflatten(2, (-1, FLUX_PATCH))
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, height: int, width: int) -> Tensor:
    """Invert `patchify` for `height` x `width` patches: latents [B, C, L, L]."""
    blocks = patches.unflatten(1, (height, width)).unflatten(3, (-1, FLUX_PATCH, FLUX_PATCH))
    return blocks.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def _patch_positions(height: int, width: int, device: torch.device) -> Tensor:
    """0, row and column of each patch, float32 [height width, 3]."""
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float32, device=device),
        torch.arange(width, dtype=torch.float32, device=device),
        indexing="ij",
    )
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
