"""The data of the figures, both plotting back ends, and the HTML page as a parser reads it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from PIL import Image

from isocost.analysis.claims import TaskResults, evaluate_claims
from isocost.analysis.costs import COSTS, REPORT_COSTS
from isocost.analysis.paper_claims import CLAIMS
from isocost.errors import ConfigError
from isocost.report import figures, image_grids, matplotlib_backend, plot_data, plot_style, plotly_backend
from isocost.report.html import metrics_in, write_report
from synthetic_results import BEST_GUIDANCE, synthetic_table

METRIC = "mmd_efficientnet"
PROMPTS = ["a red circle", "</script><script>alert('prompt')</script>", '"><img src=x onerror=alert(1)> costs $5 or $6']


def plain_images(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return three images [3, 8, 8, 3] for every final point; the colour encodes the point and the prompt."""
    points = table.loc[table["is_final"], "point"]
    return {
        point: np.stack([np.full((8, 8, 3), (number % 256, number // 256, prompt), np.uint8) for prompt in range(3)])
        for number, point in enumerate(points)
    }


# --- the data of the figures ------------------------------------------------------------------------------------------


def test_cost_curves_show_the_known_crossing_and_order() -> None:
    curves = plot_data.cost_curves(synthetic_table(), METRIC, "normalized_cost")
    assert [series.label for series in curves.series] == ["0.2M", "0.8M", "3.2M", "7.1M", "12.6M"]
    small, large = curves.series[0], curves.series[-1]
    assert np.interp(small.x[-1], small.x, small.y) < np.interp(small.x[-1], large.x, large.y), (
        "the small size is best at its highest cost"
    )
    assert large.y[-1] < small.y.min(), "the large size is best at the highest cost"
    for series in curves.series:
        assert (np.diff(series.x) > 0).all()
        assert (np.diff(series.y) < 0).all()
        assert (series.low < series.y).all()
        assert (series.y < series.high).all()
        assert all(f"guidance {BEST_GUIDANCE:g}" in note and "dpmsolver++2m" in note for note in series.notes)


def test_no_point_is_better_than_the_frontier() -> None:
    table = synthetic_table(noise=0.01)
    frontier = plot_data.cost_curves(table, METRIC, "gflop").frontier
    assert frontier is not None
    finished = table[table["is_final"]]
    for cost, value in zip(finished["gflop"], finished[METRIC], strict=True):
        assert frontier.y[frontier.x <= cost].min() <= value


def test_every_point_of_the_frontier_has_the_marker_of_its_size() -> None:
    table = synthetic_table(guidance=(1.0, 2.0))
    is_single_pass = table["guidance"] == 1.0  # half the evaluations of the better points, so both are on the frontier
    curves = plot_data.cost_curves(table, METRIC, "nfe")
    frontier = curves.frontier
    assert frontier is not None
    drawn_series = (*curves.series, *curves.off_line_points)
    markers = {(x, y) for series in drawn_series for x, y in zip(series.x, series.y, strict=True)}
    assert set(zip(frontier.x, frontier.y, strict=True)) <= markers
    off_line = {(x, y) for series in curves.off_line_points for x, y in zip(series.x, series.y, strict=True)}
    assert off_line
    assert off_line <= set(zip(table[is_single_pass]["nfe"], table[is_single_pass][METRIC], strict=True))
    assert curves.setting.endswith("; points off the lines: other guidance or solver")
    lines = matplotlib_backend.draw_curves(curves).axes[0].lines
    assert {(x, y) for line in lines for x, y in line.get_xydata()} >= off_line  # type: ignore[attr-defined]
    traces = [trace for trace in go.Figure(plotly_backend.plotly_curves(curves)).data if trace.mode == "markers"]
    assert {(x, y) for trace in traces for x, y in zip(trace.x, trace.y, strict=True)} == off_line
    assert not plot_data.cost_curves(table[~is_single_pass], METRIC, "nfe").off_line_points


def test_cost_curves_of_one_solver() -> None:
    table = synthetic_table()
    both, ddim = (plot_data.cost_curves(table, METRIC, "nfe", solver=solver) for solver in (None, "ddim/trailing"))
    assert all("ddim/trailing" in note for series in ddim.series for note in series.notes)
    assert (ddim.series[0].y > both.series[0].y).all(), "the first-order solver is worse by construction"
    with pytest.raises(ConfigError, match="no point of solver 'euler'"):
        plot_data.cost_curves(table, METRIC, "nfe", solver="euler")


def test_compute_curves_take_one_setting_and_end_at_the_final_point() -> None:
    table = synthetic_table()
    curves = plot_data.compute_curves(table, METRIC, floor=0.01)
    assert curves.setting == "ddim/trailing, 16 steps, guidance 2"
    for series in curves.series:
        rows = table[table["size"] == series.label]
        assert series.x.tolist() == sorted(rows["training_gflop"].unique())
        assert (np.diff(series.y) < 0).all()
    with pytest.raises(ConfigError, match=r"train\.snapshots"):
        plot_data.compute_curves(table[table["is_final"]], METRIC)


@pytest.mark.parametrize(("metric", "pick"), [(METRIC, np.nanargmin), ("alignment", np.nanargmax)])
def test_heat_panels_show_the_known_optimum(metric: str, pick: object) -> None:
    table = synthetic_table(noise=0.01)
    table["alignment"] = 1 - table[METRIC]
    panels = plot_data.guidance_panels(table, metric)
    assert [(panel.solver, panel.size) for panel in panels][:6][-1] == ("dpmsolver++2m/trailing", "0.2M")
    for panel in panels:
        assert [int(pick(row)) for row in panel.values] == list(panel.best_columns)  # type: ignore[operator]
        assert np.ravel_multi_index(panel.optimum, panel.values.shape) == pick(panel.values)  # type: ignore[operator]
    noiseless = plot_data.guidance_panels(synthetic_table(), METRIC)
    assert all(panel.guidance[column] == BEST_GUIDANCE for panel in noiseless for column in panel.best_columns)


def test_heat_panels_of_an_incomplete_grid() -> None:
    table = synthetic_table()
    is_missing = table["is_final"] & (table["num_steps"] == 8) & (table["guidance"] == 3.0)
    panel = plot_data.guidance_panels(table[~is_missing], METRIC)[0]
    assert np.argwhere(np.isnan(panel.values)).tolist() == [[2, 3]]
    assert figures.plot_guidance_heatmap(table[~is_missing], METRIC).axes
    assert go.Figure(plotly_backend.plotly_heatmap(panel)).data[0].text[2][3] == ""


def test_image_grids_show_the_best_point_of_each_cell() -> None:
    table = synthetic_table()
    images = plain_images(table)
    grid = image_grids.image_grid(table, METRIC, images, PROMPTS)
    finished = table[table["is_final"]]
    best = finished.loc[finished.groupby(["size", "num_steps"])[METRIC].idxmin()].set_index(["size", "num_steps"])["point"]
    assert (grid.rows[0], grid.rows[-1], grid.columns) == ("0.2M", "12.6M", ("2", "4", "8", "16", "32"))
    for size, cells in zip(grid.rows, grid.cells, strict=True):
        for steps, cell in zip(grid.columns, cells, strict=True):
            assert cell is not None
            assert cell.point == best[size, int(steps)]
            assert (cell.images == images[cell.point]).all()


def test_image_grids_by_budget_have_no_cell_where_nothing_fits() -> None:
    table = synthetic_table()
    grid = image_grids.image_grid(table, METRIC, plain_images(table), PROMPTS, "normalized_cost", [0.1, 6])
    assert grid.columns == ("0.1", "6")
    assert [cells[0] is not None for cells in grid.cells] == [True, False, False, False, False]
    assert grid.cells[0][1] is not None
    assert "32 steps" in grid.cells[0][1].label


def test_images_are_at_their_cells_in_the_figure() -> None:
    table = synthetic_table()
    grid = image_grids.image_grid(table, METRIC, plain_images(table), PROMPTS)
    axes = figures.plot_steps_grid(table, METRIC, plain_images(table), PROMPTS).axes[1]
    mosaic = np.asarray(axes.images[0].get_array())
    for row, top in enumerate(axes.get_yticks()):
        for column, left in enumerate(axes.get_xticks()):
            cell = grid.cells[row][column]
            assert cell is not None
            assert (mosaic[int(top), int(left)] == cell.images[1, 0, 0]).all()


def test_images_must_match_the_prompts() -> None:
    table = synthetic_table()
    with pytest.raises(ConfigError, match="2 prompts"):
        image_grids.image_grid(table, METRIC, plain_images(table), PROMPTS[:2])
    with pytest.raises(ConfigError, match="no final point has saved images"):
        image_grids.image_grid(table, METRIC, {}, PROMPTS)


@pytest.mark.parametrize(("low", "high", "labels"), [
    (1, 16, ["1", "2", "4", "8", "16"]),
    (0.01, 0.1, ["0.01", "0.02", "0.05", "0.1"]),
    (1e4, 1e7, ["10⁴", "10⁵", "10⁶", "10⁷"]),
])  # fmt: skip
def test_ticks_of_logarithmic_axes(low: float, high: float, labels: list[str]) -> None:
    ticks, tick_labels = plot_style.log_ticks(low, high)
    assert tick_labels == labels
    assert (ticks[0], ticks[-1]) == pytest.approx((low, high))


# --- both plotting back ends ------------------------------------------------------------------------------------------


def test_both_back_ends_draw_the_same_data() -> None:
    curves = plot_data.cost_curves(synthetic_table(), METRIC, "normalized_cost", floor=0.013)
    (axes,) = matplotlib_backend.draw_curves(curves).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    traces = {trace.name: trace for trace in go.Figure(plotly_backend.plotly_curves(curves)).data}
    for series in curves.series:
        np.testing.assert_array_equal(lines[series.label].get_xydata(), np.column_stack([series.x, series.y]))
        assert list(traces[series.label].x) == series.x.tolist()
        assert list(traces[series.label].y) == series.y.tolist()
        assert lines[series.label].get_color() == traces[series.label].line.color == series.color
    assert lines["decoded real images"].get_ydata()[0] == 0.013
    assert set(traces["decoded real images"].y) == {0.013}
    assert axes.get_xscale() == "log"
    assert len({series.color for series in curves.series}) == len({series.marker for series in curves.series}) == 5


def test_colours_of_sizes_go_from_dark_to_light() -> None:
    brightness = [np.dot([int(c[i : i + 2], 16) for i in (1, 3, 5)], (0.299, 0.587, 0.114)) for c in plot_style.size_colors(11)]
    assert (np.diff(brightness) > 5).all()


def test_wide_ranges_get_a_logarithmic_axis_unless_a_value_is_not_positive() -> None:
    table = synthetic_table()
    values = table[METRIC].to_numpy(copy=True)
    wide = table.assign(**{METRIC: values**3, f"{METRIC}_low": values**3 * 0.9, f"{METRIC}_high": values**3 * 1.1})
    assert plot_data.cost_curves(wide, METRIC, "nfe").log_y
    assert not plot_data.cost_curves(wide, METRIC, "nfe", floor=-1e-5).log_y
    assert not plot_data.cost_curves(wide.assign(**{f"{METRIC}_low": -1e-6}), METRIC, "nfe").log_y
    assert matplotlib_backend.draw_curves(plot_data.cost_curves(wide, METRIC, "nfe")).axes[0].get_yscale() == "log"


# --- the page ---------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Collects elements, their attributes, and the text of scripts by id."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.text = ""
        self._script: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self._script = dict(attrs).get("id") or f"script-{len(self.scripts)}"

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is None:
            self.text += data
        else:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def write_synthetic(folder: Path, figure_formats: Sequence[str]) -> Path:
    table = synthetic_table(noise=0.004)
    table.loc[table["size"] == "3.2M", "size"] = "3.2M <b>&"
    provenance = {"commit": "abc", "hours": {"training": 0.5}, "study_yaml": "name: </pre><script>alert('yaml')</script>\n"}
    floors = {METRIC: 0.013, "alignment": 0.95}
    images = plain_images(table)
    return write_report(folder, "synthetic", table, METRIC, provenance, floors, images, PROMPTS, figure_formats=figure_formats)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("page") / "report", figure_formats=())


def test_the_answer_comes_first_and_the_parts_in_order(written: Path) -> None:
    page = read(written)
    sections = [attributes["id"] for tag, attributes in page.elements if tag == "section"]
    assert sections == ["answer", "budget-slider", "cost", "compute", "solvers", "guidance", "images", "points", "provenance"]
    assert "The best size moves from 0.2M at 0.32 to 12.6M at 81 units of normalized cost" in page.text
    for text in (
        "For 0.32 units of normalized cost",
        "0.2M, 8 steps, guidance 2, dpmsolver++2m/trailing",
        "runner-up 0.8M, 2 steps",
    ):
        assert text in page.text
    assert "Not in this report" not in page.text


@pytest.mark.slow
def test_the_papers_claims_come_after_the_answer(tmp_path: Path) -> None:
    table = synthetic_table(sizes=("0.2M", "0.8M", "3.2M"))
    table.loc[table["size"] == "3.2M", "size"] = "3.2M <b>&"
    verdicts = evaluate_claims(CLAIMS, {"text2image": TaskResults(table, METRIC)})
    page = read(write_report(tmp_path, "synthetic", table, METRIC, {}, {}, {}, [], verdicts=verdicts, figure_formats=()))
    sections = [attributes["id"] for tag, attributes in page.elements if tag == "section"]
    assert sections[:3] == ["answer", "budget-slider", "claims"]
    for text in (
        "Of two sizes trained on the same images the larger is better",
        "2 of 2 agree, 0 contradict, 0 open",
        "3.2M <b>&",
    ):
        assert text in page.text
    assert page.text.count("no results of dreambooth") == 1


def test_names_and_prompts_stay_text(written: Path) -> None:
    page = read(written)
    assert len(page.scripts) == 5, "three with data, plotly.js, and page.js"
    assert not any("onerror" in attributes for _, attributes in page.elements)
    for text in (*PROMPTS, "3.2M <b>&", "</pre><script>alert('yaml')</script>"):
        assert text in page.text
    (size,) = (column for column in json.loads(page.scripts["point-data"])["columns"] if column["name"] == "size")
    assert "3.2M <b>&" in size["texts"]
    assert json.loads(page.scripts["report-data"])["prompts"] == PROMPTS
    traces = json.loads(page.scripts["chart-data"])["cost"]["figures"]["0|0|0"][0]["data"]
    assert "3.2M &lt;b&gt;&amp;" in {trace["name"] for trace in traces}, "plotly reads names as markup"


def test_the_page_makes_no_network_request(written: Path) -> None:
    page = read(written)
    policy = next(
        a["content"] for tag, a in page.elements if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    for tag, attributes in page.elements:
        assert (attributes.get("src") or "data:").startswith("data:"), tag
        link = attributes.get("href") or "#"
        assert link.startswith("#") or (written.parent / link).is_file(), link
    assert written.stat().st_size < 15e6


def test_every_choice_has_its_figure(written: Path) -> None:
    charts = json.loads(read(written).scripts["chart-data"])
    assert len(charts["cost"]["figures"]) == len(REPORT_COSTS) * 3 * 3
    assert len(charts["compute"]["figures"]) == 3
    assert len(charts["solvers"]["figures"]) == (1 + 5) * 2 * 3
    assert len(charts["guidance"]["figures"]) == len(charts["best_guidance"]["figures"]) == 2 * 3
    axes = [
        charts["cost"]["figures"][f"{index}|0|0"][0]["layout"]["xaxis"]["title"]["text"] for index in range(len(REPORT_COSTS))
    ]
    assert axes == [COSTS[name].axis for name in REPORT_COSTS]


def test_the_table_holds_every_point_best_first(written: Path) -> None:
    points = json.loads(read(written).scripts["point-data"])
    index = [column["title"] for column in points["columns"]].index("squared MMD")
    values = points["columns"][index]["keys"]
    assert points["rows"] == len(values) == len(synthetic_table())
    assert values == sorted(values)
    assert points["sorted_by"] == [index, "ascending"]


@pytest.mark.slow
def test_figures_are_saved_next_to_the_page(tmp_path: Path) -> None:
    folder = write_synthetic(tmp_path, figure_formats=matplotlib_backend.FORMATS).parent / "figures"
    names = {
        *(f"quality_vs_cost-{cost}" for cost in REPORT_COSTS),
        "quality_vs_compute-training_gflop",
        "cost_parts",
        "metric_front",
        "solvers",
        "guidance_heatmap",
        "best_guidance",
        "steps_grid",
        "budget_grid",
    }
    assert {file.name for file in folder.iterdir()} == {f"{name}.{ending}" for name in names for ending in ("png", "pdf")}
    for file in folder.glob("*.png"):
        with Image.open(file) as image:
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(2**24)) > 20, f"{file.name} is blank"
    for file in folder.glob("*.pdf"):
        data = file.read_bytes()
        assert data.startswith(b"%PDF-1.4")
        assert b"/FontFile2" in data, f"{file.name}: fonts are embedded as TrueType"
        assert b"/Type3" not in data, f"{file.name}: journals refuse Type 3 fonts"
        assert b"/CreationDate" not in data


@pytest.mark.slow
def test_missing_parts_are_named_and_the_others_are_shown(tmp_path: Path) -> None:
    table = synthetic_table(solvers=("ddim/trailing",), snapshots=()).assign(
        ms_per_image=np.nan, latency_ms=np.nan, alignment=np.nan
    )
    stale = [tmp_path / "figures" / f"quality_vs_cost-ms_per_image.{ending}" for ending in ("png", "pdf")]
    stale[0].parent.mkdir()
    for file in stale:
        file.write_bytes(b"from an earlier report")
    page = read(write_report(tmp_path, "bare", table, METRIC, {}, {}, {}, []))
    for text in (
        "no checkpoint before the last was scored",
        "no final point has saved images",
        "every point has solver ddim/trailing",
        "Not measured: milliseconds",
        "There is no dashed line",
        "no provenance was recorded",
        "YAML was not recorded",
    ):
        assert text in page.text
    assert metrics_in(table) == [METRIC, "frechet_efficientnet"]
    assert set(json.loads(page.scripts["chart-data"])) == {"cost", "cost_parts", "guidance", "best_guidance"}
    assert [axis["cost"] for axis in json.loads(page.scripts["report-data"])["slider"]["axes"]] == [
        "normalized_cost",
        "nfe",
        "gflop",
        "joules_per_image",
        "usd_per_1000",
    ]
    assert not any(file.exists() for file in stale)
    assert "For " in page.text


def test_an_unfinished_study_has_a_page(tmp_path: Path) -> None:
    table = synthetic_table()
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "quality_vs_cost-nfe.png").write_bytes(b"from an earlier report")
    unfinished = table[~table["is_final"]]
    page = read(write_report(tmp_path, "unfinished", unfinished, METRIC, {}, {}, {}, [], figure_formats=()))
    assert not (tmp_path / "figures").exists(), "on request, without figures"
    assert "figures/" not in page.text
    assert "No answer yet" in page.text
    assert json.loads(page.scripts["report-data"])["slider"] is None
    assert set(json.loads(page.scripts["chart-data"])) == {"compute"}


def test_points_that_cannot_be_compared_give_no_report(tmp_path: Path) -> None:
    table = synthetic_table()
    table.loc[0, "protocol"] = "newer"
    with pytest.raises(ConfigError, match="differ in protocol"):
        write_report(tmp_path / "report", "mixed", table, METRIC, {}, {}, {}, [])
    assert not (tmp_path / "report").exists()


def test_horizontal_lines_are_the_floor_and_the_reference_lines() -> None:
    curves = plot_data.cost_curves(synthetic_table(), METRIC, "nfe", floor=0.013)
    assert curves.horizontal_lines == [("decoded real images", 0.013, "dash")]
    with_more = dataclasses.replace(curves, floor_label="photographs", reference_lines=(("bicubic", 9.0),))
    assert [label for label, *_ in with_more.horizontal_lines] == ["photographs", "bicubic"]
    assert plot_data.y_range(with_more)[1] == 9.0
    traces = {trace.name: list(trace.y) for trace in go.Figure(plotly_backend.plotly_curves(with_more)).data}
    assert traces["bicubic"] == [9.0, 9.0]
    figure = matplotlib_backend.draw_curves(with_more)
    legend = figure.axes[0].get_legend() or figure.legends[0]
    assert {"photographs", "bicubic"} <= {text.get_text() for text in legend.get_texts()}
