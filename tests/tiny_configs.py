"""Shared by protocol tests: features without a network, embedded images, and images on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from isocost.config.data import ScenesSource
from isocost.data.latent_cache import load_images


class Thumbnail:
    """Features without a network: the mean colour of each of 16 tiles."""

    id = "thumbnail/4x4"
    feature_dim = 48

    def __call__(self, images: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)


class ThumbnailWithText(Thumbnail):
    """A thumbnail extractor that also embeds texts."""

    def encode_text(self, texts: list[str]) -> Tensor:
        return torch.stack([torch.full((48,), 1.0 + len(text)) for text in texts])


def scenes(num: int, side: int, seed: int = 0) -> Tensor:
    return load_images(ScenesSource(kind="scenes", num_images=num, seed=seed), side, 0).images


def save(folder: Path, images: Tensor, names: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, images.permute(0, 2, 3, 1).numpy(), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{name}.png")
    return folder
