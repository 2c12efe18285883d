"""The study: all stages' specs in one file (`study_file.py` reads and writes it)."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import Field, field_validator, model_validator

from isocost.config.base import Spec
from isocost.config.data import DataSpec, SourceSpec
from isocost.config.evaluation import ProtocolSpec
from isocost.config.finetune import ADAPTED_VARIANTS, NO_ADAPTER, DistillSpec, DreamboothSpec, SuperresSpec
from isocost.config.model import AutoencoderSpec, FamilySpec, TextEncoderSpec
from isocost.config.sweep import SweepSpec
from isocost.config.training import TrainSpec
from isocost.errors import ConfigError


class ReportSpec(Spec):
    """What the report leads with."""

    metric: str = "mmd_efficientnet"
    budgets: tuple[float, ...] = Field(
        (), description="normalized cost budgets for the answer; chosen from the data where empty"
    )


class SeedReplicatesSpec(Spec):
    """Sizes of the family trained again from other seeds: how much of a difference between two trainings is luck."""

    seeds: tuple[int, ...] = Field(description="of the further trainings; train.seed is the first one's")
    widths: tuple[int, ...] = Field((), description="of family.widths; all where empty")

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds) or not seeds:
            raise ValueError("seeds must be given, each once")
        return seeds


DOWNSTREAM = ("superres", "dreambooth", "distill")
"""Parts of a study that start from what `train` made; `superres` may have a `distill` of its own."""

PER_RUN_FIELDS = frozenset({"num_images", "snapshots", "snapshots_gflop", "warmup_images"})


class TrainingParts(NamedTuple):
    """What a study has that trains: its networks, their training, its autoencoder, and the images of `data.train`."""

    family: FamilySpec
    train: TrainSpec
    autoencoder: AutoencoderSpec
    images: SourceSpec


class StudySpec(Spec):
    """A whole study: one YAML file.

    A study of `checkpoints` scores what others have trained: it has no family, train and autoencoder, and no `data.train`.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    data: DataSpec
    autoencoder: AutoencoderSpec | None = None
    text_encoder: TextEncoderSpec = TextEncoderSpec()
    family: FamilySpec | None = None
    train: TrainSpec | None = None
    seed_replicates: SeedReplicatesSpec | None = None
    checkpoints: tuple[str, ...] = Field(
        (), description="pipelines of diffusers: folders or Hub ids (OWNER/NAME[@REVISION]), with ` + LORA[:SCALE]` or without"
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
        """What the training of a downstream task does not say is as in `train`."""
        if not isinstance(plain, dict) or not isinstance(plain.get("train"), dict):
            return plain
        tuned = {name: _inherit(plain[name], plain["train"], name) for name in DOWNSTREAM if name in plain}
        return {**plain, **tuned}

    @model_validator(mode="after")
    def _check_source_of_models(self) -> StudySpec:
        trained = {"autoencoder": self.autoencoder, "family": self.family, "train": self.train, "data.train": self.data.train}
        if not self.checkpoints:
            missing = [name for name, part in trained.items() if part is None]
            if missing:
                raise ValueError(f"{missing[0]}: missing; a study trains a family, or has checkpoints to score")
            return self
        if len(set(self.checkpoints)) != len(self.checkpoints):
            raise ValueError("checkpoints: each once")
        unused = [name for name, part in trained.items() if part is not None] + list(self.tuned())
        unused += ["seed_replicates"] if self.seed_replicates is not None else []
        unused += ["text_encoder"] if self.text_encoder != TextEncoderSpec() else []
        if unused:
            raise ValueError(f"{unused[0]}: has no place beside checkpoints, which bring their own; leave it out")
        if self.protocol.alignment != "none":
            raise ValueError("protocol.alignment: needs a probe that is fitted to data.train; beside checkpoints take none")
        return self

    @model_validator(mode="after")
    def _check_seed_replicates(self) -> StudySpec:
        if self.seed_replicates is None or self.family is None or self.train is None:
            return self
        if self.train.seed in self.seed_replicates.seeds:
            raise ValueError(f"seed_replicates.seeds: {self.train.seed} is train.seed, of the first training; take it out")
        unknown = [width for width in self.seed_replicates.widths if width not in self.family.widths]
        if unknown:
            raise ValueError(f"seed_replicates.widths: {unknown[0]} is not in family.widths; leave it out")
        return self

    @model_validator(mode="after")
    def _check_finetune_parts(self) -> StudySpec:
        for name, tuned in self.tuned().items():
            for field in ("prediction_type", "rescale_betas_zero_snr"):
                own = getattr(self.train, field)
                if getattr(tuned.train, field) != own:
                    raise ValueError(
                        f"{name}.train.{field}: a network is tuned as it was trained, {field}: {own}; leave it out"
                    )
            adapts = isinstance(tuned, DistillSpec) and not tuned.teachers and ADAPTED_VARIANTS & set(tuned.variants)
            if adapts and self.own.family.kind != "unet":
                raise ValueError(f"{name}.variants: {NO_ADAPTER}")
        if self.superres is not None and self.data.resolution % self.superres.scale:
            raise ValueError(f"superres.scale: {self.superres.scale} does not divide data.resolution {self.data.resolution}")
        return self

    @property
    def own(self) -> TrainingParts:
        """What a study that trains has.

        Raises:
            ConfigError: it is one of given checkpoints.
        """
        if self.family is None or self.train is None or self.autoencoder is None or self.data.train is None:
            raise ConfigError(f"{self.name}: its checkpoints are given: it trains nothing, and has no autoencoder of its own")
        return TrainingParts(self.family, self.train, self.autoencoder, self.data.train)

    def tuned(self) -> dict[str, SuperresSpec | DreamboothSpec | DistillSpec]:
        """The parts that start from what `train` made, by where they stand in the file."""
        parts = {name: getattr(self, name) for name in DOWNSTREAM}
        if self.superres is not None:
            parts["superres.distill"] = self.superres.distill
        return {name: part for name, part in parts.items() if part is not None}

    def immutable_fields(self) -> dict[str, Any]:
        """What may not change in an output folder. Sizes, steps, guidance, solvers, snapshots and images seen may grow."""
        plain = self.model_dump(mode="json")
        return {
            "data": plain["data"],
            "autoencoder": plain["autoencoder"],
            "text_encoder": plain["text_encoder"],
            "train": None if self.train is None else self.train.fixed(),
            "protocol": _fixed(plain["protocol"]),
            **{name: _immutable_finetune_fields(part) for name, part in self.tuned().items()},
        }


GROWABLE_FIELDS = frozenset(
    {"sweep", "starts", "parents", "teachers", "variants", "metric", "subjects", "num_prior_images", "distill"}
)
"""What may change of a part that starts from what `train` made."""


def _immutable_finetune_fields(part: SuperresSpec | DreamboothSpec | DistillSpec) -> dict[str, Any]:
    plain = part.model_dump(mode="json")
    kept = {key: value for key, value in plain.items() if key not in GROWABLE_FIELDS}
    protocol = {"protocol": _fixed(plain["protocol"])} if "protocol" in plain else {}
    return {**kept, "train": part.train.fixed(), **protocol}


def _inherit(part: Any, train: dict[str, Any], name: str) -> Any:
    """A part of the file whose training takes from `train` what it does not say."""
    if not isinstance(part, dict) or not isinstance(part.get("train"), dict):
        return part
    shared = {key: value for key, value in train.items() if key not in PER_RUN_FIELDS}
    without = {"caption_dropout": 0.0} if name == "dreambooth" else {}
    whole = {**part, "train": {**shared, **without, **part["train"]}}
    if name == "superres" and "distill" in part:
        whole["distill"] = _inherit(part["distill"], whole["train"], "distill")
    return whole


def _fixed(protocol: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in protocol.items() if key not in {"metrics", "weights", "lpips"}}
