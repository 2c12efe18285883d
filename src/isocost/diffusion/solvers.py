"""Solvers as tables of coefficients: one row per network evaluation, and the same update for every solver.

    x0 = the network's (unclipped) prediction of the clean latent at the state of this evaluation
    x' = a x + b x0 + c x0_prev + d x0_prev2 + s noise

`x0_prev` and `x0_prev2` are the predictions of the two evaluations before this one. All coefficients are computed in float64
before the first evaluation. To add a solver, write a function (SolverSpec, num_steps, NoiseSchedule) -> SolverCoefficients that
cites its equations, and register it with `register_solver`.

Below, alpha and sigma belong to the state of an evaluation. `alpha_next` and `sigma_next` belong to the state after its update,
which is the state of the next evaluation. This is always the true next timestep, also if the number of steps does not divide
the schedule (diffusers' DDIM uses a fixed stride instead; its issues 9261, 11347 and 12633). `lambda = log(alpha / sigma)` is
half the log-SNR and `h` its step. h is infinite at a clean end and at a start of zero terminal SNR; the formulas are written
such that their limits are exact.

Shape letters: S network evaluations, T training timesteps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

from isocost.config.sampling import SolverSpec
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.timesteps import Floats, Timesteps, make_timesteps
from isocost.errors import ConfigError
from isocost.utils.registry import Registry

LCM_ORIGINAL_STEPS, LCM_TIMESTEP_SCALING, LCM_SIGMA_DATA = 50, 10.0, 0.5
"""As in diffusers' LCMScheduler: the boundary conditions of arXiv 2303.01469, appendix C, at a scaled time."""


@dataclass(frozen=True, eq=False)
class SolverCoefficients:
    """The coefficients of one solver at one number of steps.

    They are read-only. An object equals only itself, so requests can share and hash it.

    Attributes:
        num_steps: solver steps.
        timesteps: float64 [S], the network's input.
        alpha, sigma: float64 [S], the state at each evaluation is `alpha x0 + sigma noise`.
        a, b, c, d, s: float64 [S], `x' = a x + b x0 + c x0_prev + d x0_prev2 + s noise`; c is 0 at the first evaluation, d at
            the first two.
    """

    num_steps: int
    timesteps: Floats
    alpha: Floats
    sigma: Floats
    a: Floats
    b: Floats
    c: Floats
    d: Floats
    s: Floats

    def __post_init__(self) -> None:
        for field in fields(self)[1:]:
            values = getattr(self, field.name)
            assert values.shape == self.timesteps.shape, f"{field.name} has shape {values.shape}, not {self.timesteps.shape}"
            assert np.all(np.isfinite(values)), f"{field.name} is not finite"
            values.setflags(write=False)
        assert self.c[0] == 0, "the first evaluation has no previous prediction"
        assert not np.any(self.d[:2]), "the first two evaluations have no prediction before the previous one"

    @property
    def num_function_evaluations(self) -> int:
        """Network evaluations without guidance: the number of steps, or nearly twice as many for Heun."""
        return len(self.timesteps)


MakeCoefficients = Callable[[SolverSpec, int, NoiseSchedule], SolverCoefficients]


@dataclass(frozen=True)
class Solver:
    """A registered solver.

    Attributes:
        coefficients: (spec, num_steps, schedule) -> SolverCoefficients.
        num_function_evaluations: number of steps -> network evaluations without guidance.
        takes_eta: whether the solver reads `SolverSpec.eta`.
    """

    coefficients: MakeCoefficients
    num_function_evaluations: Callable[[int], int]
    takes_eta: bool


SOLVERS: Registry[Solver] = Registry("solver")


def register_solver(
    name: str, *, num_function_evaluations: Callable[[int], int] = lambda num_steps: num_steps, takes_eta: bool = False
) -> Callable[[MakeCoefficients], MakeCoefficients]:
    """Register the decorated function as a solver that studies, commands and checkpoints can name.

    Args:
        name: as in `sweep.solvers` and `--solver`.
        num_function_evaluations: number of steps -> network evaluations without guidance; one per step by default.
        takes_eta: whether the solver reads `SolverSpec.eta`.

    Returns:
        A decorator for a function (spec, num_steps, schedule) -> SolverCoefficients.

    Raises:
        ConfigError: the name is taken.
    """

    def register(make: MakeCoefficients) -> MakeCoefficients:
        SOLVERS.add(name, Solver(make, num_function_evaluations, takes_eta))
        return make

    return register


def unregister_solver(name: str) -> None:
    """Remove a registered solver, so that a notebook or a test can register the name again."""
    SOLVERS.remove(name)
    solver_coefficients.cache_clear()


@lru_cache(maxsize=4096)
def solver_coefficients(solver: SolverSpec, num_steps: int, schedule: NoiseSchedule) -> SolverCoefficients:
    """The coefficients of `solver` at `num_steps` on `schedule`; the same arguments return the same object.

    With "leading" spacing and few steps, the first timestep is far below the last one of the schedule (DDIM: t = 1 at one step,
    751 at four) although the start is pure noise. "trailing" always starts at T - 1 (Lin et al., arXiv 2305.08891, table 2).

    Raises:
        ConfigError: the solver is unknown, eta is given to a solver without one, there are too many steps for the schedule, or
            the solver does not support the schedule.
    """
    registered = SOLVERS[solver.name]
    if num_steps < 1:
        raise ConfigError(f"num_steps = {num_steps}: a solver needs at least one step")
    if solver.eta and not registered.takes_eta:
        raise ConfigError(f"solver {solver.name} has no eta; leave it out or choose ddim")
    return registered.coefficients(solver, num_steps, schedule)


def num_function_evaluations(solver: SolverSpec, num_steps: int) -> int:
    """Solver evaluations per image. With classifier-free guidance, each of them takes two network passes.

    Raises:
        ConfigError: the solver is unknown.
    """
    return SOLVERS[solver.name].num_function_evaluations(num_steps)


def _coefficients(
    steps: Timesteps, a: Floats, b: Floats, c: Floats | None = None, d: Floats | None = None, s: Floats | None = None
) -> SolverCoefficients:
    """The coefficients of a solver with one evaluation per step; omitted ones are 0."""
    optional = [np.zeros_like(a) if values is None else values for values in (c, d, s)]
    return SolverCoefficients(len(a), steps.timesteps.copy(), steps.alpha.copy(), steps.sigma.copy(), a, b, *optional)


# --- first order ------------------------------------------------------------------------------------------------------


@register_solver("ddim", takes_eta=True)
def ddim(spec: SolverSpec, num_steps: int, schedule: NoiseSchedule) -> SolverCoefficients:
    """DDIM, Song et al., arXiv 2010.02502, eqs. 12 and 16, with the noise prediction expressed by x0.

    It ends at index 0 of the schedule as Stable Diffusion does (`set_alpha_to_one: false`). Flows and schedules with
    `set_alpha_to_one` end at the clean latent. With "linspace" spacing the last timestep is index 0 itself, so the last of
    several evaluations changes nothing there.
    """
    steps = make_timesteps(spec, num_steps, schedule)
    if not (schedule.is_flow or schedule.set_alpha_to_one):
        steps = steps.with_final(schedule.alpha[0], schedule.sigma[0])
    return _first_order(steps, spec.eta)


@register_solver("ddpm")
def ddpm(spec: SolverSpec, num_steps: int, schedule: NoiseSchedule) -> SolverCoefficients:
    """DDPM ancestral sampling, Ho et al., arXiv 2006.11239, eqs. 6 and 7, with the posterior variance. It ends clean."""
    return _first_order(make_timesteps(spec, num_steps, schedule), 1.0)


@register_solver("euler")
def euler(spec: SolverSpec, num_steps: int, schedule: NoiseSchedule) -> SolverCoefficients:
    """Euler's method for `dx/dsigma` (Karras et al., arXiv 2206.00364, algorithm 1 without its correction).

    `sigma` of that paper is `sigma / alpha` here, or the time of a flow. A step has the same formula as DDIM's. Two things can
    differ: timesteps need not be integers, and the last step always ends at the clean latent.
    """
    return _first_order(make_timesteps(spec, num_steps, schedule, fractional=True), 0.0)


@register_solver("euler-ancestral")
def euler_ancestral(spec: SolverSpec, num_steps: int, schedule: NoiseSchedule) -> SolverCoefficients:
    """k-diffusion's `sample_euler_ancestral`. Equal to DDPM with the timesteps of `euler`.

    With k-diffusion's `sigma` (`sigma / alpha` here), a step goes down to `sigma_next^2 / sigma`. Then it adds noise up to
    `sigma_next`.
    """
    return _first_order(make_timesteps(spec, num_steps, schedule, fractional=True), 1.0)


@register_solver("lcm")
def lcm(spec: SolverSpec, num_steps: int, schedule: NoiseSchedule) -> SolverCoefficients:
    """Multistep consistency sampling, Song et al., arXiv 2303.01469, algorithm 1, at latent consistency models' timesteps.

    The student's prediction is `c_skip x + c_out x0` with the boundary conditions of arXiv 2310.04378, section 4.1; fresh noise
    leads to the next state. The timesteps are every `50 / num_steps`-th of 50 trailing ones, as in diffusers' LCMScheduler.

    Raises:
        ConfigError: the schedule is a flow, the spacing is not trailing, or there are more than 50 steps.
    """
    if schedule.is_flow:
        raise ConfigError("solver lcm needs a variance-preserving schedule; for a flow use euler")
    if spec.timestep_spacing != "trailing" or spec.timesteps is not None:
        spacing = spec.timestep_spacing if spec.timesteps is None else "a list of timesteps"
        raise ConfigError(f"solver lcm supports only trailing spacing, not {spacing}; leave it out")
    if num_steps > LCM_ORIGINAL_STEPS:
        raise ConfigError(f"solver lcm: {num_steps} steps are too many; use at most {LCM_ORIGINAL_STEPS}")
    stride = schedule.num_timesteps // LCM_ORIGINAL_STEPS
    trained_indices = stride * np.arange(LCM_ORIGINAL_STEPS, 0, -1) - 1
    indices = trained_indices[np.floor(np.linspace(0, len(trained_indices), num_steps, endpoint=False)).astype(np.int64)]
    steps = Timesteps.from_indices(schedule, indices)
    scaled = LCM_TIMESTEP_SCALING * steps.timesteps
    norm = scaled**2 + LCM_SIGMA_DATA**2
    return _coefficients(
        steps, a=steps.alpha_next * LCM_SIGMA_DATA**2 / norm, b=steps.alpha_next * scaled / np.sqrt(norm), s=steps.sigma_next
    )


def _first_order(steps: Timesteps, eta: float) -> SolverCoefficients:
    """From (alpha, sigma) to (alpha_next, sigma_next) with `eta` times the posterior noise (arXiv 2010.02502, eq. 16)."""
    ratio = np.divide(steps.sigma_next * steps.alpha, steps.alpha_next * steps.sigma)
    s = eta * steps.sigma_next * np.sqrt(np.maximum(1 - ratio**2, 0))
    a = np.sqrt(steps.sigma_next**2 - s**2) / steps.sigma
    return _coefficients(steps, a=a, b=steps.alpha_next - a * steps.alpha, s=s)


# --- second order -----------------------------------------------------------------------------------------------------


@register_solver("dpmsolver++2m")
def dpmsolver_2m(spec: SolverSpec, num_steps: int, schedule: NoiseSchedule) -> SolverCoefficients:
    """DPM-Solver++(2M), Lu et al., arXiv 2211.01095, algorithm 2 and eq. 8: midpoint, first order in the first and last step.

    It ends clean, where h is infinite: `alpha_next (1 - exp(-h))` is written as `alpha_next - alpha sigma_next / sigma`.
    """
    steps = make_timesteps(spec, num_steps, schedule, includes_clean_end=True)
    gain = steps.alpha_next - steps.alpha * steps.sigma_next / steps.sigma
    extrapolation = _midpoint_extrapolation(steps)
    return _coefficients(steps, a=steps.sigma_next / steps.sigma, b=gain * (1 + extrapolation), c=-gain * extrapolation)


@register_solver("sde-dpmsolver++2m")
def sde_dpmsolver_2m(spec: SolverSpec, num_steps: int, schedule: NoiseSchedule) -> SolverCoefficients:
    """SDE-DPM-Solver++(2M), Lu et al., arXiv 2211.01095, section 4 and appendix: 2M for the reverse SDE.

    `exp(-h)` is `(alpha sigma_next) / (alpha_next sigma)`, 0 at a clean end.
    """
    steps = make_timesteps(spec, num_steps, schedule, includes_clean_end=True)
    decay = steps.alpha * steps.sigma_next / (steps.alpha_next * steps.sigma)
    gain = steps.alpha_next * (1 - decay**2)
    extrapolation = _midpoint_extrapolation(steps)
    return _coefficients(
        steps,
        a=steps.sigma_next / steps.sigma * decay,
        b=gain * (1 + extrapolation),
        c=-gain * extrapolation,
        s=steps.sigma_next * np.sqrt(1 - decay**2),
    )


@register_solver("heun", num_function_evaluations=lambda num_steps: 2 * num_steps - 1)
def heun(spec: SolverSpec, num_steps: int, schedule: NoiseSchedule) -> SolverCoefficients:
    """Heun's method in `k = sigma / alpha` (Karras et al., arXiv 2206.00364, algorithm 1): two evaluations per step.

    The last step is Euler's, with one evaluation. In the other steps the first evaluation is Euler's. The second does not need
    the state before the step: with the Euler state x_e and both predictions,
    `x' = x_e + (k - k_next) / (2 k_next) (x0 - x0_prev)` in units of alpha.

    Raises:
        ConfigError: the schedule starts at zero terminal SNR.
    """
    if schedule.has_zero_terminal_snr:
        raise ConfigError("solver heun cannot start from zero terminal SNR (as in flows); use euler")
    steps = make_timesteps(spec, num_steps, schedule, fractional=True)
    euler_step = _first_order(steps, 0.0)
    k, k_next = steps.sigma[:-1] / steps.alpha[:-1], steps.sigma_next[:-1] / steps.alpha_next[:-1]
    correction = steps.alpha_next[:-1] * (k - k_next) / (2 * k_next)
    step_of = np.insert(np.arange(num_steps), np.arange(1, num_steps), np.arange(1, num_steps))  # by evaluation
    second = np.arange(1, 2 * num_steps - 1, 2)  # evaluations that correct; their state is that of the next step
    a, b, c = euler_step.a[step_of], euler_step.b[step_of], np.zeros(len(step_of))
    a[second], b[second], c[second] = 1.0, correction, -correction
    zero = np.zeros(len(step_of))
    return SolverCoefficients(
        num_steps, steps.timesteps[step_of], steps.alpha[step_of], steps.sigma[step_of], a, b, c, zero, zero.copy()
    )


@register_solver("unipc")
def unipc(spec: SolverSpec, num_steps: int, schedule: NoiseSchedule) -> SolverCoefficients:
    """UniPC of order 2, Zhao et al., arXiv 2302.04867, algorithms 5 and 6 with B2(h) = e^h - 1, data prediction.

    An evaluation first corrects its state with its prediction (UniC), then predicts the next state (UniP). The first and last
    step have order 1. The corrected and the predicted state have the same coefficient, so the state before is not needed.
    """
    steps = make_timesteps(spec, num_steps, schedule, includes_clean_end=True)
    gain = steps.alpha * steps.sigma_next / steps.sigma - steps.alpha_next  # alpha_next (exp(-h) - 1), not positive
    h = steps.h
    order = np.minimum(2, np.minimum(np.arange(num_steps) + 1, num_steps - np.arange(num_steps)))
    a = steps.sigma_next / steps.sigma
    b, c, d = -gain.copy(), np.zeros(num_steps), np.zeros(num_steps)
    for i in range(num_steps):
        if order[i] == 2:
            weight = gain[i] * 0.5 * h[i] / h[i - 1]  # -gain / 2 (x0_prev - x0) / r, r = -h_prev / h
            b[i] -= weight
            c[i] += weight
        if i > 0:
            rho, extra = _unipc_correction(h[i - 1], h[i - 2] if order[i - 1] == 2 else None)
            b[i] -= a[i] * gain[i - 1] * rho
            c[i] += a[i] * gain[i - 1] * (rho - extra)
            d[i] += a[i] * gain[i - 1] * extra
    return _coefficients(steps, a=a, b=b, c=c, d=d)


def _unipc_correction(h: float, h_prev: float | None) -> tuple[float, float]:
    """UniC's weights per gain.

    Returns:
        rho of `x0 - x0_prev`, and UniC's addition to UniP's weight of `x0_prev2 - x0_prev`. rho solves
        `[[1, 1], [r, 1]] rho = b` with `r = -h_prev / h` (arXiv 2302.04867, eq. 10). `h_prev` None means order 1.
    """
    if h_prev is None:
        return 0.5, 0.0
    exponential = np.expm1(-h)
    phi_1 = exponential / -h - 1
    phi_2 = phi_1 / -h - 0.5
    r = -h_prev / h
    b1, b2 = phi_1 / exponential, 2 * phi_2 / exponential
    rho = (b2 - b1) / (r - 1)
    return b1 - rho, (0.5 - rho) / r


def _midpoint_extrapolation(steps: Timesteps) -> Floats:
    """h / (2 h_prev) by step; 0 in the first and last step, and where the previous step began at zero terminal SNR."""
    values = np.zeros(len(steps.alpha))
    values[1:-1] = steps.h[1:-1] / (2 * steps.h[:-2])
    return values
