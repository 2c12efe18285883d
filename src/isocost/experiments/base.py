"""What an experiment of a study is: its trainings, and what the points of their checkpoints rest on.

The pipeline trains and sweeps all of them alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from isocost.config.base import digest
from isocost.config.evaluation import ProtocolSpec
from isocost.config.model import ModelSpec
from isocost.config.sweep import SweepSpec
from isocost.config.training import TrainSpec
from isocost.config.types import TaskName
from isocost.evaluation.protocol import Protocol
from isocost.evaluation.reference_set import ReferenceSet
from isocost.models.autoencoder import Autoencoder
from isocost.models.checkpoint import CheckpointInfo, save_networks
from isocost.models.factory import Network
from isocost.sampling.generate import PromptEmbeds
from isocost.sampling.request import PerSampleFn
from isocost.sweep.grid import SearchCell, SweepPoint, run_points, search_cells
from isocost.training.objectives import Objective

TRAIN_VERSION = 2


@dataclass(frozen=True)
class TrainingRun:
    """One training: its network, the digest of its run, and the digest of its checkpoint by images seen.

    `parent` is the folder of the checkpoint whose weights it starts from; None starts from random ones. `variant` sets it apart
    from other runs of its size. A run that is given is trained elsewhere: its one checkpoint is there, and nothing of `spec` is
    asked.
    """

    task: TaskName
    model: ModelSpec
    spec: TrainSpec
    digest: str
    checkpoints: dict[int, str]
    parent: Path | None = None
    variant: str = ""
    is_pretrained: bool = False

    @property
    def final(self) -> str:
        """Digest of the last checkpoint."""
        return self.checkpoints[max(self.checkpoints)]

    @property
    def title(self) -> str:
        """Which training it is: "superres width 8 from scratch"."""
        if self.is_pretrained:
            return self.variant
        name = "" if self.task == "text2image" else f"{self.task} "
        return f"{name}width {self.model.width} {self.variant}".rstrip()


@dataclass(frozen=True)
class EvalContext:
    """What points are made and scored with.

    `captions` are the states of the captions that are drawn, `kept` the ids of the images that every point keeps, `beside`
    what the network sees beside the noisy latent, by image id. `autoencoder` is a given checkpoint's; the study's where None.
    """

    reference: ReferenceSet
    prompts: PromptEmbeds
    saved_indices: list[int]
    metrics: tuple[str, ...]
    concat_cond: PerSampleFn | None = None
    autoencoder: Autoencoder | None = None


@dataclass(frozen=True)
class EvalJob:
    """Points of one checkpoint that share a bench, which is set up when it is needed.

    `cells` are those whose best guidance is raced for; what is scored of them is known afterwards.
    """

    checkpoint: str
    points: tuple[SweepPoint, ...]
    eval_context: Callable[[], EvalContext]
    cells: tuple[SearchCell, ...] = ()


class Experiment(ABC):
    """One experiment of a study."""

    sweep: SweepSpec
    protocol_spec: ProtocolSpec
    metric: str
    """What its report leads with."""
    baseline: Experiment | None = None
    """Another experiment of the same protocol, whose last checkpoints its report shows as well."""

    # --- trainings ---

    @property
    @abstractmethod
    def runs(self) -> list[TrainingRun]:
        """The trainings that the study asks for, smallest first."""

    @abstractmethod
    def task(self, run: TrainingRun, network: nn.Module) -> Objective:
        """What the run trains `network` on."""

    @abstractmethod
    def network(self, run: TrainingRun) -> nn.Module:
        """The network as the training begins."""

    def save(self, folder: Path, network: nn.Module, run: TrainingRun, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Write the networks of a checkpoint with these weights."""
        assert isinstance(network, Network), "another network has another way"
        dtype = torch.bfloat16 if run.spec.snapshot_dtype == "bf16" else torch.float32
        save_networks(folder, network, run.spec.prediction_type, run.spec.rescale_betas_zero_snr, weights, dtype)

    def facts(self, run: TrainingRun) -> dict[str, Any]:
        """What a checkpoint's `isocost.json` says beyond the rest, or in its place."""
        return {}

    def pretrained(self, run: TrainingRun) -> CheckpointInfo | None:
        """What a run that is given is, trained elsewhere; None of one that is trained here."""
        return None

    def training_gflop(self, run: TrainingRun, images_seen: int) -> float | None:
        """What a training took; None where that is 3 x forward x images."""
        return None

    # --- points ---

    @abstractmethod
    def check(self) -> None:
        """Raise ConfigError where its scores cannot be had, before anything is trained."""

    @abstractmethod
    def jobs(self, run: TrainingRun) -> list[EvalJob]:
        """The points of one run, by checkpoint and bench."""

    def points(self, run: TrainingRun) -> list[SweepPoint]:
        """All points of one run that are known before anything is raced for."""
        return [point for job in self.jobs(run) for point in job.points]

    def eval_jobs_of_run(
        self, run: TrainingRun, sweep: SweepSpec, protocol: Protocol, eval_context: Callable[[], EvalContext]
    ) -> list[EvalJob]:
        """A point at every snapshot, and at the last checkpoint the grid, or cells to race in."""
        names = tuple(run.checkpoints.values())
        embeds = run.model.embeds_guidance
        cells = tuple(search_cells(names[-1], sweep, self.protocol_spec, protocol, self.metric, embeds))
        points = run_points(names, sweep, self.protocol_spec, protocol)
        return [EvalJob(name, some, eval_context, cells if name == names[-1] else ()) for name, some in points.items()]

    # --- report ---

    @property
    @abstractmethod
    def protocol_summary(self) -> str:
        """What its scores rest on, in a sentence."""

    @property
    @abstractmethod
    def baselines(self) -> Mapping[str, Mapping[str, float]]:
        """Scores of images that no model made, by what made them and metric; the first is what no model can pass."""

    @property
    @abstractmethod
    def sample_labels(self) -> list[str]:
        """What the images of the report are called, in their order."""

    def summarise(
        self, table: pd.DataFrame, samples: Mapping[str, np.ndarray]
    ) -> tuple[pd.DataFrame, Mapping[str, np.ndarray]]:
        """The rows and the images by point that the report shows, from those of all points."""
        return table, samples

    def findings(self, table: pd.DataFrame) -> dict[str, Any]:
        """What the points say beyond the frontier, by title: plain text, or mappings of it."""
        return {}

    def strips(self) -> Mapping[str, Tensor]:
        """Images to lay beside the kept ones, uint8 [K, 3, R, R] by title, the last behind what models made."""
        return {}


def make_run(
    task: TaskName,
    model: ModelSpec,
    spec: TrainSpec,
    stage: Mapping[str, Any],
    gflop_per_forward: float,
    parent: Path | None = None,
    variant: str = "",
) -> TrainingRun:
    """A run named by what decides its weights: `stage`, the recipe, the network."""
    name = digest({"stage": "train", "version": TRAIN_VERSION, **stage, "recipe": spec.recipe()}, model)
    snapshots = sorted({spec.whole_batches(snapshot) for snapshot in spec.all_snapshots(gflop_per_forward)})
    published: dict[str, Any] = {} if spec.snapshot_ema is None else {"ema": spec.snapshot_ema}
    published |= {} if spec.snapshot_dtype == "fp32" else {"dtype": spec.snapshot_dtype}
    checkpoints = {
        snapshot: digest({"stage": "checkpoint", "run": name, "images": snapshot, **published}) for snapshot in snapshots
    }
    return TrainingRun(task, model, spec, name, checkpoints, parent, variant)
