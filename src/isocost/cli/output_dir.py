"""Commands on output folders: `merge`, `archive`, `compare`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field

from isocost.cli.app import app, print_json
from isocost.cli.options import Positive, in_range, parse_tasks
from isocost.utils.output_paths import check_output_folder, check_separate


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="destination folder, created if missing")],
    others: Annotated[list[Path], typer.Argument(help="output folders of the same study; with --artefacts, of any study")],
    artefacts: Annotated[
        bool,
        typer.Option("--artefacts", help="copy only autoencoders, latents and checkpoints, for use in another study"),
    ] = False,
) -> None:
    """Merge output folders of one study from machines without a shared disk."""
    from isocost.pipeline.merge import merge as merge_folders
    from isocost.pipeline.merge import take_artefacts

    num_copied = {"artefacts": take_artefacts(out, others)} if artefacts else merge_folders(out, others)
    print_json({"out": str(out), **num_copied})


@app.command()
def archive(
    out: Annotated[Path, typer.Argument(help="output folder")],
    folder: Annotated[Path, typer.Argument(help="new folder, or an earlier archive of the same study")],
    checkpoint_mib: Annotated[
        float | None,
        typer.Option(
            "--checkpoint-mib",
            callback=in_range("--checkpoint-mib", Annotated[float, Field(ge=0)]),
            help="archive only final checkpoints of up to this size in MiB; default: all",
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--task", help="archive only checkpoints of this task; may be repeated")
    ] = None,
) -> None:
    """Copy the study, results database, autoencoder and checkpoints of an output folder.

    `isocost merge NEW FOLDER` continues from the copy.
    """
    from isocost.pipeline.merge import archive as archive_folder

    print_json({"folder": str(folder), **archive_folder(out, folder, checkpoint_mib, parse_tasks(tasks))})


@app.command()
def compare(
    outs: Annotated[list[Path], typer.Argument(help="two or more output folders of studies under one protocol")],
    cost: Annotated[
        str,
        typer.Option(
            help="gflop, gflop_denoiser, nfe, ms_per_image, latency_ms, joules_per_image, usd_per_1000 or normalized_cost"
        ),
    ] = "gflop",
    budgets: Annotated[
        list[float] | None,
        typer.Option(
            "--budget",
            callback=in_range("--budget", Positive),
            help="budget in the unit of --cost; may be repeated; default: up to 6 over the range of costs",
        ),
    ] = None,
    metric: Annotated[str | None, typer.Option(help="metric to rank by; default: that of the first report")] = None,
    task: Annotated[str, typer.Option(help="text2image, superres, distill or superres-distill")] = "text2image",
    out: Annotated[Path | None, typer.Option("--out", help="folder for the result as Markdown and a figure")] = None,
) -> None:
    """Compare studies at equal cost: families, autoencoders, training recipes or pretrained checkpoints."""
    from isocost.analysis.study_comparison import headline
    from isocost.analysis.timings import TIME_LABELS, format_excluded_timings
    from isocost.pipeline.compare import compare as compare_studies
    from isocost.report.study_comparison import write_comparison

    if out is not None:
        check_separate(check_output_folder(out), *outs)
    compared = compare_studies(outs, metric, cost, budgets or (), task)
    for column, label in TIME_LABELS.items():
        if untimed := format_excluded_timings(compared.table, column):
            print(f"note: {label} {untimed}", file=sys.stderr)
    for line in (*compared.rankings, headline(compared.rankings)):
        print(line, file=sys.stderr)
    files = [] if out is None else write_comparison(out, compared.table, compared.rankings)
    print_json(
        {
            "answer": headline(compared.rankings),
            "rankings": [
                {**dataclasses.asdict(ranking), "is_decided": ranking.is_decided, "is_contested": ranking.is_contested}
                for ranking in compared.rankings
            ],
            "files": [str(file) for file in files],
        }
    )
