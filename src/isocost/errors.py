"""What may go wrong, in two kinds: the request (exit 2, one line) and the work (exit 1)."""

from __future__ import annotations


class ConfigError(ValueError):
    """The request was wrong. The message is one line that says what, where, and the remedy; nothing was written."""


class RunError(RuntimeError):
    """The work failed for a reason outside the program (data, disk, numbers). The message is one line; finished work stays."""
