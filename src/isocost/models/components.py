"""Codec and caption encoders of a checkpoint: ours by its own facts, a published one's as diffusers' pipelines use them.

Shapes: N captions, T tokens, D width of the states, P width of a pooled caption.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as functional
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from isocost.models.autoencoder import AutoencoderCodec, Codec, load_codec
from isocost.models.checkpoint import Checkpoint
from isocost.models.pretrained.files import load_module, read_config
from isocost.models.pretrained.prompt_encoder import PromptEncoder
from isocost.models.text_encoder import CaptionEncoder, TextCodec


def codec_of(opened: Checkpoint, device: torch.device | str = "cpu") -> Codec:
    """A checkpoint's codec.

    Raises:
        RequestError: it does not load from where the checkpoint says.
    """
    if opened.info.given is not None:
        return pipeline_codec(opened.folder, device)
    return load_codec(opened.codec_path, opened.info.codec_subfolder, device)


def pipeline_codec(folder: Path, device: torch.device | str = "cpu") -> Codec:
    """The autoencoder of a pipeline folder, float32.

    Raises:
        RequestError: its weights are missing, pickled or truncated.
    """
    part = folder / "vae"
    is_tiny = read_config(part / "config.json")["_class_name"] == "AutoencoderTiny"
    return AutoencoderCodec(load_module(AutoencoderTiny, part) if is_tiny else load_module(AutoencoderKL, part), device)


def text_of(opened: Checkpoint, device: torch.device | str = "cpu") -> CaptionEncoder:
    """A checkpoint's captions.

    Raises:
        RequestError: an encoder or a tokenizer does not load from where the checkpoint says, or does not fit the network.
    """
    if opened.info.given is not None:
        return PromptEncoder(opened.folder, opened.info, device)
    return TextCodec(opened.text, device)


class ReducedCodec:
    """A codec whose pictures are reduced to `side`, so that checkpoints of several resolutions are scored alike.

    Antialiased bicubic, on values that are rounded to grey levels before and after, as pictures on disk would be.
    """

    def __init__(self, codec: Codec, side: int) -> None:
        self.codec, self.side = codec, side
        self.latent_channels, self.factor = codec.latent_channels, codec.factor

    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """As the codec: pictures of its own side."""
        return self.codec.encode(pictures)

    def decode(self, latents: Tensor) -> Tensor:
        """float32 [N, C, L, L] -> uint8 [N, 3, side, side]."""
        pictures = self.codec.decode(latents).float()
        reduced = functional.interpolate(pictures, size=(self.side, self.side), mode="bicubic", antialias=True)
        return reduced.round().clamp(0, 255).to(torch.uint8)

    def save(self, folder: Path) -> None:
        """The codec itself."""
        self.codec.save(folder)
