"""A network made ready for sampling: captions projected once, guidance embedded, bfloat16, compiled once.

Oracles: diffusers' LCM scheduler and pipeline, the network itself.
"""

import pytest
import torch
from diffusers import LCMScheduler
from diffusers.schedulers import scheduling_lcm

from engine_fixtures import SD_SCHEDULER, SHAPE, SOLVERS, by_image, mixed_rows, prompt_embeds, small_unet, table
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
def states():
    return prompt_embeds()


def engine_around(prepared, states, prediction_type="v_prediction", batch_size=8, **options):
    """An engine whose captions are projected once."""

    def projected(captions):
        return prepared.project(states[captions])

    return Engine(
        prepared.denoise(), prediction_type, projected, prepared.project(states[-1:])[0], SHAPE, batch_size, **options
    )


def test_a_student_that_embeds_guidance_takes_one_pass(states, monkeypatch):
    """A guidance-distilled U-Net (diffusers' `time_cond_proj_dim`) against diffusers' LCM scheduler and embedding."""
    student = small_unet(time_cond_proj_dim=12)
    prepared = Denoiser(student)
    assert prepared.embeds_guidance
    engine = engine_around(prepared, states, "epsilon", 4, embeds_guidance=True, cache_bytes=2**20)
    solver = table(SolverSpec(name="lcm"), 3)
    rows = [SampleRequest(7, 0, solver, w, seed=5, tag=w) for w in (1.0, 2.0, 8.0)]
    finished = {done.row.tag: done for done in engine.run(rows)}
    reference = small_unet(time_cond_proj_dim=12)
    for w, done in finished.items():
        assert done.nfe == done.nfe_executed == 3
        scheduler = LCMScheduler(**SD_SCHEDULER, clip_sample=False, prediction_type="epsilon")
        scheduler.set_timesteps(3)
        x = philox_normal(5, torch.tensor([7]), 0, SHAPE, "cpu")
        for i, timestep in enumerate(scheduler.timesteps):
            noise = philox_normal(5, torch.tensor([7]), i + 1, SHAPE, "cpu")
            monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, value=noise, **__: value)
            embedded = diffusers_guidance_embedding(torch.tensor([w - 1]), 12)
            output = reference(x, timestep, states[:1], timestep_cond=embedded).sample
            x = scheduler.step(output, timestep, x).prev_sample
        assert float((done.latent - x[0]).norm() / x.norm()) < 1e-4
    assert not torch.allclose(finished[2.0].latent, finished[8.0].latent, atol=1e-3)


def diffusers_guidance_embedding(w, width):
    from diffusers import LatentConsistencyModelPipeline

    return LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=width)


@pytest.mark.parametrize("width", [12, 7, 256])
def test_guidance_embedding_is_diffusers(width):
    w = torch.tensor([1.0, 2.5, 8.0])
    ours = guidance_embedding(w, width)
    torch.testing.assert_close(ours, diffusers_guidance_embedding(w - 1, width), rtol=0, atol=2e-4)


def test_projected_captions_change_nothing(unet, states):
    generator = torch.Generator().manual_seed(2)
    x, timesteps = torch.randn(6, *SHAPE, generator=generator), 999 * torch.rand(6, generator=generator)
    with torch.inference_mode():
        plain = unet(x, timesteps, states).sample
        prepared = Denoiser(small_unet())
        projected = prepared.project(states)
        ours = prepared.denoise()(x, timesteps, projected, torch.ones(6))
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
    assert prepared.cross_attention_dim == projected.shape[-1] == 2 * sum(one.inner_dim for one in prepared.attentions)
    for i in range(6):
        assert torch.equal(prepared.project(states[i : i + 1])[0], projected[i])


def test_bfloat16_is_near_and_latents_stay_float32(states):
    rows = mixed_rows(8)
    made = {}
    for dtype in ("fp32", "bf16"):
        prepared = Denoiser(small_unet(), dtype)
        engine = engine_around(prepared, states)
        made[dtype] = by_image(engine.run(rows))
    for sample_index, done in made["bf16"].items():
        full = made["fp32"][sample_index].latent
        assert done.latent.dtype == torch.float32
        assert 0 < float((done.latent - full).norm() / full.norm()) < 0.1


@pytest.mark.slow
def test_compiled_once_for_every_solver_step_count_and_guidance(states):
    from torch._dynamo.utils import counters

    rows = mixed_rows()
    made = {}
    for compiled in (False, True):
        counters.clear()
        prepared = Denoiser(small_unet(), compiled=compiled)
        engine = engine_around(prepared, states)
        list(engine.run([SampleRequest(0, 0, table(SOLVERS[0], 2), 2.0)]))
        graphs = counters["stats"]["unique_graphs"]
        made[compiled] = by_image(engine.run(rows))
        assert counters["stats"]["unique_graphs"] == graphs
        assert (graphs > 0) is compiled
    for sample_index, done in made[True].items():
        full = made[False][sample_index].latent
        assert float((done.latent - full).norm() / full.norm()) < 1e-4
