"""Trains a job repeatedly and kills it at random moments, until the number of kills is reached and every training has ended.

python tests/kill_worker.py JOB.json NUM_KILLS LONGEST_SECONDS SEED

Children are forked before this process computes anything, so each starts at once. The trainings' folders are `round-0`,
`round-1`, ... in the job's folder; the last line of output is their number.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from train_worker import run_job


def attempt(job: dict, seconds: float | None) -> bool:
    """Train in a child process, killed after some seconds; True where it ended by itself."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        run_job(job)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    assert status == 0, "a training that was killed before does not resume"
    return True


def main() -> None:
    """Train, kill and resume until all rounds are done."""
    job, num_kills, longest = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]), float(sys.argv[3])
    moments, root = random.Random(int(sys.argv[4])), Path(job["folder"])
    num_rounds = kills = 0
    while kills < num_kills:
        job["folder"] = str(root / f"round-{num_rounds}")
        Path(job["folder"]).mkdir(parents=True)
        while not attempt(job, moments.uniform(0, longest) if kills < num_kills else None):
            kills += 1
        num_rounds += 1
    print(num_rounds)


if __name__ == "__main__":
    main()
