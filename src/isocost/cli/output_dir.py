"""Commands on whole output folders: `merge`, `keep`, `compare`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from isocost.cli.app import app, print_json
from isocost.cli.study import known_tasks


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="the output folder that takes the others' work, maybe a new one")],
    others: Annotated[list[Path], typer.Argument(help="output folders of the same study; with --artefacts of any")],
    artefacts: Annotated[
        bool,
        typer.Option("--artefacts", help="autoencoders, latents, checkpoints alone: to go on with them in another study"),
    ] = False,
) -> None:
    """Unite output folders of one study that were filled on machines without a common disk."""
    from isocost.pipeline.merge import merge as unite
    from isocost.pipeline.merge import take_artefacts

    came = {"artefacts": take_artefacts(out, others)} if artefacts else unite(out, others)
    print_json({"out": str(out), **came})


@app.command()
def archive(
    out: Annotated[Path, typer.Argument(help="an output folder")],
    folder: Annotated[Path, typer.Argument(help="takes the small part of it that lasts; a new one, or what was kept before")],
    checkpoint_mib: Annotated[
        float | None,
        typer.Option("--checkpoint-mib", min=0, help="last checkpoints alone, of at most so many MiB each; all where absent"),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--task", help="checkpoints of text2image, seed-replicates ... alone; may be repeated")
    ] = None,
) -> None:
    """Keep study, results database, autoencoder and checkpoints of an output folder; `isocost merge NEW FOLDER` goes on from there."""
    from isocost.pipeline.merge import archive as archive_of

    print_json({"folder": str(folder), **archive_of(out, folder, checkpoint_mib, known_tasks(tasks))})


@app.command()
def compare(
    outs: Annotated[list[Path], typer.Argument(help="output folders of studies under one protocol, two or more")],
    cost: Annotated[str, typer.Option(help="gflop, nfe, ms_per_image or normalized_cost")] = "gflop",
    budgets: Annotated[
        list[float] | None, typer.Option("--budget", help="of that cost; may be repeated; spread over the points where absent")
    ] = None,
    metric: Annotated[str, typer.Option(help="the score that leads")] = "mmd_efficientnet",
    task: Annotated[str, typer.Option(help="text2image, superres, distill or superres-distill")] = "text2image",
    out: Annotated[Path | None, typer.Option("--out", help="a folder for the answer as Markdown and its figure")] = None,
) -> None:
    """Which of several studies is best at equal cost: families, autoencoders, recipes, given checkpoints."""
    from isocost.analysis.study_comparison import headline
    from isocost.analysis.timings import format_untimed
    from isocost.pipeline.compare import compare as compare_studies
    from isocost.report.study_comparison import write_comparison

    compared = compare_studies(outs, metric, cost, budgets or (), task)
    if untimed := format_untimed(compared.table):
        print(f"note: milliseconds {untimed}", file=sys.stderr)
    for line in (*compared.rankings, headline(compared.rankings)):
        print(line, file=sys.stderr)
    files = [] if out is None else write_comparison(out, compared.table, compared.rankings)
    print_json(
        {
            "answer": headline(compared.rankings),
            "standings": [
                {**dataclasses.asdict(each), "is_decided": each.is_decided, "is_contested": each.is_contested}
                for each in compared.rankings
            ],
            "files": [str(file) for file in files],
        }
    )
