"""The command line. Progress goes to stderr; the last line on stdout is one JSON document.

Exit status: 0 done (or stopped by --stop-after), 1 the work failed, 2 the request was wrong.
"""

from __future__ import annotations

import sys
import warnings

from isocost.cli import benchmark, checkpoint, evaluate, model_family, output_dir, study
from isocost.cli.app import app
from isocost.errors import ConfigError, RunError

ORDER = (
    *("demo", "family", "run", "autoencoder", "train", "sweep", "remeasure", "worker", "status", "merge", "archive", "report"),
    *("dreambooth", "recommend", "compare"),
    *("sample", "upscale", "latency", "export", "score", "reference", "verify"),
)
"""As `isocost --help` lists the commands: studies, then checkpoints, then scores."""
app.registered_commands.sort(key=lambda command: ORDER.index(command.callback.__name__))  # type: ignore[union-attr]

__all__ = ["app", "benchmark", "checkpoint", "evaluate", "main", "model_family", "output_dir", "study"]


def main() -> None:
    """Entry point: turns mistakes into one line and an exit status."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        app(standalone_mode=True)
    except ConfigError as error:
        print(f"isocost: {error}", file=sys.stderr)
        sys.exit(2)
    except RunError as error:
        print(f"isocost: {error}", file=sys.stderr)
        sys.exit(1)
