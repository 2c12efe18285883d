"""Published checkpoints: read from their folders, drawn as diffusers' own pipelines draw them."""

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
from isocost.models.components import load_checkpoint_autoencoder, load_checkpoint_text_encoder
from isocost.models.pretrained.architectures import FAMILIES, count
from isocost.models.pretrained.published_configs import PUBLISHED
from isocost.sampling.generate import PromptEmbeds, make_engine, schedule_of
from isocost.sampling.request import SampleRequest
from isocost.sampling.sample import sample

STEPS, SEED = 4, 5
DDIM, DPM = SolverSpec(name="ddim"), SolverSpec(name="dpmsolver++2m")


def ours(folder: Path, solver: SolverSpec, guidance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The engine's latents [2, C, L, L] and images in [0, 1], [2, 3, R, R], not rounded."""
    opened = load_checkpoint(folder)
    autoencoder, info = load_checkpoint_autoencoder(opened), opened.info
    table = solver_coefficients(solver, STEPS, schedule_of(info))
    states = PromptEmbeds.of(tiny_pipelines.PROMPTS, load_checkpoint_text_encoder(opened))
    engine = make_engine(opened.network, info, states, batch_size=4)
    rows = [SampleRequest(i, i, table, guidance, seed=SEED) for i in range(2)]
    finished = sorted(engine.run(rows), key=lambda row: row.row.sample_index)
    latents = torch.stack([row.latent for row in finished]).clone()
    with torch.no_grad():
        decoded = autoencoder.network.decode(latents / autoencoder.scale + autoencoder.shift).sample
    return latents, (decoded / 2 + 0.5).clamp(0, 1)


def theirs(pipeline: Any, guidance: float, channels: int = 4, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The pipeline's, from the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    noise = philox_normal(SEED, torch.arange(2), INITIAL_NOISE, (channels, tiny_pipelines.SIDE, tiny_pipelines.SIDE), "cpu")
    asked = {
        "num_inference_steps": STEPS,
        "guidance_scale": guidance,
        "height": tiny_pipelines.PIXELS,
        "width": tiny_pipelines.PIXELS,
        **options,
    }
    latents = pipeline(tiny_pipelines.PROMPTS, latents=noise.clone(), output_type="latent", **asked).images
    images = pipeline(tiny_pipelines.PROMPTS, latents=noise.clone(), output_type="pt", **asked).images
    return latents, images


def assert_equal(own: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Latents to 1e-4 of their spread (random networks leave them larger than 1), images to 1e-4."""
    assert own[0].shape == other[0].shape
    torch.testing.assert_close(own[0], other[0], rtol=0, atol=1e-4 * max(1.0, float(other[0].std())))
    torch.testing.assert_close(own[1], other[1], rtol=0, atol=1e-4)
    assert float((own[1][0] - own[1][1]).abs().max()) > 1e-3


SD_KINDS: dict[str, tuple[dict[str, Any], str]] = {
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


@pytest.mark.parametrize("kind", SD_KINDS)
def test_stable_diffusion_draws_as_its_pipeline(tmp_path: Path, kind: str) -> None:
    changes, prediction_type = SD_KINDS[kind]
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
def test_schedules_are_the_folders_own(tmp_path: Path, changes: dict[str, Any]) -> None:
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
    np.testing.assert_allclose(NoiseSchedule.of(noise).alphas_cumprod, oracle, rtol=1e-3, atol=1e-6)
    assert NoiseSchedule.of(noise) is NoiseSchedule.of(noise.model_copy())


def test_a_student_that_takes_guidance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A latent consistency model against its own pipeline, our noise put in the place of the pipeline's."""
    scheduler = LCMScheduler(**tiny_pipelines.BETAS, prediction_type="epsilon", set_alpha_to_one=False)
    pipeline = tiny_pipelines.stable_diffusion(scheduler, {"time_cond_proj_dim": 16})
    folder = tiny_pipelines.written(pipeline, tmp_path / "folder")
    info = read_info(folder)
    assert (info.distilled, info.solver.name, info.num_steps) == ("consistency", "lcm", 4)
    assert info.model.embeds_guidance
    step = iter([1, 2, 3] * 2)

    def noise(*_: Any, **__: Any) -> torch.Tensor:
        return philox_normal(SEED, torch.arange(2), next(step), (4, tiny_pipelines.SIDE, tiny_pipelines.SIDE), "cpu")

    monkeypatch.setattr(scheduling_lcm, "randn_tensor", noise)
    assert_equal(ours(folder, SolverSpec(name="lcm"), 6.0), theirs(pipeline, 6.0))


def test_half_precision_files_and_shards_are_read(tmp_path: Path) -> None:
    whole = tiny_pipelines.written(tiny_pipelines.stable_diffusion(), tmp_path / "whole")
    half = tiny_pipelines.written(tiny_pipelines.stable_diffusion().to(dtype=torch.float16), tmp_path / "half", variant="fp16")
    shards = tiny_pipelines.written(tiny_pipelines.stable_diffusion(), tmp_path / "shards", max_shard_size="600KB")
    assert len(list((shards / "unet").glob("*.safetensors"))) > 1
    wanted = ours(whole, DDIM, 2.0)
    assert torch.equal(ours(shards, DDIM, 2.0)[0], wanted[0])
    assert 0 < float((ours(half, DDIM, 2.0)[0] - wanted[0]).abs().max()) < 0.05


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_counted_without_weights(name: str) -> None:
    published = PUBLISHED[name]
    kind = next(kind for kind in FAMILIES if kind.name == published.kind)
    counted = count(kind, published.config, published.num_tokens, published.resolution, published.side)
    assert counted.num_parameters == pytest.approx(published.parameters, rel=0.02)
    assert counted.gflop_per_forward > 500


def test_images_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_pipelines.written(tiny_pipelines.stable_diffusion(), tmp_path / "folder")
    drawn = sample(folder, tiny_pipelines.PROMPTS, num_steps=STEPS, guidance=3.0, num_images=1, seed=SEED, solver=DDIM)
    assert drawn.images.shape == (2, 1, tiny_pipelines.PIXELS, tiny_pipelines.PIXELS, 3)
    floats = ours(folder, DDIM, 3.0)[1].permute(0, 2, 3, 1).numpy()
    assert np.abs(drawn.images[:, 0] - 255 * floats).max() <= 0.51
    assert drawn.nfe == 2 * STEPS
    info = read_info(folder)
    assert (info.resolution, info.variant, info.num_parameters) == (
        tiny_pipelines.PIXELS,
        "folder",
        tiny_pipelines.unet().num_parameters(),
    )
    assert drawn.gflop == pytest.approx(drawn.nfe * info.gflop_per_forward)
    monkeypatch.chdir(tmp_path)
    assert read_info(Path("folder")) == info


def test_half_of_the_bits_are_near(tmp_path: Path) -> None:
    for name, pipeline in (("sdxl", tiny_pipelines.sdxl()), ("pixart", tiny_pipelines.pixart()), ("sd3", tiny_pipelines.sd3())):
        folder = tiny_pipelines.written(pipeline, tmp_path / name)
        asked: dict[str, Any] = {"num_steps": 2, "guidance": 3.0, "num_images": 1}
        full, half = (
            sample(folder, tiny_pipelines.PROMPTS, dtype=bits, **asked).images.astype(int) for bits in ("fp32", "bf16")
        )
        assert 0 < np.abs(full - half).mean() < 2
