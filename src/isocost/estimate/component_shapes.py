"""Shapes and GFLOP of a study's autoencoder, text encoder and feature extractors, without their weights.

A config is read from its folder or from the Hub's cache. If it is in neither, the name is looked up in a table of well-known
models, and the estimate reports this. Unknown names are refused; nothing is guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from huggingface_hub import try_to_load_from_cache

from isocost.config.evaluation import ProtocolSpec
from isocost.config.model import PCAAutoencoderSpec, PretrainedAutoencoderSpec, TextEncoderSpec, TrainedAutoencoderSpec
from isocost.config.study import StudySpec
from isocost.errors import ConfigError
from isocost.metrics.feature_extractors import EXTRACTORS
from isocost.models.autoencoder import BUILTIN_AUTOENCODER, DiffusersVAE, PCAAutoencoder
from isocost.models.component_costs import autoencoder_cost, pca_autoencoder_cost
from isocost.models.decoder_memory import autoencoder_on_meta
from isocost.training.autoencoder import build_autoencoder

# --- autoencoders -----------------------------------------------------------------------------------------------------------

_LEVELS = 4
STABLE_DIFFUSION: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * _LEVELS,
    "up_block_types": ("UpDecoderBlock2D",) * _LEVELS,
}
_SIXTEEN_CHANNELS = {**STABLE_DIFFUSION, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
_TINY = {"_class_name": "AutoencoderTiny"}

KNOWN_AUTOENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(
        (
            *(
                "stabilityai/sd-vae-ft-mse",
                "stabilityai/sd-vae-ft-ema",
                "stabilityai/sdxl-vae",
                "madebyollin/sdxl-vae-fp16-fix",
            ),
            *("CompVis/stable-diffusion-v1-4", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
            *("stabilityai/stable-diffusion-2", "stabilityai/stable-diffusion-2-base"),
            *("stabilityai/stable-diffusion-2-1", "stabilityai/stable-diffusion-2-1-base"),
            "stabilityai/stable-diffusion-xl-base-1.0",
        ),
        ("Stable Diffusion's autoencoder", STABLE_DIFFUSION),
    ),
    **dict.fromkeys(
        ("stabilityai/stable-diffusion-3-medium-diffusers", "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"),
        ("Stable Diffusion 3's autoencoder", _SIXTEEN_CHANNELS),
    ),
    **dict.fromkeys(("madebyollin/taesd", "madebyollin/taesdxl"), ("the tiny autoencoder TAESD", _TINY)),
}
"""Titles and configs of autoencoders by Hub id (arXiv 2112.10752, appendix; model cards)."""


@dataclass(frozen=True)
class AutoencoderShape:
    """Shape and cost of an autoencoder.

    Attributes:
        latent_channels: latent channels.
        factor: pixels per latent position along one side.
        encode_gflop: GFLOP to encode one image at the study's resolution.
        decode_gflop: GFLOP to decode one image at the study's resolution.
        description: sentence for the list of assumptions.
    """

    latent_channels: int
    factor: int
    encode_gflop: float
    decode_gflop: float
    description: str


def autoencoder_shape(study: StudySpec) -> AutoencoderShape:
    """Find the shape of a study's autoencoder.

    Raises:
        ConfigError: the config of a pretrained autoencoder is not available, and its name is unknown.
    """
    spec, resolution = study.training_parts.autoencoder, study.data.resolution
    if isinstance(spec, PCAAutoencoderSpec):
        return _pca_shape(spec.num_channels, spec.patch, resolution, "the study's PCA autoencoder")
    if isinstance(spec, TrainedAutoencoderSpec):
        with torch.device("meta"):
            network = build_autoencoder(spec, resolution)
        return _network_shape(network, resolution, "the autoencoder that the study trains")
    folder = Path(spec.path) / (spec.subfolder or "")
    if (folder / "linear_autoencoder.safetensors").is_file():
        autoencoder = PCAAutoencoder.load(folder)
        return _pca_shape(autoencoder.latent_channels, autoencoder.factor, resolution, f"{spec.path}, which was read")
    config = _autoencoder_config(spec)
    if config is not None:
        return _network_shape(autoencoder_on_meta(config), resolution, f"{spec.path}, whose config was read")
    if spec.path not in KNOWN_AUTOENCODERS:
        raise ConfigError(
            f"autoencoder.path: {spec.path}: its config was not found; for an estimate give an autoencoder of the same shape, "
            f"--set autoencoder.path=NAME with one of {', '.join(KNOWN_AUTOENCODERS)}"
        )
    title, known = KNOWN_AUTOENCODERS[spec.path]
    return _network_shape(autoencoder_on_meta(known), resolution, f"{spec.path}, which was not read; assumed: {title}")


def _autoencoder_config(spec: PretrainedAutoencoderSpec) -> dict[str, Any] | None:
    if spec.path == BUILTIN_AUTOENCODER:
        return json.loads(
            (resources.files("isocost.assets") / "scenes-autoencoder" / "config.json").read_text(encoding="utf-8")
        )
    file = _config_file(spec.path, spec.subfolder)
    return None if file is None else json.loads(file.read_text(encoding="utf-8"))


def _config_file(path: str, subfolder: str | None) -> Path | None:
    """`config.json` of a folder or of a Hub id in the Hub's cache; None if there is neither."""
    file = Path(path) / (subfolder or "") / "config.json"
    if file.is_file():
        return file
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) is None:
        return None
    cached = try_to_load_from_cache(path, f"{subfolder}/config.json" if subfolder else "config.json")
    return Path(cached) if isinstance(cached, str) else None


def _pca_shape(channels: int, patch: int, resolution: int, title: str) -> AutoencoderShape:
    cost = pca_autoencoder_cost(channels, resolution)
    return AutoencoderShape(
        channels, patch, cost.encode_gflop, cost.decode_gflop, _describe_autoencoder(title, channels, patch)
    )


def _network_shape(network: AutoencoderKL | AutoencoderTiny, resolution: int, title: str) -> AutoencoderShape:
    autoencoder = DiffusersVAE(network, "meta")
    channels, factor = autoencoder.latent_channels, autoencoder.factor
    cost = autoencoder_cost({**network.config, "_class_name": type(network).__name__}, resolution)
    return AutoencoderShape(
        channels, factor, cost.encode_gflop, cost.decode_gflop, _describe_autoencoder(title, channels, factor)
    )


def _describe_autoencoder(title: str, channels: int, factor: int) -> str:
    return f"The autoencoder is {title}: {channels} channels, {factor} x {factor} pixels per latent position."


# --- text encoders ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TransformerShape:
    """Shape of a text encoder.

    Attributes:
        width: width of its hidden states.
        num_layers: number of layers.
        feedforward_width: inner width of the feed-forward layers.
        feedforward_products: matrix products of a feed-forward layer, 2, or 3 if it is gated.
        attention_width: width of all attention heads; `width` if None.
    """

    width: int
    num_layers: int
    feedforward_width: int
    feedforward_products: int = 2
    attention_width: int | None = None

    def gflop(self, num_tokens: int) -> float:
        """GFLOP of one prompt: matrix products and attention, counted as in `models/flops.py`."""
        attention = self.attention_width or self.width
        feedforward = self.feedforward_products * self.width * self.feedforward_width
        per_token = 4 * self.width * attention + feedforward + 2 * num_tokens * attention
        return 2 * num_tokens * self.num_layers * per_token / 1e9


_MINILM, _CLIP_L = TransformerShape(384, 6, 1536), TransformerShape(768, 12, 3072)
KNOWN_TEXT_ENCODERS: dict[str, tuple[str, TransformerShape]] = {
    **dict.fromkeys(("minilm", "sentence-transformers/all-MiniLM-L6-v2"), ("all-MiniLM-L6-v2", _MINILM)),
    "openai/clip-vit-base-patch32": ("CLIP ViT-B/32's text encoder", TransformerShape(512, 12, 2048)),
    **dict.fromkeys(
        (
            *("openai/clip-vit-large-patch14", "CompVis/stable-diffusion-v1-4"),
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
        ),
        ("CLIP ViT-L/14's text encoder", _CLIP_L),
    ),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": ("OpenCLIP ViT-H/14's text encoder", TransformerShape(1024, 24, 4096)),
    **dict.fromkeys(
        (
            *("stabilityai/stable-diffusion-2", "stabilityai/stable-diffusion-2-base"),
            *("stabilityai/stable-diffusion-2-1", "stabilityai/stable-diffusion-2-1-base"),
        ),
        ("OpenCLIP ViT-H/14's text encoder without its last layer", TransformerShape(1024, 23, 4096)),
    ),
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": ("OpenCLIP ViT-bigG/14's text encoder", TransformerShape(1280, 32, 5120)),
    "google/t5-v1_1-large": ("T5 v1.1 large's encoder", TransformerShape(1024, 24, 2816, 3)),
    "google/t5-v1_1-xl": ("T5 v1.1 XL's encoder", TransformerShape(2048, 24, 5120, 3)),
    "google/t5-v1_1-xxl": ("T5 v1.1 XXL's encoder", TransformerShape(4096, 24, 10240, 3)),
}
"""Titles and shapes of text encoders by Hub id (model cards; arXiv 2103.00020, 2002.05202)."""


@dataclass(frozen=True)
class TextEncoderShape:
    """Shape and cost of a text encoder.

    Attributes:
        cross_attention_dim: width of the prompt embeddings.
        gflop: GFLOP of one prompt; None if the architecture is unknown.
        description: sentence for the list of assumptions.
    """

    cross_attention_dim: int
    gflop: float | None
    description: str


def text_encoder_shape(spec: TextEncoderSpec) -> TextEncoderShape:
    """Find the shape of a study's text encoder.

    Raises:
        ConfigError: its config is not available, and its name is unknown.
    """
    file = _config_file(spec.path, spec.subfolder)
    if file is not None:
        width, shape = _read_text_encoder(file.parent, spec.path)
        gflop = None if shape is None else shape.gflop(spec.max_tokens)
        return TextEncoderShape(width, gflop, _describe_text_encoder(f"{spec.path}, whose config was read", width))
    if spec.path not in KNOWN_TEXT_ENCODERS:
        widths = ", ".join(f"{name} ({known.width})" for name, (_, known) in KNOWN_TEXT_ENCODERS.items())
        raise ConfigError(
            f"text_encoder.path: {spec.path}: its config was not found; for an estimate give a text encoder of the same width, "
            f"--set text_encoder.path=NAME with one of {widths}"
        )
    title, known = KNOWN_TEXT_ENCODERS[spec.path]
    description = _describe_text_encoder(f"{spec.path}, which was not read; assumed: {title}", known.width)
    return TextEncoderShape(known.width, known.gflop(spec.max_tokens), description)


def _read_text_encoder(folder: Path, path: str) -> tuple[int, TransformerShape | None]:
    """Width of the embeddings, and the shape of the encoder; None if the architecture is unknown."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"text_encoder.path: {path}: {' '.join(str(error).split())[:200]}") from error
    config = config.text_config if config.model_type == "clip" else config
    if config.model_type == "t5":
        products = 3 if config.is_gated_act else 2
        attention = config.num_heads * config.d_kv
        return config.d_model, TransformerShape(config.d_model, config.num_layers, config.d_ff, products, attention)
    if config.model_type in ("clip_text_model", "bert"):
        shape = TransformerShape(config.hidden_size, config.num_hidden_layers, config.intermediate_size)
        return config.hidden_size, shape
    return int(config.hidden_size), None


def _describe_text_encoder(title: str, width: int) -> str:
    return f"The text encoder is {title}: embeddings of width {width}."


# --- extractors -------------------------------------------------------------------------------------------------------


def extractor_gflop(protocol: ProtocolSpec) -> float:
    """GFLOP of one image in all extractors of a protocol whose GFLOP are registered."""
    extractors = [EXTRACTORS[name] for name in protocol.features]
    return sum(extractor.gflop(protocol.feature_size) for extractor in extractors if extractor.gflop is not None)


def feature_width(protocol: ProtocolSpec) -> int:
    """Number of features that are stored per image, from all extractors of a protocol whose number is registered."""
    return sum(EXTRACTORS[name].feature_dim or 0 for name in protocol.features)


def uncounted_extractors(protocols: Iterable[ProtocolSpec]) -> list[str]:
    """The parts that an estimate omits, because an extractor is registered without its GFLOP or its number of features."""
    parts = []
    for name in sorted({name for protocol in protocols for name in protocol.features}):
        if EXTRACTORS[name].gflop is None:
            parts.append(f"the time of the extractor {name}: it is registered without gflop")
        if EXTRACTORS[name].feature_dim is None:
            parts.append(f"the disk space of the features of {name}: it is registered without feature_dim")
    return parts


@dataclass(frozen=True)
class ComponentShapes:
    """Shapes of a study's autoencoder and text encoder, which an estimate uses instead of the networks."""

    autoencoder: AutoencoderShape
    text_encoder: TextEncoderShape

    @classmethod
    def from_study(cls, study: StudySpec) -> ComponentShapes:
        """Find the shapes of a study.

        Raises:
            ConfigError: autoencoder or text encoder are neither available nor known.
        """
        return cls(autoencoder_shape(study), text_encoder_shape(study.text_encoder))
