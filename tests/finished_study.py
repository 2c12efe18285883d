"""One small study with every experiment. The test session trains it once; each module that needs it works on its own copy."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from conftest import plain_study
from isocost.config.base import parse_spec
from isocost.config.study import StudySpec

VARIANTS = ["consistency", "codi", "codi-efficient", "progressive"]
LPIPS_FREE = ["psnr", "ssim"]

BASE: dict[str, Any] = {
    "autoencoder": {"kind": "pretrained", "path": "scenes"},
    "family": {"widths": [8]},
    "train": {
        "num_images": 64,
        "snapshots": [32],
        "batch_size": 16,
        "lr": 1e-3,
        "prediction_type": "v_prediction",
        "state_every_images": 32,
    },
    "sweep": {
        "num_steps": [1, 2],
        "guidance": [1, 2],
        "batch_size": 16,
        "shard_size": 12,
        "snapshot_num_steps": 2,
        "snapshot_guidance": 2,
    },
}
"""The family: one size, four points and a fifth for the snapshot, three shards each."""

PARTS: dict[str, dict[str, Any]] = {
    "seed_replicates": {"seeds": [1, 2]},
    "distill": {
        "variants": VARIANTS,
        "guidance_range": [1, 4],
        "stages": [4, 2],
        "train": {"num_images": 64, "snapshots": [32], "lr": 1e-3},
        "sweep": {"num_steps": [1, 2, 4], "guidance": [1, 2], "batch_size": 16},
    },
    "superres": {
        "starts": ["pretrained", "scratch"],
        "train": {"num_images": 64, "snapshots": [32], "state_every_images": 32},
        "sweep": {"num_steps": [1, 2], "batch_size": 16, "snapshot_num_steps": 2},
        "protocol": {"num_images": 32, "num_reference": 64, "num_bootstrap": 20, "paired_metrics": LPIPS_FREE},
        "metric": "psnr",
        "distill": {"variants": VARIANTS[:2], "train": {"num_images": 32}, "sweep": {"num_steps": [4], "batch_size": 16}},
    },
    "dreambooth": {
        "subjects": {"kind": "scenes", "num_subjects": 2, "num_prompts": 3},
        "num_images": 2,
        "num_prior_images": 32,
        "prior": {"num_images": 6, "num_steps": 1, "guidance": 1},
        "train": {"num_images": 32, "state_every_images": 16},
        "sweep": {"num_steps": [2], "guidance": [2], "batch_size": 16},
        "protocol": {"num_bootstrap": 20},
    },
}
"""The other experiments, each a section of the study."""


def plain_finished(*parts: str, **changes: Any) -> dict[str, Any]:
    """The family and some of the other experiments of the finished study. `changes` replaces top-level parts."""
    return plain_study(**{**BASE, **{part: PARTS[part] for part in parts}, **changes})


def finished_spec(*parts: str, **changes: Any) -> StudySpec:
    """`plain_finished` as a spec."""
    return parse_spec(StudySpec, plain_finished(*parts, **changes), "tiny")


def with_part(part: str, **changes: Any) -> StudySpec:
    """The family and one other experiment, with changes in the section of that experiment."""
    return finished_spec(part, **{part: {**PARTS[part], **changes}})


def finish_once(session_folder: Path) -> Path:
    """Run and report the study, once for all processes of a test session.

    Returns:
        A folder with two output folders: `family`, as it was before the other experiments, and `complete`.
    """
    from isocost.pipeline.pipeline import Pipeline  # with torch: the process that distributes the tests does not need it
    from isocost.report.build import report

    finished = session_folder / "finished-study"
    with FileLock(session_folder / "finished-study.lock"):
        if not finished.exists():
            partial = session_folder / "partial"
            for parts in ((), tuple(PARTS)):
                pipeline = Pipeline(finished_spec(*parts), partial / "complete")
                assert pipeline.run()
                report(pipeline, figure_formats=())
                if not parts:
                    shutil.copytree(partial / "complete", partial / "family")
            partial.rename(finished)
    return finished


@pytest.fixture(scope="session")
def finished_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the finished study, see `finish_once`. Do not change it; the fixtures below are copies to work on."""
    folder = tmp_path_factory.getbasetemp()
    return finish_once(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)


def link_or_copy(source: str, target: str) -> None:
    """Copy a file. Weights are linked, because files of weights never change."""
    (os.link if source.endswith(".safetensors") else shutil.copy2)(source, target)


def copy_of(folder: Path, target: Path) -> Path:
    return shutil.copytree(folder, target, copy_function=link_or_copy)


def copy_trained(family: Path, out: Path) -> Path:
    """Copy the output folder of the family as it was after the training."""
    copy_of(family, out)
    shutil.rmtree(out / "artefacts" / "point")
    (out / "results.sqlite").unlink()
    return out


@pytest.fixture(scope="module")
def finished_copy(finished_study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The complete study for the tests of one module."""
    return copy_of(finished_study / "complete", tmp_path_factory.mktemp("complete") / "out")


@pytest.fixture(scope="module")
def family_copy(finished_study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study without the other experiments for the tests of one module."""
    return copy_of(finished_study / "family", tmp_path_factory.mktemp("family") / "out")


def sort_modules(items: list[pytest.Item]) -> None:
    """Start with one module that needs the finished study and end with the others, so that no process waits for it."""
    needing = {item.path for item in items if "finished_study" in getattr(item, "fixturenames", ())}
    first = min(needing, default=None)
    items.sort(key=lambda item: 0 if item.path == first else 2 if item.path in needing else 1)
