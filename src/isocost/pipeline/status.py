"""The progress of a study in `OUT/status.json`, written by the processes that work on it.

All numbers come from the results database, so the file is complete whichever process writes it. The winners of unfinished
guidance searches are not counted yet. The remaining time is estimated from the finished points; it is None
while no point is finished.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from isocost.errors import ConfigError
from isocost.evaluation.metric_registry import metric_of
from isocost.utils.artifact_store import write_atomically

STATUS_FILE = "status.json"
WRITE_INTERVAL_S = 10.0


@dataclass(frozen=True)
class PlannedPoint:
    """A point of the sweep. `gflop` is the cost of all its images."""

    digest: str
    gflop: float


@dataclass(frozen=True)
class Best:
    """The best point so far."""

    metric: str
    value: float
    low: float
    high: float
    size: str
    solver: str
    num_steps: int
    guidance: float


@dataclass(frozen=True)
class SizeStatus:
    """One training and its sweep. `best` is None if nothing is scored yet."""

    title: str
    size: str
    images_seen: int
    num_images: int
    points_done: int
    num_points: int
    open_races: int
    spent_s: float
    best: Best | None


@dataclass(frozen=True)
class Status:
    """The progress of a study. `left_s` counts only sampling, by the present number of workers."""

    study: str
    stage: str
    updated: str
    num_workers: int
    spent_s: float
    left_s: float | None
    sizes: Sequence[SizeStatus]


def size_status(
    title: str,
    size: str,
    images_seen: int,
    num_images: int,
    points: Sequence[PlannedPoint],
    open_races: int,
    scored: Mapping[str, Mapping[str, Any]],
    metric: str,
) -> SizeStatus:
    """The progress of one training and its sweep.

    Args:
        scored: rows of the results database by point, with the columns of `metric`, its interval, and `seconds`.
    """
    done = [scored[point.digest] for point in points if point.digest in scored]
    sign = -1.0 if metric_of(metric).better == "higher" else 1.0
    with_score = [row for row in done if row.get(metric) is not None and row[metric] == row[metric]]  # not NaN
    best = min(with_score, key=lambda row: sign * row[metric], default=None)
    return SizeStatus(
        title,
        size,
        images_seen,
        num_images,
        len(done),
        len(points),
        open_races,
        sum(row["seconds"] for row in done),
        None
        if best is None
        else Best(
            metric,
            best[metric],
            best[f"{metric}_low"],
            best[f"{metric}_high"],
            best["size"],
            best["solver"],
            int(best["num_steps"]),
            best["guidance"],
        ),
    )


def seconds_left(points: Sequence[PlannedPoint], scored: Mapping[str, Mapping[str, Any]], num_workers: int) -> float | None:
    """Seconds that the missing points will take at the rate of the finished ones; None if none is finished."""
    done = [point for point in points if point.digest in scored]
    gflop = sum(point.gflop for point in done)
    if not gflop:
        return None
    rate = sum(scored[point.digest]["seconds"] for point in done) / gflop
    return rate * sum(point.gflop for point in points if point.digest not in scored) / max(num_workers, 1)


class StatusFile:
    """`OUT/status.json`, written every `WRITE_INTERVAL_S` seconds at most."""

    def __init__(self, out: Path) -> None:
        self.file, self.last_written = out / STATUS_FILE, -WRITE_INTERVAL_S

    def is_due(self) -> bool:
        """Whether it is time to write again."""
        return time.monotonic() - self.last_written >= WRITE_INTERVAL_S

    def write(self, status: Status) -> None:
        """Replace the file in one step."""
        self.last_written = time.monotonic()
        write_atomically(self.file, json.dumps(asdict(status), ensure_ascii=False, indent=1) + "\n")


def read_status(out: Path) -> Status:
    """Read the status file of an output folder.

    Raises:
        ConfigError: the folder has none, or it is damaged.
    """
    file = out / STATUS_FILE
    if not file.is_file():
        raise ConfigError(f"{out}: no {STATUS_FILE}; `isocost run` writes one while it runs")
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        sizes = [SizeStatus(**{**size, "best": Best(**size["best"]) if size["best"] else None}) for size in plain["sizes"]]
        return Status(**{**plain, "sizes": sizes})
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{file}: damaged; remove it, and `isocost run` writes it again while it runs") from error


def now() -> str:
    """The UTC time, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
