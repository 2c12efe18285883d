"""Figures for papers and charts of the page show what was planted: optimum, crossing, order, read from what is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from isocost.analysis.costs import COSTS
from isocost.analysis.formatting import format_metric
from isocost.analysis.pareto import best_at_budgets
from isocost.errors import ConfigError
from isocost.report import figures, plot_data
from isocost.report import matplotlib_backend as drawing
from isocost.report import plot_data_finetune as tuned
from isocost.report.chart_panels import CHARTS, Chart, Unavailable, tuned_charts
from isocost.report.image_grids import contact_cells
from synthetic_results import BEST_GUIDANCE, PARAMETERS, planted_students, planted_superres, planted_table
from test_budget_slider import raced_table
from test_report import CAPTIONS, KERNEL, plain_images

SIZES = list(PARAMETERS)
CoefficientBank = dict[str, tuple[np.ndarray, np.ndarray]]


def drawn_lines(figure: Figure) -> CoefficientBank:
    """Label -> x and y of every line of a figure with one pair of axes."""
    (axes,) = figure.axes
    return {str(line.get_label()): (np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in axes.get_lines()}


def charted_lines(figure: Any) -> CoefficientBank:
    """The same of a figure of plotly, bands left out."""
    lines = [trace for trace in figure.data if "markers" in (trace.mode or "")]
    return {trace.name: (np.asarray(trace.x, float), np.asarray(trace.y, float)) for trace in lines}


@lru_cache
def planted_chart(name: str) -> Chart:
    return CHARTS[name](planted_table(), KERNEL, {}, lambda _: {})


def at(line: tuple[np.ndarray, np.ndarray], x: float) -> float:
    return float(np.interp(np.log(x), np.log(line[0]), line[1]))


# --- size at equal cost -----------------------------------------------------------------------------------------------


def check_crossing(lines: CoefficientBank, sign: float) -> None:
    """Small sizes win where only they can be afforded or are as far along, large ones in the end."""
    small, large = lines["0.2M"], lines["12.6M"]
    assert small[0][0] < large[0][0]
    assert sign * at(small, large[0][0]) < sign * large[1][0], "what the large one costs at its fewest steps"
    assert sign * large[1][-1] < min(sign * small[1]), "no number of steps brings the small one there"


@pytest.mark.parametrize("cost", [cost for cost in COSTS if cost != "nfe"])
def test_which_size_is_best_at_equal_cost(cost: str) -> None:
    table = planted_table()
    lines = drawn_lines(figures.plot_quality_vs_cost(table, KERNEL, cost))
    check_crossing(lines, 1.0)
    chart = planted_chart("cost")
    (costs, _, qualities) = chart.controls
    for place, words in enumerate(qualities.choices):
        (drawn,) = chart.drawings[f"{costs.keys.index(cost)}|0|{place}"]
        check_crossing(charted_lines(drawn), -1.0 if words == format_metric("alignment") else 1.0)


def test_at_equal_evaluations_the_largest_size_is_best_throughout() -> None:
    """Evaluations do not count how large the network is, so nothing crosses."""
    table = planted_table()
    chart = planted_chart("cost")
    (charted,) = chart.drawings[f"{chart.controls[0].keys.index('nfe')}|0|0"]
    for lines in (drawn_lines(figures.plot_quality_vs_cost(table, KERNEL, "nfe")), charted_lines(charted)):
        values = np.array([lines[size][1] for size in SIZES])
        assert (np.diff(values, axis=0) < 0).all()


@pytest.mark.parametrize("position", [1, 2])
def test_a_solver_singled_out_in_the_chart_is_the_one_that_is_drawn(position: int) -> None:
    chart = planted_chart("cost")
    solver = chart.controls[1].choices[position]
    (drawn,) = chart.drawings[f"0|{position}|0"]
    notes = [note for trace in drawn.data if trace.name in SIZES for note in trace.text]
    assert all(solver in note for note in notes)
    (best,) = chart.drawings["0|0|0"]
    worse = charted_lines(drawn)["3.2M"][1] - charted_lines(best)["3.2M"][1]
    assert (worse > 0).all() if solver.startswith("ddim") else (worse == 0).all()


# --- training compute -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["training_gflop", "normalized_training_compute"])
def test_does_compute_alone_decide(axis: str) -> None:
    """Planted: at equal compute a size 63 times larger is ahead by 19 % of what training gains, so compute nearly decides."""
    table = planted_table().assign(normalized_training_compute=lambda rows: rows["training_gflop"] / (3 * 32))
    chart = CHARTS["compute"](table, KERNEL, {}, lambda _: {})
    place = [words for words, _ in plot_data.COMPUTE_AXES.values()].index(plot_data.COMPUTE_AXES[axis][0])
    (charted,) = chart.drawings[f"0|{place}"]
    for lines in (drawn_lines(figures.plot_quality_vs_compute(table, KERNEL, axis)), charted_lines(charted)):
        assert list(lines) == SIZES
        rest = 0.02 + 0.5 / 16**1.3
        scaled = {}
        for size, (x, y) in lines.items():
            assert x.tolist() == sorted(table.loc[table["size"] == size, axis].unique())
            slope = np.diff(np.log(y - rest)) / np.diff(np.log(x))
            np.testing.assert_allclose(slope, -0.35, rtol=1e-6)
            scaled[size] = (y - rest) * x**0.35
        for size in SIZES:
            np.testing.assert_allclose(scaled[size] / scaled["0.2M"], (PARAMETERS[size] / 2e5) ** -0.05, rtol=1e-6)


# --- solvers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, *SIZES])
def test_which_solver_is_best_at_equal_steps(size: str | None) -> None:
    table = planted_table()
    chart = planted_chart("solvers")
    (sizes, across, qualities) = chart.controls
    place = sizes.choices.index(size or "best of all")
    drawn = [(drawn_lines(figures.plot_solvers(table, KERNEL, size=size)), 1.0)]
    for a in range(len(across.choices)):
        for c, words in enumerate(qualities.choices):
            (charted,) = chart.drawings[f"{place}|{a}|{c}"]
            drawn.append((charted_lines(charted), -1.0 if words == format_metric("alignment") else 1.0))
    for lines, sign in drawn:
        first, second = lines["ddim/trailing"], lines["dpmsolver++2m/trailing"]
        assert first[0].tolist() == second[0].tolist()
        assert (sign * second[1] < sign * first[1]).all(), "second order is planted better"
        gap = np.abs(second[1] - first[1])
        assert (np.diff(gap) < 0).all(), "and the more so the fewer the steps"


# --- guidance ---------------------------------------------------------------------------------------------------------


def test_which_guidance_is_best() -> None:
    table = planted_table()
    grid = [axes for axes in figures.plot_guidance(table, KERNEL).axes if axes.images]
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
        assert star.get_position() == (column, 4), "the most steps, the planted guidance"
    chart = planted_chart("guidance")
    for shown in chart.drawings.values():
        for panel in shown:
            assert [(one.x0 + one.x1) / 2 for one in panel.layout.shapes] == pytest.approx([column] * 5)
            assert [row for row, texts in enumerate(panel.data[0].text) if texts[column].startswith("★")] == [4]


def test_one_guidance_is_no_best_one() -> None:
    with pytest.raises(ConfigError, match="nothing to choose"):
        figures.plot_guidance(planted_superres(), KERNEL)


def test_does_the_best_guidance_change_with_steps() -> None:
    """Not on the planted grid, and by the planted intervals where it was raced for."""
    table = planted_table()
    for lines in (
        drawn_lines(figures.plot_guidance_heatmap(table, KERNEL)),
        *(charted_lines(one) for (one,) in planted_chart("found").drawings.values()),
    ):
        assert all((y == BEST_GUIDANCE).all() for _, y in lines.values())
    raced = figures.plot_guidance_heatmap(raced_table(), KERNEL)
    bars = [np.asarray(bar.get_segments()) for bar in raced.axes[0].collections]
    for (x, y), segments in zip(drawn_lines(raced).values(), bars, strict=True):
        assert (np.diff(y) < 0).all(), "planted to fall"
        np.testing.assert_allclose(segments[:, :, 0], np.column_stack([x, x]))
        np.testing.assert_allclose(segments[:, :, 1], np.column_stack([y / 1.2, y * 1.3]))


# --- images ---------------------------------------------------------------------------------------------------------


def test_what_does_each_budget_buy() -> None:
    """Each cell of the sheet, and each place in the figure, is the best point of its size within the budget."""
    table, budgets = planted_table(), [0.5, 6.0, 100.0]
    images = plain_images(table)
    sheet = contact_cells(table, KERNEL, images, CAPTIONS, "normalized_cost", budgets)
    figure = figures.plot_budget_grid(table, KERNEL, images, CAPTIONS, budgets)
    mosaic = np.asarray(figure.axes[1].images[0].get_array())
    for row, size in enumerate(sheet.rows):
        for column, budget in enumerate(budgets):
            (choice,) = best_at_budgets(table[table["size"] == size], "normalized_cost", KERNEL, [budget])
            cell = sheet.cells[row][column]
            seen = mosaic[int(figure.axes[1].get_yticks()[row]), int(figure.axes[1].get_xticks()[column])]
            if choice.best is None:
                assert cell is None
                assert (seen == 236).all()
            else:
                assert cell is not None
                assert cell.point == choice.best.point
                assert (seen == images[choice.best.point][1, 0, 0]).all()
    with pytest.raises(ConfigError, match="no budget"):
        figures.plot_budget_grid(table, KERNEL, images, CAPTIONS, [])


def test_what_is_made_of_what_was_given() -> None:
    strips = {
        title: np.stack([np.full((8, 8, 3), (40 * place, 60 * number, 7), np.uint8) for number in range(3)])
        for place, title in enumerate(("low resolution", "2.6M", "truth"))
    }
    figure = figures.plot_inputs_outputs(strips, CAPTIONS)
    assert [axes.get_title(loc="left") for axes in figure.axes[:3]] == ["low\nresolution", "2.6M", "truth"]
    for number in range(3):
        for place in range(3):
            shown = np.asarray(figure.axes[3 * number + place].images[0].get_array())
            assert (shown == (40 * place, 60 * number, 7)).all()
    with pytest.raises(ConfigError, match="nothing was given"):
        figures.plot_inputs_outputs({}, CAPTIONS)


# --- what was tuned ---------------------------------------------------------------------------------------------------


def started(task: str = "superres") -> tuned.Pretrained:
    return tuned.Pretrained(task, planted_table(), KERNEL)


@pytest.mark.parametrize(
    ("metric", "follows", "sign"), [(KERNEL, 0.5, 1), ("psnr", 0.5, -1), (KERNEL, -0.5, -1), ("psnr", -0.5, 1)]
)
def test_does_super_resolution_follow_pretraining(metric: str, follows: float, sign: int) -> None:
    table = planted_superres(follows)
    best = planted_table(snapshots=()).groupby("size")[KERNEL].min()
    figure = figures.plot_superres_vs_pretraining(table, metric, started())
    (chart,) = tuned_charts(table, metric, {}, lambda _: {}, started()).values()
    assert isinstance(chart, Chart)
    for lines in (drawn_lines(figure), charted_lines(chart.drawings["0"][0])):
        assert list(lines) == ["pretrained", "from scratch"]
        x, y = lines["pretrained"]
        np.testing.assert_allclose(x, [best[size] for size in reversed(SIZES)])
        assert (sign * np.diff(y) > 0).all()
        assert np.ptp(lines["from scratch"][1]) == pytest.approx(0)
    assert [text.get_text() for text in figure.axes[0].texts if text.get_text() in SIZES] == SIZES[::-1]
    said = tuned.pretraining_curves(table, metric, started())
    kept = 10 if follows > 0 else 0
    assert f"{kept} of 10 pairs of sizes keep their order" in said.setting
    for note, size in zip(said.series[0].notes, SIZES[::-1], strict=True):
        assert note.startswith(f"{size}, 8 steps")
        assert f"pretrained: {size}, 32 steps, guidance 2, dpmsolver++2m/trailing, squared MMD" in note
    low, high = (getattr(said.series[0], side) for side in ("low", "high"))
    np.testing.assert_allclose(high - low, 0.02 if metric == KERNEL else 1.0)


def test_sizes_are_matched_by_width_and_one_alone_follows_nothing() -> None:
    table = planted_superres()
    fewer = tuned.Pretrained("superres", planted_table(sizes=SIZES[:2]), KERNEL)
    assert [len(series.x) for series in tuned.pretraining_curves(table, KERNEL, fewer).series] == [2, 2]
    one = tuned.Pretrained("superres", planted_table(sizes=SIZES[:1]), KERNEL)
    with pytest.raises(ConfigError, match="fewer than two sizes"):
        figures.plot_superres_vs_pretraining(table, KERNEL, one)
    assert isinstance(tuned_charts(table, KERNEL, {}, lambda _: {}, one)["following"], Unavailable)


def test_does_dreambooth_follow_pretraining() -> None:
    table = planted_superres().replace({"size": {f"{size} from scratch": f"{size} untuned" for size in SIZES}})
    lines = drawn_lines(figures.plot_dreambooth_vs_pretraining(table, KERNEL, started("dreambooth")))
    assert list(lines) == ["tuned", "untuned"]
    assert (np.diff(lines["tuned"][1]) > 0).all()


@pytest.mark.parametrize("cost", list(COSTS))
def test_does_distillation_change_the_frontier(cost: str) -> None:
    """Students reach 8 times their steps and lose 0.03: they are ahead where little is spent, the undistilled in the end."""
    table = planted_students()
    chart = tuned_charts(table, KERNEL, {}, lambda _: {}, None)["distilled"]
    assert isinstance(chart, Chart)
    (charted,) = chart.drawings[f"{list(COSTS).index(cost)}|0"]
    figure = figures.plot_distillation_frontier(table, KERNEL, cost)
    assert {line.get_drawstyle() for line in figure.axes[0].get_lines()} == {"steps-post"}
    assert {trace.line.shape for trace in charted.data if trace.name in ("undistilled", "codi")} == {"hv"}
    is_student = table["size"].str.endswith(" codi")
    ends = [trace for trace in charted.data if trace.mode == "lines" and trace.hoverinfo == "skip" and trace.name is None]
    assert [(end.x[1], end.y[0]) for end in ends] == [
        (table[cost].max(), table.loc[rows, KERNEL].min()) for rows in (~is_student, is_student)
    ], "what is best stays so for any larger cost"
    for lines in (drawn_lines(figure), charted_lines(charted)):
        assert list(lines) == ["undistilled", "codi"]
        for label, rows in (("undistilled", table[~is_student]), ("codi", table[is_student])):
            for x, y in zip(*lines[label], strict=True):
                assert y == rows.loc[rows[cost] <= x * (1 + 1e-9), KERNEL].min(), "the best within the cost"
            assert (np.diff(lines[label][1]) < 0).all()
        (slow_x, slow), (fast_x, fast) = lines["undistilled"], lines["codi"]
        cheap = fast_x[len(fast_x) // 2]
        assert fast[fast_x <= cheap].min() < slow[slow_x <= cheap].min()
        assert slow.min() < fast.min() - 0.01


def test_without_students_no_frontier_can_change() -> None:
    with pytest.raises(ConfigError, match="not both scored"):
        figures.plot_distillation_frontier(planted_table(), KERNEL)
    assert tuned_charts(planted_table(), KERNEL, {}, lambda _: {}, None) == {}
    students = planted_students()
    with pytest.raises(ConfigError, match="not both scored"):
        tuned.distillation_curves(students[students["size"].str.endswith("codi")], KERNEL, "nfe")


# --- files ------------------------------------------------------------------------------------------------------------


def every(table: pd.DataFrame, pretrained: tuned.Pretrained | None = None) -> Mapping[str, Callable[[], Figure]]:
    return figures.every_figure(table, KERNEL, None, {}, [], [], {}, pretrained)


def test_every_figure_is_a_function_by_the_name_of_its_file(tmp_path: Path) -> None:
    names = {name.partition("-")[0] for name in every(planted_table())}
    public = {
        name for name, one in vars(figures).items() if getattr(one, "__module__", "") == figures.__name__ and name[0] != "_"
    }
    assert names == {name.removeprefix("plot_") for name in public if name.startswith("plot_")}
    superres = every(planted_superres(), started())
    only = {name: superres[name] for name in ("superres_vs_pretraining", "dreambooth_vs_pretraining")}
    assert figures.save_figures(tmp_path, only) == ["superres_vs_pretraining"]
    assert {file.suffix for file in tmp_path.iterdir()} == {".png", ".pdf"}


def test_a_figure_has_the_same_bytes_whenever_it_is_written(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        figures.save_figures(
            tmp_path / folder, {"a": lambda: drawing.draw_curves(plot_data.solver_curves(planted_table(), KERNEL))}
        )
    for ending in drawing.FORMATS:
        assert (tmp_path / "one" / f"a.{ending}").read_bytes() == (tmp_path / "two" / f"a.{ending}").read_bytes()


def test_names_are_not_taken_for_formulas(tmp_path: Path) -> None:
    table = planted_table(snapshots=()).replace({"size": {"3.2M": r"3.2M $\frac{$"}})
    figures.save_figures(tmp_path, {name: make for name, make in every(table).items() if "equal" in name or "guidance" in name})
    assert matplotlib.rcParams["text.parse_math"], "settings of the caller stay"
