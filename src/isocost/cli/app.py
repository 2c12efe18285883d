"""The application that all commands belong to, and the last line of their output."""

from __future__ import annotations

import json
import math
import os
import sys
from importlib.metadata import entry_points, version
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
PLUGINS = "isocost.plugins"
"""Group of entry points: modules of installed packages that register solvers, metrics and feature extractors."""


def _show_version(is_requested: bool) -> None:
    if is_requested:
        print(f"isocost {version('isocost')}")
        raise typer.Exit


@app.callback()
def load_plugins(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="show the version and exit")
    ] = False,
) -> None:
    """Which diffusion model, guidance, solver and number of steps give the best images for an inference budget."""
    for plugin in entry_points(group=PLUGINS):
        plugin.load()


def print_json(value: Any) -> None:
    """Print `value` as one line of JSON; of several processes that torchrun started, only the first one prints.

    A number that JSON does not have (NaN, infinity) becomes null. Characters that the terminal cannot show, and bytes of file
    names that are not UTF-8, are written as escapes.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    plain = _finite(json.loads(json.dumps(value, default=str)))
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(plain, allow_nan=False)
    print(text, flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
