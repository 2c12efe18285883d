"""Solver coefficients compared with diffusers' schedulers in float64, and with data whose exact solution is known.

Shape letters: S evaluations, E elements of a synthetic latent.
"""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import (
    AysSchedules,
    scheduling_ddim,
    scheduling_ddpm,
    scheduling_dpmsolver_multistep,
    scheduling_euler_ancestral_discrete,
    scheduling_euler_discrete,
    scheduling_flow_match_euler_discrete,
    scheduling_heun_discrete,
    scheduling_lcm,
    scheduling_unipc_multistep,
)

from isocost.config.base import parse_spec
from isocost.config.sampling import TIMESTEP_SPACING_NAMES, SolverSpec
from isocost.diffusion.noise_schedule import NoiseSchedule, x0_coefficients
from isocost.diffusion.solvers import SOLVERS, num_function_evaluations, solver_coefficients, unregister_solver
from isocost.errors import ConfigError

SCHEDULE = NoiseSchedule.scaled_linear()
STEPS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 13, 20, 50, 100)
SCALED_SOLVERS = ("euler", "euler-ancestral", "heun")
"""Solvers whose state in diffusers is x / alpha."""

SPECS = [
    SolverSpec(name=name, timestep_spacing=timestep_spacing, eta=eta)
    for name in tuple(SOLVERS)
    for timestep_spacing in TIMESTEP_SPACING_NAMES
    for eta in ((0.0, 0.6, 1.0) if name == "ddim" else (0.0,))
    if name != "lcm" or timestep_spacing == "trailing"
]
NOISE_RATIO = ("karras", "exponential", "beta")
SHARED = [
    spec for spec in SPECS if spec.timestep_spacing not in NOISE_RATIO or spec.name not in ("ddim", "ddpm", "euler-ancestral")
]
"""Combinations that diffusers also supports."""

DIFFUSERS_IS_WRONG = {
    # DDIMScheduler.step uses t - 1000 // num_steps as the next timestep, not the next entry (its issues 11347, 12633).
    *(("ddim", "linspace", num_steps) for num_steps in STEPS),
    *(("ddim", "trailing", num_steps) for num_steps in (3, 6, 7, 13)),
    # A single "linspace" step runs at timestep 0, although it starts from pure noise.
    *((name, "linspace", 1) for name in ("ddpm", *SCALED_SOLVERS)),
    *((name, spacing, 1) for name in ("euler", "heun") for spacing in NOISE_RATIO),
}


def label(spec):
    return spec.label


class InFloat64:
    """A library module in which float32 is float64."""

    float32 = np.float64

    def __init__(self, module, float64):
        self._module, self.float32 = module, float64

    def __getattr__(self, name):
        return getattr(self._module, name)


DIFFUSERS_MODULES = (
    scheduling_ddim,
    scheduling_ddpm,
    scheduling_dpmsolver_multistep,
    scheduling_euler_ancestral_discrete,
    scheduling_euler_discrete,
    scheduling_flow_match_euler_discrete,
    scheduling_heun_discrete,
    scheduling_lcm,
    scheduling_unipc_multistep,
)


@pytest.fixture
def float64_diffusers(monkeypatch):
    """diffusers' schedulers with float64 instead of every float32 in their source."""
    for module in DIFFUSERS_MODULES:
        monkeypatch.setattr(module, "torch", InFloat64(torch, torch.float64))
        monkeypatch.setattr(module, "np", InFloat64(np, np.float64))


def network(x, timestep):
    """A smooth function in place of a network's raw output."""
    return torch.tanh(0.8 * x + math.sin(timestep / 150)) + 0.1 * torch.cos(3 * x)


def start_and_noises(num_evaluations):
    generator = torch.Generator().manual_seed(num_evaluations)
    return torch.randn(64, dtype=torch.float64, generator=generator), torch.randn(
        num_evaluations, 64, dtype=torch.float64, generator=generator
    )


def run(solver, prediction_type, denoise, start, noises):
    """States float64 [S + 1, E] of the solver's updates."""
    p, q = x0_coefficients(prediction_type, solver.alpha, solver.sigma)
    states, x0_prev, x0_prev2 = [start], torch.zeros_like(start), torch.zeros_like(start)
    for i, timestep in enumerate(solver.timesteps.tolist()):
        x = states[-1]
        x0 = p[i] * x + q[i] * denoise(x, timestep)
        multistep = solver.c[i] * x0_prev + solver.d[i] * x0_prev2
        states.append(solver.a[i] * x + solver.b[i] * x0 + multistep + solver.s[i] * noises[i])
        x0_prev, x0_prev2 = x0, x0_prev
    return torch.stack(states)


def diffusers_scheduler(spec, prediction_type, rescale_betas_zero_snr=False):
    common = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction_type,
    }
    spacing = {"timestep_spacing": spec.timestep_spacing, "steps_offset": spec.steps_offset}
    if spec.timestep_spacing in NOISE_RATIO:
        spacing = {"timestep_spacing": "linspace", f"use_{spec.timestep_spacing}_sigmas": True}
    if rescale_betas_zero_snr:
        spacing["rescale_betas_zero_snr"] = True
    match spec.name:
        case "ddim":
            return DDIMScheduler(**common, **spacing, clip_sample=False, set_alpha_to_one=False)
        case "ddpm":
            return DDPMScheduler(**common, **spacing, clip_sample=False, variance_type="fixed_small")
        case "euler":
            return EulerDiscreteScheduler(**common, **spacing)
        case "euler-ancestral":
            return EulerAncestralDiscreteScheduler(**common, **spacing)
        case "heun":
            return HeunDiscreteScheduler(**common, **spacing)
        case "dpmsolver++2m":
            return DPMSolverMultistepScheduler(**common, **spacing, algorithm_type="dpmsolver++", solver_order=2)
        case "sde-dpmsolver++2m":
            return DPMSolverMultistepScheduler(**common, **spacing, algorithm_type="sde-dpmsolver++", solver_order=2)
        case "unipc":
            return UniPCMultistepScheduler(**common, **spacing, solver_order=2, solver_type="bh2")
        case "lcm":
            return LCMScheduler(**common, clip_sample=False)


def run_diffusers(scheduler, spec, num_steps, denoise, start, noises, monkeypatch):
    """Final state float64 [E] of diffusers' scheduler with the same noises."""
    if spec.timesteps is None:
        scheduler.set_timesteps(num_steps)
    else:
        scheduler.set_timesteps(timesteps=list(spec.timesteps))
    x = start[None]
    if spec.name in SCALED_SOLVERS:
        x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    for timestep, noise in zip(scheduler.timesteps, noises, strict=True):
        for module in DIFFUSERS_MODULES:
            if hasattr(module, "randn_tensor"):
                monkeypatch.setattr(module, "randn_tensor", lambda *_, value=noise, **__: value[None])
        extra = {"eta": spec.eta} if spec.name == "ddim" else {}
        output = denoise(scheduler.scale_model_input(x, timestep), float(timestep))
        x = scheduler.step(output, timestep, x, **extra).prev_sample
    assert x.dtype == torch.float64
    return x[0]


@pytest.mark.parametrize(
    "prediction_type", ["v_prediction", *(pytest.param(name, marks=pytest.mark.slow) for name in ("epsilon", "sample"))]
)
@pytest.mark.parametrize("spec", SHARED, ids=label)
def test_equals_diffusers(spec, prediction_type, float64_diffusers, monkeypatch):
    if (spec.name, prediction_type) == ("euler-ancestral", "sample"):
        pytest.skip("diffusers has no such combination")
    for num_steps in STEPS:
        if (spec.name, spec.timestep_spacing, num_steps) in DIFFUSERS_IS_WRONG or (spec.name == "lcm" and num_steps > 50):
            continue
        scheduler = diffusers_scheduler(spec, prediction_type)
        assert scheduler.alphas_cumprod.dtype == torch.float64
        start, noises = start_and_noises(num_function_evaluations(spec, num_steps))
        ours = run(solver_coefficients(spec, num_steps, SCHEDULE), prediction_type, network, start, noises)[-1]
        theirs = run_diffusers(scheduler, spec, num_steps, network, start, noises, monkeypatch)
        difference = float((ours - theirs).norm() / theirs.norm())
        assert difference < 1e-6, f"{num_steps} steps differ by {difference:.1e}"


AYS = tuple(AysSchedules["StableDiffusionTimesteps"])


@pytest.mark.parametrize("timesteps", [AYS, (999, 500), (980, 310, 20), (999,)], ids=len)
@pytest.mark.parametrize("name", ["ddpm", "euler", "heun", "dpmsolver++2m", "sde-dpmsolver++2m"])
def test_given_timesteps_equal_diffusers(name, timesteps, float64_diffusers, monkeypatch):
    spec, num_steps = SolverSpec(name=name, timesteps=timesteps), len(timesteps)
    start, noises = start_and_noises(num_function_evaluations(spec, num_steps))
    ours = run(solver_coefficients(spec, num_steps, SCHEDULE), "v_prediction", network, start, noises)[-1]
    theirs = run_diffusers(diffusers_scheduler(spec, "v_prediction"), spec, num_steps, network, start, noises, monkeypatch)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


@pytest.mark.parametrize("name", ["ddim", "euler-ancestral", "unipc"])
def test_given_timesteps_of_a_spacing_are_that_spacing(name):
    """diffusers' schedulers of these solvers take no list."""
    for num_steps in (1, 4, 9):
        by_spacing = solver_coefficients(SolverSpec(name=name), num_steps, SCHEDULE)
        timesteps = tuple(int(timestep) for timestep in by_spacing.timesteps)
        by_list = solver_coefficients(SolverSpec(name=name, timesteps=timesteps), num_steps, SCHEDULE)
        for field in ("timesteps", "alpha", "sigma", "a", "b", "c", "d", "s"):
            np.testing.assert_array_equal(getattr(by_list, field), getattr(by_spacing, field))


@pytest.mark.parametrize(
    "spec", [s for s in SHARED if s.timestep_spacing == "trailing" and s.name not in ("heun", "lcm")], ids=label
)
def test_equals_diffusers_from_zero_terminal_snr(spec, float64_diffusers, monkeypatch):
    """diffusers' DDIM and DDPM start from alpha = 0, its other schedulers from alpha = 2^-12, and so does this schedule."""
    scheduler = diffusers_scheduler(spec, "v_prediction", rescale_betas_zero_snr=True)
    schedule = NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod.numpy())
    zero_snr = NoiseSchedule.scaled_linear(rescale_betas_zero_snr=True)
    np.testing.assert_allclose(zero_snr.alpha[:-1], schedule.alpha[:-1], rtol=1e-9)
    assert zero_snr.alpha[-1] == 0
    assert schedule.alpha[-1] == (0 if spec.name in ("ddim", "ddpm") else 2**-12)
    for num_steps in (1, 2, 4, 5, 10, 20, 50):
        start, noises = start_and_noises(num_steps)
        theirs = run_diffusers(scheduler, spec, num_steps, network, start, noises, monkeypatch)
        ours = run(solver_coefficients(spec, num_steps, schedule), "v_prediction", network, start, noises)[-1]
        if spec.eta == 1 and not theirs.isfinite().all():  # diffusers takes the root of a negative rounding error
            assert ours.isfinite().all()
            continue
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-6, num_steps
        if schedule.alpha[-1] and num_steps > 1:  # alpha = 0 is the limit, approached as 1 / log(alpha)
            at_limit, near_limit = (
                run(solver_coefficients(spec, num_steps, candidate), "v_prediction", network, start, noises)[-1]
                for candidate in (zero_snr, NoiseSchedule.from_alphas_cumprod(np.append(schedule.alphas_cumprod[:-1], 1e-300)))
            )
            assert float((at_limit - near_limit).norm()) <= 0.1 * float((at_limit - theirs).norm()), num_steps


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("timestep_spacing", ["linspace", "trailing"])
def test_flow_euler_equals_diffusers(timestep_spacing, shift, float64_diffusers):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    for name in ("euler", "ddim"):
        for num_steps in STEPS:
            sigmas = {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps)} if timestep_spacing == "trailing" else {}
            scheduler.set_timesteps(None if sigmas else num_steps, **sigmas)
            solver = solver_coefficients(
                SolverSpec(name=name, timestep_spacing=timestep_spacing), num_steps, NoiseSchedule.flow(shift)
            )
            np.testing.assert_allclose(solver.timesteps, scheduler.timesteps.numpy(), rtol=1e-7)
            start, noises = start_and_noises(num_steps)
            x = start
            for timestep in scheduler.timesteps:
                x = scheduler.step(network(x, float(timestep)), timestep, x).prev_sample
            ours = run(solver, "flow_prediction", network, start, noises)[-1]
            assert float((ours - x).norm() / x.norm()) < 1e-6, num_steps


def gaussian_denoiser(mean, variance, schedule=SCHEDULE):
    """The exact noise prediction for data from N(mean, variance); the timestep determines alpha and sigma."""

    def epsilon(x, timestep):
        noise_ratio = np.interp(timestep, schedule.timesteps, schedule.sigma / schedule.alpha)
        alpha = 1 / math.sqrt(1 + noise_ratio**2)
        sigma = math.sqrt(1 - alpha**2)
        return sigma * (x - alpha * mean) / (alpha**2 * variance + sigma**2)

    return epsilon


def deterministic_end(name):
    """(alpha, sigma) of the final state."""
    return (SCHEDULE.alpha[0], SCHEDULE.sigma[0]) if name == "ddim" else (1.0, 0.0)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.name not in ("heun", "lcm")], ids=label)
def test_exact_for_data_of_a_single_point(spec):
    """If all data are one point, every state has the distribution of the forward process, at any number of steps."""
    point = 1.7
    alpha_end, sigma_end = deterministic_end(spec.name)
    for num_steps in STEPS:
        solver = solver_coefficients(spec, num_steps, SCHEDULE)
        alphas, sigmas = np.append(solver.alpha, alpha_end), np.append(solver.sigma, sigma_end)
        mean, variance = solver.alpha[0] * point, solver.sigma[0] ** 2
        for i in range(num_steps):  # the prediction of x0 is the point in every state
            mean = solver.a[i] * mean + (solver.b[i] + solver.c[i] + solver.d[i]) * point
            variance = solver.a[i] ** 2 * variance + solver.s[i] ** 2
            where = f"{num_steps} steps, state {i + 1}"
            assert math.isclose(mean, alphas[i + 1] * point, rel_tol=1e-11), where
            assert math.isclose(variance, sigmas[i + 1] ** 2, rel_tol=1e-10, abs_tol=1e-15), where


def test_heun_corrects_towards_the_state_of_its_evaluation():
    """For data of a single point Euler is exact, so the correction changes nothing."""
    solver = solver_coefficients(SolverSpec(name="heun"), 6, SCHEDULE)
    assert solver.num_function_evaluations == 11
    start = solver.alpha[0] * 1.7 + solver.sigma[0] * torch.linspace(-2, 2, 9, dtype=torch.float64)
    states = run(solver, "sample", lambda x, t: torch.full_like(x, 1.7), start, torch.zeros(11, 9))
    for i in range(1, 11, 2):
        torch.testing.assert_close(states[i + 1], states[i], rtol=0, atol=1e-12)
    torch.testing.assert_close(states[-1], torch.full_like(start, 1.7), rtol=0, atol=1e-12)


def test_where_diffusers_is_wrong_ours_is_right(float64_diffusers, monkeypatch):
    """For data of a single point the exact result is alpha point + sigma noise; diffusers differs in the listed cases."""
    point, noise = 1.7, torch.linspace(-2, 2, 9, dtype=torch.float64)
    for name, timestep_spacing, num_steps in sorted(DIFFUSERS_IS_WRONG):
        spec = SolverSpec(name=name, timestep_spacing=timestep_spacing)
        solver = solver_coefficients(spec, num_steps, SCHEDULE)
        if num_steps == 1 and name != "ddim":
            assert abs(diffusers_first_timestep(spec)) < 1e-12
            assert solver.timesteps.tolist() == [999]
            continue
        start = solver.alpha[0] * point + solver.sigma[0] * noise
        noises = torch.zeros(num_steps, 9, dtype=torch.float64)
        exact = SCHEDULE.alpha[0] * point + SCHEDULE.sigma[0] * noise
        ours = run(solver, "epsilon", gaussian_denoiser(point, 0.0), start, noises)[-1]
        scheduler = diffusers_scheduler(spec, "epsilon")
        theirs = run_diffusers(scheduler, spec, num_steps, gaussian_denoiser(point, 0.0), start, noises, monkeypatch)
        our_error, their_error = float((ours - exact).abs().max()), float((theirs - exact).abs().max())
        assert our_error < 1e-9, (name, timestep_spacing, num_steps)
        assert their_error > 1e-4, (name, timestep_spacing, num_steps, their_error)


def diffusers_first_timestep(spec):
    scheduler = diffusers_scheduler(spec, "epsilon")
    scheduler.set_timesteps(1)
    return float(scheduler.timesteps[0])


@pytest.mark.parametrize("name", tuple(SOLVERS))
@pytest.mark.parametrize("timestep_spacing", ["trailing", "linspace", *NOISE_RATIO])
def test_one_step_goes_from_pure_noise_to_the_mean(name, timestep_spacing):
    if name == "lcm" and timestep_spacing != "trailing":
        return
    solver = solver_coefficients(SolverSpec(name=name, timestep_spacing=timestep_spacing), 1, SCHEDULE)
    assert solver.timesteps.tolist() == [999]
    start, noises = start_and_noises(1)
    end = run(solver, "epsilon", gaussian_denoiser(1.7, 0.25), start, noises)[-1]
    torch.testing.assert_close(end, torch.full_like(end, 1.7), rtol=0, atol=0.25)


def orders(name, doubling_steps):
    """Orders of the error at a tenth of the schedule, on a schedule that is a hundred times finer than Stable Diffusion's.

    All numbers of steps contain this timestep, so a different end is not mistaken for an error. It is away from the clean end,
    where steps in log-SNR do not shrink with the number of steps.
    """
    mean, variance, fine = 1.7, 0.25, NoiseSchedule.scaled_linear(0.00085 / 100, 0.012 / 100, 100_000)

    def std(alpha, sigma):
        return math.sqrt(alpha**2 * variance + sigma**2)

    errors = []
    for num_steps in doubling_steps:
        solver = solver_coefficients(SolverSpec(name=name), num_steps, fine)
        last = int(np.argmax(solver.timesteps == 9_999))
        assert solver.timesteps[last] == 9_999
        start = x = 0.7
        x0_prev = x0_prev2 = 0.0
        for i in range(last if name != "heun" else last + 1):
            alpha, sigma = solver.alpha[i], solver.sigma[i]
            x0 = (alpha * variance * x + sigma**2 * mean) / std(alpha, sigma) ** 2
            x = solver.a[i] * x + solver.b[i] * x0 + solver.c[i] * x0_prev + solver.d[i] * x0_prev2
            x0_prev, x0_prev2 = x0, x0_prev
        alpha, sigma, alpha_end, sigma_end = solver.alpha[0], solver.sigma[0], solver.alpha[last], solver.sigma[last]
        exact = alpha_end * mean + (start - alpha * mean) * std(alpha_end, sigma_end) / std(alpha, sigma)
        errors.append(abs(x - exact))
    return -np.diff(np.log2(errors))


def test_order_of_convergence():
    steps = (640, 1280, 2560, 5120)  # the error of 2M crosses zero near 160 steps
    for name in ("ddim", "euler"):
        assert orders(name, steps) == pytest.approx(np.ones(3), abs=0.15)
    for name in ("dpmsolver++2m", "heun"):
        assert orders(name, steps) == pytest.approx(np.full(3, 2.0), abs=0.25)
    # UniC raises the order 2 of UniP by one at the corrected states; a state before its correction has order 2 locally.
    assert np.all(orders("unipc", steps[:3]) > 1.75)


@pytest.mark.parametrize("name", ["ddpm", "euler-ancestral", "sde-dpmsolver++2m"])
def test_ancestral_sampling_reaches_the_data(name):
    mean, variance = 1.7, 0.25
    solver = solver_coefficients(SolverSpec(name=name), 999 if name.startswith("sde") else 1000, SCHEDULE)
    start = torch.randn(4_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noises = torch.randn(1000, 4_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    end = run(solver, "epsilon", gaussian_denoiser(mean, variance), start, noises)[-1]
    assert float(end.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / 4_000) + 0.005)
    assert float(end.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / 4_000) + 0.02)


@pytest.mark.parametrize("timestep_spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", ["ddim", "dpmsolver++2m", "unipc"])
@pytest.mark.fast_cases(3)
def test_timesteps_of_every_number_of_steps_equal_diffusers(name, timestep_spacing):
    spec = SolverSpec(name=name, timestep_spacing=timestep_spacing)
    scheduler = diffusers_scheduler(spec, "epsilon")
    for num_steps in range(1, 999):
        if (name, timestep_spacing, num_steps) == ("ddim", "linspace", 1):
            continue
        scheduler.set_timesteps(num_steps)  # diffusers may append an extra timestep -1 with "trailing"
        solver = solver_coefficients(spec, num_steps, SCHEDULE)
        assert solver.timesteps.tolist() == scheduler.timesteps[:num_steps].tolist()


def test_impossible_requests_are_rejected():
    for name, timestep_spacing, num_steps in (
        ("ddim", "leading", 1000),
        ("dpmsolver++2m", "leading", 999),
        ("dpmsolver++2m", "linspace", 1000),
    ):
        with pytest.raises(ConfigError, match=f"{num_steps} steps of {re.escape(name)}/{timestep_spacing}.*trailing"):
            solver_coefficients(SolverSpec(name=name, timestep_spacing=timestep_spacing), num_steps, SCHEDULE)
    with pytest.raises(ConfigError, match="no eta"):
        solver_coefficients(SolverSpec(name="ddpm", eta=0.5), 4, SCHEDULE)
    with pytest.raises(ConfigError, match="at least one step"):
        solver_coefficients(SolverSpec(), 0, SCHEDULE)
    zero_snr = NoiseSchedule.scaled_linear(rescale_betas_zero_snr=True)
    for spec, num_steps, schedule, message in (
        (SolverSpec(name="heun"), 4, zero_snr, "use euler"),
        (SolverSpec(name="heun"), 4, NoiseSchedule.flow(), "use euler"),
        (SolverSpec(name="lcm"), 4, NoiseSchedule.flow(), "use euler"),
        (SolverSpec(name="lcm", timestep_spacing="leading"), 4, SCHEDULE, "only trailing spacing"),
        (SolverSpec(name="lcm"), 51, SCHEDULE, "at most 50"),
        (SolverSpec(name="euler", timestep_spacing="karras"), 4, zero_snr, "use trailing"),
        (SolverSpec(timestep_spacing="leading"), 4, NoiseSchedule.flow(), "use trailing or linspace"),
        (SolverSpec(timesteps=(999, 500)), 2, NoiseSchedule.flow(), "use timestep_spacing trailing or linspace"),
        (SolverSpec(timesteps=(999, 500)), 3, SCHEDULE, "2 timesteps for 3 steps; give one for each step"),
        (SolverSpec(name="lcm", timesteps=(999, 500)), 2, SCHEDULE, "only trailing spacing, not a list of timesteps"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            solver_coefficients(spec, num_steps, schedule)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="unknown solver 'eular'; did you mean euler"):
        solver_coefficients(SolverSpec(name="eular"), 4, SCHEDULE)
    solver = solver_coefficients(SolverSpec(), 4, zero_snr)
    with pytest.raises(ConfigError, match="v_prediction"):
        x0_coefficients("epsilon", solver.alpha, solver.sigma)
    for plain, message in (
        ({"eta": -0.1}, "greater than or equal to 0"),
        ({"timestep_spacing": "even"}, "'karras'"),
        ({"name": "a/b"}, "pattern"),
        ({"timesteps": [500, 999]}, "they must fall, from noise to clean"),
        ({"timesteps": [1000, 500]}, "less than 1000"),
        ({"timesteps": []}, "at least 1 item"),
        ({"timesteps": [999, 500], "timestep_spacing": "leading"}, "they replace timestep_spacing"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            parse_spec(SolverSpec, plain, "solver")
        assert "\n" not in str(caught.value)


def test_coefficients_are_shared_and_read_only():
    solver = solver_coefficients(SolverSpec(), 4, SCHEDULE)
    assert solver_coefficients(SolverSpec(), 4, NoiseSchedule.scaled_linear()) is solver
    with pytest.raises(ValueError, match="read-only"):
        solver.a[0] = 1
    for name in tuple(SOLVERS):
        assert solver_coefficients(SolverSpec(name=name), 4, SCHEDULE).num_function_evaluations == num_function_evaluations(
            SolverSpec(name=name), 4
        )


def test_the_solver_of_the_documentation():
    """The example in docs/solvers.md runs unchanged and is exact for data of a single point."""
    page = (Path(__file__).parents[1] / "docs" / "solvers.md").read_text()
    exec(page.split("```python")[1].split("```")[0], {})
    try:
        solver = solver_coefficients(SolverSpec(name="half-fresh"), 12, SCHEDULE)
    finally:
        unregister_solver("half-fresh")
    mean, variance = solver.alpha[0] * 1.7, solver.sigma[0] ** 2
    for i in range(12):
        mean, variance = solver.a[i] * mean + solver.b[i] * 1.7, solver.a[i] ** 2 * variance + solver.s[i] ** 2
    assert mean == pytest.approx(1.7)
    assert variance == pytest.approx(0, abs=1e-20)
