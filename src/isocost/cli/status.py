"""The table that `isocost status` draws."""

from __future__ import annotations

import time
from pathlib import Path

from rich.live import Live
from rich.table import Table

from isocost.analysis.formatting import format_metric, format_score
from isocost.pipeline.status import SizeStatus, Status, read_status
from isocost.utils.progress import console

REDRAW_S = 2.0


def drawn(status: Status) -> Table:
    """Sizes as rows, the whole beneath them."""
    table = Table(title=f"{status.study}: {status.stage}", caption=_whole(status), title_justify="left", caption_justify="left")
    for title, justify in (("size", "left"), ("images", "right"), ("points", "right"), ("races open", "right")):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    table.add_column("sampled for", justify="right")
    table.add_column("best so far")
    for size in status.sizes:
        table.add_row(
            f"{size.size} ({size.title})",
            f"{size.images_seen:,}/{size.num_images:,}",
            f"{size.points_done}/{size.num_points}",
            str(size.open_races),
            duration(size.spent_s),
            _best(size),
        )
    return table


def follow(out: Path) -> Status:
    """Draw an output folder's status until its run has ended; returns the last one."""
    status = read_status(out)
    with Live(drawn(status), console=console, auto_refresh=False) as live:
        while status.stage not in ("done", "stopped"):
            time.sleep(REDRAW_S)
            status = read_status(out)
            live.update(drawn(status), refresh=True)
    return status


def duration(seconds: float) -> str:
    """ "3.4 h", "12 min", "40 s"."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _best(size: SizeStatus) -> str:
    best = size.best
    if best is None:
        return ""
    score = f"{format_metric(best.metric)} {format_score(best.value, best.low, best.high)}"
    steps = "1 step" if best.num_steps == 1 else f"{best.num_steps} steps"
    return f"{score} ({steps}, guidance {best.guidance:g}, {best.solver})"


def _whole(status: Status) -> str:
    left = "not known yet" if status.left_s is None else f"about {duration(status.left_s)}"
    workers = "1 process" if status.num_workers == 1 else f"{status.num_workers} processes"
    return f"{workers} at work; sampled for {duration(status.spent_s)}, sampling left: {left}; {status.updated}"
