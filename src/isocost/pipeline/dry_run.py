"""The work that a run would do, by size: images and GFLOP to train, points to sample, disk."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from isocost.config.types import TaskName
from isocost.estimate.estimator import point_bytes
from isocost.estimate.memory_forecast import forecast_sweep
from isocost.experiments.base import TrainingRun
from isocost.models.flops import ModelCost
from isocost.pipeline.pipeline import Pipeline
from isocost.pipeline.sweep_runner import planned_points, unsearched_cells
from isocost.sweep.guidance_search_runner import expected_race_images
from isocost.training.state_checkpoint import newest_state_images
from isocost.training.throughput_estimate import disk_bytes
from isocost.utils.device import best_device

_SUMMED = ("points", "points_to_make", "images", "images_to_make", "images_of_races", "disk_bytes")


def plan(pipeline: Pipeline, tasks: Collection[TaskName] | None = None) -> dict[str, Any]:
    """The work of `pipeline.run`, by size, for some tasks or all. It reads the images and writes nothing.

    A cell without a finished guidance search counts as one point, and as the images of a typical race.

    Raises:
        ConfigError: the study has no part for a task.
    """
    recorded, races = pipeline.recorded_points(), pipeline.races()
    sizes = [_plan_run(pipeline, run, recorded, races) for run in pipeline.runs_of(tasks)]
    total = {key: sum(size[key] for size in sizes) for key in _SUMMED}
    total["disk_bytes"] += 0 if pipeline.study.checkpoints else pipeline.assets.cache_bytes()
    header = {"study": pipeline.study.name, "out": str(pipeline.out), "protocol": pipeline.assets.protocol.id}
    return {**header, "sizes": sizes, "total": total, **_memory(pipeline, tasks)}


def _memory(pipeline: Pipeline, tasks: Collection[TaskName] | None) -> dict[str, Any]:
    """Forecasts of the device memory of published checkpoints, with a warning for each that does not fit."""
    study, device = pipeline.study, best_device()
    if not study.checkpoints:
        return {}
    forecasts = []
    for run in pipeline.runs_of(tasks):
        info = pipeline.experiments[run.task].pretrained(run)
        assert info is not None, "every run of a study of checkpoints has one"
        forecast = forecast_sweep(info, study.sweep, study.protocol.num_images, device)
        forecasts.append({**forecast.plain(), "text": str(forecast), "warning": forecast.warning(device)})
    return {"memory": forecasts}


def _plan_run(pipeline: Pipeline, run: TrainingRun, recorded: set[str], races: dict[str, dict[str, Any]]) -> dict[str, Any]:
    cost, experiment = pipeline.cost(run), pipeline.experiments[run.task]
    jobs = experiment.jobs(run)
    cells = unsearched_cells(jobs, races)
    points = [*planned_points(jobs, races), *(cell.point(cell.guidance[-1]) for cell in cells)]
    missing = [point for point in points if point.digest not in recorded]
    training_images = 0
    if not run.is_pretrained and (snapshots := pipeline.missing_snapshots(run)):
        training_images = max(0, max(snapshots) - newest_state_images(pipeline.store.folder("run", run.digest)))
    sampling_gflop = sum(pipeline.denoiser_gflop(run, point) * point.spec.num_images for point in missing) + sum(
        pipeline.denoiser_gflop(run, cell.point(cell.guidance[-1])) * expected_race_images(cell) for cell in cells
    )
    protocol, resolution = experiment.protocol_spec, pipeline.study.data.resolution
    points_bytes = sum(point_bytes(protocol, point.spec.num_images, resolution) for point in points)
    training_bytes = 0 if run.is_pretrained else disk_bytes(run.spec, cost.num_parameters, len(run.checkpoints))
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
        "images_of_races": sum(expected_race_images(cell) for cell in cells),
        "sampling_gflop": sampling_gflop,
        "disk_bytes": points_bytes + training_bytes,
    }


def _gflop_to_train(pipeline: Pipeline, run: TrainingRun, cost: ModelCost, training_images: int) -> float:
    """GFLOP of the last `training_images` images of a training."""
    last, training_gflop = max(run.checkpoints), pipeline.experiments[run.task].training_gflop
    total, done = training_gflop(run, last), training_gflop(run, last - training_images)
    return 3 * cost.gflop_per_forward * training_images if total is None or done is None else total - done
