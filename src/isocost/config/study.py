"""Configuration of a whole study: the specs of all stages (`study_yaml.py` reads and writes them)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, field_validator, model_validator

from isocost.config.base import LocalPath, Spec, parse_spec
from isocost.config.data import DataSpec, SourceSpec
from isocost.config.evaluation import ProtocolSpec
from isocost.config.finetune import ADAPTED_VARIANTS, NO_ADAPTER, DistillSpec, DreamboothSpec, SuperresSpec
from isocost.config.model import AutoencoderSpec, FamilySpec, TextEncoderSpec
from isocost.config.sweep import NO_GUIDANCE, SweepSpec
from isocost.config.training import TrainSpec
from isocost.config.types import Channels, Seed
from isocost.errors import ConfigError


class ReportSpec(Spec):
    """Configuration of the report."""

    metric: str = Field("mmd_efficientnet", description="main metric of the report")
    budgets: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (),
        description="budgets of the recommendations: normalized cost, or GFLOP per image in a study of checkpoints; "
        "chosen from the data if empty",
    )
    prices: LocalPath | None = Field(
        None,
        description="file with US dollars per hour of each device, or `shipped`, for US dollars per 1,000 images",
    )


class SeedReplicatesSpec(Spec):
    """Sizes of the family that are trained again from other seeds, to estimate the seed variance."""

    seeds: tuple[Seed, ...] = Field(description="seeds of the further trainings; they must differ from train.seed")
    widths: tuple[Channels, ...] = Field((), description="widths out of family.widths; all if empty")

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[Seed, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds) or not seeds:
            raise ValueError("give at least one seed, and each seed once")
        return seeds


FINETUNE_SECTIONS = ("superres", "dreambooth", "distill")
"""Sections of a study that start from the checkpoints of `train`. `superres` may have a section `distill`, too."""

PER_RUN_FIELDS = frozenset({"num_images", "snapshots", "snapshots_gflop", "warmup_images"})
"""Fields of `train` that fine-tuning sections do not inherit."""


class TrainingParts(NamedTuple):
    """The parts of a study that trains its models. `images` is `data.train`."""

    family: FamilySpec
    train: TrainSpec
    autoencoder: AutoencoderSpec
    images: SourceSpec


class StudySpec(Spec):
    """A study, as in one YAML file.

    A study of `checkpoints` scores pretrained models. It has no family, train, autoencoder and `data.train`.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    data: DataSpec
    autoencoder: AutoencoderSpec | None = None
    text_encoder: TextEncoderSpec = TextEncoderSpec()
    family: FamilySpec | None = None
    train: TrainSpec | None = None
    seed_replicates: SeedReplicatesSpec | None = None
    checkpoints: tuple[str, ...] = Field(
        (), description="diffusers pipelines: folders or Hub ids (OWNER/NAME[@REVISION]), optionally with ` + LORA[:SCALE]`"
    )
    sweep: SweepSpec
    protocol: ProtocolSpec = ProtocolSpec()
    report: ReportSpec = ReportSpec()
    superres: SuperresSpec | None = None
    dreambooth: DreamboothSpec | None = None
    distill: DistillSpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _inherit_train(cls, plain: Any) -> Any:
        """Fine-tuning sections inherit the fields of `train` that they do not set."""
        if not isinstance(plain, dict) or not isinstance(plain.get("train"), dict):
            return plain
        sections = {name: _inherit(plain[name], plain["train"], name) for name in FINETUNE_SECTIONS if name in plain}
        return {**plain, **sections}

    @model_validator(mode="after")
    def _check_source_of_models(self) -> StudySpec:
        trained = {"autoencoder": self.autoencoder, "family": self.family, "train": self.train, "data.train": self.data.train}
        if not self.checkpoints:
            missing = [name for name, part in trained.items() if part is None]
            if missing:
                raise ValueError(f"{missing[0]}: missing; a study needs it to train a family, or `checkpoints` to score")
            return self
        if len(set(self.checkpoints)) != len(self.checkpoints):
            raise ValueError("checkpoints: name each checkpoint once")
        unused = [name for name, part in trained.items() if part is not None] + list(self.finetune_parts())
        unused += ["seed_replicates"] if self.seed_replicates is not None else []
        unused += ["text_encoder"] if self.text_encoder != TextEncoderSpec() else []
        if unused:
            raise ValueError(f"{unused[0]}: a study of pretrained checkpoints does not use it; remove it")
        if self.protocol.alignment != "none":
            raise ValueError("protocol.alignment: needs a classifier trained on data.train; use none in a study of checkpoints")
        return self

    @model_validator(mode="after")
    def _check_seed_replicates(self) -> StudySpec:
        if self.seed_replicates is None or self.family is None or self.train is None:
            return self
        if self.train.seed in self.seed_replicates.seeds:
            raise ValueError(
                f"seed_replicates.seeds: {self.train.seed} is train.seed, the seed of the first training; remove it"
            )
        unknown = [width for width in self.seed_replicates.widths if width not in self.family.widths]
        if unknown:
            raise ValueError(f"seed_replicates.widths: {unknown[0]} is not in family.widths; remove it")
        return self

    @model_validator(mode="after")
    def _check_guidance(self) -> StudySpec:
        if self.checkpoints:
            return self
        parts = self.finetune_parts()
        values = {"sweep": (*self.sweep.guidance, self.sweep.snapshot_guidance)}
        values |= {f"{name}.sweep": (*part.sweep.guidance, part.sweep.snapshot_guidance) for name, part in parts.items()}
        if self.dreambooth is not None:
            values["dreambooth.prior"] = (self.dreambooth.prior.guidance,)
        without_prompt = [key for key, guidance in values.items() if 0 in guidance]
        if without_prompt:
            raise ValueError(f"{without_prompt[0]}: {NO_GUIDANCE}")
        return self

    @model_validator(mode="after")
    def _check_vae(self) -> StudySpec:
        if self.autoencoder is None:
            return self
        sweeps = {"sweep": self.sweep, **{f"{name}.sweep": part.sweep for name, part in self.finetune_parts().items()}}
        for name, sweep in sweeps.items():
            if self.autoencoder.kind == "pca" and not sweep.vae.is_default:
                raise ValueError(f"{name}.vae: a PCA autoencoder has no vae dtype, tiling or slicing; leave them out")
            try:
                sweep.vae.check_resolution(self.data.resolution, f"{name}.vae.tile_size")
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return self

    @model_validator(mode="after")
    def _check_finetune_parts(self) -> StudySpec:
        for name, part in self.finetune_parts().items():
            for field in ("prediction_type", "rescale_betas_zero_snr"):
                pretrained = getattr(self.train, field)
                if getattr(part.train, field) != pretrained:
                    raise ValueError(f"{name}.train.{field}: fine-tuning needs the value of train, {pretrained}; remove it")
            uses_adapter = isinstance(part, DistillSpec) and not part.teachers and ADAPTED_VARIANTS & set(part.variants)
            if uses_adapter and self.training_parts.family.kind != "unet":
                raise ValueError(f"{name}.variants: {NO_ADAPTER}")
        if self.superres is not None and self.data.resolution % self.superres.scale:
            raise ValueError(
                f"superres.scale: {self.superres.scale} does not divide data.resolution {self.data.resolution}; use a divisor"
            )
        return self

    @property
    def training_parts(self) -> TrainingParts:
        """The parts of a study that trains its models; `require_training_parts` lists the errors."""
        return self.require_training_parts()

    def require_training_parts(self) -> TrainingParts:
        """The parts of a study that trains its models.

        Raises:
            ConfigError: the study is one of pretrained checkpoints and trains nothing.
        """
        if self.family is None or self.train is None or self.autoencoder is None or self.data.train is None:
            raise ConfigError(
                f"{self.name}: this study scores pretrained checkpoints and trains nothing; use `isocost run` without --devices"
            )
        return TrainingParts(self.family, self.train, self.autoencoder, self.data.train)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> StudySpec:
        """Read a study file.

        Args:
            path: the YAML file.
            overrides: dotted key -> value: {"train.lr": 2e-4}.

        Raises:
            ConfigError: the file is missing, or a key or value is wrong; one line names file, key and remedy.
        """
        from isocost.config.study_yaml import load_study

        return load_study(path, overrides)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> StudySpec:
        """Read a study from the keys of a study file.

        Raises:
            ConfigError: a key or value is wrong; one line names key and remedy.
        """
        return parse_spec(cls, plain, "study")

    def finetune_parts(self) -> dict[str, SuperresSpec | DreamboothSpec | DistillSpec]:
        """The fine-tuning sections by dotted key."""
        parts = {name: getattr(self, name) for name in FINETUNE_SECTIONS}
        if self.superres is not None:
            parts["superres.distill"] = self.superres.distill
        return {name: part for name, part in parts.items() if part is not None}

    def immutable_fields(self) -> dict[str, Any]:
        """The fields that may not change in an output folder. Sizes, steps, guidance, solvers and the training may grow."""
        plain = self.model_dump(mode="json")
        return {
            "data": plain["data"],
            "autoencoder": plain["autoencoder"],
            "text_encoder": plain["text_encoder"],
            "train": None if self.train is None else self.train.immutable_fields(),
            "protocol": _immutable_protocol_fields(plain["protocol"]),
            **{name: _immutable_finetune_fields(part) for name, part in self.finetune_parts().items()},
        }


GROWABLE_FIELDS = frozenset(
    {"sweep", "starts", "parents", "teachers", "variants", "metric", "subjects", "num_prior_images", "distill"}
)
"""Fields of a fine-tuning section that may change in an output folder."""


def _immutable_finetune_fields(part: SuperresSpec | DreamboothSpec | DistillSpec) -> dict[str, Any]:
    plain = part.model_dump(mode="json")
    fields = {key: value for key, value in plain.items() if key not in GROWABLE_FIELDS}
    protocol = {"protocol": _immutable_protocol_fields(plain["protocol"])} if "protocol" in plain else {}
    return {**fields, "train": part.train.immutable_fields(), **protocol}


def _inherit(section: Any, train: dict[str, Any], name: str) -> Any:
    """A fine-tuning section whose `train` inherits the fields that it does not set."""
    if not isinstance(section, dict) or not isinstance(section.get("train"), dict):
        return section
    inherited = {key: value for key, value in train.items() if key not in PER_RUN_FIELDS}
    defaults = {"caption_dropout": 0.0} if name == "dreambooth" else {}
    merged = {**section, "train": {**inherited, **defaults, **section["train"]}}
    if name == "superres" and "distill" in section:
        merged["distill"] = _inherit(section["distill"], merged["train"], "distill")
    return merged


def _immutable_protocol_fields(protocol: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in protocol.items() if key not in {"metrics", "weights", "lpips"}}
