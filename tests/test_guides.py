"""Guide networks, guidance intervals and guidance schedules in the engine, against plain loops in float64.

Shape letters: C H W latent, L D prompt embeddings, S evaluations.
"""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from scipy.integrate import solve_ivp

from engine_fixtures import (
    NUM_PROMPTS,
    SCHEDULE,
    SD_SCHEDULER,
    SHAPE,
    SOLVER_SPECS,
    by_sample_index,
    coefficients,
    prompt_embeds,
    small_unet,
)
from isocost.config.sampling import SolverSpec
from isocost.diffusion.guidance import check_interval, check_schedule, guidance_per_evaluation
from isocost.diffusion.noise_schedule import NoiseSchedule, x0_coefficients
from isocost.diffusion.philox import INITIAL_NOISE, philox_normal
from isocost.diffusion.solvers import SOLVERS, solver_coefficients
from isocost.errors import ConfigError
from isocost.sampling.engine import Engine, GuideNetwork
from isocost.sampling.request import SampleRequest

CPU = torch.device("cpu")
FLOW = NoiseSchedule.flow()
INTERVAL = (-3.0, 2.0)
POINTS = ((-6.0, 1.0), (-1.0, 3.0), (4.0, 1.5))


def in_float64(unet):
    """The network as the engine calls it; it computes in float64."""

    def denoise(x, timesteps, context, guidance):
        return unet(x.double(), timesteps.double(), context.double()).sample.float()

    return denoise


@pytest.fixture(scope="module")
def unet():
    return small_unet().double()


@pytest.fixture(scope="module")
def small_guide():
    torch.manual_seed(1)
    guide = small_unet().double()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return guide


@pytest.fixture(scope="module")
def embeds():
    return prompt_embeds()


def make_engine(unet, guide, embeds, prediction_type="v_prediction", guide_prediction=None, batch_size=6, **options):
    engine = Engine(in_float64(unet), prediction_type, lambda i: embeds[i], embeds[-1], SHAPE, batch_size, **options)
    network = GuideNetwork(in_float64(guide), guide_prediction or prediction_type, lambda i: embeds[i] / 2, embeds[-1] / 2)
    engine.add_guide("small", network)
    return engine


def plain_loop(request, unet, guide, embeds, prediction_type, guide_prediction):
    """One image in float64, one pass after another: [C, H, W]."""
    solver = request.coefficients
    indices = torch.tensor([request.sample_index])
    seeds = torch.tensor([request.seed])
    x = philox_normal(seeds, indices, INITIAL_NOISE, SHAPE, CPU).double()
    prompt = embeds[request.prompt : request.prompt + 1].double()
    empty = embeds[-1:].double()
    x0_prev = x0_prev2 = torch.zeros_like(x)

    def predict(network, kind, context, i):
        output = network(x, torch.tensor([solver.timesteps[i]]), context).sample
        p, q = x0_coefficients(kind, solver.alpha[i : i + 1], solver.sigma[i : i + 1])
        return float(p[0]) * x + float(q[0]) * output

    for i, w in enumerate(request.weights):
        x0 = predict(unet, prediction_type, prompt, i)
        if w != 1:
            if request.guide is None:
                other = predict(unet, prediction_type, empty, i)
            else:
                context = empty / 2 if request.guide_is_unconditional else prompt / 2
                other = predict(guide, guide_prediction, context, i)
            x0 = other + w * (x0 - other)
        x = solver.a[i] * x + solver.b[i] * x0 + solver.c[i] * x0_prev + solver.d[i] * x0_prev2
        x0_prev, x0_prev2 = x0, x0_prev
        if solver.s[i]:
            x = x + solver.s[i] * philox_normal(seeds, indices, i + 1 + INITIAL_NOISE, SHAPE, CPU).double()
    return x[0]


def ways_of_guidance(solver):
    """(w at each evaluation, guide, the guide has the empty prompt)."""
    in_interval = guidance_per_evaluation(solver.alpha, solver.sigma, 2.5, INTERVAL)
    scheduled = guidance_per_evaluation(solver.alpha, solver.sigma, 3.0, None, POINTS)
    everywhere = (2.5,) * solver.num_function_evaluations
    return [
        (everywhere, "small", False),
        (everywhere, "small", True),
        (in_interval, "small", False),
        (scheduled, "small", False),
        (in_interval, None, False),
        (scheduled, None, False),
        (everywhere, None, False),
    ]


def requests_for(specs, schedule=SCHEDULE, num_steps=(3, 5)):
    requests = []
    for number, (spec, n) in enumerate(itertools.product(specs, num_steps)):
        solver = solver_coefficients(spec, n, schedule)
        for way, (weights, guide, null_prompt) in enumerate(ways_of_guidance(solver)):
            requests.append(
                SampleRequest(
                    7 * number + way,
                    way % NUM_PROMPTS,
                    solver,
                    max(weights),
                    seed=number,
                    guidance_per_evaluation=weights,
                    guide=guide,
                    guide_is_unconditional=null_prompt,
                )
            )
    return requests


KINDS = ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize(
    ("prediction_type", "guide_prediction", "specs"),
    [
        ("v_prediction", "v_prediction", SOLVER_SPECS),
        pytest.param("epsilon", "epsilon", SOLVER_SPECS, marks=pytest.mark.slow),
        pytest.param("sample", "sample", SOLVER_SPECS, marks=pytest.mark.slow),
        *((*kinds, SOLVER_SPECS[2:4]) for kinds in itertools.product(KINDS, KINDS) if kinds != ("v_prediction",) * 2),
        ("flow_prediction", "flow_prediction", [SolverSpec(name=name) for name in ("euler", "dpmsolver++2m")]),
    ],
)
@pytest.mark.fast_cases(4)
def test_equals_a_plain_loop_in_float64(unet, small_guide, embeds, prediction_type, guide_prediction, specs):
    """Every solver, with guide, interval and schedule; both networks of every prediction type."""
    is_flow = prediction_type == "flow_prediction"
    requests = requests_for(specs, FLOW if is_flow else SCHEDULE, (3,))
    engine = make_engine(unet, small_guide, embeds, prediction_type, guide_prediction)
    finished = by_sample_index(engine.run(requests))
    for request in requests:
        expected = plain_loop(request, unet, small_guide, embeds, prediction_type, guide_prediction)
        actual = finished[request.sample_index].latent.double()
        error = float((actual - expected).norm() / expected.norm())
        assert error < 1e-6, (request.coefficients.num_steps, request.guide, request.weights, error)


def test_every_solver_is_compared():
    assert {spec.name for spec in SOLVER_SPECS} == set(SOLVERS)


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++2m"])
def test_equals_a_loop_with_a_diffusers_scheduler(unet, small_guide, embeds, name):
    """Two diffusers networks, a diffusers scheduler, and guidance in an interval, written out."""
    num_steps, w = 8, 2.0
    solver = coefficients(SolverSpec(name=name), num_steps)
    weights = guidance_per_evaluation(solver.alpha, solver.sigma, w, INTERVAL)
    assert 0 < sum(weight == 1 for weight in weights) < num_steps
    if name == "ddim":
        settings = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": False}
        scheduler = DDIMScheduler(**SD_SCHEDULER, **settings, prediction_type="v_prediction")
    else:
        settings = {"timestep_spacing": "trailing", "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
        scheduler = DPMSolverMultistepScheduler(**SD_SCHEDULER, **settings, prediction_type="v_prediction")
    scheduler.set_timesteps(num_steps)
    request = SampleRequest(11, 2, solver, w, seed=4, guidance_per_evaluation=weights, guide="small")
    x = philox_normal(torch.tensor([4]), torch.tensor([11]), INITIAL_NOISE, SHAPE, CPU).double()
    for timestep in scheduler.timesteps:
        alpha_bar = float(scheduler.alphas_cumprod[int(timestep)])
        log_snr = math.log(alpha_bar / (1 - alpha_bar))
        output = unet(x, timestep, embeds[2:3].double()).sample
        if INTERVAL[0] <= log_snr < INTERVAL[1]:
            guide = small_guide(x, timestep, embeds[2:3].double() / 2).sample
            output = guide + w * (output - guide)
        x = scheduler.step(output, timestep, x).prev_sample
    (result,) = make_engine(unet, small_guide, embeds).run([request])
    assert float((result.latent.double() - x[0]).norm() / x.norm()) < 1e-5


@pytest.fixture
def passes_seen(unet, small_guide):
    """Passes of both networks, counted by hooks on the networks themselves; an empty slot is all zero."""
    seen = {"main": 0, "guide": 0}

    def count(name):
        def hook(_module, inputs, _output):
            seen[name] += int(inputs[0].flatten(1).any(dim=1).sum())

        return hook

    handles = [network.register_forward_hook(count(name)) for name, network in (("main", unet), ("guide", small_guide))]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("cache_bytes", [0, 2**22])
def test_hooks_count_the_passes_that_the_costs_state(unet, small_guide, embeds, passes_seen, cache_bytes):
    requests = requests_for(SOLVER_SPECS[::2])
    finished = list(make_engine(unet, small_guide, embeds, cache_bytes=cache_bytes).run(requests))
    assert passes_seen["guide"] == sum(result.guide_nfe for result in finished) > 0
    assert passes_seen["main"] == sum(result.nfe - result.guide_nfe for result in finished)
    for result in finished:
        guided = sum(weight != 1 for weight in result.request.weights)
        assert result.nfe == len(result.request.weights) + guided
        assert result.guide_nfe == (guided if result.request.guide else 0)
    assert {result.request.sample_index for result in finished} == {request.sample_index for request in requests}


def test_an_interval_without_evaluations_costs_one_pass_each(unet, small_guide, embeds, passes_seen):
    solver = coefficients(SOLVER_SPECS[0], 4)
    weights = guidance_per_evaluation(solver.alpha, solver.sigma, 3.0, (6.0, 7.0))
    assert weights == (1.0,) * 4
    plain, guided = (
        SampleRequest(3, 1, solver, 1.0),
        SampleRequest(3, 1, solver, 3.0, guidance_per_evaluation=weights, guide="small"),
    )
    results = [next(iter(make_engine(unet, small_guide, embeds).run([request]))) for request in (plain, guided)]
    assert torch.equal(results[0].latent, results[1].latent)
    assert [result.nfe for result in results] == [4, 4]
    assert passes_seen == {"main": 8, "guide": 0}


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 6, pytest.param(9, marks=pytest.mark.slow)])
def test_the_same_bits_whatever_shares_the_batch(unet, small_guide, embeds, batch_size):
    """Guides, intervals and schedules mixed: alone, in another order, in parallel calls, and with shared first evaluations.

    The networks round by position, far more than real ones do.
    """

    def rounds_by_position(network):
        def denoise(x, timesteps, context, guidance):
            scale = 1 + 0.01 * torch.arange(len(x)).view(-1, 1, 1, 1)
            return in_float64(network)(x, timesteps, context, guidance) * scale

        return denoise

    def engine(**options):
        made = Engine(rounds_by_position(unet), "v_prediction", lambda i: embeds[i], embeds[-1], SHAPE, batch_size, **options)
        made.add_guide("small", GuideNetwork(rounds_by_position(small_guide), "epsilon", lambda i: embeds[i], embeds[-1]))
        return made

    requests = requests_for(SOLVER_SPECS[:4] if batch_size != 6 else SOLVER_SPECS[1:4:2], num_steps=(3,))
    alone = {request.sample_index: next(iter(engine().run([request]))).latent for request in requests}
    shuffled = random.Random(0).sample(requests, len(requests))
    for stream, options in (
        (requests, {}),
        (shuffled, {"num_parallel_calls": 3}),
        (shuffled, {"cache_bytes": 2**22}),
    ):
        together = by_sample_index(engine(**options).run(iter(stream)))
        assert together.keys() == alone.keys()
        for sample_index, result in together.items():
            assert torch.equal(result.latent, alone[sample_index]), sample_index


def test_first_evaluations_are_shared_by_network_and_prompt(unet, small_guide, embeds, passes_seen):
    solver = coefficients(SOLVER_SPECS[0], 2)
    ways = [(2.0, None, False), (3.0, None, False), (2.0, "small", False), (3.0, "small", False), (3.0, "small", True)]
    requests = [
        SampleRequest(5, 1, solver, w, tag=tag, guide=guide, guide_is_unconditional=null_prompt)
        for tag, (w, guide, null_prompt) in enumerate(ways)
    ]
    plain = {result.request.tag: result.latent for result in make_engine(unet, small_guide, embeds).run(requests)}
    passes_seen.update(main=0, guide=0)
    shared = {result.request.tag: result for result in make_engine(unet, small_guide, embeds, cache_bytes=2**22).run(requests)}
    for tag, latent in plain.items():
        assert torch.equal(shared[tag].latent, latent)
    # First evaluation: the main network with the prompt and with the empty one, the guide with each of both.
    assert passes_seen == {"main": 2 + 2 * 2 + 3, "guide": 2 + 3}


def test_an_unguided_step_gives_its_slot_to_another_request(unet, small_guide, embeds):
    """At half of the steps with guidance, the calls are three quarters of those with guidance at every step."""
    solver = coefficients(SOLVER_SPECS[0], 8)
    levels = 2 * np.log(solver.alpha / solver.sigma)
    half = guidance_per_evaluation(solver.alpha, solver.sigma, 2.0, (float(levels[2]), float(levels[6])))
    assert sum(weight != 1 for weight in half) == 4
    num_calls = []
    for weights in (half, (2.0,) * 8):
        calls = []
        engine = make_engine(unet, small_guide, embeds, batch_size=8)
        plain = engine.denoise
        engine.denoise = lambda *arguments, calls=calls, plain=plain: calls.append(1) or plain(*arguments)
        requests = [SampleRequest(i, 0, solver, 2.0, guidance_per_evaluation=weights) for i in range(64)]
        assert len(list(engine.run(requests))) == 64
        num_calls.append(len(calls))
    assert num_calls[1] == 64 * 16 / 8
    assert num_calls[0] <= 0.8 * num_calls[1]


def gaussian_denoiser(mean, deviation):
    """E[x0 | x] for x0 ~ N(mean, deviation^2) at x = x0 + k noise."""

    def denoise(x, k):
        gain = deviation**2 / (deviation**2 + k**2)
        return mean + gain * (x - mean)

    return denoise


def mixture_denoiser(means, deviation):
    """E[x0 | x] for an equal mixture of Gaussians."""

    def denoise(x, k):
        logits = np.stack([-((x - mean) ** 2) / (2 * (deviation**2 + k**2)) for mean in means])
        weights = np.exp(logits - logits.max(0))
        parts = np.stack([gaussian_denoiser(mean, deviation)(x, k) for mean in means])
        return (weights * parts).sum(0) / weights.sum(0)

    return denoise


@pytest.mark.parametrize("interval", [pytest.param(None, marks=pytest.mark.slow), (-2.0, 3.0)])
@pytest.mark.slow
def test_moments_of_a_mixture_with_an_analytic_guide(interval):
    """Main: one component of a mixture; guide: the whole, wider mixture. SciPy integrates the guided ODE as the oracle."""
    main, guide, w = gaussian_denoiser(1.0, 0.3), mixture_denoiser((-1.0, 1.0), 0.5), 2.0

    def network(denoiser):
        def denoise(x, timesteps, context, guidance):
            index = timesteps.round().long().clamp(0, SCHEDULE.num_timesteps - 1)
            alpha = torch.from_numpy(SCHEDULE.alpha)[index].view(-1, 1, 1, 1).numpy()
            sigma = torch.from_numpy(SCHEDULE.sigma)[index].view(-1, 1, 1, 1).numpy()
            return torch.from_numpy(denoiser(x.double().numpy() / alpha, sigma / alpha)).float()

        return denoise

    null = torch.zeros(1, 1)
    engine = Engine(network(main), "sample", lambda i: torch.zeros(len(i), 1, 1), null, (1, 1, 1), 64)
    engine.add_guide("mixture", GuideNetwork(network(guide), "sample", lambda i: torch.zeros(len(i), 1, 1), null))
    solver = coefficients(SolverSpec(name="dpmsolver++2m"), 250)
    weights = guidance_per_evaluation(solver.alpha, solver.sigma, w, interval)
    requests = [SampleRequest(i, 0, solver, w, guidance_per_evaluation=weights, guide="mixture", tag=i) for i in range(512)]
    finished = by_sample_index(engine.run(requests))
    samples = np.array([float(finished[i].latent) for i in range(512)])
    noise = philox_normal(torch.zeros(512, dtype=torch.int64), torch.arange(512), INITIAL_NOISE, (1, 1, 1), CPU)
    start_k = solver.sigma[0] / solver.alpha[0]

    def slope(log_k, x):
        k = math.exp(log_k)
        inside = interval is None or interval[0] <= -2 * log_k < interval[1]
        away = guide(x, k)
        prediction = away + (w if inside else 1.0) * (main(x, k) - away)
        return x - prediction

    start = noise.flatten().double().numpy() / solver.alpha[0]
    exact = solve_ivp(slope, (math.log(start_k), math.log(1e-3)), start, rtol=1e-8, atol=1e-8, max_step=0.01).y[:, -1]
    unguided = solve_ivp(
        lambda log_k, x: x - main(x, math.exp(log_k)), (math.log(start_k), math.log(1e-3)), start, rtol=1e-6
    ).y[:, -1]
    assert np.abs(samples - exact).mean() < 0.02 * exact.std() + 0.004
    assert samples.mean() == pytest.approx(exact.mean(), abs=0.006)
    assert samples.std() == pytest.approx(exact.std(), rel=0.03)
    assert abs(unguided.mean() - exact.mean()) > 0.03, "guidance moves the distribution"


def test_guidance_follows_the_noise_level_not_the_step():
    schedule_ends = {}
    for num_steps in (4, 16, 50):
        solver = coefficients(SolverSpec(name="dpmsolver++2m"), num_steps)
        levels = 2 * np.log(solver.alpha / solver.sigma)
        weights = np.array(guidance_per_evaluation(solver.alpha, solver.sigma, 3.0, INTERVAL))
        assert ((weights == 3.0) == ((levels >= INTERVAL[0]) & (levels < INTERVAL[1]))).all()
        scheduled = guidance_per_evaluation(solver.alpha, solver.sigma, 9.0, None, POINTS)
        assert scheduled == pytest.approx(np.interp(levels, *zip(*POINTS, strict=True)))
        schedule_ends[num_steps] = scheduled[0]
    assert len({round(value, 6) for value in schedule_ends.values()}) == 1, "every solver starts at the same noise level"
    zero_snr = NoiseSchedule.scaled_linear(rescale_betas_zero_snr=True)
    solver = solver_coefficients(SolverSpec(), 4, zero_snr)
    assert guidance_per_evaluation(solver.alpha, solver.sigma, 3.0, (-3.0, None))[0] == 1.0
    assert guidance_per_evaluation(solver.alpha, solver.sigma, 3.0, (None, 2.0))[0] == 3.0


@pytest.mark.parametrize("interval", [(2.0, -3.0), (1.0, 1.0), (8.0, 9.0), (None, -6.0), (7.5, None)])
def test_wrong_intervals_are_refused(interval):
    with pytest.raises(ConfigError, match="guidance interval"):
        check_interval(interval, SCHEDULE)


def test_wrong_requests_are_refused(unet, small_guide, embeds):
    solver = coefficients(SOLVER_SPECS[0], 2)
    for changes, words in (
        ({"guide": "small", "guidance": 0.5}, "images of the guide"),
        ({"guide": "small", "negative_prompt": 1}, "negative prompt"),
        ({"guidance_per_evaluation": (1.0,)}, "1 guidance values for 2 evaluations"),
        ({"guidance_per_evaluation": (1.0, math.nan)}, "finite"),
    ):
        with pytest.raises(ConfigError, match=words):
            SampleRequest(**{"sample_index": 0, "prompt": 0, "coefficients": solver, "guidance": 2.0, **changes})
    with pytest.raises(ConfigError, match="unknown"):
        list(make_engine(unet, small_guide, embeds).run([SampleRequest(0, 0, solver, 2.0, guide="large")]))
    engine = make_engine(unet, small_guide, embeds, embeds_guidance=True)
    with pytest.raises(ConfigError, match="leave the guide out"):
        list(engine.run([SampleRequest(0, 0, solver, 2.0, guide="small")]))
    for points in ((), ((1.0, 2.0), (1.0, 3.0)), ((2.0, 1.0), (1.0, 1.0))):
        with pytest.raises(ConfigError, match="rising log-SNR"):
            check_schedule(points)
