"""The command `family`: sizes of networks and their cost."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from isocost.cli.app import app, print_json
from isocost.cli.options import in_range
from isocost.config.types import Channels, Tokens
from isocost.errors import ConfigError


@app.command()
def family(
    widths: Annotated[
        str, typer.Option(help="widths such as 64,96, or names of the U-Nets of arXiv 2404.01367 such as 39M,83M")
    ] = "",
    context: Annotated[
        int, typer.Option(callback=in_range("--context", Channels), help="width of the prompt embeddings")
    ] = 1024,
    latent: Annotated[str, typer.Option(help="latent shape, channels x size")] = "4x64",
    tokens: Annotated[int, typer.Option(callback=in_range("--tokens", Tokens), help="prompt tokens")] = 77,
    kind: Annotated[str, typer.Option(help="unet, or dit for diffusion transformers")] = "unet",
    patch: Annotated[int | None, typer.Option(help="dit: size of a patch in the latent")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print only the JSON line, without the table")] = False,
) -> None:
    """List sizes with their parameters, GFLOP per forward pass and normalized cost, and with the numbers of the paper."""
    from isocost.config.base import parse_spec
    from isocost.config.model import FamilySpec, ModelSpec
    from isocost.models.dit import DEFAULT_DIT_WIDTHS
    from isocost.models.factory import check_widths
    from isocost.models.flops import family_table
    from isocost.models.paper_table import TABLE_1
    from isocost.models.unet import width_of

    try:
        channels, latent_size = (int(number) for number in latent.lower().split("x"))
    except ValueError as error:
        raise ConfigError(f"--latent {latent}: give channels x size, such as 4x64") from error
    names = [name.strip() for name in widths.split(",") if name.strip()]
    if kind == "dit" and (unknown := [name for name in names if not _is_width(name)]):
        raise ConfigError(f"--widths {unknown[0]}: give the width of the transformer, such as 384")
    chosen_widths = [int(name) if _is_width(name) else width_of(name) for name in names]
    chosen_widths = chosen_widths or (list(DEFAULT_DIT_WIDTHS) if kind == "dit" else [row.width for row in TABLE_1])
    family_spec = parse_spec(FamilySpec, {"kind": kind, "widths": chosen_widths, "patch": patch}, "family")
    check_widths(family_spec)
    fields = {
        "kind": family_spec.kind,
        "width": chosen_widths[0],
        "latent_channels": channels,
        "latent_size": latent_size,
        "cross_attention_dim": context,
        "patch": family_spec.patch,
    }
    spec = parse_spec(ModelSpec, fields, "family")
    rows = family_table(chosen_widths, spec, tokens)
    unit = "c = 320" if kind == "unet" else "the U-Net of c = 320"
    reference = (
        f"normalized cost 1 is {unit} at latent {channels}x{latent_size}x{latent_size}, {tokens} tokens, context {context}"
    )
    if not as_json:
        _print_family(rows, reference)
    print_json({"family": rows, "reference": reference})


MAX_WIDTH_DIGITS = 9


def _is_width(name: str) -> bool:
    """Whether a name is a number that is short enough to be read as one; `width_of` refuses every other text."""
    return name.isascii() and name.isdigit() and len(name) <= MAX_WIDTH_DIGITS


COLUMNS = {
    "size": "size",
    "width": "c",
    "depth": "blocks",
    "heads": "heads",
    "parameters_million": "M param.",
    "gflop_per_forward": "GFLOP",
    "normalized_cost_per_step": "cost",
    "reference_gflop": "paper GFLOP",
    "paper_normalized_cost_per_step": "normalized cost",
}


def _print_family(rows: list[dict[str, Any]], reference: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(caption_justify="left")
    columns = [column for column in COLUMNS if column in rows[0]]
    for column in columns:
        table.add_column(COLUMNS[column], justify="left" if column == "size" else "right")
    for row in rows:
        table.add_row(*("" if row[column] is None else str(row[column]) for column in columns))
        reference += f"\n{row['size']}: {row['paper_note']}" if row.get("paper_note") else ""
    table.caption = reference
    Console(stderr=True).print(table)
