"""Networks that take more of a caption than its states: everything travels in one tensor, which the engine hands on unread.

Shapes: B rows, C latent channels, L latent side, T tokens, D width of the prompt embeddings, P width of the pooled caption,
N numbers a caption in all, G width of the guidance embedding. A packed caption is [T + ceil(P / D), D]: the states, and below
them the pooled caption, broken into lines of D and padded with zeros; with a mask it is [T, D + 1].
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
"""Side of a place of Flux's, in latents."""
FLUX_TIME = 1000.0
"""What diffusers' Flux pipeline divides timesteps by."""


def pack_pooled(states: Tensor, pooled: Tensor) -> Tensor:
    """[B, T, D] and [B, P] -> [B, T + ceil(P / D), D]."""
    width = states.shape[-1]
    padded = functional.pad(pooled, (0, -pooled.shape[-1] % width))
    return torch.cat([states, padded.unflatten(-1, (-1, width))], dim=1)


def unpack_pooled(packed: Tensor, pooled_width: int) -> tuple[Tensor, Tensor]:
    """What `pack_pooled` packed: [B, T, D] and [B, P]."""
    num_lines = math.ceil(pooled_width / packed.shape[-1])
    return packed[:, :-num_lines], packed[:, -num_lines:].flatten(1)[:, :pooled_width]


def pack_mask(states: Tensor, mask: Tensor) -> Tensor:
    """[B, T, D] and [B, T] of zeros and ones -> [B, T, D + 1]."""
    return torch.cat([states, mask.to(states)[..., None]], dim=-1)


class ConditionedDenoiser(nn.Module):
    """A network called as a U-Net is, with packed captions in the place of states."""

    guidance_embed_dim: int | None = None
    packed_width: int
    num_channels: int

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, timestep_cond: Tensor | None = None
    ) -> UNet2DConditionOutput:
        """[B, C, L, L], [B], [B, N] packed, [B, G] -> an output whose `sample` is [B, C, L, L]."""
        return UNet2DConditionOutput(sample=self.output(sample, timestep, encoder_hidden_states, timestep_cond))

    def output(self, sample: Tensor, timestep: Tensor, packed: Tensor, embedded: Tensor | None) -> Tensor:
        """[B, C, L, L]."""
        raise AssertionError("every kind has its own")


class SDXLNetwork(ConditionedDenoiser):
    """Stable Diffusion XL's U-Net (arXiv 2307.01952, section 2.2): the pooled caption, and what the image's size was.

    The micro-conditioning is that of an image that was neither enlarged nor cropped, as diffusers' pipeline says by default.
    """

    def __init__(self, unet: UNet2DConditionModel, resolution: int) -> None:
        super().__init__()
        self.unet = unet
        config: Any = unet.config
        self.guidance_embed_dim = config.time_cond_proj_dim
        self.packed_width, self.num_channels = int(config.cross_attention_dim), int(config.in_channels)
        self.pooled_width = int(config.projection_class_embeddings_input_dim) - 6 * int(config.addition_time_embed_dim)
        self.time_ids = (resolution, resolution, 0, 0, resolution, resolution)

    def output(self, sample: Tensor, timestep: Tensor, packed: Tensor, embedded: Tensor | None) -> Tensor:
        states, pooled = unpack_pooled(packed, self.pooled_width)
        time_ids = torch.tensor(self.time_ids, dtype=torch.float32, device=sample.device).expand(len(sample), -1)
        added = {"text_embeds": pooled, "time_ids": time_ids}
        said: Tensor = self.unet(sample, timestep, states, timestep_cond=embedded, added_cond_kwargs=added).sample
        return said


class PixArtNetwork(ConditionedDenoiser):
    """PixArt's transformer (arXiv 2310.00426): masked prompt embeddings; of its output the half that is no variance."""

    def __init__(self, transformer: PixArtTransformer2DModel, resolution: int) -> None:
        super().__init__()
        self.transformer = transformer
        config: Any = transformer.config
        self.packed_width = int(config.caption_channels) + 1
        self.num_channels, self.resolution = int(config.in_channels), resolution

    def output(self, sample: Tensor, timestep: Tensor, packed: Tensor, embedded: Tensor | None) -> Tensor:
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.transformer.use_additional_conditions:
            added["resolution"] = sample.new_full((len(sample), 2), self.resolution)
            added["aspect_ratio"] = sample.new_ones(len(sample), 1)
        said: Tensor = self.transformer(
            sample,
            encoder_hidden_states=packed[..., :-1],
            encoder_attention_mask=packed[..., -1],
            timestep=timestep,
            added_cond_kwargs=added,
        ).sample
        return said[:, : self.num_channels]


class SD3Network(ConditionedDenoiser):
    """Stable Diffusion 3's transformer (arXiv 2403.03206): states of three encoders end to end, two pooled captions."""

    def __init__(self, transformer: SD3Transformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer
        config: Any = transformer.config
        self.packed_width, self.pooled_width = int(config.joint_attention_dim), int(config.pooled_projection_dim)
        self.num_channels = int(config.in_channels)

    def output(self, sample: Tensor, timestep: Tensor, packed: Tensor, embedded: Tensor | None) -> Tensor:
        states, pooled = unpack_pooled(packed, self.pooled_width)
        said: Tensor = self.transformer(
            hidden_states=sample, timestep=timestep, encoder_hidden_states=states, pooled_projections=pooled
        ).sample
        return said


class FluxNetwork(ConditionedDenoiser):
    """Flux's transformer (Black Forest Labs, FLUX.1): T5's states and CLIP's pooled caption; a place is 2 x 2 of the latent.

    Where it was distilled with guidance ("dev"), it takes w itself and embeds it on its own: `guidance_embed_dim` is 1.
    """

    def __init__(self, transformer: FluxTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer
        config: Any = transformer.config
        self.packed_width, self.pooled_width = int(config.joint_attention_dim), int(config.pooled_projection_dim)
        self.num_channels = int(config.in_channels) // FLUX_PATCH**2
        self.guidance_embed_dim = 1 if config.guidance_embeds else None

    def output(self, sample: Tensor, timestep: Tensor, packed: Tensor, embedded: Tensor | None) -> Tensor:
        states, pooled = unpack_pooled(packed, self.pooled_width)
        height, width = (side // FLUX_PATCH for side in sample.shape[-2:])
        said: Tensor = self.transformer(
            hidden_states=patchify(sample),
            timestep=timestep / FLUX_TIME,
            guidance=None if embedded is None else embedded[:, 0],
            encoder_hidden_states=states,
            pooled_projections=pooled,
            txt_ids=torch.zeros(states.shape[1], 3, device=sample.device),
            img_ids=_positions(height, width, sample.device),
        ).sample
        return unpatchify(said, height, width)


def patchify(latents: Tensor) -> Tensor:
    """[B, C, L, L] -> [B, L L / 4, 4 C]: 2 x 2 of the latent side by side, as Flux takes them."""
    apart = latents.unflatten(3, (-1, FLUX_PATCH)).unflatten(2, (-1, FLUX_PATCH))
    return apart.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(places: Tensor, height: int, width: int) -> Tensor:
    """What `patchify` put side by side, of `height` x `width` places: [B, C, L, L]."""
    apart = places.unflatten(1, (height, width)).unflatten(3, (-1, FLUX_PATCH, FLUX_PATCH))
    return apart.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def _positions(height: int, width: int, device: torch.device) -> Tensor:
    """0, row and column of each place, float32 [height width, 3]."""
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float32, device=device),
        torch.arange(width, dtype=torch.float32, device=device),
        indexing="ij",
    )
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
