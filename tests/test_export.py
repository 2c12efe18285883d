"""Out of the house: an exported checkpoint in diffusers' own pipeline gives the pictures that ours gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from conftest import plain_study, tiny_study
from isocost.diffusion.philox import START_NOISE, normal_noise
from isocost.errors import RequestError
from isocost.models.export_diffusers import export
from isocost.pipeline.pipeline import Pipeline
from isocost.sampling.sample import sample


def trained(out: Path, **changes: object) -> Path:
    """A checkpoint after a few batches."""
    study = tiny_study(family={"widths": [8]}, train={"num_images": 64, "batch_size": 16, "lr": 1e-3}, **changes)
    pipeline = Pipeline(study, out)
    (run,) = pipeline.runs
    pipeline.train(run)
    return pipeline.store.folder("checkpoint", run.final)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("run"), codec={"kind": "pretrained", "path": "scenes"})


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_diffusers_draws_the_same_pictures(checkpoint: Path, tmp_path: Path, guidance: float) -> None:
    prompts = ["a red circle on a white background", "two blue squares"]
    ours = sample(checkpoint, prompts, num_steps=4, guidance=guidance, num_pictures=1, seed=5).pictures[:, 0]
    pipeline = StableDiffusionPipeline.from_pretrained(export(checkpoint, tmp_path / "exported"), use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    noise = normal_noise(5, torch.arange(2), START_NOISE, (4, 8, 8), "cpu")
    theirs = pipeline(
        prompts, num_inference_steps=4, guidance_scale=guidance, latents=noise, height=32, width=32, output_type="np"
    ).images
    assert np.abs(ours.astype(float) - theirs * 255).max() <= 1.0


def test_a_folder_that_is_not_empty_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RequestError, match="not empty"):
        export(checkpoint, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_the_linear_codec_has_no_diffusers_form(tmp_path: Path) -> None:
    linear = trained(tmp_path / "run", codec=plain_study()["codec"])
    with pytest.raises(RequestError, match="linear codec has no diffusers form"):
        export(linear, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    assert sample(linear, ["a ring"], num_steps=2, num_pictures=2).pictures.shape == (1, 2, 32, 32, 3)


def test_samples_depend_on_seed_and_number_only(checkpoint: Path) -> None:
    alone = sample(checkpoint, ["a ring"], num_steps=3, num_pictures=2, seed=1)
    among = sample(checkpoint, ["a ring", "a star"], num_steps=3, num_pictures=2, seed=1)
    assert np.abs(alone.pictures[0].astype(int) - among.pictures[0].astype(int)).max() <= 1
    other = sample(checkpoint, ["a ring"], num_steps=3, num_pictures=2, seed=2)
    assert np.abs(alone.pictures.astype(int) - other.pictures.astype(int)).max() > 20
    assert alone.nfe == 6
    assert isinstance(among.sheet(), Image.Image)
    assert among.sheet().size == (64, 64)


def test_a_negative_prompt_takes_the_place_of_the_empty_one(checkpoint: Path) -> None:
    empty = sample(checkpoint, ["a ring"], num_steps=3, num_pictures=2, guidance=3.0)
    same = sample(checkpoint, ["a ring"], num_steps=3, num_pictures=2, guidance=3.0, negative="a ring")
    conditional = sample(checkpoint, ["a ring"], num_steps=3, num_pictures=2, guidance=1.0)
    assert np.abs(same.pictures.astype(int) - conditional.pictures.astype(int)).max() <= 1
    assert np.abs(same.pictures.astype(int) - empty.pictures.astype(int)).max() > 1
    with pytest.raises(RequestError, match="does nothing without guidance"):
        sample(checkpoint, ["a ring"], guidance=1.0, negative="a star")


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"num_steps": 0}, "at least one step"), ({"guidance": -1.0}, "not negative"), ({"num_pictures": 0}, "at least 1")],
)
def test_settings_that_cannot_be_are_refused(checkpoint: Path, settings: dict, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        sample(checkpoint, ["a ring"], **settings)
    with pytest.raises(RequestError, match="at least one prompt"):
        sample(checkpoint, [" "])
