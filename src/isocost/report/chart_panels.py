"""The charts of the page with their switches: every drawing that a choice of cost, solver, size or quality can ask for.

A part that the table cannot give says in one line what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from isocost.analysis.costs import COSTS
from isocost.analysis.distillation import teacher_of
from isocost.analysis.formatting import format_metric
from isocost.analysis.results_table import final_points, sizes_in_order
from isocost.errors import ConfigError
from isocost.metrics.registry import METRICS
from isocost.report import plot_data
from isocost.report import plot_data_finetune as tuned
from isocost.report import plotly_backend as charts

RACES = ("guidance_low", "guidance_high", "race_images", "race_at_boundary")


@dataclass(frozen=True)
class Control:
    """A row of exclusive choices above a chart; the positions of what is chosen make the key of the drawing.

    `keys` are the names of what is chosen where other parts of the page follow it (costs), in the order of `choices`.
    """

    legend: str
    choices: tuple[str, ...]
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chart:
    """A chart with its switches; `drawings` maps "0|1" (a position for each control) to the plotly figures shown together."""

    name: str
    controls: tuple[Control, ...]
    drawings: Mapping[str, Sequence[go.Figure]]
    settings: Mapping[str, str]

    @property
    def has_published(self) -> bool:
        """Whether any drawing holds the layer of the paper's numbers."""
        return any(trace.meta == charts.PUBLISHED for shown in self.drawings.values() for one in shown for trace in one.data)


@dataclass(frozen=True)
class Unavailable:
    """A part that is not in the report, and why."""

    why: str


Across = Callable[[str], dict[str, Any]]
"""Metric -> what its curves have besides: label of the floor, further levels."""


def try_make(make: Callable[..., Any], *arguments: Any) -> Any:
    """What `make` gives; where the table cannot answer, its one line, to be shown in the place of the part."""
    try:
        return make(*arguments)
    except ConfigError as error:
        return Unavailable(str(error))


def metrics_in(table: pd.DataFrame) -> list[str]:
    """The metrics that at least one point carries, in the order of `METRICS`."""
    return [name for name in METRICS if name in table.columns and table[name].notna().any()]


def costs_in(table: pd.DataFrame) -> list[str]:
    """The costs that at least one finished point carries, in the order of `COSTS`."""
    finished = table[table["is_final"].astype(bool)]
    return [cost for cost in COSTS if finished[cost].notna().any()]


def _cost_chart(table: pd.DataFrame, metric: str, reconstruction_floors: Mapping[str, float], across: Across) -> Chart:
    metrics = _lead_first(table, metric)
    solvers = sorted(final_points(table, metric)["solver"].unique())
    costs = costs_in(table)
    views: list[str | None] = [None, *solvers] if len(solvers) > 1 else [None]
    asked = {
        f"{a}|{b}|{c}": (name, (cost, reconstruction_floors.get(name), solver))
        for a, cost in enumerate(costs)
        for b, solver in enumerate(views)
        for c, name in enumerate(metrics)
    }
    curves = _drawable(plot_data.cost_curves, table, asked, across)
    controls = (
        Control("Cost", tuple(COSTS[cost].label for cost in costs), tuple(costs)),
        Control("Solver", tuple(solver or "best of all" for solver in views)),
        _quality(metrics),
    )
    return _chart("cost", controls, curves)


def _compute_chart(table: pd.DataFrame, metric: str, reconstruction_floors: Mapping[str, float], across: Across) -> Chart:
    metrics = _lead_first(table, metric)
    axes = [axis for axis in plot_data.COMPUTE_AXES if axis in table.columns]
    asked = {
        f"{c}|{a}": (name, (reconstruction_floors.get(name), axis))
        for c, name in enumerate(metrics)
        for a, axis in enumerate(axes)
    }
    curves = _drawable(plot_data.compute_curves, table, asked, across)
    compute = Control("Compute", tuple(plot_data.COMPUTE_AXES[axis][0] for axis in axes))
    return _chart("compute", (_quality(metrics), compute), curves)


def _solver_chart(table: pd.DataFrame, metric: str, reconstruction_floors: Mapping[str, float], across: Across) -> Chart:
    metrics = _lead_first(table, metric)
    views: list[str | None] = [None, *sizes_in_order(final_points(table, metric))]
    asked = {
        f"{a}|{b}|{c}": (name, (size, axis, reconstruction_floors.get(name)))
        for a, size in enumerate(views)
        for b, axis in enumerate(plot_data.STEP_AXES)
        for c, name in enumerate(metrics)
    }
    curves = _drawable(plot_data.solver_curves, table, asked, across)
    controls = (
        Control("Size", tuple(size or "best of all" for size in views)),
        Control("Across", tuple(words for words, *_ in plot_data.STEP_AXES.values())),
        _quality(metrics),
    )
    return _chart("solvers", controls, curves)


def _guidance_chart(table: pd.DataFrame, metric: str, _floors: Mapping[str, float], _across: Across) -> Chart:
    metrics = _lead_first(table, metric)
    plot_data.check_guidance(table, metric)
    solvers = _solvers_with_a_choice(table, metric)
    drawings = {}
    for c, name in enumerate(metrics):
        panels = plot_data.guidance_panels(raced_by(table, metric, name), name)
        for b, solver in enumerate(solvers):
            drawings[f"{b}|{c}"] = [charts.plotly_heat(panel) for panel in panels if panel.solver == solver]
    return Chart("guidance", (Control("Solver", tuple(solvers)), _quality(metrics)), drawings, {})


def _found_chart(table: pd.DataFrame, metric: str, _floors: Mapping[str, float], _across: Across) -> Chart:
    metrics = _lead_first(table, metric)
    plot_data.check_guidance(table, metric)
    solvers = _solvers_with_a_choice(table, metric)
    curves = {
        f"{b}|{c}": plot_data.guidance_curves(raced_by(table, metric, name), name, solver)
        for b, solver in enumerate(solvers)
        for c, name in enumerate(metrics)
    }
    return _chart("found", (Control("Solver", tuple(solvers)), _quality(metrics)), curves)


def tuned_charts(
    table: pd.DataFrame,
    metric: str,
    reconstruction_floors: Mapping[str, float],
    across: Across,
    pretrained: tuned.Pretrained | None,
) -> dict[str, Chart | Unavailable]:
    """Charts that only some experiments have, by name: frontiers of students, a task's quality after pretraining's."""
    made = {}
    if any(teacher_of(size)[1] for size in sizes_in_order(table)):
        made["distilled"] = try_make(_distilled_chart, table, metric, reconstruction_floors, across)
    if pretrained is not None:
        made["following"] = try_make(_following_chart, table, metric, reconstruction_floors, across, pretrained)
    return made


def _distilled_chart(table: pd.DataFrame, metric: str, reconstruction_floors: Mapping[str, float], across: Across) -> Chart:
    metrics, costs = _lead_first(table, metric), costs_in(table)
    asked = {
        f"{a}|{c}": (name, (cost, reconstruction_floors.get(name)))
        for a, cost in enumerate(costs)
        for c, name in enumerate(metrics)
    }
    curves = _drawable(tuned.distillation_curves, table, asked, across)
    cost = Control("Cost", tuple(COSTS[cost].label for cost in costs), tuple(costs))
    return _chart("distilled", (cost, _quality(metrics)), curves, "Each mark is")


def _following_chart(
    table: pd.DataFrame, metric: str, reconstruction_floors: Mapping[str, float], across: Across, pretrained: tuned.Pretrained
) -> Chart:
    metrics = _lead_first(table, metric)
    asked = {f"{c}": (name, (pretrained, reconstruction_floors.get(name))) for c, name in enumerate(metrics)}
    return _chart("following", (_quality(metrics),), _drawable(tuned.pretraining_curves, table, asked, across), "Each mark is")


CHARTS = {
    "cost": _cost_chart,
    "compute": _compute_chart,
    "solvers": _solver_chart,
    "guidance": _guidance_chart,
    "found": _found_chart,
}


def raced_by(table: pd.DataFrame, lead: str, metric: str) -> pd.DataFrame:
    """The table for drawing `metric`: the races' intervals stay only where it is `lead`, which the races went by."""
    return table if metric == lead else table.drop(columns=[name for name in RACES if name in table.columns])


def _drawable(
    make: Callable[..., plot_data.Curves], table: pd.DataFrame, asked: Mapping[str, tuple[str, tuple[Any, ...]]], across: Across
) -> dict[str, plot_data.Curves]:
    """The curves of every choice that the table can give, by key; `asked` has each one's metric and further arguments.

    Raises:
        ConfigError: it can give none; the words are those of the first.
    """
    made = {key: (name, try_make(make, table, name, *further)) for key, (name, further) in asked.items()}
    curves = {key: replace(one, **across(name)) for key, (name, one) in made.items() if not isinstance(one, Unavailable)}
    if not curves:
        raise ConfigError(next((one.why for _, one in made.values()), "no finished point carries a cost"))
    return curves


def _solvers_with_a_choice(table: pd.DataFrame, metric: str) -> list[str]:
    """All solvers, those first that were tried with the most values of guidance: a student's may have but one."""
    tried = final_points(table, metric).groupby("solver")["guidance"].nunique()
    return sorted(tried.index, key=lambda solver: (-int(tried[solver] > 1), solver))


def _quality(metrics: Sequence[str]) -> Control:
    return Control("Quality", tuple(format_metric(name) for name in metrics))


def _chart(
    name: str, controls: tuple[Control, ...], curves: Mapping[str, plot_data.Curves], lead: str = "Sampled with"
) -> Chart:
    drawings = {key: [charts.plotly_curves(one)] for key, one in curves.items()}
    return Chart(name, controls, drawings, {key: f"{one.y_label}. {lead} {one.setting}." for key, one in curves.items()})


def _lead_first(table: pd.DataFrame, metric: str) -> list[str]:
    return [metric, *(name for name in metrics_in(table) if name != metric)]
