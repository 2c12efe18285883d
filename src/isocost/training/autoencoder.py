"""Train a study's own autoencoder: a diffusers AutoencoderKL with an L1 + perceptual + KL loss.

Shapes: N images in a batch, R resolution, C latent channels, L latent size.
Source of the recipe: Rombach et al., arXiv 2112.10752, sec. 3.1, without the adversarial term.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from isocost.config.model import PCAAutoencoderSpec, TrainedAutoencoderSpec
from isocost.errors import ConfigError, RunError
from isocost.metrics.efficientnet import EfficientNetLite0
from isocost.metrics.lpips import load_lpips
from isocost.models.autoencoder import Autoencoder, DiffusersVAE, PCAAutoencoder, to_unit

Progress = Callable[[int, float], None]
MIN_PERCEPTUAL_SIZE = 32


def build_autoencoder(spec: TrainedAutoencoderSpec, resolution: int) -> AutoencoderKL:
    """Build an untrained AutoencoderKL of `block_widths`. Each level after the first halves the resolution.

    Raises:
        ConfigError: the resolution is not divisible by 2 for every level after the first.
    """
    levels = len(spec.block_widths)
    if resolution % 2 ** (levels - 1):
        raise ConfigError(
            f"autoencoder.block_widths: {levels} levels need a resolution divisible by {2 ** (levels - 1)}, "
            f"but data.resolution is {resolution}; take fewer levels"
        )
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=spec.num_channels,
        block_out_channels=spec.block_widths,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=spec.layers_per_block,
        norm_num_groups=math.gcd(8, *spec.block_widths),
        sample_size=resolution,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def train_autoencoder(
    spec: TrainedAutoencoderSpec, images: Tensor, *, device: str = "cpu", progress: Progress | None = None
) -> DiffusersVAE:
    """Train an autoencoder and normalize its latents at the end.

    Args:
        images: training images, uint8 [N, 3, R, R]; their order is a function of `spec.seed`.
        progress: called now and then with the images seen and the loss.

    Raises:
        RunError: the loss or a weight is not finite.
    """
    torch.manual_seed(spec.seed)
    resolution = images.shape[-1]
    network = build_autoencoder(spec, resolution).to(device, memory_format=torch.channels_last)
    perceptual = _perceptual(spec, resolution, device) if spec.perceptual_weight else None
    optimizer = torch.optim.AdamW(network.parameters(), lr=spec.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    num_steps = math.ceil(spec.num_images / spec.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, spec.lr, total_steps=num_steps + 1, pct_start=0.05)
    num_perceptual = math.ceil(spec.batch_size * spec.perceptual_fraction)
    order = torch.Generator().manual_seed(spec.seed)
    noise = torch.Generator(device).manual_seed(spec.seed + 1)
    for step in range(num_steps):
        indices = torch.randint(len(images), (spec.batch_size,), generator=order)
        target = to_unit(images[indices].to(device)).contiguous(memory_format=torch.channels_last)
        posterior = network.encode(target).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=noise, device=device)
        decoded = network.decode(latents).sample
        loss = (decoded - target).abs().mean() + spec.kl_weight * posterior.kl().mean() / target[0].numel()
        if perceptual is not None:
            loss = loss + spec.perceptual_weight * perceptual(decoded[:num_perceptual], target[:num_perceptual]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == num_steps - 1:
            value = float(loss.detach())
            if not math.isfinite(value):
                raise RunError(
                    f"autoencoder training: the loss is {value} at image {step * spec.batch_size}; lower autoencoder.lr"
                )
            if progress is not None:
                progress(min((step + 1) * spec.batch_size, spec.num_images), value)
    network.eval()
    normalize_latents(network, images[:2048])
    if not all(bool(torch.isfinite(tensor).all()) for tensor in network.state_dict().values()):
        raise RunError("autoencoder training: the weights contain NaN or inf at the end; lower autoencoder.lr")
    return DiffusersVAE(network, device)


@torch.no_grad()
def normalize_latents(network: AutoencoderKL, images: Tensor) -> None:
    """Fold a per-channel shift and scale into quant_conv and post_quant_conv so that latents have mean 0 and variance 1.

    Decoded images do not change, and the config needs no scaling factor, so diffusers pipelines load the network unchanged.

    Args:
        images: uint8 [N, 3, R, R], on which mean and variance are measured.
    """
    posteriors = [network.encode(to_unit(batch.to(network.device))).latent_dist for batch in images.split(256)]
    means = torch.cat([posterior.mean for posterior in posteriors])
    stds = torch.cat([posterior.std for posterior in posteriors])
    shift = means.mean((0, 2, 3))
    scale = (means.var((0, 2, 3)) + stds.square().mean((0, 2, 3))).sqrt()
    channels = len(shift)
    quant, post = network.quant_conv, network.post_quant_conv
    quant.weight[:channels] /= scale[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - shift) / scale
    quant.bias[channels:] -= 2 * scale.log()
    post.bias += post.weight[:, :, 0, 0] @ shift
    post.weight *= scale[None, :, None, None]


def fit_autoencoder(
    spec: PCAAutoencoderSpec | TrainedAutoencoderSpec, images: Tensor, *, device: str = "cpu", progress: Progress | None = None
) -> Autoencoder:
    """Fit or train the autoencoder of a study on its training images, uint8 [N, 3, R, R]."""
    if isinstance(spec, PCAAutoencoderSpec):
        return PCAAutoencoder.fit(images[: spec.num_fit_images], spec.patch, spec.num_channels)
    return train_autoencoder(spec, images, device=device, progress=progress)


def _perceptual(spec: TrainedAutoencoderSpec, resolution: int, device: str) -> Any:
    if spec.perceptual == "efficientnet-lite0":
        return EfficientNetLite0(side=max(MIN_PERCEPTUAL_SIZE, resolution), device=device).perceptual
    if not Path(spec.perceptual).is_file():
        raise ConfigError(
            f"autoencoder.perceptual: {spec.perceptual}: no such file; give efficientnet-lite0 or a safetensors file of AlexNet"
        )
    return load_lpips(Path(spec.perceptual), device)
