"""Flux, "dev" and "schnell", against its own pipeline."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

import tiny_pipelines
from isocost.config.sampling import SolverSpec
from isocost.diffusion.philox import INITIAL_NOISE, philox_normal
from isocost.diffusion.solvers import solver_coefficients
from isocost.errors import ConfigError
from isocost.models.checkpoint import read_info
from isocost.models.pretrained.wrappers import patchify, unpatchify
from isocost.sampling.generate import schedule_of
from isocost.sampling.sample import sample
from test_pretrained import SEED, STEPS, assert_equal, ours

EULER = SolverSpec(name="euler", timestep_spacing="trailing")
SCHEDULER = Path("scheduler") / "scheduler_config.json"
TRANSFORMER, VAE = Path("transformer") / "config.json", Path("vae") / "config.json"


def theirs(pipeline: FluxPipeline, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and images of the pipeline, from the noise that ours start from."""
    pipeline.set_progress_bar_config(disable=True)
    noise = philox_normal(SEED, torch.arange(2), INITIAL_NOISE, (16, tiny_pipelines.SIDE, tiny_pipelines.SIDE), "cpu")
    packed = pipeline._pack_latents(noise, 2, 16, tiny_pipelines.SIDE, tiny_pipelines.SIDE)
    asked = {"num_inference_steps": STEPS, "height": tiny_pipelines.PIXELS, "width": tiny_pipelines.PIXELS, **options}
    latents = pipeline(tiny_pipelines.PROMPTS, latents=packed.clone(), output_type="latent", **asked).images
    images = pipeline(tiny_pipelines.PROMPTS, latents=packed.clone(), output_type="pt", **asked).images
    return pipeline._unpack_latents(latents, tiny_pipelines.PIXELS, tiny_pipelines.PIXELS, pipeline.vae_scale_factor), images


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.written(tiny_pipelines.flux(), tmp_path_factory.mktemp("flux") / "dev")


@pytest.fixture
def folder(dev: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(dev, tmp_path / "folder"))


def test_dev_draws_as_its_pipeline(dev: Path) -> None:
    info = read_info(dev)
    assert info.model.embeds_guidance
    assert (info.prediction_type, info.solver, info.resolution) == ("flow_prediction", EULER, tiny_pipelines.PIXELS)
    assert info.pretrained is not None
    assert info.pretrained.max_tokens == 512
    pipeline = FluxPipeline.from_pretrained(dev)
    drawn = {}
    for guidance in (1.0, 3.5):
        drawn[guidance] = ours(dev, EULER, guidance)
        assert_equal(drawn[guidance], theirs(pipeline, guidance_scale=guidance))
    assert float((drawn[1.0][1] - drawn[3.5][1]).abs().max()) > 1e-3


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_schnell_draws_as_its_pipeline(tmp_path: Path, shift: float) -> None:
    pipeline = tiny_pipelines.flux(is_dev=False, shift=shift)
    folder = tiny_pipelines.written(pipeline, tmp_path / "folder")
    info = read_info(folder)
    assert not info.model.embeds_guidance
    assert info.pretrained is not None
    assert info.pretrained.max_tokens == 256
    assert_equal(ours(folder, EULER, 1.0), theirs(pipeline, guidance_scale=0.0, max_sequence_length=256))
    two_passes = {"true_cfg_scale": 3.0, "negative_prompt": ["", ""], "max_sequence_length": 256}
    assert_equal(ours(folder, EULER, 3.0), theirs(pipeline, **two_passes))


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("line", [{}, {"base_shift": 0.4, "max_shift": 2.0, "base_image_seq_len": 4, "max_image_seq_len": 64}])
def test_the_shift_is_the_resolutions(folder: Path, kind: str, line: dict[str, float]) -> None:
    """The table stands where diffusers' scheduler stands when Flux's pipeline asks it."""
    tiny_pipelines.change(folder / SCHEDULER, time_shift_type=kind, **line)
    for pixels in (tiny_pipelines.PIXELS, 4 * tiny_pipelines.PIXELS):
        tiny_pipelines.change(folder / VAE, sample_size=pixels)
        info = read_info(folder)
        assert info.resolution == pixels
        num_places = (pixels // 4) ** 2
        fields = [line.get(key) for key in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")]
        mu = calculate_shift(num_places, *(fields if line else ()))
        assert info.pretrained is not None
        assert info.pretrained.noise.shift == pytest.approx(math.exp(mu) if kind == "exponential" else mu, rel=1e-12)
        scheduler = tiny_pipelines.flux(time_shift_type=kind, **line).scheduler
        for num_steps in (1, 4, 28):
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
            table = solver_coefficients(info.solver, num_steps, schedule_of(info))
            np.testing.assert_allclose(table.sigma, scheduler.sigmas[:-1], rtol=1e-6)
            np.testing.assert_allclose(table.timesteps, scheduler.timesteps, rtol=1e-6)


def test_what_is_published_shifts_by_3(folder: Path) -> None:
    """FLUX.1-dev at 1024 pixels: 4096 places, mu 1.15. A side that is not said is that of the pipeline, 128 places wide."""
    tiny_pipelines.change(folder / VAE, sample_size=None)
    info = read_info(folder)
    assert (info.resolution, info.model.latent_size) == (256, 128)
    assert info.pretrained is not None
    assert info.pretrained.noise.shift == pytest.approx(math.exp(1.15))


def test_places_of_a_latent() -> None:
    latents = torch.randn(2, 16, 8, 6)
    places = patchify(latents)
    assert torch.equal(places, FluxPipeline._pack_latents(latents, 2, 16, 8, 6))
    assert torch.equal(unpatchify(places, 4, 3), latents)


def test_guidance_is_an_input(dev: Path) -> None:
    asked: dict[str, Any] = {"num_steps": 2, "guidance": 3.5, "num_images": 1}
    drawn = sample(dev, tiny_pipelines.PROMPTS, **asked)
    assert drawn.nfe == 2
    half = sample(dev, tiny_pipelines.PROMPTS, dtype="bf16", **asked)
    assert 0 < np.abs(drawn.images.astype(int) - half.images).mean() < 2
    with pytest.raises(ConfigError, match="in one pass; a negative prompt has no place"):
        sample(dev, tiny_pipelines.PROMPTS, negative_prompt="grey", **asked)


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        (TRANSFORMER, {"in_channels": 384}, r"in_channels = 384: a network that fills in an image"),
        (TRANSFORMER, {"in_channels": 128}, r"in_channels = 128: a network that follows a map"),
        (TRANSFORMER, {"in_channels": 16}, "in_channels = 16: .*16 latent channels"),
        (TRANSFORMER, {"patch_size": 2}, "patch_size = 2"),
        (TRANSFORMER, {"axes_dims_rope": [4, 4, 4]}, r"transformer/config\.json: FluxTransformer2DModel of it does not run"),
        (Path("model_index.json"), {"_class_name": "FluxFillPipeline"}, "FluxFillPipeline is not read here"),
        (Path("model_index.json"), {"_class_name": "FluxControlNetPipeline"}, "FluxControlNetPipeline is not read here"),
        (VAE, {"sample_size": 18}, "sample_size = 18: Flux draws squares"),
        (SCHEDULER, {"shift_terminal": 0.1}, "shift_terminal = 0.1: no solver here"),
        (SCHEDULER, {"use_karras_sigmas": True}, "use_karras_sigmas = True: no solver here"),
        (SCHEDULER, {"base_shift": "a"}, "base_shift = 'a': a shift by the resolution needs a number"),
        (SCHEDULER, {"base_image_seq_len": 4096}, "base_image_seq_len = max_image_seq_len = 4096"),
        (SCHEDULER, {"time_shift_type": "cubic"}, "time_shift_type = 'cubic'"),
        (SCHEDULER, {"base_shift": -9.0, "time_shift_type": "linear"}, "shift"),
        (SCHEDULER, {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"}, "use_dynamic_shifting = True"),
    ],
)
def test_what_is_refused_is_one_line(folder: Path, file: Path, values: dict[str, Any], said: str) -> None:
    tiny_pipelines.change(folder / file, **values)
    with pytest.raises(ConfigError, match=said) as error:
        read_info(folder)
    assert "\n" not in str(error.value)


def test_a_shift_by_the_resolution_is_fluxs_alone(tmp_path: Path) -> None:
    folder = tiny_pipelines.written(tiny_pipelines.sd3(with_t5=False), tmp_path / "sd3")
    tiny_pipelines.change(folder / SCHEDULER, use_dynamic_shifting=True)
    with pytest.raises(ConfigError, match="use_dynamic_shifting = True: no solver here"):
        read_info(folder)
