"""Transformers that look at images: CLIP (with its captions), DINO, DINOv2 and the preference models built on CLIP.

Legend: N images, H x W pixels, K captions, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from isocost.errors import ConfigError
from isocost.metrics.download import HUB, find_weights, load_into, read_tensors
from isocost.metrics.preprocessing import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    centre_crop,
    exact_fp32,
    normalize,
    resize_shorter_side,
    run_in_batches,
)

TEXT_BATCH = 32


@dataclass(frozen=True)
class ViTSpec:
    """A published tower: where it lies, its file and that file's SHA-256, and how images are made ready for it.

    `resize` is the shorter side after a bicubic resize, `side` that of the centre square the network sees. Where no SHA-256
    is written here, the one that the Hub lists is demanded.
    """

    title: str
    kind: Literal["clip", "dino", "dinov2"]
    repository: str
    revision: str
    file: str
    sha256: str | None
    resize: int
    side: int
    width: int

    @property
    def place(self) -> str:
        """The place on the Hub, as `find_weights` reads it."""
        return f"{HUB}{self.repository}@{self.revision}" if self.revision else f"{HUB}{self.repository}"


VIT_EXTRACTORS = {
    "clip-vit-b-32": ViTSpec(
        "CLIP ViT-B/32",
        "clip",
        "openai/clip-vit-base-patch32",
        "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268",
        "pytorch_model.bin",
        "a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f",
        224,
        224,
        512,
    ),
    "clip-vit-l-14": ViTSpec(
        "CLIP ViT-L/14",
        "clip",
        "openai/clip-vit-large-patch14",
        "32bd64288804d66eefd0ccbe215aa642df71cc41",
        "model.safetensors",
        "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
        224,
        224,
        768,
    ),
    "clip-vit-l-14-336": ViTSpec(
        "CLIP ViT-L/14 at 336",
        "clip",
        "openai/clip-vit-large-patch14-336",
        "ce19dc912ca5cd21c8a653c79e251e808ccabcd1",
        "pytorch_model.bin",
        "c6032c2e0caae3dc2d4fba35535fa6307dbb49df59c7e182b1bc4b3329b81801",
        336,
        336,
        768,
    ),
    "dinov2-vit-b-14": ViTSpec(
        "DINOv2 ViT-B/14",
        "dinov2",
        "facebook/dinov2-base",
        "f9e44c814b77203eaa57a6bdbbd535f21ede1415",
        "model.safetensors",
        "d73036b56966966d07975d696bde331762f37297e2f095de8cea0040c3aa0841",
        224,
        224,
        768,
    ),
    "dinov2-vit-l-14": ViTSpec(
        "DINOv2 ViT-L/14",
        "dinov2",
        "facebook/dinov2-large",
        "47b73eefe95e8d44ec3623f8890bd894b6ea2d6c",
        "model.safetensors",
        "399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23",
        224,
        224,
        1024,
    ),
    "dino-vit-s-16": ViTSpec("DINO ViT-S/16", "dino", "facebook/dino-vits16", "", "pytorch_model.bin", None, 256, 224, 384),
    "pickscore": ViTSpec("PickScore", "clip", "yuvalkirstain/PickScore_v1", "", "model.safetensors", None, 224, 224, 1024),
    "hpsv2": ViTSpec("HPSv2", "clip", "adams-story/HPSv2-hf", "", "model.safetensors", None, 224, 224, 1024),
}
"""DINOv2 as in arXiv 2306.04675 (resized to 224 whole); DINO as in DreamBooth (arXiv 2208.12242: 256, then the middle 224)."""


class ViTFeatureExtractor:
    """Features of images by a tower: the projected embedding of CLIP, the class token of DINO and DINOv2, not normalized.

    Raises:
        ConfigError: the weights or the configuration cannot be had, or belong to another network.
    """

    BUCKET = 16

    def __init__(self, name: str, weights: str | None = None, device: torch.device | str = "cpu") -> None:
        """`weights` is the Hub's or a local folder in the layout of transformers; by default the tower's own repository."""
        self.tower = VIT_EXTRACTORS[name]
        self.device = torch.device(device)
        file = find_weights(weights or self.tower.place, known_sha256=self.tower.sha256, title=name, hub_file=self.tower.file)
        self._folder = file.path.parent
        self.config = _config(self._folder, self.tower, name)
        self._network: Any = _build(self.config, self.tower.kind)
        load_into(self._network, _current_names(read_tensors(file.path), self._network), file.path)
        self._network.to(self.device)
        self.width = _width(self.config, self.tower.kind)
        self.side = _side(self.config, self.tower.kind)
        self.resize = self.tower.resize * self.side // self.tower.side
        self._mean, self._std = (CLIP_MEAN, CLIP_STD) if self.tower.kind == "clip" else (IMAGENET_MEAN, IMAGENET_STD)
        pooled = "projection" if self.tower.kind == "clip" else "cls"
        norm = "clip" if self.tower.kind == "clip" else "imagenet"
        self.id = (
            f"{name}:{file.sha256[:16]}/resize=bicubic-antialias-levels-{self.resize}/side={self.side}/crop=centre"
            f"/norm={norm}/pool={pooled}/fp32"
        )

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] to float32 [N, D], in buckets (`run_in_batches`)."""
        return run_in_batches(images, self._features, bucket=self.BUCKET, width=self.width, device=self.device)

    def _features(self, rows: Tensor) -> Tensor:
        seen = normalize(centre_crop(resize_shorter_side(rows.float(), self.resize), self.side), self._mean, self._std)
        if self.tower.kind == "clip":
            return self._network.visual_projection(self._network.vision_model(pixel_values=seen).pooler_output)
        return self._network(pixel_values=seen).last_hidden_state[:, 0]


class CLIPFeatureExtractor(ViTFeatureExtractor):
    """A CLIP model, which also embeds text."""

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts, float32 [K, D], not normalized; each is cut at the tower's number of tokens."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
        most = self.config.text_config.max_position_embeddings
        embedded = torch.empty(len(texts), self.width)
        for start in range(0, len(texts), TEXT_BATCH):
            some = list(texts[start : start + TEXT_BATCH])
            filled = some + [""] * (TEXT_BATCH - len(some))
            tokens = tokenizer(filled, padding="max_length", truncation=True, max_length=most, return_tensors="pt")
            with exact_fp32(self.device):
                inputs = {key: tokens[key].to(self.device) for key in ("input_ids", "attention_mask")}
                projected = self._network.text_projection(self._network.text_model(**inputs).pooler_output)
            embedded[start : start + len(some)] = projected[: len(some)].cpu()
        return embedded

    @property
    def scale(self) -> float:
        """What PickScore and HPSv2 multiply the cosine by: the exponential of the trained temperature."""
        return float(self._network.logit_scale.exp())


def _build(config: Any, kind: str) -> nn.Module:
    from transformers import CLIPModel, Dinov2Model, ViTModel

    network_type = {"clip": CLIPModel, "dinov2": Dinov2Model, "dino": ViTModel}[kind]
    options = {"add_pooling_layer": False} if kind == "dino" else {}
    with torch.random.fork_rng(devices=[]):
        return network_type(config, **options).eval().requires_grad_(False)


def _config(folder: Path, tower: ViTSpec, name: str) -> Any:
    from transformers import CLIPConfig, Dinov2Config, ViTConfig

    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"{name}: {file}: no such file; a tower is a folder with config.json beside its weights")
    config_type = {"clip": CLIPConfig, "dinov2": Dinov2Config, "dino": ViTConfig}[tower.kind]
    return config_type.from_json_file(file)


def _width(config: Any, kind: str) -> int:
    return config.projection_dim if kind == "clip" else config.hidden_size


def _side(config: Any, kind: str) -> int:
    """The side that the network sees. DINOv2 was trained at 518 and is asked at 224: its positions are interpolated."""
    if kind == "dinov2":
        return VIT_EXTRACTORS["dinov2-vit-b-14"].side
    return config.vision_config.image_size if kind == "clip" else config.image_size


def _current_names(tensors: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Without the buffers that older files keep and the poolers that nothing here reads."""
    own = network.state_dict()
    unread = ("position_ids", "pooler.dense.weight", "pooler.dense.bias")
    return {name: tensor for name, tensor in tensors.items() if name in own or not name.endswith(unread)}
