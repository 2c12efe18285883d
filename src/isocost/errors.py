"""The two kinds of errors: a wrong request (exit status 2) and failed work (exit status 1)."""

from __future__ import annotations


class ConfigError(ValueError):
    """The request was wrong. The message is one line with the mistake, its location and the remedy; nothing was written."""


class RunError(RuntimeError):
    """The work failed for a reason outside the program (data, disk, numbers). The message is one line; finished work stays."""
