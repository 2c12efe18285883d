"""Orders of convergence of the solvers where the denoiser is known exactly, and the moments of the ancestral ones.

    python benchmarks/order.py [--json]

A Gaussian and a mixture of two, in one dimension and float64, on Stable Diffusion's schedule made a hundred times finer.
Deterministic solvers: the error of the state at a tenth of the schedule, against the closed form (Gaussian) or the
probability flow ODE solved to 1e-12 (mixture), as the number of steps doubles. That time lies on every grid, and away from
the clean end, where a step in log-SNR does not shrink with the grid. UniPC's corrector adds an order to its second (arXiv
2302.04867, theorem 3.1). Ancestral solvers: mean, variance and the weight of a
mode of 100,000 samples at 1,000 steps, as deviations in standard errors. The last line is JSON.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from results import print_results
from scipy.integrate import solve_ivp

from isocost.config.sampling import SolverSpec
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.solvers import SolverCoefficients, solver_coefficients

Floats = NDArray[np.float64]
FINE = NoiseSchedule.scaled_linear(0.00085 / 100, 0.012 / 100, 100_000)
AT_TIMESTEP = 9_999
STEPS = (640, 1280, 2560, 5120)
ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "dpmsolver++2m": 2, "unipc": 3}
STARTS: Floats = np.array([-1.9, -0.8, 0.3, 0.7, 1.6])
NUM_SAMPLES, NUM_ANCESTRAL_STEPS = 100_000, 999


@dataclass(frozen=True)
class Mixture:
    """Data x0 from Gaussians of these weights, means and variances, each [K]."""

    weights: Floats
    means: Floats
    variances: Floats

    def posterior_mean(self, x: Floats, alpha: float, sigma: float) -> Floats:
        """E[x0 | alpha x0 + sigma noise = x], shaped as x [N]."""
        spread = alpha**2 * self.variances + sigma**2
        offset = x[:, None] - alpha * self.means
        log_weight = np.log(self.weights) - 0.5 * np.log(spread) - 0.5 * offset**2 / spread
        weight = np.exp(log_weight - log_weight.max(axis=1, keepdims=True))
        weight /= weight.sum(axis=1, keepdims=True)
        return np.sum(weight * (self.means + alpha * self.variances / spread * offset), axis=1)

    def flowed(self, x: Floats, alpha: float, sigma: float, alpha_next: float, sigma_next: float) -> Floats:
        """The probability flow ODE `dx/dk = (x - x0) / k`, x in units of alpha, k = sigma / alpha, solved to 1e-12."""

        def slope(log_k: float, scaled: Floats) -> Floats:
            alpha_here = 1 / math.sqrt(1 + math.exp(2 * log_k))
            return scaled - self.posterior_mean(alpha_here * scaled, alpha_here, alpha_here * math.exp(log_k))

        span = (math.log(sigma / alpha), math.log(sigma_next / alpha_next))
        solved = solve_ivp(slope, span, x / alpha, method="DOP853", rtol=1e-12, atol=1e-12)
        assert solved.success, solved.message
        return alpha_next * np.asarray(solved.y[:, -1])


DATA = {
    "Gaussian": Mixture(np.array([1.0]), np.array([1.7]), np.array([0.25])),
    "mixture": Mixture(np.array([0.3, 0.7]), np.array([-1.5, 1.0]), np.array([0.3, 0.2])),
}


def states(
    table: SolverCoefficients, data: Mixture, x: Floats, num_lines: int, noise: np.random.Generator | None = None
) -> Floats:
    """x [N] after the first `num_lines` lines of a table."""
    previous = before = np.zeros_like(x)
    for i in range(num_lines):
        x0 = data.posterior_mean(x, table.alpha[i], table.sigma[i])
        x = table.a[i] * x + table.b[i] * x0 + table.c[i] * previous + table.d[i] * before
        if noise is not None and table.s[i]:
            x = x + table.s[i] * noise.standard_normal(len(x))
        previous, before = x0, previous
    return x


def slopes(name: str, data: Mixture) -> Floats:
    """log2 of the error's fall at each doubling of the steps."""
    errors = []
    for num_steps in STEPS:
        table = solver_coefficients(SolverSpec(name=name), num_steps, FINE)
        line = int(np.flatnonzero(table.timesteps == AT_TIMESTEP)[0])
        # A multistep method's state at a line is corrected, or read, by that line's own evaluation.
        num_lines = line + 1 if name == "heun" else line
        exact = data.flowed(STARTS, table.alpha[0], table.sigma[0], table.alpha[line], table.sigma[line])
        errors.append(float(np.abs(states(table, data, STARTS, num_lines) - exact).max()))
    return -np.diff(np.log2(errors))


def deviations(name: str, data: Mixture) -> dict[str, float]:
    """Mean, variance and weight of the negative half-line, as deviations from the truth in standard errors."""
    table = solver_coefficients(SolverSpec(name=name), NUM_ANCESTRAL_STEPS, NoiseSchedule.scaled_linear())
    generator = np.random.default_rng(0)
    start = generator.standard_normal(NUM_SAMPLES)
    made = states(table, data, start, table.num_function_evaluations, generator)
    mean = float(data.weights @ data.means)
    variance = float(data.weights @ (data.variances + (data.means - mean) ** 2))
    centred = (made - mean) ** 2
    result = {
        "mean": (made.mean() - mean) / math.sqrt(variance / NUM_SAMPLES),
        "variance": (centred.mean() - variance) / (centred.std() / math.sqrt(NUM_SAMPLES)),
    }
    if len(data.weights) > 1:
        below = np.array([0.5 * math.erfc(m / math.sqrt(2 * v)) for m, v in zip(data.means, data.variances, strict=True)])
        share = float(data.weights @ below)
        result["weight below 0"] = ((made < 0).mean() - share) / math.sqrt(share * (1 - share) / NUM_SAMPLES)
    return {what: float(value) for what, value in result.items()}


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--json", action="store_true", help="the JSON line alone")
    asked = options.parse_args()
    rows: list[dict[str, Any]] = []
    targets = []
    for kind, data in DATA.items():
        for name, order in ORDERS.items():
            found = slopes(name, data)
            tolerance = 0.15 if order == 1 else 0.25
            what = f"order of {name}, {kind}"
            rows.append({"what": what, "value": float(found[-1]), "unit": "log2 a doubling", "slopes": found.tolist()})
            met = bool(np.all(np.abs(found - order) <= tolerance))
            targets.append({"what": what, "value": found.tolist(), "target": f"{order} +- {tolerance}", "met": met})
        for name in ("ddpm", "euler-ancestral", "sde-dpmsolver++2m"):
            for moment, value in deviations(name, data).items():
                what = f"{moment} of {name}, {kind}"
                rows.append({"what": what, "value": value, "unit": "standard errors"})
                targets.append({"what": what, "value": value, "target": "|.| <= 4", "met": abs(value) <= 4})
    if not asked.json:
        for one in targets:
            print(f"{one['what']:44} {np.round(one['value'], 3)!s:28} {one['target']:12} {'met' if one['met'] else 'MISSED'}")
    print_results("order", rows, targets)


if __name__ == "__main__":
    main()
