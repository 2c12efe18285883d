"""Power laws with an asymptote, `value = asymptote + scale * x^-exponent`, and two ways to fit them.

There are two fits because points deviate from a law for two reasons:

`fit_law`       Weighted least squares on the values, for the curve of one training whose points were all sampled in the same
                way. They deviate from the law by the noise of their scores, which is known and gives the weights.
`fit_frontier`  Huber loss with threshold 1e-3 on logarithms, by L-BFGS from a grid of starting values (Hoffmann et al., arXiv
                2203.15556, approach 3 and eq. 3), for frontiers. Each point is the best of many, has another size or setting
                than the next one, and deviates from the law by more than its noise. With so small a threshold an outlier has
                little influence.

The 95 % intervals come from fits to bootstrap replicates of the scores, drawn independently. They include the noise of the
scores, but not another training seed or another form of the law.

Shapes: M points of a curve, R bootstrap replicates, E exponents that are tried, V variables.
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

MIN_POINTS = 4
"""A law needs this many points: it has three parameters, and one point more shows a deviation."""
HUBER_DELTA = 1e-3
_EXPONENT_RANGE = (0.01, 10.0)
_NUM_TRIED, _NUM_ROUNDS = 32, 6
_INITIAL_EXPONENTS = (0.1, 0.3, 0.7, 1.5)
_INITIAL_ASYMPTOTES = (0.01, 0.5, 0.95)
"""As fractions of the lowest value of a curve."""
_MIN_ASYMPTOTE = 1e-6
"""Lower bound in a fit, as a fraction of the lowest value of a curve, so that the logarithm is finite."""
_NO_ASYMPTOTE = 1e-3
"""An asymptote below this fraction of the lowest value counts as none."""


@dataclass(frozen=True)
class Law:
    """A law fitted to one curve over x: training compute, a cost, or parameters.

    The intervals have no width if the scores have no intervals.

    Attributes:
        num_points: number of points that it was fitted to.
        asymptote: the value for infinite x.
        saturation: the x at which the asymptote equals the power term. It is None if the interval of the asymptote includes 0,
            if there are no intervals, or if this x is outside the range of the points.
        misfit: root-mean-square deviation of the points from the law, as a fraction of their values.
    """

    name: str
    num_points: int
    scale: Interval
    exponent: Interval
    asymptote: Interval
    saturation: Interval | None
    misfit: float

    def at(self, x: float) -> float:
        """The law's value at x."""
        return self.asymptote.value + self.scale.value * x**-self.exponent.value

    @property
    def is_found(self) -> bool:
        """Whether the best exponent is inside the range that is searched; otherwise the curve does not fall as a power of x."""
        return _is_inside_range(self.exponent.value)

    def __str__(self) -> str:
        if not self.is_found:
            return f"{self.name}: no power law fits its {self.num_points} points"
        text = f"{self.name}: exponent {_format_interval(self.exponent)}"
        if self.exponent.low == self.exponent.high:
            return f"{text}, asymptote {format_number(self.asymptote.value)}; no intervals, because the scores have none"
        if self.saturation is None:
            return f"{text}, no saturation within the range of its {self.num_points} points"
        return f"{text}, saturates at {_format_interval(self.saturation)} with asymptote {_format_interval(self.asymptote)}"


def fit_law(
    name: str, x: Floats, values: Floats, errors: Floats | None = None, num_replicates: int = 200, seed: int = 0
) -> Law:
    """Fit the law of one training's curve by weighted least squares, with intervals from bootstrap replicates.

    Args:
        x: rising, [M].
        values: above 0, [M].
        errors: standard error of each value, [M]. Without them, errors proportional to the values give the weights, and the
            intervals have no width.
        num_replicates: number of bootstrap replicates, R.
        seed: random seed of the replicates.
    """
    assert len(x) >= MIN_POINTS, f"a law needs {MIN_POINTS} points"
    has_errors = errors is not None and bool(np.all(np.isfinite(errors) & (errors > 0)))
    weights = 1 / (errors if has_errors and errors is not None else values)
    curves = values[None]
    if has_errors and errors is not None:
        noise = np.random.default_rng(seed).standard_normal((num_replicates, len(values)))
        curves = np.concatenate([curves, values + errors * noise])
    center = math.exp(float(np.log(x).mean()))
    scales, exponents, asymptotes = _fit_least_squares(np.log(x / center), curves, weights)
    return _make_law(name, x, values, scales, exponents, asymptotes, center)


def fit_frontier(name: str, x: Floats, frontier: Floats) -> Law:
    """Fit the law of a frontier by the Huber loss on logarithms (arXiv 2203.15556, eq. 3), with intervals from its replicates.

    Args:
        x: cost, parameters or compute of the frontier's points, above 0, [M].
        frontier: the estimate in row 0 and its bootstrap replicates, [1 + R, M]
            (`isocost.analysis.frontier_ci.frontier_points`). Values that are not above 0 are ignored.
    """
    assert len(x) >= MIN_POINTS, f"a law needs {MIN_POINTS} points"
    center = math.exp(float(np.log(x).mean()))
    fits = fit_terms(np.log(x / center)[None], frontier)
    scales, exponents, asymptotes = np.exp(fits[:, 0]), fits[:, 1], np.exp(fits[:, 2])
    return _make_law(name, x, frontier[0], scales, exponents, asymptotes, center)


def fit_terms(x: Floats, curves: Floats) -> Floats:
    """Minimise the Huber loss of `log(asymptote + sum over v of exp(a_v - exponent_v x_v))` against the log of every curve.

    The first curve is fitted from a grid of starting values, the others from the result of the first.

    Args:
        x: logarithms of V variables, centred, [V, M].
        curves: a curve and its replicates, [1 + R, M]. Values that are not above 0 are ignored, and so are replicates with
            fewer values than the law has parameters.

    Returns:
        a_1 .. a_V, exponent_1 .. exponent_V, log asymptote of every curve, [1 + R or fewer, 2V + 1].
    """
    logs = np.log(np.where(curves > 0, curves, np.nan))
    logs = np.concatenate([logs[:1], logs[1:][np.isfinite(logs[1:]).sum(1) > 2 * len(x)]])
    candidates = (_minimize_loss(start, x, logs[0]) for start in _starting_values(len(x), logs[0]))
    first = min(candidates, key=lambda candidate: candidate[0])[1]
    return np.stack([first, *(_minimize_loss(first, x, row)[1] for row in logs[1:])])


def _starting_values(num_variables: int, logs: Floats) -> list[Floats]:
    """Every combination of exponents and asymptotes; the scales are equal, and the law is the median at the centre."""
    median, lowest = math.exp(float(np.nanmedian(logs))), math.exp(float(np.nanmin(logs)))
    starts = []
    for exponents in itertools.product(_INITIAL_EXPONENTS, repeat=num_variables):
        for fraction in _INITIAL_ASYMPTOTES:
            log_scale = math.log(max(median - fraction * lowest, 1e-3 * median) / num_variables)
            starts.append(np.array([*[log_scale] * num_variables, *exponents, math.log(fraction * lowest)]))
    return starts


def _minimize_loss(start: Floats, x: Floats, logs: Floats) -> tuple[float, Floats]:
    """Loss and parameters at the end of L-BFGS."""
    usable = np.isfinite(logs)
    lowest = float(logs[usable].min())
    bounds = [*[(None, None)] * len(x), *[_EXPONENT_RANGE] * len(x), (lowest + math.log(_MIN_ASYMPTOTE), lowest)]
    options = {"maxiter": 300, "ftol": 1e-9, "gtol": 1e-7}
    result = minimize(_loss, start, (x[:, usable], logs[usable]), method="L-BFGS-B", jac=True, bounds=bounds, options=options)
    return float(result.fun), np.asarray(result.x)


def _loss(parameters: Floats, x: Floats, logs: Floats) -> tuple[float, Floats]:
    """Huber loss divided by its threshold (the sum of absolute deviations for large ones), and its gradient."""
    num_variables = len(x)
    terms = np.empty((num_variables + 1, x.shape[1]))
    terms[:-1] = parameters[:num_variables, None] - parameters[num_variables:-1, None] * x
    terms[-1] = parameters[-1]
    fitted = np.logaddexp.reduce(terms, axis=0)
    deviation = fitted - logs
    slope = np.clip(deviation / HUBER_DELTA, -1, 1)
    weighted = np.exp(terms - fitted) * slope  # each term's fraction of the fitted value, times the slope of the loss
    by_term = weighted.sum(1)
    gradient = np.concatenate([by_term[:-1], -np.einsum("vm,vm->v", weighted[:-1], x), by_term[-1:]])
    return float(slope @ deviation - HUBER_DELTA / 2 * (slope @ slope)), gradient


def _make_law(
    name: str, x: Floats, values: Floats, scales: Floats, exponents: Floats, asymptotes: Floats, center: float
) -> Law:
    """The law from the fits of a curve and its replicates, [1 + R] each; `scales` are the power terms at x = `center`."""
    with np.errstate(divide="ignore", over="ignore"):
        saturations = center * (scales / asymptotes) ** (1 / exponents)
    asymptote = bootstrap_interval(asymptotes)
    has_asymptote = len(asymptotes) > 1 and asymptote.low > _NO_ASYMPTOTE * values.min()
    is_saturated = has_asymptote and _is_inside_range(exponents[0]) and x.min() <= saturations[0] <= x.max()
    fitted = asymptotes[0] + scales[0] * (x / center) ** -exponents[0]
    return Law(
        name=name,
        num_points=len(x),
        scale=bootstrap_interval(scales * center**exponents),
        exponent=bootstrap_interval(exponents),
        asymptote=asymptote,
        saturation=bootstrap_interval(saturations) if is_saturated else None,
        misfit=float(np.sqrt(np.mean((values / fitted - 1) ** 2))),
    )


def _fit_least_squares(x: Floats, curves: Floats, weights: Floats) -> tuple[Floats, Floats, Floats]:
    """Fit every curve by weighted least squares.

    For a fixed exponent the law is linear in the other two parameters, so only the exponent is searched, on a finer grid in
    each round.

    Args:
        x: centred logarithms, [M].
        curves: [R, M].
        weights: [M].

    Returns:
        Scale at x = 0, exponent and asymptote >= 0, [R] each.
    """
    square = weights**2
    low, high = (np.full(len(curves), math.log(end)) for end in _EXPONENT_RANGE)
    rows = np.arange(len(curves))
    for _ in range(_NUM_ROUNDS):
        tried = np.linspace(low, high, _NUM_TRIED, axis=1)
        basis = np.exp(-np.exp(tried)[..., None] * x)  # [R, E, M]
        gg, g1, gv = (basis**2 @ square, basis @ square, np.einsum("rem,rm,m->re", basis, curves, square))
        total_weight, v1 = square.sum(), (curves @ square)[:, None]
        asymptote = np.maximum((gg * v1 - g1 * gv) / np.maximum(gg * total_weight - g1**2, 1e-300), 0)
        scale = np.maximum((gv - asymptote * g1) / gg, 1e-300)
        misfit = (square * (asymptote[..., None] + scale[..., None] * basis - curves[:, None]) ** 2).sum(-1)
        best = misfit.argmin(1)
        low, high = tried[rows, np.maximum(best - 1, 0)], tried[rows, np.minimum(best + 1, _NUM_TRIED - 1)]
    return scale[rows, best], np.exp(tried[rows, best]), asymptote[rows, best]


def _is_inside_range(exponent: float) -> bool:
    return _EXPONENT_RANGE[0] * 1.01 < exponent < _EXPONENT_RANGE[1] / 1.01


def bootstrap_interval(estimates: Floats) -> Interval:
    """The 95 % interval of an estimate, the first entry, from it and its bootstrap replicates, [1 + R]."""
    low, high = np.quantile(estimates, TAILS)
    return Interval(float(estimates[0]), float(min(low, estimates[0])), float(max(high, estimates[0])))


def _format_interval(interval: Interval) -> str:
    if interval.low == interval.high:
        return format_number(interval.value)
    return f"{format_number(interval.value)} [{format_number(interval.low)}, {format_number(interval.high)}]"
