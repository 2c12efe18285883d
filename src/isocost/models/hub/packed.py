"""Networks that take more of a caption than its states: everything travels in one tensor, which the engine hands on unread.

Shapes: B rows, C latent channels, L latent side, T tokens, D width of the caption states, P width of the pooled caption,
N numbers a caption in all, G width of the guidance embedding. A packed caption is [T + ceil(P / D), D]: the states, and below
them the pooled caption, broken into lines of D and padded with zeros; with a mask it is [T, D + 1].
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as functional
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn


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


class PackedNetwork(nn.Module):
    """A network called as a U-Net is, with packed captions in the place of states."""

    guidance_width: int | None = None
    packed_width: int

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, timestep_cond: Tensor | None = None
    ) -> UNet2DConditionOutput:
        """[B, C, L, L], [B], [B, N] packed, [B, G] -> an output whose `sample` is [B, C, L, L]."""
        return UNet2DConditionOutput(sample=self.output(sample, timestep, encoder_hidden_states, timestep_cond))

    def output(self, sample: Tensor, timestep: Tensor, packed: Tensor, embedded: Tensor | None) -> Tensor:
        """[B, C, L, L]."""
        raise AssertionError("every kind has its own")


class SDXLNetwork(PackedNetwork):
    """Stable Diffusion XL's U-Net (arXiv 2307.01952, section 2.2): the pooled caption, and what the picture's size was.

    The micro-conditioning is that of a picture that was neither enlarged nor cropped, as diffusers' pipeline says by default.
    """

    def __init__(self, unet: UNet2DConditionModel, resolution: int) -> None:
        super().__init__()
        self.unet = unet
        config: Any = unet.config
        self.guidance_width = config.time_cond_proj_dim
        self.packed_width = int(config.cross_attention_dim)
        self.pooled_width = int(config.projection_class_embeddings_input_dim) - 6 * int(config.addition_time_embed_dim)
        self.time_ids = (resolution, resolution, 0, 0, resolution, resolution)

    def output(self, sample: Tensor, timestep: Tensor, packed: Tensor, embedded: Tensor | None) -> Tensor:
        states, pooled = unpack_pooled(packed, self.pooled_width)
        time_ids = torch.tensor(self.time_ids, dtype=torch.float32, device=sample.device).expand(len(sample), -1)
        added = {"text_embeds": pooled, "time_ids": time_ids}
        said: Tensor = self.unet(sample, timestep, states, timestep_cond=embedded, added_cond_kwargs=added).sample
        return said


class PixArtNetwork(PackedNetwork):
    """PixArt's transformer (arXiv 2310.00426): masked caption states; of its output the half that is no variance."""

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


class SD3Network(PackedNetwork):
    """Stable Diffusion 3's transformer (arXiv 2403.03206): states of three encoders end to end, two pooled captions."""

    def __init__(self, transformer: SD3Transformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer
        config: Any = transformer.config
        self.packed_width, self.pooled_width = int(config.joint_attention_dim), int(config.pooled_projection_dim)

    def output(self, sample: Tensor, timestep: Tensor, packed: Tensor, embedded: Tensor | None) -> Tensor:
        states, pooled = unpack_pooled(packed, self.pooled_width)
        said: Tensor = self.transformer(
            hidden_states=sample, timestep=timestep, encoder_hidden_states=states, pooled_projections=pooled
        ).sample
        return said
