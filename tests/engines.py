"""A tiny U-Net, captions for it, and rows of every kind: what the tests of engine and network share.

Shape letters: C H W latent, L D caption states.
"""

import torch
from diffusers import UNet2DConditionModel

from isocost.config.sampling import SAMPLER_NAMES, SamplerSpec
from isocost.diffusion.noise_schedule import Schedule
from isocost.diffusion.solvers import build_table
from isocost.sampling.request import Row

SCHEDULE = Schedule.scaled_linear()
SHAPE = (4, 8, 8)
NUM_CAPTIONS, NUM_TOKENS, STATE_WIDTH = 5, 6, 8
SAMPLERS = (
    SamplerSpec(name="ddim"),
    SamplerSpec(name="ddim", spacing="leading", eta=1.0),
    SamplerSpec(name="ddpm", spacing="linspace"),
    SamplerSpec(name="dpmsolver++2m"),
    *(SamplerSpec(name=name) for name in SAMPLER_NAMES if name not in ("ddim", "ddpm", "dpmsolver++2m")),
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
            cross_attention_dim=STATE_WIDTH,
            attention_head_dim=4,
            norm_num_groups=4,
            **changes,
        )
        .eval()
        .requires_grad_(False)
    )


def caption_states():
    """Captions' states, then the null state."""
    return 2 * torch.randn(NUM_CAPTIONS + 1, NUM_TOKENS, STATE_WIDTH, generator=torch.Generator().manual_seed(1))


def table(spec, num_steps):
    return build_table(spec, num_steps, SCHEDULE)


def mixed_rows(count=36):
    return [
        Row(
            picture_id=100 + i,
            caption=i % NUM_CAPTIONS,
            table=table(SAMPLERS[i % len(SAMPLERS)], (1, 2, 3, 5, 7)[i % 5]),
            guidance=(0.0, 1.0, 3.0, 7.5)[i // 2 % 4],
            tag=("point", i),
            seed=i // 8,
            negative=3 if i % 7 == 6 else None,
        )
        for i in range(count)
    ]


def by_picture(finished):
    return {done.row.picture_id: done for done in finished}


def assert_same(latent, other):
    assert float((latent - other).norm() / other.norm()) < 1e-5
