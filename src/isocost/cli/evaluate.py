"""Commands on images and metrics: `score`, `reference`, `verify`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from isocost.cli.app import app, print_json
from isocost.errors import ConfigError, RunError

Protocol = Annotated[
    str, typer.Option("--protocol", help="protocol preset, such as coco30k-fid-clip, aerial-fd or mmd-efficientnet-64")
]
Prompts = Annotated[
    str | None, typer.Option("--prompts", help="the protocol's prompts: a .csv, tar shards, or DreamBooth's .txt")
]
Weights = Annotated[
    list[str] | None,
    typer.Option(
        "--weights", metavar="NAME=SOURCE", help="weights of a network that a metric uses, such as inception=FILE or lpips=FILE"
    ),
]


@app.command()
def score(
    images: Annotated[str, typer.Argument(help="a folder of images, or uint8 [N, H, W, 3] in a .npz or .npy")],
    reference: Annotated[
        str,
        typer.Option("--reference", help="a folder of real images, tar shards, hub:NAME, or a folder of `isocost reference`"),
    ],
    protocol: Protocol,
    prompts: Prompts = None,
    weights: Weights = None,
) -> None:
    """Score images against a reference under a protocol preset, with confidence intervals."""
    from isocost.evaluation.score_folder import score_folder

    scored = score_folder(images, reference, protocol, prompts=prompts, weights=parse_weights(weights))
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
    """Compute the statistics of reference images once, for `score --reference`."""
    from isocost.evaluation.score_folder import make_reference

    features = make_reference(images, out, protocol, prompts=prompts, weights=parse_weights(weights))
    print_json({"folder": str(out), "protocol": protocol, "num_images": len(features), "content": features.content})


@app.command()
def verify(
    inception: Annotated[
        str | None,
        typer.Option("--inception", help="source of FID's Inception weights; adds checks of KID and Inception score"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print only the JSON line, no table")] = False,
) -> None:
    """Check the metrics against known values; exit status 1 if a check fails."""
    from isocost.evaluation.self_check import run_checks

    checks = [dataclasses.asdict(check) | {"passed": check.passed} for check in run_checks(inception)]
    if not as_json:
        _print_checks(checks)
    print_json({"passed": all(check["passed"] for check in checks), "checks": checks})
    failed = [check["what"] for check in checks if not check["passed"]]
    if failed:
        raise RunError(f"{len(failed)} of {len(checks)} checks failed; the first is {failed[0]}")


def parse_weights(weights: list[str] | None) -> dict[str, str]:
    """The sources of --weights by network.

    Raises:
        ConfigError: an item is not NAME=SOURCE, or a name is given twice.
    """
    sources: dict[str, str] = {}
    for item in weights or []:
        name, equals, source = item.partition("=")
        if not equals or not name or not source:
            raise ConfigError(
                f"--weights {item}: give NAME=SOURCE, such as inception=weights-inception-2015-12-05-6726825d.pth"
            )
        if name in sources:
            raise ConfigError(f"--weights {item}: {name} already has the source {sources[name]}; give it once")
        sources[name] = source
    return sources


def _print_checks(checks: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for title in ("", "check", "computed", "expected", "tolerance", "source"):
        table.add_column(title, justify="right" if title in ("computed", "expected", "tolerance") else "left", no_wrap=True)
    for check in checks:
        numbers = (f"{check['computed']:.6g}", f"{check['expected']:.6g}", f"{check['tolerance']:.0e}")
        table.add_row("pass" if check["passed"] else "FAIL", check["what"], *numbers, check["source"])
    Console(stderr=True, width=150).print(table)
