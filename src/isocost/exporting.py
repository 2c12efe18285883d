"""A checkpoint as a folder that diffusers' pipelines load."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from isocost.data.codec import AutoencoderCodec, TextCodec, load_codec
from isocost.errors import RequestError
from isocost.models.checkpoint import load_checkpoint, scheduler_for


def export(checkpoint: str | Path, folder: str | Path) -> Path:
    """Write network, codec, text encoder, tokenizer and scheduler into a new `folder`; returns it.

    The scheduler is DDIM with trailing spacing; diffusers' others load from its config. Same latents in, same pictures out:
    the text encoder is told to use its attention mask where ours does, and the tokenizer pads to the trained length. A
    consistency student has an LCMScheduler, and where it takes w it becomes a LatentConsistencyModelPipeline.

    Raises:
        RequestError: the folder is there and not empty, or the codec has no diffusers form (the built-in linear one), or the
            checkpoint is one of super-resolution or a student with an adapter.
    """
    target = Path(folder)
    if target.exists() and any(target.iterdir()):
        raise RequestError(f"{target}: not empty; export writes a new folder")
    opened = load_checkpoint(checkpoint)
    if opened.info.scale is not None:
        raise RequestError(f"{checkpoint}: made for super-resolution, which diffusers has no pipeline for in this form")
    if not isinstance(opened.network, UNet2DConditionModel):
        raise RequestError(
            f"{checkpoint}: its network has an adapter ({opened.info.distilled}), which diffusers has no form for"
        )
    codec = load_codec(opened.codec_path, opened.info.codec_subfolder)
    if not isinstance(codec, AutoencoderCodec):
        raise RequestError(f"{checkpoint}: its linear codec has no diffusers form; train with a codec of kind kl or pretrained")
    text = TextCodec(opened.text)
    text.tokenizer.model_max_length = text.max_tokens
    text.network.config.use_attention_mask = text.uses_mask
    scheduler = scheduler_for(opened.info.prediction, opened.info.zero_terminal_snr)
    kind = StableDiffusionPipeline
    if opened.info.sampler.name == "lcm":
        scheduler = LCMScheduler.from_config(scheduler.config)
        if opened.info.model.embeds_guidance:
            kind = LatentConsistencyModelPipeline
    pipeline = kind(
        vae=codec.network,
        text_encoder=text.network,
        tokenizer=text.tokenizer,
        unet=opened.network,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial, safe_serialization=True)
    if target.exists():
        target.rmdir()
    partial.rename(target)
    return target
