"""What the page is made of beside its charts: marks of solvers, races and the paper, stops of the slider, rows, images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from isocost.analysis.costs import COSTS
from isocost.analysis.pareto import best_at_budgets, pareto
from isocost.analysis.recommend import recommend
from isocost.analysis.results_table import final_points
from isocost.errors import ConfigError
from isocost.models.paper_table import TABLE_1
from isocost.report import figures, plot_data
from isocost.report import matplotlib_backend as drawing
from isocost.report import plot_style as scales
from isocost.report import plotly_backend as charts
from isocost.report.budget_slider import NOT_RECORDED, explorer, stops
from isocost.report.chart_panels import CHARTS, Chart, raced_by
from isocost.report.html import write_report
from isocost.report.image_embedding import ENCODINGS, album
from isocost.report.results_table import point_columns
from synthetic_results import BEST_GUIDANCE, PARAMETERS, planted_table

KERNEL = "mmd_efficientnet"


def raced_table() -> pd.DataFrame:
    """The best guidance of every cell alone, with the interval that a race is said to have found around it."""
    table = planted_table(snapshots=())
    table = table[table["guidance"] == BEST_GUIDANCE].reset_index(drop=True)
    falling = BEST_GUIDANCE * (1 + 1 / table["num_steps"])
    ends = {"guidance_low": falling / 1.2, "guidance_high": falling * 1.3}
    return table.assign(guidance=falling, **ends, race_images=1200, race_at_boundary=False)


def with_fid(table: pd.DataFrame) -> pd.DataFrame:
    """The planted distance as FID too."""
    return table.assign(**{f"fid{end}": 300 * table[f"{KERNEL}{end}"] for end in ("", "_low", "_high")})


# --- the data behind the marks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["num_steps", "nfe"])
def test_solvers_stand_in_the_planted_order(axis: str) -> None:
    curves = plot_data.solver_curves(planted_table(), KERNEL, "3.2M", axis)
    first, second = curves.series
    assert (first.label, second.label) == ("ddim/trailing", "dpmsolver++2m/trailing")
    assert first.x.tolist() == second.x.tolist() == [steps * (2 if axis == "nfe" else 1) for steps in (2, 4, 8, 16, 32)]
    assert (second.y < first.y).all(), "second order is planted better"
    assert len({(one.color, one.mark, one.dash) for one in curves.series}) == 2
    assert first.dash != second.dash
    assert first.mark != second.mark


def test_solvers_are_compared_at_the_best_size_of_all_where_none_is_named() -> None:
    table = planted_table()
    for series in plot_data.solver_curves(table, KERNEL).series:
        best = final_points(table[table["solver"] == series.label], KERNEL).groupby("num_steps")[KERNEL].min()
        np.testing.assert_array_equal(series.y, best)
    with pytest.raises(ConfigError, match="nothing to compare"):
        plot_data.solver_curves(planted_table(solvers=("euler",)), KERNEL)
    with pytest.raises(ConfigError, match="no point of size '1B'"):
        plot_data.solver_curves(table, KERNEL, "1B")


def test_the_best_guidance_is_the_planted_one_and_has_no_interval_on_a_grid() -> None:
    curves = plot_data.guidance_curves(planted_table(), KERNEL, "ddim/trailing")
    assert [series.label for series in curves.series] == list(PARAMETERS)
    for series in curves.series:
        assert (series.y == BEST_GUIDANCE).all()
        assert np.isnan(series.low).all()
    assert "the best of those tried" in curves.setting


def test_a_race_s_interval_is_drawn_around_the_best_guidance() -> None:
    table = raced_table()
    curves = plot_data.guidance_curves(table, KERNEL, "ddim/trailing")
    for series in curves.series:
        assert (np.diff(series.y) < 0).all(), "planted: the best guidance falls with steps"
        np.testing.assert_allclose(series.low, series.y / 1.2)
        np.testing.assert_allclose(series.high, series.y * 1.3)
        assert all("race of 1,200 images" in note for note in series.notes)
    (trace, *_) = charts.plotly_curves(curves).data
    np.testing.assert_allclose(trace.error_y.arrayminus, curves.series[0].y - curves.series[0].low)
    assert "raced for" in curves.setting
    assert figures.plot_guidance_heatmap(table, KERNEL).axes


def test_heat_panels_hold_the_interval_of_a_race() -> None:
    table = raced_table()
    panel = plot_data.guidance_panels(table, KERNEL)[0]
    assert panel.guidance[0] < min(table["guidance"]) / 1.19
    assert panel.guidance[-1] > max(table["guidance"]) * 1.29
    for row, interval in enumerate(panel.found):
        assert interval is not None
        low, high = (panel.across(end) for end in interval)
        assert low < panel.best[row] < high
    bars = [trace for trace in charts.plotly_heat(panel).data if trace.type == "scatter"]
    assert [list(bar.x) for bar in bars] == [[panel.across(low), panel.across(high)] for low, high in filter(None, panel.found)]
    assert plot_data.guidance_panels(planted_table(), KERNEL)[0].found == (None,) * 5
    other = plot_data.guidance_panels(raced_by(table, KERNEL, "alignment"), "alignment")[0]
    assert set(other.found) == {None}, "the race went by another metric"
    assert figures.plot_guidance(table, KERNEL).axes


def test_the_paper_is_a_layer_of_its_own_under_its_own_cost_and_for_its_own_metrics_alone() -> None:
    table = with_fid(planted_table())
    curves = plot_data.cost_curves(table, "fid", "normalized_cost")
    layer = curves.published
    assert layer is not None
    assert layer.label == "published, not ours (arXiv 2404.01367)"
    np.testing.assert_allclose(layer.x, [50 * row.normalized_cost_per_step for row in TABLE_1])
    assert layer.y.tolist() == [row.fid for row in TABLE_1]
    assert layer not in plot_data.all_series(curves)
    for metric, cost in ((KERNEL, "normalized_cost"), ("fid", "gflop"), ("fid", "ms_per_image")):
        assert plot_data.cost_curves(table, metric, cost).published is None
    (trace,) = (one for one in charts.plotly_curves(curves).data if one.meta == charts.PUBLISHED)
    assert trace.visible is False, "hidden until it is asked for"
    far = plot_data.cost_curves(table.assign(normalized_cost=table["normalized_cost"] / 1e4), "fid", "normalized_cost")
    assert plot_data.x_ticks(far)[0][-1] < 1
    assert plot_data.x_ticks(far, with_published=True)[0][-1] == 100
    legend = drawing.draw_curves(curves).axes[0].get_legend()
    assert legend is not None
    assert not any("published" in text.get_text() for text in legend.get_texts())
    assert isinstance(chart := CHARTS["cost"](table, "fid", {}, lambda _: {}), Chart)
    assert chart.has_published


def test_colours_of_kinds_stand_out_from_white() -> None:
    for color in scales.FAMILIES:
        channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        assert 1.05 / (float(np.dot(linear, (0.2126, 0.7152, 0.0722))) + 0.05) >= 3, color
    assert len(set(scales.FAMILIES)) == len(scales.FAMILIES)


def test_every_mark_names_its_point() -> None:
    table = planted_table()
    for curves in (
        plot_data.cost_curves(table, KERNEL, "nfe"),
        plot_data.compute_curves(table, KERNEL),
        plot_data.solver_curves(table, KERNEL),
        plot_data.guidance_curves(table, KERNEL, "ddim/trailing"),
    ):
        by_point = table.set_index("point")[KERNEL]
        for series in plot_data.all_series(curves):
            points = [note.rpartition("point ")[2] for note in series.notes]
            assert set(points) <= set(by_point.index)
            if curves.y_label != "best guidance":
                np.testing.assert_array_equal(by_point[points], series.y)


# --- the slider -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", list(COSTS))
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_the_slider_stops_wherever_the_answer_changes_and_nowhere_else(cost: str, noise: float) -> None:
    table = planted_table(noise=noise, half_width=0.01)
    found = stops(table, KERNEL, cost)
    every = sorted(final_points(table, KERNEL, cost)[cost].unique())
    wanted, last = [], None
    for choice in best_at_budgets(table, cost, KERNEL, every):
        now = (choice.best, choice.runner_up)
        if now != last:
            wanted.append((choice.budget, *now))
        last = now
    assert [(choice.budget, choice.best, choice.runner_up) for choice in found] == wanted
    assert set(pareto(table, cost, KERNEL)["point"]) == {choice.best.point for choice in found if choice.best}


def test_costs_that_differ_in_their_last_digits_are_one_stop() -> None:
    table = planted_table(snapshots=())
    nearly = table.assign(nfe=table["nfe"] * (1 + 1e-12 * np.arange(len(table))))
    assert len(stops(nearly, KERNEL, "nfe")) == len(stops(table, KERNEL, "nfe"))


def test_the_slider_says_what_recommend_says() -> None:
    table = planted_table(noise=0.004)
    told = explorer(table, KERNEL, {"0000000000000003"})
    assert [axis["cost"] for axis in told["axes"]] == list(COSTS)
    for axis in told["axes"]:
        for stop in axis["stops"]:
            said = recommend(table, axis["cost"], float(stop["shown"]), KERNEL)
            one = told["configurations"][stop["best"]]
            assert (one["words"], one["command"]) == (str(said.configuration), said.command)
            assert stop["decided"] == said.decided
            assert stop["runner_up"] == (said.runner_up.point if said.runner_up else None)
    assert [point for point, one in told["configurations"].items() if one["has_images"]] in ([], ["0000000000000003"])
    json.dumps(told, allow_nan=False)


def test_a_configuration_tells_where_its_numbers_come_from() -> None:
    made = json.dumps({"commit": "abc", "device": "two cores"})
    table = raced_table().assign(provenance=made, task="text2image")
    one = next(iter(explorer(table, KERNEL, set())["configurations"].values()))
    assert set(one["origin"]) == {"point", "checkpoint", "protocol", "commit", "hardware"}
    assert (one["origin"]["commit"], one["origin"]["hardware"]) == ("abc", "two cores")
    assert one["origin"]["protocol"] == "planted, 1,000 images, seed 0"
    assert "from a race of 1,200 images" in one["facts"]["best guidance"]
    plain = next(iter(explorer(planted_table(), KERNEL, set())["configurations"].values()))
    assert plain["origin"]["commit"] == NOT_RECORDED


# --- rows and images ------------------------------------------------------------------------------------------------


def test_columns_hold_the_table_however_they_are_kept() -> None:
    table = raced_table()
    table.loc[3, "ms_per_image"] = np.nan
    told = json.loads(json.dumps(point_columns(table, KERNEL), allow_nan=False))
    rows = table.sort_values(KERNEL).reset_index(drop=True)
    for column in told["columns"]:
        values = column["texts" if column["export"] == "texts" and "texts" in column else "keys"]
        values = [values[code] for code in column["codes"]] if "codes" in column else values
        assert len(values) == told["rows"] == len(table)
        if column["name"] in rows.columns and column["numeric"]:
            np.testing.assert_allclose(np.array(values, float), rows[column["name"]].to_numpy(float), rtol=1e-8)
            for side in ("low", "high"):
                if side in column:
                    np.testing.assert_allclose(column[side], rows[f"{column['name']}_{side}"], rtol=1e-8)
        elif column["name"] in rows.columns and column["name"] != "is_final":
            assert values == rows[column["name"]].astype(str).tolist()
    kept = {column["name"]: "codes" in column for column in told["columns"]}
    assert kept["size"]
    assert not kept[KERNEL]
    assert {"point", "protocol", "commit", "device", "guidance_low", "guidance_high", "race_images"} <= set(kept)


def test_images_are_kept_whole_where_they_are_small_and_shrunk_where_they_are_not(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    small = album({"a": noise, "b": noise})
    assert small.encoding == ENCODINGS[0]
    assert small.shown_side == 64
    assert all(address.startswith("data:image/webp;base64,") for some in small.addresses.values() for address in some)
    large = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    room = 20_000
    shrunk = album({"a": large, "b": large}, room)
    assert shrunk.encoding.quality is not None
    assert sum(len(address) for some in shrunk.addresses.values() for address in some) <= room
    assert "WebP of quality" in shrunk.encoding.words
    assert album({}).addresses == {}


@pytest.mark.slow
def test_a_page_of_large_images_stays_small(tmp_path: Path) -> None:
    table = planted_table(snapshots=())
    loud = np.random.default_rng(0).integers(0, 256, (6, 128, 128, 3), dtype=np.uint8)
    page = write_report(tmp_path, "loud", table, KERNEL, {}, {}, dict.fromkeys(table["point"], loud), ["a caption"] * 6)
    assert page.stat().st_size < 15e6
