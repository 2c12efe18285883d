"""Configuration of a training run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from isocost.config.base import Spec
from isocost.config.types import (
    MAX_IMAGES_SEEN,
    DTypeName,
    ImagesSeen,
    LearningRate,
    PredictionType,
    Seed,
    TrainBatch,
    Weight,
)

Beta = Annotated[float, Field(ge=0, lt=1)]

RUNTIME_FIELDS = frozenset(
    {
        "num_images",
        "snapshots",
        "snapshots_gflop",
        "state_every_images",
        "keep_last_states",
        "keep_state_every_images",
        "snapshot_ema",
        "snapshot_dtype",
        "tracker",
        "microbatch",
        "sharding",
        "gradient_checkpointing",
        "compile",
        "cuda_graphs",
        "cache_dir",
    }
)
"""Fields outside the recipe. They change how a training runs, saves and reports; its weights change only by rounding."""


class TrainSpec(Spec):
    """A training run. `num_images` and `snapshots` may grow later: the run then continues from its last training state.

    If the learning rate decays (`cosine`, `wsd`), `num_images` determines the weights and is part of the recipe.
    """

    num_images: ImagesSeen = Field(description="total number of images seen")
    snapshots: tuple[ImagesSeen, ...] = Field((), description="images seen at which further checkpoints are saved")
    snapshots_gflop: tuple[Annotated[float, Field(gt=0, le=1e30)], ...] = Field(
        (), description="snapshots by training compute, 3 x GFLOP per forward x images; those after num_images are ignored"
    )
    batch_size: TrainBatch = Field(64, description="images per step, over all processes")
    lr: LearningRate = 1e-4
    lr_schedule: Literal["constant", "cosine", "wsd"] = Field(
        "constant", description="after the warm-up; wsd is constant, then falls linearly to 0 over the last lr_decay_fraction"
    )
    lr_decay_fraction: float = Field(0.2, gt=0, le=1, description="fraction of num_images over which wsd decays")
    warmup_images: int = Field(
        0, ge=0, le=MAX_IMAGES_SEEN, description="images over which the learning rate rises linearly from 0"
    )
    weight_decay: Weight = 0.01
    adam_betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="decay of the two moments of Adam, from 0 to below 1")
    max_grad_norm: float = Field(1.0, gt=0)
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="probability of training an image on the empty caption")
    prediction_type: PredictionType = "epsilon"
    rescale_betas_zero_snr: bool = Field(
        False, description="the last timestep is pure noise (arXiv 2305.08891); not with epsilon"
    )
    min_snr_gamma: float | None = Field(
        None, gt=0, le=1e6, description="min-SNR weighting of the loss (arXiv 2303.09556); 5 is usual; null disables it"
    )
    ema_half_life_images: ImagesSeen | tuple[ImagesSeen, ...] = Field(
        10_000, description="half-life of the EMA of the weights; several values keep several EMAs"
    )
    snapshot_ema: ImagesSeen | None = Field(
        None, description="the value of ema_half_life_images that checkpoints contain; the first if absent"
    )
    snapshot_dtype: DTypeName = Field("fp32", description="dtype of the weights in checkpoints; bf16 halves their size")
    dtype: DTypeName = "fp32"
    sharding: Literal["none", "fsdp"] = Field(
        "none", description="fsdp shards weights, gradients, moments and EMA over the processes (FSDP2)"
    )
    microbatch: TrainBatch | Literal["auto"] = Field(
        "auto", description="images per forward pass of a process; auto finds the largest that fits"
    )
    gradient_checkpointing: bool = False
    compile: bool = False
    cuda_graphs: bool = Field(
        False, description="record the training step as a CUDA graph; one process, one CUDA device, small networks"
    )
    state_every_images: ImagesSeen = Field(10_000, description="images between saved training states")
    keep_last_states: int = Field(1, ge=1, le=1_000_000, description="number of newest training states that are kept")
    keep_state_every_images: ImagesSeen | None = Field(
        None, description="training states at multiples of this number are never deleted"
    )
    cache_dir: str | None = Field(None, description="folder or URL (s3://, gs://, ...) of the latent caches; OUT if absent")
    seed: Seed = 0
    tracker: Literal["none", "tensorboard", "wandb"] = "none"

    @field_validator("ema_half_life_images")
    @classmethod
    def _half_lives(cls, value: int | tuple[int, ...]) -> int | tuple[int, ...]:
        half_lives = value if isinstance(value, tuple) else (value,)
        if not half_lives or min(half_lives) < 1 or len(set(half_lives)) != len(half_lives):
            raise ValueError("give at least one half-life, each once, of 1 image or more")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> TrainSpec:
        if any(not 0 < snapshot <= self.num_images for snapshot in self.snapshots):
            raise ValueError(f"snapshots must lie between 1 and num_images={self.num_images}")
        if self.snapshot_ema is not None and self.snapshot_ema not in self.half_lives:
            raise ValueError(f"snapshot_ema={self.snapshot_ema}: choose one of ema_half_life_images={list(self.half_lives)}")
        if self.rescale_betas_zero_snr and self.prediction_type not in ("v_prediction", "sample"):
            raise ValueError(
                f"rescale_betas_zero_snr needs prediction_type: v_prediction (or sample), not {self.prediction_type}"
            )
        return self

    def recipe(self) -> dict[str, Any]:
        """The fields that determine the weights after n images. The length of the training and the saves are not among them."""
        return {k: v for k, v in self.canonical().items() if k not in self._non_recipe_fields()}

    def immutable_fields(self) -> dict[str, Any]:
        """The recipe with the values of all fields; none of them may change in an output folder."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in self._non_recipe_fields()}

    def _non_recipe_fields(self) -> frozenset[str]:
        return RUNTIME_FIELDS - ({"num_images"} if self.lr_schedule != "constant" else set())

    def whole_batches(self, images: int) -> int:
        """`images` rounded up to a multiple of the batch size."""
        return -(-images // self.batch_size) * self.batch_size

    @property
    def half_lives(self) -> tuple[int, ...]:
        """Half-lives of all EMAs, images. The one in the checkpoints is first."""
        configured = self.ema_half_life_images
        half_lives = configured if isinstance(configured, tuple) else (configured,)
        first = half_lives[0] if self.snapshot_ema is None else self.snapshot_ema
        return (first, *(half_life for half_life in half_lives if half_life != first))

    def all_snapshots(self, gflop_per_forward: float) -> tuple[int, ...]:
        """Images seen at the checkpoints of a network with this cost, rising; the last is `num_images`."""
        by_compute = (max(1, round(gflop / (3 * gflop_per_forward))) for gflop in self.snapshots_gflop)
        return tuple(
            sorted({*self.snapshots, *(snapshot for snapshot in by_compute if snapshot < self.num_images), self.num_images})
        )
