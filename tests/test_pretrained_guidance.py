"""Guidance 0: no guidance for a published checkpoint, and refused for a model that was trained here."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import LCMScheduler

import tiny_pipelines
from conftest import plain_study
from isocost.config.base import parse_spec
from isocost.config.study import StudySpec
from isocost.errors import ConfigError
from isocost.pipeline.pipeline import Pipeline
from isocost.sampling.latency import latency
from isocost.sampling.sample import sample

SETTINGS: dict[str, Any] = {"num_steps": 2, "num_images": 1, "solver": "ddim"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.written(tiny_pipelines.stable_diffusion(), tmp_path_factory.mktemp("published") / "turbo")


def test_guidance_0_of_a_published_checkpoint_is_no_guidance(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "isocost"):
        none = sample(folder, tiny_pipelines.PROMPTS, guidance=0.0, **SETTINGS)
    assert "turbo: guidance 0 means no guidance, as in diffusers; it is w = 1 here" in caplog.text
    one = sample(folder, tiny_pipelines.PROMPTS, guidance=1.0, **SETTINGS)
    assert np.array_equal(none.array, one.array)
    assert none.nfe == one.nfe == 2
    assert not np.array_equal(none.array[0], none.array[1]), "the prompts have an effect"


def test_guidance_0_in_latency_is_no_guidance(folder: Path) -> None:
    measured = latency(folder, num_steps=1, guidance=0.0, batches=[1], repeats=3, device="cpu")
    assert measured.document()["settings"]["guidance"] == 1
    assert measured.document()["settings"]["passes_per_evaluation"] == 1


def test_a_sweep_has_guidance_1_in_place_of_0(folder: Path, tmp_path: Path) -> None:
    plain = {
        "name": "published",
        "data": {"resolution": 16, "reference": {"kind": "scenes", "num_images": 64}},
        "checkpoints": [str(folder)],
        "sweep": {"solvers": [{"name": "ddim"}], "num_steps": [1], "guidance": [0, 1, 3]},
        "protocol": {"num_images": 32, "num_reference": 64, "num_bootstrap": 20},
    }
    pipeline = Pipeline(parse_spec(StudySpec, plain, "published"), tmp_path / "out")
    (run,) = pipeline.runs
    assert [point.spec.guidance for point in pipeline.points(run)] == [1, 3]


def test_a_network_with_guidance_as_an_input_gets_the_value(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scheduler = LCMScheduler(**tiny_pipelines.BETAS, prediction_type="epsilon")
    student = tiny_pipelines.written(
        tiny_pipelines.stable_diffusion(scheduler, {"time_cond_proj_dim": 16}), tmp_path / "student"
    )
    images = [
        sample(student, tiny_pipelines.PROMPTS, guidance=guidance, num_steps=2, num_images=1).array for guidance in (0.0, 1.0)
    ]
    assert "guidance 0" not in caplog.text
    assert not np.array_equal(*images)
    assert not np.array_equal(images[0][0], images[0][1])


OWN: dict[str, dict[str, Any]] = {
    "sweep": {"sweep": {"num_steps": [1], "guidance": [0, 2]}},
    "sweep of snapshots": {"sweep": {"num_steps": [1], "guidance": [2], "snapshot_guidance": 0}},
    "superres.sweep": {"superres": {"train": {"num_images": 8}, "sweep": {"num_steps": [1], "guidance": [0]}}},
    "dreambooth.prior": {
        "dreambooth": {"subjects": {"kind": "scenes"}, "train": {"num_images": 8}, "prior": {"guidance": 0}},
    },
}


@pytest.mark.parametrize("name", OWN)
def test_guidance_0_of_a_trained_family_is_refused(name: str) -> None:
    key = name.partition(" ")[0]
    with pytest.raises(ConfigError, match=rf"{key}: guidance = 0 samples without the prompt; give 1 for no guidance") as caught:
        parse_spec(StudySpec, plain_study(**OWN[name]), "tiny")
    assert "\n" not in str(caught.value)


def test_guidance_0_of_a_trained_checkpoint_is_refused(finished_copy: Path, isocost: Any) -> None:
    checkpoint = next((finished_copy / "artefacts" / "checkpoint").iterdir())
    outcome = isocost("sample", checkpoint, "--prompt", "a ring", "--guidance", 0, "--out", finished_copy / "images")
    assert outcome.status == 2
    assert "give 1 for no guidance" in outcome.line
    assert not (finished_copy / "images").exists()
