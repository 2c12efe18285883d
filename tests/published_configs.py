"""Configs of published denoisers, to test sizes of real checkpoints without their weights.

Each config is the `config.json` of `unet/` or `transformer/` in the repository, without fields that have diffusers' default.
`parameters` are from model cards and papers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from isocost.config.pretrained import FamilyName

_CROSS_DOWN, _CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
_STABLE_DIFFUSION: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": [_CROSS_DOWN, _CROSS_DOWN, _CROSS_DOWN, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", _CROSS_UP, _CROSS_UP, _CROSS_UP],
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}

_FLUX: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": [16, 56, 56],
}


@dataclass(frozen=True)
class Published:
    """A denoiser: pipeline family, config, tokens of a prompt, resolution of its images, published number of parameters."""

    family: FamilyName
    config: dict[str, Any]
    num_tokens: int
    resolution: int
    parameters: float

    @property
    def latent_size(self) -> int:
        """`sample_size` of the denoiser; Flux has none, and the factor of its autoencoder is 8."""
        return int(self.config.get("sample_size", self.resolution // 8))


PUBLISHED: dict[str, Published] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": Published("sd", _STABLE_DIFFUSION, 77, 512, 859.5e6),
    "stabilityai/stable-diffusion-2-1": Published(
        "sd",
        {
            **_STABLE_DIFFUSION,
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        77,
        768,
        865.9e6,
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": Published(
        "sdxl",
        {
            **_STABLE_DIFFUSION,
            "sample_size": 128,
            "down_block_types": ["DownBlock2D", _CROSS_DOWN, _CROSS_DOWN],
            "up_block_types": [_CROSS_UP, _CROSS_UP, "UpBlock2D"],
            "block_out_channels": [320, 640, 1280],
            "transformer_layers_per_block": [1, 2, 10],
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        77,
        1024,
        2.57e9,
    ),
    "PixArt-alpha/PixArt-XL-2-512x512": Published(
        "pixart",
        {
            "_class_name": "Transformer2DModel",
            "sample_size": 64,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "cross_attention_dim": 1152,
            "caption_channels": 4096,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "num_embeds_ada_norm": 1000,
        },
        120,
        512,
        0.6e9,
    ),
    "stabilityai/stable-diffusion-3-medium-diffusers": Published(
        "sd3",
        {
            "_class_name": "SD3Transformer2DModel",
            "sample_size": 128,
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "num_layers": 24,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
        333,
        1024,
        2.0e9,
    ),
    "black-forest-labs/FLUX.1-dev": Published("flux", {**_FLUX, "guidance_embeds": True}, 512, 1024, 11.9e9),
    "black-forest-labs/FLUX.1-schnell": Published("flux", {**_FLUX, "guidance_embeds": False}, 256, 1024, 11.9e9),
}
"""By Hub id."""
