"""Commands on pictures and metrics: `score`, `reference`, `verify`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from isocost.cli.app import answer_json, app
from isocost.errors import RequestError, WorkError

Protocol = Annotated[str, typer.Option("--protocol", help="coco30k-fid-clip, aerial-fd, kernel-efficientnet-64, ...")]
Captions = Annotated[
    str | None, typer.Option("--captions", help="the protocol's captions: a .csv, tar shards, DreamBooth's .txt")
]
Weights = Annotated[
    list[str] | None, typer.Option("--weights", metavar="NAME=PLACE", help="where weights lie: inception=FILE, lpips=FILE")
]


@app.command()
def score(
    pictures: Annotated[str, typer.Argument(help="a folder of pictures, or uint8 [N, H, W, 3] in a .npz or .npy")],
    reference: Annotated[
        str, typer.Option("--reference", help="a folder of real pictures, tar shards, hub:NAME, or statistics made once")
    ],
    protocol: Protocol,
    captions: Captions = None,
    weights: Weights = None,
) -> None:
    """Scores of any pictures against a reference under a named protocol, with intervals."""
    from isocost.evaluation.score_folder import score_folder

    scored = score_folder(pictures, reference, protocol, captions=captions, weights=_places(weights))
    for note in scored.notes:
        print(note, file=sys.stderr)
    answer_json(dataclasses.asdict(scored))


@app.command()
def reference(
    pictures: Annotated[str, typer.Argument(help="a folder of real pictures, tar shards, or hub:NAME:SPLIT")],
    out: Annotated[Path, typer.Argument(help="a new folder")],
    protocol: Protocol,
    captions: Captions = None,
    weights: Weights = None,
) -> None:
    """Statistics of a reference, made once, for `score --reference`."""
    from isocost.evaluation.score_folder import make_reference

    taken = make_reference(pictures, out, protocol, captions=captions, weights=_places(weights))
    answer_json({"folder": str(out), "protocol": protocol, "num_pictures": len(taken), "content": taken.content})


@app.command()
def verify(
    inception: Annotated[
        str | None, typer.Option("--inception", help="FID's Inception weights: checks the way from pictures")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="no table, the JSON line alone")] = False,
) -> None:
    """The metrics against known anchors; exit status 1 where one fails."""
    from isocost.evaluation.self_check import anchors

    rows = [dataclasses.asdict(anchor) | {"passed": anchor.passed} for anchor in anchors(inception)]
    if not as_json:
        _print_anchors(rows)
    answer_json({"passed": all(row["passed"] for row in rows), "anchors": rows})
    failed = [row["what"] for row in rows if not row["passed"]]
    if failed:
        raise WorkError(f"{len(failed)} of {len(rows)} anchors failed; the first is {failed[0]}")


def _places(weights: list[str] | None) -> dict[str, str]:
    places = {}
    for item in weights or []:
        name, equals, place = item.partition("=")
        if not equals or not name or not place:
            raise RequestError(
                f"--weights {item}: give NAME=PLACE, such as inception=weights-inception-2015-12-05-6726825d.pth"
            )
        places[name] = place
    return places


def _print_anchors(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for title in ("", "anchor", "found", "expected", "within", "source"):
        table.add_column(title, justify="right" if title in ("found", "expected", "within") else "left", no_wrap=True)
    for row in rows:
        numbers = (f"{row['found']:.6g}", f"{row['expected']:.6g}", f"{row['tolerance']:.0e}")
        table.add_row("pass" if row["passed"] else "FAIL", row["what"], *numbers, row["source"])
    Console(stderr=True, width=150).print(table)
