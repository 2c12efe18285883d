"""The command line. Progress goes to stderr; the last line on stdout is one JSON document.

Exit status: 0 done (or stopped by --stop-after), 1 the work failed, 2 the request was wrong.
"""

from __future__ import annotations

import sys
import warnings

from isocost.cli.app import app
from isocost.errors import RequestError, WorkError

ORDER = (
    *("demo", "family", "run", "codec", "train", "sweep", "retime", "work", "status", "merge", "keep", "report"),
    *("dreambooth", "recommend", "compare"),
    *("sample", "upscale", "latency", "export", "score", "reference", "verify"),
)
"""As `isocost --help` lists the commands: studies, then checkpoints, then scores."""
app.registered_commands.sort(key=lambda command: ORDER.index(command.callback.__name__))  # type: ignore[union-attr]

__all__ = ["app", "family", "folders", "latency", "main", "pictures", "scores", "studies"]


def main() -> None:
    """Entry point: turns mistakes into one line and an exit status."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        app(standalone_mode=True)
    except RequestError as error:
        print(f"isocost: {error}", file=sys.stderr)
        sys.exit(2)
    except WorkError as error:
        print(f"isocost: {error}", file=sys.stderr)
        sys.exit(1)
