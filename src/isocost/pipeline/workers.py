"""Several processes that work on one study: on this machine, on other machines, or in a Ray cluster.

Each worker opens the output folder, leases work that no other worker has, and ends when all work is done. The workers need a
shared disk for the folder and one results database.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from isocost.errors import ConfigError, RunError
from isocost.pipeline.compatibility import STUDY_FILE, read_study_file
from isocost.pipeline.pipeline import Pipeline
from isocost.utils.signals import request_stop, stop_requested

logger = logging.getLogger(__name__)

RETRY_S = 2.0
CONNECT_TIMEOUT_S = 5.0


def work(out: str | Path, results_db: str | None = None, deadline: float | None = None, tasks: Any = None) -> bool:
    """Work on the study of an output folder until it is done; False if the deadline came first.

    Raises:
        ConfigError: no run was started in the folder.
    """
    file = Path(out) / STUDY_FILE
    if not file.is_file():
        raise ConfigError(f"{out}: nothing to join, it has no {STUDY_FILE}; `isocost run STUDY --out {out}` starts a run")
    return Pipeline(read_study_file(Path(out)), out, results_db).run(deadline, tasks)


class LocalWorkers:
    """Additional processes on this machine, one per device, each with an equal part of the cores."""

    def __init__(self, number: int) -> None:
        """
        Args:
            number: processes in all, with this one, whose threads are limited in the same way.
        """
        self.number = number
        self.threads = max(1, (os.cpu_count() or 1) // number)
        torch.set_num_threads(self.threads)
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, out: Path, results_db: str | None, stop_after: float | None, tasks: list[str] | None) -> None:
        """Start the workers on an output folder that exists."""
        command = [sys.executable, "-m", "isocost", "worker", str(out)]
        command += ["--database", results_db] if results_db else []
        command += ["--stop-after", str(stop_after)] if stop_after else []
        for task in tasks or ():
            command += ["--task", task]
        devices = torch.cuda.device_count()
        for number in range(1, self.number):
            variables = {"OMP_NUM_THREADS": str(self.threads)}
            if devices:
                variables["CUDA_VISIBLE_DEVICES"] = str(number % devices)
            self.processes.append(subprocess.Popen(command, env={**os.environ, **variables}, stdout=subprocess.DEVNULL))

    def wait(self) -> None:
        """Wait until the workers have ended. If a worker failed, the others did its work, and a warning is logged."""
        for process in self.processes:
            if process.wait():
                logger.warning(f"a worker ended with exit status {process.returncode}; the others did its work")

    def stop(self) -> None:
        """End the workers that still run."""
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
                process.wait()


def _check_reachable(address: str) -> None:
    """Raise OSError if nothing listens at HOST:PORT; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()


def run_on_ray(
    address: str, out: Path, results_db: str | None, number: int | None, stop_after: float | None, tasks: list[str] | None
) -> bool:
    """Work on `out` with actors of a Ray cluster; True when all is done.

    When a node is lost, its leases expire, other workers repeat the work it had leased, and another actor is started.

    Args:
        address: of the cluster, HOST:PORT or "auto".
        out: the output folder, on a disk that all nodes share.
        results_db: address of a database in place of the folder's own file.
        number: actors; one for each device of the cluster where None.
        stop_after: hours after which the actors stop.
        tasks: only the trainings of these tasks; all where None.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers at the address.
        RunError: an actor failed for another reason than a lost node.
    """
    try:
        import ray
        from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError
    except ImportError as error:
        raise ConfigError("--ray: Ray is not installed: pip install 'isocost[ray]'") from error
    if not ray.is_initialized():
        try:
            _check_reachable(address)
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"--ray {address}: no cluster answers there ({reason}); `ray start --head` starts one") from error
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    num_actors = number or num_gpus or max(1, len([node for node in ray.nodes() if node["Alive"]]))
    device: dict[str, Any] = {"num_gpus": 1} if num_gpus else {"num_cpus": 1}

    @ray.remote(**device)
    class RemoteWorker:  # its methods get a `remote` from Ray
        """A process with one device."""

        def work(self, folder: str, database: str | None, hours: float | None, only_tasks: list[str] | None) -> bool:
            deadline = None if hours is None else time.monotonic() + 3600 * hours
            return work(folder, database, deadline, only_tasks)

        def stop(self) -> None:
            request_stop()

    actors: list[Any] = []

    def start_actor() -> Any:
        actor: Any = RemoteWorker
        actors.append(actor.options(max_concurrency=2).remote())  # one call works, the other one requests the stop
        return actors[-1].work.remote(str(out.resolve()), results_db, stop_after, tasks)

    running = [start_actor() for _ in range(num_actors)]
    finished: list[bool] = []
    is_stopping = False
    while running:
        done, running = ray.wait(running, num_returns=1, timeout=RETRY_S)
        if stop_requested() and not is_stopping:
            is_stopping = True
            for actor in actors:
                actor.stop.remote()
        if not done:
            continue
        try:
            finished += ray.get(done)
        except (ActorDiedError, ActorUnavailableError, RayActorError):
            if not finished and not is_stopping:
                logger.warning("a worker of the cluster was lost; another one takes over")
                time.sleep(RETRY_S)
                running.append(start_actor())
        except RayError as error:
            lines = str(getattr(error, "cause", error)).strip().splitlines()
            raise RunError(f"a worker of the Ray cluster failed: {lines[-1] if lines else type(error).__name__}") from error
    return all(finished)
