"""What an experiment of a study is: its trainings, and what the points of their checkpoints rest on.

The pipeline trains and sweeps all of them alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
from torch import Tensor, nn

from isocost.diffusion.generate import CaptionStates
from isocost.diffusion.rows import ByPicture
from isocost.score.protocol import Protocol as ScoringProtocol
from isocost.score.reference import Reference
from isocost.spec import digest
from isocost.stages import ModelSpec, ProtocolSpec, SweepSpec, TaskName, TrainSpec
from isocost.train.tasks import Task

TRAIN_VERSION = 2


@dataclass(frozen=True)
class Run:
    """One training: its network, the digest of its run, and the digest of its checkpoint by images seen.

    `parent` is the folder of the checkpoint whose weights it starts from; None starts from random ones. `variant` sets it apart
    from other runs of its size.
    """

    task: TaskName
    model: ModelSpec
    spec: TrainSpec
    digest: str
    checkpoints: dict[int, str]
    parent: Path | None = None
    variant: str = ""

    @property
    def final(self) -> str:
        """Digest of the last checkpoint."""
        return self.checkpoints[max(self.checkpoints)]

    @property
    def title(self) -> str:
        """Which training it is: "superres width 8 from scratch"."""
        name = "" if self.task == "text2image" else f"{self.task} "
        return f"{name}width {self.model.width} {self.variant}".rstrip()


class Experiment(Protocol):
    """One experiment of a study."""

    @property
    def sweep(self) -> SweepSpec:
        """Which points of its checkpoints are made."""

    @property
    def protocol_spec(self) -> ProtocolSpec:
        """How they are scored."""

    @property
    def metric(self) -> str:
        """What its report leads with."""

    @property
    def runs(self) -> list[Run]:
        """The trainings that the study asks for, smallest first."""

    @property
    def protocol(self) -> ScoringProtocol:
        """What its scores rest on; nothing is computed for it yet."""

    def task(self, run: Run) -> Task:
        """What the run trains on."""

    def network(self, run: Run) -> nn.Module:
        """The network as the training begins."""

    def facts(self, run: Run) -> dict[str, Any]:
        """What a checkpoint's `isocost.json` says beyond the rest."""

    @property
    def reference(self) -> Reference:
        """The protocol with the real pictures' features."""

    @property
    def captions(self) -> CaptionStates:
        """States of the captions that are drawn."""

    @property
    def kept(self) -> list[int]:
        """Ids of the pictures that every point keeps."""

    @property
    def beside(self) -> ByPicture | None:
        """What the network sees beside the noisy latent, by picture id."""

    @property
    def baselines(self) -> Mapping[str, Mapping[str, float]]:
        """Scores of pictures that no model made, by what made them and metric."""

    def findings(self, table: pd.DataFrame) -> dict[str, Any]:
        """What the points say beyond the frontier, by title: plain text, or mappings of it."""

    def strips(self) -> Mapping[str, Tensor]:
        """Pictures to lay beside the kept ones, uint8 [K, 3, R, R] by title; empty where there are none."""


def make_run(
    task: TaskName,
    model: ModelSpec,
    spec: TrainSpec,
    stage: Mapping[str, Any],
    gflop_per_forward: float,
    parent: Path | None = None,
    variant: str = "",
) -> Run:
    """A run named by what decides its weights: `stage`, the recipe, the network."""
    name = digest({"stage": "train", "version": TRAIN_VERSION, **stage, "recipe": spec.recipe()}, model)
    marks = sorted({spec.whole_batches(mark) for mark in spec.all_marks(gflop_per_forward)})
    published = {} if spec.publish_ema is None else {"ema": spec.publish_ema}
    checkpoints = {mark: digest({"stage": "checkpoint", "run": name, "images": mark, **published}) for mark in marks}
    return Run(task, model, spec, name, checkpoints, parent, variant)
