"""Draws `Curves` and `HeatPanel`s with plotly, for the page. Hover texts show the configuration of a point.

A figure is plain data, as plotly.js reads it: `plotly.graph_objects.Figure` would check every value of every chart again, which
is slow. The tests check the figures with it.
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import plotly.io
from matplotlib.colors import to_hex

from isocost.analysis.formatting import format_number
from isocost.report.plot_data import Curves, HeatPanel, Series, all_series, panel_colors, x_ticks, y_range
from isocost.report.plot_data_costs import MIN_LABELLED_SHARE, CostParts
from isocost.report.plot_data_guides import GuideHeatmap, change_colors
from isocost.report.plot_style import HAIRLINE, INK, MUTED, OPTIMUM, log_ticks, tick_indices

PlotlyFigure = dict[str, Any]
"""`data`, a list of traces, and `layout`; lists, texts, numbers and None only, so it can be written as JSON."""
PUBLISHED = "published"
"""`meta` of the trace with the paper's numbers; the page hides it until the reader ticks its box."""
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def plotly_curves(curves: Curves) -> PlotlyFigure:
    """Draw lines with bands, as `draw_curves` does. A click on the legend hides a size."""
    traces, meta = list[dict[str, Any]](), dict[str, Any]()
    for series in () if curves.has_error_bars else curves.series:
        has_interval = ~(np.isnan(series.low) | np.isnan(series.high))
        band_x, low, high = series.x[has_interval], series.low[has_interval], series.high[has_interval]
        if curves.is_staircase:
            band_x, low, high = np.repeat(band_x, 2)[1:], np.repeat(low, 2)[:-1], np.repeat(high, 2)[:-1]
        traces.append(
            _scatter(
                x=_numbers([*band_x, *band_x[::-1]]),
                y=_numbers([*high, *low[::-1]]),
                fill="toself",
                fillcolor=_with_alpha(series.color, 0.16),
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
                legendgroup=series.label,
                showlegend=False,
                name=f"{html.escape(series.label)} 95 % interval",
            )
        )
    max_x = max(float(series.x.max()) for series in curves.series)
    for series in curves.series:
        trace = _trace(series) | (_error_bars(series) if curves.has_error_bars else {})
        marker = {"symbol": series.marker[1], "size": 10, "line": {"color": "white", "width": 0.5}}
        shape = "hv" if curves.is_staircase else "linear"
        line = {"color": series.color, "width": 2, "dash": series.dash, "shape": shape}
        traces.append(_scatter(**trace, marker=marker, line=line))
        if curves.is_staircase:
            tail = {"x": [float(series.x[-1]), max_x], "y": [float(series.y[-1])] * 2, "legendgroup": series.label}
            line = {"color": series.color, "width": 2, "dash": series.dash}
            traces.append(_scatter(**tail, mode="lines", line=line, showlegend=False, hoverinfo="skip"))
    for series in curves.off_line_points:
        marker = {"symbol": series.marker[1], "size": 10, "color": series.color, "line": {"color": "white", "width": 0.5}}
        changes = {"mode": "markers", "name": f"{html.escape(series.label)}, off its line"}
        traces.append(_scatter(**_trace(series) | changes, marker=marker, showlegend=False))
    if curves.frontier is not None:
        line = {"color": INK, "width": 1.2, "shape": "hv"}
        marker = {"symbol": "circle-open", "size": 15, "color": INK, "line": {"width": 1.2}}
        traces.append(_scatter(**_trace(curves.frontier), marker=marker, line=line))
    xs, ys = [series.x for series in all_series(curves)], y_range(curves)
    ends = [float(min(x.min() for x in xs)), float(max(x.max() for x in xs))]
    for label, value, dash in curves.horizontal_lines:
        traces.append(
            _scatter(
                x=ends,
                y=[float(value)] * 2,
                mode="lines",
                line={"color": MUTED, "width": 1.5, "dash": dash},
                name=html.escape(label),
                hovertemplate=f"{html.escape(label)}: {format_number(value)}<extra></extra>",
            )
        )
    if curves.published is not None:
        published = curves.published
        marker = {"symbol": published.marker[1], "size": 9, "color": published.color, "line": {"width": 1.4}}
        line = {"color": published.color, "width": 1.2, "dash": published.dash}
        traces.append(_scatter(**_trace(published), marker=marker, line=line, meta=PUBLISHED, visible=False))
        ticks = {"xaxis": _ticks(*x_ticks(curves, with_published=True))}
        if curves.log_y:
            ticks["yaxis"] = _ticks(*log_ticks(*y_range(curves, with_published=True)))
        meta = {"meta": {PUBLISHED: ticks}}
    x_axis = _axis(curves.x_label) | (_log_axis(*x_ticks(curves)) if curves.log_x else {})
    y_axis = _axis(curves.y_label.split(",")[0].split(" (")[0]) | (_log_axis(*log_ticks(*ys)) if curves.log_y else {})
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "itemwidth": 30}
    layout = {
        **meta,
        **_layout(),
        "xaxis": x_axis,
        "yaxis": y_axis,
        "legend": legend,
        "hovermode": "closest",
        "height": 400 if curves.has_error_bars else 520,
        "margin": {"l": 62, "r": 12, "t": 10, "b": 56},
    }
    return {"data": traces, "layout": layout}


def _error_bars(series: Series) -> dict[str, Any]:
    """Return intervals as error bars of a trace; a point without an interval has a bar of length 0."""
    up, down = (np.nan_to_num(length).tolist() for length in (series.high - series.y, series.y - series.low))
    return {"error_y": {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "width": 5, "thickness": 1.4}}


def plotly_heatmap(panel: HeatPanel) -> PlotlyFigure:
    """Draw one heat map of steps × guidance, as `draw_heatmaps` does."""
    colors, scale = panel_colors(panel)
    texts = [
        [
            ""
            if np.isnan(value) or not panel.is_labelled
            else ("★ " if (row, column) == panel.optimum else "") + format_number(value)
            for column, value in enumerate(values)
        ]
        for row, values in enumerate(panel.values)
    ]
    guidance, steps = [format_number(value) for value in panel.guidance], [str(value) for value in panel.num_steps]
    heatmap = _heatmap(
        z=[_numbers(row) for row in panel.values],
        zmin=scale.vmin,
        zmax=scale.vmax,
        colorscale=[[position, to_hex(colors(position))] for position in np.linspace(0, 1, 11).tolist()],
        showscale=False,
        text=texts,
        texttemplate="%{text}",
        textfont={"size": 10},
        customdata=[[[steps, value] for value in guidance] for steps in panel.num_steps],
        hovertemplate="%{customdata[0]} steps, guidance %{customdata[1]}: %{z:.4g}<extra></extra>",
        xgap=1,
        ygap=1,
    )
    frame = {"type": "rect", "line": {"color": OPTIMUM, "width": 2.5}}
    shapes = [
        {**frame, "x0": column - 0.48, "x1": column + 0.48, "y0": row - 0.46, "y1": row + 0.46}
        for row, column in enumerate(panel.best_columns)
    ]
    traces = [heatmap]
    for row, interval in enumerate(panel.race_intervals):
        if interval is not None:
            low, high = (panel.column_position(end) for end in interval)
            ends = f"{format_number(interval[0])} to {format_number(interval[1])}"
            traces.append(
                _scatter(
                    x=[low, high],
                    y=[row + 0.36] * 2,
                    mode="lines+markers",
                    line={"color": OPTIMUM, "width": 2.5},
                    marker={"symbol": "line-ns-open", "size": 8, "color": OPTIMUM, "line": {"width": 2}},
                    showlegend=False,
                    hovertemplate=f"best guidance {ends}<extra>race</extra>",
                )
            )
    x_axis = _axis("guidance") | _category_axis(guidance) | {"range": [-0.5, len(guidance) - 0.5]}
    y_axis = _axis("steps") | _category_axis(steps) | {"range": [len(steps) - 0.5, -0.5]}
    layout = {
        "shapes": shapes,
        **_layout(),
        "xaxis": x_axis,
        "yaxis": y_axis,
        "height": 110 + (30 if panel.is_labelled else 10) * len(steps),
        "margin": {"l": 48, "r": 6, "t": 34, "b": 44},
        "title": {"text": html.escape(panel.size), "font": {"size": 14}, "x": 0, "xref": "paper", "y": 0.96},
    }
    return {"data": traces, "layout": layout}


def plotly_guide_heatmap(heatmap: GuideHeatmap) -> PlotlyFigure:
    """Draw networks (rows) × guides (columns), as `draw_guide_heatmap` does."""
    colors, scale = change_colors(heatmap)
    networks, guides = ([html.escape(name) for name in names] for names in (heatmap.networks, heatmap.guides))
    notes = [[html.escape(note).replace("\n", "<br>") for note in row] for row in heatmap.notes]
    trace = _heatmap(
        z=[_numbers(row) for row in heatmap.percent],
        zmin=scale.vmin,
        zmax=scale.vmax,
        colorscale=[[position, to_hex(colors(position))] for position in np.linspace(0, 1, 11).tolist()],
        showscale=False,
        text=[[heatmap.text(row, column) for column in range(len(guides))] for row in range(len(networks))],
        texttemplate="%{text}",
        textfont={"size": 12},
        customdata=notes,
        hovertemplate="%{customdata}<extra></extra>",
        xgap=1,
        ygap=1,
    )
    frame = {"type": "rect", "line": {"color": OPTIMUM, "width": 2.5}}
    shapes = [
        {**frame, "x0": column - 0.48, "x1": column + 0.48, "y0": row - 0.46, "y1": row + 0.46}
        for row, column in enumerate(heatmap.best_columns)
    ]
    layout = {
        "shapes": shapes,
        **_layout(),
        "xaxis": _axis("guide") | _category_axis(guides) | {"range": [-0.5, len(guides) - 0.5]},
        "yaxis": _axis("network") | _category_axis(networks) | {"range": [len(networks) - 0.5, -0.5]},
        "height": 150 + 36 * len(networks),
        "margin": {"l": 62, "r": 12, "t": 10, "b": 56},
    }
    return {"data": [trace], "layout": layout}


def plotly_cost_parts(parts: CostParts) -> PlotlyFigure:
    """Draw one stacked bar per point, as `draw_cost_parts` does."""
    labels = [html.escape(label) for label in parts.labels]
    bars = list(range(len(labels)))
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": html.escape(label),
            "x": _numbers(share),
            "y": bars,
            "marker": {"color": parts.colors[label]},
            "text": [f"{value:.0f}" if value >= MIN_LABELLED_SHARE else "" for value in share],
            "textposition": "inside",
            "insidetextanchor": "middle",
            "textangle": 0,
            "textfont": {"color": "white", "size": 12},
            "customdata": [html.escape(parts.note(label, bar)).replace("\n", "<br>") for bar in bars],
            "hovertemplate": "%{customdata}<extra></extra>",
        }
        for label, share in parts.shares.items()
    ]
    total: dict[str, Any] = {"x": 100, "xanchor": "left", "xshift": 6, "showarrow": False, "font": {"size": 12, "color": INK}}
    totals = [f"{format_number(float(value))} GFLOP" for value in parts.totals]
    layout = {
        **_layout(),
        "barmode": "stack",
        "bargap": 0.25,
        "annotations": [{**total, "y": bar, "text": text} for bar, text in zip(bars, totals, strict=True)],
        "xaxis": _axis("share of the GFLOP of an image (%)") | {"range": [0, 100]},
        "yaxis": _axis("")
        | _ticks([float(bar) for bar in bars], labels)
        | {"range": [len(bars) - 0.4, -0.6], "showgrid": False},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        "height": 120 + 28 * len(bars),
        "margin": {"l": 62, "r": 96, "t": 40, "b": 50},
    }
    return {"data": traces, "layout": layout}


def _scatter(**options: Any) -> dict[str, Any]:
    return {"type": "scatter", **options}


def _heatmap(**options: Any) -> dict[str, Any]:
    return {"type": "heatmap", **options}


def _numbers(values: Iterable[float]) -> list[float | None]:
    """Floats for JSON; None for NaN."""
    return [None if np.isnan(value) else float(value) for value in values]


@lru_cache(maxsize=1)
def _template() -> dict[str, Any]:
    """plotly's template without colours of its own."""
    template: dict[str, Any] = plotly.io.templates["none"].to_plotly_json()
    return template


def _trace(series: Series) -> dict[str, Any]:
    notes = [html.escape(note).replace("\n", "<br>") for note in series.notes]
    name = html.escape(series.label)
    trace = {"x": _numbers(series.x), "y": _numbers(series.y), "text": notes, "name": name, "legendgroup": series.label}
    if not series.point_labels:
        return trace | {"mode": "lines+markers", "hovertemplate": "%{text}<extra></extra>"}
    labels = [html.escape(label) for label in series.point_labels]
    texts = {"text": labels, "textposition": "top right", "hovertext": notes, "hovertemplate": "%{hovertext}<extra></extra>"}
    return trace | texts | {"mode": "lines+markers+text", "cliponaxis": False}


def _layout() -> dict[str, Any]:
    font = {"family": FONT, "size": 13, "color": INK}
    hover = {"bgcolor": "white", "bordercolor": HAIRLINE, "font": font}
    return {"template": _template(), "font": font, "paper_bgcolor": "white", "plot_bgcolor": "white", "hoverlabel": hover}


def _axis(title: str) -> dict[str, Any]:
    return {
        "title": {"text": html.escape(title), "font": {"size": 13, "color": INK}},
        "tickfont": {"size": 12, "color": MUTED},
        "gridcolor": HAIRLINE,
        "zeroline": False,
        "fixedrange": True,
        "automargin": True,
        "ticks": "",
    }


def _log_axis(ticks: list[float], labels: list[str]) -> dict[str, Any]:
    return {"type": "log", "tickmode": "array"} | _ticks(ticks, labels)


def _ticks(ticks: list[float], labels: list[str]) -> dict[str, Any]:
    return {"tickvals": ticks, "ticktext": labels}


def _category_axis(labels: list[str]) -> dict[str, Any]:
    indices = tick_indices(len(labels))
    return {"tickmode": "array", "tickvals": indices, "ticktext": [labels[index] for index in indices], "showgrid": False}


def _with_alpha(color: str, alpha: float) -> str:
    red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"
