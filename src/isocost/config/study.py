"""The study: all stages' specs in one file (`study_file.py` reads and writes it)."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import Field, field_validator, model_validator

from isocost.config.base import Spec
from isocost.config.data import DataSpec, SourceSpec
from isocost.config.evaluation import ProtocolSpec
from isocost.config.finetune import ADAPTED_VARIANTS, NO_ADAPTER, DistillSpec, DreamboothSpec, SuperresSpec
from isocost.config.model import CodecSpec, FamilySpec, TextSpec
from isocost.config.sweep import SweepSpec
from isocost.config.training import TrainSpec
from isocost.errors import RequestError


class ReportSpec(Spec):
    """What the report leads with."""

    metric: str = "kernel_efficientnet"
    budgets: tuple[float, ...] = Field((), description="paper cost budgets for the answer; chosen from the data where empty")


class RepeatsSpec(Spec):
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

OWN_TO_A_TRAINING = frozenset({"num_images", "marks", "marks_gflop", "warmup_images"})


class OwnParts(NamedTuple):
    """What a study has that trains: its networks, their training, its codec, and the pictures of `data.train`."""

    family: FamilySpec
    train: TrainSpec
    codec: CodecSpec
    pictures: SourceSpec


class StudySpec(Spec):
    """A whole study: one YAML file.

    A study of `checkpoints` scores what others have trained: it has no family, train and codec, and no `data.train`.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    data: DataSpec
    codec: CodecSpec | None = None
    text: TextSpec = TextSpec()
    family: FamilySpec | None = None
    train: TrainSpec | None = None
    repeats: RepeatsSpec | None = None
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
    def _tuned_like_trained(cls, plain: Any) -> Any:
        """What the training of a downstream task does not say is as in `train`."""
        if not isinstance(plain, dict) or not isinstance(plain.get("train"), dict):
            return plain
        tuned = {name: _like(plain[name], plain["train"], name) for name in DOWNSTREAM if name in plain}
        return {**plain, **tuned}

    @model_validator(mode="after")
    def _trains_or_is_given(self) -> StudySpec:
        trained = {"codec": self.codec, "family": self.family, "train": self.train, "data.train": self.data.train}
        if not self.checkpoints:
            missing = [name for name, part in trained.items() if part is None]
            if missing:
                raise ValueError(f"{missing[0]}: missing; a study trains a family, or has checkpoints to score")
            return self
        if len(set(self.checkpoints)) != len(self.checkpoints):
            raise ValueError("checkpoints: each once")
        unused = [name for name, part in trained.items() if part is not None] + list(self.tuned())
        unused += ["repeats"] if self.repeats is not None else []
        unused += ["text"] if self.text != TextSpec() else []
        if unused:
            raise ValueError(f"{unused[0]}: has no place beside checkpoints, which bring their own; leave it out")
        if self.protocol.alignment != "none":
            raise ValueError("protocol.alignment: needs a probe that is fitted to data.train; beside checkpoints take none")
        return self

    @model_validator(mode="after")
    def _repeats_what_it_trains(self) -> StudySpec:
        if self.repeats is None or self.family is None or self.train is None:
            return self
        if self.train.seed in self.repeats.seeds:
            raise ValueError(f"repeats.seeds: {self.train.seed} is train.seed, of the first training; take it out")
        unknown = [width for width in self.repeats.widths if width not in self.family.widths]
        if unknown:
            raise ValueError(f"repeats.widths: {unknown[0]} is not in family.widths; leave it out")
        return self

    @model_validator(mode="after")
    def _tuned_as_it_predicts(self) -> StudySpec:
        for name, tuned in self.tuned().items():
            for field in ("prediction", "zero_terminal_snr"):
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
    def own(self) -> OwnParts:
        """What a study that trains has.

        Raises:
            RequestError: it is one of given checkpoints.
        """
        if self.family is None or self.train is None or self.codec is None or self.data.train is None:
            raise RequestError(f"{self.name}: its checkpoints are given: it trains nothing, and has no codec of its own")
        return OwnParts(self.family, self.train, self.codec, self.data.train)

    def tuned(self) -> dict[str, SuperresSpec | DreamboothSpec | DistillSpec]:
        """The parts that start from what `train` made, by where they stand in the file."""
        parts = {name: getattr(self, name) for name in DOWNSTREAM}
        if self.superres is not None:
            parts["superres.distill"] = self.superres.distill
        return {name: part for name, part in parts.items() if part is not None}

    def fixed_part(self) -> dict[str, Any]:
        """What may not change in an output folder. Sizes, steps, guidance, samplers, marks and images seen may grow."""
        plain = self.model_dump(mode="json")
        return {
            "data": plain["data"],
            "codec": plain["codec"],
            "text": plain["text"],
            "train": None if self.train is None else self.train.fixed(),
            "protocol": _fixed(plain["protocol"]),
            **{name: _fixed_tuned(part) for name, part in self.tuned().items()},
        }


FREE_WHERE_TUNED = frozenset(
    {"sweep", "starts", "parents", "teachers", "variants", "metric", "subjects", "num_prior_pictures", "distill"}
)
"""What may change of a part that starts from what `train` made."""


def _fixed_tuned(part: SuperresSpec | DreamboothSpec | DistillSpec) -> dict[str, Any]:
    plain = part.model_dump(mode="json")
    kept = {key: value for key, value in plain.items() if key not in FREE_WHERE_TUNED}
    protocol = {"protocol": _fixed(plain["protocol"])} if "protocol" in plain else {}
    return {**kept, "train": part.train.fixed(), **protocol}


def _like(part: Any, train: dict[str, Any], name: str) -> Any:
    """A part of the file whose training takes from `train` what it does not say."""
    if not isinstance(part, dict) or not isinstance(part.get("train"), dict):
        return part
    shared = {key: value for key, value in train.items() if key not in OWN_TO_A_TRAINING}
    without = {"caption_dropout": 0.0} if name == "dreambooth" else {}
    whole = {**part, "train": {**shared, **without, **part["train"]}}
    if name == "superres" and "distill" in part:
        whole["distill"] = _like(part["distill"], whole["train"], "distill")
    return whole


def _fixed(protocol: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in protocol.items() if key not in {"distances", "weights", "lpips"}}
