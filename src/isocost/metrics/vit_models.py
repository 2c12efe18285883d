"""The published vision transformers that serve as feature extractors: repositories, file hashes and input sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ViTSpec:
    """A published vision transformer: its weights and its image preparation.

    Attributes:
        title: name in reports.
        kind: architecture.
        repository: on the Hugging Face Hub.
        revision: commit of the repository; empty for the newest.
        file: weights file in the repository.
        sha256: hash of that file; None uses the hash that the Hub lists.
        resize: pixels of the shorter side after the bicubic resize.
        side: pixels of the centre square that the network gets.
        feature_dim: features per image.
    """

    title: str
    kind: Literal["clip", "dino", "dinov2"]
    repository: str
    revision: str
    file: str
    sha256: str | None
    resize: int
    side: int
    feature_dim: int

    @property
    def source(self) -> str:
        """The source of the weights, as `isocost.metrics.download` reads it."""
        return f"hub:{self.repository}@{self.revision}" if self.revision else f"hub:{self.repository}"


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
"""DINOv2 as in arXiv 2306.04675: resized to 224. DINO as in DreamBooth (arXiv 2208.12242): resized to 256, middle 224."""
