"""Tiny diffusers pipelines with random weights, saved in the folder layout of published checkpoints."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WIDTH, LATENT_SIZE, PIXELS = 32, 8, 16
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
PROMPTS = ["a red circle on white", "two blue squares"]


def clip_tokenizer() -> CLIPTokenizer:
    """A tokenizer of letters and digits; the end token has the largest id, as in CLIP."""
    letters = [*string.ascii_lowercase, *string.digits]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[], model_max_length=77)


def clip(projected: bool = False, **changes: Any) -> Any:
    """A CLIP text encoder of two layers."""
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=WIDTH,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
        **changes,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    """T5's encoder and a tokenizer of letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    tokenizer = T5Tokenizer(vocab=[*pieces, *((letter, -3.0) for letter in string.ascii_lowercase)], extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_ff=37, d_kv=8, num_layers=2, num_heads=4)
    return T5EncoderModel(config).eval(), tokenizer


def autoencoder(**changes: Any) -> AutoencoderKL:
    """An autoencoder of two levels: a latent position covers 2 x 2 pixels."""
    config: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": PIXELS,
        **changes,
    }
    return AutoencoderKL(**config).eval()


def unet(**changes: Any) -> UNet2DConditionModel:
    """A U-Net of two levels."""
    config: dict[str, Any] = {
        "sample_size": LATENT_SIZE,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": (CROSS_DOWN, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", CROSS_UP),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        **changes,
    }
    return UNet2DConditionModel(**config).eval()


def ddim(**changes: Any) -> DDIMScheduler:
    """Stable Diffusion's scheduler."""
    config: dict[str, Any] = {**BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **changes}
    return DDIMScheduler(**config)


def stable_diffusion(scheduler: Any = None, unet_changes: dict[str, Any] | None = None) -> Any:
    """Stable Diffusion 1 or 2; a latent consistency model if the scheduler is an LCMScheduler."""
    torch.manual_seed(0)
    scheduler = scheduler or ddim()
    is_student = isinstance(scheduler, LCMScheduler)
    extra = {} if is_student else {"image_encoder": None}
    return (LatentConsistencyModelPipeline if is_student else StableDiffusionPipeline)(
        vae=autoencoder(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet(**(unet_changes or {})),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **extra,
    )


def sdxl(**options: Any) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL."""
    torch.manual_seed(0)
    network = unet(
        down_block_types=("DownBlock2D", CROSS_DOWN),
        up_block_types=(CROSS_UP, "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
    )
    return StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025),
        text_encoder=clip(),
        text_encoder_2=clip(projected=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=network,
        scheduler=ddim(),
        add_watermarker=False,
        **options,
    )


def pixart(**changes: Any) -> PixArtAlphaPipeline:
    """PixArt-alpha."""
    torch.manual_seed(0)
    encoder, tokenizer = t5()
    transformer = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        num_layers=2,
        in_channels=4,
        out_channels=8,
        sample_size=LATENT_SIZE,
        patch_size=2,
        cross_attention_dim=48,
        caption_channels=WIDTH,
        **changes,
    ).eval()
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    return PixArtAlphaPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=autoencoder(), transformer=transformer, scheduler=scheduler
    )


def sd3(with_t5: bool = True) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3."""
    torch.manual_seed(0)
    encoder, tokenizer = t5() if with_t5 else (None, None)
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH if encoder is None else WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=LATENT_SIZE,
    ).eval()
    vae = autoencoder(
        latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clip(projected=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(projected=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=encoder,
        tokenizer_3=tokenizer,
    )


def flux(is_dev: bool = True, **scheduling: Any) -> FluxPipeline:
    """Flux: "dev" has guidance as an input and a shift that depends on the resolution, "schnell" has neither."""
    torch.manual_seed(0)
    encoder, tokenizer = t5()
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=is_dev,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    vae = autoencoder(
        latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
    )
    shifting = {"shift": 3.0, "use_dynamic_shifting": True} if is_dev else {"shift": 1.0}
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**{**shifting, **scheduling}),
        vae=vae,
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        transformer=transformer,
    )


def written(pipeline: Any, folder: Path, **options: Any) -> Path:
    """Save a pipeline and return its folder."""
    pipeline.save_pretrained(folder, safe_serialization=True, **options)
    return folder


def change(file: Path, **values: Any) -> None:
    """Set fields of a JSON file; a field whose value is None is removed."""
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields.update(values)
    file.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}), encoding="utf-8")
