"""The commands that measure: `latency` a checkpoint, `retime` the points of a study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from isocost.cli.app import answer_json, app
from isocost.cli.study import LedgerAt, Out, Set, Study, Tasks, known_tasks, load_with, output_folder
from isocost.config.base import parse_spec
from isocost.config.sampling import SAMPLER_NAMES, SamplerSpec
from isocost.errors import RequestError
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
    sampler: Annotated[str | None, typer.Option(help=f"{', '.join(SAMPLER_NAMES)}; the checkpoint's own where absent")] = None,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", help="pictures at once, may be given several times; 1 and 4 where absent")
    ] = None,
    repeats: Annotated[int, typer.Option(help="measured passes of each batch size, at least 3")] = 20,
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"], typer.Option(help="what the network computes in; fp16 on CUDA devices alone")
    ] = "fp32",
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="compile the network, for each batch size")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; CUDA's where there is one")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="a file for the answer as well, .json")] = None,
) -> None:
    """Measured milliseconds of one checkpoint: text encoder, denoiser, decoder and the whole, by batch size."""
    if out is not None and (out.suffix.lower() != ".json" or out.is_dir()):
        raise RequestError(f"{out}: give a file that ends in .json")
    spec = None if sampler is None else parse_spec(SamplerSpec, {"name": sampler}, "--sampler")

    from isocost.sampling.latency import DEFAULT_BATCHES
    from isocost.sampling.latency import latency as measure

    measured = measure(
        checkpoint,
        sampler=spec,
        num_steps=steps,
        guidance=guidance,
        batches=batch or DEFAULT_BATCHES,
        repeats=repeats,
        precision=precision,
        compiled=compiled,
        device=device,
    )
    document = measured.document()
    _print_times(measured)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    answer_json(document)


@app.command()
def retime(study: Study, out: Out = None, overrides: Set = None, tasks: Tasks = None, ledger: LedgerAt = None) -> None:
    """Time every point of a study again while nothing else runs: what shared a device was timed with its neighbours' load."""
    from isocost.pipeline.pipeline import Pipeline

    spec = load_with(study, overrides)
    pipeline = Pipeline(spec, output_folder(spec, out), ledger)
    try:
        runs = pipeline.runs_of(known_tasks(tasks))
        pipeline.prepare()
        pipeline.check_trained(runs)
        timed = sum(pipeline.retime(one) for one in runs)
    finally:
        pipeline.close()
    answer_json({"study": spec.name, "timed": timed})


def _print_times(measured: Latency) -> None:
    """A line a stage and batch size, rounded for the eye alone."""
    from rich.console import Console
    from rich.table import Table

    settings, device = measured.settings, measured.device
    title = f"{measured.checkpoint['size']}, {settings['sampler']}, {settings['num_steps']} steps, w = {settings['guidance']:g}"
    table = Table(title=title, title_justify="left", caption_justify="left")
    for name in ("batch", "stage", "median ms", "MAD", "p90", "ms a picture", "share"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for one in measured.batches:
        for stage, times in one.stages.items():
            numbers = (times.median_ms, times.mad_ms, times.p90_ms, times.median_ms / one.batch)
            share = times.median_ms / one.stages["whole"].median_ms
            table.add_row(str(one.batch), stage, *(f"{number:.2f}" for number in numbers), f"{share:.1%}")
        table.add_section()
    evaluations = (
        f"{measured.batches[0].nfe_per_picture} network evaluations a picture: {settings['num_evaluations']} of the sampler, "
        f"{settings['passes_per_evaluation']} {'pass' if settings['passes_per_evaluation'] == 1 else 'passes'} each"
    )
    on = f"{device['name']}, {device['num_threads']} {'thread' if device['num_threads'] == 1 else 'threads'}"
    how = f"{settings['precision']['denoiser']}, {'compiled' if settings['compiled'] else 'eager'}"
    table.caption = "\n".join([evaluations, f"{on}; {how}; {settings['repeats']} passes of each size", *measured.notes])
    Console(stderr=True, width=110).print(table)
