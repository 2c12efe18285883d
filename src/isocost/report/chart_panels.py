"""The interactive charts of the page: one figure for every choice of cost, solver, size and metric.

A chart that the table cannot give is `Unavailable`, with the reason in one line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from isocost.analysis.costs import COSTS, is_measured
from isocost.analysis.distillation import split_student_name
from isocost.analysis.formatting import format_metric
from isocost.analysis.guides import guide_costs, has_guides
from isocost.analysis.metric_front import second_metrics
from isocost.analysis.results_table import final_points, sizes_in_order
from isocost.errors import ConfigError
from isocost.evaluation.metric_registry import METRICS
from isocost.report import plot_data, plot_data_finetune, plot_data_guides, plotly_backend
from isocost.report.plot_data_costs import cost_parts
from isocost.report.plot_data_finetune import Pretrained
from isocost.report.plot_data_metrics import metric_front_curves
from isocost.report.plotly_backend import PlotlyFigure
from isocost.report.scope import TRAINED, Scope

RACE_COLUMNS = ("guidance_low", "guidance_high", "race_images", "race_at_boundary")


@dataclass(frozen=True)
class Control:
    """A row of exclusive choices above a chart.

    Attributes:
        keys: names of the choices, in the same order, where other parts of the page use the same choice (costs).
    """

    legend: str
    choices: tuple[str, ...]
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chart:
    """A chart with its controls.

    Attributes:
        figures: indices of the choices, one per control ("0|1") -> the plotly figures that are shown together.
        subtitles: the same keys -> the line above the figures.
    """

    name: str
    controls: tuple[Control, ...]
    figures: Mapping[str, Sequence[PlotlyFigure]]
    subtitles: Mapping[str, str]

    @property
    def has_published(self) -> bool:
        """Whether any figure has a layer with the paper's numbers."""
        traces = (trace for figures in self.figures.values() for figure in figures for trace in figure["data"])
        return any(trace.get("meta") == plotly_backend.PUBLISHED for trace in traces)


@dataclass(frozen=True)
class Unavailable:
    """A part that is missing from the report, with the reason."""

    reason: str


CurveOptions = Callable[[str], dict[str, Any]]
"""Metric -> further fields of its `Curves`: `floor_label` and `reference_lines`."""


def try_make(make: Callable[..., Any], *arguments: Any) -> Any:
    """Return `make(*arguments)`, or `Unavailable` with the message if it raises ConfigError."""
    try:
        return make(*arguments)
    except ConfigError as error:
        return Unavailable(str(error))


def metrics_in(table: pd.DataFrame) -> list[str]:
    """Return the metrics that at least one point has, in the order of `METRICS`."""
    return [name for name in METRICS if name in table.columns and table[name].notna().any()]


def costs_in(table: pd.DataFrame, scope: Scope = TRAINED) -> list[str]:
    """Return the costs that at least one final point has, in the order of the report."""
    finished = table[table["is_final"].astype(bool)]
    return [cost for cost in scope.costs if is_measured(finished, cost)]


def cost_chart(
    table: pd.DataFrame,
    metric: str,
    reconstruction_floors: Mapping[str, float],
    options: CurveOptions,
    scope: Scope = TRAINED,
) -> Chart:
    """Quality against cost, for every cost, solver and metric.

    Args:
        table: points, as in `isocost.analysis.results_table`.
        metric: the metric that comes first.
        reconstruction_floors: metric -> the best possible value.
        options: metric -> further fields of its curves.
        scope: gives the order of the costs.

    Raises:
        ConfigError: no choice has curves.
    """
    metrics = _with_metric_first(table, metric)
    solvers = sorted(final_points(table, metric)["solver"].unique())
    costs = costs_in(table, scope)
    solver_choices: list[str | None] = [None, *solvers] if len(solvers) > 1 else [None]
    arguments = {
        f"{a}|{b}|{c}": (name, (cost, reconstruction_floors.get(name), solver))
        for a, cost in enumerate(costs)
        for b, solver in enumerate(solver_choices)
        for c, name in enumerate(metrics)
    }
    curves = _available_curves(plot_data.cost_curves, table, arguments, options)
    controls = (
        Control("Cost", tuple(COSTS[cost].label for cost in costs), tuple(costs)),
        Control("Solver", tuple(solver or "best of all" for solver in solver_choices)),
        _metric_control(metrics),
    )
    return _curves_chart("cost", controls, curves)


def _compute_chart(
    table: pd.DataFrame, metric: str, reconstruction_floors: Mapping[str, float], options: CurveOptions
) -> Chart:
    metrics = _with_metric_first(table, metric)
    axes = [axis for axis in plot_data.COMPUTE_AXES if axis in table.columns]
    arguments = {
        f"{c}|{a}": (name, (reconstruction_floors.get(name), axis))
        for c, name in enumerate(metrics)
        for a, axis in enumerate(axes)
    }
    curves = _available_curves(plot_data.compute_curves, table, arguments, options)
    compute = Control("Compute", tuple(plot_data.COMPUTE_AXES[axis][0] for axis in axes))
    return _curves_chart("compute", (_metric_control(metrics), compute), curves)


def _solver_chart(table: pd.DataFrame, metric: str, reconstruction_floors: Mapping[str, float], options: CurveOptions) -> Chart:
    metrics = _with_metric_first(table, metric)
    size_choices: list[str | None] = [None, *sizes_in_order(final_points(table, metric))]
    arguments = {
        f"{a}|{b}|{c}": (name, (size, axis, reconstruction_floors.get(name)))
        for a, size in enumerate(size_choices)
        for b, axis in enumerate(plot_data.STEP_AXES)
        for c, name in enumerate(metrics)
    }
    curves = _available_curves(plot_data.solver_curves, table, arguments, options)
    controls = (
        Control("Size", tuple(size or "best of all" for size in size_choices)),
        Control("Against", tuple(label for label, *_ in plot_data.STEP_AXES.values())),
        _metric_control(metrics),
    )
    return _curves_chart("solvers", controls, curves)


def _guidance_chart(table: pd.DataFrame, metric: str, _floors: Mapping[str, float], _options: CurveOptions) -> Chart:
    metrics = _with_metric_first(table, metric)
    plot_data.check_guidance_varies(table, metric)
    solvers = _solvers_by_guidance_choice(table, metric)
    figures = {}
    for c, name in enumerate(metrics):
        panels = plot_data.guidance_panels(without_unrelated_races(table, metric, name), name)
        for b, solver in enumerate(solvers):
            figures[f"{b}|{c}"] = [plotly_backend.plotly_heatmap(panel) for panel in panels if panel.solver == solver]
    return Chart("guidance", (Control("Solver", tuple(solvers)), _metric_control(metrics)), figures, {})


def _best_guidance_chart(table: pd.DataFrame, metric: str, _floors: Mapping[str, float], _options: CurveOptions) -> Chart:
    metrics = _with_metric_first(table, metric)
    plot_data.check_guidance_varies(table, metric)
    solvers = _solvers_by_guidance_choice(table, metric)
    curves = {
        f"{b}|{c}": plot_data.guidance_curves(without_unrelated_races(table, metric, name), name, solver)
        for b, solver in enumerate(solvers)
        for c, name in enumerate(metrics)
    }
    return _curves_chart("best_guidance", (Control("Solver", tuple(solvers)), _metric_control(metrics)), curves)


def finetune_charts(
    table: pd.DataFrame,
    metric: str,
    reconstruction_floors: Mapping[str, float],
    options: CurveOptions,
    pretrained: Pretrained | None,
) -> dict[str, Chart | Unavailable]:
    """Return the charts that only some experiments have: "distillation" (frontiers of students) and "pretraining"."""
    finetune: dict[str, Chart | Unavailable] = {}
    if any(split_student_name(size)[1] for size in sizes_in_order(table)):
        finetune["distillation"] = try_make(_distillation_chart, table, metric, reconstruction_floors, options)
    if pretrained is not None:
        finetune["pretraining"] = try_make(_pretraining_chart, table, metric, reconstruction_floors, options, pretrained)
    return finetune


def _distillation_chart(
    table: pd.DataFrame, metric: str, reconstruction_floors: Mapping[str, float], options: CurveOptions
) -> Chart:
    metrics, costs = _with_metric_first(table, metric), costs_in(table)
    arguments = {
        f"{a}|{c}": (name, (cost, reconstruction_floors.get(name)))
        for a, cost in enumerate(costs)
        for c, name in enumerate(metrics)
    }
    curves = _available_curves(plot_data_finetune.distillation_curves, table, arguments, options)
    cost = Control("Cost", tuple(COSTS[cost].label for cost in costs), tuple(costs))
    return _curves_chart("distillation", (cost, _metric_control(metrics)), curves, "Each marker shows")


def _pretraining_chart(
    table: pd.DataFrame,
    metric: str,
    reconstruction_floors: Mapping[str, float],
    options: CurveOptions,
    pretrained: Pretrained,
) -> Chart:
    metrics = _with_metric_first(table, metric)
    arguments = {f"{c}": (name, (pretrained, reconstruction_floors.get(name))) for c, name in enumerate(metrics)}
    curves = _available_curves(plot_data_finetune.pretraining_curves, table, arguments, options)
    return _curves_chart("pretraining", (_metric_control(metrics),), curves, "Each marker shows")


def guide_charts(
    table: pd.DataFrame, metric: str, reconstruction_floors: Mapping[str, float], options: CurveOptions
) -> dict[str, Chart | Unavailable]:
    """Return the charts that only tables with guide networks have: "guide_frontier" and "guide_heatmap"."""
    if not has_guides(table):
        return {}
    return {
        "guide_frontier": try_make(_guide_frontier_chart, table, metric, reconstruction_floors, options),
        "guide_heatmap": try_make(_guide_heatmap_chart, table, metric),
    }


def _guide_frontier_chart(
    table: pd.DataFrame, metric: str, reconstruction_floors: Mapping[str, float], options: CurveOptions
) -> Chart:
    metrics, costs = _with_metric_first(table, metric), guide_costs(table)
    arguments = {
        f"{a}|{c}": (name, (cost, reconstruction_floors.get(name)))
        for a, cost in enumerate(costs)
        for c, name in enumerate(metrics)
    }
    curves = _available_curves(plot_data_guides.guide_frontier, table, arguments, options)
    cost = Control("Cost", tuple(COSTS[cost].label for cost in costs), tuple(costs))
    return _curves_chart("guide_frontier", (cost, _metric_control(metrics)), curves, "Each marker shows")


def _guide_heatmap_chart(table: pd.DataFrame, metric: str) -> Chart:
    metrics, costs = _with_metric_first(table, metric), guide_costs(table)
    heatmaps = {
        f"{a}|{c}": try_make(plot_data_guides.guide_heatmap, table, name, cost)
        for a, cost in enumerate(costs)
        for c, name in enumerate(metrics)
    }
    available = {key: heatmap for key, heatmap in heatmaps.items() if not isinstance(heatmap, Unavailable)}
    if not available:
        raise ConfigError(next((heatmap.reason for heatmap in heatmaps.values()), "no final point has a cost"))
    return Chart(
        "guide_heatmap",
        # without keys: a chart with the page's costs gets the budget line of the slider in place of its own frames
        (Control("Cost", tuple(COSTS[cost].label for cost in costs)), _metric_control(metrics)),
        {key: [plotly_backend.plotly_guide_heatmap(heatmap)] for key, heatmap in available.items()},
        {key: f"{heatmap.setting[0].upper()}{heatmap.setting[1:]}." for key, heatmap in available.items()},
    )


def _cost_parts_chart(table: pd.DataFrame, metric: str, _floors: Mapping[str, float], _options: CurveOptions) -> Chart:
    metrics = _with_metric_first(table, metric)
    by_metric = {f"{c}": try_make(cost_parts, table, name) for c, name in enumerate(metrics)}
    available = {key: parts for key, parts in by_metric.items() if not isinstance(parts, Unavailable)}
    if not available:
        raise ConfigError(next(parts.reason for parts in by_metric.values()))
    figures = {key: [plotly_backend.plotly_cost_parts(parts)] for key, parts in available.items()}
    subtitles = {key: f"{parts.setting[0].upper()}{parts.setting[1:]}." for key, parts in available.items()}
    return Chart("cost_parts", (_metric_control(metrics),), figures, subtitles)


def _metric_front_chart(table: pd.DataFrame, metric: str, _floors: Mapping[str, float], _options: CurveOptions) -> Chart:
    others = second_metrics(table, metric)
    if not others:
        metric_front_curves(table, metric)
    costs = [cost for cost in costs_in(table) if cost in ("gflop", "nfe", "ms_per_image")]
    curves = {
        f"{a}|{b}": metric_front_curves(table, metric, other, cost)
        for a, other in enumerate(others)
        for b, cost in enumerate(costs)
    }
    controls = (
        Control("Second metric", tuple(format_metric(other, others) for other in others)),
        Control("Cost", tuple(COSTS[cost].label for cost in costs)),
    )
    return _curves_chart("metric_front", controls, curves, "Each marker shows")


CHARTS: dict[str, Callable[..., Chart]] = {
    "cost": cost_chart,
    "cost_parts": _cost_parts_chart,
    "metric_front": _metric_front_chart,
    "compute": _compute_chart,
    "solvers": _solver_chart,
    "guidance": _guidance_chart,
    "best_guidance": _best_guidance_chart,
}


def without_unrelated_races(table: pd.DataFrame, race_metric: str, metric: str) -> pd.DataFrame:
    """Return the table for a chart of `metric`: without the race columns if another metric decided the races."""
    return table if metric == race_metric else table.drop(columns=[name for name in RACE_COLUMNS if name in table.columns])


def _available_curves(
    make: Callable[..., plot_data.Curves],
    table: pd.DataFrame,
    arguments: Mapping[str, tuple[str, tuple[Any, ...]]],
    options: CurveOptions,
) -> dict[str, plot_data.Curves]:
    """Return the curves of every choice that the table can give.

    Args:
        arguments: key of the choice -> metric and further arguments of `make`.

    Raises:
        ConfigError: no choice has curves; the message is that of the first choice.
    """
    results = {key: (name, try_make(make, table, name, *further)) for key, (name, further) in arguments.items()}
    curves = {
        key: replace(result, **options(name)) for key, (name, result) in results.items() if not isinstance(result, Unavailable)
    }
    if not curves:
        reasons = (result.reason for _, result in results.values())
        raise ConfigError(next(reasons, "no final point has a cost"))
    return curves


def _solvers_by_guidance_choice(table: pd.DataFrame, metric: str) -> list[str]:
    """Return all solvers, first those with more than one guidance value: students may have a solver with only one."""
    num_values = final_points(table, metric).groupby("solver")["guidance"].nunique()
    return sorted(num_values.index, key=lambda solver: (-int(num_values[solver] > 1), solver))


def _metric_control(metrics: Sequence[str]) -> Control:
    return Control("Quality", tuple(format_metric(name, metrics) for name in metrics))


def _curves_chart(
    name: str, controls: tuple[Control, ...], curves: Mapping[str, plot_data.Curves], lead: str = "Sampled with"
) -> Chart:
    figures = {key: [plotly_backend.plotly_curves(item)] for key, item in curves.items()}
    subtitles = {key: f"{item.y_label}. {lead} {item.setting}." for key, item in curves.items()}
    return Chart(name, controls, figures, subtitles)


def _with_metric_first(table: pd.DataFrame, metric: str) -> list[str]:
    return [metric, *(name for name in metrics_in(table) if name != metric)]
