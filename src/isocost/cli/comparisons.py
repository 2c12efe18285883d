"""The command on several studies: `compare`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from isocost.cli.app import answer_json, app


@app.command()
def compare(
    outs: Annotated[list[Path], typer.Argument(help="output folders of studies under one protocol, two or more")],
    cost: Annotated[str, typer.Option(help="gflop, nfe, ms_per_picture or paper_cost")] = "gflop",
    budgets: Annotated[
        list[float] | None, typer.Option("--budget", help="of that cost; may be repeated; spread over the points where absent")
    ] = None,
    metric: Annotated[str, typer.Option(help="the score that leads")] = "kernel_efficientnet",
    task: Annotated[str, typer.Option(help="text2image, superres, distill or superres-distill")] = "text2image",
    out: Annotated[Path | None, typer.Option("--out", help="a folder for the answer as Markdown and its figure")] = None,
) -> None:
    """Which of several studies is best at equal cost: families, codecs, recipes, given checkpoints."""
    from isocost.analysis.study_comparison import moral
    from isocost.comparing import compare as compare_studies
    from isocost.report.study_comparison import write_comparison

    compared = compare_studies(outs, metric, cost, budgets or (), task)
    for line in (*compared.standings, moral(compared.standings)):
        print(line, file=sys.stderr)
    files = [] if out is None else write_comparison(out, compared.table, compared.standings)
    answer_json(
        {
            "answer": moral(compared.standings),
            "standings": [
                {**dataclasses.asdict(each), "is_decided": each.is_decided, "is_contested": each.is_contested}
                for each in compared.standings
            ],
            "files": [str(file) for file in files],
        }
    )
