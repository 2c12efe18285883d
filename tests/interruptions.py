"""A study that is stopped in the middle of a training, then in the middle of a sweep, for tests of resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isocost.config.study import StudySpec
from isocost.pipeline.pipeline import Pipeline
from isocost.sweep import worker as workers
from isocost.training import trainer as loop


def stop_twice(study: StudySpec, out: Path, monkeypatch: pytest.MonkeyPatch, at_step: int, at_record: int) -> None:
    """Run until step `at_step`, counted over all trainings; then again until the sweep records its point `at_record`."""
    for owner, name, number in ((loop.Trainer, "step", at_step), (workers.Worker, "_record", at_record)):
        method, count = getattr(owner, name), 0

        def stopping(this: Any, *arguments: Any, method: Any = method, number: int = number) -> Any:
            nonlocal count
            count += 1
            if count == number:
                raise KeyboardInterrupt
            return method(this, *arguments)

        with monkeypatch.context() as patched:
            patched.setattr(owner, name, stopping)
            with pytest.raises(KeyboardInterrupt):
                Pipeline(study, out).run()
