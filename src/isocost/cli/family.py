"""The command on the sizes themselves: `family`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from isocost.cli.app import answer_json, app
from isocost.errors import RequestError


@app.command()
def family(
    widths: Annotated[str, typer.Option(help="widths c, or the paper's names: 64,96 or 39M,83M")] = "",
    context: Annotated[int, typer.Option(help="width of the caption states")] = 1024,
    latent: Annotated[str, typer.Option(help="latent shape, channels x side")] = "4x64",
    tokens: Annotated[int, typer.Option(help="caption tokens")] = 77,
    as_json: Annotated[bool, typer.Option("--json", help="no table, the JSON line alone")] = False,
) -> None:
    """Sizes: parameters, GFLOP per forward pass, normalised cost, and the paper's figures beside."""
    from isocost.models.cost import family_table
    from isocost.models.paper import TABLE_1
    from isocost.models.unet import width_of
    from isocost.stages import ModelSpec

    try:
        channels, side = (int(part) for part in latent.lower().split("x"))
    except ValueError as error:
        raise RequestError(f"--latent {latent}: give channels x side, such as 4x64") from error
    names = [part.strip() for part in widths.split(",") if part.strip()]
    chosen = [int(name) if name.isdigit() else width_of(name) for name in names] or [row.width for row in TABLE_1]
    spec = ModelSpec(width=chosen[0], latent_channels=channels, latent_side=side, context_width=context)
    rows = family_table(chosen, spec, tokens)
    reference = f"normalised cost 1 is c = 320 at latent {channels}x{side}x{side}, {tokens} tokens, context {context}"
    if not as_json:
        _print_family(rows, reference)
    answer_json({"family": rows, "reference": reference})


def _print_family(rows: list[dict[str, Any]], reference: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(caption_justify="left")
    for title in ("size", "c", "M param.", "GFLOP", "cost", "paper GFLOP", "paper cost"):
        table.add_column(title, justify="left" if title == "size" else "right")
    for row in rows:
        *cells, note = row.values()
        table.add_row(*("" if value is None else str(value) for value in cells))
        reference += f"\n{row['size']}: {note}" if note else ""
    table.caption = reference
    Console(stderr=True).print(table)
