"""Autoencoder and caption encoders of a checkpoint: ours by its own facts, a published one's as diffusers' pipelines use them.

Shapes: N captions, T tokens, D width of the states, P width of a pooled caption.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as functional
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from isocost.models.autoencoder import Autoencoder, DiffusersVAE, load_autoencoder
from isocost.models.checkpoint import Checkpoint
from isocost.models.pretrained.files import load_module, read_config
from isocost.models.pretrained.prompt_encoder import PipelineTextEncoder
from isocost.models.text_encoder import MiniLMTextEncoder, TextEncoder


def load_checkpoint_autoencoder(opened: Checkpoint, device: torch.device | str = "cpu") -> Autoencoder:
    """A checkpoint's autoencoder.

    Raises:
        ConfigError: it does not load from where the checkpoint says.
    """
    if opened.info.pretrained is not None:
        return load_pipeline_autoencoder(opened.folder, device)
    return load_autoencoder(opened.autoencoder_path, opened.info.autoencoder_subfolder, device)


def load_pipeline_autoencoder(folder: Path, device: torch.device | str = "cpu") -> Autoencoder:
    """The autoencoder of a pipeline folder, float32.

    Raises:
        ConfigError: its weights are missing, pickled or truncated.
    """
    part = folder / "vae"
    is_tiny = read_config(part / "config.json")["_class_name"] == "AutoencoderTiny"
    return DiffusersVAE(load_module(AutoencoderTiny, part) if is_tiny else load_module(AutoencoderKL, part), device)


def load_checkpoint_text_encoder(opened: Checkpoint, device: torch.device | str = "cpu") -> TextEncoder:
    """A checkpoint's captions.

    Raises:
        ConfigError: an encoder or a tokenizer does not load from where the checkpoint says, or does not fit the network.
    """
    if opened.info.pretrained is not None:
        return PipelineTextEncoder(opened.folder, opened.info, device)
    return MiniLMTextEncoder(opened.text_encoder, device)


class DownsamplingDecoder:
    """An autoencoder whose images are reduced to `side`, so that checkpoints of several resolutions are scored alike.

    Antialiased bicubic, on values that are rounded to grey levels before and after, as images on disk would be.
    """

    def __init__(self, autoencoder: Autoencoder, side: int) -> None:
        self.autoencoder, self.side = autoencoder, side
        self.latent_channels, self.factor = autoencoder.latent_channels, autoencoder.factor

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As the autoencoder: images of its own side."""
        return self.autoencoder.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        """float32 [N, C, L, L] -> uint8 [N, 3, side, side]."""
        images = self.autoencoder.decode(latents).float()
        reduced = functional.interpolate(images, size=(self.side, self.side), mode="bicubic", antialias=True)
        return reduced.round().clamp(0, 255).to(torch.uint8)

    def save(self, folder: Path) -> None:
        """The autoencoder itself."""
        self.autoencoder.save(folder)
