"""A published checkpoint as the guide of another one: checks, a study, and images equal to a loop of diffusers networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

import tiny_pipelines
from isocost.config.base import parse_spec
from isocost.config.study import StudySpec
from isocost.diffusion.philox import INITIAL_NOISE, philox_normal
from isocost.errors import ConfigError
from isocost.pipeline.pipeline import Pipeline
from isocost.sampling.sample import Model
from test_pretrained_study import plain

SMALL_UNET = {"block_out_channels": (16, 32), "norm_num_groups": 8}


def with_parts_of(base: Any, unet_changes: dict[str, Any], scheduler: Any = None) -> Any:
    """A pipeline with another U-Net and the autoencoder and text encoder of `base`."""
    pipeline = tiny_pipelines.stable_diffusion(scheduler, unet_changes)
    pipeline.vae, pipeline.text_encoder, pipeline.tokenizer = base.vae, base.text_encoder, base.tokenizer
    return pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("guides")
    torch.manual_seed(3)
    base = tiny_pipelines.stable_diffusion()
    v_scheduler = DDIMScheduler(
        **tiny_pipelines.BETAS, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction"
    )
    other_schedule = DDIMScheduler(beta_start=0.001, beta_end=0.02, clip_sample=False, set_alpha_to_one=False)
    other_autoencoder = tiny_pipelines.stable_diffusion(None, SMALL_UNET)
    with torch.no_grad():
        for parameter in other_autoencoder.vae.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    pipelines = {
        "base": base,
        "small": with_parts_of(base, SMALL_UNET),
        "small-v": with_parts_of(base, SMALL_UNET, v_scheduler),
        "other-schedule": with_parts_of(base, SMALL_UNET, other_schedule),
        "other-autoencoder": other_autoencoder,
        "other-latents": tiny_pipelines.sd3(with_t5=False),
    }
    return {name: tiny_pipelines.written(pipeline, root / name) for name, pipeline in pipelines.items()}


@pytest.mark.parametrize("guide", ["small", "small-v"])
def test_images_equal_a_loop_of_diffusers_networks(folders: dict[str, Path], guide: str) -> None:
    """Also with a guide of another prediction type: both are converted to the clean latent."""
    prompt, w, num_steps = "a red circle", 2.5, 4
    samples = Model(folders["base"]).sample(prompt, solver="ddim", num_steps=num_steps, guidance=w, guide=folders[guide])
    main, small = (StableDiffusionPipeline.from_pretrained(folders[name], safety_checker=None) for name in ("base", guide))
    scheduler = DDIMScheduler.from_config(main.scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(num_steps)
    shape = (4, tiny_pipelines.LATENT_SIZE, tiny_pipelines.LATENT_SIZE)
    x = philox_normal(torch.tensor([0]), torch.tensor([0]), INITIAL_NOISE, shape, torch.device("cpu"))
    with torch.no_grad():
        context = main.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)[0]
        for timestep in scheduler.timesteps:
            alpha_bar = scheduler.alphas_cumprod[timestep]
            alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
            main_x0 = (x - sigma * main.unet(x, timestep, context).sample) / alpha
            output = small.unet(x, timestep, context).sample
            guide_x0 = alpha * x - sigma * output if guide == "small-v" else (x - sigma * output) / alpha
            x0 = guide_x0 + w * (main_x0 - guide_x0)
            x = scheduler.step((x - alpha * x0) / sigma, timestep, x).prev_sample
        decoded = main.vae.decode(x / main.vae.config.scaling_factor).sample[0]
    expected = ((decoded + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 0).numpy()
    assert np.abs(samples.array[0, 0].astype(int) - expected).max() <= 2
    assert samples.nfe == 2 * num_steps


@pytest.mark.parametrize(
    ("guide", "words"),
    [
        ("other-schedule", "another noise schedule"),
        ("other-autoencoder", "autoencoder decodes other images"),
        ("other-latents", "its latents are"),
        ("base", "cannot guide itself"),
    ],
)
def test_a_guide_that_does_not_fit_is_refused_in_one_line(folders: dict[str, Path], guide: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Model(folders["base"]).sample("a ring", guide=folders[guide])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def study(folders: dict[str, Path], names: list[str], guides: list[Any]) -> StudySpec:
    sweep = {"num_steps": [2], "guidance": [1, 3], "guides": guides, "batch_size": 16}
    return parse_spec(StudySpec, plain([folders[name] for name in names], sweep=sweep), "study.yaml")


def test_a_study_with_a_published_guide(folders: dict[str, Path], tmp_path: Path) -> None:
    """The guide is not swept itself; its points cost its own passes."""
    spec = study(folders, ["base"], ["none", {"checkpoint": str(folders["small"])}])
    pipeline = Pipeline(spec, tmp_path / "out")
    assert pipeline.run()
    table = pipeline.results_db.table()
    assert len(table) == 3
    guided = table[table["guide"].notna()].iloc[0]
    own = table[table["guide"].isna() & (table["guidance"] == 3)].iloc[0]
    assert "small" in guided["guide"]
    assert guided["nfe"] == own["nfe"] == 4
    assert guided["gflop"] < own["gflop"]
    assert Pipeline(spec, tmp_path / "out").run(), "a second run finds everything"
    assert len(pipeline.results_db.table()) == 3


@pytest.mark.parametrize(
    ("names", "guide", "words"),
    [
        (["base"], "other-schedule", "another noise schedule"),
        (["base"], "other-autoencoder", "decodes other images"),
        (["base"], "base", "would guide itself"),
        (["small"], "base", "costs more a pass"),
    ],
)
def test_a_study_refuses_a_guide_before_anything_is_made(
    folders: dict[str, Path], names: list[str], guide: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        Pipeline(study(folders, names, [{"checkpoint": str(folders[guide])}]), tmp_path / "out").run()
    assert words in str(caught.value)
    assert not list((tmp_path / "out").glob("artefacts/point/*"))


def test_sizes_are_no_guides_of_published_checkpoints(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give checkpoint: FOLDER or OWNER/NAME"):
        Pipeline(study(folders, ["base"], [{"size": "smaller"}]), tmp_path / "out").run()
