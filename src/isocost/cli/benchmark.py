"""The commands that measure time: `latency` for a checkpoint, `remeasure` for the points of a study."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from isocost.cli.app import app, print_json
from isocost.cli.options import (
    CHECKPOINT_HELP,
    Batches,
    Database,
    Guide,
    GuideNullPrompt,
    IntervalText,
    NumRepeats,
    NumSteps,
    OptionalGuidance,
    OutputDir,
    Overrides,
    ScheduleText,
    SolverName,
    StudyFile,
    Tasks,
    output_dir_of,
    parse_guidance_schedule,
    parse_interval,
    parse_solver,
    parse_tasks,
    read_study,
)
from isocost.utils.artifact_store import write_atomically
from isocost.utils.output_paths import check_output_file

if TYPE_CHECKING:
    from isocost.sampling.denoiser import SamplingDTypeName
    from isocost.sampling.latency import Latency


@app.command()
def latency(
    checkpoint: Annotated[Path, typer.Argument(help=CHECKPOINT_HELP)],
    num_steps: NumSteps = None,
    guidance: OptionalGuidance = None,
    guide: Guide = None,
    guide_null_prompt: GuideNullPrompt = False,
    guidance_interval: IntervalText = None,
    guidance_schedule: ScheduleText = None,
    solver_name: SolverName = None,
    batch: Batches = None,
    repeats: NumRepeats = 20,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"], typer.Option(help="data type of the network; fp16 needs a CUDA device")
    ] = "fp32",
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="compile the network for each batch size")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if available")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="also write the result to this .json file")] = None,
) -> None:
    """Measure the milliseconds of a checkpoint by batch size, alone or with a guide: text encoder, denoiser, decoder, total."""
    if out is not None:
        check_output_file(out, ".json")
    solver = parse_solver(solver_name)
    interval, schedule = parse_interval(guidance_interval), parse_guidance_schedule(guidance_schedule)

    from isocost.sampling.latency import DEFAULT_BATCHES
    from isocost.sampling.latency import latency as measure

    _print_memory(checkpoint, batch or DEFAULT_BATCHES, guidance, dtype, device, guide)
    measured = measure(
        checkpoint,
        solver=solver,
        num_steps=num_steps,
        guidance=guidance,
        guide=guide,
        guide_null_prompt=guide_null_prompt,
        guidance_interval=interval,
        guidance_schedule=schedule,
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
    study_file: StudyFile,
    out: OutputDir = None,
    overrides: Overrides = None,
    tasks: Tasks = None,
    results_db: Database = None,
) -> None:
    """Measure throughput, latency and, on a GPU that reports it, energy of every point. Run it while nothing else runs."""
    from isocost.pipeline.pipeline import Pipeline

    study = read_study(study_file, overrides)
    pipeline = Pipeline(study, output_dir_of(study, out), results_db)
    try:
        runs = pipeline.runs_of(parse_tasks(tasks))
        pipeline.prepare()
        pipeline.check_trained(runs)
        pipeline.check_checkpoints(runs)
        num_timed = sum(pipeline.remeasure(run) for run in runs)
    finally:
        pipeline.close()
    print_json({"study": study.name, "timed": num_timed})


def _print_memory(
    checkpoint: Path,
    batches: Sequence[int],
    guidance: float | None,
    dtype: SamplingDTypeName,
    device: str | None,
    guide: Path | None,
) -> None:
    """Print the forecast of the device memory of a published checkpoint and its guide, before they are loaded."""
    import torch

    from isocost.estimate.memory_forecast import forecast_batches
    from isocost.models.checkpoint import read_info
    from isocost.sampling.latency import DEFAULT_GUIDANCE
    from isocost.utils.device import best_device

    info = read_info(checkpoint)
    is_absent = device not in (None, "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available())
    guide_info = None if guide is None else read_info(guide)
    is_forecast = info.pretrained is not None and (guide_info is None or guide_info.pretrained is not None)
    if not is_forecast or min(batches) < 1 or is_absent:
        return  # `latency` names what is wrong
    target = best_device() if device is None else torch.device(device)
    guidance = DEFAULT_GUIDANCE if guidance is None else guidance
    forecast = forecast_batches(info, batches, guidance, dtype, target, guide_info)
    print(forecast, file=sys.stderr)
    if warning := forecast.warning(target):
        print(f"warning: {warning}", file=sys.stderr)


def _print_times(measured: Latency) -> None:
    """Print a line for each batch size and stage, rounded for reading."""
    from rich.console import Console
    from rich.table import Table

    settings, device = measured.settings, measured.device
    title = f"{measured.checkpoint['size']}, {settings['solver']}, {settings['num_steps']} steps, w = {settings['guidance']:g}"
    table = Table(title=title, title_justify="left", caption_justify="left")
    for name in ("batch", "stage", "median ms", "MAD", "p90", "ms per image", "fraction"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for batch in measured.batches:
        for stage, times in batch.stages.items():
            numbers = (times.median_ms, times.mad_ms, times.p90_ms, times.median_ms / batch.batch)
            fraction = times.median_ms / batch.stages["whole"].median_ms
            table.add_row(str(batch.batch), stage, *(f"{number:.2f}" for number in numbers), f"{fraction:.1%}")
        table.add_section()
    evaluations = _count_passes(measured)
    hardware = f"{device['name']}, {device['num_threads']} {'thread' if device['num_threads'] == 1 else 'threads'}"
    numerics = f"{settings['dtype']['denoiser']}, {'compiled' if settings['compiled'] else 'eager'}"
    repeats = f"{settings['repeats']} passes of each batch size"
    table.caption = "\n".join([evaluations, f"{hardware}; {numerics}; {repeats}", *measured.notes])
    Console(stderr=True, width=110).print(table)


def _count_passes(measured: Latency) -> str:
    """A line with the passes of an image: of both networks, and in how many evaluations there is guidance."""
    settings, batch = measured.settings, measured.batches[0]
    num_evaluations, num_guided = settings["num_function_evaluations"], settings["guided_evaluations"]
    total = f"{batch.nfe_per_image} network passes per image"
    if settings["guide"] is not None:
        own = batch.nfe_per_image - batch.guide_nfe_per_image
        return f"{total}: {own} of the network and {batch.guide_nfe_per_image} of the guide {settings['guide']['size']}"
    if 0 < num_guided < num_evaluations:
        return f"{total}: {num_evaluations} solver evaluations, {num_guided} of them with guidance, which takes 2 passes"
    num_passes = settings["passes_per_evaluation"]
    return f"{total}: {num_evaluations} solver evaluations, {num_passes} {'pass' if num_passes == 1 else 'passes'} each"
