"""Provenance of a result: versions, commit, host, hardware."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("isocost", "torch", "diffusers", "transformers", "accelerate", "numpy")


@lru_cache(maxsize=1)
def provenance() -> dict[str, str]:
    """Versions of the libraries, commit of isocost's source, host, device and number of threads."""
    import torch

    facts = {f"{name}_version": _version(name) for name in _PACKAGES}
    facts["python_version"] = platform.python_version()
    facts["commit"] = _commit()
    facts["host"] = platform.node()
    facts["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()
    facts["num_threads"] = str(torch.get_num_threads())
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _commit() -> str:
    """The commit of this source's git checkout, or `ISOCOST_COMMIT` for a copy without git, such as a container."""
    if commit := os.environ.get("ISOCOST_COMMIT"):
        return commit
    source = Path(__file__).resolve().parent
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def processor_name() -> str:
    """The model of the processor, the vector instructions that torch uses on it, and its number of cores.

    The model name ("AMD EPYC") may stand for several generations, one twice as fast as another.
    """
    import torch

    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        models = (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name"))
        name = next(models, name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores"
