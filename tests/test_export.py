"""Out of the house: an exported checkpoint in diffusers' own pipeline gives the images that ours gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from conftest import plain_study, tiny_study
from isocost.diffusion.philox import INITIAL_NOISE, philox_normal
from isocost.errors import ConfigError
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
    return trained(tmp_path_factory.mktemp("run"), autoencoder={"kind": "pretrained", "path": "scenes"})


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_diffusers_draws_the_same_images(checkpoint: Path, tmp_path: Path, guidance: float) -> None:
    prompts = ["a red circle on a white background", "two blue squares"]
    ours = sample(checkpoint, prompts, num_steps=4, guidance=guidance, num_images=1, seed=5).images[:, 0]
    pipeline = StableDiffusionPipeline.from_pretrained(export(checkpoint, tmp_path / "exported"), use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    noise = philox_normal(5, torch.arange(2), INITIAL_NOISE, (4, 8, 8), "cpu")
    theirs = pipeline(
        prompts, num_inference_steps=4, guidance_scale=guidance, latents=noise, height=32, width=32, output_type="np"
    ).images
    assert np.abs(ours.astype(float) - theirs * 255).max() <= 1.0


def test_a_folder_that_is_not_empty_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        export(checkpoint, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_the_linear_autoencoder_has_no_diffusers_form(tmp_path: Path) -> None:
    linear = trained(tmp_path / "run", autoencoder=plain_study()["autoencoder"])
    with pytest.raises(ConfigError, match="linear autoencoder has no diffusers form"):
        export(linear, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    assert sample(linear, ["a ring"], num_steps=2, num_images=2).images.shape == (1, 2, 32, 32, 3)


def test_samples_depend_on_seed_and_number_only(checkpoint: Path) -> None:
    alone = sample(checkpoint, ["a ring"], num_steps=3, num_images=2, seed=1)
    among = sample(checkpoint, ["a ring", "a star"], num_steps=3, num_images=2, seed=1)
    assert np.abs(alone.images[0].astype(int) - among.images[0].astype(int)).max() <= 1
    other = sample(checkpoint, ["a ring"], num_steps=3, num_images=2, seed=2)
    assert np.abs(alone.images.astype(int) - other.images.astype(int)).max() > 20
    assert alone.nfe == 6
    assert isinstance(among.sheet(), Image.Image)
    assert among.sheet().size == (64, 64)


def test_a_negative_prompt_takes_the_place_of_the_empty_one(checkpoint: Path) -> None:
    empty = sample(checkpoint, ["a ring"], num_steps=3, num_images=2, guidance=3.0)
    same = sample(checkpoint, ["a ring"], num_steps=3, num_images=2, guidance=3.0, negative_prompt="a ring")
    conditional = sample(checkpoint, ["a ring"], num_steps=3, num_images=2, guidance=1.0)
    assert np.abs(same.images.astype(int) - conditional.images.astype(int)).max() <= 1
    assert np.abs(same.images.astype(int) - empty.images.astype(int)).max() > 1
    with pytest.raises(ConfigError, match="does nothing without guidance"):
        sample(checkpoint, ["a ring"], guidance=1.0, negative_prompt="a star")


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"num_steps": 0}, "at least one step"), ({"guidance": -1.0}, "not negative"), ({"num_images": 0}, "at least 1")],
)
def test_settings_that_cannot_be_are_refused(checkpoint: Path, settings: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sample(checkpoint, ["a ring"], **settings)
    with pytest.raises(ConfigError, match="at least one prompt"):
        sample(checkpoint, [" "])
