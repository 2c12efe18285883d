"""The command `list`: the names that studies and options take."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

import typer

from isocost.cli.app import app, print_json


@app.command("list")
def list_names(
    kind: Annotated[Literal["solvers", "metrics", "extractors"], typer.Argument(help="what to list")],
) -> None:
    """List the names of solvers, metrics or feature extractors."""
    names = _names(kind)
    for name, description in names.items():
        print(f"{name}: {description}" if description else name, file=sys.stderr)
    print_json({kind: list(names)})


def _names(kind: str) -> dict[str, Any]:
    if kind == "solvers":
        from isocost.diffusion.solvers import SOLVERS

        return {name: (solver.coefficients.__doc__ or "").strip().split("\n")[0] for name, solver in SOLVERS.items()}
    if kind == "extractors":
        from isocost.metrics.feature_extractors import EXTRACTORS

        return {name: extractor.label for name, extractor in EXTRACTORS.items()}
    from isocost.evaluation.metric_registry import METRIC_GROUPS
    from isocost.metrics.feature_extractors import EXTRACTORS

    columns = {
        name: [metric.name for extractor in EXTRACTORS.values() for metric in group.columns(extractor)]
        for name, group in METRIC_GROUPS.items()
    }
    return {name: f"columns {', '.join(listed)}" for name, listed in columns.items()}
