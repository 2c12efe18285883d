"""A study stopped in the middle of a training, then in the middle of a sweep, as tests of going on need it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isocost.config.study import StudySpec
from isocost.pipeline.pipeline import Pipeline
from isocost.sweep import worker as workers
from isocost.training import trainer as loop


def stop_twice(study: StudySpec, out: Path, monkeypatch: pytest.MonkeyPatch, at_step: int, at_record: int) -> None:
    """Run until step `at_step` of all trainings together; then again until the sweep records its point `at_record`."""
    for owner, name, number in ((loop.Trainer, "step", at_step), (workers.Worker, "_record", at_record)):
        whole, count = getattr(owner, name), 0

        def stopping(this: Any, *arguments: Any, whole: Any = whole, number: int = number) -> Any:
            nonlocal count
            count += 1
            if count == number:
                raise KeyboardInterrupt
            return whole(this, *arguments)

        with monkeypatch.context() as patched:
            patched.setattr(owner, name, stopping)
            with pytest.raises(KeyboardInterrupt):
                Pipeline(study, out).run()
