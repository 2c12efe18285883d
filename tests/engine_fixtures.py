"""A tiny U-Net, prompt embeddings for it, and requests of every kind, shared by the tests of the engine and the denoiser.

Shape letters: C H W latent, L D prompt embeddings.
"""

import torch
from diffusers import UNet2DConditionModel

from isocost.config.sampling import SolverSpec
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.solvers import SOLVERS, solver_coefficients
from isocost.sampling.request import SampleRequest

SCHEDULE = NoiseSchedule.scaled_linear()
SHAPE = (4, 8, 8)
NUM_PROMPTS, NUM_TOKENS, EMBED_DIM = 5, 6, 8
SOLVER_SPECS = (
    SolverSpec(name="ddim"),
    SolverSpec(name="ddim", timestep_spacing="leading", eta=1.0),
    SolverSpec(name="ddpm", timestep_spacing="linspace"),
    SolverSpec(name="dpmsolver++2m"),
    *(SolverSpec(name=name) for name in SOLVERS if name not in ("ddim", "ddpm", "dpmsolver++2m")),
)
SD_SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def small_unet(**changes):
    torch.manual_seed(0)
    return (
        UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=EMBED_DIM,
            attention_head_dim=4,
            norm_num_groups=4,
            **changes,
        )
        .eval()
        .requires_grad_(False)
    )


def prompt_embeds():
    """[NUM_PROMPTS + 1, L, D], the embeddings of the prompts, then of the empty prompt."""
    return 2 * torch.randn(NUM_PROMPTS + 1, NUM_TOKENS, EMBED_DIM, generator=torch.Generator().manual_seed(1))


def coefficients(spec, num_steps):
    return solver_coefficients(spec, num_steps, SCHEDULE)


def mixed_requests(count=36):
    return [
        SampleRequest(
            sample_index=100 + i,
            prompt=i % NUM_PROMPTS,
            coefficients=coefficients(SOLVER_SPECS[i % len(SOLVER_SPECS)], (1, 2, 3, 5, 7)[i % 5]),
            guidance=(0.0, 1.0, 3.0, 7.5)[i // 2 % 4],
            tag=("point", i),
            seed=i // 8,
            negative_prompt=3 if i % 7 == 6 else None,
        )
        for i in range(count)
    ]


def by_sample_index(results):
    return {result.request.sample_index: result for result in results}


def assert_same(latent, expected):
    assert float((latent - expected).norm() / expected.norm()) < 1e-5
