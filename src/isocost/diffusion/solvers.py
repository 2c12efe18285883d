"""A solver is a table of numbers: one line a network evaluation, and the same update for every solver.

    x0 = the network's (unclipped) prediction of the clean latent at the line's state
    x' = a x + b x0 + c x0_previous + d x0_before_previous + s noise

All coefficients are known before the first evaluation and are computed in float64. To add a solver, write a function
(SolverSpec, num_steps, NoiseSchedule) -> SolverCoefficients that cites its equations, and register it with `register_solver`.

Below, alpha and sigma are those of the line's state, `alpha_next` and `sigma_next` those of the state it leads to, which is the
state of the next line: always the true next entry of the grid, also where steps do not divide the schedule (diffusers'
DDIM takes a fixed stride instead; its issues 9261, 11347 and 12633). `lambda = log(alpha / sigma)` is half the log-SNR and
`h` its step; it is infinite at a clean end and at a start of zero terminal SNR, and the formulas are written so that their
limits come out.

Shape letters: S lines (network evaluations), T training timesteps.
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
"""diffusers' LCMScheduler; the boundary conditions of arXiv 2303.01469, appendix C, at a scaled time."""


@dataclass(frozen=True, eq=False)
class SolverCoefficients:
    """The numbers of one solver at one number of steps. Read-only; equal only to itself, so rows can share and hash it.

    Attributes:
        num_steps: solver steps.
        timesteps: float64 [S]; what the network is told.
        alpha, sigma: float64 [S], the state at each line is `alpha x0 + sigma noise`.
        a, b, c, d, s: float64 [S], `x' = a x + b x0 + c x0_previous + d x0_before_previous + s noise`; c is 0 on the first
            line, d on the first two.
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
        assert self.c[0] == 0, "the first line has no previous prediction"
        assert not np.any(self.d[:2]), "the first two lines have no prediction before the previous one"

    @property
    def num_function_evaluations(self) -> int:
        """Network evaluations of one pass: the steps, or nearly twice as many for Heun."""
        return len(self.timesteps)


MakeCoefficients = Callable[[SolverSpec, int, NoiseSchedule], SolverCoefficients]


@dataclass(frozen=True)
class Solver:
    """A registered solver.

    Attributes:
        coefficients: (spec, num_steps, schedule) -> its table.
        num_function_evaluations: number of steps -> network evaluations of one pass.
        takes_eta: whether `SolverSpec.eta` means something to it.
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
        num_function_evaluations: number of steps -> network evaluations of one pass; one per step by default.
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
    """The table of `solver` at `num_steps` on `schedule`; the same arguments give the same object.

    With "leading" spacing, few steps start far below the last timestep (DDIM: t = 1 at one step, 751 at four) although the
    start is pure noise; "trailing" starts at T - 1 always (Lin et al., arXiv 2305.08891, table 2).

    Raises:
        ConfigError: the solver is unknown, eta is given to a solver without one, the grid cannot hold so many steps, or
            the solver does not take the schedule.
    """
    registered = SOLVERS[solver.name]
    if num_steps < 1:
        raise ConfigError(f"num_steps = {num_steps}: a solver takes at least one step")
    if solver.eta and not registered.takes_eta:
        raise ConfigError(f"solver {solver.name} has no eta; leave it out or choose ddim")
    return registered.coefficients(solver, num_steps, schedule)


def num_function_evaluations(solver: SolverSpec, num_steps: int) -> int:
    """Network evaluations of one pass, known without a schedule.

    Raises:
        ConfigError: the solver is unknown.
    """
    return SOLVERS[solver.name].num_function_evaluations(num_steps)


def _table(
    grid: Timesteps, a: Floats, b: Floats, c: Floats | None = None, d: Floats | None = None, s: Floats | None = None
) -> SolverCoefficients:
    """A table of one evaluation a step; what is not given is 0."""
    given = [np.zeros_like(a) if values is None else values for values in (c, d, s)]
    return SolverCoefficients(len(a), grid.timesteps.copy(), grid.alpha.copy(), grid.sigma.copy(), a, b, *given)


# --- first order ------------------------------------------------------------------------------------------------------


@register_solver("ddim", takes_eta=True)
def ddim(spec: SolverSpec, num_steps: int, schedule: NoiseSchedule) -> SolverCoefficients:
    """Song et al., arXiv 2010.02502, eqs. 12 and 16, the noise prediction written through x0.

    Ends at the schedule's index 0 as Stable Diffusion does (`set_alpha_to_one: false`), flows and `set_alpha_to_one` end clean. So
    with "linspace" spacing, whose grid ends at timestep 0 itself, the last of several evaluations changes nothing.
    """
    grid = make_timesteps(spec, num_steps, schedule)
    if not (schedule.is_flow or schedule.set_alpha_to_one):
        grid = grid.with_final(schedule.alpha[0], schedule.sigma[0])
    return _first_order(grid, spec.eta)


@register_solver("ddpm")
def ddpm(spec: SolverSpec, num_steps: int, schedule: NoiseSchedule) -> SolverCoefficients:
    """Ancestral sampling, Ho et al., arXiv 2006.11239, eqs. 6 and 7, with the posterior's variance. Ends clean."""
    return _first_order(make_timesteps(spec, num_steps, schedule), 1.0)


@register_solver("euler")
def euler(spec: SolverSpec, num_steps: int, schedule: NoiseSchedule) -> SolverCoefficients:
    """Euler's rule for `dx/dsigma` (Karras et al., arXiv 2206.00364, algorithm 1 without its correction).

    In `sigma / alpha`, or in a flow's time, it is DDIM's step; what differs is the grid, which need not be whole, and the
    clean end.
    """
    return _first_order(make_timesteps(spec, num_steps, schedule, fractional=True), 0.0)


@register_solver("euler-ancestral")
def euler_ancestral(spec: SolverSpec, num_steps: int, schedule: NoiseSchedule) -> SolverCoefficients:
    """k-diffusion's `sample_euler_ancestral`: down to `sigma_next^2 / sigma`, noise back up. DDPM's step on Euler's grid."""
    return _first_order(make_timesteps(spec, num_steps, schedule, fractional=True), 1.0)


@register_solver("lcm")
def lcm(spec: SolverSpec, num_steps: int, schedule: NoiseSchedule) -> SolverCoefficients:
    """Multistep consistency sampling, Song et al., arXiv 2303.01469, algorithm 1, on the grid of latent consistency models.

    The student's answer is `c_skip x + c_out x0` with the boundary conditions of arXiv 2310.04378, section 4.1; fresh noise
    takes it to the next state. The grid is every `50 / num_steps`-th of 50 trailing timesteps, as diffusers' LCMScheduler.

    Raises:
        ConfigError: the schedule is a flow, the spacing is another, or there are more steps than the grid has.
    """
    if schedule.is_flow:
        raise ConfigError("solver lcm is for variance-preserving schedules; a flow's student takes euler")
    if spec.timestep_spacing != "trailing":
        raise ConfigError(f"solver lcm has its own grid, which is trailing; spacing {spec.timestep_spacing} does nothing")
    if num_steps > LCM_ORIGINAL_STEPS:
        raise ConfigError(f"{num_steps} steps of lcm: at most {LCM_ORIGINAL_STEPS}, those that students are trained on")
    stride = schedule.num_timesteps // LCM_ORIGINAL_STEPS
    origin = stride * np.arange(LCM_ORIGINAL_STEPS, 0, -1) - 1
    indices = origin[np.floor(np.linspace(0, len(origin), num_steps, endpoint=False)).astype(np.int64)]
    grid = Timesteps.at(schedule, indices)
    scaled = LCM_TIMESTEP_SCALING * grid.timesteps
    norm = scaled**2 + LCM_SIGMA_DATA**2
    return _table(
        grid, a=grid.alpha_next * LCM_SIGMA_DATA**2 / norm, b=grid.alpha_next * scaled / np.sqrt(norm), s=grid.sigma_next
    )


def _first_order(grid: Timesteps, eta: float) -> SolverCoefficients:
    """From (alpha, sigma) to (alpha_next, sigma_next) with a share `eta` of the posterior's noise (arXiv 2010.02502, eq. 16)."""
    ratio = np.divide(grid.sigma_next * grid.alpha, grid.alpha_next * grid.sigma)
    s = eta * grid.sigma_next * np.sqrt(np.maximum(1 - ratio**2, 0))
    a = np.sqrt(grid.sigma_next**2 - s**2) / grid.sigma
    return _table(grid, a=a, b=grid.alpha_next - a * grid.alpha, s=s)


# --- second order -----------------------------------------------------------------------------------------------------


@register_solver("dpmsolver++2m")
def dpmsolver_2m(spec: SolverSpec, num_steps: int, schedule: NoiseSchedule) -> SolverCoefficients:
    """DPM-Solver++(2M), Lu et al., arXiv 2211.01095, algorithm 2 and eq. 8: midpoint, first order on the first and last line.

    Ends clean, where h is infinite: `alpha_next (1 - exp(-h))` is written `alpha_next - alpha sigma_next / sigma`.
    """
    grid = make_timesteps(spec, num_steps, schedule, clean_end_on_grid=True)
    gain = grid.alpha_next - grid.alpha * grid.sigma_next / grid.sigma
    extrapolation = _midpoint_extrapolation(grid)
    return _table(grid, a=grid.sigma_next / grid.sigma, b=gain * (1 + extrapolation), c=-gain * extrapolation)


@register_solver("sde-dpmsolver++2m")
def sde_dpmsolver_2m(spec: SolverSpec, num_steps: int, schedule: NoiseSchedule) -> SolverCoefficients:
    """SDE-DPM-Solver++(2M), Lu et al., arXiv 2211.01095, section 4 and appendix: 2M for the reverse SDE.

    `exp(-h)` is `(alpha sigma_next) / (alpha_next sigma)`, 0 at a clean end.
    """
    grid = make_timesteps(spec, num_steps, schedule, clean_end_on_grid=True)
    decay = grid.alpha * grid.sigma_next / (grid.alpha_next * grid.sigma)
    gain = grid.alpha_next * (1 - decay**2)
    extrapolation = _midpoint_extrapolation(grid)
    return _table(
        grid,
        a=grid.sigma_next / grid.sigma * decay,
        b=gain * (1 + extrapolation),
        c=-gain * extrapolation,
        s=grid.sigma_next * np.sqrt(1 - decay**2),
    )


@register_solver("heun", num_function_evaluations=lambda num_steps: 2 * num_steps - 1)
def heun(spec: SolverSpec, num_steps: int, schedule: NoiseSchedule) -> SolverCoefficients:
    """Heun's rule in `k = sigma / alpha` (Karras et al., arXiv 2206.00364, algorithm 1): two lines a step, Euler to the end.

    The first line of a step is Euler's. At the second, the state before the step is not needed any more: with the Euler
    state x_e and the two predictions, `x' = x_e + (k - k_to) / (2 k_to) (x0 - x0_previous)` in units of alpha.

    Raises:
        ConfigError: the schedule starts at noise alone.
    """
    if schedule.has_zero_terminal_snr:
        raise ConfigError("solver heun needs a start of finite noise level; a flow or zero terminal SNR takes euler")
    grid = make_timesteps(spec, num_steps, schedule, fractional=True)
    first = _first_order(grid, 0.0)
    level, level_to = grid.sigma[:-1] / grid.alpha[:-1], grid.sigma_next[:-1] / grid.alpha_next[:-1]
    correction = grid.alpha_next[:-1] * (level - level_to) / (2 * level_to)
    lines = np.insert(np.arange(num_steps), np.arange(1, num_steps), np.arange(1, num_steps))
    second = np.arange(1, 2 * num_steps - 1, 2)  # the lines that correct; each stands at the next entry of the grid
    a, b, c = first.a[lines], first.b[lines], np.zeros(len(lines))
    a[second], b[second], c[second] = 1.0, correction, -correction
    zero = np.zeros(len(lines))
    return SolverCoefficients(
        num_steps, grid.timesteps[lines], grid.alpha[lines], grid.sigma[lines], a, b, c, zero, zero.copy()
    )


@register_solver("unipc")
def unipc(spec: SolverSpec, num_steps: int, schedule: NoiseSchedule) -> SolverCoefficients:
    """UniPC of order 2, Zhao et al., arXiv 2302.04867, algorithms 5 and 6 with B2(h) = e^h - 1, data prediction.

    A line first corrects its state with its own prediction (UniC), then predicts the next one (UniP); order 1 on the first
    and last step. The corrected state keeps the coefficient of the predicted one, so the state before it is not needed.
    """
    grid = make_timesteps(spec, num_steps, schedule, clean_end_on_grid=True)
    gain = grid.alpha * grid.sigma_next / grid.sigma - grid.alpha_next  # alpha_next (exp(-h) - 1), not positive
    h = grid.h
    order = np.minimum(2, np.minimum(np.arange(num_steps) + 1, num_steps - np.arange(num_steps)))
    a = grid.sigma_next / grid.sigma
    b, c, d = -gain.copy(), np.zeros(num_steps), np.zeros(num_steps)
    for i in range(num_steps):
        if order[i] == 2:
            weight = gain[i] * 0.5 * h[i] / h[i - 1]  # -gain / 2 (x0_previous - x0) / r, r = -h_previous / h
            b[i] -= weight
            c[i] += weight
        if i > 0:
            last, before = _unipc_correction(h[i - 1], h[i - 2] if order[i - 1] == 2 else None)
            b[i] -= a[i] * gain[i - 1] * last
            c[i] += a[i] * gain[i - 1] * (last - before)
            d[i] += a[i] * gain[i - 1] * before
    return _table(grid, a=a, b=b, c=c, d=d)


def _unipc_correction(h: float, h_before: float | None) -> tuple[float, float]:
    """(rho of `x0 - x0_previous`, what UniC adds to UniP's weight of `x0_before_previous - x0_previous`), per gain.

    rho solves `[[1, 1], [r, 1]] rho = b` with `r = -h_before / h` (arXiv 2302.04867, eq. 10); `h_before` None is order 1.
    """
    if h_before is None:
        return 0.5, 0.0
    exponential = np.expm1(-h)
    phi_1 = exponential / -h - 1
    phi_2 = phi_1 / -h - 0.5
    r = -h_before / h
    b1, b2 = phi_1 / exponential, 2 * phi_2 / exponential
    rho = (b2 - b1) / (r - 1)
    return b1 - rho, (0.5 - rho) / r


def _midpoint_extrapolation(grid: Timesteps) -> Floats:
    """h / (2 h_previous) by line; 0 on the first and the last, and where the previous step began at zero terminal SNR."""
    values = np.zeros(len(grid.alpha))
    values[1:-1] = grid.h[1:-1] / (2 * grid.h[:-2])
    return values
