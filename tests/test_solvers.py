"""Tables against diffusers' schedulers rolled in float64, and against data whose answer is known.

Shape letters: S lines, E elements of a synthetic latent.
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
from isocost.diffusion.solvers import SOLVERS, num_function_evaluations, solver_coefficients
from isocost.errors import ConfigError

SCHEDULE = NoiseSchedule.scaled_linear()
STEPS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 13, 20, 50, 100)
IN_LEVELS = ("euler", "euler-ancestral", "heun")
"""Solvers whose state in diffusers is x / alpha."""

SPECS = [
    SolverSpec(name=name, timestep_spacing=timestep_spacing, eta=eta)
    for name in tuple(SOLVERS)
    for timestep_spacing in TIMESTEP_SPACING_NAMES
    for eta in ((0.0, 0.6, 1.0) if name == "ddim" else (0.0,))
    if name != "lcm" or timestep_spacing == "trailing"
]
SHARED = [spec for spec in SPECS if spec.timestep_spacing != "karras" or spec.name not in ("ddim", "ddpm", "euler-ancestral")]
"""Combinations that diffusers has too."""

DIFFUSERS_IS_WRONG = {
    # DDIMScheduler.step takes t - 1000 // num_steps for the next timestep, not the grid's next entry (its issues 11347, 12633).
    *(("ddim", "linspace", num_steps) for num_steps in STEPS),
    *(("ddim", "trailing", num_steps) for num_steps in (3, 6, 7, 13)),
    # One "linspace" step is told timestep 0, though it starts from pure noise.
    *((name, "linspace", 1) for name in ("ddpm", *IN_LEVELS)),
    ("euler", "karras", 1),
    ("heun", "karras", 1),
}


def label(spec):
    return spec.label


class InFloat64:
    """A library module whose float32 is float64."""

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
    """diffusers' schedulers with every float32 in their source read as float64."""
    for module in DIFFUSERS_MODULES:
        monkeypatch.setattr(module, "torch", InFloat64(torch, torch.float64))
        monkeypatch.setattr(module, "np", InFloat64(np, np.float64))


def network(x, timestep):
    """A smooth stand-in for a network's raw output."""
    return torch.tanh(0.8 * x + math.sin(timestep / 150)) + 0.1 * torch.cos(3 * x)


def start_and_noises(num_lines):
    generator = torch.Generator().manual_seed(num_lines)
    return torch.randn(64, dtype=torch.float64, generator=generator), torch.randn(
        num_lines, 64, dtype=torch.float64, generator=generator
    )


def roll(table, prediction_type, denoise, start, noises):
    """States float64 [S + 1, E] of a table's updates."""
    p, q = x0_coefficients(prediction_type, table.alpha, table.sigma)
    states, previous, before = [start], torch.zeros_like(start), torch.zeros_like(start)
    for i, timestep in enumerate(table.timesteps.tolist()):
        x = states[-1]
        x0 = p[i] * x + q[i] * denoise(x, timestep)
        remembered = table.c[i] * previous + table.d[i] * before
        states.append(table.a[i] * x + table.b[i] * x0 + remembered + table.s[i] * noises[i])
        previous, before = x0, previous
    return torch.stack(states)


def diffusers_scheduler(spec, prediction_type, rescale_betas_zero_snr=False):
    common = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction_type,
    }
    grid = {"timestep_spacing": spec.timestep_spacing, "steps_offset": spec.steps_offset}
    if spec.timestep_spacing == "karras":
        grid = {"timestep_spacing": "linspace", "use_karras_sigmas": True}
    if rescale_betas_zero_snr:
        grid["rescale_betas_zero_snr"] = True
    match spec.name:
        case "ddim":
            return DDIMScheduler(**common, **grid, clip_sample=False, set_alpha_to_one=False)
        case "ddpm":
            return DDPMScheduler(**common, **grid, clip_sample=False, variance_type="fixed_small")
        case "euler":
            return EulerDiscreteScheduler(**common, **grid)
        case "euler-ancestral":
            return EulerAncestralDiscreteScheduler(**common, **grid)
        case "heun":
            return HeunDiscreteScheduler(**common, **grid)
        case "dpmsolver++2m":
            return DPMSolverMultistepScheduler(**common, **grid, algorithm_type="dpmsolver++", solver_order=2)
        case "sde-dpmsolver++2m":
            return DPMSolverMultistepScheduler(**common, **grid, algorithm_type="sde-dpmsolver++", solver_order=2)
        case "unipc":
            return UniPCMultistepScheduler(**common, **grid, solver_order=2, solver_type="bh2")
        case "lcm":
            return LCMScheduler(**common, clip_sample=False)


def roll_diffusers(scheduler, spec, num_steps, denoise, start, noises, monkeypatch):
    """Final state float64 [E] of diffusers' own steps, fed the same noises."""
    scheduler.set_timesteps(num_steps)
    x = start[None]
    if spec.name in IN_LEVELS:
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


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
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
        ours = roll(solver_coefficients(spec, num_steps, SCHEDULE), prediction_type, network, start, noises)[-1]
        theirs = roll_diffusers(scheduler, spec, num_steps, network, start, noises, monkeypatch)
        difference = float((ours - theirs).norm() / theirs.norm())
        assert difference < 1e-6, f"{num_steps} steps differ by {difference:.1e}"


@pytest.mark.parametrize(
    "spec", [s for s in SHARED if s.timestep_spacing == "trailing" and s.name not in ("heun", "lcm")], ids=label
)
def test_equals_diffusers_from_zero_terminal_snr(spec, float64_diffusers, monkeypatch):
    """diffusers' DDIM and DDPM start from alpha = 0, its other schedulers from alpha = 2^-12: so does this test's schedule."""
    scheduler = diffusers_scheduler(spec, "v_prediction", rescale_betas_zero_snr=True)
    schedule = NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod.numpy())
    ours_alone = NoiseSchedule.scaled_linear(rescale_betas_zero_snr=True)
    np.testing.assert_allclose(ours_alone.alpha[:-1], schedule.alpha[:-1], rtol=1e-9)
    assert ours_alone.alpha[-1] == 0
    assert schedule.alpha[-1] == (0 if spec.name in ("ddim", "ddpm") else 2**-12)
    for num_steps in (1, 2, 4, 5, 10, 20, 50):
        start, noises = start_and_noises(num_steps)
        theirs = roll_diffusers(scheduler, spec, num_steps, network, start, noises, monkeypatch)
        ours = roll(solver_coefficients(spec, num_steps, schedule), "v_prediction", network, start, noises)[-1]
        if spec.eta == 1 and not theirs.isfinite().all():  # the root of a rounding error below zero
            assert ours.isfinite().all()
            continue
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-6, num_steps
        if schedule.alpha[-1] and num_steps > 1:  # alpha = 0 is the limit, approached as 1 / log(alpha)
            pure, nearly = (
                roll(solver_coefficients(spec, num_steps, near), "v_prediction", network, start, noises)[-1]
                for near in (ours_alone, NoiseSchedule.from_alphas_cumprod(np.append(schedule.alphas_cumprod[:-1], 1e-300)))
            )
            assert float((pure - nearly).norm()) <= 0.1 * float((pure - theirs).norm()), num_steps


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("timestep_spacing", ["linspace", "trailing"])
def test_flow_euler_equals_diffusers(timestep_spacing, shift, float64_diffusers):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    for name in ("euler", "ddim"):
        for num_steps in STEPS:
            given = {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps)} if timestep_spacing == "trailing" else {}
            scheduler.set_timesteps(None if given else num_steps, **given)
            table = solver_coefficients(
                SolverSpec(name=name, timestep_spacing=timestep_spacing), num_steps, NoiseSchedule.flow(shift)
            )
            np.testing.assert_allclose(table.timesteps, scheduler.timesteps.numpy(), rtol=1e-7)
            start, noises = start_and_noises(num_steps)
            x = start
            for timestep in scheduler.timesteps:
                x = scheduler.step(network(x, float(timestep)), timestep, x).prev_sample
            ours = roll(table, "flow_prediction", network, start, noises)[-1]
            assert float((ours - x).norm() / x.norm()) < 1e-6, num_steps


def gaussian_denoiser(mean, variance, schedule=SCHEDULE):
    """The exact noise prediction where the data are N(mean, variance); the state is known from the timestep."""

    def epsilon(x, timestep):
        level = np.interp(timestep, schedule.timesteps, schedule.sigma / schedule.alpha)
        alpha = 1 / math.sqrt(1 + level**2)
        sigma = math.sqrt(1 - alpha**2)
        return sigma * (x - alpha * mean) / (alpha**2 * variance + sigma**2)

    return epsilon


def deterministic_end(name):
    """(alpha, sigma) where the solver ends."""
    return (SCHEDULE.alpha[0], SCHEDULE.sigma[0]) if name == "ddim" else (1.0, 0.0)


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.name not in ("heun", "lcm")], ids=label)
def test_exact_on_a_point_of_data(spec, num_steps):
    """Where all data are one point, every state's law must be that of the forward process, at any number of steps."""
    point = 1.7
    table = solver_coefficients(spec, num_steps, SCHEDULE)
    alpha_end, sigma_end = deterministic_end(spec.name)
    alphas, sigmas = np.append(table.alpha, alpha_end), np.append(table.sigma, sigma_end)
    mean, variance = table.alpha[0] * point, table.sigma[0] ** 2
    for i in range(num_steps):  # the prediction of x0 is the point whatever the state
        mean = table.a[i] * mean + (table.b[i] + table.c[i] + table.d[i]) * point
        variance = table.a[i] ** 2 * variance + table.s[i] ** 2
        assert mean == pytest.approx(alphas[i + 1] * point, rel=1e-11)
        assert variance == pytest.approx(sigmas[i + 1] ** 2, rel=1e-10, abs=1e-15)


def test_heun_corrects_towards_the_state_of_its_line():
    """On a point of data Euler is exact, and the correction changes nothing."""
    table = solver_coefficients(SolverSpec(name="heun"), 6, SCHEDULE)
    assert table.num_function_evaluations == 11
    start = table.alpha[0] * 1.7 + table.sigma[0] * torch.linspace(-2, 2, 9, dtype=torch.float64)
    states = roll(table, "sample", lambda x, t: torch.full_like(x, 1.7), start, torch.zeros(11, 9))
    for i in range(1, 11, 2):
        torch.testing.assert_close(states[i + 1], states[i], rtol=0, atol=1e-12)
    torch.testing.assert_close(states[-1], torch.full_like(start, 1.7), rtol=0, atol=1e-12)


def test_where_diffusers_is_wrong_ours_is_right(float64_diffusers, monkeypatch):
    """On the closed list, a point of data shows a true step's x = alpha point + sigma noise; diffusers misses it."""
    point, noise = 1.7, torch.linspace(-2, 2, 9, dtype=torch.float64)
    for name, timestep_spacing, num_steps in sorted(DIFFUSERS_IS_WRONG):
        spec = SolverSpec(name=name, timestep_spacing=timestep_spacing)
        table = solver_coefficients(spec, num_steps, SCHEDULE)
        if num_steps == 1 and name != "ddim":
            assert abs(diffusers_first_timestep(spec)) < 1e-12
            assert table.timesteps.tolist() == [999]
            continue
        start = table.alpha[0] * point + table.sigma[0] * noise
        noises = torch.zeros(num_steps, 9, dtype=torch.float64)
        exact = SCHEDULE.alpha[0] * point + SCHEDULE.sigma[0] * noise
        ours = roll(table, "epsilon", gaussian_denoiser(point, 0.0), start, noises)[-1]
        scheduler = diffusers_scheduler(spec, "epsilon")
        theirs = roll_diffusers(scheduler, spec, num_steps, gaussian_denoiser(point, 0.0), start, noises, monkeypatch)
        ours_off, theirs_off = float((ours - exact).abs().max()), float((theirs - exact).abs().max())
        assert ours_off < 1e-9, (name, timestep_spacing, num_steps)
        assert theirs_off > 1e-4, (name, timestep_spacing, num_steps, theirs_off)


def diffusers_first_timestep(spec):
    scheduler = diffusers_scheduler(spec, "epsilon")
    scheduler.set_timesteps(1)
    return float(scheduler.timesteps[0])


@pytest.mark.parametrize("name", tuple(SOLVERS))
@pytest.mark.parametrize("timestep_spacing", ["trailing", "linspace", "karras"])
def test_one_step_goes_from_pure_noise_to_the_mean(name, timestep_spacing):
    if (name, timestep_spacing) in (("lcm", "linspace"), ("lcm", "karras")):
        return
    table = solver_coefficients(SolverSpec(name=name, timestep_spacing=timestep_spacing), 1, SCHEDULE)
    assert table.timesteps.tolist() == [999]
    start, noises = start_and_noises(1)
    end = roll(table, "epsilon", gaussian_denoiser(1.7, 0.25), start, noises)[-1]
    torch.testing.assert_close(end, torch.full_like(end, 1.7), rtol=0, atol=0.25)


def orders(name, doubling_steps):
    """Slopes of the error of the state at a tenth of the schedule on a schedule a hundred times finer than SD's.

    The time is one that all these grids hold, so a coarser grid's other end is not mistaken for error, and it lies away from
    the clean end, where steps in log-SNR do not shrink with the grid.
    """
    mean, variance, fine = 1.7, 0.25, NoiseSchedule.scaled_linear(0.00085 / 100, 0.012 / 100, 100_000)

    def spread(alpha, sigma):
        return math.sqrt(alpha**2 * variance + sigma**2)

    errors = []
    for num_steps in doubling_steps:
        table = solver_coefficients(SolverSpec(name=name), num_steps, fine)
        line = int(np.argmax(table.timesteps == 9_999))
        assert table.timesteps[line] == 9_999
        start = x = 0.7
        previous = before = 0.0
        for i in range(line if name != "heun" else line + 1):
            alpha, sigma = table.alpha[i], table.sigma[i]
            x0 = (alpha * variance * x + sigma**2 * mean) / spread(alpha, sigma) ** 2
            x = table.a[i] * x + table.b[i] * x0 + table.c[i] * previous + table.d[i] * before
            previous, before = x0, previous
        alpha, sigma, alpha_end, sigma_end = table.alpha[0], table.sigma[0], table.alpha[line], table.sigma[line]
        exact = alpha_end * mean + (start - alpha * mean) * spread(alpha_end, sigma_end) / spread(alpha, sigma)
        errors.append(abs(x - exact))
    return -np.diff(np.log2(errors))


def test_order_of_convergence():
    steps = (640, 1280, 2560, 5120)  # 2M's error passes through zero near 160 steps
    for name in ("ddim", "euler"):
        assert orders(name, steps) == pytest.approx(np.ones(3), abs=0.15)
    for name in ("dpmsolver++2m", "heun"):
        assert orders(name, steps) == pytest.approx(np.full(3, 2.0), abs=0.25)
    # UniC adds one order to UniP's second at the corrected states; a state before its correction has order 2 locally.
    assert np.all(orders("unipc", steps[:3]) > 1.75)


@pytest.mark.parametrize("name", ["ddpm", "euler-ancestral", "sde-dpmsolver++2m"])
def test_ancestral_sampling_reaches_the_data(name):
    mean, variance = 1.7, 0.25
    table = solver_coefficients(SolverSpec(name=name), 999 if name.startswith("sde") else 1000, SCHEDULE)
    start = torch.randn(4_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noises = torch.randn(1000, 4_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    end = roll(table, "epsilon", gaussian_denoiser(mean, variance), start, noises)[-1]
    assert float(end.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / 4_000) + 0.005)
    assert float(end.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / 4_000) + 0.02)


@pytest.mark.parametrize("timestep_spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", ["ddim", "dpmsolver++2m", "unipc"])
def test_grids_of_every_step_count_are_diffusers(name, timestep_spacing):
    spec = SolverSpec(name=name, timestep_spacing=timestep_spacing)
    scheduler = diffusers_scheduler(spec, "epsilon")
    for num_steps in range(1, 999):
        if (name, timestep_spacing, num_steps) == ("ddim", "linspace", 1):
            continue
        scheduler.set_timesteps(num_steps)  # "trailing" may append a surplus timestep -1 there
        table = solver_coefficients(spec, num_steps, SCHEDULE)
        assert table.timesteps.tolist() == scheduler.timesteps[:num_steps].tolist()


def test_impossible_requests_are_refused():
    for name, timestep_spacing, num_steps in (
        ("ddim", "leading", 1000),
        ("dpmsolver++2m", "leading", 999),
        ("dpmsolver++2m", "linspace", 1000),
    ):
        with pytest.raises(ConfigError, match=f"{num_steps} steps of {re.escape(name)}/{timestep_spacing}.*trailing"):
            solver_coefficients(SolverSpec(name=name, timestep_spacing=timestep_spacing), num_steps, SCHEDULE)
    with pytest.raises(ConfigError, match="no eta"):
        solver_coefficients(SolverSpec(name="ddpm", eta=0.5), 4, SCHEDULE)
    with pytest.raises(ConfigError, match="at least one"):
        solver_coefficients(SolverSpec(), 0, SCHEDULE)
    pure = NoiseSchedule.scaled_linear(rescale_betas_zero_snr=True)
    for spec, num_steps, schedule, said in (
        (SolverSpec(name="heun"), 4, pure, "takes euler"),
        (SolverSpec(name="heun"), 4, NoiseSchedule.flow(), "takes euler"),
        (SolverSpec(name="lcm"), 4, NoiseSchedule.flow(), "takes euler"),
        (SolverSpec(name="lcm", timestep_spacing="leading"), 4, SCHEDULE, "its own grid"),
        (SolverSpec(name="lcm"), 51, SCHEDULE, "at most 50"),
        (SolverSpec(name="euler", timestep_spacing="karras"), 4, pure, "take trailing"),
        (SolverSpec(timestep_spacing="leading"), 4, NoiseSchedule.flow(), "take trailing or linspace"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            solver_coefficients(spec, num_steps, schedule)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="unknown solver 'eular'; did you mean euler"):
        solver_coefficients(SolverSpec(name="eular"), 4, SCHEDULE)
    table = solver_coefficients(SolverSpec(), 4, pure)
    with pytest.raises(ConfigError, match="v_prediction"):
        x0_coefficients("epsilon", table.alpha, table.sigma)
    for wrong, said in (
        ({"eta": -0.1}, "greater than or equal to 0"),
        ({"timestep_spacing": "even"}, "'karras'"),
        ({"name": "a/b"}, "pattern"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            parse_spec(SolverSpec, wrong, "solver")
        assert "\n" not in str(caught.value)


def test_tables_are_shared_and_read_only():
    table = solver_coefficients(SolverSpec(), 4, SCHEDULE)
    assert solver_coefficients(SolverSpec(), 4, NoiseSchedule.scaled_linear()) is table
    with pytest.raises(ValueError, match="read-only"):
        table.a[0] = 1
    for name in tuple(SOLVERS):
        assert solver_coefficients(SolverSpec(name=name), 4, SCHEDULE).num_function_evaluations == num_function_evaluations(
            SolverSpec(name=name), 4
        )


def test_the_solver_of_the_documentation(monkeypatch):
    """docs/solvers.md's ten lines run as they stand, and are right on a point of data."""
    page = (Path(__file__).parents[1] / "docs" / "solvers.md").read_text()
    monkeypatch.setattr("isocost.diffusion.solvers.SOLVERS", dict(SOLVERS))
    scope = {}
    exec(page.split("```python")[1].split("```")[0], scope)
    table = scope["half_fresh"](SolverSpec(), 12, SCHEDULE)
    mean, variance = table.alpha[0] * 1.7, table.sigma[0] ** 2
    for i in range(12):
        mean, variance = table.a[i] * mean + table.b[i] * 1.7, table.a[i] ** 2 * variance + table.s[i] ** 2
    assert mean == pytest.approx(1.7)
    assert variance == pytest.approx(0, abs=1e-20)
