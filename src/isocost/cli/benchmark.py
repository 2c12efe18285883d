"""The commands that measure: `latency` a checkpoint, `retime` the points of a study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from isocost.cli.app import app, print_json
from isocost.cli.study import DatabaseOption, Out, Set, Study, Tasks, known_tasks, load_with, output_folder
from isocost.config.base import parse_spec
from isocost.config.sampling import SolverSpec
from isocost.errors import ConfigError
from isocost.utils.artifact_store import write_atomically

if TYPE_CHECKING:
    from isocost.sampling.latency import Latency


@app.command()
def latency(
    checkpoint: Annotated[Path, typer.Argument(help="a checkpoint folder: OUT/artefacts/checkpoint/DIGEST")],
    steps: Annotated[int | None, typer.Option(help="solver steps; 16 where absent, 4 for a few-step student")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="1 is one pass; 2 where absent, 1 for super-resolution; students take any w in one")
    ] = None,
    solver: Annotated[str | None, typer.Option(help="a name of `isocost list solvers`; default: the checkpoint's own")] = None,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", help="images at once, may be given several times; 1 and 4 where absent")
    ] = None,
    repeats: Annotated[int, typer.Option(help="measured passes of each batch size, at least 3")] = 20,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"], typer.Option(help="what the network computes in; fp16 on CUDA devices alone")
    ] = "fp32",
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="compile the network, for each batch size")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; CUDA's where there is one")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="a file for the answer as well, .json")] = None,
) -> None:
    """Measured milliseconds of one checkpoint: text encoder, denoiser, decoder and the whole, by batch size."""
    if out is not None and (out.suffix.lower() != ".json" or out.is_dir()):
        raise ConfigError(f"{out}: give a file that ends in .json")
    spec = None if solver is None else parse_spec(SolverSpec, {"name": solver}, "--solver")

    from isocost.sampling.latency import DEFAULT_BATCHES
    from isocost.sampling.latency import latency as measure

    measured = measure(
        checkpoint,
        solver=spec,
        num_steps=steps,
        guidance=guidance,
        batches=batch or DEFAULT_BATCHES,
        repeats=repeats,
        dtype=dtype,
        compiled=compiled,
        device=device,
    )
    document = measured.document()
    _print_times(measured)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    print_json(document)


@app.command()
def remeasure(
    study: Study, out: Out = None, overrides: Set = None, tasks: Tasks = None, results_db: DatabaseOption = None
) -> None:
    """Time every point of a study again while nothing else runs: what shared a device was timed with its neighbours' load."""
    from isocost.pipeline.pipeline import Pipeline

    spec = load_with(study, overrides)
    pipeline = Pipeline(spec, output_folder(spec, out), results_db)
    try:
        runs = pipeline.runs_of(known_tasks(tasks))
        pipeline.prepare()
        pipeline.check_trained(runs)
        timed = sum(pipeline.remeasure(one) for one in runs)
    finally:
        pipeline.close()
    print_json({"study": spec.name, "timed": timed})


def _print_times(measured: Latency) -> None:
    """A line a stage and batch size, rounded for the eye alone."""
    from rich.console import Console
    from rich.table import Table

    settings, device = measured.settings, measured.device
    title = f"{measured.checkpoint['size']}, {settings['solver']}, {settings['num_steps']} steps, w = {settings['guidance']:g}"
    table = Table(title=title, title_justify="left", caption_justify="left")
    for name in ("batch", "stage", "median ms", "MAD", "p90", "ms an image", "share"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for one in measured.batches:
        for stage, times in one.stages.items():
            numbers = (times.median_ms, times.mad_ms, times.p90_ms, times.median_ms / one.batch)
            share = times.median_ms / one.stages["whole"].median_ms
            table.add_row(str(one.batch), stage, *(f"{number:.2f}" for number in numbers), f"{share:.1%}")
        table.add_section()
    evaluations = (
        f"{measured.batches[0].nfe_per_image} network evaluations an image: {settings['num_function_evaluations']} of the solver, "
        f"{settings['passes_per_evaluation']} {'pass' if settings['passes_per_evaluation'] == 1 else 'passes'} each"
    )
    on = f"{device['name']}, {device['num_threads']} {'thread' if device['num_threads'] == 1 else 'threads'}"
    how = f"{settings['dtype']['denoiser']}, {'compiled' if settings['compiled'] else 'eager'}"
    table.caption = "\n".join([evaluations, f"{on}; {how}; {settings['repeats']} passes of each size", *measured.notes])
    Console(stderr=True, width=110).print(table)
