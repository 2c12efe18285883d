"""Progress on stderr: a bar a stage at a terminal, a line now and then in a log file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

console = Console(stderr=True, soft_wrap=True, quiet=os.environ.get("RANK", "0") != "0")
"""Of several processes that torchrun started, the first one speaks."""
SECONDS_BETWEEN_LINES = 20.0

Report = Callable[[int, str], None]


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.0f} {task.fields['unit']}/s" if speed else "")


@contextmanager
def progress_bar(title: str, total: int, unit: str, done: int = 0) -> Iterator[Report]:
    """Progress of a stage; call the result with how many units are done in all and a word on how it stands."""
    if not console.is_terminal:
        yield _lines(title, total, unit, done)
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


def say(message: str) -> None:
    """One line for the person at the terminal."""
    console.print(message, highlight=False, markup=False)


def _lines(title: str, total: int, unit: str, done: int) -> Report:
    started = last = time.monotonic()

    def report(completed: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < SECONDS_BETWEEN_LINES and completed < total:
            return
        last = now
        rate = (completed - done) / max(now - started, 1e-9)
        left = (total - completed) / rate if rate > 0 else 0.0
        say(f"{title}: {completed}/{total} {unit}, {rate:.1f} {unit}/s, {left:.0f} s left  {note}")

    return report
