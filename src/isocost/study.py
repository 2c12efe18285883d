"""The vocabulary of the whole: the specs of every stage, and a study's YAML in and out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from isocost.errors import RequestError
from isocost.spec import Spec, parse_spec

SAMPLER_NAMES = (
    *("ddim", "ddpm", "euler", "euler-ancestral", "heun"),
    *("dpmsolver++2m", "sde-dpmsolver++2m", "unipc", "lcm"),
)
SPACING_NAMES = ("leading", "trailing", "linspace", "karras")
NUM_TRAIN_TIMESTEPS = 1000
DEFAULT_BUCKET_SIZE = 64
LEAST_PICTURES = 32
"""Fewer pictures on either side than this give a distance whose interval says nothing."""

SamplerName = Literal["ddim", "ddpm", "euler", "euler-ancestral", "heun", "dpmsolver++2m", "sde-dpmsolver++2m", "unipc", "lcm"]
SpacingName = Literal["leading", "trailing", "linspace", "karras"]
Precision = Literal["fp32", "bf16"]
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
FeatureName = Literal[
    "efficientnet-lite0",
    "inception",
    "clip-vit-b-32",
    "clip-vit-l-14",
    "clip-vit-l-14-336",
    "dinov2-vit-b-14",
    "dinov2-vit-l-14",
    "dino-vit-s-16",
    "pickscore",
    "hpsv2",
]
DistanceName = Literal[
    "kernel",
    "frechet",
    "frechet_infinity",
    "precision_recall",
    "density_coverage",
    "inception_score",
    "cmmd",
    "caption",
]


# --- data -------------------------------------------------------------------------------------------------------------


class FolderSource(Spec):
    """Pictures in a folder with `captions.jsonl` ({"file", "caption" or "captions"}) or one .txt/.json beside each picture."""

    kind: Literal["folder"]
    path: str
    limit: int | None = Field(None, ge=1)


class WebdatasetSource(Spec):
    """Tar shards of NAME.jpg|png|webp + NAME.json|txt; `path` may hold a glob (`aerial/train-*.tar`)."""

    kind: Literal["webdataset"]
    path: str
    limit: int | None = Field(None, ge=1)


class HubSource(Spec):
    """A data set of the `datasets` library: a Hub id, or a local folder or file of Parquet with the same layout."""

    kind: Literal["hub"]
    path: str
    split: str = "train"
    image_column: str = "image"
    caption_column: str = "captions"
    label_column: str | None = None
    limit: int | None = Field(None, ge=1)


class ScenesSource(Spec):
    """The embedded procedural pictures: scene `index` of `seed`, for `first <= index < first + num_pictures`."""

    kind: Literal["scenes"]
    num_pictures: int = Field(ge=1)
    first: int = Field(0, ge=0)
    seed: int = 0


SourceSpec = Annotated[FolderSource | WebdatasetSource | HubSource | ScenesSource, Field(discriminator="kind")]


class DataSpec(Spec):
    """Pictures with captions: what is trained on, and what generated pictures are compared with."""

    train: SourceSpec
    reference: SourceSpec
    resolution: int = Field(ge=8, description="side of the square pictures, pixels")
    max_bad_share: float = Field(0.01, ge=0, lt=1, description="unreadable share above which the run stops")


# --- codec and captions -----------------------------------------------------------------------------------------------


class LinearCodecSpec(Spec):
    """Patch PCA fitted in seconds: `patch` x `patch` pixels to `num_channels` components. The baseline."""

    kind: Literal["linear"]
    patch: int = Field(ge=2)
    num_channels: int = Field(ge=1)
    num_fit_pictures: int = Field(2000, ge=16)


class TrainedCodecSpec(Spec):
    """A diffusers AutoencoderKL trained on the study's own pictures: L1 + perceptual + KL."""

    kind: Literal["kl"]
    block_widths: tuple[int, ...] = Field(description="channels by level; each level after the first halves the side")
    num_channels: int = Field(ge=1)
    num_images: int = Field(ge=1, description="pictures shown in training")
    batch_size: int = Field(32, ge=1)
    lr: float = Field(1e-3, gt=0)
    layers_per_block: int = Field(1, ge=1)
    kl_weight: float = Field(1e-4, ge=0)
    perceptual_weight: float = Field(0.1, ge=0)
    perceptual_share: float = Field(1.0, gt=0, le=1, description="share of each batch that the perceptual term sees")
    perceptual: str = Field(
        "efficientnet-lite0", description="'efficientnet-lite0', or a safetensors file of AlexNet for LPIPS"
    )
    seed: int = 0


class PretrainedCodecSpec(Spec):
    """Any diffusers autoencoder: a Hub id, a local folder, or `scenes` (shipped with isocost)."""

    kind: Literal["pretrained"]
    path: str
    subfolder: str | None = None


CodecSpec = Annotated[LinearCodecSpec | TrainedCodecSpec | PretrainedCodecSpec, Field(discriminator="kind")]


class TextSpec(Spec):
    """Captions to states through a transformers text encoder: a Hub id, a local folder, or `minilm` (extra `demo`)."""

    path: str = "minilm"
    max_tokens: int = Field(32, ge=4)
    subfolder: str | None = None
    cache_states: bool = Field(True, description="keep the states of every distinct caption; else encode in each step")


# --- models -----------------------------------------------------------------------------------------------------------


class FamilySpec(Spec):
    """Networks that differ in one dial, the width c: U-Nets of block widths [c, 2c, 4c, 4c] (arXiv 2404.01367)."""

    kind: Literal["unet"] = "unet"
    widths: tuple[int, ...]

    @field_validator("widths")
    @classmethod
    def _distinct(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(widths)) != len(widths) or not widths:
            raise ValueError("widths must be given, each once")
        return widths


class ModelSpec(Spec):
    """One network: width, latent shape [channels, side, side], width of the caption states."""

    kind: Literal["unet"] = "unet"
    width: int
    latent_channels: int = 4
    latent_side: int = 64
    context_width: int = 1024
    extra_input_channels: int = 0


# --- training ---------------------------------------------------------------------------------------------------------


class TrainSpec(Spec):
    """Text-to-image training. `num_images` and `marks` may grow later: the run goes on from its last state."""

    num_images: int = Field(ge=1, description="images seen in all")
    marks: tuple[int, ...] = Field((), description="images seen at which further checkpoints are kept")
    batch_size: int = Field(64, ge=1)
    lr: float = Field(1e-4, gt=0)
    warmup_images: int = Field(0, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    adam_betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = Field(1.0, gt=0)
    caption_dropout: float = Field(0.1, ge=0, lt=1)
    prediction: PredictionType = "epsilon"
    ema_half_life_images: int = Field(10_000, ge=1)
    precision: Precision = "fp32"
    state_every_images: int = Field(10_000, ge=1, description="distance between durable training states")
    seed: int = 0
    tracker: Literal["none", "tensorboard", "wandb"] = "none"

    @model_validator(mode="after")
    def _marks_inside(self) -> TrainSpec:
        if any(not 0 < mark <= self.num_images for mark in self.marks):
            raise ValueError(f"marks must lie between 1 and num_images={self.num_images}")
        return self

    def recipe(self) -> dict[str, Any]:
        """What decides the weights after n images; how long to train and how often to save is not part of it."""
        return {k: v for k, v in self.canonical().items() if k not in {"num_images", "marks", "state_every_images", "tracker"}}

    def whole_batches(self, images: int) -> int:
        """`images` rounded up to whole batches: where a training can stand."""
        return -(-images // self.batch_size) * self.batch_size

    @property
    def all_marks(self) -> tuple[int, ...]:
        """Images seen at which a checkpoint is published, rising; the last is `num_images`."""
        return tuple(sorted({*self.marks, self.num_images}))


# --- sampling and scoring ---------------------------------------------------------------------------------------------


class SamplerSpec(Spec):
    """A solver with its time grid; the number of steps and the guidance belong to the point."""

    name: SamplerName = "ddim"
    spacing: SpacingName = "trailing"
    eta: float = Field(0.0, ge=0, le=1)
    offset: int = Field(1, ge=0, description="added to a leading grid: Stable Diffusion's steps_offset")

    @property
    def label(self) -> str:
        """Short text for tables: `ddim/trailing`, with eta and offset where they are not the default."""
        eta = f"/eta={self.eta:g}" if self.eta else ""
        return f"{self.name}/{self.spacing}{eta}" + (f"/offset={self.offset}" if self.offset != 1 else "")


class PointSpec(Spec):
    """A coordinate of the sweep: everything that decides the generated pictures."""

    checkpoint: str
    sampler: SamplerSpec
    num_steps: int = Field(ge=1, le=NUM_TRAIN_TIMESTEPS)
    guidance: float = Field(ge=0)
    num_pictures: int = Field(ge=1)
    seed: int = 0
    precision: Precision = "fp32"
    compiled: bool = False
    bucket_size: int = Field(DEFAULT_BUCKET_SIZE, ge=1)

    @property
    def numerics(self) -> tuple[str, bool, int]:
        """What decides the last bits of a picture: precision, compiled or eager, places of a network call."""
        return self.precision, self.compiled, self.bucket_size


class ProtocolSpec(Spec):
    """What makes two numbers comparable: pictures, captions, features, reference."""

    num_pictures: int = Field(1000, ge=LEAST_PICTURES)
    num_reference: int | None = Field(None, ge=LEAST_PICTURES, description="reference pictures used; all where absent")
    features: tuple[FeatureName, ...] = Field(
        ("efficientnet-lite0",), min_length=1, description="one extractor or several, in one pass over the pictures"
    )
    weights: dict[FeatureName, str] = Field(
        default_factory=dict, description="where an extractor's weights lie: PATH, URL or hub:NAME@REVISION, #sha256=HEX behind"
    )
    feature_side: int = Field(64, ge=32, description="side that EfficientNet-lite0 sees, pixels; the others have their own")
    kept: Literal["fp32", "fp16"] = Field("fp32", description="precision in which a point keeps its features, and is scored")
    alignment: Literal["scenes", "class", "none"] = "none"
    distances: tuple[DistanceName, ...] = ("kernel",)
    num_bootstrap: int = Field(200, ge=20)
    seed: int = 0

    @field_validator("features", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("features")
    @classmethod
    def _each_once(cls, names: tuple[FeatureName, ...]) -> tuple[FeatureName, ...]:
        if len(set(names)) != len(names):
            raise ValueError("each extractor once")
        return names


class SweepSpec(Spec):
    """The grid: every trained size x sampler x num_steps x guidance; `marks_at` is the point scored at each training mark."""

    samplers: tuple[SamplerSpec, ...] = (SamplerSpec(),)
    num_steps: tuple[Annotated[int, Field(ge=1, le=NUM_TRAIN_TIMESTEPS)], ...]
    guidance: tuple[Annotated[float, Field(ge=0)], ...]
    seed: int = 0
    precision: Precision = "fp32"
    compiled: bool = Field(False, description="compile the network: minutes once a machine, then faster calls")
    bucket_size: int = Field(
        DEFAULT_BUCKET_SIZE, ge=1, description="passes of a network call; on a CPU each core makes its own"
    )
    marks_num_steps: int = Field(16, ge=1, le=NUM_TRAIN_TIMESTEPS)
    marks_guidance: float = Field(2.0, ge=0)

    @field_validator("samplers", "num_steps", "guidance")
    @classmethod
    def _not_empty(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if not values:
            raise ValueError("needs at least one value")
        return values


class ReportSpec(Spec):
    """What the report leads with."""

    metric: str = "kernel_efficientnet"
    budgets: tuple[float, ...] = Field((), description="paper cost budgets for the answer; chosen from the data where empty")


class StudySpec(Spec):
    """A whole study: one YAML file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    data: DataSpec
    codec: CodecSpec
    text: TextSpec = TextSpec()
    family: FamilySpec
    train: TrainSpec
    sweep: SweepSpec
    protocol: ProtocolSpec = ProtocolSpec()
    report: ReportSpec = ReportSpec()

    def fixed_part(self) -> dict[str, Any]:
        """What may not change in an output folder. Sizes, steps, guidance, samplers, marks and images seen may grow."""
        plain = self.model_dump(mode="json")
        return {
            "data": plain["data"],
            "codec": plain["codec"],
            "text": plain["text"],
            "train": {
                k: v for k, v in plain["train"].items() if k not in {"num_images", "marks", "state_every_images", "tracker"}
            },
            "protocol": {k: v for k, v in plain["protocol"].items() if k not in {"distances", "weights"}},
        }


# --- YAML -------------------------------------------------------------------------------------------------------------


def load_study(path: str | Path, overrides: Mapping[str, Any] | None = None) -> StudySpec:
    """Read a study from YAML; `overrides` maps dotted keys to values ("train.num_images": 5000).

    Raises:
        RequestError: the file is missing, is not YAML, or a key or value is wrong; one line names file, key and remedy.
    """
    file = Path(path)
    if not file.is_file():
        raise RequestError(f"{file}: no such study file; `isocost demo` runs the one that is built in")
    try:
        plain = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(plain, dict):
        raise RequestError(f"{file}: a study is a mapping of keys (name, data, codec, family, train, sweep, ...)")
    for key, value in (overrides or {}).items():
        _set_dotted(plain, key, value, file)
    return parse_spec(StudySpec, plain, str(file))


def dump_study(study: StudySpec) -> str:
    """YAML text with every field resolved, stable under load and dump."""
    return yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _set_dotted(plain: dict[str, Any], key: str, value: Any, file: Path) -> None:
    *parents, last = key.split(".")
    node: Any = plain
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise RequestError(f"{file}: --set {key}: '{parent}' is not a mapping")
    node[last] = value
