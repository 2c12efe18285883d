"""Stop requests: by a deadline or by SIGTERM. The shard or training step in progress is finished and saved first."""

from __future__ import annotations

import signal
import threading
import time

_stop_flag = threading.Event()


def stop_on_sigterm() -> None:
    """Make the first SIGTERM request a stop; a second one ends the process at once."""

    def handle(_signal: int, _frame: object) -> None:
        _stop_flag.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, handle)


def request_stop() -> None:
    """Request a stop from another thread of this process, as SIGTERM does."""
    _stop_flag.set()


def stop_requested() -> bool:
    """Whether a stop was requested."""
    return _stop_flag.is_set()


def deadline_passed(deadline: float | None) -> bool:
    """Whether `deadline`, a `time.monotonic()`, has passed, or a stop was requested."""
    return stop_requested() or (deadline is not None and time.monotonic() > deadline)
