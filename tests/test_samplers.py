"""Tables against diffusers' schedulers rolled in float64, and against data whose answer is known.

Shape letters: S lines, E elements of a synthetic latent.
"""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm, scheduling_dpmsolver_multistep

from isocost.diffusion.noise import Schedule, x0_coefficients
from isocost.diffusion.samplers import SAMPLERS, build_table
from isocost.errors import RequestError
from isocost.study import SAMPLER_NAMES, SPACING_NAMES, SamplerSpec

SCHEDULE = Schedule.scaled_linear()
STEPS = (1, 2, 3, 4, 5, 8, 10, 13, 20, 50)
ETAS = {"ddim": (0.0, 0.6, 1.0), "ddpm": (0.0,), "dpmsolver++2m": (0.0,)}
SPECS = [
    SamplerSpec(name=name, spacing=spacing, eta=eta)
    for name in SAMPLER_NAMES
    for spacing in SPACING_NAMES
    for eta in ETAS[name]
]

DIFFUSERS_IS_WRONG = {
    # DDIMScheduler.step takes t - 1000 // num_steps for the next timestep, not the grid's next entry (its issues 11347, 12633).
    *(("ddim", "linspace", num_steps) for num_steps in STEPS),
    ("ddim", "trailing", 3),
    ("ddim", "trailing", 13),
    # One "linspace" step is told timestep 0, though it starts from pure noise.
    ("ddpm", "linspace", 1),
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


@pytest.fixture
def float64_diffusers(monkeypatch):
    """diffusers' schedulers with every float32 in their source read as float64."""
    for module in (scheduling_ddim, scheduling_ddpm, scheduling_dpmsolver_multistep):
        monkeypatch.setattr(module, "torch", InFloat64(torch, torch.float64))
        monkeypatch.setattr(module, "np", InFloat64(np, np.float64))


def network(x, timestep):
    """A smooth stand-in for a network's raw output."""
    return torch.tanh(0.8 * x + math.sin(timestep / 150)) + 0.1 * torch.cos(3 * x)


def start_and_noises(num_steps):
    generator = torch.Generator().manual_seed(num_steps)
    return torch.randn(64, dtype=torch.float64, generator=generator), torch.randn(
        num_steps, 64, dtype=torch.float64, generator=generator
    )


def roll(table, prediction, denoise, start, noises):
    """States float64 [S + 1, E] of a table's updates."""
    p, q = x0_coefficients(prediction, table.alpha, table.sigma)
    states, x0_previous = [start], torch.zeros_like(start)
    for i, timestep in enumerate(table.timesteps.tolist()):
        x = states[-1]
        x0 = p[i] * x + q[i] * denoise(x, timestep)
        states.append(table.a[i] * x + table.b[i] * x0 + table.c[i] * x0_previous + table.s[i] * noises[i])
        x0_previous = x0
    return torch.stack(states)


def roll_diffusers(spec, num_steps, prediction, denoise, start, noises, monkeypatch):
    common = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "timestep_spacing": spec.spacing,
        "prediction_type": prediction,
    }
    if spec.name == "ddim":
        scheduler, extra = DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=False), {"eta": spec.eta}
    elif spec.name == "ddpm":
        scheduler, extra = DDPMScheduler(**common, clip_sample=False, variance_type="fixed_small"), {}
    else:
        scheduler, extra = DPMSolverMultistepScheduler(**common, algorithm_type="dpmsolver++", solver_order=2), {}
    assert scheduler.alphas_cumprod.dtype == torch.float64
    scheduler.set_timesteps(num_steps)
    x = start[None]
    for timestep, noise in zip(scheduler.timesteps, noises, strict=True):
        for module in (scheduling_ddim, scheduling_ddpm):
            monkeypatch.setattr(module, "randn_tensor", lambda *_, value=noise, **__: value[None])
        x = scheduler.step(denoise(x, int(timestep)), timestep, x, **extra).prev_sample
    assert x.dtype == torch.float64
    return x[0]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_equals_diffusers(spec, prediction, float64_diffusers, monkeypatch):
    for num_steps in STEPS:
        if (spec.name, spec.spacing, num_steps) in DIFFUSERS_IS_WRONG:
            continue
        start, noises = start_and_noises(num_steps)
        ours = roll(build_table(spec, num_steps, SCHEDULE), prediction, network, start, noises)[-1]
        theirs = roll_diffusers(spec, num_steps, prediction, network, start, noises, monkeypatch)
        difference = float((ours - theirs).norm() / theirs.norm())
        assert difference < 1e-6, f"{num_steps} steps differ by {difference:.1e}"


def gaussian_denoiser(mean, variance):
    """The exact noise prediction where the data are N(mean, variance)."""

    def epsilon(x, timestep):
        alpha, sigma = SCHEDULE.alpha[timestep], SCHEDULE.sigma[timestep]
        return sigma * (x - alpha * mean) / (alpha**2 * variance + sigma**2)

    return epsilon


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_exact_on_a_point_of_data(spec, num_steps):
    """Where all data are one point, every state's law must be that of the forward process, at any number of steps."""
    point = 1.7
    table = build_table(spec, num_steps, SCHEDULE)
    clean = spec.name != "ddim"
    alphas = np.append(table.alpha, 1.0 if clean else SCHEDULE.alpha[0])
    sigmas = np.append(table.sigma, 0.0 if clean else SCHEDULE.sigma[0])
    mean, variance = table.alpha[0] * point, table.sigma[0] ** 2
    for i in range(num_steps):  # the prediction of x0 is the point whatever the state
        mean = table.a[i] * mean + (table.b[i] + table.c[i]) * point
        variance = table.a[i] ** 2 * variance + table.s[i] ** 2
        assert mean == pytest.approx(alphas[i + 1] * point, rel=1e-12)
        assert variance == pytest.approx(sigmas[i + 1] ** 2, rel=1e-12, abs=1e-15)


def test_where_diffusers_is_wrong_ours_is_right(float64_diffusers, monkeypatch):
    """On the closed list, a point of data shows a true step's x = alpha point + sigma noise; diffusers misses it."""
    point, noise = 1.7, torch.linspace(-2, 2, 9, dtype=torch.float64)
    for name, spacing, num_steps in sorted(DIFFUSERS_IS_WRONG):
        if num_steps == 1:
            continue
        spec = SamplerSpec(name=name, spacing=spacing)
        table = build_table(spec, num_steps, SCHEDULE)
        start = table.alpha[0] * point + table.sigma[0] * noise
        noises = torch.zeros(num_steps, 9, dtype=torch.float64)
        exact = SCHEDULE.alpha[0] * point + SCHEDULE.sigma[0] * noise
        ours = roll(table, "epsilon", gaussian_denoiser(point, 0.0), start, noises)[-1]
        theirs = roll_diffusers(spec, num_steps, "epsilon", gaussian_denoiser(point, 0.0), start, noises, monkeypatch)
        ours_off, theirs_off = float((ours - exact).abs().max()), float((theirs - exact).abs().max())
        assert ours_off < 1e-9, (name, spacing, num_steps)
        assert theirs_off > 1e-4, (name, spacing, num_steps, theirs_off)


@pytest.mark.parametrize("name", SAMPLER_NAMES)
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_one_step_goes_from_pure_noise_to_the_mean(name, spacing):
    table = build_table(SamplerSpec(name=name, spacing=spacing), 1, SCHEDULE)
    assert table.timesteps.tolist() == [999]
    start, noises = start_and_noises(1)
    end = roll(table, "epsilon", gaussian_denoiser(1.7, 0.25), start, noises)[-1]
    torch.testing.assert_close(end, torch.full_like(end, 1.7), rtol=0, atol=0.25)


def orders(name, doubling_steps):
    """Slopes of the error of the state at a tenth of the schedule on a schedule a hundred times finer than SD's.

    The time is one that all these grids hold, so a coarser grid's other end is not mistaken for error, and it lies away from
    the clean end, where steps in log-SNR do not shrink with the grid.
    """
    mean, variance, fine = 1.7, 0.25, Schedule.scaled_linear(0.00085 / 100, 0.012 / 100, 100_000)

    def spread(alpha, sigma):
        return math.sqrt(alpha**2 * variance + sigma**2)

    errors = []
    for num_steps in doubling_steps:
        table = build_table(SamplerSpec(name=name), num_steps, fine)
        line = num_steps * 9 // 10
        assert table.timesteps[line] == 9_999
        start = x = 0.7
        x0_previous = 0.0
        for i in range(line):
            alpha, sigma = table.alpha[i], table.sigma[i]
            x0 = (alpha * variance * x + sigma**2 * mean) / spread(alpha, sigma) ** 2
            x = table.a[i] * x + table.b[i] * x0 + table.c[i] * x0_previous
            x0_previous = x0
        alpha, sigma, alpha_end, sigma_end = table.alpha[0], table.sigma[0], table.alpha[line], table.sigma[line]
        exact = alpha_end * mean + (start - alpha * mean) * spread(alpha_end, sigma_end) / spread(alpha, sigma)
        errors.append(abs(x - exact))
    return -np.diff(np.log2(errors))


def test_order_of_convergence():
    steps = (640, 1280, 2560, 5120)  # 2M's error passes through zero near 160 steps
    assert orders("ddim", steps) == pytest.approx(np.ones(3), abs=0.15)
    assert orders("dpmsolver++2m", steps) == pytest.approx(np.full(3, 2.0), abs=0.25)


def test_ancestral_sampling_reaches_the_data():
    mean, variance = 1.7, 0.25
    table = build_table(SamplerSpec(name="ddpm"), 1000, SCHEDULE)
    start = torch.randn(4_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noises = torch.randn(1000, 4_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    end = roll(table, "epsilon", gaussian_denoiser(mean, variance), start, noises)[-1]
    assert float(end.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / 4_000) + 0.005)
    assert float(end.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / 4_000) + 0.02)


@pytest.mark.parametrize("spacing", SPACING_NAMES)
@pytest.mark.parametrize(("name", "scheduler_type"), [("ddim", DDIMScheduler), ("dpmsolver++2m", DPMSolverMultistepScheduler)])
def test_grids_of_every_step_count_are_diffusers(name, scheduler_type, spacing):
    scheduler = scheduler_type(timestep_spacing=spacing, steps_offset=1)
    for num_steps in range(1, 999):
        if (name, spacing, num_steps) == ("ddim", "linspace", 1):
            continue
        scheduler.set_timesteps(num_steps)  # "trailing" may append a surplus timestep -1 there
        table = build_table(SamplerSpec(name=name, spacing=spacing), num_steps, SCHEDULE)
        assert table.timesteps.tolist() == scheduler.timesteps[:num_steps].tolist()


def test_impossible_requests_are_refused():
    for name, spacing, num_steps in (
        ("ddim", "leading", 1000),
        ("dpmsolver++2m", "leading", 999),
        ("dpmsolver++2m", "linspace", 1000),
    ):
        with pytest.raises(RequestError, match=f"{num_steps} steps of {name.replace('+', '.')}/{spacing}.*trailing"):
            build_table(SamplerSpec(name=name, spacing=spacing), num_steps, SCHEDULE)
    with pytest.raises(RequestError, match="no eta"):
        build_table(SamplerSpec(name="ddpm", eta=0.5), 4, SCHEDULE)
    with pytest.raises(RequestError, match="at least one"):
        build_table(SamplerSpec(), 0, SCHEDULE)


def test_tables_are_shared_and_read_only():
    table = build_table(SamplerSpec(), 4, SCHEDULE)
    assert build_table(SamplerSpec(), 4, SCHEDULE) is table
    with pytest.raises(ValueError, match="read-only"):
        table.a[0] = 1
    assert set(SAMPLERS) == set(SAMPLER_NAMES)
