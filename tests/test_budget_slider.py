"""Parts of the page: curves of solvers, races and the paper, the budget slider, the table of points, embedded images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from isocost.analysis.costs import REPORT_COSTS
from isocost.analysis.formatting import format_metric
from isocost.analysis.pareto import best_at_budgets, pareto
from isocost.analysis.recommend import recommend
from isocost.analysis.results_table import final_points
from isocost.errors import ConfigError
from isocost.models.paper_table import TABLE_1
from isocost.report import figures, matplotlib_backend, plot_data, plot_style, plotly_backend
from isocost.report.budget_slider import NOT_RECORDED, budget_slider, slider_values
from isocost.report.chart_panels import CHARTS, Chart, without_unrelated_races
from isocost.report.html import write_report
from isocost.report.image_embedding import ENCODINGS, embed_images
from isocost.report.markdown import markdown_summary
from isocost.report.results_table import point_columns
from synthetic_results import BEST_GUIDANCE, PARAMETERS, synthetic_table

METRIC = "mmd_efficientnet"


def raced_table() -> pd.DataFrame:
    """Return only the best guidance of every cell, with an interval around it as if from a race."""
    table = synthetic_table(snapshots=())
    table = table[table["guidance"] == BEST_GUIDANCE].reset_index(drop=True)
    falling = BEST_GUIDANCE * (1 + 1 / table["num_steps"])
    ends = {"guidance_low": falling / 1.2, "guidance_high": falling * 1.3}
    return table.assign(guidance=falling, **ends, race_images=1200, race_at_boundary=False)


def with_fid(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with its distance also as FID."""
    return table.assign(**{f"fid{end}": 300 * table[f"{METRIC}{end}"] for end in ("", "_low", "_high")})


# --- the data of the figures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["num_steps", "nfe"])
def test_solvers_are_in_the_known_order(axis: str) -> None:
    curves = plot_data.solver_curves(synthetic_table(), METRIC, "3.2M", axis)
    first, second = curves.series
    assert (first.label, second.label) == ("ddim/trailing", "dpmsolver++2m/trailing")
    assert first.x.tolist() == second.x.tolist() == [steps * (2 if axis == "nfe" else 1) for steps in (2, 4, 8, 16, 32)]
    assert (second.y < first.y).all(), "the second-order solver is better by construction"
    assert len({(series.color, series.marker, series.dash) for series in curves.series}) == 2
    assert first.dash != second.dash
    assert first.marker != second.marker


def test_solvers_are_compared_at_the_best_size_if_none_is_given() -> None:
    table = synthetic_table()
    for series in plot_data.solver_curves(table, METRIC).series:
        best = final_points(table[table["solver"] == series.label], METRIC).groupby("num_steps")[METRIC].min()
        np.testing.assert_array_equal(series.y, best)
    with pytest.raises(ConfigError, match="nothing to compare"):
        plot_data.solver_curves(synthetic_table(solvers=("euler",)), METRIC)
    with pytest.raises(ConfigError, match="no point of size '1B'"):
        plot_data.solver_curves(table, METRIC, "1B")


def test_the_best_guidance_is_the_known_one_and_has_no_interval_on_a_grid() -> None:
    curves = plot_data.guidance_curves(synthetic_table(), METRIC, "ddim/trailing")
    assert [series.label for series in curves.series] == list(PARAMETERS)
    for series in curves.series:
        assert (series.y == BEST_GUIDANCE).all()
        assert np.isnan(series.low).all()
    assert "the best of the values tried" in curves.setting


def test_the_interval_of_a_race_is_drawn_around_the_best_guidance() -> None:
    table = raced_table()
    curves = plot_data.guidance_curves(table, METRIC, "ddim/trailing")
    for series in curves.series:
        assert (np.diff(series.y) < 0).all(), "the best guidance falls with steps by construction"
        np.testing.assert_allclose(series.low, series.y / 1.2)
        np.testing.assert_allclose(series.high, series.y * 1.3)
        assert all("race of 1,200 images" in note for note in series.notes)
    (trace, *_) = go.Figure(plotly_backend.plotly_curves(curves)).data
    np.testing.assert_allclose(trace.error_y.arrayminus, curves.series[0].y - curves.series[0].low)
    assert "chosen by races" in curves.setting
    assert figures.plot_best_guidance(table, METRIC).axes


def test_heat_panels_hold_the_interval_of_a_race() -> None:
    table = raced_table()
    panel = plot_data.guidance_panels(table, METRIC)[0]
    assert panel.guidance[0] < min(table["guidance"]) / 1.19
    assert panel.guidance[-1] > max(table["guidance"]) * 1.29
    for row, interval in enumerate(panel.race_intervals):
        assert interval is not None
        low, high = (panel.column_position(end) for end in interval)
        assert low < panel.best_columns[row] < high
    bars = [trace for trace in go.Figure(plotly_backend.plotly_heatmap(panel)).data if trace.type == "scatter"]
    intervals = filter(None, panel.race_intervals)
    assert [list(bar.x) for bar in bars] == [[panel.column_position(end) for end in interval] for interval in intervals]
    assert plot_data.guidance_panels(synthetic_table(), METRIC)[0].race_intervals == (None,) * 5
    other = plot_data.guidance_panels(without_unrelated_races(table, METRIC, "alignment"), "alignment")[0]
    assert set(other.race_intervals) == {None}, "another metric decided the race"
    assert figures.plot_guidance_heatmap(table, METRIC).axes


@pytest.mark.slow
def test_the_papers_results_are_a_layer_only_under_normalized_cost_and_for_its_metrics() -> None:
    table = with_fid(synthetic_table())
    curves = plot_data.cost_curves(table, "fid", "normalized_cost")
    layer = curves.published
    assert layer is not None
    assert layer.label == "published, not ours (arXiv 2404.01367)"
    np.testing.assert_allclose(layer.x, [50 * row.normalized_cost_per_step for row in TABLE_1])
    assert layer.y.tolist() == [row.fid for row in TABLE_1]
    assert layer not in plot_data.all_series(curves)
    for metric, cost in ((METRIC, "normalized_cost"), ("fid", "gflop"), ("fid", "ms_per_image")):
        assert plot_data.cost_curves(table, metric, cost).published is None
    (trace,) = (
        trace for trace in go.Figure(plotly_backend.plotly_curves(curves)).data if trace.meta == plotly_backend.PUBLISHED
    )
    assert trace.visible is False, "hidden by default"
    at_low_cost = plot_data.cost_curves(table.assign(normalized_cost=table["normalized_cost"] / 1e4), "fid", "normalized_cost")
    assert plot_data.x_ticks(at_low_cost)[0][-1] < 1
    assert plot_data.x_ticks(at_low_cost, with_published=True)[0][-1] == 100
    legend = matplotlib_backend.draw_curves(curves).axes[0].get_legend()
    assert legend is not None
    assert not any("published" in text.get_text() for text in legend.get_texts())
    assert isinstance(chart := CHARTS["cost"](table, "fid", {}, lambda _: {}), Chart)
    assert chart.has_published


def test_colours_of_categories_have_enough_contrast_with_white() -> None:
    for color in plot_style.CATEGORY_COLORS:
        channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        assert 1.05 / (float(np.dot(linear, (0.2126, 0.7152, 0.0722))) + 0.05) >= 3, color
    assert len(set(plot_style.CATEGORY_COLORS)) == len(plot_style.CATEGORY_COLORS)


def test_every_marker_names_its_point() -> None:
    table = synthetic_table()
    for curves in (
        plot_data.cost_curves(table, METRIC, "nfe"),
        plot_data.compute_curves(table, METRIC),
        plot_data.solver_curves(table, METRIC),
        plot_data.guidance_curves(table, METRIC, "ddim/trailing"),
    ):
        by_point = table.set_index("point")[METRIC]
        for series in plot_data.all_series(curves):
            points = [note.rpartition("point ")[2] for note in series.notes]
            assert set(points) <= set(by_point.index)
            if curves.y_label != "best guidance":
                np.testing.assert_array_equal(by_point[points], series.y)


# --- the slider -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", list(REPORT_COSTS))
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_the_slider_has_a_position_wherever_the_answer_changes_and_nowhere_else(cost: str, noise: float) -> None:
    table = synthetic_table(noise=noise, half_width=0.01)
    choices = slider_values(table, METRIC, cost)
    all_costs = sorted(final_points(table, METRIC, cost)[cost].unique())
    expected, previous = [], None
    for choice in best_at_budgets(table, cost, METRIC, all_costs):
        answer = (choice.best, choice.runner_up)
        if answer != previous:
            expected.append((choice.budget, *answer))
        previous = answer
    assert [(choice.budget, choice.best, choice.runner_up) for choice in choices] == expected
    assert set(pareto(table, cost, METRIC)["point"]) == {choice.best.point for choice in choices if choice.best}


def test_costs_that_differ_in_their_last_digits_share_a_position() -> None:
    table = synthetic_table(snapshots=())
    almost_equal = table.assign(nfe=table["nfe"] * (1 + 1e-12 * np.arange(len(table))))
    assert len(slider_values(almost_equal, METRIC, "nfe")) == len(slider_values(table, METRIC, "nfe"))


def test_the_slider_agrees_with_recommend() -> None:
    table = synthetic_table(noise=0.004)
    slider = budget_slider(table, METRIC, {"0000000000000003"})
    assert [axis["cost"] for axis in slider["axes"]] == list(REPORT_COSTS)
    for axis in slider["axes"]:
        for value in axis["values"]:
            recommended = recommend(table, axis["cost"], float(value["budget_text"]), METRIC)
            best = slider["configurations"][value["best"]]
            assert (best["label"], best["command"]) == (str(recommended.configuration), recommended.command)
            assert value["decided"] == recommended.decided
            assert value["runner_up"] == (recommended.runner_up.point if recommended.runner_up else None)
    with_images = [point for point, configuration in slider["configurations"].items() if configuration["has_images"]]
    assert with_images in ([], ["0000000000000003"])
    json.dumps(slider, allow_nan=False)


def test_milliseconds_of_a_sweep_have_a_note_at_every_position() -> None:
    table = synthetic_table()
    sweep, remeasured = ({"device": "cpu"}, {"device": "cpu", "timed_with": {"device": "cpu", "num_latency_runs": 3}})
    for record, has_note in ((sweep, True), (remeasured, False)):
        slider = budget_slider(table.assign(provenance=json.dumps(record)), METRIC, set())
        for axis in slider["axes"]:
            is_noted = ["isocost remeasure" in " ".join(value["notes"]) for value in axis["values"]]
            assert is_noted == [has_note and axis["cost"] == "ms_per_image"] * len(axis["values"]), axis["cost"]


def test_a_page_without_latencies_does_not_mention_them() -> None:
    measured = synthetic_table(snapshots=())
    for table in (measured.drop(columns="latency_ms"), measured.assign(latency_ms=np.nan)):
        shown = [axis["cost"] for axis in budget_slider(table, METRIC, set())["axes"]]
        assert shown == [cost for cost in REPORT_COSTS if cost != "latency_ms"]
        assert "latency_ms" not in [column["name"] for column in point_columns(table, METRIC)["columns"]]
        assert "latency" not in markdown_summary(table, METRIC, "study")
    assert "latency_ms" in [column["name"] for column in point_columns(measured, METRIC)["columns"]]
    assert "latency" in markdown_summary(measured, METRIC, "study")


def test_a_configuration_names_the_source_of_its_numbers() -> None:
    provenance = json.dumps({"commit": "abc", "device": "two cores"})
    table = raced_table().assign(provenance=provenance, task="text2image")
    recorded = next(iter(budget_slider(table, METRIC, set())["configurations"].values()))
    assert set(recorded["sources"]) == {"point", "checkpoint", "protocol", "commit", "hardware"}
    assert (recorded["sources"]["commit"], recorded["sources"]["hardware"]) == ("abc", "two cores")
    assert recorded["sources"]["protocol"] == "synthetic, 1,000 images, seed 0"
    assert "from a race of 1,200 images" in recorded["facts"]["best guidance"]
    unrecorded = next(iter(budget_slider(synthetic_table(), METRIC, set())["configurations"].values()))
    assert unrecorded["sources"]["commit"] == NOT_RECORDED


# --- rows and images ------------------------------------------------------------------------------------------------


def test_columns_hold_the_table_with_and_without_codes() -> None:
    table = raced_table()
    table.loc[3, "ms_per_image"] = np.nan
    points = json.loads(json.dumps(point_columns(table, METRIC), allow_nan=False))
    rows = table.sort_values(METRIC).reset_index(drop=True)
    for column in points["columns"]:
        values = column["texts" if column["export"] == "texts" and "texts" in column else "keys"]
        values = [values[code] for code in column["codes"]] if "codes" in column else values
        assert len(values) == points["rows"] == len(table)
        if column["name"] in rows.columns and column["numeric"]:
            np.testing.assert_allclose(np.array(values, float), rows[column["name"]].to_numpy(float), rtol=1e-8)
            for end in ("low", "high"):
                if end in column:
                    np.testing.assert_allclose(column[end], rows[f"{column['name']}_{end}"], rtol=1e-8)
        elif column["name"] in rows.columns and column["name"] != "is_final":
            assert values == rows[column["name"]].astype(str).tolist()
    has_codes = {column["name"]: "codes" in column for column in points["columns"]}
    assert has_codes["size"]
    assert not has_codes[METRIC]
    assert {"point", "protocol", "commit", "device", "guidance_low", "guidance_high", "race_images"} <= set(has_codes)


def test_small_images_are_embedded_losslessly_and_large_ones_shrunk(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    small = embed_images({"a": noise, "b": noise})
    assert small.encoding == ENCODINGS[0]
    assert small.display_size == 64
    assert all(url.startswith("data:image/webp;base64,") for urls in small.data_urls.values() for url in urls)
    large = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    max_bytes = 20_000
    shrunk = embed_images({"a": large, "b": large}, max_bytes)
    assert shrunk.encoding.quality is not None
    assert sum(len(url) for urls in shrunk.data_urls.values() for url in urls) <= max_bytes
    assert "WebP of quality" in shrunk.encoding.description
    assert embed_images({}).data_urls == {}


@pytest.mark.slow
def test_a_page_of_large_images_stays_small(tmp_path: Path) -> None:
    table = synthetic_table(snapshots=())
    noise = np.random.default_rng(0).integers(0, 256, (6, 128, 128, 3), dtype=np.uint8)
    page = write_report(tmp_path, "noise", table, METRIC, {}, {}, dict.fromkeys(table["point"], noise), ["a prompt"] * 6)
    assert page.stat().st_size < 15e6


def test_metrics_of_two_extractors_are_told_apart() -> None:
    """Both are called squared MMD; the one would replace the other among the facts of a point."""
    table = synthetic_table()
    ends = {f"mmd_alexnet{end}": table[f"{METRIC}{end}"] * 2 for end in ("", "_low", "_high")}
    slider = budget_slider(table.assign(**ends), METRIC, set())
    names = {"squared MMD on EfficientNet-lite0 features", "squared MMD on AlexNet features"}
    for configuration in slider["configurations"].values():
        assert names <= set(configuration["facts"])
    assert format_metric(METRIC) == format_metric(METRIC, [METRIC, "fid"]) == "squared MMD"
