"""The sampling engine on a tiny U-Net.

Batching changes nothing, every evaluation is counted, and diffusers gives the same latents.

Shape letters: P slots of a network call, C H W latent, L D prompt embeddings.
"""

import itertools
import random
from collections import Counter

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_ddpm

from engine_fixtures import (
    NUM_PROMPTS,
    SD_SCHEDULER,
    SHAPE,
    SOLVER_SPECS,
    assert_same,
    by_sample_index,
    coefficients,
    mixed_requests,
    prompt_embeds,
    small_unet,
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
def embeds():
    return prompt_embeds()


@pytest.fixture
def make_engine(unet, embeds):
    def make(batch_size, denoise=None, prediction_type="v_prediction", **options):
        def call_unet(x, timesteps, context, guidance):
            return unet(x, timesteps, context).sample

        return Engine(denoise or call_unet, prediction_type, lambda i: embeds[i], embeds[-1], SHAPE, batch_size, **options)

    return make


def identity(x, timesteps, context, guidance):
    return x


@pytest.mark.fast_cases(1)
def test_the_same_bits_whatever_shares_the_batch(make_engine, two_threads):
    """At one batch size: a single request, a mixed batch, another order, and one or three parallel calls."""
    requests = mixed_requests()
    single = by_sample_index(result for request in requests for result in make_engine(8).run([request]))
    shuffled = random.Random(0).sample(requests, len(requests))
    for stream, num_calls in ((requests, 1), (iter(shuffled), 1), (requests, 3)):
        together = by_sample_index(make_engine(8, num_parallel_calls=num_calls).run(stream))
        assert together.keys() == single.keys()
        for sample_index, result in together.items():
            assert torch.equal(result.latent, single[sample_index].latent), sample_index
            assert result.request is next(request for request in requests if request.sample_index == sample_index)
    latents = torch.stack([single[request.sample_index].latent for request in requests])
    assert torch.pdist(latents.flatten(1)).min() > 1  # no two images are the same


@pytest.fixture
def two_threads():
    """Two threads, as in a process on two cores. A network call must use one thread whatever this setting is."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def rounds_by_position(unet, two_threads):
    """A network whose output depends on the position in the call and on the threads, much more than rounding does."""

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
        pytest.param(8, marks=pytest.mark.slow),
    ],
)
def test_the_position_in_the_call_depends_only_on_the_image(make_engine, rounds_by_position, batch_size):
    requests = mixed_requests()
    single = by_sample_index(
        result for request in requests for result in make_engine(batch_size, rounds_by_position).run([request])
    )
    for stream, num_calls in ((random.Random(1).sample(requests, len(requests)), 1), (requests, 3)):
        for sample_index, result in by_sample_index(
            make_engine(batch_size, rounds_by_position, num_parallel_calls=num_calls).run(stream)
        ).items():
            assert torch.equal(result.latent, single[sample_index].latent), sample_index
    points = requests_of_points()
    plain = {result.request.tag: result.latent for result in make_engine(batch_size, rounds_by_position).run(points)}
    for result in make_engine(batch_size, rounds_by_position, cache_bytes=2**24).run(points):
        assert torch.equal(result.latent, plain[result.request.tag]), result.request.tag


@pytest.mark.slow
def test_other_batch_sizes_agree_up_to_rounding(make_engine):
    requests = mixed_requests()
    first, *further = (by_sample_index(make_engine(batch_size).run(requests)) for batch_size in (1, 7, 64))
    for results in further:
        for sample_index, result in results.items():
            assert_same(result.latent, first[sample_index].latent)


@pytest.fixture
def passes_seen(unet):
    """Passes counted by a hook on the network itself; an empty slot is all zero."""
    seen = []
    handle = unet.register_forward_hook(
        lambda _module, inputs, _output: seen.append(int(inputs[0].flatten(1).any(dim=1).sum()))
    )
    yield seen
    handle.remove()


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_every_network_evaluation_is_counted(make_engine, passes_seen, cache_bytes):
    requests = mixed_requests()
    finished = list(make_engine(6, cache_bytes=cache_bytes).run(requests))
    assert sum(result.nfe_executed for result in finished) == sum(passes_seen)
    for result in finished:
        solver = result.request.coefficients
        is_heun = solver.c[1:2].any() and solver.a[1] == 1
        evaluations = 2 * solver.num_steps - 1 if is_heun else solver.num_steps
        assert result.nfe == evaluations * (2 if result.request.guidance in (3.0, 7.5) else 1)
        assert result.nfe_executed == result.nfe  # every one of these images has its own initial noise
    solvers = [result.request.coefficients for result in finished]
    assert any(solver.num_function_evaluations != solver.num_steps for solver in solvers)  # Heun is among them


def requests_of_points(num_images=6):
    """The requests of a sweep: the same images at several guidance values, solvers and numbers of steps."""
    points = [(w, spec, n) for w in (3.0, 6.0, 1.0) for spec in SOLVER_SPECS[::3] for n in (1, 4)]
    return [
        SampleRequest(sample_index, sample_index % NUM_PROMPTS, coefficients(spec, n), w, tag=(point, sample_index))
        for point, (w, spec, n) in enumerate(points)
        for sample_index in range(num_images)
    ]


@pytest.mark.parametrize(
    "batch_size", [pytest.param(1, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow), 16, 64]
)
@pytest.mark.fast_cases(1)
def test_first_evaluations_are_computed_once_and_shared(make_engine, passes_seen, batch_size):
    requests = requests_of_points()
    plain = {result.request.tag: result for result in make_engine(batch_size).run(requests)}
    total = sum(result.nfe for result in plain.values())
    assert sum(passes_seen) == total
    passes_seen.clear()
    shared = {result.request.tag: result for result in make_engine(batch_size, cache_bytes=2**24).run(requests)}
    first_passes = sum(2 if request.guidance != 1 else 1 for request in requests)
    starts = {(request.sample_index, float(request.coefficients.timesteps[0])) for request in requests}
    expected = total - first_passes + 2 * len(starts)
    assert sum(passes_seen) == sum(result.nfe_executed for result in shared.values()) == expected
    for tag, result in shared.items():
        assert result.nfe == plain[tag].nfe
        assert torch.equal(result.latent, plain[tag].latent)


def test_sharing_ends_when_the_cache_is_full(make_engine, passes_seen):
    requests = requests_of_points()
    output_bytes = 4 * 8 * 8 * 4
    finished = list(make_engine(16, cache_bytes=5 * output_bytes).run(requests))
    assert len(finished) == len(requests)
    saved = sum(result.nfe - result.nfe_executed for result in finished)
    assert saved > 0
    assert sum(passes_seen) == sum(result.nfe_executed for result in finished)


def test_free_slots_are_refilled_at_once(make_engine):
    requests = [SampleRequest(i, 0, coefficients(SOLVER_SPECS[0], (1, 9, 2, 2, 5)[i % 5]), 1.0) for i in range(23)]
    num_busy = []

    def denoise(x, timesteps, context, guidance):
        num_busy.append(int(x.flatten(1).any(dim=1).sum()))
        assert len(x) == 4
        return x

    assert len(list(make_engine(4, denoise).run(requests))) == 23
    busy_until = [sum(request.coefficients.num_steps for request in requests[position::4]) for position in range(4)]
    assert len(num_busy) == max(busy_until)
    assert num_busy == sorted(num_busy, reverse=True)
    assert sum(num_busy) == sum(request.coefficients.num_steps for request in requests)


def test_guidance_decides_the_prompt_embeddings(make_engine, embeds):
    seen = Counter()

    def denoise(x, timesteps, context, guidance):
        for latent, row in zip(x, context, strict=True):
            if latent.any():
                seen.update([int((embeds == row).flatten(1).all(dim=1).nonzero())])
        return x

    null = NUM_PROMPTS
    for guidance, negative_prompt, expected in (
        (0.0, None, {null: 3}),
        (1.0, None, {2: 3}),
        (4.0, None, {2: 3, null: 3}),
        (4.0, 1, {2: 3, 1: 3}),
        (0.0, 1, {1: 3}),
    ):
        seen.clear()
        list(
            make_engine(2, denoise).run(
                [SampleRequest(0, 2, coefficients(SOLVER_SPECS[0], 3), guidance, negative_prompt=negative_prompt)]
            )
        )
        assert seen == expected


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["ddim", "dpmsolver++2m"])
@pytest.mark.fast_cases(3)
def test_equals_diffusers_with_guidance(make_engine, unet, embeds, name, prediction_type):
    options = {**SD_SCHEDULER, "prediction_type": prediction_type, "timestep_spacing": "leading"}
    if name == "ddim":
        scheduler = DDIMScheduler(**options, clip_sample=False, set_alpha_to_one=False)
    else:
        scheduler = DPMSolverMultistepScheduler(**options)
    scheduler.set_timesteps(10)
    x = philox_normal(3, torch.tensor([0, 1]), 0, SHAPE, "cpu")
    with torch.inference_mode():
        for timestep in scheduler.timesteps:
            context = torch.cat([embeds[-1:].expand(2, -1, -1), embeds[:2]])
            unconditional, conditional = unet(torch.cat([x, x]), timestep, context).sample.chunk(2)
            x = scheduler.step(unconditional + 4 * (conditional - unconditional), timestep, x).prev_sample
    solver = coefficients(SolverSpec(name=name, timestep_spacing="leading"), 10)
    requests = [SampleRequest(i, i, solver, guidance=4.0, seed=3) for i in range(2)]
    ours = by_sample_index(make_engine(3, prediction_type=prediction_type).run(requests))
    for i in range(2):
        assert float((ours[i].latent - x[i]).norm() / x[i].norm()) < 1e-4


def test_step_noise_is_that_of_the_next_evaluation(make_engine, unet, embeds, monkeypatch):
    """diffusers' ancestral solver with the noise of evaluation i + 1 at step i gives the engine's image."""
    scheduler = DDPMScheduler(**SD_SCHEDULER, clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    image = torch.tensor([77])
    x = philox_normal(9, image, 0, SHAPE, "cpu")
    for i, timestep in enumerate(scheduler.timesteps):
        noise = philox_normal(9, image, i + 1, SHAPE, "cpu")
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, value=noise, **__: value)
        x = scheduler.step(unet(x, timestep, embeds[:1]).sample, timestep, x).prev_sample
    company = [SampleRequest(i, 1, coefficients(SOLVER_SPECS[i % 4], 3), 2.0) for i in range(5)]
    request = SampleRequest(77, 0, coefficients(SolverSpec(name="ddpm"), 5), guidance=1.0, seed=9)
    ours = by_sample_index(make_engine(3).run([*company, request]))[77].latent
    assert float((ours - x[0]).norm() / x.norm()) < 1e-4


def test_a_nonfinite_image_is_marked_and_changes_no_other_image(make_engine, unet, embeds):
    def denoise(x, timesteps, context, guidance):
        output = unet(x, timesteps, context).sample
        is_prompt_3 = (context == embeds[3]).flatten(1).all(dim=1)
        return output.masked_fill(is_prompt_3[:, None, None, None], float("inf"))

    requests = [
        SampleRequest(i, 3 if i % 3 == 0 else i % 3, coefficients(SOLVER_SPECS[i % 4], 1 + i % 4), 1.0 + i % 2)
        for i in range(20)
    ]
    expected_results = by_sample_index(make_engine(4).run(requests))
    finished = by_sample_index(make_engine(4, denoise).run(requests))
    for request in requests:
        result = finished[request.sample_index]
        assert result.finite is bool(result.latent.isfinite().all()) is (request.prompt != 3)
        if result.finite:
            assert torch.equal(result.latent, expected_results[request.sample_index].latent)


@pytest.mark.parametrize("num_calls", [1, 2])
def test_out_of_memory_halves_the_calls_and_continues(make_engine, unet, num_calls):
    sizes = []

    def denoise(x, timesteps, context, guidance):
        if len(sizes) >= 3 and len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        sizes.append(len(x))
        return unet(x, timesteps, context).sample

    requests = mixed_requests(20)
    expected_results = by_sample_index(make_engine(10, num_parallel_calls=num_calls).run(requests))
    finished = by_sample_index(make_engine(10, denoise, num_parallel_calls=num_calls).run(requests))
    assert sizes[0] == 10
    assert sizes[-1] == 3
    assert {result.batch_size for result in expected_results.values()} == {10}
    assert {3} <= {result.batch_size for result in finished.values()} <= {3, 5, 10}
    for sample_index, result in finished.items():
        assert_same(result.latent, expected_results[sample_index].latent)


def test_a_pass_that_does_not_fit_is_a_one_line_error_and_other_errors_are_not_swallowed(make_engine):
    def out_of_memory(x, timesteps, context, guidance):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(RunError, match="does not fit into memory"):
        list(make_engine(4, out_of_memory).run(mixed_requests(2)))

    def wrong_shape(x, timesteps, context, guidance):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        list(make_engine(4, wrong_shape).run(mixed_requests(2)))


def test_the_stream_is_read_lazily(make_engine):
    read = []
    endless = (read.append(i) or SampleRequest(i, 0, coefficients(SOLVER_SPECS[0], 2), 1.0) for i in itertools.count())
    stream = make_engine(4, identity).run(endless)
    next(stream)
    assert len(read) <= 8
    assert list(make_engine(4).run([])) == []


def test_wrong_requests_are_rejected(make_engine, unet, embeds):
    with pytest.raises(ConfigError, match="batch_size"):
        make_engine(0)
    with pytest.raises(ConfigError, match="choose one of"):
        make_engine(1, prediction_type="flow")
    for guidance in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="guidance"):
            SampleRequest(0, 0, coefficients(SOLVER_SPECS[0], 1), guidance)
    with pytest.raises(ConfigError, match="seed"):
        SampleRequest(0, 0, coefficients(SOLVER_SPECS[0], 1), 1.0, seed=2**63)
    without_null = Engine(identity, "epsilon", lambda i: embeds[i], None, SHAPE, 4)
    assert len(list(without_null.run([SampleRequest(0, 0, coefficients(SOLVER_SPECS[0], 1), 1.0)]))) == 1
    with pytest.raises(ConfigError, match="no embeddings of the empty prompt; use guidance 1"):
        list(without_null.run([SampleRequest(0, 0, coefficients(SOLVER_SPECS[0], 1), 3.0)]))
    zero_snr = solver_coefficients(SolverSpec(), 2, NoiseSchedule.scaled_linear(rescale_betas_zero_snr=True))
    with pytest.raises(ConfigError, match="v_prediction"):
        list(make_engine(4, prediction_type="epsilon").run([SampleRequest(0, 0, zero_snr, 1.0)]))
