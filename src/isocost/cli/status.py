"""The table of `isocost status`."""

from __future__ import annotations

import time
from pathlib import Path

from rich.live import Live
from rich.table import Table

from isocost.analysis.formatting import format_metric, format_score
from isocost.pipeline.status import SizeStatus, Status, read_status
from isocost.utils.progress import console

REFRESH_S = 2.0


def status_table(status: Status) -> Table:
    """The sizes as rows, and the totals of the study below."""
    title = f"{status.study}: {status.stage}"
    table = Table(title=title, caption=_format_totals(status), title_justify="left", caption_justify="left")
    for column, justify in (("size", "left"), ("images", "right"), ("points", "right"), ("open races", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_column("sampling time", justify="right")
    table.add_column("best so far")
    for size in status.sizes:
        table.add_row(
            f"{size.size} ({size.title})",
            f"{size.images_seen:,}/{size.num_images:,}",
            f"{size.points_done}/{size.num_points}",
            str(size.open_races),
            format_duration(size.spent_s),
            _format_best(size),
        )
    return table


def watch(out: Path) -> Status:
    """Show the status of an output folder until its run has ended; returns the last status."""
    status = read_status(out)
    with Live(status_table(status), console=console, auto_refresh=False) as live:
        while status.stage not in ("done", "stopped"):
            time.sleep(REFRESH_S)
            status = read_status(out)
            live.update(status_table(status), refresh=True)
    return status


def format_duration(seconds: float) -> str:
    """Format seconds: "3.4 h", "12 min", "40 s"."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _format_best(size: SizeStatus) -> str:
    best = size.best
    if best is None:
        return ""
    score = f"{format_metric(best.metric)} {format_score(best.value, best.low, best.high)}"
    steps = "1 step" if best.num_steps == 1 else f"{best.num_steps} steps"
    return f"{score} ({steps}, guidance {best.guidance:g}, {best.solver})"


def _format_totals(status: Status) -> str:
    left = "unknown" if status.left_s is None else f"about {format_duration(status.left_s)}"
    workers = "1 process" if status.num_workers == 1 else f"{status.num_workers} processes"
    return f"{workers} running; sampling time {format_duration(status.spent_s)}, remaining {left}; updated {status.updated}"
