"""Vision transformers as feature extractors: CLIP (with its text encoder), DINO, DINOv2, and preference models built on CLIP.

Shapes: N images, H x W pixels, K texts, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isocost.errors import ConfigError
from isocost.metrics.download import find_weights, load_into, read_tensors
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
from isocost.metrics.vit_models import VIT_EXTRACTORS, ViTSpec

TEXT_BATCH = 32


class ViTFeatureExtractor:
    """Image features of a published vision transformer, not normalized.

    They are the projected image embedding of CLIP, and the class token of DINO and DINOv2.
    """

    BATCH_SIZE = 16

    def __init__(self, name: str, weights: str | None = None, device: torch.device | str = "cpu") -> None:
        """Load the network.

        Args:
            name: a key of `VIT_EXTRACTORS`.
            weights: a Hub repository or a local folder in the layout of transformers, as a source of
                `isocost.metrics.download`; by default the published repository.
            device: where the network runs.

        Raises:
            ConfigError: weights or configuration cannot be loaded, or belong to another network.
        """
        self.spec = VIT_EXTRACTORS[name]
        self.device = torch.device(device)
        file = find_weights(weights or self.spec.source, known_sha256=self.spec.sha256, title=name, hub_file=self.spec.file)
        self._folder = file.path.parent
        self.config = _load_config(self._folder, self.spec, name)
        self._network: Any = _build_network(self.config, self.spec.kind)
        load_into(self._network, _without_unused(read_tensors(file.path), self._network), file.path)
        self._network.to(self.device)
        self.feature_dim = _feature_dim(self.config, self.spec.kind)
        self.side = _input_side(self.config, self.spec.kind)
        self.resize = self.spec.resize * self.side // self.spec.side
        self._mean, self._std = (CLIP_MEAN, CLIP_STD) if self.spec.kind == "clip" else (IMAGENET_MEAN, IMAGENET_STD)
        pooled = "projection" if self.spec.kind == "clip" else "cls"
        norm = "clip" if self.spec.kind == "clip" else "imagenet"
        self.id = (
            f"{name}:{file.sha256[:16]}/resize=bicubic-antialias-levels-{self.resize}/side={self.side}/crop=centre"
            f"/norm={norm}/pool={pooled}/fp32"
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 [N, D] of images uint8 [N, 3, H, W], in fixed batches (`run_in_batches`)."""
        return run_in_batches(
            images, self._features, batch_size=self.BATCH_SIZE, feature_dim=self.feature_dim, device=self.device
        )

    def _features(self, batch: Tensor) -> Tensor:
        pixels = normalize(centre_crop(resize_shorter_side(batch.float(), self.resize), self.side), self._mean, self._std)
        if self.spec.kind == "clip":
            return self._network.visual_projection(self._network.vision_model(pixel_values=pixels).pooler_output)
        return self._network(pixel_values=pixels).last_hidden_state[:, 0]


class CLIPFeatureExtractor(ViTFeatureExtractor):
    """A CLIP model, which also embeds text."""

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Text embeddings, float32 [K, D], not normalized; each text is truncated to the network's number of tokens."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
        max_tokens = self.config.text_config.max_position_embeddings
        embeddings = torch.empty(len(texts), self.feature_dim)
        for start in range(0, len(texts), TEXT_BATCH):
            batch = list(texts[start : start + TEXT_BATCH])
            padded = batch + [""] * (TEXT_BATCH - len(batch))
            tokens = tokenizer(padded, padding="max_length", truncation=True, max_length=max_tokens, return_tensors="pt")
            with exact_fp32(self.device):
                inputs = {key: tokens[key].to(self.device) for key in ("input_ids", "attention_mask")}
                projected = self._network.text_projection(self._network.text_model(**inputs).pooler_output)
            embeddings[start : start + len(batch)] = projected[: len(batch)].cpu()
        return embeddings

    @property
    def scale(self) -> float:
        """Factor of the cosine similarity in PickScore and HPSv2: the exponential of the trained log temperature."""
        return float(self._network.logit_scale.exp())


def _build_network(config: Any, kind: str) -> nn.Module:
    from transformers import CLIPModel, Dinov2Model, ViTModel

    network_type = {"clip": CLIPModel, "dinov2": Dinov2Model, "dino": ViTModel}[kind]
    options = {"add_pooling_layer": False} if kind == "dino" else {}
    with torch.random.fork_rng(devices=[]):
        return network_type(config, **options).eval().requires_grad_(False)


def _load_config(folder: Path, spec: ViTSpec, name: str) -> Any:
    from transformers import CLIPConfig, Dinov2Config, ViTConfig

    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"{name}: {file}: no such file; give a folder with config.json and the weights")
    config_type = {"clip": CLIPConfig, "dinov2": Dinov2Config, "dino": ViTConfig}[spec.kind]
    return config_type.from_json_file(file)


def _feature_dim(config: Any, kind: str) -> int:
    return config.projection_dim if kind == "clip" else config.hidden_size


def _input_side(config: Any, kind: str) -> int:
    """Height and width of the network's input in pixels.

    DINOv2 was trained at 518 pixels and is used at 224; transformers interpolates its position embeddings.
    """
    if kind == "dinov2":
        return VIT_EXTRACTORS["dinov2-vit-b-14"].side
    return config.vision_config.image_size if kind == "clip" else config.image_size


def _without_unused(tensors: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The tensors without the buffers of older files and the poolers that are not used here."""
    state = network.state_dict()
    unused = ("position_ids", "pooler.dense.weight", "pooler.dense.bias")
    return {name: tensor for name, tensor in tensors.items() if name in state or not name.endswith(unused)}
