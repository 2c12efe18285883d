"""Several processes at one study: further ones on this machine, on other machines, or in a Ray cluster.

All of them do the same thing: they open the output folder, claim what nobody has in hand, and end when all is done. They need
one folder (a common disk) and one ledger.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from isocost.config.study_yaml import load_study
from isocost.errors import ConfigError, RunError
from isocost.pipeline.pipeline import STUDY_FILE, Pipeline
from isocost.utils.progress import say
from isocost.utils.signals import request_stop, stop_requested

RETRY_S = 2.0
CONNECT_TIMEOUT_S = 5.0


def work(out: str | Path, results_db: str | None = None, deadline: float | None = None, tasks: Any = None) -> bool:
    """Work on what an output folder's study asks for until all is done; False where the deadline came first.

    Raises:
        ConfigError: no run has begun there.
    """
    file = Path(out) / STUDY_FILE
    if not file.is_file():
        raise ConfigError(f"{out}: nothing to join, it has no {STUDY_FILE}; `isocost run STUDY --out {out}` begins it")
    return Pipeline(load_study(file), out, results_db).run(deadline, tasks)


class LocalWorkers:
    """Further processes of this machine, one a device, each with its share of the cores."""

    def __init__(self, number: int) -> None:
        """`number` processes in all, this one included; it keeps its share of the cores as well."""
        self.number = number
        self.threads = max(1, (os.cpu_count() or 1) // number)
        torch.set_num_threads(self.threads)
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, out: Path, results_db: str | None, stop_after: float | None, tasks: list[str] | None) -> None:
        """Begin to help at an output folder that is there."""
        command = [sys.executable, "-m", "isocost", "worker", str(out)]
        command += ["--database", results_db] if results_db else []
        command += ["--stop-after", str(stop_after)] if stop_after else []
        for task in tasks or ():
            command += ["--task", task]
        devices = torch.cuda.device_count()
        for number in range(1, self.number):
            own = {"OMP_NUM_THREADS": str(self.threads)}
            if devices:
                own["CUDA_VISIBLE_DEVICES"] = str(number % devices)
            self.processes.append(subprocess.Popen(command, env={**os.environ, **own}, stdout=subprocess.DEVNULL))

    def wait(self) -> None:
        """Until they have ended; what one of them left undone the others have done."""
        for process in self.processes:
            if process.wait():
                say(f"a helper ended with {process.returncode}; the others did its work")

    def stop(self) -> None:
        """End those that still run."""
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
                process.wait()


def _check_reachable(address: str) -> None:
    """Raise OSError where nothing listens at HOST:PORT; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()


def run_on_ray(
    address: str, out: Path, results_db: str | None, number: int | None, stop_after: float | None, tasks: list[str] | None
) -> bool:
    """One actor a device of a Ray cluster (or `number` of them), each a process that works at `out`; True when all is done.

    A lost node costs what it had in hand: its claims run out, others take them, and another actor is started.

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
            first = str(error).strip().splitlines()[0]
            raise ConfigError(f"--ray {address}: no cluster answers there ({first}); `ray start --head` begins one") from error
    gpus = int(ray.cluster_resources().get("GPU", 0))
    wanted = number or gpus or max(1, len([node for node in ray.nodes() if node["Alive"]]))
    device: dict[str, Any] = {"num_gpus": 1} if gpus else {"num_cpus": 1}

    @ray.remote(**device)
    class Helper:  # its methods get a `remote` from Ray
        """A process with one device."""

        def work(self, folder: str, where: str | None, hours: float | None, only: list[str] | None) -> bool:
            deadline = None if hours is None else time.monotonic() + 3600 * hours
            return work(folder, where, deadline, only)

        def stop(self) -> None:
            request_stop()

    actors: list[Any] = []

    def begin() -> Any:
        actor: Any = Helper
        actors.append(actor.options(max_concurrency=2).remote())  # one call works, another asks it to stop
        return actors[-1].work.remote(str(out.resolve()), results_db, stop_after, tasks)

    at_work = [begin() for _ in range(wanted)]
    finished: list[bool] = []
    is_asked = False
    while at_work:
        done, at_work = ray.wait(at_work, num_returns=1, timeout=RETRY_S)
        if stop_requested() and not is_asked:
            is_asked = True
            for actor in actors:
                actor.stop.remote()
        if not done:
            continue
        try:
            finished += ray.get(done)
        except (ActorDiedError, ActorUnavailableError, RayActorError):
            if not finished and not is_asked:
                say("a worker of the cluster was lost; another one takes over")
                time.sleep(RETRY_S)
                at_work.append(begin())
        except RayError as error:
            raise RunError(str(getattr(error, "cause", error)).strip().splitlines()[-1]) from error
    return all(finished)
