"""A checkpoint as a folder that diffusers' pipelines load."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from diffusers import (
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PixArtAlphaPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from isocost.errors import ConfigError
from isocost.models.autoencoder import DiffusersVAE, load_autoencoder
from isocost.models.checkpoint import Checkpoint, load_checkpoint, read_info, scheduler_for
from isocost.models.dit import GuidedTransformer, Transformer, as_in_diffusers
from isocost.models.text_encoder import MiniLMTextEncoder


def export(checkpoint: str | Path, folder: str | Path) -> Path:
    """Write network, autoencoder, text encoder, tokenizer and scheduler into a new `folder`; returns it.

    The scheduler is DDIM with trailing spacing; diffusers' others load from its config. Same latents in, same images out:
    the text encoder is told to use its attention mask where ours does, and the tokenizer pads to the trained length. A
    consistency student has an LCMScheduler, and where it takes w it becomes a LatentConsistencyModelPipeline.

    A transformer becomes a PixArtAlphaPipeline, which reads captions with T5 alone: it is given none, and draws from
    `prompt_embeds` with masks of ones. The text encoder that makes them lies beside, in `text_encoder/` and `tokenizer/`.

    Raises:
        ConfigError: the folder is there and not empty, or the autoencoder has no diffusers form (the built-in linear one), or the
            checkpoint is a pipeline of diffusers, one of super-resolution, a student with an adapter, or a transformer that
            takes w.
    """
    target = Path(folder)
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target}: not empty; export writes a new folder")
    if read_info(Path(checkpoint)).pretrained is not None:
        raise ConfigError(f"{checkpoint}: is a pipeline of diffusers already")
    opened = load_checkpoint(checkpoint)
    if opened.info.scale is not None:
        raise ConfigError(f"{checkpoint}: made for super-resolution, which diffusers has no pipeline for in this form")
    if isinstance(opened.network, GuidedTransformer):
        raise ConfigError(f"{checkpoint}: a transformer that takes the guidance as an input, which diffusers has no form for")
    if not isinstance(opened.network, UNet2DConditionModel | Transformer):
        raise ConfigError(
            f"{checkpoint}: its network has an adapter ({opened.info.distilled}), which diffusers has no form for"
        )
    autoencoder = load_autoencoder(opened.autoencoder_path, opened.info.autoencoder_subfolder)
    if not isinstance(autoencoder, DiffusersVAE):
        raise ConfigError(
            f"{checkpoint}: its linear autoencoder has no diffusers form; train with an autoencoder of kind kl or pretrained"
        )
    text = MiniLMTextEncoder(opened.text_encoder)
    text.tokenizer.model_max_length = text.max_tokens
    text.network.config.use_attention_mask = text.uses_mask
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    _pipeline(opened, autoencoder, text).save_pretrained(partial, safe_serialization=True)
    if isinstance(opened.network, Transformer):
        text.network.save_pretrained(partial / "text_encoder")
        text.tokenizer.save_pretrained(partial / "tokenizer")
    if target.exists():
        target.rmdir()
    partial.rename(target)
    return target


def _pipeline(opened: Checkpoint, autoencoder: DiffusersVAE, text: MiniLMTextEncoder) -> Any:
    """diffusers' pipeline around the checkpoint's parts."""
    scheduler = scheduler_for(opened.info.prediction_type, opened.info.rescale_betas_zero_snr)
    is_consistent = opened.info.solver.name == "lcm"
    if is_consistent:
        scheduler = LCMScheduler.from_config(scheduler.config)
    parts = {"vae": autoencoder.network, "scheduler": scheduler}
    if isinstance(opened.network, Transformer):
        return PixArtAlphaPipeline(**parts, transformer=as_in_diffusers(opened.network), text_encoder=None, tokenizer=None)
    embeds = is_consistent and opened.info.model.embeds_guidance
    return (LatentConsistencyModelPipeline if embeds else StableDiffusionPipeline)(
        **parts,
        text_encoder=text.network,
        tokenizer=text.tokenizer,
        unet=opened.network,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
