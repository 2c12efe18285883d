"""Progress on stderr: a bar for each stage at a terminal, a line from time to time in a log file."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

logger = logging.getLogger(__name__)

console = Console(stderr=True, soft_wrap=True, quiet=os.environ.get("RANK", "0") != "0")
"""Of several processes that torchrun started, only the first one prints."""
SECONDS_BETWEEN_LINES = 20.0

Report = Callable[[int, str], None]
"""Called with the number of units done so far and a short note."""


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.0f} {task.fields['unit']}/s" if speed else "")


@contextmanager
def progress_bar(title: str, total: int, unit: str, done: int = 0) -> Iterator[Report]:
    """Show the progress of a stage.

    Args:
        title: name of the stage.
        total: number of units of the whole stage.
        unit: name of the units: "images", "points".
        done: units that an earlier run has done.

    Yields:
        A function to call with the number of units done in all and a note that is shown with it.
    """
    if not console.is_terminal:
        yield _log_lines(title, total, unit, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as bars:
        task = bars.add_task(title, total=total, completed=done, unit=unit, note="")
        yield lambda completed, note: bars.update(task, completed=completed, note=note)


class ConsoleHandler(logging.Handler):
    """Prints a log message as a plain line on stderr, above a progress bar that is shown there."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message of `record` on the console of the progress bars."""
        console.print(self.format(record), highlight=False, markup=False)


@contextmanager
def log_messages_on_stderr() -> Iterator[None]:
    """Print the messages of isocost's loggers (level INFO and above) on stderr while the block runs."""
    package_logger = logging.getLogger("isocost")
    handler, level, propagate = ConsoleHandler(), package_logger.level, package_logger.propagate
    package_logger.addHandler(handler)
    package_logger.setLevel(logging.INFO)
    package_logger.propagate = False  # another library's handler of the root logger would print them twice
    try:
        yield
    finally:
        package_logger.removeHandler(handler)
        package_logger.setLevel(level)
        package_logger.propagate = propagate


def _log_lines(title: str, total: int, unit: str, done: int) -> Report:
    started = last = time.monotonic()

    def report(completed: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < SECONDS_BETWEEN_LINES and completed < total:
            return
        last = now
        rate = (completed - done) / max(now - started, 1e-9)
        seconds_left = (total - completed) / rate if rate > 0 else 0.0
        logger.info(f"{title}: {completed}/{total} {unit}, {rate:.1f} {unit}/s, {seconds_left:.0f} s left  {note}")

    return report


@contextmanager
def no_library_progress() -> Iterator[None]:
    """Hide the progress bars of transformers and diffusers for local files. They would stand between isocost's own lines."""
    modules = [sys.modules.get(f"{library}.utils.logging") for library in ("transformers", "diffusers")]
    shown = [module for module in modules if module is not None and module.is_progress_bar_enabled()]
    for module in shown:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in shown:
            module.enable_progress_bar()
