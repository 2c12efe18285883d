"""What all commands share: the application, and the last line of their output."""

from __future__ import annotations

import json
import os
from typing import Any

import typer

app = typer.Typer(
    help="Which diffusion model, solver, steps and guidance give the best images for an inference budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def print_json(value: Any) -> None:
    """Print `value` as one line of JSON; of several processes the first one speaks."""
    if os.environ.get("RANK", "0") != "0":
        return
    print(json.dumps(value, ensure_ascii=False, default=str), flush=True)
