"""Kills at random moments of a small real sweep: nothing is corrupt, little is done twice, and the table is as if undisturbed.

    python benchmarks/kill_sweep.py [--quick] [--json] [--kills 100] [--way sqlite|postgresql|ray]

A network of width 8 is trained for seconds on the embedded scenes; its sweep of 24 points, two shards of 64 images each, is
killed (kill -9) again and again, and begun again by the same command; a new sweep begins when it is at its end. `postgresql`
keeps the results database in a server that is restarted meanwhile; `ray` kills one of two actors instead. Every image that enters the
engine and every shard that is made is noted, so what was done twice can be counted, warm-ups included; not in Ray's actors,
whose processes are not of this file. The last line is JSON.
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
from results import print_results

from isocost.config.base import parse_spec
from isocost.config.study import StudySpec
from isocost.pipeline.pipeline import Pipeline
from isocost.pipeline.workers import run_on_ray
from isocost.sweep import worker as workers
from isocost.sweep.results_db import ResultsDB
from isocost.sweep.schema import HARDWARE_COLUMNS

NOTES = "ISOCOST_SHARDS_MADE"
LEAST_S, MOST_S = 0.2, 6.0
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


def work(out: str, results_db: str | None) -> None:
    """One process at the study; notes every shard that it has made."""
    keep = workers.Worker._keep

    def note(what: str, digest: str) -> None:
        with Path(os.environ[NOTES]).open("a") as file:
            file.write(f"{what} {digest}\n")

    def noted(this: workers.Worker, made: Any, *measured: Any) -> None:
        keep(this, made, *measured)
        note("made", made.shard.digest)

    entering = workers._rows

    def noted_rows(shard: Any, schedule: Any) -> Iterator[Any]:
        for row in entering(shard, schedule):
            note("entered", f"{shard.digest}-{row.sample_index}")
            yield row

    workers.Worker._keep = noted  # type: ignore[method-assign]
    workers._rows = noted_rows
    Pipeline(parse_spec(StudySpec, STUDY, "study"), out, results_db).run()


def start(out: Path, results_db: str | None, notes: Path) -> subprocess.Popen[bytes]:
    """`work` as a process of its own."""
    command = [sys.executable, __file__, "--work", str(out), *(["--database", results_db] if results_db else [])]
    environment = {**os.environ, NOTES: str(notes), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)


def killed(out: Path, results_db: str | None, notes: Path, kills: int, told: Callable[[str], None], restart: Any = None) -> int:
    """Kill and begin again; returns how many kills there were before it came to its end."""
    moments = random.Random(str(out))
    for number in range(kills):
        process = start(out, results_db, notes)
        begun = _ready(out, process)
        try:
            process.wait(moments.uniform(LEAST_S, MOST_S) if begun else None)
            return number
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if restart is not None and number % 5 == 2:
            restart()
        told(f"kill {number + 1}: {len(list((out / 'artefacts').glob('point/*')))} of 24 points")
    last = start(out, results_db, notes)
    assert last.wait(1200) == 0, "the last run failed"
    return kills


def _ready(out: Path, process: subprocess.Popen[bytes]) -> bool:
    """Wait until the process has begun to sample, so that kills fall into the sweep; False where it ended before."""
    before = _num_claims(out)
    while process.poll() is None:
        if _num_claims(out) != before or any((out / "artefacts" / ".partial").glob(f"shard-*.{process.pid}")):
            return True
        time.sleep(0.02)
    return False


def _num_claims(out: Path) -> int:
    return len(list((out / "artefacts").glob("shard/*"))) + 1000 * len(list((out / "artefacts").glob("point/*")))


def on_ray(out: Path, kills: int) -> int:
    """Two actors on a cluster of two nodes; one of them is killed again and again while they work."""
    import threading

    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    done, moments, count = threading.Event(), random.Random(0), [0]

    def kill() -> None:
        while not done.wait(moments.uniform(6, 14)) and count[0] < kills:
            actors = [p for p in psutil.process_iter(["cmdline"]) if "ray::Helper" in " ".join(p.info["cmdline"] or [])]
            if actors:
                moments.choice(actors).kill()
                count[0] += 1

    thread = threading.Thread(target=kill, daemon=True)
    try:
        Pipeline(parse_spec(StudySpec, STUDY, "study"), out).prepare()
        thread.start()
        assert run_on_ray(cluster.address, out, None, 2, None, None), "the cluster did not finish"
    finally:
        done.set()
        ray.shutdown()
        cluster.shutdown()
    return count[0]


@contextmanager
def postgresql(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Address of a server of its own, and what restarts it."""
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


def disturbed(way: str, root: Path, kills: int, told: Callable[[str], None]) -> tuple[int, pd.DataFrame]:
    """One sweep that is killed until it ends, `kills` times at most: how often, and its table."""
    out, notes = root / "out", root / "notes.txt"
    root.mkdir()
    root.chmod(0o755)
    if way == "postgresql":
        with postgresql(root / "pg") as (address, restart):
            count = killed(out, address, notes, kills, told, restart)
            return count, ResultsDB(address).table().drop(columns=HARDWARE_COLUMNS)
    count = on_ray(out, kills) if way == "ray" else killed(out, None, notes, kills, told)
    return count, ResultsDB(out / "results.sqlite").table().drop(columns=HARDWARE_COLUMNS)


def measure(way: str, kills: int, told: Callable[[str], None]) -> tuple[list[Any], list[Any]]:
    """Rows and targets."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        alone_notes = root / "alone.txt"
        assert start(root / "alone", None, alone_notes).wait(1200) == 0, "the undisturbed run failed"
        alone = ResultsDB(root / "alone" / "results.sqlite").table().drop(columns=HARDWARE_COLUMNS)
        num_shards = len(_noted(alone_notes, "made"))
        started = time.monotonic()
        count, sweeps, twice, again, leftovers, same = 0, 0, 0, 0, 0, True
        while count < kills:
            place = root / f"sweep-{sweeps}"
            killed_here, table = disturbed(way, place, kills - count, told)
            count, sweeps, same = count + killed_here, sweeps + 1, same and _same(alone, table)
            made, entered = (_noted(place / "notes.txt", what) for what in ("made", "entered"))
            twice, again = twice + len(made) - len(set(made)), again + len(entered) - len(set(entered))
            leftovers += len(list((place / "out" / "artefacts").glob("shard/*")))
            told(f"sweep {sweeps}: {killed_here} kills, table {'the same' if same else 'not the same'}")
        seconds = time.monotonic() - started
    lost = again / count / STUDY["sweep"]["shard_size"]
    numbers = {"kills": count, "sweeps": sweeps, "seconds with kills": seconds, "shards of a sweep": num_shards}
    is_noted = way != "ray"
    if is_noted:
        numbers |= {"shards made durable twice": twice, "images begun again": again}
    rows = [{"what": what, "value": value, "unit": "", "low": None, "high": None} for what, value in numbers.items()]
    targets = [
        {"what": "tables identical to an undisturbed run's", "value": same, "target": "true", "met": same},
        {"what": "shards left over", "value": leftovers, "target": "0", "met": leftovers == 0},
    ]
    if is_noted:
        targets += [
            {"what": "durable shards made again", "value": twice, "target": "0", "met": twice == 0},
            {"what": "images begun again a kill, in shards", "value": lost, "target": "<= 1", "met": lost <= 1},
        ]
    return rows, targets


def _noted(notes: Path, what: str) -> list[str]:
    lines = notes.read_text().splitlines() if notes.is_file() else []
    return [line.partition(" ")[2] for line in lines if line.startswith(what)]


def _same(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    try:
        pd.testing.assert_frame_equal(one, other, check_dtype=False)
    except AssertionError as error:
        print(error, file=sys.stderr)
        return False
    return True


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="three kills")
    options.add_argument("--json", action="store_true", help="the JSON line alone")
    options.add_argument("--kills", type=int, default=100, help="over as many sweeps as it takes")
    options.add_argument("--way", default="sqlite", choices=("sqlite", "postgresql", "ray"))
    options.add_argument("--work", help=argparse.SUPPRESS)
    options.add_argument("--database", help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.work:
        work(asked.work, asked.results_db)
        return

    def told(line: str) -> None:
        if not asked.json:
            print(line, flush=True)

    rows, targets = measure(asked.way, 3 if asked.quick else asked.kills, told)
    print_results("kill_sweep", rows, targets, way=asked.way)


if __name__ == "__main__":
    main()
