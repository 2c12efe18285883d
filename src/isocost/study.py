"""The study: all stages' specs in one file (`study_file.py` reads and writes it)."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from isocost.downstream import DreamboothSpec, SuperresSpec
from isocost.spec import Spec
from isocost.stages import CodecSpec, DataSpec, FamilySpec, ProtocolSpec, SweepSpec, TextSpec, TrainSpec


class ReportSpec(Spec):
    """What the report leads with."""

    metric: str = "kernel_efficientnet"
    budgets: tuple[float, ...] = Field((), description="paper cost budgets for the answer; chosen from the data where empty")


DOWNSTREAM = ("superres", "dreambooth")
"""Parts of a study that fine-tune what `train` made."""

OWN_TO_A_TRAINING = frozenset({"num_images", "marks", "marks_gflop", "warmup_images"})


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
    superres: SuperresSpec | None = None
    dreambooth: DreamboothSpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _tuned_like_trained(cls, plain: Any) -> Any:
        """What the training of a downstream task does not say is as in `train`."""
        if not isinstance(plain, dict) or not isinstance(plain.get("train"), dict):
            return plain
        shared = {key: value for key, value in plain["train"].items() if key not in OWN_TO_A_TRAINING}
        without = {"dreambooth": {"caption_dropout": 0.0}}
        tuned = {
            name: {**plain[name], "train": {**shared, **without.get(name, {}), **plain[name]["train"]}}
            for name in DOWNSTREAM
            if isinstance(plain.get(name), dict) and isinstance(plain[name].get("train"), dict)
        }
        return {**plain, **tuned}

    @model_validator(mode="after")
    def _tuned_as_it_predicts(self) -> StudySpec:
        for name in DOWNSTREAM:
            tuned = getattr(self, name)
            for field in ("prediction", "zero_terminal_snr"):
                own = getattr(self.train, field)
                if tuned is not None and getattr(tuned.train, field) != own:
                    raise ValueError(
                        f"{name}.train.{field}: a network is tuned as it was trained, {field}: {own}; leave it out"
                    )
        if self.superres is not None and self.data.resolution % self.superres.scale:
            raise ValueError(f"superres.scale: {self.superres.scale} does not divide data.resolution {self.data.resolution}")
        return self

    def fixed_part(self) -> dict[str, Any]:
        """What may not change in an output folder. Sizes, steps, guidance, samplers, marks and images seen may grow."""
        plain = self.model_dump(mode="json")
        return {
            "data": plain["data"],
            "codec": plain["codec"],
            "text": plain["text"],
            "train": self.train.fixed(),
            "protocol": _fixed(plain["protocol"]),
            **{name: self._fixed_downstream(name) for name in DOWNSTREAM if plain[name] is not None},
        }

    def _fixed_downstream(self, name: str) -> dict[str, Any]:
        plain = self.model_dump(mode="json")[name]
        free = {"sweep", "starts", "parents", "metric", "train", "protocol", "subjects", "num_prior_pictures"}
        kept = {key: value for key, value in plain.items() if key not in free}
        return {**kept, "train": getattr(self, name).train.fixed(), "protocol": _fixed(plain["protocol"])}


def _fixed(protocol: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in protocol.items() if key not in {"distances", "weights", "lpips"}}
