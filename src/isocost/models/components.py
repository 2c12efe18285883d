"""Load the autoencoder and the text encoder of a checkpoint.

A trained checkpoint names both in its `isocost.json`; a published one uses those of its diffusers pipeline.

Shapes: N images, C latent channels, L latent size.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor

from isocost.config.sampling import VaeSpec
from isocost.models.autoencoder import BUILTIN_AUTOENCODER, Autoencoder, load_autoencoder
from isocost.models.checkpoint import CheckpointSource
from isocost.models.pretrained.prompt_encoder import PipelineTextEncoder
from isocost.models.text_encoder import BUILTIN_TEXT_ENCODER, MiniLMTextEncoder, TextEncoder
from isocost.utils.file_hash import file_sha256

CONTENT_SUFFIXES = (".json", ".txt", ".model", ".safetensors")
"""Suffixes of configs, tokenizers and weights."""


def load_checkpoint_autoencoder(
    checkpoint: CheckpointSource, device: torch.device | str = "cpu", vae: VaeSpec | None = None
) -> Autoencoder:
    """Load the autoencoder of a checkpoint.

    Args:
        checkpoint: the checkpoint.
        device: device to load it on.
        vae: its dtype, tiling and slicing.

    Raises:
        ConfigError: the path that the checkpoint names holds no loadable autoencoder, or it does not support `vae`.
    """
    if checkpoint.info.pretrained is not None:
        return load_pipeline_autoencoder(checkpoint.folder, device, vae)
    return load_autoencoder(checkpoint.autoencoder_path, checkpoint.info.autoencoder_subfolder, device, vae)


def load_pipeline_autoencoder(folder: Path, device: torch.device | str = "cpu", vae: VaeSpec | None = None) -> Autoencoder:
    """Load the autoencoder of a diffusers pipeline folder, in float32 if `vae` names no other dtype.

    Raises:
        ConfigError: its weights are missing, pickled, truncated, NaN or infinite, its scaling factor is not a number, or it
            does not support `vae`.
    """
    return load_autoencoder(folder / "vae", device=device, vae=vae)


def load_checkpoint_text_encoder(checkpoint: CheckpointSource, device: torch.device | str = "cpu") -> TextEncoder:
    """Load the text encoder of a checkpoint.

    Raises:
        ConfigError: a text encoder or tokenizer cannot be loaded from the path that the checkpoint names, or does not fit the
            denoiser.
    """
    if checkpoint.info.pretrained is not None:
        return PipelineTextEncoder(checkpoint.folder, checkpoint.info, device)
    return MiniLMTextEncoder(checkpoint.text_encoder, device)


def component_content(path: str | Path, subfolder: str | None = None) -> str | None:
    """Digest of the files that an autoencoder or a text encoder is loaded from: configs, weights and tokenizer.

    Args:
        path: a folder, a Hub id or a built-in name.
        subfolder: folder of the component inside `path`; the tokenizer is next to it.

    Returns:
        16 hexadecimal digits; None for a Hub id and a built-in name, whose content the name decides.
    """
    root = Path(path)
    if str(path) in (BUILTIN_AUTOENCODER, BUILTIN_TEXT_ENCODER) or not root.is_dir():
        return None
    folders = [root / subfolder, root / subfolder.replace("text_encoder", "tokenizer")] if subfolder else [root]
    sha = hashlib.sha256()
    for folder in dict.fromkeys(folders):
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            if file.is_file() and file.suffix in CONTENT_SUFFIXES:
                sha.update(f"{file.relative_to(root).as_posix()} {file_sha256(file)}\n".encode())
    return sha.hexdigest()[:16]


class DownsamplingDecoder:
    """An autoencoder that downsamples decoded images to `size`, so that checkpoints of all resolutions are scored equally.

    Uses antialiased bicubic interpolation. Pixel values are rounded to grey levels before and after, as in image files.
    """

    def __init__(self, autoencoder: Autoencoder, size: int) -> None:
        self.autoencoder, self.size = autoencoder, size
        self.latent_channels, self.factor = autoencoder.latent_channels, autoencoder.factor

    @property
    def fallbacks(self) -> list[str]:
        """Those of the wrapped autoencoder."""
        return self.autoencoder.fallbacks

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images at the autoencoder's own resolution; they are not resized."""
        return self.autoencoder.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode float32 [N, C, L, L] to uint8 [N, 3, size, size]."""
        images = self.autoencoder.decode(latents).float()
        resized = functional.interpolate(images, size=(self.size, self.size), mode="bicubic", antialias=True)
        return resized.round().clamp(0, 255).to(torch.uint8)

    def save(self, folder: Path) -> None:
        """Save the wrapped autoencoder."""
        self.autoencoder.save(folder)
