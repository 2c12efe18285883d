"""A small real sweep that is killed at random moments: nothing is corrupted, little work is repeated, the table is unchanged.

    python benchmarks/kill_sweep.py [--quick] [--json] [--kills 100] [--way sqlite|postgresql|ray]

A network of width 8 is trained for seconds on the synthetic scenes. Its sweep of 24 points, with two shards of 64 images
each, is repeatedly killed (kill -9) and restarted with the same command; when a sweep finishes, a new one starts. With
`postgresql` the results database is in a server that is restarted too; with `ray` one of two actors is killed instead. Every
image that enters the engine and every shard that is written is logged, so repeated work can be counted, including warm-ups.
The work of Ray's actors is not logged, because they are not started by this file. The last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
from results import argument_parser, print_results

from isocost.config.base import parse_spec
from isocost.config.study import StudySpec
from isocost.pipeline.pipeline import Pipeline
from isocost.pipeline.workers import run_on_ray
from isocost.sweep import worker
from isocost.sweep.results_db import ResultsDB
from isocost.sweep.schema import HARDWARE_COLUMNS

LOG_VARIABLE = "ISOCOST_BENCHMARK_LOG"
MIN_S, MAX_S = 0.2, 6.0
"""Range of the time between the start of sampling and a kill."""
STUDY: dict[str, Any] = {
    "name": "killed",
    "data": {
        "resolution": 32,
        "train": {"kind": "scenes", "num_images": 256, "seed": 0},
        "reference": {"kind": "scenes", "num_images": 128, "seed": 1},
    },
    "autoencoder": {"kind": "pca", "patch": 4, "num_channels": 4, "num_fit_images": 64},
    "text_encoder": {"path": "minilm", "max_tokens": 8},
    "family": {"widths": [8]},
    "train": {"num_images": 256, "batch_size": 16, "lr": 1e-3},
    "sweep": {"num_steps": [2, 4, 6, 8], "guidance": [1, 1.5, 2, 3, 4, 5], "batch_size": 16, "shard_size": 64},
    "protocol": {"num_images": 128, "num_reference": 128, "num_bootstrap": 50, "alignment": "scenes"},
}


QUICK_SWEEP = {"num_steps": [2, 4], "guidance": [1, 2, 4]}
QUICK_KILLS = 2


def study(quick: bool) -> StudySpec:
    """The study, with fewer points if `quick`."""
    sweep = {**STUDY["sweep"], **(QUICK_SWEEP if quick else {})}
    return parse_spec(StudySpec, {**STUDY, "sweep": sweep}, "study")


def run_study(out: str, results_db: str | None, quick: bool) -> None:
    """Run the study in this process, and log every image that enters the engine and every shard that is written."""
    commit_shard, requests = worker.Worker._commit_shard, worker._requests

    def log(event: str, name: str) -> None:
        with Path(os.environ[LOG_VARIABLE]).open("a") as file:
            file.write(f"{event} {name}\n")

    def logged_commit(self: worker.Worker, builder: Any, *measurements: Any) -> None:
        commit_shard(self, builder, *measurements)
        log("written", builder.shard.digest)

    def logged_requests(shard: Any, schedule: Any) -> Iterator[Any]:
        for request in requests(shard, schedule):
            log("entered", f"{shard.digest}-{request.sample_index}")
            yield request

    worker.Worker._commit_shard = logged_commit  # type: ignore[method-assign]
    worker._requests = logged_requests
    Pipeline(study(quick), out, results_db).run()


def start(out: Path, results_db: str | None, log_file: Path, quick: bool) -> subprocess.Popen[bytes]:
    """Start `run_study` as a process."""
    command = [sys.executable, __file__, "--run-study", str(out), *(["--database", results_db] if results_db else [])]
    command += ["--quick"] if quick else []
    environment = {**os.environ, LOG_VARIABLE: str(log_file), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)


def kill_repeatedly(
    out: Path,
    results_db: str | None,
    log_file: Path,
    kills: int,
    quick: bool,
    report: Callable[[str], None],
    restart_server: Callable[[], None] | None = None,
) -> int:
    """Kill and restart a sweep until it finishes, at most `kills` times; returns the number of kills."""
    delays = random.Random(str(out))
    for number in range(kills):
        process = start(out, results_db, log_file, quick)
        is_sampling = _wait_for_sampling(out, process)
        try:
            process.wait(delays.uniform(MIN_S, MAX_S) if is_sampling else None)
            return number
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if restart_server is not None and number % 5 == 2:
            restart_server()
        report(f"kill {number + 1}: {len(list((out / 'artefacts').glob('point/*')))} points done")
    last = start(out, results_db, log_file, quick)
    assert last.wait(1200) == 0, "the last run failed"
    return kills


def _wait_for_sampling(out: Path, process: subprocess.Popen[bytes]) -> bool:
    """Wait until the process samples, so that kills hit the sweep; False if it ended before."""
    before = _progress(out)
    while process.poll() is None:
        if _progress(out) != before or any((out / "artefacts" / ".partial").glob(f"shard-*.{process.pid}")):
            return True
        time.sleep(0.02)
    return False


def _progress(out: Path) -> int:
    """A number that changes whenever a shard or a point is written."""
    return len(list((out / "artefacts").glob("shard/*"))) + 1000 * len(list((out / "artefacts").glob("point/*")))


def kill_actors(out: Path, kills: int, quick: bool) -> int:
    """Run the study with two actors on a Ray cluster of two nodes and kill one of them repeatedly; returns the kills."""
    import threading

    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    done, delays, count = threading.Event(), random.Random(0), [0]

    def kill() -> None:
        while not done.wait(delays.uniform(6, 14)) and count[0] < kills:
            actors = [p for p in psutil.process_iter(["cmdline"]) if "ray::RemoteWorker" in " ".join(p.info["cmdline"] or [])]
            if actors:
                delays.choice(actors).kill()
                count[0] += 1

    thread = threading.Thread(target=kill, daemon=True)
    try:
        Pipeline(study(quick), out).prepare()
        thread.start()
        assert run_on_ray(cluster.address, out, None, 2, None, None), "the cluster did not finish"
    finally:
        done.set()
        ray.shutdown()
        cluster.shutdown()
    return count[0]


@contextmanager
def postgresql(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """A PostgreSQL server: its address, and a function that restarts it."""
    import pgserver

    server = pgserver.get_server(folder)
    binaries = Path(pgserver.__file__).parent / "pginstall" / "bin" / "pg_ctl"

    def restart() -> None:
        user = {"user": "pgserver"} if os.geteuid() == 0 else {}
        subprocess.run([binaries, "-D", str(folder), "-m", "immediate", "-w", "restart"], check=True, stdout=-3, **user)

    try:
        yield server.get_uri(), restart
    finally:
        server.cleanup()


def killed_sweep(way: str, root: Path, kills: int, quick: bool, report: Callable[[str], None]) -> tuple[int, pd.DataFrame]:
    """Run one sweep that is killed at most `kills` times; returns the number of kills and the table."""
    out, log_file = root / "out", root / "log.txt"
    root.mkdir()
    root.chmod(0o755)
    if way == "postgresql":
        with postgresql(root / "pg") as (address, restart):
            count = kill_repeatedly(out, address, log_file, kills, quick, report, restart)
            return count, ResultsDB(address).table().drop(columns=HARDWARE_COLUMNS)
    count = kill_actors(out, kills, quick) if way == "ray" else kill_repeatedly(out, None, log_file, kills, quick, report)
    return count, ResultsDB(out / "results.sqlite").table().drop(columns=HARDWARE_COLUMNS)


def measure(way: str, kills: int, quick: bool, report: Callable[[str], None]) -> tuple[list[Any], list[Any]]:
    """Rows and targets."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        undisturbed_log = root / "undisturbed.txt"
        assert start(root / "undisturbed", None, undisturbed_log, quick).wait(1200) == 0, "the undisturbed run failed"
        expected = ResultsDB(root / "undisturbed" / "results.sqlite").table().drop(columns=HARDWARE_COLUMNS)
        num_shards = len(_logged(undisturbed_log, "written"))
        started = time.monotonic()
        count, num_sweeps, repeated_shards, repeated_images, leftovers, is_equal = 0, 0, 0, 0, 0, True
        while count < kills:
            sweep = root / f"sweep-{num_sweeps}"
            kills_of_sweep, table = killed_sweep(way, sweep, kills - count, quick, report)
            count, num_sweeps, is_equal = count + kills_of_sweep, num_sweeps + 1, is_equal and _are_equal(expected, table)
            written, entered = (_logged(sweep / "log.txt", event) for event in ("written", "entered"))
            repeated_shards += len(written) - len(set(written))
            repeated_images += len(entered) - len(set(entered))
            leftovers += len(list((sweep / "out" / "artefacts").glob("shard/*")))
            report(f"sweep {num_sweeps}: {kills_of_sweep} kills, table {'equal' if is_equal else 'DIFFERENT'}")
        seconds = time.monotonic() - started
    lost_shards = repeated_images / count / STUDY["sweep"]["shard_size"]
    numbers = {
        "kills": (count, ""),
        "sweeps": (num_sweeps, ""),
        "time with kills": (seconds, "s"),
        "shards per sweep": (num_shards, ""),
    }
    is_logged = way != "ray"
    if is_logged:
        numbers |= {"shards written twice": (repeated_shards, ""), "images sampled again": (repeated_images, "")}
    rows = [{"what": what, "value": value, "unit": unit, "low": None, "high": None} for what, (value, unit) in numbers.items()]
    targets = [
        {"what": "tables equal to that of an undisturbed run", "value": is_equal, "target": "true", "met": is_equal},
        {"what": "leftover shards", "value": leftovers, "target": "0", "met": leftovers == 0},
    ]
    if is_logged:
        what = "images sampled again per kill, in shards"
        targets += [
            {"what": "shards written twice", "value": repeated_shards, "target": "0", "met": repeated_shards == 0},
            {"what": what, "value": lost_shards, "target": "<= 1", "met": lost_shards <= 1},
        ]
    return rows, targets


def _logged(log_file: Path, event: str) -> list[str]:
    lines = log_file.read_text().splitlines() if log_file.is_file() else []
    return [line.partition(" ")[2] for line in lines if line.startswith(event)]


def _are_equal(expected: pd.DataFrame, actual: pd.DataFrame) -> bool:
    try:
        pd.testing.assert_frame_equal(expected, actual, check_dtype=False)
    except AssertionError as error:
        print(error, file=sys.stderr)
        return False
    return True


def main() -> None:
    parser = argument_parser(__doc__, quick=f"6 points, {QUICK_KILLS} kills; under a minute")
    parser.add_argument("--kills", type=int, default=100, help="total number of kills, in as many sweeps as needed")
    parser.add_argument(
        "--way", default="sqlite", choices=("sqlite", "postgresql", "ray"), help="database, or Ray actors, under test"
    )
    parser.add_argument("--run-study", help=argparse.SUPPRESS)
    parser.add_argument("--database", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run_study:
        run_study(arguments.run_study, arguments.database, arguments.quick)
        return

    def report(line: str) -> None:
        if not arguments.json:
            print(line, flush=True)

    kills = QUICK_KILLS if arguments.quick else arguments.kills
    rows, targets = measure(arguments.way, kills, arguments.quick, report)
    print_results("kill_sweep", rows, targets, way=arguments.way)


if __name__ == "__main__":
    main()
