"""Orders of convergence of the deterministic solvers with an exact denoiser, and moments of the stochastic solvers.

    python benchmarks/order.py [--quick] [--json]

The data are a Gaussian and a mixture of two Gaussians, in one dimension and float64, on Stable Diffusion's schedule with 100
times as many timesteps. For deterministic solvers, the error at one tenth of the schedule is measured as the number of steps
doubles, against the closed form (Gaussian) or the probability flow ODE solved to 1e-12 (mixture). This timestep is in every
grid, and far from the clean end, where steps in log-SNR do not shrink with the grid. UniPC's corrector raises its order from
2 to 3 (arXiv 2302.04867, theorem 3.1). For stochastic solvers, mean, variance and the weight of a mode are measured with
100,000 samples of 1,000 steps, as deviations in standard errors. The last line is JSON.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from results import argument_parser, print_results
from scipy.integrate import solve_ivp

from isocost.config.sampling import SolverSpec
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.solvers import SolverCoefficients, solver_coefficients

Floats = NDArray[np.float64]
FINE = NoiseSchedule.scaled_linear(0.00085 / 100, 0.012 / 100, 100_000)
AT_TIMESTEP = 9_999
STEPS, QUICK_STEPS = (640, 1280, 2560, 5120), (640, 1280)
ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "dpmsolver++2m": 2, "unipc": 3}
STARTS: Floats = np.array([-1.9, -0.8, 0.3, 0.7, 1.6])
NUM_SAMPLES, QUICK_NUM_SAMPLES, NUM_STOCHASTIC_STEPS = 100_000, 10_000, 999


@dataclass(frozen=True)
class Mixture:
    """Data x0 from K Gaussians with these weights, means and variances, [K] each."""

    weights: Floats
    means: Floats
    variances: Floats

    def posterior_mean(self, x: Floats, alpha: float, sigma: float) -> Floats:
        """E[x0 | alpha x0 + sigma noise = x] for x [N]."""
        spread = alpha**2 * self.variances + sigma**2
        offset = x[:, None] - alpha * self.means
        log_weight = np.log(self.weights) - 0.5 * np.log(spread) - 0.5 * offset**2 / spread
        weight = np.exp(log_weight - log_weight.max(axis=1, keepdims=True))
        weight /= weight.sum(axis=1, keepdims=True)
        return np.sum(weight * (self.means + alpha * self.variances / spread * offset), axis=1)

    def solve_ode(self, x: Floats, alpha: float, sigma: float, alpha_next: float, sigma_next: float) -> Floats:
        """Solve the probability flow ODE `dx/dk = (x - x0) / k` to 1e-12, with x in units of alpha and k = sigma / alpha."""

        def slope(log_k: float, scaled: Floats) -> Floats:
            alpha_k = 1 / math.sqrt(1 + math.exp(2 * log_k))
            return scaled - self.posterior_mean(alpha_k * scaled, alpha_k, alpha_k * math.exp(log_k))

        span = (math.log(sigma / alpha), math.log(sigma_next / alpha_next))
        solved = solve_ivp(slope, span, x / alpha, method="DOP853", rtol=1e-12, atol=1e-12)
        assert solved.success, solved.message
        return alpha_next * np.asarray(solved.y[:, -1])


DATA = {
    "Gaussian": Mixture(np.array([1.0]), np.array([1.7]), np.array([0.25])),
    "mixture": Mixture(np.array([0.3, 0.7]), np.array([-1.5, 1.0]), np.array([0.3, 0.2])),
}


def run_steps(
    table: SolverCoefficients, data: Mixture, x: Floats, num_evaluations: int, noise: np.random.Generator | None = None
) -> Floats:
    """x [N] after the first `num_evaluations` rows of a solver's table."""
    x0_prev = x0_prev2 = np.zeros_like(x)
    for i in range(num_evaluations):
        x0 = data.posterior_mean(x, table.alpha[i], table.sigma[i])
        x = table.a[i] * x + table.b[i] * x0 + table.c[i] * x0_prev + table.d[i] * x0_prev2
        if noise is not None and table.s[i]:
            x = x + table.s[i] * noise.standard_normal(len(x))
        x0_prev, x0_prev2 = x0, x0_prev
    return x


def convergence_orders(name: str, data: Mixture, steps: tuple[int, ...]) -> Floats:
    """log2 of the ratio of errors for each doubling of the number of steps."""
    errors = []
    for num_steps in steps:
        table = solver_coefficients(SolverSpec(name=name), num_steps, FINE)
        index = int(np.flatnonzero(table.timesteps == AT_TIMESTEP)[0])
        # The state of a multistep method at a timestep is complete before the evaluation at it, that of Heun after it.
        num_evaluations = index + 1 if name == "heun" else index
        exact = data.solve_ode(STARTS, table.alpha[0], table.sigma[0], table.alpha[index], table.sigma[index])
        errors.append(float(np.abs(run_steps(table, data, STARTS, num_evaluations) - exact).max()))
    return -np.diff(np.log2(errors))


def deviations(name: str, data: Mixture, num_samples: int) -> dict[str, float]:
    """Deviations of mean, variance and probability of x < 0 from the truth, in standard errors."""
    table = solver_coefficients(SolverSpec(name=name), NUM_STOCHASTIC_STEPS, NoiseSchedule.scaled_linear())
    generator = np.random.default_rng(0)
    start = generator.standard_normal(num_samples)
    samples = run_steps(table, data, start, table.num_function_evaluations, generator)
    mean = float(data.weights @ data.means)
    variance = float(data.weights @ (data.variances + (data.means - mean) ** 2))
    squares = (samples - mean) ** 2
    result = {
        "mean": (samples.mean() - mean) / math.sqrt(variance / num_samples),
        "variance": (squares.mean() - variance) / (squares.std() / math.sqrt(num_samples)),
    }
    if len(data.weights) > 1:
        below = np.array([0.5 * math.erfc(m / math.sqrt(2 * v)) for m, v in zip(data.means, data.variances, strict=True)])
        probability = float(data.weights @ below)
        error = math.sqrt(probability * (1 - probability) / num_samples)
        result["weight below 0"] = ((samples < 0).mean() - probability) / error
    return {what: float(value) for what, value in result.items()}


def main() -> None:
    arguments = argument_parser(__doc__, quick="two numbers of steps, 10,000 samples; under a minute").parse_args()
    steps, num_samples = (QUICK_STEPS, QUICK_NUM_SAMPLES) if arguments.quick else (STEPS, NUM_SAMPLES)
    rows: list[dict[str, Any]] = []
    targets: list[dict[str, Any]] = []

    def add(row: dict[str, Any], value: Any, target: str, is_met: bool) -> None:
        rows.append(row)
        targets.append({"what": row["what"], "value": value, "target": target, "met": is_met})
        if not arguments.json:
            print(f"{row['what']:44} {np.round(value, 3)!s:28} {target:12} {'met' if is_met else 'MISSED'}", flush=True)

    for data_name, data in DATA.items():
        for name, order in ORDERS.items():
            orders = convergence_orders(name, data, steps)
            tolerance = 0.15 if order == 1 else 0.25
            what = f"order of {name}, {data_name}"
            is_met = bool(np.all(np.abs(orders - order) <= tolerance))
            row = {"what": what, "value": float(orders[-1]), "unit": "log2 per doubling", "slopes": orders.tolist()}
            add(row, orders.tolist(), f"{order} +- {tolerance}", is_met)
        for name in ("ddpm", "euler-ancestral", "sde-dpmsolver++2m"):
            for moment, value in deviations(name, data, num_samples).items():
                row = {"what": f"{moment} of {name}, {data_name}", "value": value, "unit": "standard errors"}
                add(row, value, "|.| <= 4", abs(value) <= 4)
    print_results("order", rows, targets)


if __name__ == "__main__":
    main()
