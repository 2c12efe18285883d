"""Autoencoders: images to latents and back.

Shapes: N images, R resolution, C latent channels, L latent size = R / factor.
Images are uint8 [N, 3, R, R]; latents are float32 [N, C, L, L] of about unit variance.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import save_file
from torch import Tensor

from isocost.config.sampling import VaeSpec
from isocost.errors import ConfigError, RunError
from isocost.models.checkpoint import refuse_pickles
from isocost.models.pretrained.files import find_component, load_module, read_config
from isocost.models.weight_checks import check_finite
from isocost.utils.artifact_store import MANIFEST, verified_manifest
from isocost.utils.device import is_out_of_memory
from isocost.utils.tensor_files import read_tensors

logger = logging.getLogger(__name__)
T = TypeVar("T")

BUILTIN_AUTOENCODER = "scenes"
_CLASSES: dict[str, type[AutoencoderKL] | type[AutoencoderTiny]] = {
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderTiny": AutoencoderTiny,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

PCA_FILE = "linear_autoencoder.safetensors"
MAX_IMAGES_PER_CALL = 32
MAX_SIDE_OF_A_FULL_CALL = 64
PIXELS_PER_CALL = 128 * 128


def images_per_call(resolution: int) -> int:
    """Number of images per call of an autoencoder, whose activations take most of the memory of a published pipeline.

    It depends only on the size of the images, so that an image has the same bits on every machine, whatever is decoded with
    it: 32 images up to 64 x 64 pixels, fewer for larger images, and one from 91 x 91 pixels on.

    Args:
        resolution: side of an image in pixels.
    """
    if resolution <= MAX_SIDE_OF_A_FULL_CALL:
        return MAX_IMAGES_PER_CALL
    return max(1, min(MAX_IMAGES_PER_CALL, PIXELS_PER_CALL // resolution**2))


class Autoencoder(Protocol):
    """Encodes images to the mean and standard deviation of their latents, and decodes latents.

    Attributes:
        latent_channels: channels C of a latent.
        factor: pixels per latent position along one side.
    """

    latent_channels: int
    factor: int

    @property
    def fallbacks(self) -> list[str]:
        """A sentence for every kind of call that was divided because memory ran out."""

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode uint8 [N, 3, R, R] to the mean and standard deviation of the latents, each float32 [N, C, L, L].

        Raises:
            RunError: a latent is NaN or infinite.
        """

    def decode(self, latents: Tensor) -> Tensor:
        """Decode float32 [N, C, L, L] to uint8 [N, 3, R, R], rounded to the nearest grey level.

        Raises:
            RunError: a pixel is NaN or infinite. As a grey level it would be black.
        """

    def save(self, folder: Path) -> None:
        """Write the files that `load_autoencoder` reads."""


def to_unit(images: Tensor) -> Tensor:
    """Convert uint8 [N, 3, R, R] to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def to_uint8(values: Tensor) -> Tensor:
    """Convert floats in [-1, 1] to uint8, rounded and clamped."""
    return ((values + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


class PCAAutoencoder:
    """Patch PCA: maps each `patch` x `patch` x 3 block of pixels to its first C components, each scaled to unit variance.

    A trained autoencoder has to beat this baseline. diffusers has no equivalent class.
    """

    def __init__(self, mean: Tensor, basis: Tensor, scale: Tensor, patch: int) -> None:
        """
        Args:
            mean: mean block, [P] with P = 3 patch^2.
            basis: components, [C, P] with orthonormal rows.
            scale: standard deviation of each component, [C].
            patch: side of a block in pixels.
        """
        self.mean, self.basis, self.scale, self.factor = mean, basis, scale, patch
        self.latent_channels = basis.shape[0]
        self.fallbacks: list[str] = []

    @classmethod
    def fit(cls, images: Tensor, patch: int, num_channels: int) -> PCAAutoencoder:
        """Fit to uint8 [N, 3, R, R] with the eigenvectors of the patch covariance, in float64.

        Raises:
            ConfigError: `patch` does not divide the resolution, or `num_channels` exceeds the values of a patch.
        """
        patch_values = 3 * patch * patch
        if images.shape[-1] % patch:
            raise ConfigError(f"autoencoder.patch={patch} does not divide the resolution {images.shape[-1]}")
        if num_channels > patch_values:
            raise ConfigError(
                f"autoencoder.num_channels={num_channels} exceeds the {patch_values} values of a {patch}x{patch} patch"
            )
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
        _refuse_nonfinite(latents, images, "encod")
        return latents, torch.zeros_like(latents)

    def decode(self, latents: Tensor) -> Tensor:
        scaled = latents.to(self.mean.device) * self.scale[:, None, None]
        blocks = torch.einsum("cp,nchw->nphw", self.basis, scaled) + self.mean[:, None, None]
        _refuse_nonfinite(blocks, latents, "decod")
        return to_uint8(torch.nn.functional.pixel_shuffle(blocks, self.factor))

    def save(self, folder: Path) -> None:
        tensors = {"mean": self.mean, "basis": self.basis, "scale": self.scale}
        save_file(tensors, folder / PCA_FILE, metadata={"patch": str(self.factor)})

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> PCAAutoencoder:
        tensors = read_tensors(folder / PCA_FILE, "mean", "basis", "scale", device=device)
        check_finite(tensors, folder)
        patch = round((tensors["mean"].numel() / 3) ** 0.5)
        return cls(tensors["mean"], tensors["basis"], tensors["scale"], patch)


class DiffusersVAE:
    """Any diffusers autoencoder. Latents are `(z - shift_factor) * scaling_factor`, with the factors of its own config."""

    def __init__(
        self, network: AutoencoderKL | AutoencoderTiny, device: torch.device | str = "cpu", vae: VaeSpec | None = None
    ) -> None:
        """
        Args:
            network: the autoencoder, which is changed in place.
            device: device to move it to.
            vae: dtype, tiling and slicing.

        Raises:
            ConfigError: a factor of the config is not a finite number, the scaling factor is 0, or there is no tiling.
        """
        vae = vae or VaeSpec()
        self.network = network.to(device).eval().requires_grad_(False)
        if network.dtype != DTYPES[vae.dtype]:
            torch.nn.Module.to(network, DTYPES[vae.dtype])
        self.network.decoder.to(memory_format=torch.channels_last)  # decodes 1.7 times as fast on a CPU
        config = network.config
        self.latent_channels = int(config.latent_channels)
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.scale = _factor(config, "scaling_factor", 1.0)
        self.shift = _factor(config, "shift_factor", 0.0)
        self.fallbacks: list[str] = []
        if vae.tile_size is not None:
            self._enable_tiling(vae.tile_size)
        if vae.slicing:
            network.enable_slicing()

    def _enable_tiling(self, tile_size: int) -> None:
        if isinstance(self.network, AutoencoderTiny) and self.network.spatial_scale_factor != self.factor:
            raise ConfigError(
                f"vae tile size: this tiny autoencoder has {self.factor} pixels per latent position, and diffusers tiles only "
                f"those with {self.network.spatial_scale_factor}; leave it out"
            )
        self.network.tile_sample_min_size = tile_size
        self.network.tile_latent_min_size = tile_size // self.factor
        self.network.enable_tiling()

    @torch.inference_mode()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        batches = self._split(images, images.shape[-1])
        encoded = [part for batch in batches for part in self._halving(self._encode, batch, "encod", images.shape[-1])]
        mean, std = (torch.cat(parts) for parts in zip(*encoded, strict=True))
        _refuse_nonfinite(mean, images, "encod")
        _refuse_nonfinite(std, images, "encod")
        return (mean - self.shift) * self.scale, std * self.scale

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        encoded = self.network.encode(to_unit(images.to(self.network.device)).to(self.network.dtype))
        if hasattr(encoded, "latent_dist"):
            return encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
        return encoded.latents.float(), torch.zeros_like(encoded.latents, dtype=torch.float32)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        resolution = latents.shape[-1] * self.factor
        batches = self._split(latents, resolution)
        return torch.cat([part for batch in batches for part in self._halving(self._decode, batch, "decod", resolution)])

    def _decode(self, latents: Tensor) -> Tensor:
        scaled = latents.to(self.network.device) / self.scale + self.shift
        values = self.network.decode(scaled.to(self.network.dtype)).sample.float()
        _refuse_nonfinite(values, latents, "decod")
        return to_uint8(values)

    def _halving(self, function: Callable[[Tensor], T], batch: Tensor, verb: str, resolution: int) -> list[T]:
        """Call a function with a batch, or with halves of it when memory runs out.

        Raises:
            RunError: one image does not fit into memory.
        """
        try:
            return [function(batch)]
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise RunError(
                    f"{verb}ing one image of {resolution} x {resolution} pixels does not fit into memory; "
                    "decode in tiles (vae tile size) or in bf16 (vae dtype)"
                ) from error
        half = -(-len(batch) // 2)
        fallback = f"out of memory: {len(batch)} images are {verb}ed in calls of {half}; the last bits can differ"
        if fallback not in self.fallbacks:
            logger.warning(fallback)
            self.fallbacks.append(fallback)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return [part for half_batch in batch.split(half) for part in self._halving(function, half_batch, verb, resolution)]

    def _split(self, batch: Tensor, resolution: int) -> tuple[Tensor, ...]:
        """Small images stay in one call, large ones are divided so that the activations fit into memory."""
        return (batch,) if resolution <= MAX_SIDE_OF_A_FULL_CALL else batch.split(images_per_call(resolution))

    def save(self, folder: Path) -> None:
        self.network.save_pretrained(folder, safe_serialization=True)


def _refuse_nonfinite(values: Tensor, inputs: Tensor, verb: str) -> None:
    """Raise RunError if the result of an autoencoder, [N, ...], or its input, [N, ...], has NaN or inf."""
    is_finite = values.isfinite().flatten(1).all(1)
    if bool(is_finite.all()):
        return
    number = f"NaN or inf for {int((~is_finite).sum())} of {len(values)} images that are {verb}ed"
    if not bool(inputs.isfinite().all()):
        raise RunError(f"the latents have {number}; the network that made them is damaged or needs dtype fp32")
    raise RunError(
        f"the autoencoder gives {number}; its weights are damaged or too large: get its files again, or use another autoencoder"
    )


def _factor(config: Any, name: str, default: float) -> float:
    value = config.get(name)
    if value is None:
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or (name == "scaling_factor" and value == 0):
        raise ConfigError(f"autoencoder: its config.json has {name} = {value}; give the number that it was trained with")
    return float(value)


def autoencoder_folder(path: str | Path, subfolder: str | None = None) -> Path:
    """Folder of an autoencoder that is given by folder, Hub id or built-in name.

    Raises:
        ConfigError: there is none.
    """
    if str(path) == BUILTIN_AUTOENCODER:
        path = str(resources.files("isocost.assets") / "scenes-autoencoder")
    root = find_component(path, subfolder)
    return root / subfolder if subfolder else root


def load_autoencoder(
    path: str | Path, subfolder: str | None = None, device: torch.device | str = "cpu", vae: VaeSpec | None = None
) -> Autoencoder:
    """Load an autoencoder.

    Args:
        path: a `PCAAutoencoder` folder, a diffusers autoencoder folder or Hub id, or `scenes` (shipped with isocost).
        subfolder: folder of the autoencoder inside `path`.
        device: device to load it on.
        vae: dtype, tiling and slicing of an autoencoder of diffusers.

    Raises:
        ConfigError: `path` holds no loadable autoencoder or only pickled weights, a weight is missing, NaN or infinite, or the
            autoencoder does not support `vae`.
        RunError: a file of an artefact does not match its checksum.
    """
    vae = vae or VaeSpec()
    folder = autoencoder_folder(path, subfolder)
    if (folder / MANIFEST).is_file():
        verified_manifest(folder)
    if (folder / PCA_FILE).is_file():
        check_vae(folder, None, vae)
        return PCAAutoencoder.load(folder, device)
    config = folder / "config.json"
    if not config.is_file():
        refuse_pickles(folder)
        raise ConfigError(f"{folder}: no config.json; give a diffusers autoencoder folder (perhaps with subfolder: vae)")
    class_name = read_config(config).get("_class_name")
    if class_name not in _CLASSES:
        raise ConfigError(f"{config}: _class_name = {class_name}: supported classes: {', '.join(_CLASSES)}")
    return _on_device(load_module(_CLASSES[class_name], folder, DTYPES[vae.dtype]), device, folder, vae)


def check_vae(path: str | Path, subfolder: str | None, vae: VaeSpec) -> None:
    """Check, before anything is loaded, that an autoencoder has the settings `vae`.

    Raises:
        ConfigError: it is a `PCAAutoencoder`, which has none.
    """
    folder = Path(path) / subfolder if subfolder else Path(path)
    if not vae.is_default and (folder / PCA_FILE).is_file():
        raise ConfigError(f"{folder}: a PCA autoencoder has no vae dtype, tiling or slicing; leave them out")


def _on_device(
    network: AutoencoderKL | AutoencoderTiny, device: torch.device | str, source: str | Path, vae: VaeSpec
) -> DiffusersVAE:
    try:
        return DiffusersVAE(network, device, vae)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _to_blocks(values: Tensor, patch: int) -> Tensor:
    """Rearrange [N, 3, R, R] to [N, 3 patch^2, R / patch, R / patch]; pixel_shuffle is the inverse."""
    return torch.nn.functional.pixel_unshuffle(values, patch)
