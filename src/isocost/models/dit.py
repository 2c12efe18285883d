"""Width -> diffusion transformer: one dial, depth and heads derived from it.

The networks are diffusers' PixArtTransformer2DModel (PixArt-alpha, arXiv 2310.00426): DiT's blocks (arXiv 2212.09748) with
cross-attention to the caption's states, and one projection of the timestep for all blocks (adaLN-single). What follows from
the width c:

- depth: that of DiT-S, B, L and XL (384 x 12, 768 x 12, 1024 x 24, 1152 x 28; arXiv 2212.09748, table 1), linear in c between
  them, in proportion to c below the first and above the last, and 4 blocks at least;
- heads: as wide as the largest power of two up to 64 that divides c and leaves at least 4 of them;
- a token is a square of 2 x 2 places of the latent, of one place where the latent's side is below 16, or as `patch` says.

| c           | 16 | 32 | 64 | 96 | 128 | 192 | 256 | 384 | 512 | 768 | 1024 | 1152 |
| depth       |  4 |  4 |  4 |  4 |   4 |   6 |   8 |  12 |  12 |  12 |   24 |   28 |
| heads       |  4 |  4 |  4 |  6 |   4 |   6 |   4 |   6 |   8 |  12 |   16 |   18 |

Shapes: B rows, C latent channels, L latent side, T tokens of a caption, D width of its states, G width of the embedding of
guidance.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin, PixArtTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from isocost.config.model import ModelSpec
from isocost.errors import ConfigError
from isocost.models.unet import expand_conv_in, plain_config

PUBLISHED = ((384, 12), (768, 12), (1024, 24), (1152, 28))
"""Width and depth of DiT-S, B, L and XL."""
SIZES = (64, 96, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1152)
"""Widths that stand for the family where none are asked for."""
_MIN_DEPTH = 4
_MAX_HEAD_WIDTH, _LEAST_HEADS = 64, 4
_TIME_FEATURES = 256


def check_dit_width(width: int) -> None:
    """Raise ConfigError for a width that the rule of heads does not fit."""
    multiple = 16 if width < 64 else 32
    if width < 16 or width % multiple:
        below = max(16, width - width % multiple)
        rule = "a multiple of 16 below 64, a multiple of 32 from 64 on (heads must divide it)"
        raise ConfigError(f"width {width}: no transformer has it; take {rule}, such as {below} or {below + multiple}")


def depth_of(width: int) -> int:
    """Blocks at width c."""
    widths, depths = zip((0, 0), *PUBLISHED, strict=True)
    if width > widths[-1]:
        return round(width * depths[-1] / widths[-1])
    return max(_MIN_DEPTH, round(float(np.interp(width, widths, depths))))


def head_width(width: int) -> int:
    """Channels of a head at width c."""
    fitting = [n for n in (4, 8, 16, 32, _MAX_HEAD_WIDTH) if width % n == 0 and width // n >= _LEAST_HEADS]
    return fitting[-1]


def patch_of(spec: ModelSpec) -> int:
    """Side of a token's square.

    Raises:
        ConfigError: it does not divide the latent's side.
    """
    patch = spec.patch or (2 if spec.latent_size >= 16 else 1)
    if spec.latent_size % patch:
        side, fitting = spec.latent_size, math.gcd(spec.latent_size, patch)
        raise ConfigError(f"latent side {side}: patches of {patch} x {patch} do not fill it; family.patch: {fitting} does")
    return patch


class Transformer(PixArtTransformer2DModel):
    """diffusers' class, called as a U-Net is; on disk it is diffusers' own."""

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Any:
        """[B, C, L, L], [B], [B, T, D] -> an output whose `sample` is [B, C, L, L]."""
        return super().forward(sample, encoder_hidden_states=encoder_hidden_states, timestep=timestep)


class GuidedTransformer(ModelMixin, ConfigMixin):
    """A transformer that takes an embedding of the guidance beside the timestep, as latent consistency models do.

    arXiv 2310.04378, section 4.2: a linear map of it is added to the timestep's sinusoidal features. diffusers has a place for
    that in its U-Nets (`time_cond_proj_dim`) and none in PixArt's class.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, transformer_config: dict[str, Any], guidance_embed_dim: int) -> None:
        """`transformer_config` is that of the transformer itself."""
        super().__init__()
        self.transformer = PixArtTransformer2DModel.from_config(transformer_config)
        time = self.transformer.adaln_single
        time.emb = _GuidedTime(time.emb.time_proj, self.transformer.inner_dim, guidance_embed_dim)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, timestep_cond: Tensor | None = None
    ) -> Any:
        """[B, C, L, L], [B], [B, T, D], [B, G] -> an output whose `sample` is [B, C, L, L]."""
        return self.transformer(
            sample,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            added_cond_kwargs={"guidance": timestep_cond},
        )


class _GuidedTime(nn.Module):
    """PixArt's embedding of the timestep, [B] and [B, G] -> [B, c], in the place where diffusers calls it."""

    def __init__(self, features: nn.Module, width: int, guidance_embed_dim: int) -> None:
        super().__init__()
        self.time_proj = features
        self.timestep_embedder = TimestepEmbedding(_TIME_FEATURES, width, cond_proj_dim=guidance_embed_dim)
        nn.init.zeros_(self.timestep_embedder.cond_proj.weight)

    def forward(self, timestep: Tensor, guidance: Tensor | None, batch_size: int, hidden_dtype: torch.dtype) -> Tensor:
        return self.timestep_embedder(self.time_proj(timestep).to(hidden_dtype), guidance)


def build_dit(spec: ModelSpec, device: str | torch.device = "cpu") -> Transformer | GuidedTransformer:
    """The network of a spec; on device "meta" it takes no memory.

    Raises:
        ConfigError: the width does not fit the rule, or the latent side the patches.
    """
    check_dit_width(spec.width)
    assert spec.adapter == "none", "students that need one are refused"
    channels_each = head_width(spec.width)
    with torch.device(device):
        network = Transformer(
            num_attention_heads=spec.width // channels_each,
            attention_head_dim=channels_each,
            in_channels=spec.latent_channels + spec.extra_input_channels,
            out_channels=spec.latent_channels,
            num_layers=depth_of(spec.width),
            cross_attention_dim=spec.width,
            sample_size=spec.latent_size,
            patch_size=patch_of(spec),
            use_additional_conditions=False,
            caption_channels=spec.cross_attention_dim,
        )
        _initialise(network)
        if spec.guidance_embed_dim is None:
            return network
        return GuidedTransformer(plain_config(network), spec.guidance_embed_dim)


def _initialise(network: Transformer) -> None:
    """PixArt-alpha's start (arXiv 2310.00426, section 2.3, and its published code): cross-attention and output say nothing yet.

    diffusers' class leaves PyTorch's defaults, since it is made to read weights.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    patches = network.pos_embed.proj
    nn.init.xavier_uniform_(patches.weight.flatten(1))
    nn.init.zeros_(patches.bias)
    time, caption = network.adaln_single.emb.timestep_embedder, network.caption_projection
    for linear in (time.linear_1, time.linear_2, network.adaln_single.linear, caption.linear_1, caption.linear_2):
        nn.init.normal_(linear.weight, std=0.02)
    for block in network.transformer_blocks:
        nn.init.zeros_(block.attn2.to_out[0].weight)
    nn.init.zeros_(network.proj_out.weight)


def expand_dit_in_channels(network: PixArtTransformer2DModel, num_channels: int) -> PixArtTransformer2DModel:
    """The network with `num_channels` further input channels that it does not look at yet: their weights are zero."""
    network.pos_embed.proj = expand_conv_in(network.pos_embed.proj, num_channels)
    network.register_to_config(in_channels=network.pos_embed.proj.in_channels)
    return network


def embed_dit_guidance(network: PixArtTransformer2DModel, width: int) -> GuidedTransformer:
    """A copy that takes an embedding of the guidance [B, width] beside the timestep, and does not look at it yet."""
    taught = GuidedTransformer(plain_config(network), width)
    missing, unexpected = taught.transformer.load_state_dict(network.state_dict(), strict=False)
    assert (missing, unexpected) == (["adaln_single.emb.timestep_embedder.cond_proj.weight"], [])
    return taught.to(next(network.parameters()).device)


def as_in_diffusers(network: Transformer) -> PixArtTransformer2DModel:
    """The same weights in diffusers' own class, as its pipelines call it."""
    plain = PixArtTransformer2DModel.from_config(plain_config(network))
    plain.load_state_dict(network.state_dict())
    return plain


def take_caption_projection(network: nn.Module) -> nn.Module | None:
    """The layers that a transformer puts prompt embeddings through before its blocks, taken out of it; None of a U-Net."""
    for module in network.modules():
        if isinstance(module, PixArtTransformer2DModel):
            projection: nn.Module | None = module.caption_projection
            module.caption_projection = None
            return projection
    return None
