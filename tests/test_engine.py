"""The row engine on a tiny U-Net: batching must change nothing, every evaluation is counted, diffusers gives the same latents.

Shape letters: P passes of a network call, C H W latent, L D caption states.
"""

import heapq
import random
from collections import Counter

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.schedulers import scheduling_ddpm

from isocost.diffusion.engine import Engine, Row
from isocost.diffusion.noise import Schedule, normal_noise
from isocost.diffusion.samplers import build_table
from isocost.errors import RequestError
from isocost.study import SamplerSpec

SCHEDULE = Schedule.scaled_linear()
SHAPE = (4, 8, 8)
NUM_CAPTIONS, NUM_TOKENS, STATE_WIDTH = 5, 6, 8
SAMPLERS = (
    SamplerSpec(name="ddim"),
    SamplerSpec(name="ddim", spacing="leading", eta=1.0),
    SamplerSpec(name="ddpm", spacing="linspace"),
    SamplerSpec(name="dpmsolver++2m"),
)


@pytest.fixture(scope="module")
def unet():
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
        )
        .eval()
        .requires_grad_(False)
    )


@pytest.fixture(scope="module")
def states():
    """Captions' states, then the null state."""
    return 2 * torch.randn(NUM_CAPTIONS + 1, NUM_TOKENS, STATE_WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def make_engine(unet, states):
    def make(batch_size, denoise=None, prediction="v_prediction", **options):
        def call_unet(x, timesteps, context):
            return unet(x, timesteps, context).sample

        return Engine(denoise or call_unet, prediction, lambda i: states[i], states[-1], SHAPE, batch_size, **options)

    return make


def table(spec, num_steps):
    return build_table(spec, num_steps, SCHEDULE)


def mixed_rows(count=24):
    return [
        Row(
            picture_id=100 + i,
            caption=i % NUM_CAPTIONS,
            table=table(SAMPLERS[i % 4], (1, 2, 3, 5, 7)[i % 5]),
            guidance=(0.0, 1.0, 3.0, 7.5)[i // 2 % 4],
            tag=("point", i),
            seed=i // 8,
        )
        for i in range(count)
    ]


def by_picture(finished):
    return {done.row.picture_id: done for done in finished}


def assert_same(latent, other):
    assert float((latent - other).norm() / other.norm()) < 1e-5


def test_rows_alone_equal_rows_in_mixed_batches(make_engine):
    rows = mixed_rows()
    alone = by_picture(done for row in rows for done in make_engine(1).run([row]))
    for batch_size in (2, 5, 64):
        together = by_picture(make_engine(batch_size).run(rows))
        assert together.keys() == alone.keys()
        for picture_id, done in together.items():
            assert_same(done.latent, alone[picture_id].latent)
    latents = torch.stack([alone[row.picture_id].latent for row in rows])
    assert torch.pdist(latents.flatten(1)).min() > 1  # no two rows are the same picture


def test_order_does_not_matter(make_engine):
    rows = mixed_rows()
    in_order = by_picture(make_engine(6).run(rows))
    shuffled = random.Random(0).sample(rows, len(rows))
    for picture_id, done in by_picture(make_engine(6).run(iter(shuffled))).items():
        assert_same(done.latent, in_order[picture_id].latent)
        assert done.row is next(row for row in rows if row.picture_id == picture_id)


def test_every_network_evaluation_is_counted(make_engine, unet):
    passes = []
    handle = unet.register_forward_hook(lambda _module, inputs, _output: passes.append(len(inputs[0])))
    rows = mixed_rows()
    finished = list(make_engine(6).run(rows))
    handle.remove()
    assert sum(done.nfe for done in finished) == sum(passes)
    for done in finished:
        assert done.nfe == done.row.table.num_steps * (2 if done.row.guidance in (3.0, 7.5) else 1)


def test_finished_slots_are_refilled_at_once(make_engine):
    rows = [Row(i, 0, table(SAMPLERS[0], (1, 9, 2, 2, 5)[i % 5]), 1.0) for i in range(23)]
    batch_sizes = []

    def denoise(x, timesteps, context):
        batch_sizes.append(len(x))
        return x

    assert len(list(make_engine(4, denoise).run(rows))) == 23
    free_at = [0] * 4  # four machines that take the jobs of a list as they come free
    for row in rows:
        heapq.heappush(free_at, heapq.heappop(free_at) + row.table.num_steps)
    assert len(batch_sizes) == max(free_at)
    assert batch_sizes == sorted(batch_sizes, reverse=True)
    assert sum(batch_sizes) == sum(row.table.num_steps for row in rows)


def test_guidance_decides_the_states_seen(make_engine, states):
    seen = Counter()

    def denoise(x, timesteps, context):
        seen.update(int((states == one).flatten(1).all(dim=1).nonzero()) for one in context)
        return x

    for guidance, expected in ((0.0, {NUM_CAPTIONS: 3}), (1.0, {2: 3}), (4.0, {2: 3, NUM_CAPTIONS: 3})):
        seen.clear()
        list(make_engine(2, denoise).run([Row(0, 2, table(SAMPLERS[0], 3), guidance)]))
        assert seen == expected


SD_SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["ddim", "dpmsolver++2m"])
def test_equals_diffusers_with_guidance(make_engine, unet, states, name, prediction):
    options = {**SD_SCHEDULER, "prediction_type": prediction, "timestep_spacing": "leading"}
    if name == "ddim":
        scheduler = DDIMScheduler(**options, clip_sample=False, set_alpha_to_one=False)
    else:
        scheduler = DPMSolverMultistepScheduler(**options)
    scheduler.set_timesteps(10)
    x = normal_noise(3, torch.tensor([0, 1]), 0, SHAPE, "cpu")
    with torch.inference_mode():
        for timestep in scheduler.timesteps:
            context = torch.cat([states[-1:].expand(2, -1, -1), states[:2]])
            unconditional, conditional = unet(torch.cat([x, x]), timestep, context).sample.chunk(2)
            x = scheduler.step(unconditional + 4 * (conditional - unconditional), timestep, x).prev_sample
    sampler = table(SamplerSpec(name=name, spacing="leading"), 10)
    rows = [Row(i, i, sampler, guidance=4.0, seed=3) for i in range(2)]
    ours = by_picture(make_engine(3, prediction=prediction).run(rows))
    for i in range(2):
        assert float((ours[i].latent - x[i]).norm() / x[i].norm()) < 1e-4


def test_step_noise_is_that_of_the_next_evaluation(make_engine, unet, states, monkeypatch):
    """diffusers' ancestral sampler, fed the noise of evaluation i + 1 at step i, makes the engine's picture."""
    scheduler = DDPMScheduler(**SD_SCHEDULER, clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    picture = torch.tensor([77])
    x = normal_noise(9, picture, 0, SHAPE, "cpu")
    for i, timestep in enumerate(scheduler.timesteps):
        noise = normal_noise(9, picture, i + 1, SHAPE, "cpu")
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, value=noise, **__: value)
        x = scheduler.step(unet(x, timestep, states[:1]).sample, timestep, x).prev_sample
    others = [Row(i, 1, table(SAMPLERS[i % 4], 3), 2.0) for i in range(5)]
    row = Row(77, 0, table(SamplerSpec(name="ddpm"), 5), guidance=1.0, seed=9)
    ours = by_picture(make_engine(3).run([*others, row]))[77].latent
    assert float((ours - x[0]).norm() / x.norm()) < 1e-4


def test_broken_row_is_marked_and_spoils_no_other(make_engine, unet, states):
    def denoise(x, timesteps, context):
        output = unet(x, timesteps, context).sample
        broken = (context == states[3]).flatten(1).all(dim=1)
        return output.masked_fill(broken[:, None, None, None], float("inf"))

    rows = [Row(i, 3 if i % 3 == 0 else i % 3, table(SAMPLERS[i % 4], 1 + i % 4), 1.0 + i % 2) for i in range(20)]
    whole = by_picture(make_engine(4).run(rows))
    finished = by_picture(make_engine(4, denoise).run(rows))
    for row in rows:
        done = finished[row.picture_id]
        assert done.finite is bool(done.latent.isfinite().all()) is (row.caption != 3)
        if done.finite:
            assert_same(done.latent, whole[row.picture_id].latent)


def test_stream_is_read_lazily(make_engine):
    read = []
    endless = (read.append(i) or Row(i, 0, table(SAMPLERS[0], 2), 1.0) for i in iter(int, 1))
    stream = make_engine(4, lambda x, timesteps, context: x).run(endless)
    next(stream)
    assert len(read) <= 8
    assert list(make_engine(4).run([])) == []


def test_bfloat16_is_near_and_latents_stay_float32(make_engine):
    rows = mixed_rows(8)
    full, half = (by_picture(make_engine(8, precision=precision).run(rows)) for precision in ("fp32", "bf16"))
    for picture_id, done in half.items():
        assert done.latent.dtype == torch.float32
        assert 0 < float((done.latent - full[picture_id].latent).norm() / full[picture_id].latent.norm()) < 0.1


def test_wrong_requests_are_refused(make_engine):
    with pytest.raises(RequestError, match="batch_size"):
        make_engine(0)
    with pytest.raises(RequestError, match="choose one of"):
        make_engine(1, prediction="flow")
    for guidance in (-1.0, float("nan"), float("inf")):
        with pytest.raises(RequestError, match="guidance"):
            Row(0, 0, table(SAMPLERS[0], 1), guidance)
    with pytest.raises(RequestError, match="seed"):
        Row(0, 0, table(SAMPLERS[0], 1), 1.0, seed=2**63)
