"""Shared by the test files: a study that runs in seconds, the folder of real data, the command line."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isocost.cli import main
from isocost.config.base import parse_spec
from isocost.config.study import StudySpec

gc.set_threshold(200_000, 50, 100)  # the tests keep many objects; fewer searches for garbage save about 6 % of the time
os.environ["LOKY_MAX_CPU_COUNT"] = "1"  # figures are drawn in this process: the test processes share the cores already
pytest_plugins = ["finished_study"]
SHARED = Path(__file__).resolve().parents[2] / "shared" / "assets"


def plain_study(**changes: Any) -> dict[str, Any]:
    """A complete study that runs in seconds: PCA autoencoder, two sizes, scenes. `changes` replaces top-level parts."""
    return {
        "name": "tiny",
        "data": {
            "resolution": 32,
            "train": {"kind": "scenes", "num_images": 192, "seed": 0},
            "reference": {"kind": "scenes", "num_images": 64, "seed": 1},
        },
        "autoencoder": {"kind": "pca", "patch": 4, "num_channels": 4, "num_fit_images": 64},
        "text_encoder": {"path": "minilm", "max_tokens": 8},
        "family": {"widths": [8, 16]},
        "train": {"num_images": 256, "snapshots": [128], "batch_size": 16, "lr": 1e-3, "state_every_images": 64},
        "sweep": {"num_steps": [1, 2], "guidance": [1, 2], "batch_size": 16, "snapshot_num_steps": 2, "snapshot_guidance": 2},
        "protocol": {"num_images": 32, "num_reference": 64, "num_bootstrap": 20, "alignment": "scenes"},
        **changes,
    }


def tiny_study(**changes: Any) -> StudySpec:
    """`plain_study` as a spec."""
    return parse_spec(StudySpec, plain_study(**changes), "tiny")


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Leave out `fsync` in this process: the tests kill processes, not machines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def short_measurements() -> Iterator[None]:
    """Measure the stages of sampling once: the tests need no exact milliseconds."""
    from isocost.sampling import stage_times  # with torch: the process that distributes the tests does not need it

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_times, "MIN_REPEATS", 1)
        patch.setattr(stage_times, "ENOUGH_SECONDS", 0.0)
        yield


@pytest.fixture
def shared() -> Path:
    """The folder of real data; the test is skipped without it."""
    if not SHARED.is_dir():
        pytest.skip("no folder of real data next to this checkout")
    return SHARED


class Outcome:
    """Exit status and output streams of a command."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def answer(self) -> Any:
        return json.loads(self.out.splitlines()[-1])

    @property
    def line(self) -> str:
        """The error message: the last line, after any progress."""
        return self.err.strip().splitlines()[-1]


def assert_refused(outcome: Outcome, *fragments: str) -> None:
    """A wrong request: exit status 2, nothing on standard output, one line that has the fragments."""
    assert outcome.status == 2, outcome.err
    assert outcome.out == ""
    assert outcome.line.startswith("isocost: "), outcome.err
    assert "Traceback" not in outcome.err
    for fragment in fragments:
        assert fragment in outcome.line


@pytest.fixture
def isocost(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run a command in this process."""

    def command(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["isocost", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        return Outcome(int(stopped.value.code or 0), *capfd.readouterr())

    return command


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from finished_study import sort_modules  # it imports this file

    mark_later_cases_slow(items)
    sort_modules(items)


def mark_later_cases_slow(items: list[pytest.Item]) -> None:
    """Give the marker `slow` to all but the first cases of the tests with the marker `fast_cases`."""
    num_cases: Counter[str] = Counter()
    for item in items:
        if marker := item.get_closest_marker("fast_cases"):
            test = item.nodeid.split("[")[0]
            num_cases[test] += 1
            if num_cases[test] > marker.args[0]:
                item.add_marker("slow")
