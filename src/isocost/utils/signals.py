"""When work is to stop: at a deadline, or once the process was asked to (SIGTERM). What is in hand is finished and kept."""

from __future__ import annotations

import signal
import threading
import time

_asked = threading.Event()


def stop_on_sigterm() -> None:
    """From now on SIGTERM asks for a stop, in place of ending the process at once; a second one does that."""

    def ask(_signal: int, _frame: object) -> None:
        _asked.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, ask)


def ask_to_stop() -> None:
    """What SIGTERM does, for another thread of this process."""
    _asked.set()


def was_asked() -> bool:
    """Whether the process was asked to stop."""
    return _asked.is_set()


def is_over(deadline: float | None) -> bool:
    """Whether `deadline`, a `time.monotonic()`, has passed, or the process was asked to stop."""
    return was_asked() or (deadline is not None and time.monotonic() > deadline)
