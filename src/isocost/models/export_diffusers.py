"""Export a checkpoint as a folder that diffusers' pipelines can load."""

from __future__ import annotations

from dataclasses import dataclass
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
from isocost.models.dit import DiT, GuidedTransformer, to_diffusers
from isocost.models.text_encoder import MiniLMTextEncoder
from isocost.utils.output_paths import check_output_folder, check_separate, private_folder
from isocost.utils.progress import no_library_progress


@dataclass(frozen=True)
class ExportParts:
    """The parts of a checkpoint that go into a pipeline folder."""

    opened: Checkpoint
    autoencoder: DiffusersVAE
    text_encoder: MiniLMTextEncoder


def export(checkpoint: str | Path, folder: str | Path) -> Path:
    """Write network, autoencoder, text encoder, tokenizer and scheduler into a new folder.

    The scheduler is DDIM with trailing spacing; other diffusers schedulers can be created from its config. The pipeline gives
    the same images as isocost for the same latents: the text encoder uses its attention mask if it did in training, and the
    tokenizer pads to the trained length. A consistency student gets an LCMScheduler, and a LatentConsistencyModelPipeline if
    guidance is an input of its network.

    A transformer becomes a PixArtAlphaPipeline. That pipeline supports only T5 as a text encoder, so it is saved without one
    and must be called with `prompt_embeds` and masks of ones. The text encoder that makes these embeddings is saved in
    `text_encoder/` and `tokenizer/` of the same folder.

    Args:
        checkpoint: checkpoint folder.
        folder: folder to create; it may exist if it is empty.

    Returns:
        The folder.

    Raises:
        ConfigError: the folder is not empty or lies in the checkpoint, the autoencoder is the built-in PCA, which has no
            diffusers form, or the checkpoint is a diffusers pipeline, a super-resolution model, a student with an adapter, or a
            transformer with guidance as an input.
    """
    target = check_output_folder(folder, must_be_new=True)
    check_separate(target, checkpoint)
    parts = load_parts(checkpoint)
    with private_folder(target) as partial:
        write_pipeline(parts, partial)
        partial.rename(target)
    return target


def load_parts(checkpoint: str | Path) -> ExportParts:
    """Load the parts of a checkpoint that go into a pipeline folder.

    Raises:
        ConfigError: diffusers has no pipeline for the checkpoint; see `export`.
    """
    if read_info(Path(checkpoint)).pretrained is not None:
        raise ConfigError(f"{checkpoint}: is a diffusers pipeline already")
    opened = load_checkpoint(checkpoint)
    if opened.info.scale is not None:
        raise ConfigError(f"{checkpoint}: diffusers has no pipeline for this form of super-resolution")
    if isinstance(opened.network, GuidedTransformer):
        raise ConfigError(f"{checkpoint}: diffusers has no pipeline for a transformer with guidance as an input")
    if not isinstance(opened.network, UNet2DConditionModel | DiT):
        raise ConfigError(f"{checkpoint}: diffusers has no pipeline for a network with an adapter ({opened.info.distilled})")
    autoencoder = load_autoencoder(opened.autoencoder_path, opened.info.autoencoder_subfolder)
    if not isinstance(autoencoder, DiffusersVAE):
        raise ConfigError(
            f"{checkpoint}: its PCA autoencoder has no diffusers form; train with an autoencoder of kind kl or pretrained"
        )
    text_encoder = MiniLMTextEncoder(opened.text_encoder)
    text_encoder.tokenizer.model_max_length = text_encoder.max_tokens
    text_encoder.network.config.use_attention_mask = text_encoder.uses_mask
    return ExportParts(opened, autoencoder, text_encoder)


def write_pipeline(parts: ExportParts, folder: Path) -> None:
    """Write a pipeline into an existing folder."""
    with no_library_progress():
        _pipeline(parts).save_pretrained(folder, safe_serialization=True)
        if isinstance(parts.opened.network, DiT):
            parts.text_encoder.network.save_pretrained(folder / "text_encoder")
            parts.text_encoder.tokenizer.save_pretrained(folder / "tokenizer")


def _pipeline(parts: ExportParts) -> Any:
    opened, autoencoder, text_encoder = parts.opened, parts.autoencoder, parts.text_encoder
    scheduler = scheduler_for(opened.info.prediction_type, opened.info.rescale_betas_zero_snr)
    is_consistent = opened.info.solver.name == "lcm"
    if is_consistent:
        scheduler = LCMScheduler.from_config(scheduler.config)
    shared = {"vae": autoencoder.network, "scheduler": scheduler}
    if isinstance(opened.network, DiT):
        return PixArtAlphaPipeline(**shared, transformer=to_diffusers(opened.network), text_encoder=None, tokenizer=None)
    embeds = is_consistent and opened.info.model.embeds_guidance
    return (LatentConsistencyModelPipeline if embeds else StableDiffusionPipeline)(
        **shared,
        text_encoder=text_encoder.network,
        tokenizer=text_encoder.tokenizer,
        unet=opened.network,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
