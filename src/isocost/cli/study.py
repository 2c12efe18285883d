"""Commands on a study: `demo`, `run`, its single stages, and what its output folder says."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
import yaml

from isocost.cli.app import app, print_json
from isocost.cli.estimate import print_estimate, print_plan
from isocost.config.model import PretrainedAutoencoderSpec
from isocost.config.study import StudySpec
from isocost.config.study_yaml import load_study
from isocost.config.types import TaskName
from isocost.errors import ConfigError
from isocost.utils.signals import stop_on_sigterm

Study = Annotated[Path, typer.Argument(help="the study, a YAML file")]
Out = Annotated[Path | None, typer.Option("--out", help="output folder; runs/NAME where absent")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="replace a value of the study: train.lr=2e-4")
]
Tasks = Annotated[list[str] | None, typer.Option("--task", help="text2image, superres, distill ... alone; may be repeated")]
DatabaseOption = Annotated[
    str | None,
    typer.Option(
        "--database", help="database in place of OUT/results.sqlite: postgresql://USER@HOST/NAME; runs on one share work"
    ),
]
StopAfter = Annotated[float | None, typer.Option("--stop-after", metavar="HOURS", help="keep what is done and stop")]


@app.command()
def demo(out: Out = None, overrides: Set = None, stop_after: StopAfter = None) -> None:
    """The embedded study, images to report, minutes on two cores."""
    with resources.as_file(resources.files("isocost.assets") / "demo.yaml") as file:
        _run(load_with(file, overrides), out, stop_after)


@app.command()
def run(
    study: Study,
    out: Out = None,
    overrides: Set = None,
    stop_after: StopAfter = None,
    tasks: Tasks = None,
    results_db: DatabaseOption = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="processes, one a device; or actors with --ray")
    ] = None,
    ray: Annotated[str | None, typer.Option("--ray", metavar="ADDRESS", help="a Ray cluster: 'auto' or HOST:PORT")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be trained and sampled, and stop")] = False,
    devices: Annotated[
        str | None, typer.Option("--devices", metavar="NxNAME", help="with --dry-run: hours on 64xH200, say; reads no data")
    ] = None,
    utilisation: Annotated[
        float | None, typer.Option("--utilisation", help="with --devices: share of their peak that is reached; 0.4")
    ] = None,
) -> None:
    """Train, sweep, score and report a study. The same command goes on where an earlier one stopped, and two of them share the
    work."""
    spec = load_with(study, overrides)
    if devices is not None or utilisation is not None:
        print_estimate(spec, devices, utilisation, dry_run)
        return
    if dry_run:
        from isocost.pipeline.dry_run import plan
        from isocost.pipeline.pipeline import Pipeline

        print_plan(plan(Pipeline(spec, output_folder(spec, out), results_db), known_tasks(tasks)))
        return
    _run(spec, out, stop_after, tasks, results_db, workers, ray)


@app.command()
def worker(
    out: Annotated[Path, typer.Argument(help="the output folder of a run that has begun, maybe on another machine")],
    results_db: DatabaseOption = None,
    stop_after: StopAfter = None,
    tasks: Tasks = None,
) -> None:
    """Join a run: claim what nobody has in hand, until all is done."""
    from isocost.pipeline.workers import work as join

    stop_on_sigterm()
    finished = join(out, results_db, _deadline(stop_after), known_tasks(tasks))
    print_json({"out": str(out), "finished": finished})


@app.command()
def status(
    out: Annotated[Path, typer.Argument(help="the output folder of a run")],
    follow: Annotated[bool, typer.Option("--follow", help="draw it again and again until the run has ended")] = False,
) -> None:
    """How a run stands: images, points, best so far, hours spent and left."""
    from isocost.cli.status import drawn
    from isocost.cli.status import follow as draw
    from isocost.pipeline.status import read_status
    from isocost.utils.progress import console

    found = draw(out) if follow else read_status(out)
    if not follow:
        console.print(drawn(found))
    print_json(dataclasses.asdict(found))


@app.command()
def autoencoder(study: Study, out: Out = None, overrides: Set = None) -> None:
    """Train (or fit) a study's autoencoder, and measure it on held-out images beside the linear one of the same latent shape."""
    from isocost.pipeline.pipeline import Pipeline

    spec = load_with(study, overrides)
    pipeline = Pipeline(spec, output_folder(spec, out))
    pipeline.prepare()
    told = pipeline.assets.autoencoder_report()
    trained = not isinstance(spec.autoencoder, PretrainedAutoencoderSpec)
    folder = pipeline.store.folder("autoencoder", told["digest"]) if trained else Path(spec.autoencoder.path)  # type: ignore[union-attr]
    print_json({"study": spec.name, "folder": str(folder), **told})


@app.command()
def train(
    study: Study,
    out: Out = None,
    overrides: Set = None,
    stop_after: StopAfter = None,
    tasks: Tasks = None,
    forecast: Annotated[bool, typer.Option("--forecast", help="say hours, memory and disk of each size, and stop")] = False,
) -> None:
    """Train the family of a study; under torchrun or `accelerate launch` by several processes."""
    from isocost.pipeline.pipeline import Pipeline
    from isocost.training.trainer import DeadlineReached

    spec = load_with(study, overrides)
    pipeline = Pipeline(spec, output_folder(spec, out))
    if forecast:
        print_json({"study": spec.name, "sizes": [dataclasses.asdict(one) for one in pipeline.forecast()]})
        return
    finished = True
    stop_on_sigterm()
    runs = pipeline.runs_of(known_tasks(tasks))
    try:
        for one in runs:
            pipeline.train(one, _deadline(stop_after))
    except DeadlineReached as stopped:
        print(stopped, file=sys.stderr)
        finished = False
    checkpoints = {
        f"{one.title}@{snapshot}": str(pipeline.store.folder("checkpoint", name))
        for one in runs
        for snapshot, name in one.checkpoints.items()
        if pipeline.store.has("checkpoint", name)
    }
    print_json({"study": spec.name, "finished": finished, "checkpoints": checkpoints})


@app.command()
def dreambooth(study: Study, out: Out = None, overrides: Set = None, stop_after: StopAfter = None) -> None:
    """The subject protocol of a study: what it needs of the family, a tuning for every size and subject, scores, report."""
    spec = load_with(study, overrides)
    if spec.dreambooth is None:
        raise ConfigError(
            f"{study}: no part `dreambooth`; it says subjects, training and sweep (studies/subjects.yaml has one)"
        )
    _run(spec, out, stop_after, ["text2image", "dreambooth"])


@app.command()
def sweep(
    study: Study,
    out: Out = None,
    overrides: Set = None,
    stop_after: StopAfter = None,
    tasks: Tasks = None,
    results_db: DatabaseOption = None,
) -> None:
    """Sample and score every point of a study whose checkpoints are there."""
    from isocost.pipeline.pipeline import Pipeline

    spec = load_with(study, overrides)
    pipeline = Pipeline(spec, output_folder(spec, out), results_db)
    deadline = _deadline(stop_after)
    stop_on_sigterm()
    try:
        runs = pipeline.runs_of(known_tasks(tasks))
        pipeline.prepare()
        pipeline.check_trained(runs)
        pipeline.check_tasks(runs)
        finished = all(pipeline.sweep(one, deadline) for one in runs) and pipeline.score_search_winners(runs, deadline)
    finally:
        pipeline.close()
    print_json({"study": spec.name, "finished": finished, "points": len(pipeline.results_db.points())})


@app.command()
def report(
    study: Annotated[Path, typer.Argument(help="the study, a YAML file; or a folder with what a report was drawn from")],
    out: Out = None,
    overrides: Set = None,
    results_db: DatabaseOption = None,
) -> None:
    """Write the report of what the results database holds; or draw one again from the table that it left, without data or checkpoints."""
    from isocost.pipeline.pipeline import Pipeline
    from isocost.report.report_data import redraw

    if study.is_dir():
        if out is not None or overrides or results_db is not None:
            raise ConfigError(
                f"{study} is a folder: its pages are drawn again as they were, without --out, --set and --database"
            )
        _answer_report(study.name, study, redraw(study), finished=True)
        return
    spec = load_with(study, overrides)
    _report(Pipeline(spec, output_folder(spec, out), results_db), finished=True)


@app.command()
def recommend(
    context: typer.Context,
    out: Annotated[Path | None, typer.Argument(help="the output folder of a study; not needed with --database")] = None,
    budget_ms: Annotated[float | None, typer.Option("--budget-ms", help="milliseconds per image, at most")] = None,
    budget_gflop: Annotated[float | None, typer.Option("--budget-gflop", help="GFLOP per image")] = None,
    budget_nfe: Annotated[float | None, typer.Option("--budget-nfe", help="network evaluations per image")] = None,
    budget_normalized_cost: Annotated[
        float | None, typer.Option("--budget-normalized-cost", help="normalized cost x steps")
    ] = None,
    images_per_hour: Annotated[float | None, typer.Option("--images-per-hour", help="at least so many")] = None,
    budget_memory_gib: Annotated[
        float | None, typer.Option("--budget-memory-gib", help="device memory at the peak, beside another budget")
    ] = None,
    metric: Annotated[str, typer.Option(help="the score that leads")] = "mmd_efficientnet",
    requirements: Annotated[
        list[str] | None,
        typer.Option(
            "--require", metavar="METRIC=VALUE", help="a score that must be met, at or better than VALUE; may be repeated"
        ),
    ] = None,
    task: Annotated[
        str, typer.Option(help="text2image, seed-replicates, superres, dreambooth, distill or superres-distill")
    ] = "text2image",
    results_db: Annotated[
        str | None,
        typer.Option("--database", help="the points of a database, or a results database's file, in place of OUT's table"),
    ] = None,
    protocol: Annotated[
        str | None, typer.Option("--protocol", help="with --database, where it has points of several: the id of one")
    ] = None,
) -> None:
    """The best size, solver, steps and guidance within every budget given; the first of them breaks ties."""
    from isocost.analysis.recommend import recommend as choose
    from isocost.analysis.timings import format_untimed

    budgets = {
        "budget_ms": ("ms_per_image", budget_ms),
        "budget_gflop": ("gflop", budget_gflop),
        "budget_nfe": ("nfe", budget_nfe),
        "budget_normalized_cost": ("normalized_cost", budget_normalized_cost),
        "images_per_hour": ("images_per_hour", images_per_hour),
        "budget_memory_gib": ("memory_gib", budget_memory_gib),
    }
    in_order = [budgets[name] for name in context.params if name in budgets]  # as they stand on the command line
    given = {name: value for name, value in in_order if value is not None}
    costs = [name for name in given if name != "memory_gib"]
    if not costs:
        alone = " beside --budget-memory-gib" if given else ""
        known = "--budget-ms, --budget-gflop, --budget-nfe, --budget-normalized-cost or --images-per-hour"
        raise ConfigError(f"give one budget{alone}: {known}")
    lead = costs[0]
    also = {name: value for name, value in given.items() if name != lead}
    table = _points(out, results_db, task, protocol)
    if untimed := format_untimed(table):
        print(f"note: milliseconds {untimed}", file=sys.stderr)
    folder = "OUT" if out is None else str(out)
    chosen = choose(table, lead, given[lead], metric, folder, also=also, requirements=_requirements(requirements))
    for line in (chosen.reason, *(f"note: {note}" for note in chosen.notes), chosen.command):
        print(line, file=sys.stderr)
    print_json(dataclasses.asdict(chosen))


def _points(out: Path | None, results_db: str | None, task: str, protocol: str | None) -> Any:
    """The table of a task: of an output folder as its last report left it, or what a results database holds now."""
    from isocost.analysis.results_table import of_task, read_table
    from isocost.sweep.results_db import ResultsDB

    if results_db is None:
        if protocol is not None:
            raise ConfigError("--protocol picks points of a results database: give --database too, or leave it out")
        if out is None:
            raise ConfigError("give the output folder of a study, or --database")
        return read_table(out, task)
    file = Path(results_db.removeprefix("sqlite:///"))
    if ("://" not in results_db or results_db.startswith("sqlite:///")) and not file.is_file():
        raise ConfigError(f"--database {results_db}: no such file; an output folder has results.sqlite, a database a URL")
    return of_task(ResultsDB(results_db).table(), task, protocol)


def _requirements(items: list[str] | None) -> dict[str, float]:
    requirements: dict[str, float] = {}
    for item in items or []:
        metric, equals, value = item.partition("=")
        if not equals or not metric:
            raise ConfigError(f"--require {item}: give METRIC=VALUE, such as alignment=0.9")
        if metric in requirements:
            raise ConfigError(
                f"--require {item}: {metric} has a requirement of {requirements[metric]:g} already; give one of them"
            )
        try:
            requirements[metric] = float(value)
        except ValueError as error:
            raise ConfigError(f"--require {item}: {value!r} is not a number") from error
    return requirements


def load_with(study: Path, overrides: list[str] | None) -> StudySpec:
    values: dict[str, Any] = {}
    for item in overrides or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {item}: give KEY=VALUE, such as train.num_images=5000")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {item}: the value is not YAML") from error
    return load_study(study, values)


def output_folder(study: StudySpec, out: Path | None) -> Path:
    return out if out is not None else Path("runs") / study.name


def _deadline(stop_after: float | None) -> float | None:
    if stop_after is None:
        return None
    if stop_after <= 0:
        raise ConfigError(f"--stop-after {stop_after:g}: give hours, more than 0")
    return time.monotonic() + 3600 * stop_after


def known_tasks(tasks: list[str] | None) -> tuple[TaskName, ...] | None:
    names: tuple[TaskName, ...] = get_args(TaskName)
    for task in tasks or ():
        if task not in names:
            raise ConfigError(f"--task {task}: give one of {', '.join(names)}")
    return tuple(name for name in names if name in tasks) if tasks else None


def _run(
    study: StudySpec,
    out: Path | None,
    stop_after: float | None,
    tasks: list[str] | None = None,
    results_db: str | None = None,
    workers: int | None = None,
    ray: str | None = None,
) -> None:
    from isocost.pipeline.pipeline import Pipeline
    from isocost.pipeline.workers import LocalWorkers, run_on_ray

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("several processes train together: `isocost train` under torchrun, then `isocost run` without it")
    stop_on_sigterm()
    pipeline = Pipeline(study, output_folder(study, out), results_db)
    only = known_tasks(tasks)
    if ray is not None:
        pipeline.prepare()
        finished = run_on_ray(ray, pipeline.out, results_db, workers, stop_after, tasks)
    elif workers is not None and workers > 1:
        helpers = LocalWorkers(workers)
        pipeline.prepare()
        helpers.start(pipeline.out, results_db, stop_after, tasks)
        try:
            finished = pipeline.run(_deadline(stop_after), only)
            if finished:
                helpers.wait()
        finally:
            helpers.stop()
    else:
        finished = pipeline.run(_deadline(stop_after), only)
    if finished:
        _report(pipeline, finished)
    else:
        _answer_unfinished(pipeline)


def _answer_unfinished(pipeline: Any) -> None:
    print_json({"study": pipeline.study.name, "out": str(pipeline.out), "finished": False})


def _report(pipeline: Any, finished: bool) -> None:
    from isocost.report.build import report as write

    _answer_report(pipeline.study.name, pipeline.out, write(pipeline), finished)


def _answer_report(name: str, out: Path, written: Any, finished: bool) -> None:
    from isocost.analysis.recommend import answer

    for choice in written.choices:
        print(answer(choice), file=sys.stderr)
    best = [
        {
            "budget": choice.budget,
            "cost": choice.cost,
            "metric": choice.metric,
            "best": None if choice.best is None else dataclasses.asdict(choice.best),
            "undecided": choice.undecided,
        }
        for choice in written.choices
    ]
    print_json(
        {
            "study": name,
            "out": str(out),
            "finished": finished,
            "report": str(written.page),
            "num_points": len(written.table),
            "best_at_budgets": best,
            "tuned": {task: {"report": str(one.page), "num_points": len(one.table)} for task, one in written.others.items()},
        }
    )
