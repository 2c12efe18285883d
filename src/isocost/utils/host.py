"""The name of this machine and its processes: who owns a temporary file or a lease."""

from __future__ import annotations

import platform
from pathlib import Path


def host_name() -> str:
    """Name of this machine."""
    return platform.node()


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; True on systems that do not show it."""
    return Path(f"/proc/{pid}").exists() if Path("/proc").is_dir() else True
