"""Diffusion transformers: the width sets the depth and the attention heads.

The networks are diffusers' PixArtTransformer2DModel (PixArt-alpha, arXiv 2310.00426): DiT blocks (arXiv 2212.09748) with
cross-attention to the prompt embeddings, and one projection of the timestep for all blocks (adaLN-single). The width c sets:

- depth: equal to that of DiT-S, B, L and XL (384 x 12, 768 x 12, 1024 x 24, 1152 x 28; arXiv 2212.09748, table 1) at their
  widths, linear in c between them, proportional to c below the first and above the last, and at least 4 blocks;
- heads: the head dimension is the largest power of two up to 64 that divides c and gives at least 4 heads.

A patch (one image token) covers 2 x 2 latent positions, or one position if the latent is smaller than 16 x 16; `patch` in the
study overrides this.

| c           | 16 | 32 | 64 | 96 | 128 | 192 | 256 | 384 | 512 | 768 | 1024 | 1152 |
| depth       |  4 |  4 |  4 |  4 |   4 |   6 |   8 |  12 |  12 |  12 |   24 |   28 |
| heads       |  4 |  4 |  4 |  6 |   4 |   6 |   4 |   6 |   8 |  12 |   16 |   18 |

Shapes: B batch, C latent channels, L latent size, T tokens of a prompt, D width of the prompt embeddings, G width of the
guidance embedding, c network width.
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
from isocost.models.unet import expand_conv_in, init_config

PUBLISHED_SIZES = ((384, 12), (768, 12), (1024, 24), (1152, 28))
"""Width and depth of DiT-S, B, L and XL."""
DEFAULT_DIT_WIDTHS = (64, 96, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1152)
"""Widths that `isocost family` lists by default."""
_MIN_DEPTH = 4
_MAX_HEAD_DIM, _MIN_HEADS = 64, 4
_TIME_FEATURES = 256


def check_dit_width(width: int) -> None:
    """
    Raises:
        ConfigError: attention heads cannot divide this width.
    """
    multiple = 16 if width < 64 else 32
    if width < 16 or width % multiple:
        below = max(16, width - width % multiple)
        rule = "a multiple of 16 below 64 or a multiple of 32 from 64 on"
        raise ConfigError(
            f"width {width}: attention heads of a DiT cannot divide it; use {rule}, such as {below} or {below + multiple}"
        )


def depth_of(width: int) -> int:
    """Number of blocks at a width."""
    widths, depths = zip((0, 0), *PUBLISHED_SIZES, strict=True)
    if width > widths[-1]:
        return round(width * depths[-1] / widths[-1])
    return max(_MIN_DEPTH, round(float(np.interp(width, widths, depths))))


def head_dim(width: int) -> int:
    """Channels of an attention head at a width."""
    fitting = [n for n in (4, 8, 16, 32, _MAX_HEAD_DIM) if width % n == 0 and width // n >= _MIN_HEADS]
    return fitting[-1]


def patch_size_of(spec: ModelSpec) -> int:
    """Side of a patch in latent positions.

    Raises:
        ConfigError: it does not divide the latent size.
    """
    patch = spec.patch or (2 if spec.latent_size >= 16 else 1)
    if spec.latent_size % patch:
        size, fitting = spec.latent_size, math.gcd(spec.latent_size, patch)
        raise ConfigError(
            f"family.patch: patches of {patch} x {patch} do not divide the latent of {size} x {size}; use patch: {fitting}"
        )
    return patch


class DiT(PixArtTransformer2DModel):
    """diffusers' PixArtTransformer2DModel with the call signature of a U-Net; saved folders name diffusers' class."""

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Any:
        """Apply the network to noisy latents [B, C, L, L], timesteps [B] and prompt embeddings [B, T, D].

        Returns:
            An output whose `sample` is [B, C, L, L].
        """
        return super().forward(sample, encoder_hidden_states=encoder_hidden_states, timestep=timestep)


class GuidedTransformer(ModelMixin, ConfigMixin):
    """A transformer with an embedding of the guidance as an additional input, as in latent consistency models.

    arXiv 2310.04378, section 4.2: a linear map of the embedding is added to the sinusoidal features of the timestep. diffusers
    supports this in its U-Nets (`time_cond_proj_dim`), but not in PixArtTransformer2DModel.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, transformer_config: dict[str, Any], guidance_embed_dim: int) -> None:
        """
        Args:
            transformer_config: config of the PixArtTransformer2DModel.
            guidance_embed_dim: width G of the guidance embedding.
        """
        super().__init__()
        self.transformer = PixArtTransformer2DModel.from_config(transformer_config)
        time = self.transformer.adaln_single
        time.emb = _TimeAndGuidanceEmbedding(time.emb.time_proj, self.transformer.inner_dim, guidance_embed_dim)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, timestep_cond: Tensor | None = None
    ) -> Any:
        """Apply the network to latents [B, C, L, L], timesteps [B], prompt embeddings [B, T, D], guidance embedding [B, G].

        Returns:
            An output whose `sample` is [B, C, L, L].
        """
        return self.transformer(
            sample,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            added_cond_kwargs={"guidance": timestep_cond},
        )


class _TimeAndGuidanceEmbedding(nn.Module):
    """Replaces PixArt's timestep embedding: [B] and [B, G] to [B, c]. Its signature is the one that diffusers calls."""

    def __init__(self, time_proj: nn.Module, width: int, guidance_embed_dim: int) -> None:
        super().__init__()
        self.time_proj = time_proj
        self.timestep_embedder = TimestepEmbedding(_TIME_FEATURES, width, cond_proj_dim=guidance_embed_dim)
        nn.init.zeros_(self.timestep_embedder.cond_proj.weight)

    def forward(self, timestep: Tensor, guidance: Tensor | None, batch_size: int, hidden_dtype: torch.dtype) -> Tensor:
        return self.timestep_embedder(self.time_proj(timestep).to(hidden_dtype), guidance)


def build_dit(spec: ModelSpec, device: str | torch.device = "cpu") -> DiT | GuidedTransformer:
    """Build the network of a spec with random weights; on device "meta" it takes no memory.

    Raises:
        ConfigError: attention heads cannot divide the width, or patches the latent.
    """
    check_dit_width(spec.width)
    assert spec.adapter == "none", "students that need an adapter are refused earlier"
    head_channels = head_dim(spec.width)
    with torch.device(device):
        network = DiT(
            num_attention_heads=spec.width // head_channels,
            attention_head_dim=head_channels,
            in_channels=spec.latent_channels + spec.extra_input_channels,
            out_channels=spec.latent_channels,
            num_layers=depth_of(spec.width),
            cross_attention_dim=spec.width,
            sample_size=spec.latent_size,
            patch_size=patch_size_of(spec),
            use_additional_conditions=False,
            caption_channels=spec.cross_attention_dim,
        )
        _initialise(network)
        if spec.guidance_embed_dim is None:
            return network
        return GuidedTransformer(init_config(network), spec.guidance_embed_dim)


def _initialise(network: DiT) -> None:
    """Initialise as PixArt-alpha does (arXiv 2310.00426, section 2.3, and its published code).

    The outputs of cross-attention and of the network start at zero. diffusers' class keeps PyTorch's default initialisation,
    because it is meant for loading weights.
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
    """Add `num_channels` input channels in place; their weights are zero, so the output is unchanged."""
    network.pos_embed.proj = expand_conv_in(network.pos_embed.proj, num_channels)
    network.register_to_config(in_channels=network.pos_embed.proj.in_channels)
    return network


def add_dit_guidance_embedding(network: PixArtTransformer2DModel, width: int) -> GuidedTransformer:
    """Copy a transformer and add a guidance embedding [B, width] as an input; its weights are zero at first."""
    guided = GuidedTransformer(init_config(network), width)
    missing, unexpected = guided.transformer.load_state_dict(network.state_dict(), strict=False)
    assert (missing, unexpected) == (["adaln_single.emb.timestep_embedder.cond_proj.weight"], [])
    return guided.to(next(network.parameters()).device)


def to_diffusers(network: DiT) -> PixArtTransformer2DModel:
    """Copy a network into diffusers' own class, which its pipelines can call."""
    converted = PixArtTransformer2DModel.from_config(init_config(network))
    converted.load_state_dict(network.state_dict())
    return converted


def pop_caption_projection(network: nn.Module) -> nn.Module | None:
    """Remove and return the layers that a transformer applies to prompt embeddings before its blocks; None for a U-Net."""
    for module in network.modules():
        if isinstance(module, PixArtTransformer2DModel):
            projection: nn.Module | None = module.caption_projection
            module.caption_projection = None
            return projection
    return None
