"""Configuration of the solver and its timesteps."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from isocost.config.base import Spec
from isocost.config.types import MAX_RESOLUTION, NUM_TRAIN_TIMESTEPS, DTypeName, Guidance, NumSteps, Seed, SweepBatch
from isocost.errors import ConfigError

TIMESTEP_SPACING_NAMES = ("leading", "trailing", "linspace", "karras", "exponential", "beta")

OWN_SOLVER, NEAREST_SOLVER = "own", "nearest"
FOLDER_SOLVERS = (OWN_SOLVER, NEAREST_SOLVER)
"""Names in place of a solver: that of the checkpoint's folder, exactly, or the nearest solver of isocost."""

TimestepSpacingName = Literal["leading", "trailing", "linspace", "karras", "exponential", "beta"]


class SolverSpec(Spec):
    """A solver with its timestep spacing. The number of steps and the guidance belong to the sweep point.

    With `timesteps`, the number of steps is their number.
    """

    name: str = Field("ddim", pattern=r"^[^/\s]+$", description="name of a solver; see `isocost list solvers`")
    timestep_spacing: TimestepSpacingName = "trailing"
    eta: float = Field(0.0, ge=0, le=1, description="ddim: fraction of DDPM's noise; 0 is deterministic")
    steps_offset: int = Field(
        1, ge=0, le=NUM_TRAIN_TIMESTEPS, description="added to the timesteps of leading spacing, as in diffusers"
    )
    timesteps: tuple[Annotated[int, Field(ge=0, lt=NUM_TRAIN_TIMESTEPS)], ...] | None = Field(
        None, min_length=1, description="the timesteps themselves, falling, in place of a spacing: [999, 850, 736, ...]"
    )

    @model_validator(mode="after")
    def _check_timesteps(self) -> SolverSpec:
        if self.timesteps is None:
            return self
        if any(later >= earlier for earlier, later in pairwise(self.timesteps)):
            raise ValueError("timesteps: they must fall, from noise to clean, such as [999, 666, 333]")
        if (self.timestep_spacing, self.steps_offset) != ("trailing", 1):
            raise ValueError("timesteps: they replace timestep_spacing and steps_offset; leave these out")
        return self

    @property
    def label(self) -> str:
        """Label for tables, such as `ddim/trailing` or `ddim/999-666-333`; eta and offset are shown if not the default."""
        spacing = self.timestep_spacing if self.timesteps is None else "-".join(map(str, self.timesteps))
        eta = f"/eta={self.eta:g}" if self.eta else ""
        return f"{self.name}/{spacing}{eta}" + (f"/offset={self.steps_offset}" if self.steps_offset != 1 else "")

    def steps_or(self, num_steps: int | None, default: int) -> int:
        """`num_steps` if it is given, else the number of `timesteps`, else `default`."""
        if num_steps is not None:
            return num_steps
        return default if self.timesteps is None else len(self.timesteps)


VAE_TILE_UNIT = 64
"""A tile is a whole number of these pixels: of eight latent positions for an autoencoder of factor 8, so that tiles meet."""


class VaeSpec(Spec):
    """How an autoencoder of diffusers decodes. Other values than the defaults change the bits of the images."""

    dtype: DTypeName = Field("fp32", description="data type of the autoencoder")
    tile_size: int | None = Field(
        None,
        ge=VAE_TILE_UNIT,
        le=MAX_RESOLUTION,
        multiple_of=VAE_TILE_UNIT,
        description="decode in overlapping tiles of this many pixels along one side (VAE tiling); null decodes the whole image",
    )
    slicing: bool = Field(False, description="decode one image at a time (VAE slicing)")

    @property
    def is_default(self) -> bool:
        """Whether nothing is set."""
        return self == VaeSpec()

    def check_resolution(self, resolution: int, where: str) -> None:
        """Check that tiles are smaller than the images.

        Args:
            resolution: side of an image in pixels.
            where: option or field of the tile size, for the message.

        Raises:
            ConfigError: an image is not larger than a tile, so that tiling would change nothing.
        """
        if self.tile_size is not None and self.tile_size >= resolution:
            raise ConfigError(
                f"{where} = {self.tile_size}: the images have {resolution} x {resolution} pixels, so there is one tile; "
                "give a smaller size, or leave it out"
            )


class ImageSettings(Spec):
    """The settings of a model that makes images, as `Model` and `Model.sample` take them."""

    num_steps: NumSteps | None = Field(None, description="solver steps; 16 by default, 4 for a few-step student")
    guidance: Guidance = Field(2.0, description="guidance scale w in uncond + w (cond - uncond); 1 takes one network pass")
    solver: SolverSpec | None = Field(None, description="name or mapping; the checkpoint's own by default")
    negative_prompt: str | None = Field(None, description="text to guide away from")
    guide: str | None = Field(None, description="checkpoint of a smaller or less trained network that guides this one")
    guide_null_prompt: bool = Field(False, description="the guide gets the empty prompt")
    guidance_interval: tuple[float | None, float | None] | None = Field(None, description="noise levels with guidance, log-SNR")
    guidance_schedule: tuple[tuple[float, float], ...] | None = Field(None, description="points (log-SNR, guidance)")
    seed: Seed = Field(0, description="seed of the noise")
    images_per_call: SweepBatch | None = Field(None, description="images that share a network call; as many as fit if absent")
    dtype: DTypeName = Field("fp32", description="data type of the network")
    compiled: bool = Field(False, description="compile the network")
    vae: VaeSpec = VaeSpec()

    @field_validator("solver", mode="before")
    @classmethod
    def _named_solver(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_guide(self) -> ImageSettings:
        if self.guide_null_prompt and self.guide is None:
            raise ValueError("guide_null_prompt: there is no guide; give one, or leave it out")
        return self
