"""Ten thousand points: planned, skipped because they are there, and reported; seconds and memory beside a thousand's.

    python benchmarks/many_points.py [--quick] [--json]

A network of width 8 is trained for seconds; its grid's points are recorded in the results database with planted scores, so that nothing
is drawn. Then the plan, the sweep that finds all of them done, and the report are timed, each number of points in a process of
its own. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from results import print_results
from sqlalchemy.orm import Session

from isocost.config.base import parse_spec
from isocost.config.study import StudySpec
from isocost.evaluation.confidence_intervals import Interval
from isocost.models.checkpoint import load_checkpoint, summary_columns
from isocost.pipeline.dry_run import plan
from isocost.pipeline.pipeline import Pipeline
from isocost.report.build import report
from isocost.sweep.schema import PointRecord, ProtocolRecord, ScoreRecord

SOLVERS = ("ddim", "dpmsolver++2m", "euler", "unipc")
MOST_SECONDS = 60.0
MOST_GROWTH = 2.0


def study(num_points: int) -> StudySpec:
    """A grid of so many points: four solvers, a quarter of them each."""
    side = math.isqrt(num_points // len(SOLVERS))
    return parse_spec(
        StudySpec,
        {
            "name": "many",
            "data": {
                "resolution": 32,
                "train": {"kind": "scenes", "num_images": 128, "seed": 0},
                "reference": {"kind": "scenes", "num_images": 64, "seed": 1},
            },
            "autoencoder": {"kind": "pca", "patch": 4, "num_channels": 4, "num_fit_images": 64},
            "text_encoder": {"path": "minilm", "max_tokens": 8},
            "family": {"widths": [8]},
            "train": {"num_images": 64, "batch_size": 16, "lr": 1e-3},
            "sweep": {
                "solvers": [{"name": name} for name in SOLVERS],
                "num_steps": list(range(1, side + 1)),
                "guidance": [round(1 + 8 * k / side, 4) for k in range(side)],
            },
            "protocol": {"num_images": 32, "num_reference": 64, "num_bootstrap": 20},
        },
        "many",
    )


def plant(pipeline: Pipeline) -> int:
    """Record every point of the study with a score that has its best at guidance 3."""
    (run,) = pipeline.runs
    info = load_checkpoint(pipeline.store.folder("checkpoint", run.final)).info
    protocol = pipeline.assets.reference.protocol
    points = pipeline.points(run)
    same = {"protocol": protocol.id, "num_nonfinite": 0, "min_batch_size": 64, "ms_per_image": 1.0, "seconds": 1.0}
    with Session(pipeline.results_db.engine) as session, session.begin():
        session.merge(ProtocolRecord(protocol=protocol.id, parts=json.dumps(protocol.parts)))
        for point in points:
            row = {**point.coordinate(), **point.costs(info), **summary_columns(info), **same, "has_too_few_samples": False}
            session.add(PointRecord(**row, created="2026-01-01T00:00:00+00:00", provenance="{}"))
            value = 1 + 1 / point.spec.num_steps + 0.1 * math.log(point.spec.guidance / 3) ** 2
            session.add(ScoreRecord.of(point.digest, "mmd_efficientnet", Interval(value, value - 0.05, value + 0.05)))
    return len(points)


def work(num_points: int) -> dict[str, float]:
    """Seconds of plan, sweep and report, and megabytes at most."""
    with tempfile.TemporaryDirectory() as folder:
        first = Pipeline(study(num_points), folder)
        first.prepare()
        first.train(first.runs[0])
        planted = plant(first)
        first.close()
        told: dict[str, float] = {"points": planted}
        pipeline = Pipeline(study(num_points), folder)
        started = time.perf_counter()
        planned = plan(pipeline)
        assert planned["sizes"][0]["points_to_make"] == 0, "nothing is left to do"
        told["plan"] = time.perf_counter() - started
        started = time.perf_counter()
        assert pipeline.run(), "nothing is drawn"
        told["sweep"] = time.perf_counter() - started
        started = time.perf_counter()
        assert len(report(pipeline).table) == planted
        told["report"] = time.perf_counter() - started
        told["page_mb"] = (Path(folder) / "report" / "index.html").stat().st_size / 1e6
    told["memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return told


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="400 and 1,600 points")
    options.add_argument("--json", action="store_true", help="the JSON line alone")
    options.add_argument("--work", type=int, help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.work:
        print(json.dumps(work(asked.work)))
        return
    few, many = (400, 1600) if asked.quick else (1024, 10_000)
    told: dict[int, dict[str, Any]] = {}
    for number in (few, many):
        ended = subprocess.run([sys.executable, __file__, "--work", str(number)], capture_output=True, text=True, check=True)
        told[number] = json.loads(ended.stdout.splitlines()[-1])
        if not asked.json:
            print(told[number], flush=True)
    rows = [
        {"what": f"{int(of['points'])} points: {what}", "value": value, "unit": "", "low": None, "high": None}
        for of in told.values()
        for what, value in of.items()
        if what != "points"
    ]
    seconds = sum(told[many][what] for what in ("plan", "sweep", "report"))
    growth = told[many]["memory_mb"] / told[few]["memory_mb"]
    targets = [
        {"what": f"{many} points, seconds", "value": seconds, "target": "< 60", "met": seconds < MOST_SECONDS},
        {"what": "memory, of that of the few", "value": growth, "target": "< 2", "met": growth < MOST_GROWTH},
    ]
    print_results("many_points", rows, targets)


if __name__ == "__main__":
    main()
