"""Commands on a study: `demo`, `run`, the single stages of a run, and queries of its output folder."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from isocost.cli.app import app, print_json
from isocost.cli.estimate import print_estimate, print_plan
from isocost.cli.options import (
    Database,
    Figures,
    OutputDir,
    Overrides,
    Pdf,
    Positive,
    StopAfter,
    StudyFile,
    Tasks,
    Utilisation,
    in_range,
    output_dir_of,
    parse_deadline,
    parse_tasks,
    read_study,
)
from isocost.config.model import PretrainedAutoencoderSpec
from isocost.config.study import StudySpec
from isocost.errors import ConfigError
from isocost.utils.signals import stop_on_sigterm


@app.command()
def demo(out: OutputDir = None, overrides: Overrides = None, stop_after: StopAfter = None) -> None:
    """Run the built-in study, from images to report. It takes minutes on two cores."""
    with resources.as_file(resources.files("isocost.assets") / "demo.yaml") as file:
        _run(read_study(file, overrides), out, stop_after)


@dataclasses.dataclass(frozen=True)
class Contests:
    """Budgets to decide with fresh images, their cost, and the largest number of batches; None for the defaults."""

    budgets: tuple[float, ...] = ()
    cost: str | None = None
    max_batches: int | None = None


@app.command()
def run(
    study_file: StudyFile,
    out: OutputDir = None,
    overrides: Overrides = None,
    stop_after: StopAfter = None,
    tasks: Tasks = None,
    results_db: Database = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="number of processes, one per device; with --ray, number of actors")
    ] = None,
    ray: Annotated[str | None, typer.Option("--ray", metavar="ADDRESS", help="run on a Ray cluster: auto or HOST:PORT")] = None,
    figures: Figures = True,
    pdf: Pdf = False,
    until_decided: Annotated[
        list[float] | None,
        typer.Option(
            "--until-decided",
            metavar="BUDGET",
            callback=in_range("--until-decided", Positive),
            help=(
                "after the run: for an undecided BUDGET, sample new images of the best configuration and of the "
                "best one of another size until the paired difference is decided; may be repeated"
            ),
        ),
    ] = None,
    decided_cost: Annotated[
        str | None,
        typer.Option(
            "--decided-cost",
            help=(
                "with --until-decided: cost of BUDGET, such as gflop, nfe or ms_per_image; default: "
                "normalized_cost, or gflop for published checkpoints"
            ),
        ),
    ] = None,
    max_batches: Annotated[
        int | None,
        typer.Option(
            "--max-batches",
            min=1,
            max=16,
            help=(
                "with --until-decided: largest number of batches of protocol.num_images images of each "
                "configuration; default: 16"
            ),
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the remaining work and exit")] = False,
    devices: Annotated[
        str | None,
        typer.Option(
            "--devices", metavar="NxNAME", help="with --dry-run: estimate the hours on devices such as 64xH200; reads no data"
        ),
    ] = None,
    utilisation: Annotated[
        float | None,
        typer.Option(
            "--utilisation",
            callback=in_range("--utilisation", Utilisation),
            help="with --devices: assumed fraction of peak performance; default: 0.4",
        ),
    ] = None,
) -> None:
    """Run a study: train, sweep, score, report. The same command resumes a stopped run, and parallel runs share the work."""
    study = read_study(study_file, overrides)
    if not until_decided and (decided_cost is not None or max_batches is not None):
        raise ConfigError("--decided-cost and --max-batches need --until-decided BUDGET: give it too, or leave them out")
    if until_decided and (dry_run or devices is not None):
        raise ConfigError("--until-decided samples images: leave it out with --dry-run and --devices")
    if devices is not None or utilisation is not None:
        print_estimate(study, devices, utilisation, dry_run)
        return
    if dry_run:
        from isocost.pipeline.dry_run import plan
        from isocost.pipeline.pipeline import Pipeline

        print_plan(plan(Pipeline(study, output_dir_of(study, out), results_db), parse_tasks(tasks)))
        return
    contests = Contests(tuple(until_decided or ()), decided_cost, max_batches)
    _run(study, out, stop_after, tasks, results_db, workers, ray, _figure_formats(figures, pdf), contests)


@app.command()
def worker(
    out: Annotated[Path, typer.Argument(help="output folder of a run that has started, on this or another machine")],
    results_db: Database = None,
    stop_after: StopAfter = None,
    tasks: Tasks = None,
) -> None:
    """Start a worker that joins a run and shares its work until the run is finished."""
    from isocost.pipeline.workers import work

    stop_on_sigterm()
    finished = work(out, results_db, parse_deadline(stop_after), parse_tasks(tasks))
    print_json({"out": str(out), "finished": finished})


@app.command()
def status(
    out: Annotated[Path, typer.Argument(help="output folder of a run")],
    follow: Annotated[bool, typer.Option("--follow", help="refresh until the run has ended")] = False,
) -> None:
    """Show the progress of a run: images, points, best so far, time spent and left."""
    from isocost.cli.status import status_table, watch
    from isocost.pipeline.status import read_status
    from isocost.utils.progress import console

    run_status = watch(out) if follow else read_status(out)
    if not follow:
        console.print(status_table(run_status))
    print_json(dataclasses.asdict(run_status))


@app.command()
def autoencoder(study_file: StudyFile, out: OutputDir = None, overrides: Overrides = None) -> None:
    """Train the autoencoder of a study and measure it on held-out images.

    A PCA autoencoder of the same latent shape is measured for comparison.
    """
    from isocost.pipeline.pipeline import Pipeline

    study = read_study(study_file, overrides)
    pipeline = Pipeline(study, output_dir_of(study, out))
    pipeline.prepare()
    quality = pipeline.assets.autoencoder_report()
    folder = pipeline.store.folder("autoencoder", quality["digest"])
    if isinstance(study.autoencoder, PretrainedAutoencoderSpec):
        folder = Path(study.autoencoder.path)
    print_json({"study": study.name, "folder": str(folder), **quality})


@app.command()
def train(
    study_file: StudyFile,
    out: OutputDir = None,
    overrides: Overrides = None,
    stop_after: StopAfter = None,
    tasks: Tasks = None,
    estimate: Annotated[
        bool,
        typer.Option("--estimate", help="estimate hours, memory and disk of each size from a few measured steps and exit"),
    ] = False,
) -> None:
    """Train the models of a study. Under torchrun or `accelerate launch` several processes train together."""
    from isocost.pipeline.pipeline import Pipeline
    from isocost.training.trainer import DeadlineReached

    study = read_study(study_file, overrides)
    pipeline = Pipeline(study, output_dir_of(study, out))
    if estimate:
        print_json({"study": study.name, "sizes": [dataclasses.asdict(size) for size in pipeline.estimate_training()]})
        return
    finished = True
    stop_on_sigterm()
    runs = pipeline.runs_of(parse_tasks(tasks))
    try:
        for training in runs:
            pipeline.train(training, parse_deadline(stop_after))
    except DeadlineReached as stopped:
        print(stopped, file=sys.stderr)
        finished = False
    checkpoints = {
        f"{training.title}@{snapshot}": str(pipeline.store.folder("checkpoint", name))
        for training in runs
        for snapshot, name in training.checkpoints.items()
        if pipeline.store.has("checkpoint", name)
    }
    print_json({"study": study.name, "finished": finished, "checkpoints": checkpoints})


@app.command()
def dreambooth(study_file: StudyFile, out: OutputDir = None, overrides: Overrides = None, stop_after: StopAfter = None) -> None:
    """Run the DreamBooth section of a study: train the family, tune every size on every subject, score, report."""
    study = read_study(study_file, overrides)
    if study.dreambooth is None:
        raise ConfigError(
            f"{study_file}: no section `dreambooth`; add one with subjects, train and sweep, as in studies/subjects.yaml"
        )
    _run(study, out, stop_after, ["text2image", "dreambooth"])


@app.command()
def sweep(
    study_file: StudyFile,
    out: OutputDir = None,
    overrides: Overrides = None,
    stop_after: StopAfter = None,
    tasks: Tasks = None,
    results_db: Database = None,
) -> None:
    """Sample and score every point of a trained study."""
    from isocost.pipeline.pipeline import Pipeline

    study = read_study(study_file, overrides)
    pipeline = Pipeline(study, output_dir_of(study, out), results_db)
    deadline = parse_deadline(stop_after)
    stop_on_sigterm()
    try:
        runs = pipeline.runs_of(parse_tasks(tasks))
        pipeline.prepare()
        pipeline.check_trained(runs)
        pipeline.check_tasks(runs)
        finished = all(pipeline.sweep(training, deadline) for training in runs) and pipeline.score_search_winners(
            runs, deadline
        )
    finally:
        pipeline.close()
    print_json({"study": study.name, "finished": finished, "points": len(pipeline.results_db.points())})


@app.command()
def report(
    source: Annotated[
        Path, typer.Argument(metavar="STUDY", help="YAML file of a study, or an output folder or archive with a report")
    ],
    out: OutputDir = None,
    overrides: Overrides = None,
    results_db: Database = None,
    figures: Figures = True,
    pdf: Pdf = False,
) -> None:
    """Write the report of the results database. For a folder, rebuild its last report without data or checkpoints."""
    from isocost.pipeline.pipeline import Pipeline
    from isocost.report.report_data import rebuild

    if source.is_dir():
        if out is not None or overrides or results_db is not None:
            raise ConfigError(
                f"{source} is a folder: its report is rebuilt unchanged, so leave out --out, --set and --database"
            )
        _print_report(source.name, source, rebuild(source, _figure_formats(figures, pdf)), finished=True)
        return
    study = read_study(source, overrides)
    _report(Pipeline(study, output_dir_of(study, out), results_db), finished=True, figure_formats=_figure_formats(figures, pdf))


def _run(
    study: StudySpec,
    out: Path | None,
    stop_after: float | None,
    tasks: list[str] | None = None,
    results_db: str | None = None,
    workers: int | None = None,
    ray: str | None = None,
    figure_formats: Sequence[str] = ("png",),
    contests: Contests = Contests(),
) -> None:
    from isocost.pipeline.pipeline import Pipeline
    from isocost.pipeline.workers import LocalWorkers, run_on_ray

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "`isocost run` does not run under torchrun: run `isocost train` under torchrun, then `isocost run` without it"
        )
    if contests.budgets:
        _decided_cost(study, contests)
    stop_on_sigterm()
    deadline = parse_deadline(stop_after)
    pipeline = Pipeline(study, output_dir_of(study, out), results_db)
    only_tasks = parse_tasks(tasks)
    if ray is not None:
        pipeline.prepare()
        finished = run_on_ray(ray, pipeline.out, results_db, workers, stop_after, tasks)
    elif workers is not None and workers > 1:
        local_workers = LocalWorkers(workers)
        pipeline.prepare()
        local_workers.start(pipeline.out, results_db, stop_after, tasks)
        try:
            finished = pipeline.run(deadline, only_tasks)
            if finished:
                local_workers.wait()
        finally:
            local_workers.stop()
    else:
        finished = pipeline.run(deadline, only_tasks)
    undecided: ConfigError | None = None
    if finished and contests.budgets:
        try:
            finished = _decide(pipeline, contests, deadline)
        except ConfigError as error:  # the work of the run gets its report first
            undecided = error
    if finished:
        _report(pipeline, finished, figure_formats)
        if undecided is not None:
            raise undecided
    else:
        print_json({"study": pipeline.study.name, "out": str(pipeline.out), "finished": False})


def _decide(pipeline: Any, contests: Contests, deadline: float | None) -> bool:
    """Compare sizes with fresh images; False if the deadline came first."""
    from isocost.pipeline.until_decided import MAX_BATCHES, decide_budgets
    from isocost.training.trainer import DeadlineReached

    finished = False
    try:
        cost = _decided_cost(pipeline.study, contests)
        for text in decide_budgets(pipeline, contests.budgets, cost, contests.max_batches or MAX_BATCHES, deadline):
            print(text, file=sys.stderr)
        finished = True
    except DeadlineReached as stopped:
        print(stopped, file=sys.stderr)
    finally:
        pipeline.close()
        pipeline.write_last_status(finished)
    return finished


def _decided_cost(study: StudySpec, contests: Contests) -> str:
    """The cost of the budgets to decide, after a check that the study can decide them.

    Raises:
        ConfigError: the cost is unknown, or the metric of the report has no resamples.
    """
    from isocost.analysis.costs import cost_of
    from isocost.evaluation.bootstrap import check_resampled

    check_resampled(study.report.metric)
    return cost_of(contests.cost or ("gflop" if study.checkpoints else "normalized_cost")).name


def _figure_formats(figures: bool, pdf: bool) -> tuple[str, ...]:
    """The formats that `--no-figures` and `--pdf` ask for.

    Raises:
        ConfigError: both are given.
    """
    if pdf and not figures:
        raise ConfigError("--pdf with --no-figures: leave one out")
    return ("png", "pdf") if pdf else ("png",) if figures else ()


def _report(pipeline: Any, finished: bool, figure_formats: Sequence[str] = ("png",)) -> None:
    from isocost.report.build import report as write_report

    _print_report(pipeline.study.name, pipeline.out, write_report(pipeline, figure_formats), finished)


def _print_report(name: str, out: Path, report: Any, finished: bool) -> None:
    """Print the answers of a report on stderr, and its paths and best configurations as JSON."""
    from isocost.analysis.recommend import describe_choice

    for choice in report.choices:
        print(describe_choice(choice, report.scope.noun), file=sys.stderr)
    best = [
        {
            "budget": choice.budget,
            "cost": choice.cost,
            "metric": choice.metric,
            "best": None if choice.best is None else dataclasses.asdict(choice.best),
            "undecided": choice.undecided,
        }
        for choice in report.choices
    ]
    print_json(
        {
            "study": name,
            "out": str(out),
            "finished": finished,
            "report": str(report.page),
            "num_points": len(report.table),
            "best_at_budgets": best,
            "task_reports": {
                task: {"report": str(task_report.page), "num_points": len(task_report.table)}
                for task, task_report in report.task_reports.items()
            },
        }
    )
