"""Figures and charts show the known optimum, crossing and order of the synthetic tables, as read from the drawn objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from isocost.analysis.costs import REPORT_COSTS
from isocost.analysis.formatting import format_metric
from isocost.analysis.pareto import best_at_budgets
from isocost.errors import ConfigError
from isocost.report import figures, matplotlib_backend, plot_data, plot_data_finetune
from isocost.report.chart_panels import CHARTS, Chart, Unavailable, finetune_charts
from isocost.report.image_grids import image_grid
from synthetic_results import BEST_GUIDANCE, PARAMETERS, synthetic_students, synthetic_superres, synthetic_table
from test_budget_slider import raced_table
from test_report import METRIC, PROMPTS, plain_images

SIZES = list(PARAMETERS)
Lines = dict[str, tuple[np.ndarray, np.ndarray]]


def drawn_lines(figure: Figure) -> Lines:
    """Return label -> x and y of every line of a matplotlib figure with one pair of axes."""
    (axes,) = figure.axes
    return {str(line.get_label()): (np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in axes.get_lines()}


def charted_lines(figure: Any) -> Lines:
    """Return label -> x and y of every line of a plotly figure, without bands."""
    lines = [trace for trace in go.Figure(figure).data if "markers" in (trace.mode or "")]
    return {trace.name: (np.asarray(trace.x, float), np.asarray(trace.y, float)) for trace in lines}


@lru_cache
def synthetic_chart(name: str) -> Chart:
    return CHARTS[name](synthetic_table(), METRIC, {}, lambda _: {})


def value_at(line: tuple[np.ndarray, np.ndarray], x: float) -> float:
    return float(np.interp(np.log(x), np.log(line[0]), line[1]))


# --- size at equal cost -----------------------------------------------------------------------------------------------


def check_crossing(lines: Lines, sign: float) -> None:
    """The small size is best at the lowest cost of the large one, the large size is best in the end."""
    small, large = lines["0.2M"], lines["12.6M"]
    assert small[0][0] < large[0][0]
    assert sign * value_at(small, large[0][0]) < sign * large[1][0], "at the cost of the large size with its fewest steps"
    assert sign * large[1][-1] < min(sign * small[1]), "the small size never reaches this value"


@pytest.mark.parametrize("cost", [cost for cost in REPORT_COSTS if cost != "nfe"])
@pytest.mark.slow
def test_which_size_is_best_at_equal_cost(cost: str) -> None:
    table = synthetic_table()
    lines = drawn_lines(figures.plot_quality_vs_cost(table, METRIC, cost))
    check_crossing(lines, 1.0)
    chart = synthetic_chart("cost")
    (costs, _, qualities) = chart.controls
    for index, label in enumerate(qualities.choices):
        (figure,) = chart.figures[f"{costs.keys.index(cost)}|0|{index}"]
        check_crossing(charted_lines(figure), -1.0 if label == format_metric("alignment") else 1.0)


@pytest.mark.slow
def test_at_equal_evaluations_the_largest_size_is_best_throughout() -> None:
    """The number of evaluations does not depend on the size of the network, so no lines cross."""
    table = synthetic_table()
    chart = synthetic_chart("cost")
    (charted,) = chart.figures[f"{chart.controls[0].keys.index('nfe')}|0|0"]
    for lines in (drawn_lines(figures.plot_quality_vs_cost(table, METRIC, "nfe")), charted_lines(charted)):
        values = np.array([lines[size][1] for size in SIZES])
        assert (np.diff(values, axis=0) < 0).all()


@pytest.mark.parametrize("position", [1, 2])
def test_the_solver_control_of_the_chart_selects_the_solver(position: int) -> None:
    chart = synthetic_chart("cost")
    solver = chart.controls[1].choices[position]
    (of_solver,) = chart.figures[f"0|{position}|0"]
    notes = [note for trace in go.Figure(of_solver).data if trace.name in SIZES for note in trace.text]
    assert all(solver in note for note in notes)
    (of_best_solver,) = chart.figures["0|0|0"]
    gap = charted_lines(of_solver)["3.2M"][1] - charted_lines(of_best_solver)["3.2M"][1]
    assert (gap > 0).all() if solver.startswith("ddim") else (gap == 0).all()


# --- training compute -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["training_gflop", "normalized_training_compute"])
def test_does_only_compute_decide(axis: str) -> None:
    """By construction, at equal compute a size 63 times larger is ahead by only 19 % of the effect of training."""
    table = synthetic_table().assign(normalized_training_compute=lambda rows: rows["training_gflop"] / (3 * 32))
    chart = CHARTS["compute"](table, METRIC, {}, lambda _: {})
    index = [label for label, _ in plot_data.COMPUTE_AXES.values()].index(plot_data.COMPUTE_AXES[axis][0])
    (charted,) = chart.figures[f"0|{index}"]
    for lines in (drawn_lines(figures.plot_quality_vs_compute(table, METRIC, axis)), charted_lines(charted)):
        assert list(lines) == SIZES
        without_training = 0.02 + 0.5 / 16**1.3
        scaled = {}
        for size, (x, y) in lines.items():
            assert x.tolist() == sorted(table.loc[table["size"] == size, axis].unique())
            slope = np.diff(np.log(y - without_training)) / np.diff(np.log(x))
            np.testing.assert_allclose(slope, -0.35, rtol=1e-6)
            scaled[size] = (y - without_training) * x**0.35
        for size in SIZES:
            np.testing.assert_allclose(scaled[size] / scaled["0.2M"], (PARAMETERS[size] / 2e5) ** -0.05, rtol=1e-6)


# --- solvers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, *SIZES])
def test_which_solver_is_best_at_equal_steps(size: str | None) -> None:
    table = synthetic_table()
    chart = synthetic_chart("solvers")
    (sizes, axes, qualities) = chart.controls
    size_index = sizes.choices.index(size or "best of all")
    lines_and_signs = [(drawn_lines(figures.plot_solvers(table, METRIC, size=size)), 1.0)]
    for axis_index in range(len(axes.choices)):
        for quality_index, label in enumerate(qualities.choices):
            (charted,) = chart.figures[f"{size_index}|{axis_index}|{quality_index}"]
            lines_and_signs.append((charted_lines(charted), -1.0 if label == format_metric("alignment") else 1.0))
    for lines, sign in lines_and_signs:
        first, second = lines["ddim/trailing"], lines["dpmsolver++2m/trailing"]
        assert first[0].tolist() == second[0].tolist()
        assert (sign * second[1] < sign * first[1]).all(), "the second-order solver is better by construction"
        gap = np.abs(second[1] - first[1])
        assert (np.diff(gap) < 0).all(), "the gap is larger at fewer steps"


# --- guidance ---------------------------------------------------------------------------------------------------------


def test_which_guidance_is_best() -> None:
    table = synthetic_table()
    grid = [axes for axes in figures.plot_guidance_heatmap(table, METRIC).axes if axes.images]
    assert [axes.get_title(loc="left") for axes in grid] == [
        f"{size}, {solver}" for solver in ("ddim/trailing", "dpmsolver++2m/trailing") for size in SIZES
    ]
    column = (1.0, 1.5, 2.0, 3.0, 5.0).index(BEST_GUIDANCE)
    for axes in grid:
        frames = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
        assert [(frame.get_x() + 0.5, frame.get_y() + 0.5) for frame in frames] == [(column, row) for row in range(5)]
        values = np.asarray(axes.images[0].get_array())
        assert (values.argmin(axis=1) == column).all()
        (star,) = (text for text in axes.texts if "★" in text.get_text())
        assert star.get_position() == (column, 4), "the most steps, the known best guidance"
    chart = synthetic_chart("guidance")
    for panels in chart.figures.values():
        for panel in map(go.Figure, panels):
            assert [(frame.x0 + frame.x1) / 2 for frame in panel.layout.shapes] == pytest.approx([column] * 5)
            assert [row for row, texts in enumerate(panel.data[0].text) if texts[column].startswith("★")] == [4]


def test_a_single_guidance_value_cannot_be_the_best() -> None:
    with pytest.raises(ConfigError, match="the best guidance cannot be determined"):
        figures.plot_guidance_heatmap(synthetic_superres(), METRIC)


def test_does_the_best_guidance_change_with_steps() -> None:
    """It does not change on the synthetic grid, and follows the known intervals in the table with races."""
    table = synthetic_table()
    for lines in (
        drawn_lines(figures.plot_best_guidance(table, METRIC)),
        *(charted_lines(figure) for (figure,) in synthetic_chart("best_guidance").figures.values()),
    ):
        assert all((y == BEST_GUIDANCE).all() for _, y in lines.values())
    raced = figures.plot_best_guidance(raced_table(), METRIC)
    bars = [np.asarray(bar.get_segments()) for bar in raced.axes[0].collections]
    for (x, y), segments in zip(drawn_lines(raced).values(), bars, strict=True):
        assert (np.diff(y) < 0).all(), "the best guidance falls by construction"
        np.testing.assert_allclose(segments[:, :, 0], np.column_stack([x, x]))
        np.testing.assert_allclose(segments[:, :, 1], np.column_stack([y / 1.2, y * 1.3]))


# --- images ---------------------------------------------------------------------------------------------------------


def test_what_does_each_budget_buy() -> None:
    """Each cell of the grid, and its area in the figure, shows the best point of its size within the budget."""
    table, budgets = synthetic_table(), [0.5, 6.0, 100.0]
    images = plain_images(table)
    grid = image_grid(table, METRIC, images, PROMPTS, "normalized_cost", budgets)
    figure = figures.plot_budget_grid(table, METRIC, images, PROMPTS, budgets)
    mosaic = np.asarray(figure.axes[1].images[0].get_array())
    for row, size in enumerate(grid.rows):
        for column, budget in enumerate(budgets):
            (choice,) = best_at_budgets(table[table["size"] == size], "normalized_cost", METRIC, [budget])
            cell = grid.cells[row][column]
            pixel = mosaic[int(figure.axes[1].get_yticks()[row]), int(figure.axes[1].get_xticks()[column])]
            if choice.best is None:
                assert cell is None
                assert (pixel == 236).all()
            else:
                assert cell is not None
                assert cell.point == choice.best.point
                assert (pixel == images[choice.best.point][1, 0, 0]).all()
    with pytest.raises(ConfigError, match="no budgets"):
        figures.plot_budget_grid(table, METRIC, images, PROMPTS, [])


def test_inputs_outputs_and_targets() -> None:
    comparison_rows = {
        title: np.stack([np.full((8, 8, 3), (40 * column, 60 * row, 7), np.uint8) for row in range(3)])
        for column, title in enumerate(("low resolution", "2.6M", "truth"))
    }
    figure = figures.plot_inputs_outputs(comparison_rows, PROMPTS)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["low\nresolution", "2.6M", "truth"]
    mosaic = np.asarray(axes.images[0].get_array())
    for row in range(3):
        for column, centre in enumerate(axes.get_xticks()):
            block = mosaic[(row * len(mosaic)) // 3 :, round(centre) - 30 : round(centre) + 30][:60]
            assert (block == (40 * column, 60 * row, 7)).all()
    with pytest.raises(ConfigError, match="no input images"):
        figures.plot_inputs_outputs({}, PROMPTS)


# --- fine-tuned models -----------------------------------------------------------------------------------------------


def pretrained(task: str = "superres") -> plot_data_finetune.Pretrained:
    return plot_data_finetune.Pretrained(task, synthetic_table(), METRIC)


@pytest.mark.parametrize(
    ("metric", "slope", "sign"), [(METRIC, 0.5, 1), ("psnr", 0.5, -1), (METRIC, -0.5, -1), ("psnr", -0.5, 1)]
)
def test_does_super_resolution_follow_pretraining(metric: str, slope: float, sign: int) -> None:
    table = synthetic_superres(slope)
    best = synthetic_table(snapshots=()).groupby("size")[METRIC].min()
    figure = figures.plot_superres_vs_pretraining(table, metric, pretrained())
    (chart,) = finetune_charts(table, metric, {}, lambda _: {}, pretrained()).values()
    assert isinstance(chart, Chart)
    for lines in (drawn_lines(figure), charted_lines(chart.figures["0"][0])):
        assert list(lines) == ["pretrained", "from scratch"]
        x, y = lines["pretrained"]
        np.testing.assert_allclose(x, [best[size] for size in reversed(SIZES)])
        assert (sign * np.diff(y) > 0).all()
        assert np.ptp(lines["from scratch"][1]) == pytest.approx(0)
    assert [text.get_text() for text in figure.axes[0].texts if text.get_text() in SIZES] == SIZES[::-1]
    curves = plot_data_finetune.pretraining_curves(table, metric, pretrained())
    num_same_order = 10 if slope > 0 else 0
    assert f"{num_same_order} of 10 pairs of sizes keep their order" in curves.setting
    for note, size in zip(curves.series[0].notes, SIZES[::-1], strict=True):
        assert note.startswith(f"{size}, 8 steps")
        assert f"pretrained: {size}, 32 steps, guidance 2, dpmsolver++2m/trailing, squared MMD" in note
    low, high = (getattr(curves.series[0], end) for end in ("low", "high"))
    np.testing.assert_allclose(high - low, 0.02 if metric == METRIC else 1.0)


def test_sizes_are_matched_by_width_and_a_single_size_is_refused() -> None:
    table = synthetic_superres()
    two_sizes = plot_data_finetune.Pretrained("superres", synthetic_table(sizes=SIZES[:2]), METRIC)
    assert [len(series.x) for series in plot_data_finetune.pretraining_curves(table, METRIC, two_sizes).series] == [2, 2]
    one_size = plot_data_finetune.Pretrained("superres", synthetic_table(sizes=SIZES[:1]), METRIC)
    with pytest.raises(ConfigError, match="fewer than two sizes"):
        figures.plot_superres_vs_pretraining(table, METRIC, one_size)
    assert isinstance(finetune_charts(table, METRIC, {}, lambda _: {}, one_size)["pretraining"], Unavailable)


def test_does_dreambooth_follow_pretraining() -> None:
    table = synthetic_superres().replace({"size": {f"{size} from scratch": f"{size} untuned" for size in SIZES}})
    lines = drawn_lines(figures.plot_dreambooth_vs_pretraining(table, METRIC, pretrained("dreambooth")))
    assert list(lines) == ["tuned", "untuned"]
    assert (np.diff(lines["tuned"][1]) > 0).all()


@pytest.mark.parametrize("cost", list(REPORT_COSTS))
@pytest.mark.fast_cases(1)
def test_does_distillation_change_the_frontier(cost: str) -> None:
    """Students reach the quality of 8 times their steps minus 0.03: they are ahead at low cost, the undistilled in the end."""
    table = synthetic_students()
    chart = finetune_charts(table, METRIC, {}, lambda _: {}, None)["distillation"]
    assert isinstance(chart, Chart)
    (charted,) = chart.figures[f"{list(REPORT_COSTS).index(cost)}|0"]
    figure = figures.plot_distillation_frontier(table, METRIC, cost)
    assert {line.get_drawstyle() for line in figure.axes[0].get_lines()} == {"steps-post"}
    traces = go.Figure(charted).data
    assert {trace.line.shape for trace in traces if trace.name in ("undistilled", "codi")} == {"hv"}
    is_student = table["size"].str.endswith(" codi")
    ends = [trace for trace in traces if trace.mode == "lines" and trace.hoverinfo == "skip" and trace.name is None]
    assert [(end.x[1], end.y[0]) for end in ends] == [
        (table[cost].max(), table.loc[rows, METRIC].min()) for rows in (~is_student, is_student)
    ], "the best value holds for any larger cost"
    for lines in (drawn_lines(figure), charted_lines(charted)):
        assert list(lines) == ["undistilled", "codi"]
        for label, rows in (("undistilled", table[~is_student]), ("codi", table[is_student])):
            for x, y in zip(*lines[label], strict=True):
                assert y == rows.loc[rows[cost] <= x * (1 + 1e-9), METRIC].min(), "the best within the cost"
            assert (np.diff(lines[label][1]) < 0).all()
        (teacher_x, teacher), (student_x, student) = lines["undistilled"], lines["codi"]
        low_cost = student_x[len(student_x) // 2]
        assert student[student_x <= low_cost].min() < teacher[teacher_x <= low_cost].min()
        assert teacher.min() < student.min() - 0.01


def test_a_distillation_figure_needs_students_and_undistilled_models() -> None:
    with pytest.raises(ConfigError, match="not both scored"):
        figures.plot_distillation_frontier(synthetic_table(), METRIC)
    assert finetune_charts(synthetic_table(), METRIC, {}, lambda _: {}, None) == {}
    students = synthetic_students()
    with pytest.raises(ConfigError, match="not both scored"):
        plot_data_finetune.distillation_curves(students[students["size"].str.endswith("codi")], METRIC, "nfe")


# --- files ------------------------------------------------------------------------------------------------------------


def all_figures(
    table: pd.DataFrame, pretrained_points: plot_data_finetune.Pretrained | None = None
) -> Mapping[str, Callable[[], Figure]]:
    return figures.all_figures(table, METRIC, None, {}, [], [], {}, pretrained_points)


def test_every_figure_is_a_function_with_the_name_of_its_file(tmp_path: Path) -> None:
    names = {name.partition("-")[0] for name in all_figures(synthetic_table())}
    functions = {
        name for name, value in vars(figures).items() if getattr(value, "__module__", "") == figures.__name__ and name[0] != "_"
    }
    assert names == {name.removeprefix("plot_") for name in functions if name.startswith("plot_")}
    superres = all_figures(synthetic_superres(), pretrained())
    selected = {name: superres[name] for name in ("superres_vs_pretraining", "dreambooth_vs_pretraining")}
    assert figures.FigureFiles(tmp_path, selected).names() == ["superres_vs_pretraining"]
    assert {file.suffix for file in tmp_path.iterdir()} == {".png", ".pdf"}


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_equal_figures_have_equal_bytes(tmp_path: Path, num_processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether this process draws them or another one."""
    monkeypatch.setattr(figures.joblib, "effective_n_jobs", lambda _: num_processes)
    makers = {name: partial(figures.plot_solvers, synthetic_table(), METRIC) for name in ("a", "b")}
    makers["none"] = partial(figures.plot_guide_frontier, synthetic_table(), METRIC)
    assert figures.FigureFiles(tmp_path / "report", makers).names() == ["a", "b"]
    for name in ("a", "b"):
        figures.save_figure(tmp_path, name, makers[name])
        for ending in matplotlib_backend.FORMATS:
            file = f"{name}.{ending}"
            assert (tmp_path / "report" / file).read_bytes() == (tmp_path / file).read_bytes()


@pytest.mark.slow
def test_a_fault_of_a_figure_in_another_process_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures.joblib, "effective_n_jobs", lambda _: 2)
    makers = {"a": partial(figures.plot_solvers, synthetic_table(), METRIC, no_such_option=1)}
    with pytest.raises(TypeError, match="no_such_option"):
        figures.FigureFiles(tmp_path / "report", makers).names()


def test_only_the_formats_that_are_asked_for_are_written_and_stale_files_are_removed(tmp_path: Path) -> None:
    def make_figure() -> Figure:
        return matplotlib_backend.draw_curves(plot_data.solver_curves(synthetic_table(), METRIC))

    def suffixes() -> set[str]:
        return {file.suffix for file in tmp_path.glob("figures/*")}

    assert figures.FigureFiles(tmp_path / "figures", {"a": make_figure}, ["png", "pdf"]).names() == ["a"]
    assert suffixes() == {".png", ".pdf"}
    assert figures.FigureFiles(tmp_path / "figures", {"a": make_figure}, ["png"]).names() == ["a"]
    assert suffixes() == {".png"}
    with pytest.raises(ConfigError, match="figure format svg: choose from png, pdf"):
        figures.FigureFiles(tmp_path / "figures", {"a": make_figure}, ["svg"]).names()
    assert suffixes() == {".png"}, "a mistake loses nothing"
    assert figures.FigureFiles(tmp_path / "figures", {"a": make_figure}, []).names() == []
    assert not (tmp_path / "figures").exists()


@pytest.mark.slow
def test_names_are_not_read_as_formulas(tmp_path: Path) -> None:
    table = synthetic_table(snapshots=()).replace({"size": {"3.2M": r"3.2M $\frac{$"}})
    prefixes = ("quality_vs_cost", "solvers", "guidance")
    figures.FigureFiles(
        tmp_path, {name: make for name, make in all_figures(table).items() if name.startswith(prefixes)}
    ).names()
    assert matplotlib.rcParams["text.parse_math"], "the caller's settings are unchanged"
