"""Spend images where a budget is undecided: fresh batches of the two configurations that its answer names.

A batch is a point of its own, with the number of images of the study and another seed, so it is stored, resumed and shared by
workers as every point is. The report does not show these points; it shows the decision.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from isocost.analysis.costs import cost_of
from isocost.analysis.formatting import format_metric, format_number, format_row
from isocost.analysis.pareto import BudgetChoice, best_at_budgets, default_budgets
from isocost.analysis.results_table import with_metric
from isocost.analysis.until_decided import LEVEL, MAX_BATCHES, SequentialDecision, decide_with_batches
from isocost.config.types import TaskName
from isocost.errors import ConfigError
from isocost.evaluation.bootstrap import check_resampled
from isocost.evaluation.metric_registry import metric_of
from isocost.experiments.base import EvalJob, TrainingRun
from isocost.metrics.arrays import Array
from isocost.pipeline.pipeline import Pipeline
from isocost.pipeline.study_table import study_table
from isocost.pipeline.sweep_runner import planned_points
from isocost.sweep.grid import SweepPoint, make_point
from isocost.training.trainer import DeadlineReached

logger = logging.getLogger(__name__)

FIRST_SEED = 10_000
"""Seed of the first fresh batch; the next ones follow. A sweep and its races use small seeds."""
TASK: TaskName = "text2image"


def decide_budgets(
    pipeline: Pipeline, budgets: Sequence[float], cost: str, max_batches: int = MAX_BATCHES, deadline: float | None = None
) -> list[str]:
    """Compare the two best sizes within each budget with fresh images until one is better, and record the results.

    Args:
        pipeline: a study whose points are scored.
        budgets: in the unit of the cost.
        cost: a name of `isocost.analysis.costs.COSTS`.
        max_batches: largest number of batches of each configuration. The level of 5 % is divided by the number of budgets.
        deadline: `time.monotonic()` after which the work stops.

    Returns:
        One sentence per budget.

    Raises:
        ConfigError: nothing fits a budget, only one size fits, a checkpoint is missing, or the metric has no resamples.
        DeadlineReached: the deadline came; the finished batches are kept.
    """
    experiment = pipeline.experiments[TASK]
    check_resampled(experiment.metric)
    taken = {experiment.sweep.seed, experiment.sweep.race.seed} & set(range(FIRST_SEED, FIRST_SEED + max_batches))
    if taken:
        raise ConfigError(
            f"--until-decided: seed {min(taken)} of the sweep is one of the fresh batches; give a seed below {FIRST_SEED}"
        )
    table = with_metric(study_table(pipeline, experiment), experiment.metric)
    finals = table.loc[table["is_final"].astype(bool), "point"]
    resamples = pipeline.results_db.resamples_of_metric(experiment.metric, finals)
    of_report = list(pipeline.study.report.budgets) or default_budgets(table, cost)
    together = best_at_budgets(table, cost, experiment.metric, [*budgets, *of_report], resamples=resamples)
    choices = together[: len(budgets)]
    for choice in choices:
        _check_contested(choice)
    level = LEVEL / len(budgets)
    return [_decide(pipeline, table, choice, max_batches, level, deadline) for choice in choices]


def _check_contested(choice: BudgetChoice) -> None:
    amount = cost_of(choice.cost).format_amount(choice.budget)
    if choice.best is None:
        cheapest = cost_of(choice.cost).format_amount(choice.cheapest.cost)
        raise ConfigError(f"--until-decided: a budget of {amount} is below every point; the cheapest costs {cheapest}")
    if choice.runner_up is None:
        raise ConfigError(f"--until-decided: only one size fits within {amount}, so there is nothing to decide")


def _decide(
    pipeline: Pipeline,
    table: pd.DataFrame,
    choice: BudgetChoice,
    max_batches: int,
    level: float,
    deadline: float | None,
) -> str:
    assert choice.best is not None
    assert choice.runner_up is not None
    experiment = pipeline.experiments[TASK]
    rows = {row["point"]: row for row in table.to_dict("records")}
    names = [format_row(rows[configuration.point]) for configuration in (choice.best, choice.runner_up)]
    amount = cost_of(choice.cost).format_amount(choice.budget)
    if not choice.undecided:
        return (
            f"within {amount}: {names[0]} is better than {names[1]}; the images of the study decide this, no new ones were made"
        )
    contestants = [_planned(pipeline, configuration.point) for configuration in (choice.best, choice.runner_up)]

    def draw(number: int) -> tuple[Array, Array]:
        first, second = (_batch(pipeline, *contestant, number, amount, deadline) for contestant in contestants)
        return first, second

    lower_is_better = metric_of(experiment.metric).better == "lower"
    decision = decide_with_batches(draw, lower_is_better, max_batches, level)
    text = f"within {amount}: {_describe(decision, names, experiment.metric, contestants[0][2].spec.num_images)}"
    points = (choice.best.point, choice.runner_up.point)
    pipeline.results_db.set_decision(choice.cost, choice.budget, experiment.metric, points, text)
    logger.info(text)
    return text


def _planned(pipeline: Pipeline, digest: str) -> tuple[TrainingRun, EvalJob, SweepPoint]:
    """The run, the job and the plan of a point of the table."""
    experiment, races = pipeline.experiments[TASK], pipeline.races()
    for run in experiment.runs:
        for job in experiment.jobs(run):
            for point in planned_points([job], races):
                if point.digest == digest:
                    return run, job, point
    raise AssertionError(f"point {digest} is in the table of the study, but not in its plan")


def _batch(
    pipeline: Pipeline,
    run: TrainingRun,
    job: EvalJob,
    point: SweepPoint,
    number: int,
    amount: str,
    deadline: float | None,
) -> Array:
    """The score of a fresh batch of a point in every bootstrap resample, [1 + R]; it is generated unless it is recorded."""
    experiment = pipeline.experiments[TASK]
    protocol = job.eval_context().reference.protocol
    fresh = make_point(point.spec.model_copy(update={"seed": FIRST_SEED + number}), protocol)
    resamples = pipeline.results_db.resamples(fresh.digest)
    if resamples is None or experiment.metric not in resamples.by_metric:
        _check_checkpoint(pipeline, point)
        title = f"decide {amount}, batch {number + 1}"
        if not pipeline.score_fresh(run, replace(job, points=(fresh,), cells=()), title, deadline):
            raise DeadlineReached(f"stopped while deciding {amount}; the same command continues")
        resamples = pipeline.results_db.resamples(fresh.digest)
    assert resamples is not None, "a scored point has resamples of a resampled metric"
    return np.asarray(resamples.by_metric[experiment.metric])


def _check_checkpoint(pipeline: Pipeline, point: SweepPoint) -> None:
    guide = point.spec.guide
    for name in (point.spec.checkpoint, *(() if guide is None else (guide.checkpoint,))):
        if not pipeline.store.has("checkpoint", name):
            raise ConfigError(
                f"--until-decided: no checkpoint {name} in {pipeline.out}; "
                f"`isocost merge {pipeline.out} OTHER --artefacts` copies it from an output folder that has it"
            )


def _describe(decision: SequentialDecision, names: Sequence[str], metric: str, num_images: int) -> str:
    low, value, high = (
        format_number(end) for end in (decision.difference.low, decision.difference.value, decision.difference.high)
    )
    images = f"{decision.num_batches * num_images:,} fresh images of each"
    difference = f"{format_metric(metric)} of {names[0]} minus {names[1]} is {value} [{low}, {high}], paired"
    if decision.outcome == "open":
        return f"undecided between {names[0]} and {names[1]} after {images}: {difference}"
    better, worse = names if decision.outcome == "first" else reversed(names)
    return f"{better} is better than {worse}: {difference}, on {images}"
