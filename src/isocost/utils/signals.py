"""When work is to stop: at a deadline, or once the process was asked to (SIGTERM). What is in hand is finished and kept."""

from __future__ import annotations

import signal
import threading
import time

_stop_flag = threading.Event()


def stop_on_sigterm() -> None:
    """From now on SIGTERM asks for a stop, in place of ending the process at once; a second one does that."""

    def ask(_signal: int, _frame: object) -> None:
        _stop_flag.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, ask)


def request_stop() -> None:
    """What SIGTERM does, for another thread of this process."""
    _stop_flag.set()


def stop_requested() -> bool:
    """Whether the process was asked to stop."""
    return _stop_flag.is_set()


def deadline_passed(deadline: float | None) -> bool:
    """Whether `deadline`, a `time.monotonic()`, has passed, or the process was asked to stop."""
    return stop_requested() or (deadline is not None and time.monotonic() > deadline)
