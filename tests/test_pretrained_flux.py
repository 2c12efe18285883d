"""Flux "dev" and "schnell" against diffusers' pipeline."""

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
    """Latents and images of the pipeline, from the initial noise of isocost."""
    pipeline.set_progress_bar_config(disable=True)
    size = tiny_pipelines.LATENT_SIZE
    noise = philox_normal(SEED, torch.arange(2), INITIAL_NOISE, (16, size, size), "cpu")
    packed = pipeline._pack_latents(noise, 2, 16, size, size)
    settings = {"num_inference_steps": STEPS, "height": tiny_pipelines.PIXELS, "width": tiny_pipelines.PIXELS, **options}
    latents = pipeline(tiny_pipelines.PROMPTS, latents=packed.clone(), output_type="latent", **settings).images
    images = pipeline(tiny_pipelines.PROMPTS, latents=packed.clone(), output_type="pt", **settings).images
    return pipeline._unpack_latents(latents, tiny_pipelines.PIXELS, tiny_pipelines.PIXELS, pipeline.vae_scale_factor), images


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.written(tiny_pipelines.flux(), tmp_path_factory.mktemp("flux") / "dev")


@pytest.fixture
def folder(dev: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(dev, tmp_path / "folder"))


def test_dev_gives_the_samples_of_its_pipeline(dev: Path) -> None:
    info = read_info(dev)
    assert info.model.embeds_guidance
    assert (info.prediction_type, info.solver, info.resolution) == ("flow_prediction", EULER, tiny_pipelines.PIXELS)
    assert info.pretrained is not None
    assert info.pretrained.max_tokens == 512
    pipeline = FluxPipeline.from_pretrained(dev)
    outputs = {}
    for guidance in (1.0, 3.5):
        outputs[guidance] = ours(dev, EULER, guidance)
        assert_equal(outputs[guidance], theirs(pipeline, guidance_scale=guidance))
    assert float((outputs[1.0][1] - outputs[3.5][1]).abs().max()) > 1e-3


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_schnell_gives_the_samples_of_its_pipeline(tmp_path: Path, shift: float) -> None:
    pipeline = tiny_pipelines.flux(is_dev=False, shift=shift)
    folder = tiny_pipelines.written(pipeline, tmp_path / "folder")
    info = read_info(folder)
    assert not info.model.embeds_guidance
    assert info.pretrained is not None
    assert info.pretrained.max_tokens == 256
    assert_equal(ours(folder, EULER, 1.0), theirs(pipeline, guidance_scale=0.0, max_sequence_length=256))
    two_passes = {"true_cfg_scale": 3.0, "negative_prompt": ["", ""], "max_sequence_length": 256}
    assert_equal(ours(folder, EULER, 3.0), theirs(pipeline, **two_passes))


@pytest.mark.parametrize("shift_type", ["exponential", "linear"])
@pytest.mark.parametrize("line", [{}, {"base_shift": 0.4, "max_shift": 2.0, "base_image_seq_len": 4, "max_image_seq_len": 64}])
def test_the_shift_depends_on_the_resolution(folder: Path, shift_type: str, line: dict[str, float]) -> None:
    """Solver timesteps equal those of diffusers' scheduler with the sigmas and mu of Flux's pipeline."""
    tiny_pipelines.change(folder / SCHEDULER, time_shift_type=shift_type, **line)
    for pixels in (tiny_pipelines.PIXELS, 4 * tiny_pipelines.PIXELS):
        tiny_pipelines.change(folder / VAE, sample_size=pixels)
        info = read_info(folder)
        assert info.resolution == pixels
        num_patches = (pixels // 4) ** 2
        fields = [line.get(key) for key in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")]
        mu = calculate_shift(num_patches, *(fields if line else ()))
        assert info.pretrained is not None
        assert info.pretrained.noise.shift == pytest.approx(math.exp(mu) if shift_type == "exponential" else mu, rel=1e-12)
        scheduler = tiny_pipelines.flux(time_shift_type=shift_type, **line).scheduler
        for num_steps in (1, 4, 28):
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
            table = solver_coefficients(info.solver, num_steps, schedule_of(info))
            np.testing.assert_allclose(table.sigma, scheduler.sigmas[:-1], rtol=1e-6)
            np.testing.assert_allclose(table.timesteps, scheduler.timesteps, rtol=1e-6)


def test_the_published_shift_is_about_3(folder: Path) -> None:
    """FLUX.1-dev at 1024 pixels has 4096 patches and mu 1.15. A missing size means the default of 128 latent positions."""
    tiny_pipelines.change(folder / VAE, sample_size=None)
    info = read_info(folder)
    assert (info.resolution, info.model.latent_size) == (256, 128)
    assert info.pretrained is not None
    assert info.pretrained.noise.shift == pytest.approx(math.exp(1.15))


def test_patches_of_a_latent() -> None:
    latents = torch.randn(2, 16, 8, 6)
    patches = patchify(latents)
    assert torch.equal(patches, FluxPipeline._pack_latents(latents, 2, 16, 8, 6))
    assert torch.equal(unpatchify(patches, 4, 3), latents)


def test_guidance_is_an_input(dev: Path) -> None:
    settings: dict[str, Any] = {"num_steps": 2, "guidance": 3.5, "num_images": 1}
    full = sample(dev, tiny_pipelines.PROMPTS, **settings)
    assert full.nfe == 2
    half = sample(dev, tiny_pipelines.PROMPTS, dtype="bf16", **settings)
    assert 0 < np.abs(full.array.astype(int) - half.array).mean() < 2
    with pytest.raises(ConfigError, match="no unconditional pass; leave the negative prompt out"):
        sample(dev, tiny_pipelines.PROMPTS, negative_prompt="grey", **settings)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (TRANSFORMER, {"in_channels": 384}, r"in_channels = 384: a network for inpainting"),
        (TRANSFORMER, {"in_channels": 128}, r"in_channels = 128: a network for depth or edge control"),
        (TRANSFORMER, {"in_channels": 16}, "in_channels = 16: .*16 latent channels"),
        (TRANSFORMER, {"patch_size": 2}, "patch_size = 2"),
        (
            TRANSFORMER,
            {"axes_dims_rope": [4, 4, 4]},
            r"transformer/config\.json: a FluxTransformer2DModel with this config does not run",
        ),
        (Path("model_index.json"), {"_class_name": "FluxFillPipeline"}, "FluxFillPipeline is not supported"),
        (Path("model_index.json"), {"_class_name": "FluxControlNetPipeline"}, "FluxControlNetPipeline is not supported"),
        (VAE, {"sample_size": 18}, "sample_size = 18: must be the resolution"),
        (SCHEDULER, {"shift_terminal": 0.1}, "shift_terminal = 0.1: isocost has no Flow"),
        (SCHEDULER, {"use_karras_sigmas": True}, "use_karras_sigmas = True: isocost has no Flow"),
        (SCHEDULER, {"base_shift": "a"}, "base_shift = 'a': must be a number"),
        (SCHEDULER, {"base_image_seq_len": 4096}, "base_image_seq_len = max_image_seq_len = 4096"),
        (SCHEDULER, {"time_shift_type": "cubic"}, "time_shift_type = 'cubic'"),
        (SCHEDULER, {"base_shift": -9.0, "time_shift_type": "linear"}, "shift"),
        (SCHEDULER, {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"}, "a FluxPipeline needs flow matching"),
    ],
)
def test_unsupported_configs_are_refused_in_one_line(folder: Path, file: Path, values: dict[str, Any], message: str) -> None:
    tiny_pipelines.change(folder / file, **values)
    with pytest.raises(ConfigError, match=message) as error:
        assert read_info(folder).solver
    assert "\n" not in str(error.value)


def test_only_flux_has_a_shift_that_depends_on_the_resolution(tmp_path: Path) -> None:
    folder = tiny_pipelines.written(tiny_pipelines.sd3(with_t5=False), tmp_path / "sd3")
    tiny_pipelines.change(folder / SCHEDULER, use_dynamic_shifting=True)
    with pytest.raises(ConfigError, match="use_dynamic_shifting = True: not supported"):
        read_info(folder)
