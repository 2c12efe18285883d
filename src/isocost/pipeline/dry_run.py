"""What a run would do: images and GFLOP to train, points to make, disk, size by size."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from isocost.config.types import TaskName
from isocost.estimate.estimator import point_bytes
from isocost.experiments.base import TrainingRun
from isocost.models.flops import ModelCost
from isocost.pipeline.pipeline import Pipeline
from isocost.pipeline.sweep_runner import planned_points, unsearched_cells
from isocost.sweep.guidance_search_runner import typical_images
from isocost.training.state_checkpoint import newest_state
from isocost.training.throughput_estimate import disk_bytes

_SUMMED = ("points", "points_to_make", "images", "images_to_make", "images_of_races", "disk_bytes")


def plan(pipeline: Pipeline, tasks: Collection[TaskName] | None = None) -> dict[str, Any]:
    """What `pipeline.run` would do, by size, for some tasks or all. Reads the images; writes nothing.

    Every cell that is to be raced in counts as a point and as the images of a typical race.

    Raises:
        ConfigError: the study has no part for a task.
    """
    recorded, races = pipeline.recorded_points(), pipeline.races()
    sizes = [_plan_run(pipeline, run, recorded, races) for run in pipeline.runs_of(tasks)]
    total = {key: sum(size[key] for size in sizes) for key in _SUMMED}
    total["disk_bytes"] += 0 if pipeline.study.checkpoints else pipeline.assets.cache_bytes()
    about = {"study": pipeline.study.name, "out": str(pipeline.out), "protocol": pipeline.assets.protocol.id}
    return {**about, "sizes": sizes, "total": total}


def _plan_run(pipeline: Pipeline, run: TrainingRun, recorded: set[str], races: dict[str, dict[str, Any]]) -> dict[str, Any]:
    cost, experiment = pipeline.cost(run), pipeline.experiments[run.task]
    jobs = experiment.jobs(run)
    cells = unsearched_cells(jobs, races)
    points = [*planned_points(jobs, races), *(cell.point(cell.guidance[-1]) for cell in cells)]
    missing = [point for point in points if point.digest not in recorded]
    training_images = 0
    if not run.is_pretrained and pipeline.missing_snapshots(run):
        training_images = max(0, max(run.checkpoints) - newest_state(pipeline.store.folder("run", run.digest)))
    evaluations = sum(point.nfe(run.model) * point.spec.num_images for point in missing) + sum(
        cell.point(cell.guidance[-1]).nfe(run.model) * typical_images(cell) for cell in cells
    )
    protocol, resolution = experiment.protocol_spec, pipeline.study.data.resolution
    of_points = sum(point_bytes(protocol, point.spec.num_images, resolution) for point in points)
    of_training = 0 if run.is_pretrained else disk_bytes(run.spec, cost.num_parameters, len(run.checkpoints))
    return {
        "task": run.task,
        "size": f"{cost.size} {run.variant}".rstrip(),
        "width": cost.width,
        "images_to_train": training_images,
        "training_gflop": _gflop_to_train(pipeline, run, cost, training_images),
        "points": len(points),
        "points_to_make": len(missing),
        "images": sum(point.spec.num_images for point in points),
        "images_to_make": sum(point.spec.num_images for point in missing),
        "cells_to_race": len(cells),
        "images_of_races": sum(typical_images(cell) for cell in cells),
        "sampling_gflop": cost.gflop_per_forward * evaluations,
        "disk_bytes": of_points + of_training,
    }


def _gflop_to_train(pipeline: Pipeline, run: TrainingRun, cost: ModelCost, training_images: int) -> float:
    """What the last `images` of a run take."""
    last, told = max(run.checkpoints), pipeline.experiments[run.task].training_gflop
    up_to, before = told(run, last), told(run, last - training_images)
    return 3 * cost.gflop_per_forward * training_images if up_to is None or before is None else up_to - before
