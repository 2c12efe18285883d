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

from isocost.cli.app import answer_json, app
from isocost.cli.estimate import answer_forecast, answer_plan
from isocost.config.model import PretrainedCodecSpec
from isocost.config.study import StudySpec
from isocost.config.study_yaml import load_study
from isocost.config.types import TaskName
from isocost.errors import RequestError
from isocost.utils.signals import stop_on_sigterm

Study = Annotated[Path, typer.Argument(help="the study, a YAML file")]
Out = Annotated[Path | None, typer.Option("--out", help="output folder; runs/NAME where absent")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="replace a value of the study: train.lr=2e-4")
]
Tasks = Annotated[list[str] | None, typer.Option("--task", help="text2image, superres, distill ... alone; may be repeated")]
LedgerAt = Annotated[
    str | None,
    typer.Option(
        "--ledger", help="database in place of OUT/ledger.sqlite: postgresql://USER@HOST/NAME; runs on one share work"
    ),
]
StopAfter = Annotated[float | None, typer.Option("--stop-after", metavar="HOURS", help="keep what is done and stop")]


@app.command()
def demo(out: Out = None, overrides: Set = None, stop_after: StopAfter = None) -> None:
    """The embedded study, pictures to report, minutes on two cores."""
    with resources.as_file(resources.files("isocost.assets") / "demo.yaml") as file:
        _run(load_with(file, overrides), out, stop_after)


@app.command()
def run(
    study: Study,
    out: Out = None,
    overrides: Set = None,
    stop_after: StopAfter = None,
    tasks: Tasks = None,
    ledger: LedgerAt = None,
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
        answer_forecast(spec, devices, utilisation, dry_run)
        return
    if dry_run:
        from isocost.pipeline.dry_run import plan
        from isocost.pipeline.pipeline import Pipeline

        answer_plan(plan(Pipeline(spec, output_folder(spec, out), ledger), known_tasks(tasks)))
        return
    _run(spec, out, stop_after, tasks, ledger, workers, ray)


@app.command()
def work(
    out: Annotated[Path, typer.Argument(help="the output folder of a run that has begun, maybe on another machine")],
    ledger: LedgerAt = None,
    stop_after: StopAfter = None,
    tasks: Tasks = None,
) -> None:
    """Join a run: claim what nobody has in hand, until all is done."""
    from isocost.pipeline.workers import work as join

    stop_on_sigterm()
    finished = join(out, ledger, _deadline(stop_after), known_tasks(tasks))
    answer_json({"out": str(out), "finished": finished})


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
    answer_json(dataclasses.asdict(found))


@app.command()
def codec(study: Study, out: Out = None, overrides: Set = None) -> None:
    """Train (or fit) a study's codec, and measure it on held-out pictures beside the linear one of the same latent shape."""
    from isocost.pipeline.pipeline import Pipeline

    spec = load_with(study, overrides)
    pipeline = Pipeline(spec, output_folder(spec, out))
    pipeline.prepare()
    told = pipeline.materials.codec_report()
    trained = not isinstance(spec.codec, PretrainedCodecSpec)
    folder = pipeline.store.folder("codec", told["digest"]) if trained else Path(spec.codec.path)  # type: ignore[union-attr]
    answer_json({"study": spec.name, "folder": str(folder), **told})


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
    from isocost.training.trainer import OutOfTime

    spec = load_with(study, overrides)
    pipeline = Pipeline(spec, output_folder(spec, out))
    if forecast:
        answer_json({"study": spec.name, "sizes": [dataclasses.asdict(one) for one in pipeline.forecast()]})
        return
    finished = True
    stop_on_sigterm()
    runs = pipeline.runs_of(known_tasks(tasks))
    try:
        for one in runs:
            pipeline.train(one, _deadline(stop_after))
    except OutOfTime as stopped:
        print(stopped, file=sys.stderr)
        finished = False
    checkpoints = {
        f"{one.title}@{mark}": str(pipeline.store.folder("checkpoint", name))
        for one in runs
        for mark, name in one.checkpoints.items()
        if pipeline.store.has("checkpoint", name)
    }
    answer_json({"study": spec.name, "finished": finished, "checkpoints": checkpoints})


@app.command()
def dreambooth(study: Study, out: Out = None, overrides: Set = None, stop_after: StopAfter = None) -> None:
    """The subject protocol of a study: what it needs of the family, a tuning for every size and subject, scores, report."""
    spec = load_with(study, overrides)
    if spec.dreambooth is None:
        raise RequestError(
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
    ledger: LedgerAt = None,
) -> None:
    """Sample and score every point of a study whose checkpoints are there."""
    from isocost.pipeline.pipeline import Pipeline

    spec = load_with(study, overrides)
    pipeline = Pipeline(spec, output_folder(spec, out), ledger)
    deadline = _deadline(stop_after)
    stop_on_sigterm()
    try:
        runs = pipeline.runs_of(known_tasks(tasks))
        pipeline.prepare()
        pipeline.check_trained(runs)
        pipeline.check_tasks(runs)
        finished = all(pipeline.sweep(one, deadline) for one in runs) and pipeline.settle(runs, deadline)
    finally:
        pipeline.close()
    answer_json({"study": spec.name, "finished": finished, "points": len(pipeline.ledger.points())})


@app.command()
def report(
    study: Annotated[Path, typer.Argument(help="the study, a YAML file; or a folder with what a report was drawn from")],
    out: Out = None,
    overrides: Set = None,
    ledger: LedgerAt = None,
) -> None:
    """Write the report of what the ledger holds; or draw one again from the table that it left, without data or checkpoints."""
    from isocost.pipeline.pipeline import Pipeline
    from isocost.report.report_data import redraw

    if study.is_dir():
        if out is not None or overrides or ledger is not None:
            raise RequestError(
                f"{study} is a folder: its pages are drawn again as they were, without --out, --set and --ledger"
            )
        _answer_report(study.name, study, redraw(study), finished=True)
        return
    spec = load_with(study, overrides)
    _report(Pipeline(spec, output_folder(spec, out), ledger), finished=True)


@app.command()
def recommend(
    context: typer.Context,
    out: Annotated[Path | None, typer.Argument(help="the output folder of a study; not needed with --ledger")] = None,
    budget_ms: Annotated[float | None, typer.Option("--budget-ms", help="milliseconds per picture, at most")] = None,
    budget_gflop: Annotated[float | None, typer.Option("--budget-gflop", help="GFLOP per picture")] = None,
    budget_nfe: Annotated[float | None, typer.Option("--budget-nfe", help="network evaluations per picture")] = None,
    budget_paper_cost: Annotated[float | None, typer.Option("--budget-paper-cost", help="normalised cost x steps")] = None,
    pictures_per_hour: Annotated[float | None, typer.Option("--pictures-per-hour", help="at least so many")] = None,
    budget_memory_gib: Annotated[
        float | None, typer.Option("--budget-memory-gib", help="device memory at the peak, beside another budget")
    ] = None,
    metric: Annotated[str, typer.Option(help="the score that leads")] = "kernel_efficientnet",
    floors: Annotated[
        list[str] | None,
        typer.Option(
            "--floor", metavar="METRIC=VALUE", help="a score that must be met, at or better than VALUE; may be repeated"
        ),
    ] = None,
    task: Annotated[
        str, typer.Option(help="text2image, repeats, superres, dreambooth, distill or superres-distill")
    ] = "text2image",
    ledger: Annotated[
        str | None, typer.Option("--ledger", help="the points of a database, or a ledger's file, in place of OUT's table")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option("--protocol", help="with --ledger, where it has points of several: the id of one")
    ] = None,
) -> None:
    """The best size, sampler, steps and guidance within every budget given; the first of them breaks ties."""
    from isocost.analysis.recommend import recommend as choose
    from isocost.analysis.timings import untimed_in_words

    budgets = {
        "budget_ms": ("ms_per_picture", budget_ms),
        "budget_gflop": ("gflop", budget_gflop),
        "budget_nfe": ("nfe", budget_nfe),
        "budget_paper_cost": ("paper_cost", budget_paper_cost),
        "pictures_per_hour": ("pictures_per_hour", pictures_per_hour),
        "budget_memory_gib": ("memory_gib", budget_memory_gib),
    }
    in_order = [budgets[name] for name in context.params if name in budgets]  # as they stand on the command line
    given = {name: value for name, value in in_order if value is not None}
    costs = [name for name in given if name != "memory_gib"]
    if not costs:
        alone = " beside --budget-memory-gib" if given else ""
        known = "--budget-ms, --budget-gflop, --budget-nfe, --budget-paper-cost or --pictures-per-hour"
        raise RequestError(f"give one budget{alone}: {known}")
    lead = costs[0]
    also = {name: value for name, value in given.items() if name != lead}
    table = _points(out, ledger, task, protocol)
    if untimed := untimed_in_words(table):
        print(f"note: milliseconds {untimed}", file=sys.stderr)
    folder = "OUT" if out is None else str(out)
    chosen = choose(table, lead, given[lead], metric, folder, also=also, floors=_floors(floors))
    for line in (chosen.reason, *(f"note: {note}" for note in chosen.notes), chosen.command):
        print(line, file=sys.stderr)
    answer_json(dataclasses.asdict(chosen))


def _points(out: Path | None, ledger: str | None, task: str, protocol: str | None) -> Any:
    """The table of a task: of an output folder as its last report left it, or what a ledger holds now."""
    from isocost.analysis.results_table import of_task, read_table
    from isocost.sweep.results_db import Ledger

    if ledger is None:
        if protocol is not None:
            raise RequestError("--protocol picks points of a ledger: give --ledger too, or leave it out")
        if out is None:
            raise RequestError("give the output folder of a study, or --ledger")
        return read_table(out, task)
    file = Path(ledger.removeprefix("sqlite:///"))
    if ("://" not in ledger or ledger.startswith("sqlite:///")) and not file.is_file():
        raise RequestError(f"--ledger {ledger}: no such file; an output folder has ledger.sqlite, a database a URL")
    return of_task(Ledger(ledger).table(), task, protocol)


def _floors(items: list[str] | None) -> dict[str, float]:
    floors: dict[str, float] = {}
    for item in items or []:
        metric, equals, value = item.partition("=")
        if not equals or not metric:
            raise RequestError(f"--floor {item}: give METRIC=VALUE, such as alignment=0.9")
        if metric in floors:
            raise RequestError(f"--floor {item}: {metric} has a floor of {floors[metric]:g} already; give one of them")
        try:
            floors[metric] = float(value)
        except ValueError as error:
            raise RequestError(f"--floor {item}: {value!r} is not a number") from error
    return floors


def load_with(study: Path, overrides: list[str] | None) -> StudySpec:
    values: dict[str, Any] = {}
    for item in overrides or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise RequestError(f"--set {item}: give KEY=VALUE, such as train.num_images=5000")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RequestError(f"--set {item}: the value is not YAML") from error
    return load_study(study, values)


def output_folder(study: StudySpec, out: Path | None) -> Path:
    return out if out is not None else Path("runs") / study.name


def _deadline(stop_after: float | None) -> float | None:
    if stop_after is None:
        return None
    if stop_after <= 0:
        raise RequestError(f"--stop-after {stop_after:g}: give hours, more than 0")
    return time.monotonic() + 3600 * stop_after


def known_tasks(tasks: list[str] | None) -> tuple[TaskName, ...] | None:
    names: tuple[TaskName, ...] = get_args(TaskName)
    for task in tasks or ():
        if task not in names:
            raise RequestError(f"--task {task}: give one of {', '.join(names)}")
    return tuple(name for name in names if name in tasks) if tasks else None


def _run(
    study: StudySpec,
    out: Path | None,
    stop_after: float | None,
    tasks: list[str] | None = None,
    ledger: str | None = None,
    workers: int | None = None,
    ray: str | None = None,
) -> None:
    from isocost.pipeline.pipeline import Pipeline
    from isocost.pipeline.workers import Helpers, run_on_ray

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RequestError("several processes train together: `isocost train` under torchrun, then `isocost run` without it")
    stop_on_sigterm()
    pipeline = Pipeline(study, output_folder(study, out), ledger)
    only = known_tasks(tasks)
    if ray is not None:
        pipeline.prepare()
        finished = run_on_ray(ray, pipeline.out, ledger, workers, stop_after, tasks)
    elif workers is not None and workers > 1:
        helpers = Helpers(workers)
        pipeline.prepare()
        helpers.start(pipeline.out, ledger, stop_after, tasks)
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
    answer_json({"study": pipeline.study.name, "out": str(pipeline.out), "finished": False})


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
    answer_json(
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
