"""Configuration of a training run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from isocost.config.base import Spec
from isocost.config.types import DTypeName, PredictionType

# --- training ---------------------------------------------------------------------------------------------------------

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
"""Fields that change how a training is run, kept and watched, and its bits within rounding at most, but not what it is."""


class TrainSpec(Spec):
    """Text-to-image training. `num_images` and `snapshots` may grow later: the run goes on from its last state.

    Where the learning rate decays (`cosine`, `wsd`), `num_images` decides the weights and is part of the recipe.
    """

    num_images: int = Field(ge=1, description="images seen in all")
    snapshots: tuple[int, ...] = Field((), description="images seen at which further checkpoints are kept")
    snapshots_gflop: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (), description="the same by training compute, 3 x GFLOP per forward x images; those beyond num_images are left out"
    )
    batch_size: int = Field(64, ge=1, description="images a step, over all processes")
    lr: float = Field(1e-4, gt=0)
    lr_schedule: Literal["constant", "cosine", "wsd"] = Field(
        "constant", description="after the warm-up; wsd: constant, then linear to 0 over the last lr_decay_fraction"
    )
    lr_decay_fraction: float = Field(0.2, gt=0, le=1, description="share of num_images over which wsd decays")
    warmup_images: int = Field(0, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    adam_betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = Field(1.0, gt=0)
    caption_dropout: float = Field(0.1, ge=0, lt=1)
    prediction_type: PredictionType = "epsilon"
    rescale_betas_zero_snr: bool = Field(
        False, description="the last timestep is noise alone, arXiv 2305.08891; not for epsilon"
    )
    min_snr_gamma: float | None = Field(None, gt=0, description="min-SNR weighting of the loss, arXiv 2303.09556; 5 is usual")
    ema_half_life_images: int | tuple[int, ...] = Field(10_000, description="one or several, all kept; the first is published")
    snapshot_ema: int | None = Field(None, description="which of ema_half_life_images checkpoints hold; the first where absent")
    snapshot_dtype: DTypeName = Field("fp32", description="of the weights in checkpoints; bf16 halves them, for keeping")
    dtype: DTypeName = "fp32"
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
    cache_dir: str | None = Field(None, description="folder or URL (s3://, gs://, ...) of latent caches; in OUT where absent")
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
        if any(not 0 < snapshot <= self.num_images for snapshot in self.snapshots):
            raise ValueError(f"snapshots must lie between 1 and num_images={self.num_images}")
        if self.snapshot_ema is not None and self.snapshot_ema not in self.half_lives:
            raise ValueError(f"snapshot_ema={self.snapshot_ema} is none of ema_half_life_images={list(self.half_lives)}")
        if self.rescale_betas_zero_snr and self.prediction_type not in ("v_prediction", "sample"):
            raise ValueError(
                f"rescale_betas_zero_snr needs prediction_type: v_prediction (or sample), not {self.prediction_type}"
            )
        if self.microbatch != "auto" and self.microbatch < 1:
            raise ValueError("microbatch is 'auto' or 1 and more")
        return self

    def recipe(self) -> dict[str, Any]:
        """What decides the weights after n images; how long to train and how often to save is not part of it."""
        return {k: v for k, v in self.canonical().items() if k not in self._fields_outside_recipe()}

    def fixed(self) -> dict[str, Any]:
        """The recipe with every field spelt out: what may not change in an output folder."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in self._fields_outside_recipe()}

    def _fields_outside_recipe(self) -> frozenset[str]:
        return RUNTIME_FIELDS - ({"num_images"} if self.lr_schedule != "constant" else set())

    def whole_batches(self, images: int) -> int:
        """`images` rounded up to whole batches: where a training can stand."""
        return -(-images // self.batch_size) * self.batch_size

    @property
    def half_lives(self) -> tuple[int, ...]:
        """Half-lives of the averages, images; the one that is published first."""
        several = self.ema_half_life_images if isinstance(self.ema_half_life_images, tuple) else (self.ema_half_life_images,)
        first = several[0] if self.snapshot_ema is None else self.snapshot_ema
        return (first, *(other for other in several if other != first))

    def all_snapshots(self, gflop_per_forward: float) -> tuple[int, ...]:
        """Images seen at which a network of this cost is published, rising; the last is `num_images`."""
        by_compute = (max(1, round(gflop / (3 * gflop_per_forward))) for gflop in self.snapshots_gflop)
        return tuple(
            sorted({*self.snapshots, *(snapshot for snapshot in by_compute if snapshot < self.num_images), self.num_images})
        )
