"""Published checkpoints: loaded from their folders, with the same samples as diffusers' own pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler
from diffusers.schedulers import scheduling_lcm

import tiny_pipelines
from isocost.config.pretrained import NoiseSpec
from isocost.config.sampling import SolverSpec
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.philox import INITIAL_NOISE, philox_normal
from isocost.diffusion.solvers import solver_coefficients
from isocost.models.checkpoint import load_checkpoint, read_info
from isocost.models.component_costs import pipeline_components
from isocost.models.components import load_checkpoint_autoencoder, load_checkpoint_text_encoder
from isocost.models.pretrained.architectures import FAMILIES, count_denoiser
from isocost.sampling.generate import PromptEmbeds, make_engine, schedule_of
from isocost.sampling.request import SampleRequest
from isocost.sampling.sample import sample
from published_configs import PUBLISHED

STEPS, SEED = 4, 5
DDIM, DPM = SolverSpec(name="ddim"), SolverSpec(name="dpmsolver++2m")


def ours(folder: Path, solver: SolverSpec, guidance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of the engine, [2, C, L, L], and images in [0, 1], [2, 3, R, R], not rounded."""
    opened = load_checkpoint(folder)
    autoencoder, info = load_checkpoint_autoencoder(opened), opened.info
    table = solver_coefficients(solver, STEPS, schedule_of(info))
    prompt_embeds = PromptEmbeds.encode(tiny_pipelines.PROMPTS, load_checkpoint_text_encoder(opened))
    engine = make_engine(opened.network, info, prompt_embeds, batch_size=4)
    requests = [SampleRequest(i, i, table, guidance, seed=SEED) for i in range(2)]
    results = sorted(engine.run(requests), key=lambda result: result.request.sample_index)
    latents = torch.stack([result.latent for result in results]).clone()
    with torch.no_grad():
        decoded = autoencoder.network.decode(latents / autoencoder.scale + autoencoder.shift).sample
    return latents, (decoded / 2 + 0.5).clamp(0, 1)


def theirs(pipeline: Any, guidance: float, channels: int = 4, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and images of the pipeline, from the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    shape = (channels, tiny_pipelines.LATENT_SIZE, tiny_pipelines.LATENT_SIZE)
    noise = philox_normal(SEED, torch.arange(2), INITIAL_NOISE, shape, "cpu")
    settings = {
        "num_inference_steps": STEPS,
        "guidance_scale": guidance,
        "height": tiny_pipelines.PIXELS,
        "width": tiny_pipelines.PIXELS,
        **options,
    }
    latents = pipeline(tiny_pipelines.PROMPTS, latents=noise.clone(), output_type="latent", **settings).images
    images = pipeline(tiny_pipelines.PROMPTS, latents=noise.clone(), output_type="pt", **settings).images
    return latents, images


def assert_equal(actual: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Latents to 1e-4 of their standard deviation (more than 1 for random networks), images to 1e-4."""
    assert actual[0].shape == expected[0].shape
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-4 * max(1.0, float(expected[0].std())))
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=1e-4)
    assert float((actual[1][0] - actual[1][1]).abs().max()) > 1e-3


SD_VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "sd1": ({}, "epsilon"),
    "sd2": ({"attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True}, "v_prediction"),
    "bk-sdm": (
        {
            "down_block_types": (tiny_pipelines.CROSS_DOWN, tiny_pipelines.CROSS_DOWN),
            "up_block_types": (tiny_pipelines.CROSS_UP, tiny_pipelines.CROSS_UP),
            "mid_block_type": None,
        },
        "epsilon",
    ),
}


@pytest.mark.parametrize("variant", SD_VARIANTS)
def test_stable_diffusion_gives_the_samples_of_its_pipeline(tmp_path: Path, variant: str) -> None:
    changes, prediction_type = SD_VARIANTS[variant]
    pipeline = tiny_pipelines.stable_diffusion(tiny_pipelines.ddim(prediction_type=prediction_type), changes)
    folder = tiny_pipelines.written(pipeline, tmp_path / "folder")
    for scheduler, solver, guidance in ((DDIMScheduler, DDIM, 3.0), (DPMSolverMultistepScheduler, DPM, 7.5)):
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
        assert_equal(ours(folder, solver, guidance), theirs(pipeline, guidance))


@pytest.mark.parametrize(
    "changes",
    [
        {"set_alpha_to_one": True},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.01},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
    ],
)
def test_schedules_are_read_from_the_folder(tmp_path: Path, changes: dict[str, Any]) -> None:
    pipeline = tiny_pipelines.stable_diffusion(tiny_pipelines.ddim(timestep_spacing="trailing", **changes))
    folder = tiny_pipelines.written(pipeline, tmp_path / "folder")
    assert_equal(ours(folder, DDIM, 2.0), theirs(pipeline, 2.0))
    config = pipeline.scheduler.config
    assert read_info(folder).rescale_betas_zero_snr is config.rescale_betas_zero_snr
    assert read_info(folder).solver == DDIM


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("is_zero", [False, True])
def test_alphas_are_those_of_diffusers(kind: str, is_zero: bool) -> None:
    fields = {"beta_start": 0.0008, "beta_end": 0.013, "beta_schedule": kind, "rescale_betas_zero_snr": is_zero}
    oracle = DDIMScheduler(**fields, num_train_timesteps=500).alphas_cumprod.double().numpy()
    noise = NoiseSpec(kind=kind, beta_start=0.0008, beta_end=0.013, num_timesteps=500, rescale_betas_zero_snr=is_zero)
    np.testing.assert_allclose(NoiseSchedule.from_spec(noise).alphas_cumprod, oracle, rtol=1e-3, atol=1e-6)
    assert NoiseSchedule.from_spec(noise) is NoiseSchedule.from_spec(noise.model_copy())


def test_a_student_with_guidance_as_an_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A latent consistency model against its own pipeline, with the noise of isocost in the pipeline."""
    scheduler = LCMScheduler(**tiny_pipelines.BETAS, prediction_type="epsilon", set_alpha_to_one=False)
    pipeline = tiny_pipelines.stable_diffusion(scheduler, {"time_cond_proj_dim": 16})
    folder = tiny_pipelines.written(pipeline, tmp_path / "folder")
    info = read_info(folder)
    assert (info.distilled, info.solver.name, info.num_steps) == ("consistency", "lcm", 4)
    assert info.model.embeds_guidance
    step = iter([1, 2, 3] * 2)

    def noise(*_: Any, **__: Any) -> torch.Tensor:
        shape = (4, tiny_pipelines.LATENT_SIZE, tiny_pipelines.LATENT_SIZE)
        return philox_normal(SEED, torch.arange(2), next(step), shape, "cpu")

    monkeypatch.setattr(scheduling_lcm, "randn_tensor", noise)
    assert_equal(ours(folder, SolverSpec(name="lcm"), 6.0), theirs(pipeline, 6.0))


def test_half_precision_files_and_shards_are_loaded(tmp_path: Path) -> None:
    single = tiny_pipelines.written(tiny_pipelines.stable_diffusion(), tmp_path / "single")
    half = tiny_pipelines.written(tiny_pipelines.stable_diffusion().to(dtype=torch.float16), tmp_path / "half", variant="fp16")
    shards = tiny_pipelines.written(tiny_pipelines.stable_diffusion(), tmp_path / "shards", max_shard_size="600KB")
    assert len(list((shards / "unet").glob("*.safetensors"))) > 1
    expected = ours(single, DDIM, 2.0)
    assert torch.equal(ours(shards, DDIM, 2.0)[0], expected[0])
    assert 0 < float((ours(half, DDIM, 2.0)[0] - expected[0]).abs().max()) < 0.05


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.fast_cases(1)
def test_published_sizes_are_counted_without_weights(name: str) -> None:
    published = PUBLISHED[name]
    family = next(family for family in FAMILIES if family.name == published.family)
    cost = count_denoiser(family, published.config, published.num_tokens, published.resolution, published.latent_size)
    assert cost.num_parameters == pytest.approx(published.parameters, rel=0.02)
    assert cost.gflop_per_forward > 500


def test_images_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_pipelines.written(tiny_pipelines.stable_diffusion(), tmp_path / "folder")
    samples = sample(folder, tiny_pipelines.PROMPTS, num_steps=STEPS, guidance=3.0, num_images=1, seed=SEED, solver=DDIM)
    assert samples.array.shape == (2, 1, tiny_pipelines.PIXELS, tiny_pipelines.PIXELS, 3)
    floats = ours(folder, DDIM, 3.0)[1].permute(0, 2, 3, 1).numpy()
    assert np.abs(samples.array[:, 0] - 255 * floats).max() <= 0.51
    assert samples.nfe == 2 * STEPS
    info = read_info(folder)
    assert (info.resolution, info.variant, info.num_parameters) == (
        tiny_pipelines.PIXELS,
        "folder",
        tiny_pipelines.unet().num_parameters(),
    )
    assert samples.gflop == pytest.approx(samples.nfe * info.gflop_per_forward + pipeline_components(info).total)
    monkeypatch.chdir(tmp_path)
    assert read_info(Path("folder")) == info


@pytest.mark.slow
def test_bfloat16_is_near(tmp_path: Path) -> None:
    for name, pipeline in (("sdxl", tiny_pipelines.sdxl()), ("pixart", tiny_pipelines.pixart()), ("sd3", tiny_pipelines.sd3())):
        folder = tiny_pipelines.written(pipeline, tmp_path / name)
        settings: dict[str, Any] = {"num_steps": 2, "guidance": 3.0, "num_images": 1}
        full, half = (
            sample(folder, tiny_pipelines.PROMPTS, dtype=dtype, **settings).array.astype(int) for dtype in ("fp32", "bf16")
        )
        assert 0 < np.abs(full - half).mean() < 2
