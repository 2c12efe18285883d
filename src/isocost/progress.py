"""Progress on stderr: one bar a stage, with rate and time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

console = Console(stderr=True)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.0f} {task.fields['unit']}/s" if speed else "")


@contextmanager
def progress_bar(title: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """A bar; call the result with how many units are done in all and a word on how it stands (a loss, a point)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=not console.is_terminal, refresh_per_second=4) as bars:
        task = bars.add_task(title, total=total, completed=done, unit=unit, note="")
        yield lambda completed, note: bars.update(task, completed=completed, note=note)


def say(message: str) -> None:
    """One line for the person at the terminal."""
    console.print(message, highlight=False, markup=False)
