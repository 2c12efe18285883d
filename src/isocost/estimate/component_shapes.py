"""What can be known of a study's autoencoder, caption encoder and extractors without their weights: shapes, and GFLOP.

A configuration that lies here is read: in a folder, or in the Hub's cache. What does not is looked up among well-known names,
and the forecast says so; an unknown name is refused, for nothing is guessed.

Shapes: R resolution, C latent channels, L latent side, T tokens, D width of the prompt embeddings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from huggingface_hub import try_to_load_from_cache
from torch.utils.flop_counter import FlopCounterMode

from isocost.config.evaluation import ProtocolSpec
from isocost.config.model import PCAAutoencoderSpec, PretrainedAutoencoderSpec, TextEncoderSpec, TrainedAutoencoderSpec
from isocost.config.study import StudySpec
from isocost.errors import ConfigError
from isocost.metrics.efficientnet import EfficientNetLite0
from isocost.metrics.inception import Inception
from isocost.metrics.vit import VIT_EXTRACTORS
from isocost.models.autoencoder import BUILTIN_AUTOENCODER, DiffusersVAE, PCAAutoencoder
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
"""Autoencoders by Hub id: what they are called, and their configuration (arXiv 2112.10752, appendix; model cards)."""


@dataclass(frozen=True)
class AutoencoderShape:
    """Latent channels, pixels a place of the latent is wide, GFLOP to encode and to decode one image of the study."""

    latent_channels: int
    factor: int
    encode_gflop: float
    decode_gflop: float
    said: str


def autoencoder_shape(study: StudySpec) -> AutoencoderShape:
    """What is known of a study's autoencoder.

    Raises:
        ConfigError: a pretrained one is neither here nor among the known.
    """
    spec, resolution = study.own.autoencoder, study.data.resolution
    if isinstance(spec, PCAAutoencoderSpec):
        return _linear(spec.num_channels, spec.patch, resolution, "the study's linear autoencoder")
    if isinstance(spec, TrainedAutoencoderSpec):
        with torch.device("meta"):
            network = build_autoencoder(spec, resolution)
        return _counted(network, resolution, "the study's own autoencoder")
    folder = Path(spec.path) / (spec.subfolder or "")
    if (folder / "linear_autoencoder.safetensors").is_file():
        autoencoder = PCAAutoencoder.load(folder)
        return _linear(autoencoder.latent_channels, autoencoder.factor, resolution, f"{spec.path}, read here")
    config = _autoencoder_config(spec)
    if config is not None:
        return _counted(_on_meta(config), resolution, f"{spec.path}, whose configuration was read here")
    if spec.path not in KNOWN_AUTOENCODERS:
        raise ConfigError(
            f"autoencoder.path: {spec.path} cannot be read here; for a forecast name one of its shape, --set autoencoder.path=NAME of "
            f"{', '.join(KNOWN_AUTOENCODERS)}"
        )
    title, known = KNOWN_AUTOENCODERS[spec.path]
    return _counted(_on_meta(known), resolution, f"{spec.path}, which was not read: taken for {title}")


def _autoencoder_config(spec: PretrainedAutoencoderSpec) -> dict[str, Any] | None:
    if spec.path == BUILTIN_AUTOENCODER:
        return json.loads(
            (resources.files("isocost.assets") / "scenes-autoencoder" / "config.json").read_text(encoding="utf-8")
        )
    file = _config_file(spec.path, spec.subfolder)
    return None if file is None else json.loads(file.read_text(encoding="utf-8"))


def _config_file(path: str, subfolder: str | None) -> Path | None:
    """The `config.json` of a folder, or of a Hub id that lies in the Hub's cache; None where there is neither."""
    file = Path(path) / (subfolder or "") / "config.json"
    if file.is_file():
        return file
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) is None:
        return None
    cached = try_to_load_from_cache(path, f"{subfolder}/config.json" if subfolder else "config.json")
    return Path(cached) if isinstance(cached, str) else None


def _on_meta(config: dict[str, Any]) -> AutoencoderKL | AutoencoderTiny:
    kind = AutoencoderTiny if config.get("_class_name") == "AutoencoderTiny" else AutoencoderKL
    with torch.device("meta"):
        return kind.from_config(config)


def _linear(channels: int, patch: int, resolution: int, title: str) -> AutoencoderShape:
    gflop = 2 * channels * 3 * resolution**2 / 1e9
    return AutoencoderShape(channels, patch, gflop, gflop, _autoencoder_words(title, channels, patch))


def _counted(network: AutoencoderKL | AutoencoderTiny, resolution: int, title: str) -> AutoencoderShape:
    autoencoder = DiffusersVAE(network, "meta")
    channels, side = autoencoder.latent_channels, resolution // autoencoder.factor
    encode = _gflop(network.encode, torch.empty(1, 3, resolution, resolution, device="meta"))
    decode = _gflop(network.decode, torch.empty(1, channels, side, side, device="meta"))
    return AutoencoderShape(
        channels, autoencoder.factor, encode, decode, _autoencoder_words(title, channels, autoencoder.factor)
    )


def _gflop(function: Callable[[torch.Tensor], Any], given: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(given)
    return counter.get_total_flops() / 1e9


def _autoencoder_words(title: str, channels: int, factor: int) -> str:
    return f"The autoencoder is {title}: {channels} channels, {factor} x {factor} pixels a place."


# --- captions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transformer:
    """A caption encoder: widths of its states, of its attention and between its products; 2 or (gated) 3 products."""

    width: int
    layers: int
    inner: int
    products: int = 2
    attention: int | None = None

    def gflop(self, num_tokens: int) -> float:
        """GFLOP of one caption: matrix products and attention, as `models/cost.py` counts them."""
        attention = self.attention or self.width
        a_token = 4 * self.width * attention + self.products * self.width * self.inner + 2 * num_tokens * attention
        return 2 * num_tokens * self.layers * a_token / 1e9


_MINILM, _CLIP_L = Transformer(384, 6, 1536), Transformer(768, 12, 3072)
KNOWN_TEXT_ENCODERS: dict[str, tuple[str, Transformer]] = {
    **dict.fromkeys(("minilm", "sentence-transformers/all-MiniLM-L6-v2"), ("all-MiniLM-L6-v2", _MINILM)),
    "openai/clip-vit-base-patch32": ("CLIP ViT-B/32's text encoder", Transformer(512, 12, 2048)),
    **dict.fromkeys(
        (
            *("openai/clip-vit-large-patch14", "CompVis/stable-diffusion-v1-4"),
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
        ),
        ("CLIP ViT-L/14's text encoder", _CLIP_L),
    ),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": ("OpenCLIP ViT-H/14's text encoder", Transformer(1024, 24, 4096)),
    **dict.fromkeys(
        (
            *("stabilityai/stable-diffusion-2", "stabilityai/stable-diffusion-2-base"),
            *("stabilityai/stable-diffusion-2-1", "stabilityai/stable-diffusion-2-1-base"),
        ),
        ("OpenCLIP ViT-H/14's text encoder without its last layer", Transformer(1024, 23, 4096)),
    ),
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": ("OpenCLIP ViT-bigG/14's text encoder", Transformer(1280, 32, 5120)),
    "google/t5-v1_1-large": ("T5 v1.1 large's encoder", Transformer(1024, 24, 2816, 3)),
    "google/t5-v1_1-xl": ("T5 v1.1 XL's encoder", Transformer(2048, 24, 5120, 3)),
    "google/t5-v1_1-xxl": ("T5 v1.1 XXL's encoder", Transformer(4096, 24, 10240, 3)),
}
"""Caption encoders by Hub id: what they are called, and their shape (model cards; arXiv 2103.00020, 2002.05202)."""


@dataclass(frozen=True)
class TextEncoderShape:
    """Width of the prompt embeddings, and GFLOP of one caption; None where the kind of encoder is not one that is counted."""

    cross_attention_dim: int
    gflop: float | None
    said: str


def text_encoder_shape(spec: TextEncoderSpec) -> TextEncoderShape:
    """What is known of a study's caption encoder.

    Raises:
        ConfigError: it is neither here nor among the known.
    """
    file = _config_file(spec.path, spec.subfolder)
    if file is not None:
        width, network = _read_text(file.parent, spec.path)
        gflop = None if network is None else network.gflop(spec.max_tokens)
        return TextEncoderShape(width, gflop, _text_words(f"{spec.path}, whose configuration was read here", width))
    if spec.path not in KNOWN_TEXT_ENCODERS:
        raise ConfigError(
            f"text.path: {spec.path} cannot be read here; for a forecast name one whose states are as wide, --set "
            f"text.path=NAME of {', '.join(f'{name} ({known.width})' for name, (_, known) in KNOWN_TEXT_ENCODERS.items())}"
        )
    title, known = KNOWN_TEXT_ENCODERS[spec.path]
    of = f"{spec.path}, which was not read: taken for {title}"
    return TextEncoderShape(known.width, known.gflop(spec.max_tokens), _text_words(of, known.width))


def _read_text(folder: Path, path: str) -> tuple[int, Transformer | None]:
    """Width of the states, and the encoder's shape where its kind is one that is counted here."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"text.path: {path}: {' '.join(str(error).split())[:200]}") from error
    config = config.text_config if config.model_type == "clip" else config
    if config.model_type == "t5":
        products = 3 if config.is_gated_act else 2
        attention = config.num_heads * config.d_kv
        return config.d_model, Transformer(config.d_model, config.num_layers, config.d_ff, products, attention)
    if config.model_type in ("clip_text_model", "bert"):
        network = Transformer(config.hidden_size, config.num_hidden_layers, config.intermediate_size)
        return config.hidden_size, network
    return int(config.hidden_size), None


def _text_words(title: str, width: int) -> str:
    return f"The caption encoder is {title}: states of width {width}."


# --- extractors -------------------------------------------------------------------------------------------------------

_EFFICIENTNET_GFLOP_PER_PIXEL = 1.53024375e-5
EXTRACTOR_GFLOP = {
    "inception": 11.42,
    "clip-vit-b-32": 8.82,
    "clip-vit-l-14": 162.03,
    "clip-vit-l-14-336": 381.92,
    "dinov2-vit-b-14": 46.32,
    "dinov2-vit-l-14": 162.02,
    "dino-vit-s-16": 9.20,
    "pickscore": 334.59,
    "hpsv2": 334.59,
}
"""GFLOP of one image at the side that the extractor has, counted on the meta device as `models/cost.py` counts."""


def extractor_gflop(protocol: ProtocolSpec) -> float:
    """GFLOP of the features of one image, all extractors of a protocol together."""
    efficientnet = _EFFICIENTNET_GFLOP_PER_PIXEL * protocol.feature_size**2
    return sum(efficientnet if name == "efficientnet-lite0" else EXTRACTOR_GFLOP[name] for name in protocol.features)


def feature_width(protocol: ProtocolSpec) -> int:
    """Numbers that are kept of one image, all extractors of a protocol together."""
    own = {"efficientnet-lite0": EfficientNetLite0.width, "inception": Inception.width}
    return sum(own[name] if name in own else VIT_EXTRACTORS[name].width for name in protocol.features)


@dataclass(frozen=True)
class Shapes:
    """What a forecast goes by in place of a study's autoencoder and captions."""

    autoencoder: AutoencoderShape
    text_encoder: TextEncoderShape

    @classmethod
    def of(cls, study: StudySpec) -> Shapes:
        """Of a study's own.

        Raises:
            ConfigError: autoencoder or caption encoder are neither here nor known.
        """
        return cls(autoencoder_shape(study), text_encoder_shape(study.text_encoder))
