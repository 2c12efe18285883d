"""Export: an exported checkpoint gives the same images in diffusers' pipeline as in isocost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from conftest import plain_study, tiny_study
from finished_study import finished_spec
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
def checkpoint(finished_study: Path) -> Path:
    pipeline = Pipeline(finished_spec(), finished_study / "family")
    return pipeline.store.folder("checkpoint", pipeline.runs[0].final)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.fast_cases(1)
def test_diffusers_generates_the_same_images(checkpoint: Path, tmp_path: Path, guidance: float) -> None:
    prompts = ["a red circle on a white background", "two blue squares"]
    ours = sample(checkpoint, prompts, num_steps=4, guidance=guidance, num_images=1, seed=5).array[:, 0]
    pipeline = StableDiffusionPipeline.from_pretrained(export(checkpoint, tmp_path / "exported"), use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    noise = philox_normal(5, torch.arange(2), INITIAL_NOISE, (4, 8, 8), "cpu")
    theirs = pipeline(
        prompts, num_inference_steps=4, guidance_scale=guidance, latents=noise, height=32, width=32, output_type="np"
    ).images
    assert np.abs(ours.astype(float) - theirs * 255).max() <= 1.0


def test_a_folder_that_is_not_empty_is_not_changed(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        export(checkpoint, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_the_pca_autoencoder_has_no_diffusers_form(tmp_path: Path) -> None:
    with_pca = trained(tmp_path / "run", autoencoder=plain_study()["autoencoder"])
    with pytest.raises(ConfigError, match="PCA autoencoder has no diffusers form"):
        export(with_pca, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    assert sample(with_pca, ["a ring"], num_steps=2, num_images=2).array.shape == (1, 2, 32, 32, 3)


def test_samples_depend_only_on_seed_and_index(checkpoint: Path) -> None:
    one_prompt = sample(checkpoint, ["a ring"], num_steps=3, num_images=2, seed=1)
    two_prompts = sample(checkpoint, ["a ring", "a star"], num_steps=3, num_images=2, seed=1)
    assert np.abs(one_prompt.array[0].astype(int) - two_prompts.array[0].astype(int)).max() <= 1
    other_seed = sample(checkpoint, ["a ring"], num_steps=3, num_images=2, seed=2)
    assert np.abs(one_prompt.array.astype(int) - other_seed.array.astype(int)).max() > 20
    assert one_prompt.nfe == 6
    assert isinstance(two_prompts.grid(), Image.Image)
    assert two_prompts.grid().size == (64, 64)


@pytest.mark.slow
def test_a_negative_prompt_replaces_the_empty_prompt(checkpoint: Path) -> None:
    empty = sample(checkpoint, ["a ring"], num_steps=3, num_images=2, guidance=3.0)
    same = sample(checkpoint, ["a ring"], num_steps=3, num_images=2, guidance=3.0, negative_prompt="a ring")
    conditional = sample(checkpoint, ["a ring"], num_steps=3, num_images=2, guidance=1.0)
    assert np.abs(same.array.astype(int) - conditional.array.astype(int)).max() <= 1
    assert np.abs(same.array.astype(int) - empty.array.astype(int)).max() > 1
    with pytest.raises(ConfigError, match="no effect at guidance 0 or 1"):
        sample(checkpoint, ["a ring"], guidance=1.0, negative_prompt="a star")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_steps": 0}, "at least one step"), ({"guidance": -1.0}, "not negative"), ({"num_images": 0}, "at least 1")],
)
def test_impossible_settings_are_refused(checkpoint: Path, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sample(checkpoint, ["a ring"], **settings)
    with pytest.raises(ConfigError, match="at least one prompt"):
        sample(checkpoint, [" "])
