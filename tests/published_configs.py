"""Configs of published models, to test sizes and costs of real checkpoints without their weights.

Each config is the `config.json` in the repository, without fields that have the library's default. `parameters` are those of
the denoiser, from model cards and papers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isocost.config.model import ModelSpec, TextEncoderSpec
from isocost.config.pretrained import FamilyName, NoiseSpec, PretrainedSpec
from isocost.config.sampling import SolverSpec
from isocost.models.checkpoint import CheckpointInfo
from isocost.models.pretrained.architectures import PIPELINES as FAMILIES_BY_PIPELINE
from isocost.models.pretrained.architectures import count_denoiser

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


# --- text encoders and autoencoders ---------------------------------------------------------------------------------------

_CLIP_L: dict[str, Any] = {
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_OPENCLIP_H = {
    **_CLIP_L,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
_OPENCLIP_BIGG = {
    **_CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_T5_XXL: dict[str, Any] = {
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "is_gated_act": True,
}
_LEVELS = 4
_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * _LEVELS,
    "up_block_types": ["UpDecoderBlock2D"] * _LEVELS,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
_VAE_16 = {**_VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 1024}


@dataclass(frozen=True)
class PublishedPipeline:
    """The parts of a published pipeline around its denoiser.

    Attributes:
        pipeline: class of the pipeline.
        text_encoders: folder -> class, config and tokens of a prompt.
        autoencoder: config.
        passes_per_step: evaluations of a usual step: 2 with classifier-free guidance, 1 if guidance is an input or distilled.
    """

    pipeline: str
    text_encoders: dict[str, tuple[str, dict[str, Any], int]]
    autoencoder: dict[str, Any]
    passes_per_step: int

    def write_configs(self, folder: Path) -> None:
        """Write a pipeline folder with the configs of these parts, without weights."""
        family = FAMILIES_BY_PIPELINE[self.pipeline]
        index: dict[str, Any] = {"_class_name": self.pipeline, "vae": ["diffusers", "AutoencoderKL"]}
        index[family.denoiser_folder] = ["diffusers", family.denoiser_classes[0]]
        parts = {"vae": self.autoencoder}
        for name, (class_name, config, num_tokens) in self.text_encoders.items():
            index[name] = ["transformers", class_name]
            parts |= {name: config, name.replace("text_encoder", "tokenizer"): {"model_max_length": num_tokens}}
        for name, config in parts.items():
            (folder / name).mkdir(parents=True)
            file = "tokenizer_config.json" if name.startswith("tokenizer") else "config.json"
            (folder / name / file).write_text(json.dumps(config), encoding="utf-8")
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


_CLIP, _PROJECTED, _T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
_FLUX_TEXT = {"text_encoder": (_CLIP, _CLIP_L, 77)}
PIPELINES: dict[str, PublishedPipeline] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": PublishedPipeline(
        "StableDiffusionPipeline", {"text_encoder": (_CLIP, _CLIP_L, 77)}, _VAE, 2
    ),
    "stabilityai/stable-diffusion-2-1": PublishedPipeline(
        "StableDiffusionPipeline", {"text_encoder": (_CLIP, _OPENCLIP_H, 77)}, {**_VAE, "sample_size": 768}, 2
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": PublishedPipeline(
        "StableDiffusionXLPipeline",
        {"text_encoder": (_CLIP, _CLIP_L, 77), "text_encoder_2": (_PROJECTED, _OPENCLIP_BIGG, 77)},
        {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025},
        2,
    ),
    "PixArt-alpha/PixArt-XL-2-512x512": PublishedPipeline(
        "PixArtAlphaPipeline", {"text_encoder": (_T5, _T5_XXL, 120)}, _VAE, 2
    ),
    "stabilityai/stable-diffusion-3-medium-diffusers": PublishedPipeline(
        "StableDiffusion3Pipeline",
        {
            "text_encoder": (_PROJECTED, _CLIP_L, 77),
            "text_encoder_2": (_PROJECTED, _OPENCLIP_BIGG, 77),
            "text_encoder_3": (_T5, _T5_XXL, 256),
        },
        {**_VAE_16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
        2,
    ),
    "black-forest-labs/FLUX.1-dev": PublishedPipeline(
        "FluxPipeline", {**_FLUX_TEXT, "text_encoder_2": (_T5, _T5_XXL, 512)}, {**_VAE_16, "scaling_factor": 0.3611}, 1
    ),
    "black-forest-labs/FLUX.1-schnell": PublishedPipeline(
        "FluxPipeline", {**_FLUX_TEXT, "text_encoder_2": (_T5, _T5_XXL, 256)}, {**_VAE_16, "scaling_factor": 0.3611}, 1
    ),
}
"""By Hub id, as `PUBLISHED`."""


def published_info(name: str, folder: Path) -> CheckpointInfo:
    """Metadata of a published model whose configs are in a folder, as `pretrained_info` reads them from complete pipelines."""
    published, pipeline = PUBLISHED[name], PIPELINES[name]
    family = FAMILIES_BY_PIPELINE[pipeline.pipeline]
    denoiser = count_denoiser(family, published.config, published.num_tokens, published.resolution, published.latent_size)
    last_tokens = max(num_tokens for _, _, num_tokens in pipeline.text_encoders.values())
    return CheckpointInfo(
        model=ModelSpec(width=denoiser.width, latent_size=published.latent_size),
        size=name,
        num_parameters=denoiser.num_parameters,
        images_seen=0,
        gflop_per_forward=denoiser.gflop_per_forward,
        normalized_cost_per_step=1.0,
        prediction_type="epsilon",
        autoencoder=str(folder),
        text_encoder=TextEncoderSpec(),
        resolution=published.resolution,
        pretrained=PretrainedSpec(
            path=str(folder),
            kind=published.family,
            noise=NoiseSpec(kind="linear"),
            solver=SolverSpec(),
            max_tokens=last_tokens,
        ),
    )
