"""Warnings that a process logs once, however often their cause is met."""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger("isocost")


@functools.lru_cache(maxsize=1024)
def warn_once(message: str) -> None:
    """Log a warning; the same message is not logged again by this process."""
    logger.warning(message)
