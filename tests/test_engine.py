"""The row engine on a tiny U-Net: batching must change nothing, every evaluation is counted, diffusers gives the same latents.

Shape letters: P places of a network call, C H W latent, L D prompt embeddings.
"""

import itertools
import random
from collections import Counter

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_ddpm

from engine_fixtures import (
    NUM_CAPTIONS,
    SD_SCHEDULER,
    SHAPE,
    SOLVERS,
    assert_same,
    by_image,
    mixed_rows,
    prompt_embeds,
    small_unet,
    table,
)
from isocost.config.sampling import SolverSpec
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.philox import philox_normal
from isocost.diffusion.solvers import solver_coefficients
from isocost.errors import ConfigError, RunError
from isocost.sampling.engine import Engine
from isocost.sampling.request import SampleRequest


@pytest.fixture(scope="module")
def unet():
    return small_unet()


@pytest.fixture(scope="module")
def states():
    return prompt_embeds()


@pytest.fixture
def make_engine(unet, states):
    def make(batch_size, denoise=None, prediction_type="v_prediction", **options):
        def call_unet(x, timesteps, context, guidance):
            return unet(x, timesteps, context).sample

        return Engine(denoise or call_unet, prediction_type, lambda i: states[i], states[-1], SHAPE, batch_size, **options)

    return make


def identity(x, timesteps, context, guidance):
    return x


def test_the_same_bits_whatever_shares_the_bucket(make_engine, two_threads):
    """One bucket size: alone, in a mixed batch, in another order, over one lane or three."""
    rows = mixed_rows()
    alone = by_image(done for row in rows for done in make_engine(8).run([row]))
    shuffled = random.Random(0).sample(rows, len(rows))
    for stream, lanes in ((rows, 1), (iter(shuffled), 1), (rows, 3)):
        together = by_image(make_engine(8, num_parallel_calls=lanes).run(stream))
        assert together.keys() == alone.keys()
        for sample_index, done in together.items():
            assert torch.equal(done.latent, alone[sample_index].latent), sample_index
            assert done.row is next(row for row in rows if row.sample_index == sample_index)
    latents = torch.stack([alone[row.sample_index].latent for row in rows])
    assert torch.pdist(latents.flatten(1)).min() > 1  # no two rows are the same image


@pytest.fixture
def two_threads():
    """What a process of two cores has; lanes are to take one each whatever the process has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rounds_by_position(unet, two_threads):
    """A network whose output depends on the position in the call and on the threads, far more than any rounding does."""

    def denoise(x, timesteps, context, guidance):
        by_position = 1 + 0.01 * torch.arange(len(x)).view(-1, 1, 1, 1)
        return unet(x, timesteps, context).sample * by_position * torch.get_num_threads()

    return denoise


@pytest.mark.parametrize(
    "batch_size",
    [
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(2, marks=pytest.mark.slow),
        pytest.param(5, marks=pytest.mark.slow),
        8,
    ],
)
def test_the_position_in_the_call_is_the_images_own(make_engine, rounds_by_position, batch_size):
    rows = mixed_rows()
    alone = by_image(done for row in rows for done in make_engine(batch_size, rounds_by_position).run([row]))
    for stream, lanes in ((random.Random(1).sample(rows, len(rows)), 1), (rows, 3)):
        for sample_index, done in by_image(
            make_engine(batch_size, rounds_by_position, num_parallel_calls=lanes).run(stream)
        ).items():
            assert torch.equal(done.latent, alone[sample_index].latent), sample_index
    grid = grid_of_points()
    plain = {done.row.tag: done.latent for done in make_engine(batch_size, rounds_by_position).run(grid)}
    for done in make_engine(batch_size, rounds_by_position, cache_bytes=2**24).run(grid):
        assert torch.equal(done.latent, plain[done.row.tag]), done.row.tag


def test_other_bucket_sizes_agree_to_rounding(make_engine):
    rows = mixed_rows()
    first, *others = (by_image(make_engine(batch_size).run(rows)) for batch_size in (1, 7, 64))
    for other in others:
        for sample_index, done in other.items():
            assert_same(done.latent, first[sample_index].latent)


@pytest.fixture
def passes_seen(unet):
    """Passes that a hook on the network itself counts; an empty place is all zero."""
    seen = []
    handle = unet.register_forward_hook(
        lambda _module, inputs, _output: seen.append(int(inputs[0].flatten(1).any(dim=1).sum()))
    )
    yield seen
    handle.remove()


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_every_network_evaluation_is_counted(make_engine, passes_seen, cache_bytes):
    rows = mixed_rows()
    finished = list(make_engine(6, cache_bytes=cache_bytes).run(rows))
    assert sum(done.nfe_executed for done in finished) == sum(passes_seen)
    for done in finished:
        num_lines = 2 * done.row.table.num_steps - 1 if done.row.table.c[1:2].any() and done.row.table.a[1] == 1 else None
        lines = num_lines or done.row.table.num_steps
        assert done.nfe == lines * (2 if done.row.guidance in (3.0, 7.5) else 1)
        assert done.nfe_executed == done.nfe  # every image of these rows starts from its own noise
    heun = [done for done in finished if done.row.table.num_function_evaluations != done.row.table.num_steps]
    assert heun


def grid_of_points(images=6):
    """What a sweep makes: the same images at several guidance values, solvers and step counts."""
    points = [(w, spec, n) for w in (3.0, 6.0, 1.0) for spec in SOLVERS[::3] for n in (1, 4)]
    return [
        SampleRequest(sample_index, sample_index % NUM_CAPTIONS, table(spec, n), w, tag=(point, sample_index))
        for point, (w, spec, n) in enumerate(points)
        for sample_index in range(images)
    ]


@pytest.mark.parametrize("batch_size", [1, pytest.param(5, marks=pytest.mark.slow), 16, 64])
def test_first_evaluations_are_computed_once_and_shared(make_engine, passes_seen, batch_size):
    rows = grid_of_points()
    plain = {done.row.tag: done for done in make_engine(batch_size).run(rows)}
    formula = sum(done.nfe for done in plain.values())
    assert sum(passes_seen) == formula
    passes_seen.clear()
    shared = {done.row.tag: done for done in make_engine(batch_size, cache_bytes=2**24).run(rows)}
    first_passes = sum(2 if row.guidance != 1 else 1 for row in rows)
    initial_noise = {(row.sample_index, float(row.table.timesteps[0])) for row in rows}
    expected = formula - first_passes + 2 * len(initial_noise)
    assert sum(passes_seen) == sum(done.nfe_executed for done in shared.values()) == expected
    for tag, done in shared.items():
        assert done.nfe == plain[tag].nfe
        assert torch.equal(done.latent, plain[tag].latent)


def test_sharing_stops_where_its_memory_ends(make_engine, passes_seen):
    rows = grid_of_points()
    one = 4 * 8 * 8 * 4
    finished = list(make_engine(16, cache_bytes=5 * one).run(rows))
    assert len(finished) == len(rows)
    saved = sum(done.nfe - done.nfe_executed for done in finished)
    assert saved > 0
    assert sum(passes_seen) == sum(done.nfe_executed for done in finished)


def test_finished_places_are_refilled_at_once(make_engine):
    rows = [SampleRequest(i, 0, table(SOLVERS[0], (1, 9, 2, 2, 5)[i % 5]), 1.0) for i in range(23)]
    in_use = []

    def denoise(x, timesteps, context, guidance):
        in_use.append(int(x.flatten(1).any(dim=1).sum()))
        assert len(x) == 4
        return x

    assert len(list(make_engine(4, denoise).run(rows))) == 23
    busy_until = [sum(row.table.num_steps for row in rows[position::4]) for position in range(4)]
    assert len(in_use) == max(busy_until)
    assert in_use == sorted(in_use, reverse=True)
    assert sum(in_use) == sum(row.table.num_steps for row in rows)


def test_guidance_decides_the_states_seen(make_engine, states):
    seen = Counter()

    def denoise(x, timesteps, context, guidance):
        for latent, one in zip(x, context, strict=True):
            if latent.any():
                seen.update([int((states == one).flatten(1).all(dim=1).nonzero())])
        return x

    null = NUM_CAPTIONS
    for guidance, negative_prompt, expected in (
        (0.0, None, {null: 3}),
        (1.0, None, {2: 3}),
        (4.0, None, {2: 3, null: 3}),
        (4.0, 1, {2: 3, 1: 3}),
        (0.0, 1, {1: 3}),
    ):
        seen.clear()
        list(
            make_engine(2, denoise).run([SampleRequest(0, 2, table(SOLVERS[0], 3), guidance, negative_prompt=negative_prompt)])
        )
        assert seen == expected


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["ddim", "dpmsolver++2m"])
def test_equals_diffusers_with_guidance(make_engine, unet, states, name, prediction_type):
    options = {**SD_SCHEDULER, "prediction_type": prediction_type, "timestep_spacing": "leading"}
    if name == "ddim":
        scheduler = DDIMScheduler(**options, clip_sample=False, set_alpha_to_one=False)
    else:
        scheduler = DPMSolverMultistepScheduler(**options)
    scheduler.set_timesteps(10)
    x = philox_normal(3, torch.tensor([0, 1]), 0, SHAPE, "cpu")
    with torch.inference_mode():
        for timestep in scheduler.timesteps:
            context = torch.cat([states[-1:].expand(2, -1, -1), states[:2]])
            unconditional, conditional = unet(torch.cat([x, x]), timestep, context).sample.chunk(2)
            x = scheduler.step(unconditional + 4 * (conditional - unconditional), timestep, x).prev_sample
    solver = table(SolverSpec(name=name, timestep_spacing="leading"), 10)
    rows = [SampleRequest(i, i, solver, guidance=4.0, seed=3) for i in range(2)]
    ours = by_image(make_engine(3, prediction_type=prediction_type).run(rows))
    for i in range(2):
        assert float((ours[i].latent - x[i]).norm() / x[i].norm()) < 1e-4


def test_step_noise_is_that_of_the_next_evaluation(make_engine, unet, states, monkeypatch):
    """diffusers' ancestral solver, fed the noise of evaluation i + 1 at step i, makes the engine's image."""
    scheduler = DDPMScheduler(**SD_SCHEDULER, clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    image = torch.tensor([77])
    x = philox_normal(9, image, 0, SHAPE, "cpu")
    for i, timestep in enumerate(scheduler.timesteps):
        noise = philox_normal(9, image, i + 1, SHAPE, "cpu")
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, value=noise, **__: value)
        x = scheduler.step(unet(x, timestep, states[:1]).sample, timestep, x).prev_sample
    others = [SampleRequest(i, 1, table(SOLVERS[i % 4], 3), 2.0) for i in range(5)]
    row = SampleRequest(77, 0, table(SolverSpec(name="ddpm"), 5), guidance=1.0, seed=9)
    ours = by_image(make_engine(3).run([*others, row]))[77].latent
    assert float((ours - x[0]).norm() / x.norm()) < 1e-4


def test_broken_row_is_marked_and_spoils_no_other(make_engine, unet, states):
    def denoise(x, timesteps, context, guidance):
        output = unet(x, timesteps, context).sample
        broken = (context == states[3]).flatten(1).all(dim=1)
        return output.masked_fill(broken[:, None, None, None], float("inf"))

    rows = [SampleRequest(i, 3 if i % 3 == 0 else i % 3, table(SOLVERS[i % 4], 1 + i % 4), 1.0 + i % 2) for i in range(20)]
    whole = by_image(make_engine(4).run(rows))
    finished = by_image(make_engine(4, denoise).run(rows))
    for row in rows:
        done = finished[row.sample_index]
        assert done.finite is bool(done.latent.isfinite().all()) is (row.prompt != 3)
        if done.finite:
            assert torch.equal(done.latent, whole[row.sample_index].latent)


@pytest.mark.parametrize("lanes", [1, 2])
def test_out_of_memory_halves_the_calls_and_goes_on(make_engine, unet, lanes):
    sizes = []

    def denoise(x, timesteps, context, guidance):
        if len(sizes) >= 3 and len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        sizes.append(len(x))
        return unet(x, timesteps, context).sample

    rows = mixed_rows(20)
    whole = by_image(make_engine(10, num_parallel_calls=lanes).run(rows))
    finished = by_image(make_engine(10, denoise, num_parallel_calls=lanes).run(rows))
    assert sizes[0] == 10
    assert sizes[-1] == 3
    assert {done.batch_size for done in whole.values()} == {10}
    assert {3} <= {done.batch_size for done in finished.values()} <= {3, 5, 10}
    for sample_index, done in finished.items():
        assert_same(done.latent, whole[sample_index].latent)


def test_a_pass_that_does_not_fit_is_one_line_and_other_errors_are_not_swallowed(make_engine):
    def oom_message(x, timesteps, context, guidance):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(RunError, match="does not fit into memory"):
        list(make_engine(4, oom_message).run(mixed_rows(2)))

    def broken(x, timesteps, context, guidance):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        list(make_engine(4, broken).run(mixed_rows(2)))


def test_stream_is_read_lazily(make_engine):
    read = []
    endless = (read.append(i) or SampleRequest(i, 0, table(SOLVERS[0], 2), 1.0) for i in itertools.count())
    stream = make_engine(4, identity).run(endless)
    next(stream)
    assert len(read) <= 8
    assert list(make_engine(4).run([])) == []


def test_wrong_requests_are_refused(make_engine, unet, states):
    with pytest.raises(ConfigError, match="batch_size"):
        make_engine(0)
    with pytest.raises(ConfigError, match="choose one of"):
        make_engine(1, prediction_type="flow")
    for guidance in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="guidance"):
            SampleRequest(0, 0, table(SOLVERS[0], 1), guidance)
    with pytest.raises(ConfigError, match="seed"):
        SampleRequest(0, 0, table(SOLVERS[0], 1), 1.0, seed=2**63)
    without_null = Engine(identity, "epsilon", lambda i: states[i], None, SHAPE, 4)
    assert len(list(without_null.run([SampleRequest(0, 0, table(SOLVERS[0], 1), 1.0)]))) == 1
    with pytest.raises(ConfigError, match="no null caption; take guidance 1"):
        list(without_null.run([SampleRequest(0, 0, table(SOLVERS[0], 1), 3.0)]))
    pure = solver_coefficients(SolverSpec(), 2, NoiseSchedule.scaled_linear(rescale_betas_zero_snr=True))
    with pytest.raises(ConfigError, match="v_prediction"):
        list(make_engine(4, prediction_type="epsilon").run([SampleRequest(0, 0, pure, 1.0)]))
