"""The command line. Progress and messages go to stderr; the last line on stdout is one JSON document.

Exit status: 0 done (or stopped by --stop-after), 1 the work failed, 2 the request was wrong.
"""

from __future__ import annotations

import io
import sys
import warnings

from safetensors import SafetensorError

from isocost.cli import (
    benchmark,
    checkpoint,
    drift,
    evaluate,
    list_names,
    model_family,
    output_dir,
    recommend,
    study,
    timesteps,
)
from isocost.cli.app import app
from isocost.errors import ConfigError, RunError
from isocost.utils.output_paths import WRONG_PATH_ERRORS, os_error_message
from isocost.utils.progress import log_messages_on_stderr

ORDER = (
    *("demo", "family", "run", "autoencoder", "train", "sweep", "remeasure", "worker", "status", "merge", "archive", "report"),
    *("dreambooth", "recommend", "compare"),
    *("sample", "upscale", "latency", "optimize-timesteps", "export", "drift", "score", "reference", "verify", "list"),
)
"""Order of the commands in `isocost --help`: studies, checkpoints, scores."""
app.registered_commands.sort(key=lambda command: ORDER.index(command.name or command.callback.__name__))  # type: ignore[union-attr]

__all__ = [
    "app",
    "benchmark",
    "checkpoint",
    "drift",
    "evaluate",
    "list_names",
    "main",
    "model_family",
    "output_dir",
    "recommend",
    "study",
    "timesteps",
]


def main() -> None:
    """Run the command of `sys.argv`; an error becomes one line on stderr and an exit status."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    if isinstance(sys.stderr, io.TextIOWrapper):  # a name or caption that the terminal cannot show must not end a run
        sys.stderr.reconfigure(errors="backslashreplace")
    try:
        with log_messages_on_stderr():
            app(standalone_mode=True)
    except ConfigError as error:
        print(f"isocost: {_one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
    except (RunError, SafetensorError) as error:  # SafetensorError: a file of weights could not be written
        print(f"isocost: {_one_line(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(f"isocost: {_one_line(os_error_message(error))}", file=sys.stderr)
        sys.exit(2 if error.errno in WRONG_PATH_ERRORS else 1)


def _one_line(message: str) -> str:
    """A message with its control characters as escapes; file names can have them, and a terminal would obey them."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in message)
