"""A network denoiser for sampling: prompts projected once, guidance embedded, bfloat16, compiled once.

References: diffusers' LCM scheduler and pipeline, the network itself.
"""

import pytest
import torch
from diffusers import LCMScheduler
from diffusers.schedulers import scheduling_lcm

from engine_fixtures import (
    SD_SCHEDULER,
    SHAPE,
    SOLVER_SPECS,
    by_sample_index,
    coefficients,
    mixed_requests,
    prompt_embeds,
    small_unet,
)
from isocost.config.sampling import SolverSpec
from isocost.diffusion.philox import philox_normal
from isocost.models.guidance_embedding import guidance_embedding
from isocost.sampling.denoiser import Denoiser
from isocost.sampling.engine import Engine
from isocost.sampling.request import SampleRequest


@pytest.fixture(scope="module")
def unet():
    return small_unet()


@pytest.fixture(scope="module")
def embeds():
    return prompt_embeds()


def engine_around(denoiser, embeds, prediction_type="v_prediction", batch_size=8, **options):
    """An engine whose prompts are projected once."""

    def projected(prompts):
        return denoiser.project(embeds[prompts])

    return Engine(
        denoiser.denoise(), prediction_type, projected, denoiser.project(embeds[-1:])[0], SHAPE, batch_size, **options
    )


def test_a_student_that_embeds_guidance_runs_one_pass_per_evaluation(embeds, monkeypatch):
    """A guidance-distilled U-Net (diffusers' `time_cond_proj_dim`), compared with diffusers' LCM scheduler and embedding."""
    student = small_unet(time_cond_proj_dim=12)
    denoiser = Denoiser(student)
    assert denoiser.embeds_guidance
    engine = engine_around(denoiser, embeds, "epsilon", 4, embeds_guidance=True, cache_bytes=2**20)
    solver = coefficients(SolverSpec(name="lcm"), 3)
    requests = [SampleRequest(7, 0, solver, w, seed=5, tag=w) for w in (1.0, 2.0, 8.0)]
    finished = {result.request.tag: result for result in engine.run(requests)}
    reference = small_unet(time_cond_proj_dim=12)
    for w, result in finished.items():
        assert result.nfe == result.nfe_executed == 3
        scheduler = LCMScheduler(**SD_SCHEDULER, clip_sample=False, prediction_type="epsilon")
        scheduler.set_timesteps(3)
        x = philox_normal(5, torch.tensor([7]), 0, SHAPE, "cpu")
        for i, timestep in enumerate(scheduler.timesteps):
            noise = philox_normal(5, torch.tensor([7]), i + 1, SHAPE, "cpu")
            monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, value=noise, **__: value)
            embedded = diffusers_guidance_embedding(torch.tensor([w - 1]), 12)
            output = reference(x, timestep, embeds[:1], timestep_cond=embedded).sample
            x = scheduler.step(output, timestep, x).prev_sample
        assert float((result.latent - x[0]).norm() / x.norm()) < 1e-4
    assert not torch.allclose(finished[2.0].latent, finished[8.0].latent, atol=1e-3)


def diffusers_guidance_embedding(w, width):
    from diffusers import LatentConsistencyModelPipeline

    return LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=width)


@pytest.mark.parametrize("width", [12, 7, 256])
def test_guidance_embedding_equals_diffusers(width):
    w = torch.tensor([1.0, 2.5, 8.0])
    ours = guidance_embedding(w, width)
    torch.testing.assert_close(ours, diffusers_guidance_embedding(w - 1, width), rtol=0, atol=2e-4)


def test_projected_prompts_change_nothing(unet, embeds):
    generator = torch.Generator().manual_seed(2)
    x, timesteps = torch.randn(6, *SHAPE, generator=generator), 999 * torch.rand(6, generator=generator)
    with torch.inference_mode():
        plain = unet(x, timesteps, embeds).sample
        denoiser = Denoiser(small_unet())
        projected = denoiser.project(embeds)
        ours = denoiser.denoise()(x, timesteps, projected, torch.ones(6))
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
    assert (
        denoiser.cross_attention_dim == projected.shape[-1] == 2 * sum(attention.inner_dim for attention in denoiser.attentions)
    )
    for i in range(6):
        assert torch.equal(denoiser.project(embeds[i : i + 1])[0], projected[i])


def test_bfloat16_is_close_and_latents_stay_float32(embeds):
    requests = mixed_requests(8)
    results = {}
    for dtype in ("fp32", "bf16"):
        denoiser = Denoiser(small_unet(), dtype)
        engine = engine_around(denoiser, embeds)
        results[dtype] = by_sample_index(engine.run(requests))
    for sample_index, result in results["bf16"].items():
        full = results["fp32"][sample_index].latent
        assert result.latent.dtype == torch.float32
        assert 0 < float((result.latent - full).norm() / full.norm()) < 0.1


@pytest.mark.slow
def test_one_compilation_serves_every_solver_number_of_steps_and_guidance(embeds):
    from torch._dynamo.utils import counters

    requests = mixed_requests()
    results = {}
    for compiled in (False, True):
        counters.clear()
        denoiser = Denoiser(small_unet(), compiled=compiled)
        engine = engine_around(denoiser, embeds)
        list(engine.run([SampleRequest(0, 0, coefficients(SOLVER_SPECS[0], 2), 2.0)]))
        graphs = counters["stats"]["unique_graphs"]
        results[compiled] = by_sample_index(engine.run(requests))
        assert counters["stats"]["unique_graphs"] == graphs
        assert (graphs > 0) is compiled
    for sample_index, result in results[True].items():
        full = results[False][sample_index].latent
        assert float((result.latent - full).norm() / full.norm()) < 1e-4
