"""U-Nets: the width sets every other dimension.

The family of arXiv 2404.01367: diffusers' UNet2DConditionModel with Stable Diffusion v1.5's block types, block widths
[c, 2c, 4c, 4c] and two layers per block. For c >= 64, group norms have 32 groups and attention has 8 heads, as in the paper's
networks. Smaller networks use the largest power of two that divides c and leaves at least 2 channels per group, or 8 channels
per head, at the first level, with at least one head. The smallest width is c = 4.

| c      | 4 | 8 | 16 | 24 | 32 | 48 | 64 and above |
| groups | 2 | 4 |  8 |  8 | 16 | 16 | 32           |
| heads  | 1 | 1 |  2 |  2 |  4 |  4 | 8            |
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from isocost.config.model import ModelSpec
from isocost.errors import ConfigError
from isocost.models.paper_table import BY_SIZE, BY_WIDTH, PAPER_CROSS_ATTENTION_DIM

_MAX_GROUPS, _CHANNELS_PER_GROUP = 32, 2
_MAX_HEADS, _CHANNELS_PER_HEAD = 8, 8
_MIN_WIDTH = 4
_TIMES = {2: "once", 3: "twice", 4: "three times"}


def check_width(width: int) -> None:
    """
    Raises:
        ConfigError: group norms or attention heads cannot divide this width.
    """
    multiple = 8 if width < 64 else 32
    if width != _MIN_WIDTH and (width < 8 or width % multiple):
        below = max(8, width - width % multiple)
        rule = "4, a multiple of 8 below 64 or a multiple of 32 from 64 on"
        raise ConfigError(
            f"width {width}: group norms and heads cannot divide it; use {rule}, such as {below} or {below + multiple}"
        )


def num_groups(width: int) -> int:
    """Number of group-norm groups at a width."""
    return _largest_power_of_two(width, _MAX_GROUPS, _CHANNELS_PER_GROUP)


def num_heads(width: int) -> int:
    """Number of attention heads at a width, the same at every level."""
    return _largest_power_of_two(width, _MAX_HEADS, min(_CHANNELS_PER_HEAD, width))


def build_unet(spec: ModelSpec, device: str | torch.device = "cpu") -> UNet2DConditionModel:
    """Build the network of a spec with random weights; on device "meta" it takes no memory.

    Raises:
        ConfigError: the width or the latent size does not fit the family.
    """
    check_width(spec.width)
    multiple = 2 ** (spec.num_levels - 1)
    if spec.latent_size % multiple:
        fitting = [levels for levels in range(2, spec.num_levels) if spec.latent_size % 2 ** (levels - 1) == 0]
        fewer = f", or family.num_levels {fitting[-1]}" if fitting else ""
        raise ConfigError(
            f"latent size {spec.latent_size}: a U-Net of {spec.num_levels} levels halves it {_TIMES[spec.num_levels]}; "
            f"choose a resolution and an autoencoder whose latent size is a multiple of {multiple}{fewer}"
        )
    return build_unchecked_unet(spec, device)


def build_unchecked_unet(spec: ModelSpec, device: str | torch.device) -> UNet2DConditionModel:
    """Build the network of a spec without the checks of `build_unet`."""
    c, levels = spec.width, spec.num_levels
    with torch.device(device):
        return UNet2DConditionModel(
            sample_size=spec.latent_size,
            in_channels=spec.latent_channels + (0 if spec.adapter == "concat_cond" else spec.extra_input_channels),
            out_channels=spec.latent_channels,
            block_out_channels=(c, 2 * c, 4 * c, 4 * c)[:levels],
            down_block_types=(*("CrossAttnDownBlock2D",) * (levels - 1), "DownBlock2D"),
            up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * (levels - 1)),
            layers_per_block=spec.layers_per_block,
            cross_attention_dim=spec.cross_attention_dim,
            attention_head_dim=num_heads(c),
            norm_num_groups=num_groups(c),
            time_cond_proj_dim=spec.guidance_embed_dim,
        )


def expand_unet_in_channels(network: UNet2DConditionModel, num_channels: int) -> UNet2DConditionModel:
    """Add `num_channels` input channels in place; their weights are zero, so the output is unchanged."""
    network.conv_in = expand_conv_in(network.conv_in, num_channels)
    network.register_to_config(in_channels=network.conv_in.in_channels)
    return network


def expand_conv_in(old: Any, num_channels: int) -> nn.Conv2d:
    """Copy a convolution and append `num_channels` input channels whose weights are zero."""
    new = nn.Conv2d(old.in_channels + num_channels, old.out_channels, old.kernel_size, stride=old.stride, padding=old.padding)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_channels] = old.weight
        if new.bias is not None and old.bias is not None:
            new.bias.copy_(old.bias)
    return new.to(old.weight)


def init_config(network: Any) -> dict[str, Any]:
    """Constructor arguments of a diffusers network: its config without diffusers' private entries."""
    return {key: value for key, value in network.config.items() if not key.startswith("_")}


def add_unet_guidance_embedding(network: UNet2DConditionModel, width: int) -> UNet2DConditionModel:
    """Copy a U-Net and add a guidance embedding [B, width] as an input; its weights are zero at first.

    As in latent consistency models (arXiv 2310.04378, section 4.2), with diffusers' `time_cond_proj_dim`. Works for any
    UNet2DConditionModel.
    """
    config = {**init_config(network), "time_cond_proj_dim": width}
    guided: UNet2DConditionModel = UNet2DConditionModel.from_config(config)
    missing, unexpected = guided.load_state_dict(network.state_dict(), strict=False)
    assert (missing, unexpected) == (["time_embedding.cond_proj.weight"], [])
    nn.init.zeros_(guided.time_embedding.cond_proj.weight)
    return guided.to(next(network.parameters()).device)


def size_name(width: int, num_parameters: int, cross_attention_dim: int) -> str:
    """The paper's name if the network is the paper's ("145M"), else its number of parameters ("0.8M")."""
    if cross_attention_dim == PAPER_CROSS_ATTENTION_DIM and width in BY_WIDTH:
        return BY_WIDTH[width].size
    millions = num_parameters / 1e6
    if millions >= 1000:
        return f"{millions / 1000:.1f}B"
    return f"{millions:.0f}M" if millions >= 10 else f"{millions:.1f}M"


def width_of(size: str) -> int:
    """Width of a size that is named as in the paper.

    Raises:
        ConfigError: there is no size of this name.
    """
    if size not in BY_SIZE:
        raise ConfigError(f"size '{size}': unknown; choose one of {', '.join(BY_SIZE)}")
    return BY_SIZE[size].width


def _largest_power_of_two(width: int, maximum: int, min_channels: int) -> int:
    fitting = [n for n in (1, 2, 4, 8, 16, 32) if n <= maximum and width % n == 0 and width // n >= min_channels]
    return fitting[-1]
