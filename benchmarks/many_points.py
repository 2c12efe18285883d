"""A finished study of 10,000 points: time and memory of its plan, a repeated sweep and the report.

    python benchmarks/many_points.py [--quick] [--json]

A network of width 8 is trained for seconds. All points of its grid are recorded in the results database with synthetic
scores, so nothing is sampled. Then the plan, the sweep, which finds all points done, and the report are timed, and memory is
compared with that of 1,000 points. Each number of points runs in its own process. The last line is JSON.
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

from results import argument_parser, print_results
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
MAX_SECONDS = 60.0
MAX_MEMORY_RATIO = 2.0


def study(num_points: int) -> StudySpec:
    """A study with a grid of about `num_points` points, one quarter for each of the four solvers."""
    per_axis = math.isqrt(num_points // len(SOLVERS))
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
                "num_steps": list(range(1, per_axis + 1)),
                "guidance": [round(1 + 8 * k / per_axis, 4) for k in range(per_axis)],
            },
            "protocol": {"num_images": 32, "num_reference": 64, "num_bootstrap": 20},
        },
        "many",
    )


def record_synthetic_scores(pipeline: Pipeline) -> int:
    """Record every point of the study with a score that is best at guidance 3; return the number of points."""
    (run,) = pipeline.runs
    info = load_checkpoint(pipeline.store.folder("checkpoint", run.final)).info
    protocol = pipeline.assets.reference.protocol
    points = pipeline.points(run)
    shared = {"protocol": protocol.id, "num_nonfinite": 0, "min_batch_size": 64, "ms_per_image": 1.0, "seconds": 1.0}
    with Session(pipeline.results_db.engine) as session, session.begin():
        session.merge(ProtocolRecord(protocol=protocol.id, parts=json.dumps(protocol.parts)))
        for point in points:
            row = {**point.coordinate(), **point.costs(info), **summary_columns(info), **shared, "has_too_few_samples": False}
            session.add(PointRecord(**row, created="2026-01-01T00:00:00+00:00", provenance="{}"))
            value = 1 + 1 / point.spec.num_steps + 0.1 * math.log(point.spec.guidance / 3) ** 2
            session.add(
                ScoreRecord.from_interval(point.digest, "mmd_efficientnet", Interval(value, value - 0.05, value + 0.05))
            )
    return len(points)


def measure(num_points: int) -> dict[str, float]:
    """Seconds of plan, sweep and report, megabytes of the page and of memory."""
    with tempfile.TemporaryDirectory() as folder:
        first = Pipeline(study(num_points), folder)
        first.prepare()
        first.train(first.runs[0])
        num_recorded = record_synthetic_scores(first)
        first.close()
        result: dict[str, float] = {"points": num_recorded}
        pipeline = Pipeline(study(num_points), folder)
        started = time.perf_counter()
        planned = plan(pipeline)
        assert planned["sizes"][0]["points_to_make"] == 0, "all points are done"
        result["plan"] = time.perf_counter() - started
        started = time.perf_counter()
        assert pipeline.run(), "the sweep must find all points done"
        result["sweep"] = time.perf_counter() - started
        started = time.perf_counter()
        assert len(report(pipeline).table) == num_recorded
        result["report"] = time.perf_counter() - started
        result["page_mb"] = (Path(folder) / "report" / "index.html").stat().st_size / 1e6
    result["memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return result


UNITS = {"plan": "s", "sweep": "s", "report": "s", "page_mb": "MB", "memory_mb": "MB"}


def main() -> None:
    parser = argument_parser(__doc__, quick="100 and 400 points, under a minute")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    few, many = (100, 400) if arguments.quick else (1024, 10_000)
    results: dict[int, dict[str, Any]] = {}
    for number in (few, many):
        command = [sys.executable, __file__, "--measure", str(number)]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode:
            sys.exit(process.stderr)
        results[number] = json.loads(process.stdout.splitlines()[-1])
        if not arguments.json:
            print(results[number], flush=True)
    rows = [
        {"what": f"{int(result['points'])} points: {what}", "value": value, "unit": UNITS[what], "low": None, "high": None}
        for result in results.values()
        for what, value in result.items()
        if what != "points"
    ]
    seconds = sum(results[many][what] for what in ("plan", "sweep", "report"))
    growth = results[many]["memory_mb"] / results[few]["memory_mb"]
    targets = [
        {"what": f"{many} points: plan, sweep and report", "value": seconds, "target": "< 60 s", "met": seconds < MAX_SECONDS},
        {"what": f"memory, {many} / {few} points", "value": growth, "target": "< 2", "met": growth < MAX_MEMORY_RATIO},
    ]
    print_results("many_points", rows, targets)


if __name__ == "__main__":
    main()
