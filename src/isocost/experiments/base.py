"""Base class of the experiments of a study: their trainings, and the evaluation of their checkpoints.

The pipeline trains and sweeps all experiments in the same way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from isocost.config.base import digest
from isocost.config.evaluation import ProtocolSpec
from isocost.config.model import ModelSpec
from isocost.config.sampling import VaeSpec
from isocost.config.sweep import GuideSelection, GuideSpec, PointSpec, SweepSpec
from isocost.config.training import TrainSpec
from isocost.config.types import TaskName
from isocost.diffusion.guidance import check_interval
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.errors import ConfigError
from isocost.evaluation.paired import PairedComparer
from isocost.evaluation.protocol import Protocol
from isocost.evaluation.reference_set import ReferenceSet
from isocost.experiments.component_costs import study_component_costs
from isocost.experiments.study_assets import StudyAssets
from isocost.models.autoencoder import Autoencoder
from isocost.models.checkpoint import CheckpointInfo, save_networks
from isocost.models.component_costs import ComponentCosts
from isocost.models.factory import Network
from isocost.sampling.generate import PromptEmbeds
from isocost.sampling.request import PerSampleFn
from isocost.sweep.grid import NO_GUIDES, Guides, SearchCell, SweepPoint, run_points, search_cells
from isocost.training.objectives import Objective, training_schedule

TRAIN_VERSION = 2


@dataclass(frozen=True)
class TrainingRun:
    """One training, or one pretrained checkpoint.

    Attributes:
        task: name of the experiment.
        model: network to train.
        spec: training configuration; unused if `is_pretrained`.
        digest: name of the run's artefact.
        checkpoints: digest of every checkpoint, by images seen.
        parent: folder of the checkpoint to start from; None starts from random weights.
        variant: distinguishes the run from others of the same task and size.
        is_pretrained: the only checkpoint exists already and is not trained here.
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
    def sources(self) -> tuple[Path, ...]:
        """Folders of the checkpoints that the training reads."""
        return () if self.parent is None else (self.parent,)

    @property
    def final(self) -> str:
        """Digest of the last checkpoint."""
        return self.checkpoints[max(self.checkpoints)]

    def checkpoint_after(self, images: int, where: str) -> str:
        """Digest of the snapshot after a number of images, which is rounded up to whole batches as in `train.snapshots`.

        Raises:
            ConfigError: there is none; `where` begins the message.
        """
        images_seen = self.spec.whole_batches(images)
        if images_seen not in self.checkpoints:
            known = ", ".join(map(str, sorted(self.checkpoints)))
            raise ConfigError(f"{where}: width {self.model.width} has no such snapshot; it has {known} images")
        return self.checkpoints[images_seen]

    @property
    def title(self) -> str:
        """Title such as "superres width 8 from scratch"."""
        if self.is_pretrained:
            return self.variant
        name = "" if self.task == "text2image" else f"{self.task} "
        return f"{name}width {self.model.width} {self.variant}".rstrip()


@dataclass(frozen=True)
class EvalContext:
    """Everything needed to sample and score points.

    Attributes:
        reference: reference set.
        prompts: prompt embeddings by sample index.
        saved_indices: indices of the samples whose images every point saves.
        metrics: metrics to compute.
        concat_cond: second input of the network by sample index (super-resolution).
        autoencoder: autoencoder of a pretrained checkpoint; None takes the study's.
        guide_prompts: makes the prompt embeddings of guides with a text encoder of their own, by the guide's checkpoint.
    """

    reference: ReferenceSet
    prompts: PromptEmbeds
    saved_indices: list[int]
    metrics: tuple[str, ...]
    concat_cond: PerSampleFn | None = None
    autoencoder: Autoencoder | None = None
    guide_prompts: Mapping[str, Callable[[], PromptEmbeds]] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalJob:
    """Points of one checkpoint with a common evaluation context.

    Attributes:
        checkpoint: digest of the checkpoint.
        points: points to score.
        eval_context: builds the context; called only if something is to be sampled or scored.
        cells: cells whose best guidance a race searches; their points are known after the race.
        protocol_spec: configuration of the protocol, if it differs from `Experiment.protocol_spec`.
    """

    checkpoint: str
    points: tuple[SweepPoint, ...]
    eval_context: Callable[[], EvalContext]
    cells: tuple[SearchCell, ...] = ()
    protocol_spec: ProtocolSpec | None = None

    @property
    def guides(self) -> list[str]:
        """Digests of the checkpoints that guide points or cells of the job."""
        guides = {point.spec.guide for point in self.points} | {option.guide for cell in self.cells for option in cell.options}
        return sorted({guide.checkpoint for guide in guides if guide is not None})


class Experiment(ABC):
    """One experiment of a study."""

    assets: StudyAssets
    sweep: SweepSpec
    protocol_spec: ProtocolSpec
    metric: str
    """Main metric of the report."""
    baseline: Experiment | None = None
    """Another experiment with the same protocol, whose final checkpoints the report also shows."""

    # --- trainings ---

    @property
    @abstractmethod
    def runs(self) -> list[TrainingRun]:
        """All trainings of the experiment, smallest network first."""

    @abstractmethod
    def objective(self, run: TrainingRun, network: nn.Module) -> Objective:
        """Build the training objective of a run."""

    @abstractmethod
    def network(self, run: TrainingRun) -> nn.Module:
        """Build the network with its initial weights."""

    def save(self, folder: Path, network: nn.Module, run: TrainingRun, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Write the networks of a checkpoint with these weights."""
        assert isinstance(network, Network), "other networks override save()"
        dtype = torch.bfloat16 if run.spec.snapshot_dtype == "bf16" else torch.float32
        save_networks(folder, network, run.spec.prediction_type, run.spec.rescale_betas_zero_snr, weights, dtype)

    def checkpoint_metadata(self, run: TrainingRun) -> dict[str, Any]:
        """Return fields of `CheckpointInfo` to add or to replace in a checkpoint's `isocost.json`."""
        return {}

    def pretrained(self, run: TrainingRun) -> CheckpointInfo | None:
        """Return the metadata of a pretrained checkpoint; None for a run that is trained here."""
        return None

    def training_gflop(self, run: TrainingRun, images_seen: int) -> float | None:
        """Return the training compute; None means 3 x forward x images."""
        return None

    # --- points ---

    @abstractmethod
    def validate(self) -> None:
        """Check, before any training, that the scores can be computed.

        Raises:
            ConfigError: weights, labels or images are missing, or the study contradicts them.
        """

    @abstractmethod
    def jobs(self, run: TrainingRun) -> list[EvalJob]:
        """Return the points and guidance searches of one run, grouped into jobs.

        All points of a job have the same checkpoint and the same evaluation context.
        """

    def schedule(self, run: TrainingRun) -> NoiseSchedule:
        """Return the noise schedule of a run's checkpoints."""
        return training_schedule(run.spec)

    def check_guidance(self, run: TrainingRun) -> None:
        """Check the guides and the guidance intervals of a run, before anything is trained.

        Raises:
            ConfigError: a guide does not exist or does not fit, or an interval is outside of the noise schedule.
        """
        self.guides(run)
        for selection in self.sweep.guide_selections:
            if selection.size is not None and not any(self._selected_checkpoints(selection, other) for other in self.runs):
                reason = (
                    "each would guide itself; give an earlier snapshot" if selection.size != "smaller" else "no size is smaller"
                )
                raise ConfigError(f"sweep.guides: {selection.title}: it guides no network, because {reason}")
        for interval in self.sweep.intervals:
            if interval is not None:
                check_interval(interval, self.schedule(run))

    def external_guides(self, run: TrainingRun) -> Mapping[str, CheckpointInfo]:
        """Return published checkpoints that guide a run, by digest."""
        return {}

    def guides(self, run: TrainingRun) -> Guides:
        """Return the guides of a run's last checkpoint: members of the experiment of the same size or smaller.

        Raises:
            ConfigError: a requested size or snapshot does not exist.
        """
        selected: list[GuideSpec | None] = [None] if self.sweep.includes_no_guide else []
        for selection in self.sweep.guide_selections:
            selected += [
                GuideSpec(checkpoint=checkpoint, null_prompt=selection.null_prompt)
                for checkpoint in self._selected_checkpoints(selection, run)
            ]
        return tuple(dict.fromkeys(selected)) or NO_GUIDES

    def _selected_checkpoints(self, selection: GuideSelection, run: TrainingRun) -> list[str]:
        """Checkpoints that a selection gives to a run; the network itself is none of them."""
        where = f"sweep.guides: {selection.title}"
        members = [other for other in self.runs if other.variant == run.variant and other.model.width <= run.model.width]
        if selection.checkpoint is not None:
            raise ConfigError(f"{where}: a study that trains its networks has only guides by size")
        widths = sorted({other.model.width for other in self.runs})
        if isinstance(selection.size, int) and selection.size not in widths:
            raise ConfigError(f"{where}: no such width; the study has {', '.join(map(str, widths))}")
        fits = {
            "smaller": lambda other: other.model.width < run.model.width,
            "same": lambda other: other.model.width == run.model.width,
            "all": lambda _: True,
        }.get(str(selection.size), lambda other: other.model.width == selection.size)
        checkpoints = []
        for other in filter(fits, members):
            if isinstance(selection.snapshot, int):
                names = [other.checkpoint_after(selection.snapshot, where)]
            elif selection.snapshot == "last":
                names = [other.final]
            else:
                names = [other.checkpoints[images] for images in sorted(other.checkpoints)]
            checkpoints += [name for name in names if name != run.final]
        return checkpoints

    def components(self, checkpoint: str, vae: VaeSpec, guide: str | None) -> ComponentCosts:
        """Return the costs of the text encoder and the autoencoder for one image.

        Args:
            checkpoint: digest of the checkpoint that makes the image.
            vae: settings of the autoencoder.
            guide: digest of the guide that encodes the prompt; None without one, or if it has the empty prompt.

        Raises:
            ConfigError: the text encoder or the autoencoder is not there.
        """
        return study_component_costs(self.assets.study, vae)

    def components_of_point(self, point: PointSpec) -> ComponentCosts:
        """Return the costs of the text encoder and the autoencoder for one image of a point.

        Raises:
            ConfigError: the text encoder or the autoencoder is not there.
        """
        guide = None if point.guide is None or point.guide.null_prompt else point.guide.checkpoint
        return self.components(point.checkpoint, point.vae, guide)

    def labels(self, run: TrainingRun) -> dict[str, str]:
        """Return columns of the results table that the study decides, since another study may have trained the checkpoint."""
        return {}

    def has_points(self, run: TrainingRun) -> bool:
        """Whether the sweep has points at each of the run's checkpoints."""
        return True

    def points(self, run: TrainingRun) -> list[SweepPoint]:
        """Return all points of one run that do not depend on a race."""
        return [point for job in self.jobs(run) for point in job.points]

    def eval_jobs_of_run(
        self, run: TrainingRun, sweep: SweepSpec, protocol: Protocol, eval_context: Callable[[], EvalContext]
    ) -> list[EvalJob]:
        """Return the jobs of a run: a point at every snapshot, and the grid or the search cells at the last checkpoint."""
        checkpoints = tuple(run.checkpoints.values())
        embeds_guidance = run.model.embeds_guidance
        guides = self.guides(run)
        arguments = (sweep, self.protocol_spec, protocol, self.metric, embeds_guidance, self.schedule(run), guides)
        cells = tuple(search_cells(checkpoints[-1], *arguments))
        points_by_checkpoint = run_points(checkpoints, sweep, self.protocol_spec, protocol, guides)
        return [
            EvalJob(checkpoint, points, eval_context, cells if checkpoint == checkpoints[-1] else ())
            for checkpoint, points in points_by_checkpoint.items()
        ]

    # --- report ---

    @property
    @abstractmethod
    def protocol_summary(self) -> str:
        """One sentence about the protocol."""

    @property
    @abstractmethod
    def baselines(self) -> Mapping[str, Mapping[str, float]]:
        """Scores of images that no model generated, by source and metric; the first source is the bound for every model."""

    @property
    @abstractmethod
    def sample_labels(self) -> list[str]:
        """Labels of the report's images, in their order."""

    def summarise(
        self, table: pd.DataFrame, samples: Mapping[str, np.ndarray]
    ) -> tuple[pd.DataFrame, Mapping[str, np.ndarray]]:
        """Return the rows and the images by point that the report shows, from those of all points."""
        return table, samples

    def replaced_schedulers(self) -> Mapping[tuple[str, str], str]:
        """Scheduler class by (checkpoint, solver label), where another solver is used in place of the checkpoint's own."""
        return {}

    def comparer(self) -> PairedComparer | None:
        """Return the paired differences between points of the experiment; None if it has several reference sets."""
        return None

    def findings(self, table: pd.DataFrame) -> dict[str, Any]:
        """Return further results for the report: text, or a mapping to text, by title."""
        return {}

    def comparison_rows(self) -> Mapping[str, Tensor]:
        """Return images to compare with the saved samples: uint8 [K, 3, R, R] by title.

        The report shows the last row after the samples of the models, and the others before them.
        """
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
    """Create a run whose digest depends on everything that decides its weights: `stage`, the recipe and the network.

    Args:
        task: name of the experiment.
        model: network to train.
        spec: training configuration.
        stage: further inputs of the digest, such as the data and the parent.
        gflop_per_forward: cost of the network, for snapshots that are given in GFLOP.
        parent: see `TrainingRun`.
        variant: see `TrainingRun`.
    """
    name = digest({"stage": "train", "version": TRAIN_VERSION, **stage, "recipe": spec.recipe()}, model)
    snapshots = sorted({spec.whole_batches(snapshot) for snapshot in spec.all_snapshots(gflop_per_forward)})
    saved_as: dict[str, Any] = {} if spec.snapshot_ema is None else {"ema": spec.snapshot_ema}
    saved_as |= {} if spec.snapshot_dtype == "fp32" else {"dtype": spec.snapshot_dtype}
    checkpoints = {
        snapshot: digest({"stage": "checkpoint", "run": name, "images": snapshot, **saved_as}) for snapshot in snapshots
    }
    return TrainingRun(task, model, spec, name, checkpoints, parent, variant)
