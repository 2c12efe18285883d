"""Power laws with a floor, `value = floor + scale * x^-exponent`, and the two ways to fit one.

A law has two fits because deviations from it come from two places:

`fit_law`       weighted least squares on the values. For a curve of one training whose points were all sampled alike: they lie
                off the law by the noise of their scores, which is known, and least squares weighted by it wastes none of it.
`fit_frontier`  Huber loss of 1e-3 on logarithms, by L-BFGS from a grid of starts (Hoffmann et al., arXiv 2203.15556, approach
                3 and eq. 3). For frontiers: each point is the best of many, of another size or setting than the next, and lies
                off the law by more than its noise; so small a Huber threshold lets no such point pull the law.

Intervals (95 %) come from redrawn scores, each apart from the others, fitted again: they cover the noise of the scores, neither
another training seed nor a law of another form.

Shapes: M points of a curve, R redrawn curves, E exponents that are tried, V variables.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from isocost.analysis.formatting import format_number
from isocost.analysis.frontier_ci import TAILS, Floats
from isocost.evaluation.confidence_intervals import Interval

MIN_SNAPSHOTS = 4
HUBER_DELTA = 1e-3
_EXPONENTS = (0.01, 10.0)
_NUM_TRIED, _NUM_ROUNDS = 32, 6
_FIRST_EXPONENTS = (0.1, 0.3, 0.7, 1.5)
_FIRST_FLOORS = (0.01, 0.5, 0.95)
_MIN_FLOOR = 1e-6
"""Of the least value of a curve, so that its logarithm has an end."""
_NO_FLOOR = 1e-3
"""Of the same: a floor below it is as good as none."""


@dataclass(frozen=True)
class Law:
    """A fitted law of one curve over x: training compute, a cost, or parameters.

    `saturation` is the x from which the floor outweighs what more of x still buys; None where the floor's interval reaches 0
    or there is none, or where it lies off the curve's ends. `misfit` is the root-mean-square deviation of the points from the
    law, as a share of their values. Intervals have no width where the scores had none.
    """

    name: str
    num_snapshots: int
    scale: Interval
    exponent: Interval
    floor: Interval
    saturation: Interval | None
    misfit: float

    def at(self, x: float) -> float:
        """The law's value at x."""
        return self.floor.value + self.scale.value * x**-self.exponent.value

    @property
    def is_found(self) -> bool:
        """False where no exponent between those that are tried is best: the curve does not fall as a power of x."""
        return _is_inside(self.exponent.value)

    def __str__(self) -> str:
        if not self.is_found:
            return f"{self.name}: no power law within its {self.num_snapshots} points"
        falls = f"{self.name}: exponent {_in_words(self.exponent)}"
        if self.exponent.low == self.exponent.high:
            return f"{falls}, floor {format_number(self.floor.value)}; no intervals, since the scores have none"
        if self.saturation is None:
            return f"{falls}, no saturation within its {self.num_snapshots} points"
        return f"{falls}, saturates at {_in_words(self.saturation)} towards {_in_words(self.floor)}"


def fit_law(name: str, x: Floats, values: Floats, spread: Floats | None = None, num_bootstrap: int = 200, seed: int = 0) -> Law:
    """The law of one training's curve: weighted least squares, intervals from redrawn scores.

    Args:
        x: rising, [M].
        values: above 0, [M].
        spread: standard deviation of each value, [M]; without it values weigh by their size and intervals have no width.
    """
    assert len(x) >= MIN_SNAPSHOTS, "too few snapshots for three numbers and a deviation"
    known = spread is not None and bool(np.all(np.isfinite(spread) & (spread > 0)))
    weights = 1 / (spread if known and spread is not None else values)
    curves = values[None]
    if known and spread is not None:
        noise = np.random.default_rng(seed).standard_normal((num_bootstrap, len(values)))
        curves = np.concatenate([curves, values + spread * noise])
    middle = math.exp(float(np.log(x).mean()))
    scales, exponents, reconstruction_floors = _fit(np.log(x / middle), curves, weights)
    return _law(name, x, values, scales, exponents, reconstruction_floors, middle)


def fit_frontier(name: str, x: Floats, draws: Floats) -> Law:
    """The law of a frontier: Huber loss on logarithms (arXiv 2203.15556, eq. 3), intervals from its redraws.

    Args:
        x: cost, parameters or compute of the frontier's points, above 0, [M].
        draws: row 0 the frontier itself, the others its redraws, [1 + R, M] (`isocost.analysis.bands.running_best`); a value
            that is not above 0 is left out of its row.
    """
    assert len(x) >= MIN_SNAPSHOTS, "too few points for three numbers and a deviation"
    middle = math.exp(float(np.log(x).mean()))
    fits = fit_terms(np.log(x / middle)[None], draws)
    scales, exponents, reconstruction_floors = np.exp(fits[:, 0]), fits[:, 1], np.exp(fits[:, 2])
    return _law(name, x, draws[0], scales, exponents, reconstruction_floors, middle)


def fit_terms(x: Floats, draws: Floats) -> Floats:
    """Least Huber loss of `log(floor + sum over v of exp(a_v - exponent_v x_v))` against the logarithm of every curve.

    The first curve is fitted from a grid of starts, the others from where that ended.

    Args:
        x: logarithms of V variables, centred, [V, M].
        draws: curves [1 + R, M]; values that are not above 0 are left out, and redraws that keep fewer than a law has numbers.

    Returns:
        a_1 .. a_V, exponent_1 .. exponent_V, log floor of every curve, [1 + R or fewer, 2V + 1].
    """
    logs = np.log(np.where(draws > 0, draws, np.nan))
    logs = np.concatenate([logs[:1], logs[1:][np.isfinite(logs[1:]).sum(1) > 2 * len(x)]])
    first = min((_descend(start, x, logs[0]) for start in _starts(len(x), logs[0])), key=lambda found: found[0])[1]
    return np.stack([first, *(_descend(first, x, row)[1] for row in logs[1:])])


def _starts(num_variables: int, logs: Floats) -> list[Floats]:
    """Every combination of exponents with every floor; the variables share what is left of the median at their middle."""
    median, least = math.exp(float(np.nanmedian(logs))), math.exp(float(np.nanmin(logs)))
    starts = []
    for exponents in itertools.product(_FIRST_EXPONENTS, repeat=num_variables):
        for share in _FIRST_FLOORS:
            each = math.log(max(median - share * least, 1e-3 * median) / num_variables)
            starts.append(np.array([*[each] * num_variables, *exponents, math.log(share * least)]))
    return starts


def _descend(start: Floats, x: Floats, logs: Floats) -> tuple[float, Floats]:
    """Loss and parameters where L-BFGS ends."""
    usable = np.isfinite(logs)
    least = float(logs[usable].min())
    bounds = [*[(None, None)] * len(x), *[_EXPONENTS] * len(x), (least + math.log(_MIN_FLOOR), least)]
    options = {"maxiter": 300, "ftol": 1e-9, "gtol": 1e-7}
    found = minimize(_loss, start, (x[:, usable], logs[usable]), method="L-BFGS-B", jac=True, bounds=bounds, options=options)
    return float(found.fun), np.asarray(found.x)


def _loss(parameters: Floats, x: Floats, logs: Floats) -> tuple[float, Floats]:
    """Huber loss over its threshold, so that it is the sum of absolute deviations far from 0, and its gradient."""
    num_variables = len(x)
    terms = np.empty((num_variables + 1, x.shape[1]))
    terms[:-1] = parameters[:num_variables, None] - parameters[num_variables:-1, None] * x
    terms[-1] = parameters[-1]
    fitted = np.logaddexp.reduce(terms, axis=0)
    deviation = fitted - logs
    slope = np.clip(deviation / HUBER_DELTA, -1, 1)
    pull = np.exp(terms - fitted) * slope  # each term's share of the fitted value, times the loss's slope
    by_term = pull.sum(1)
    gradient = np.concatenate([by_term[:-1], -np.einsum("vm,vm->v", pull[:-1], x), by_term[-1:]])
    return float(slope @ deviation - HUBER_DELTA / 2 * (slope @ slope)), gradient


def _law(
    name: str, x: Floats, values: Floats, scales: Floats, exponents: Floats, reconstruction_floors: Floats, middle: float
) -> Law:
    """A law from the fits of a curve and its redraws, [1 + R] each, scales at x = `middle`."""
    with np.errstate(divide="ignore", over="ignore"):
        saturations = middle * (scales / reconstruction_floors) ** (1 / exponents)
    floor = interval_of(reconstruction_floors)
    is_floor = len(reconstruction_floors) > 1 and floor.low > _NO_FLOOR * values.min()
    is_certain = is_floor and _is_inside(exponents[0]) and x.min() <= saturations[0] <= x.max()
    fitted = reconstruction_floors[0] + scales[0] * (x / middle) ** -exponents[0]
    return Law(
        name=name,
        num_snapshots=len(x),
        scale=interval_of(scales * middle**exponents),
        exponent=interval_of(exponents),
        floor=floor,
        saturation=interval_of(saturations) if is_certain else None,
        misfit=float(np.sqrt(np.mean((values / fitted - 1) ** 2))),
    )


def _fit(x: Floats, curves: Floats, weights: Floats) -> tuple[Floats, Floats, Floats]:
    """Scale at x = 0, exponent and floor >= 0, [R] each, of the weighted least squares of every curve [R, M].

    With the exponent given the law is linear in the other two, so only exponents are searched, closer each round.
    """
    square = weights**2
    low, high = (np.full(len(curves), math.log(end)) for end in _EXPONENTS)
    rows = np.arange(len(curves))
    for _ in range(_NUM_ROUNDS):
        tried = np.linspace(low, high, _NUM_TRIED, axis=1)
        basis = np.exp(-np.exp(tried)[..., None] * x)  # [R, E, M]
        gg, g1, gv = (basis**2 @ square, basis @ square, np.einsum("rem,rm,m->re", basis, curves, square))
        one, v1 = square.sum(), (curves @ square)[:, None]
        floor = np.maximum((gg * v1 - g1 * gv) / np.maximum(gg * one - g1**2, 1e-300), 0)
        scale = np.maximum((gv - floor * g1) / gg, 1e-300)
        misfit = (square * (floor[..., None] + scale[..., None] * basis - curves[:, None]) ** 2).sum(-1)
        best = misfit.argmin(1)
        low, high = tried[rows, np.maximum(best - 1, 0)], tried[rows, np.minimum(best + 1, _NUM_TRIED - 1)]
    return scale[rows, best], np.exp(tried[rows, best]), floor[rows, best]


def _is_inside(exponent: float) -> bool:
    return _EXPONENTS[0] * 1.01 < exponent < _EXPONENTS[1] / 1.01


def interval_of(draws: Floats) -> Interval:
    """The 95 % interval of redraws [1 + R] about their first, the estimate itself."""
    low, high = np.quantile(draws, TAILS)
    return Interval(float(draws[0]), float(min(low, draws[0])), float(max(high, draws[0])))


def _in_words(interval: Interval) -> str:
    if interval.low == interval.high:
        return format_number(interval.value)
    return f"{format_number(interval.value)} [{format_number(interval.low)}, {format_number(interval.high)}]"
