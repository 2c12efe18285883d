"""Images <-> latents, captions <-> states.

Shapes: N images, R resolution, C latent channels, L latent side = R / factor, T tokens, D width of the prompt embeddings.
Images are uint8 [N, 3, R, R]; latents float32 [N, C, L, L] of about unit variance; states float32 [N, T, D].
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from isocost.errors import ConfigError
from isocost.models.checkpoint import refuse_pickles

BUILTIN_AUTOENCODER = "scenes"


class Autoencoder(Protocol):
    """Images to latent moments and back."""

    latent_channels: int
    factor: int

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [N, 3, R, R] -> mean and standard deviation of the latents, each float32 [N, C, L, L]."""

    def decode(self, latents: Tensor) -> Tensor:
        """float32 [N, C, L, L] -> uint8 [N, 3, R, R], rounded to the nearest grey level."""

    def save(self, folder: Path) -> None:
        """Write what `load_autoencoder` reads."""


def to_unit(images: Tensor) -> Tensor:
    """uint8 [N, 3, R, R] -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def to_uint8(values: Tensor) -> Tensor:
    """Float in [-1, 1] -> uint8, clamped and rounded."""
    return ((values + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


class PCAAutoencoder:
    """Patch PCA: each `patch` x `patch` x 3 block of pixels to its first C components, each scaled to unit variance.

    The baseline that a trained autoencoder has to beat; it has no diffusers form.
    """

    def __init__(self, mean: Tensor, basis: Tensor, scale: Tensor, patch: int) -> None:
        """`mean` [P], `basis` [C, P] with orthonormal rows, `scale` [C]; P = 3 patch^2."""
        self.mean, self.basis, self.scale, self.factor = mean, basis, scale, patch
        self.latent_channels = basis.shape[0]

    @classmethod
    def fit(cls, images: Tensor, patch: int, num_channels: int) -> PCAAutoencoder:
        """Fit to uint8 [N, 3, R, R] by the eigenvectors of the patches' covariance, in float64.

        Raises:
            ConfigError: patches do not divide the images, or hold fewer numbers than channels are asked for.
        """
        size = 3 * patch * patch
        if images.shape[-1] % patch:
            raise ConfigError(f"autoencoder.patch={patch} does not divide the resolution {images.shape[-1]}")
        if num_channels > size:
            raise ConfigError(f"autoencoder.num_channels={num_channels} exceeds the {size} numbers of a {patch}x{patch} patch")
        blocks = _to_blocks(to_unit(images), patch).transpose(0, 1).flatten(1).double()
        mean = blocks.mean(1)
        values, vectors = torch.linalg.eigh(torch.cov(blocks))
        basis = vectors[:, -num_channels:].flip(1).T.contiguous()
        scale = values[-num_channels:].flip(0).clamp_min(1e-12).sqrt()
        return cls(mean.float(), basis.float(), scale.float(), patch)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        blocks = _to_blocks(to_unit(images.to(self.mean.device)), self.factor)
        centred = blocks - self.mean[:, None, None]
        latents = torch.einsum("cp,nphw->nchw", self.basis, centred) / self.scale[:, None, None]
        return latents, torch.zeros_like(latents)

    def decode(self, latents: Tensor) -> Tensor:
        scaled = latents.to(self.mean.device) * self.scale[:, None, None]
        blocks = torch.einsum("cp,nchw->nphw", self.basis, scaled) + self.mean[:, None, None]
        return to_uint8(torch.nn.functional.pixel_shuffle(blocks, self.factor))

    def save(self, folder: Path) -> None:
        tensors = {"mean": self.mean, "basis": self.basis, "scale": self.scale}
        save_file(tensors, folder / "linear_autoencoder.safetensors", metadata={"patch": str(self.factor)})

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> PCAAutoencoder:
        tensors = load_file(folder / "linear_autoencoder.safetensors", device=str(device))
        patch = round((tensors["mean"].numel() / 3) ** 0.5)
        return cls(tensors["mean"], tensors["basis"], tensors["scale"], patch)


class DiffusersVAE:
    """Any diffusers autoencoder. Latents are `(z - shift_factor) * scaling_factor` by the checkpoint's own config."""

    def __init__(self, network: AutoencoderKL | AutoencoderTiny, device: torch.device | str = "cpu") -> None:
        self.network = network.to(device).eval().requires_grad_(False)
        self.network.decoder.to(memory_format=torch.channels_last)  # decodes 1.7 times as fast on a CPU
        config = network.config
        self.latent_channels = int(config.latent_channels)
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.scale = float(config.get("scaling_factor") or 1.0)
        self.shift = float(config.get("shift_factor") or 0.0)

    @torch.inference_mode()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        encoded = self.network.encode(to_unit(images.to(self.network.device)))
        if hasattr(encoded, "latent_dist"):
            mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
        else:
            mean, std = encoded.latents, torch.zeros_like(encoded.latents)
        return (mean - self.shift) * self.scale, std * self.scale

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        values = self.network.decode(latents.to(self.network.device, self.network.dtype) / self.scale + self.shift).sample
        return to_uint8(values.float())

    def save(self, folder: Path) -> None:
        self.network.save_pretrained(folder, safe_serialization=True)


def load_autoencoder(path: str | Path, subfolder: str | None = None, device: torch.device | str = "cpu") -> Autoencoder:
    """An autoencoder from a folder of ours, a diffusers autoencoder folder or Hub id, or `scenes` (shipped).

    Raises:
        ConfigError: nothing loadable there, or only pickles.
    """
    if str(path) == BUILTIN_AUTOENCODER:
        path = str(resources.files("isocost.assets") / "scenes-autoencoder")
    folder = Path(path) / subfolder if subfolder else Path(path)
    if (folder / "linear_autoencoder.safetensors").is_file():
        return PCAAutoencoder.load(folder, device)
    kind: type[AutoencoderKL] | type[AutoencoderTiny] = AutoencoderKL
    if folder.is_dir():
        refuse_pickles(folder)
        config = folder / "config.json"
        if not config.is_file():
            raise ConfigError(
                f"{folder}: no config.json; an autoencoder is a diffusers autoencoder folder (perhaps subfolder: vae)"
            )
        kind = AutoencoderTiny if json.loads(config.read_text()).get("_class_name") == "AutoencoderTiny" else AutoencoderKL
    options: dict[str, Any] = {"use_safetensors": True, "subfolder": subfolder, "low_cpu_mem_usage": False}
    try:
        return DiffusersVAE(kind.from_pretrained(str(path), **options), device)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: no autoencoder loads from there: {' '.join(str(error).split())[:200]}") from error


def _to_blocks(values: Tensor, patch: int) -> Tensor:
    """[N, 3, R, R] -> [N, 3 patch^2, R / patch, R / patch], undone by pixel_shuffle."""
    return torch.nn.functional.pixel_unshuffle(values, patch)
