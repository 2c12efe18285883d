"""The vocabulary of the whole: the specs of every stage."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from isocost.spec import Spec

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
TaskName = Literal["text2image", "repeats", "superres", "dreambooth", "distill", "superres-distill"]
PairName = Literal["psnr", "ssim", "lpips"]
FamilyKind = Literal["unet", "dit"]
DistanceName = Literal[
    "kernel",
    "frechet",
    "frechet_infinity",
    "precision_recall",
    "density_coverage",
    "inception_score",
    "cmmd",
    "caption",
    "subject",
]


# --- data -------------------------------------------------------------------------------------------------------------


class FileSource(Spec):
    """What sources of files have in common. A picture's name alone decides whether it is held out, one in ten."""

    path: str
    limit: int | None = Field(None, ge=1)
    part: Literal["all", "train", "held_out"] = Field("all", description="for one set of pictures as both train and reference")


class FolderSource(FileSource):
    """Pictures in a folder with `captions.jsonl` ({"file", "caption" or "captions"}) or one .txt/.json beside each picture."""

    kind: Literal["folder"]


class WebdatasetSource(FileSource):
    """Tar shards of NAME.jpg|png|webp + NAME.json|txt; `path` may hold a glob (`aerial/train-*.tar`)."""

    kind: Literal["webdataset"]


class HubSource(FileSource):
    """A data set of the `datasets` library: a Hub id, or a local folder or file of Parquet with the same layout."""

    kind: Literal["hub"]
    split: str = "train"
    image_column: str = "image"
    caption_column: str = "captions"
    label_column: str | None = None


class ScenesSource(Spec):
    """The embedded procedural pictures: scene `index` of `seed`, for `first <= index < first + num_pictures`."""

    kind: Literal["scenes"]
    num_pictures: int = Field(ge=1)
    first: int = Field(0, ge=0)
    seed: int = 0


SourceSpec = Annotated[FolderSource | WebdatasetSource | HubSource | ScenesSource, Field(discriminator="kind")]


class DataSpec(Spec):
    """Pictures with captions: what is trained on, and what generated pictures are compared with."""

    train: SourceSpec | None = Field(None, description="a study of given checkpoints has none")
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
    perceptual: str = Field("efficientnet-lite0", description="that, or a safetensors file of AlexNet for LPIPS")
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
    """Networks that differ in one dial, the width c: U-Nets of block widths [c, 2c, 4c, 4c] (arXiv 2404.01367), or `dit`.

    U-Nets of fewer levels or layers are another family, for trials where the paper's depth does not fit the machine. `dit` are
    transformers whose depth and heads follow from c (`models/dit.py`).
    """

    kind: FamilyKind = "unet"
    widths: tuple[int, ...]
    layers_per_block: int = Field(2, ge=1)
    num_levels: int = Field(4, ge=2, le=4, description="block widths are the first of [c, 2c, 4c, 4c]")
    patch: int | None = Field(None, ge=1, description="dit: side of a token in the latent; 2, or 1 where that is below 16")

    @field_validator("widths")
    @classmethod
    def _distinct(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(widths)) != len(widths) or not widths:
            raise ValueError("widths must be given, each once")
        return widths

    @model_validator(mode="after")
    def _of_its_kind(self) -> FamilySpec:
        if self.kind == "dit" and (self.layers_per_block, self.num_levels) != (2, 4):
            raise ValueError("layers_per_block and num_levels are a U-Net's; a transformer's depth follows from its width")
        if self.kind == "unet" and self.patch is not None:
            raise ValueError("patch is a transformer's; leave it out, or take kind: dit")
        return self


class ModelSpec(Spec):
    """One network: width, depth, latent shape [channels, side, side], width of the caption states."""

    kind: FamilyKind = "unet"
    width: int
    latent_channels: int = 4
    latent_side: int = 64
    context_width: int = 1024
    extra_input_channels: int = 0
    layers_per_block: int = 2
    num_levels: int = 4
    guidance_width: int | None = Field(None, description="of the guidance embedding, for students that take w; 1 is w itself")
    adapter: Literal["none", "noisy", "beside"] = Field("none", description="a second encoder, and what it sees")
    patch: int | None = Field(None, description="of a transformer; by the latent side where absent")

    @property
    def embeds_guidance(self) -> bool:
        """True for a student that takes w as an input: one pass is enough."""
        return self.guidance_width is not None


# --- training ---------------------------------------------------------------------------------------------------------

NOT_OF_THE_RECIPE = frozenset(
    {
        "num_images",
        "marks",
        "marks_gflop",
        "state_every_images",
        "keep_last_states",
        "keep_state_every_images",
        "publish_ema",
        "publish_precision",
        "tracker",
        "microbatch",
        "sharding",
        "gradient_checkpointing",
        "compile",
        "cuda_graphs",
        "cache_at",
    }
)
"""Fields that change how a training is run, kept and watched, and its bits within rounding at most, but not what it is."""


class TrainSpec(Spec):
    """Text-to-image training. `num_images` and `marks` may grow later: the run goes on from its last state.

    Where the learning rate decays (`cosine`, `wsd`), `num_images` decides the weights and is part of the recipe.
    """

    num_images: int = Field(ge=1, description="images seen in all")
    marks: tuple[int, ...] = Field((), description="images seen at which further checkpoints are kept")
    marks_gflop: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (), description="the same by training compute, 3 x GFLOP per forward x images; those beyond num_images are left out"
    )
    batch_size: int = Field(64, ge=1, description="images a step, over all processes")
    lr: float = Field(1e-4, gt=0)
    lr_schedule: Literal["constant", "cosine", "wsd"] = Field(
        "constant", description="after the warm-up; wsd: constant, then linear to 0 over the last lr_decay_share"
    )
    lr_decay_share: float = Field(0.2, gt=0, le=1, description="share of num_images over which wsd decays")
    warmup_images: int = Field(0, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    adam_betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = Field(1.0, gt=0)
    caption_dropout: float = Field(0.1, ge=0, lt=1)
    prediction: PredictionType = "epsilon"
    zero_terminal_snr: bool = Field(False, description="the last timestep is noise alone, arXiv 2305.08891; not for epsilon")
    min_snr_gamma: float | None = Field(None, gt=0, description="min-SNR weighting of the loss, arXiv 2303.09556; 5 is usual")
    ema_half_life_images: int | tuple[int, ...] = Field(10_000, description="one or several, all kept; the first is published")
    publish_ema: int | None = Field(None, description="which of ema_half_life_images checkpoints hold; the first where absent")
    publish_precision: Precision = Field("fp32", description="of the weights in checkpoints; bf16 halves them, for keeping")
    precision: Precision = "fp32"
    sharding: Literal["none", "fsdp"] = Field(
        "none", description="fsdp: weights, gradients, moments and EMA are shared out over the processes (FSDP2)"
    )
    microbatch: int | Literal["auto"] = Field("auto", description="images a process takes through the network at once")
    gradient_checkpointing: bool = False
    compile: bool = False
    cuda_graphs: bool = Field(False, description="one process with a CUDA device: play recorded steps back; for small networks")
    state_every_images: int = Field(10_000, ge=1, description="distance between durable training states")
    keep_last_states: int = Field(1, ge=1, description="how many of the newest states stay")
    keep_state_every_images: int | None = Field(None, ge=1, description="states at multiples of this stay for good")
    cache_at: str | None = Field(None, description="folder or URL (s3://, gs://, ...) of latent caches; in OUT where absent")
    seed: int = 0
    tracker: Literal["none", "tensorboard", "wandb"] = "none"

    @field_validator("ema_half_life_images")
    @classmethod
    def _half_lives(cls, value: int | tuple[int, ...]) -> int | tuple[int, ...]:
        several = value if isinstance(value, tuple) else (value,)
        if not several or min(several) < 1 or len(set(several)) != len(several):
            raise ValueError("half-lives must be given, each once, 1 image or more")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> TrainSpec:
        if any(not 0 < mark <= self.num_images for mark in self.marks):
            raise ValueError(f"marks must lie between 1 and num_images={self.num_images}")
        if self.publish_ema is not None and self.publish_ema not in self.half_lives:
            raise ValueError(f"publish_ema={self.publish_ema} is none of ema_half_life_images={list(self.half_lives)}")
        if self.zero_terminal_snr and self.prediction not in ("v_prediction", "sample"):
            raise ValueError(f"zero_terminal_snr needs prediction: v_prediction (or sample), not {self.prediction}")
        if self.microbatch != "auto" and self.microbatch < 1:
            raise ValueError("microbatch is 'auto' or 1 and more")
        return self

    def recipe(self) -> dict[str, Any]:
        """What decides the weights after n images; how long to train and how often to save is not part of it."""
        return {k: v for k, v in self.canonical().items() if k not in self._apart()}

    def fixed(self) -> dict[str, Any]:
        """The recipe with every field spelt out: what may not change in an output folder."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in self._apart()}

    def _apart(self) -> frozenset[str]:
        return NOT_OF_THE_RECIPE - ({"num_images"} if self.lr_schedule != "constant" else set())

    def whole_batches(self, images: int) -> int:
        """`images` rounded up to whole batches: where a training can stand."""
        return -(-images // self.batch_size) * self.batch_size

    @property
    def half_lives(self) -> tuple[int, ...]:
        """Half-lives of the averages, images; the one that is published first."""
        several = self.ema_half_life_images if isinstance(self.ema_half_life_images, tuple) else (self.ema_half_life_images,)
        first = several[0] if self.publish_ema is None else self.publish_ema
        return (first, *(other for other in several if other != first))

    def all_marks(self, gflop_per_forward: float) -> tuple[int, ...]:
        """Images seen at which a network of this cost is published, rising; the last is `num_images`."""
        by_compute = (max(1, round(gflop / (3 * gflop_per_forward))) for gflop in self.marks_gflop)
        return tuple(sorted({*self.marks, *(mark for mark in by_compute if mark < self.num_images), self.num_images}))


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
    pairs: tuple[PairName, ...] = Field((), description="super-resolution: each picture against its original")
    lpips: str | None = Field(None, description="AlexNet as a safetensors file for LPIPS; torchvision's where absent")
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


class RaceSpec(Spec):
    """How the best guidance is searched (`sweep/race.py`). Its pictures have noise of their own, winners are scored anew."""

    rungs: tuple[Annotated[int, Field(ge=16)], ...] = Field(
        (), description="pictures of a value, rising; from protocol.num_pictures where absent"
    )
    tolerance: float | None = Field(
        None, gt=0, lt=1, description="what a choice may lose, as a share of the score; from protocol.num_pictures where absent"
    )
    confidence: float = Field(0.95, gt=0.5, lt=1, description="by which values are dropped and a race ends")
    seed: int = Field(1, description="of the search; sweep.seed is that of the scores")
    stop_confidence: float | None = Field(
        0.99, gt=0.5, lt=1, description="by which a cell that cannot be on any frontier is not scored; null scores all"
    )

    @field_validator("rungs")
    @classmethod
    def _rising(cls, rungs: tuple[int, ...]) -> tuple[int, ...]:
        if any(later <= earlier for earlier, later in itertools.pairwise(rungs)):
            raise ValueError("rungs must rise")
        return rungs


class SweepSpec(Spec):
    """The grid: every trained size x sampler x num_steps x guidance; `marks_at` is the point scored at each training mark.

    With `search: race` the values of guidance are a range, and the best in it is found for every size, sampler and num_steps.
    """

    samplers: tuple[SamplerSpec, ...] = (SamplerSpec(),)
    num_steps: tuple[Annotated[int, Field(ge=1, le=NUM_TRAIN_TIMESTEPS)], ...]
    guidance: tuple[Annotated[float, Field(ge=0)], ...]
    search: Literal["grid", "race"] = Field("grid", description="every value of guidance, or the best found with few pictures")
    race: RaceSpec = RaceSpec()
    seed: int = 0
    precision: Precision = "fp32"
    compiled: bool = Field(False, description="compile the network: minutes once a machine, then faster calls")
    bucket_size: int = Field(DEFAULT_BUCKET_SIZE, ge=1, description="passes of a call; on a CPU each core makes its own")
    shard_size: int = Field(256, ge=1, description="pictures that are made, kept and shared out at once; changes no number")
    marks_num_steps: int = Field(16, ge=1, le=NUM_TRAIN_TIMESTEPS)
    marks_guidance: float = Field(2.0, ge=0)

    @model_validator(mode="after")
    def _races_on_fresh_noise(self) -> SweepSpec:
        if self.search == "race" and self.race.seed == self.seed:
            raise ValueError(f"race.seed: {self.seed} is sweep.seed too; a winner is scored with noise it was not chosen by")
        if self.search == "race" and min(self.guidance) < 1:
            raise ValueError("search: race takes guidance from 1 on; take the lower values out, or search: grid")
        return self

    @field_validator("samplers", "num_steps", "guidance")
    @classmethod
    def _not_empty(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if not values:
            raise ValueError("needs at least one value")
        return values
