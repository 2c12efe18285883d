"""The command on the sizes themselves: `family`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from isocost.cli.app import app, print_json
from isocost.errors import ConfigError


@app.command()
def family(
    widths: Annotated[str, typer.Option(help="widths c, or the paper's names of U-Nets: 64,96 or 39M,83M")] = "",
    context: Annotated[int, typer.Option(help="width of the prompt embeddings")] = 1024,
    latent: Annotated[str, typer.Option(help="latent shape, channels x side")] = "4x64",
    tokens: Annotated[int, typer.Option(help="caption tokens")] = 77,
    kind: Annotated[str, typer.Option(help="unet, or dit: diffusion transformers")] = "unet",
    patch: Annotated[int | None, typer.Option(help="dit: side of a token in the latent")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="no table, the JSON line alone")] = False,
) -> None:
    """Sizes: parameters, GFLOP per forward pass, normalized cost, and the paper's figures beside."""
    from isocost.config.base import parse_spec
    from isocost.config.model import FamilySpec, ModelSpec
    from isocost.models.dit import SIZES
    from isocost.models.factory import check_widths
    from isocost.models.flops import family_table
    from isocost.models.paper_table import TABLE_1
    from isocost.models.unet import width_of

    try:
        channels, side = (int(part) for part in latent.lower().split("x"))
    except ValueError as error:
        raise ConfigError(f"--latent {latent}: give channels x side, such as 4x64") from error
    names = [part.strip() for part in widths.split(",") if part.strip()]
    if kind == "dit" and (unknown := [name for name in names if not name.isdigit()]):
        raise ConfigError(f"--widths {unknown[0]}: transformers go by their width alone, such as 384")
    chosen = [int(name) if name.isdigit() else width_of(name) for name in names]
    chosen = chosen or (list(SIZES) if kind == "dit" else [row.width for row in TABLE_1])
    asked = parse_spec(FamilySpec, {"kind": kind, "widths": chosen, "patch": patch}, "family")
    check_widths(asked)
    spec = ModelSpec(
        kind=asked.kind,
        width=chosen[0],
        latent_channels=channels,
        latent_size=side,
        cross_attention_dim=context,
        patch=asked.patch,
    )
    rows = family_table(chosen, spec, tokens)
    unit = "c = 320" if kind == "unet" else "the U-Net of c = 320"
    reference = f"normalized cost 1 is {unit} at latent {channels}x{side}x{side}, {tokens} tokens, context {context}"
    if not as_json:
        _print_family(rows, reference)
    print_json({"family": rows, "reference": reference})


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
    shown = [column for column in COLUMNS if column in rows[0]]
    for column in shown:
        table.add_column(COLUMNS[column], justify="left" if column == "size" else "right")
    for row in rows:
        table.add_row(*("" if row[column] is None else str(row[column]) for column in shown))
        reference += f"\n{row['size']}: {row['paper_note']}" if row.get("paper_note") else ""
    table.caption = reference
    Console(stderr=True).print(table)
