"""Commands on images and metrics: `score`, `reference`, `verify`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from isocost.cli.app import app, print_json
from isocost.errors import ConfigError, RunError

Protocol = Annotated[str, typer.Option("--protocol", help="coco30k-fid-clip, aerial-fd, mmd-efficientnet-64, ...")]
Prompts = Annotated[
    str | None, typer.Option("--prompts", help="the protocol's captions: a .csv, tar shards, DreamBooth's .txt")
]
Weights = Annotated[
    list[str] | None, typer.Option("--weights", metavar="NAME=PLACE", help="where weights lie: inception=FILE, lpips=FILE")
]


@app.command()
def score(
    images: Annotated[str, typer.Argument(help="a folder of images, or uint8 [N, H, W, 3] in a .npz or .npy")],
    reference: Annotated[
        str, typer.Option("--reference", help="a folder of real images, tar shards, hub:NAME, or statistics made once")
    ],
    protocol: Protocol,
    prompts: Prompts = None,
    weights: Weights = None,
) -> None:
    """Scores of any images against a reference under a named protocol, with intervals."""
    from isocost.evaluation.score_folder import score_folder

    scored = score_folder(images, reference, protocol, prompts=prompts, weights=_places(weights))
    for note in scored.notes:
        print(note, file=sys.stderr)
    print_json(dataclasses.asdict(scored))


@app.command()
def reference(
    images: Annotated[str, typer.Argument(help="a folder of real images, tar shards, or hub:NAME:SPLIT")],
    out: Annotated[Path, typer.Argument(help="a new folder")],
    protocol: Protocol,
    prompts: Prompts = None,
    weights: Weights = None,
) -> None:
    """Statistics of a reference, made once, for `score --reference`."""
    from isocost.evaluation.score_folder import make_reference

    taken = make_reference(images, out, protocol, prompts=prompts, weights=_places(weights))
    print_json({"folder": str(out), "protocol": protocol, "num_images": len(taken), "content": taken.content})


@app.command()
def verify(
    inception: Annotated[
        str | None, typer.Option("--inception", help="FID's Inception weights: checks the way from images")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="no table, the JSON line alone")] = False,
) -> None:
    """The metrics against known anchors; exit status 1 where one fails."""
    from isocost.evaluation.self_check import run_checks

    rows = [dataclasses.asdict(anchor) | {"passed": anchor.passed} for anchor in run_checks(inception)]
    if not as_json:
        _print_checks(rows)
    print_json({"passed": all(row["passed"] for row in rows), "anchors": rows})
    failed = [row["what"] for row in rows if not row["passed"]]
    if failed:
        raise RunError(f"{len(failed)} of {len(rows)} anchors failed; the first is {failed[0]}")


def _places(weights: list[str] | None) -> dict[str, str]:
    places = {}
    for item in weights or []:
        name, equals, place = item.partition("=")
        if not equals or not name or not place:
            raise ConfigError(f"--weights {item}: give NAME=PLACE, such as inception=weights-inception-2015-12-05-6726825d.pth")
        places[name] = place
    return places


def _print_checks(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for title in ("", "anchor", "found", "expected", "within", "source"):
        table.add_column(title, justify="right" if title in ("found", "expected", "within") else "left", no_wrap=True)
    for row in rows:
        numbers = (f"{row['found']:.6g}", f"{row['expected']:.6g}", f"{row['tolerance']:.0e}")
        table.add_row("pass" if row["passed"] else "FAIL", row["what"], *numbers, row["source"])
    Console(stderr=True, width=150).print(table)
