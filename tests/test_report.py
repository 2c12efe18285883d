"""Figures by the data behind their marks, and the page by what a parser and a browser make of it."""

from __future__ import annotations

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from isocost.analysis.claims import TaskResults, evaluate_claims
from isocost.analysis.costs import COSTS
from isocost.analysis.paper_claims import FINDINGS
from isocost.errors import ConfigError
from isocost.report import figures, plot_data
from isocost.report import image_grids as sheets
from isocost.report import matplotlib_backend as drawing
from isocost.report import plot_style as scales
from isocost.report import plotly_backend as charts
from isocost.report.html import metrics_in, write_report
from synthetic_results import BEST_GUIDANCE, planted_table

KERNEL = "mmd_efficientnet"
CAPTIONS = ["a red circle", "</script><script>alert('caption')</script>", '"><img src=x onerror=alert(1)> costs $5 or $6']


def plain_images(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """For every final point three images [3, 8, 8, 3] whose colour tells the point and the caption."""
    points = table.loc[table["is_final"], "point"]
    return {
        point: np.stack([np.full((8, 8, 3), (number % 256, number // 256, image), np.uint8) for image in range(3)])
        for number, point in enumerate(points)
    }


# --- the data behind the marks ----------------------------------------------------------------------------------------


def test_cost_curves_show_the_planted_crossing_and_order() -> None:
    curves = plot_data.cost_curves(planted_table(), KERNEL, "normalized_cost")
    assert [series.label for series in curves.series] == ["0.2M", "0.8M", "3.2M", "7.1M", "12.6M"]
    small, large = curves.series[0], curves.series[-1]
    assert np.interp(small.x[-1], small.x, small.y) < np.interp(small.x[-1], large.x, large.y), (
        "small wins where it can be afforded"
    )
    assert large.y[-1] < small.y.min(), "large wins in the end"
    for series in curves.series:
        assert (np.diff(series.x) > 0).all()
        assert (np.diff(series.y) < 0).all()
        assert (series.low < series.y).all()
        assert (series.y < series.high).all()
        assert all(f"guidance {BEST_GUIDANCE:g}" in note and "dpmsolver++2m" in note for note in series.notes)


def test_the_frontier_lies_under_every_mark() -> None:
    table = planted_table(noise=0.01)
    frontier = plot_data.cost_curves(table, KERNEL, "gflop").frontier
    assert frontier is not None
    finished = table[table["is_final"]]
    for cost, value in zip(finished["gflop"], finished[KERNEL], strict=True):
        assert frontier.y[frontier.x <= cost].min() <= value


def test_every_point_of_the_frontier_has_the_mark_of_its_size() -> None:
    table = planted_table(guidance=(1.0, 2.0))
    free = table["guidance"] == 1.0  # one pass: half the evaluations of the better ones, so both are on the frontier
    curves = plot_data.cost_curves(table, KERNEL, "nfe")
    frontier = curves.frontier
    assert frontier is not None
    snapshot_points = {(x, y) for series in (*curves.series, *curves.beside) for x, y in zip(series.x, series.y, strict=True)}
    assert set(zip(frontier.x, frontier.y, strict=True)) <= snapshot_points
    beside = {(x, y) for series in curves.beside for x, y in zip(series.x, series.y, strict=True)}
    assert beside
    assert beside <= set(zip(table[free]["nfe"], table[free][KERNEL], strict=True))
    assert curves.setting.endswith("; off the lines: other guidance or solver")
    drawn = drawing.draw_curves(curves).axes[0].lines
    assert {(x, y) for line in drawn for x, y in line.get_xydata()} >= beside  # type: ignore[attr-defined]
    shown = [trace for trace in charts.plotly_curves(curves).data if trace.mode == "markers"]
    assert {(x, y) for trace in shown for x, y in zip(trace.x, trace.y, strict=True)} == beside
    assert not plot_data.cost_curves(table[~free], KERNEL, "nfe").beside


def test_a_solver_can_be_singled_out() -> None:
    table = planted_table()
    both, ddim = (plot_data.cost_curves(table, KERNEL, "nfe", solver=solver) for solver in (None, "ddim/trailing"))
    assert all("ddim/trailing" in note for series in ddim.series for note in series.notes)
    assert (ddim.series[0].y > both.series[0].y).all(), "first order is planted worse"
    with pytest.raises(ConfigError, match="no point of solver 'euler'"):
        plot_data.cost_curves(table, KERNEL, "nfe", solver="euler")


def test_compute_curves_take_one_setting_and_end_at_the_final_point() -> None:
    table = planted_table()
    curves = plot_data.compute_curves(table, KERNEL, floor=0.01)
    assert curves.setting == "ddim/trailing, 16 steps, guidance 2"
    for series in curves.series:
        rows = table[table["size"] == series.label]
        assert series.x.tolist() == sorted(rows["training_gflop"].unique())
        assert (np.diff(series.y) < 0).all()
    with pytest.raises(ConfigError, match=r"train\.snapshots"):
        plot_data.compute_curves(table[table["is_final"]], KERNEL)


@pytest.mark.parametrize(("metric", "pick"), [(KERNEL, np.nanargmin), ("alignment", np.nanargmax)])
def test_heat_panels_mark_the_planted_optimum(metric: str, pick: object) -> None:
    table = planted_table(noise=0.01)
    table["alignment"] = 1 - table[KERNEL]
    panels = plot_data.guidance_panels(table, metric)
    assert [(panel.solver, panel.size) for panel in panels][:6][-1] == ("dpmsolver++2m/trailing", "0.2M")
    for panel in panels:
        assert [int(pick(row)) for row in panel.values] == list(panel.best)  # type: ignore[operator]
        assert np.ravel_multi_index(panel.optimum, panel.values.shape) == pick(panel.values)  # type: ignore[operator]
    noiseless = plot_data.guidance_panels(planted_table(), KERNEL)
    assert all(panel.guidance[column] == BEST_GUIDANCE for panel in noiseless for column in panel.best)


def test_heat_panels_bear_holes_in_the_grid() -> None:
    table = planted_table()
    hole = table["is_final"] & (table["num_steps"] == 8) & (table["guidance"] == 3.0)
    panel = plot_data.guidance_panels(table[~hole], KERNEL)[0]
    assert np.argwhere(np.isnan(panel.values)).tolist() == [[2, 3]]
    assert figures.plot_guidance(table[~hole], KERNEL).axes
    assert charts.plotly_heat(panel).data[0].text[2][3] == ""


def test_contact_cells_show_the_best_point_of_each_cell() -> None:
    table = planted_table()
    images = plain_images(table)
    sheet = sheets.contact_cells(table, KERNEL, images, CAPTIONS)
    finished = table[table["is_final"]]
    best = finished.loc[finished.groupby(["size", "num_steps"])[KERNEL].idxmin()].set_index(["size", "num_steps"])["point"]
    assert (sheet.rows[0], sheet.rows[-1], sheet.columns) == ("0.2M", "12.6M", ("2", "4", "8", "16", "32"))
    for size, cells in zip(sheet.rows, sheet.cells, strict=True):
        for steps, cell in zip(sheet.columns, cells, strict=True):
            assert cell is not None
            assert cell.point == best[size, int(steps)]
            assert (cell.images == images[cell.point]).all()


def test_contact_cells_by_budget_leave_out_what_does_not_fit() -> None:
    table = planted_table()
    sheet = sheets.contact_cells(table, KERNEL, plain_images(table), CAPTIONS, "normalized_cost", [0.1, 6])
    assert sheet.columns == ("0.1", "6")
    assert [cells[0] is not None for cells in sheet.cells] == [True, False, False, False, False]
    assert sheet.cells[0][1] is not None
    assert "32 steps" in sheet.cells[0][1].label


def test_images_stand_where_the_sheet_says() -> None:
    table = planted_table()
    sheet = sheets.contact_cells(table, KERNEL, plain_images(table), CAPTIONS)
    axes = figures.plot_steps_grid(table, KERNEL, plain_images(table), CAPTIONS).axes[1]
    mosaic = np.asarray(axes.images[0].get_array())
    for row, top in enumerate(axes.get_yticks()):
        for column, left in enumerate(axes.get_xticks()):
            cell = sheet.cells[row][column]
            assert cell is not None
            assert (mosaic[int(top), int(left)] == cell.images[1, 0, 0]).all()


def test_images_must_match_the_captions() -> None:
    table = planted_table()
    with pytest.raises(ConfigError, match="2 captions"):
        sheets.contact_cells(table, KERNEL, plain_images(table), CAPTIONS[:2])
    with pytest.raises(ConfigError, match="no images were kept"):
        sheets.contact_cells(table, KERNEL, {}, CAPTIONS)


@pytest.mark.parametrize(("low", "high", "labels"), [
    (1, 16, ["1", "2", "4", "8", "16"]),
    (0.01, 0.1, ["0.01", "0.02", "0.05", "0.1"]),
    (1e4, 1e7, ["10⁴", "10⁵", "10⁶", "10⁷"]),
])  # fmt: skip
def test_ticks_of_logarithmic_axes(low: float, high: float, labels: list[str]) -> None:
    places, names = scales.log_ticks(low, high)
    assert names == labels
    assert (places[0], places[-1]) == pytest.approx((low, high))


# --- drawings ---------------------------------------------------------------------------------------------------------


def test_both_ways_of_drawing_put_the_marks_where_the_data_is() -> None:
    curves = plot_data.cost_curves(planted_table(), KERNEL, "normalized_cost", floor=0.013)
    (axes,) = drawing.draw_curves(curves).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    traces = {trace.name: trace for trace in charts.plotly_curves(curves).data}
    for series in curves.series:
        np.testing.assert_array_equal(lines[series.label].get_xydata(), np.column_stack([series.x, series.y]))
        assert list(traces[series.label].x) == series.x.tolist()
        assert list(traces[series.label].y) == series.y.tolist()
        assert lines[series.label].get_color() == traces[series.label].line.color == series.color
    assert lines["decoded real images"].get_ydata()[0] == 0.013
    assert set(traces["decoded real images"].y) == {0.013}
    assert axes.get_xscale() == "log"
    assert len({series.color for series in curves.series}) == len({series.mark for series in curves.series}) == 5


def test_colours_run_from_dark_to_light() -> None:
    brightness = [np.dot([int(c[i : i + 2], 16) for i in (1, 3, 5)], (0.299, 0.587, 0.114)) for c in scales.size_colors(11)]
    assert (np.diff(brightness) > 5).all()


def test_wide_ranges_get_a_logarithmic_axis_unless_something_is_not_positive() -> None:
    table = planted_table()
    values = table[KERNEL].to_numpy(copy=True)
    wide = table.assign(**{KERNEL: values**3, f"{KERNEL}_low": values**3 * 0.9, f"{KERNEL}_high": values**3 * 1.1})
    assert plot_data.cost_curves(wide, KERNEL, "nfe").log_y
    assert not plot_data.cost_curves(wide, KERNEL, "nfe", floor=-1e-5).log_y
    assert not plot_data.cost_curves(wide.assign(**{f"{KERNEL}_low": -1e-6}), KERNEL, "nfe").log_y
    assert drawing.draw_curves(plot_data.cost_curves(wide, KERNEL, "nfe")).axes[0].get_yscale() == "log"


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


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    table = planted_table(noise=0.004)
    table.loc[table["size"] == "3.2M", "size"] = "3.2M <b>&"
    origin = {"commit": "abc", "hours": {"training": 0.5}, "study_yaml": "name: </pre><script>alert('yaml')</script>\n"}
    reconstruction_floors = {KERNEL: 0.013, "alignment": 0.95}
    folder = tmp_path_factory.mktemp("page") / "report"
    return write_report(folder, "planted", table, KERNEL, origin, reconstruction_floors, plain_images(table), CAPTIONS)


def test_the_answer_comes_first_and_the_parts_in_order(written: Path) -> None:
    page = read(written)
    sections = [attributes["id"] for tag, attributes in page.elements if tag == "section"]
    assert sections == ["answer", "explore", "cost", "compute", "solvers", "guidance", "images", "points", "origin"]
    assert "The best size moves from 0.2M at 0.32 to 12.6M at 81 units of normalized cost" in page.text
    for line in (
        "For 0.32 units of normalized cost",
        "0.2M, 8 steps, guidance 2, dpmsolver++2m/trailing",
        "runner-up 0.8M, 2 steps",
    ):
        assert line in page.text
    assert "Not in this report" not in page.text


def test_the_papers_findings_stand_behind_the_answer(tmp_path: Path) -> None:
    table = planted_table(sizes=("0.2M", "0.8M", "3.2M"))
    table.loc[table["size"] == "3.2M", "size"] = "3.2M <b>&"
    verdicts = evaluate_claims(FINDINGS, {"text2image": TaskResults(table, KERNEL)})
    page = read(write_report(tmp_path, "planted", table, KERNEL, {}, {}, {}, [], verdicts=verdicts))
    sections = [attributes["id"] for tag, attributes in page.elements if tag == "section"]
    assert sections[:3] == ["answer", "explore", "verdicts"]
    for line in ("Of sizes trained on the same images the larger is better", "2 of 2 agree, 0 contradict, 0 open", "3.2M <b>&"):
        assert line in page.text
    assert page.text.count("dreambooth was not done") == 1


def test_names_and_captions_stay_text(written: Path) -> None:
    page = read(written)
    assert len(page.scripts) == 5, "three of data, plotly.js, and the page's own"
    assert not any("onerror" in attributes for _, attributes in page.elements)
    for text in (*CAPTIONS, "3.2M <b>&", "</pre><script>alert('yaml')</script>"):
        assert text in page.text
    (size,) = (column for column in json.loads(page.scripts["rows"])["columns"] if column["name"] == "size")
    assert "3.2M <b>&" in size["texts"]
    assert json.loads(page.scripts["data"])["prompts"] == CAPTIONS
    drawn = json.loads(page.scripts["drawings"])["cost"]["drawings"]["0|0|0"][0]["data"]
    assert "3.2M &lt;b&gt;&amp;" in {trace["name"] for trace in drawn}, "plotly reads names as markup"


def test_nothing_is_asked_of_the_network(written: Path) -> None:
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


def test_every_choice_has_its_drawing(written: Path) -> None:
    page = read(written)
    drawings = json.loads(page.scripts["drawings"])
    assert len(drawings["cost"]["drawings"]) == 4 * 3 * 3
    assert len(drawings["compute"]["drawings"]) == 3
    assert len(drawings["solvers"]["drawings"]) == (1 + 5) * 2 * 3
    assert len(drawings["guidance"]["drawings"]) == len(drawings["found"]["drawings"]) == 2 * 3
    axes = [drawings["cost"]["drawings"][f"{at}|0|0"][0]["layout"]["xaxis"]["title"]["text"] for at in range(4)]
    assert axes == [cost.axis for cost in COSTS.values()]


def test_the_table_holds_every_point_best_first(written: Path) -> None:
    rows = json.loads(read(written).scripts["rows"])
    place = [column["title"] for column in rows["columns"]].index("squared MMD")
    values = rows["columns"][place]["keys"]
    assert rows["rows"] == len(values) == len(planted_table())
    assert values == sorted(values)
    assert rows["sorted_by"] == [place, "ascending"]


def test_figures_lie_beside_the_page(written: Path) -> None:
    folder = written.parent / "figures"
    names = {
        *(f"quality_vs_cost-{cost}" for cost in COSTS),
        "quality_vs_compute-training_gflop",
        "solvers",
        "guidance",
        "guidance_heatmap",
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
        assert b"/FontFile2" in data, f"{file.name}: the type is embedded as it is"
        assert b"/Type3" not in data, f"{file.name}: what journals refuse"
        assert b"/CreationDate" not in data


def test_missing_parts_are_said_and_the_rest_is_there(tmp_path: Path) -> None:
    table = planted_table(solvers=("ddim/trailing",), snapshots=()).assign(ms_per_image=np.nan, alignment=np.nan)
    stale = [tmp_path / "figures" / f"quality_vs_cost-ms_per_image.{ending}" for ending in ("png", "pdf")]
    stale[0].parent.mkdir()
    for file in stale:
        file.write_bytes(b"of an earlier report")
    page = read(write_report(tmp_path, "bare", table, KERNEL, {}, {}, {}, []))
    for line in (
        "no checkpoint before the last was scored",
        "no images were kept of any finished point",
        "every point was made with ddim/trailing",
        "Not measured: milliseconds",
        "no floor is drawn",
        "no provenance was recorded",
        "YAML was not given",
    ):
        assert line in page.text
    assert metrics_in(table) == [KERNEL, "frechet_efficientnet"]
    assert set(json.loads(page.scripts["drawings"])) == {"cost", "guidance", "found"}
    assert [axis["cost"] for axis in json.loads(page.scripts["data"])["explore"]["axes"]] == ["normalized_cost", "nfe", "gflop"]
    assert not any(file.exists() for file in stale)
    assert "For " in page.text


def test_an_unfinished_study_has_a_page_too(tmp_path: Path) -> None:
    table = planted_table()
    page = read(write_report(tmp_path, "young", table[~table["is_final"]], KERNEL, {}, {}, {}, []))
    assert "No answer yet" in page.text
    assert json.loads(page.scripts["data"])["explore"] is None
    assert set(json.loads(page.scripts["drawings"])) == {"compute"}


def test_what_cannot_be_compared_is_not_written(tmp_path: Path) -> None:
    table = planted_table()
    table.loc[0, "protocol"] = "newer"
    with pytest.raises(ConfigError, match="differ in protocol"):
        write_report(tmp_path / "report", "mixed", table, KERNEL, {}, {}, {}, [])
    assert not (tmp_path / "report").exists()


def test_lines_across_are_the_floor_and_what_no_model_made() -> None:
    curves = plot_data.cost_curves(planted_table(), KERNEL, "nfe", floor=0.013)
    assert curves.dashed == [("decoded real images", 0.013, "dash")]
    with_more = dataclasses.replace(curves, floor_label="photographs", levels=(("bicubic", 9.0),))
    assert [label for label, *_ in with_more.dashed] == ["photographs", "bicubic"]
    assert plot_data.y_range(with_more)[1] == 9.0
    named = {trace.name: list(trace.y) for trace in charts.plotly_curves(with_more).data}
    assert named["bicubic"] == [9.0, 9.0]
    legend = drawing.draw_curves(with_more).axes[0].get_legend()
    texts = {text.get_text() for text in (legend or drawing.draw_curves(with_more).legends[0]).get_texts()}
    assert {"photographs", "bicubic"} <= texts
