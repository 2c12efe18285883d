"""The report's section on guide networks, on synthetic points with a known gain at equal cost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from isocost.analysis import guides as analysis
from isocost.analysis.frontier_ci import corrected_running_minimum, draw_replicates
from isocost.analysis.guides import (
    GUIDE_COSTS,
    NOT_SHOWN,
    WAYS,
    GuideComparison,
    best_guides,
    compare_guides,
    disagreements,
    guide_changes,
    guides_in_order,
    has_guides,
    points_by_way,
    summarise,
    way_of_guidance,
)
from isocost.analysis.iso_cost import RecordedDifferences
from isocost.errors import ConfigError
from isocost.evaluation.confidence_intervals import Interval
from isocost.report import figures, matplotlib_backend, plotly_backend
from isocost.report.chart_panels import guide_charts
from isocost.report.guides_section import guide_section
from isocost.report.html import write_report
from isocost.report.markdown import markdown_summary
from isocost.report.plot_data_guides import format_change, guide_frontier, guide_heatmap
from synthetic_results import GUIDE_GAINS, exact, measured, synthetic_guides, synthetic_table
from test_markdown_summary import read as read_markdown
from test_report import METRIC, Reader, read

GAIN = 0.02
UNPAIRED = RecordedDifferences()
ZERO_WIDTH = "\u200b"
QUESTION = "What does a guide buy at equal cost?"


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return synthetic_guides(GAIN)


def written(folder: Path, table: pd.DataFrame, **options: Any) -> Reader:
    return read(write_report(folder, "synthetic", table, METRIC, {}, {}, {}, [], figure_formats=(), **options))


# --- ways of guidance -------------------------------------------------------------------------------------------------

INTERVAL, SCHEDULE = "[-3.0, 2.0]", "[[-4.0, 1.0], [0.0, 3.0]]"


@pytest.mark.parametrize(
    ("way", "settings"),
    [
        ("none", {"guidance": 1.0, "nfe": 8}),
        ("classifier-free", {"nfe": 16}),
        ("classifier-free", {"nfe": 8}),  # the network takes w as an input
        ("classifier-free", {"guidance": 0.0, "nfe": 8}),
        ("classifier-free within an interval", {"nfe": 12, "guidance_interval": INTERVAL}),
        ("classifier-free", {"nfe": 16, "guidance_interval": INTERVAL}),
        ("none", {"nfe": 8, "guidance_interval": INTERVAL}),
        ("classifier-free within an interval", {"nfe": 13, "guidance_schedule": SCHEDULE}),
        ("classifier-free", {"nfe": 16, "guidance_schedule": SCHEDULE}),
        ("classifier-free", {"nfe": 30, "guidance_interval": INTERVAL, "solver": "heun/trailing"}),
        ("classifier-free within an interval", {"nfe": 28, "guidance_interval": INTERVAL, "solver": "heun/trailing"}),
        ("guide", {"nfe": 16, "guide": "0.8M", "guide_nfe": 8}),
        ("guide within an interval", {"nfe": 11, "guide": "0.8M", "guide_nfe": 3, "guidance_interval": INTERVAL}),
        ("guide within an interval", {"nfe": 11, "guide": "0.8M", "guide_nfe": 3, "guidance_schedule": SCHEDULE}),
        ("guide", {"nfe": 16, "guide": "0.8M", "guide_nfe": 8, "guidance_schedule": SCHEDULE}),
        ("none", {"nfe": 8, "guide": "0.8M", "guide_nfe": 0, "guidance_interval": INTERVAL}),
    ],
)
def test_the_way_of_guidance_follows_from_the_guided_steps(way: str, settings: dict[str, Any]) -> None:
    row = {"solver": "ddim/trailing", "num_steps": 8, "guidance": 2.0, "guide": None, "guidance_interval": np.nan, **settings}
    assert way_of_guidance(row) == way


def test_every_point_has_one_way(table: pd.DataFrame) -> None:
    groups = points_by_way(table, METRIC, "gflop")
    assert list(groups) == list(WAYS)
    assert sum(map(len, groups.values())) == len(table)
    assert all(len(group) for group in groups.values())


def test_guides_are_ordered_by_size_training_and_prompt(table: pd.DataFrame) -> None:
    assert guides_in_order(table) == ["0.8M@50000", "0.8M", "0.8M/null", "3.2M@50000"]
    others = {"0.8M@50000": "0.8M@100000", "0.8M": "OWNER/NAME@v1", "0.8M/null": "0.8M@9000/null"}
    assert guides_in_order(table.replace({"guide": others})) == ["0.8M@9000/null", "0.8M@100000", "3.2M@50000", "OWNER/NAME@v1"]


# --- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", ["gflop", "ms_per_image"])
def test_a_planted_gain_is_found_at_every_cost(table: pd.DataFrame, cost: str) -> None:
    comparisons = compare_guides(table, METRIC, cost, UNPAIRED)
    assert len(comparisons) == analysis.NUM_BUDGETS
    for comparison in comparisons:
        assert comparison.verdict == "better"
        assert comparison.difference is not None
        assert comparison.difference.interval is not None
        assert comparison.difference.interval.value == pytest.approx(-GAIN, abs=0.0015)
        assert comparison.difference.interval.low < -GAIN < comparison.difference.interval.high
        assert not comparison.difference.is_paired
        assert comparison.other_metrics["alignment"].verdict == "better", "higher is better"


@pytest.mark.parametrize(("gain", "verdict"), [(GAIN, "better"), (0.0, NOT_SHOWN), (-GAIN, "worse")])
@pytest.mark.fast_cases(1)
def test_the_report_states_the_planted_verdict(gain: float, verdict: str, tmp_path: Path) -> None:
    guided = synthetic_guides(gain, guides=("0.8M@50000",))
    sentence = {
        "better": "With a guide, the best squared MMD is better at 4 of 4 costs (2.8, 7.7, 22, 62 GFLOP per image).",
        "worse": "With a guide, the best squared MMD is worse at 4 of 4 costs (2.8, 7.7, 22, 62 GFLOP per image).",
        NOT_SHOWN: "No difference between the best squared MMD with and without a guide is shown at 4 of 4 costs "
        "(2.8, 7.7, 22, 62 GFLOP per image).",
    }[verdict]
    page = written(tmp_path, guided)
    summary = read_markdown(markdown_summary(guided, METRIC, "synthetic"))
    assert sentence in page.text
    assert sentence in summary.text
    head, *rows = summary.tables[2]
    assert head[1:6] == list(WAYS)
    assert head[6:8] == ["with a guide minus without", "verdict"]
    comparisons = compare_guides(guided, METRIC, "gflop", UNPAIRED)
    assert len(rows) == len(comparisons)
    for row, comparison in zip(rows, comparisons, strict=True):
        assert row[7] == verdict == comparison.verdict
        assert comparison.difference is not None
        assert row[6] == comparison.difference.amount
        assert row[6] in page.text
        for way, cell in zip(WAYS, row[1:6], strict=True):
            assert cell.replace(ZERO_WIDTH, "") == ": ".join(comparison.best.get(way, ("nothing fits",)))


def test_the_frontier_of_each_way_is_the_best_score_within_the_cost(table: pd.DataFrame) -> None:
    for comparison in compare_guides(table, METRIC, "gflop", UNPAIRED, [5.0, 62.0]):
        for way, rows in points_by_way(table, METRIC, "gflop").items():
            best = rows.loc[rows["gflop"] <= comparison.budget, METRIC].min()
            assert float(comparison.best[way][0].split()[0]) == pytest.approx(best, rel=0.01)


def test_a_cost_that_only_one_group_fits_has_the_reason(table: pd.DataFrame) -> None:
    cheap = table[table["guide"].isna() | (table["gflop"] > 4)]
    (comparison,) = compare_guides(cheap, METRIC, "gflop", UNPAIRED, [2.0])
    assert (comparison.difference, comparison.verdict) == (None, "no point with a guide fits")
    costly = table[table["guide"].notna() | (table["gflop"] > 4)]
    (comparison,) = compare_guides(costly, METRIC, "gflop", UNPAIRED, [2.0])
    assert comparison.verdict == "no point without a guide fits"
    assert "No cost has both" in summarise([comparison])


def test_default_costs_start_where_both_groups_have_a_point(table: pd.DataFrame) -> None:
    late = table[table["guide"].isna() | (table["gflop"] > 10)]
    assert all(comparison.difference is not None for comparison in compare_guides(late, METRIC, "gflop", UNPAIRED))


def test_without_intervals_no_difference_is_shown(table: pd.DataFrame) -> None:
    comparisons = compare_guides(exact(table), METRIC, "gflop", UNPAIRED)
    assert {comparison.verdict for comparison in comparisons} == {NOT_SHOWN}


def test_recorded_paired_differences_decide() -> None:
    """With wide intervals of the scores nothing is shown; the paired difference of the same points shows it."""
    wide = synthetic_guides(GAIN, half_width=0.1)
    assert {comparison.verdict for comparison in compare_guides(wide, METRIC, "gflop", UNPAIRED)} == {NOT_SHOWN}

    class Paired:
        def __init__(self) -> None:
            self.differences: dict[tuple[str, str, str], Interval] = {}

        def difference(self, first: str, second: str, metric: str) -> Interval:
            scores = wide.set_index("point")[metric]
            value = float(scores[first] - scores[second])
            return self.differences.setdefault((first, second, metric), Interval(value, value - 0.002, value + 0.002))

    paired = Paired()
    expected = guide_section(wide, METRIC, paired)
    assert {row.verdict for row in expected.tables[0].rows} == {"better"}
    assert "(not paired)" not in str(expected)
    rows = json.loads(json.dumps(RecordedDifferences(paired.differences).rows))
    recorded = RecordedDifferences.from_rows(rows)
    assert guide_section(wide, METRIC, recorded) == expected
    assert "(not paired)" not in markdown_summary(wide, METRIC, "synthetic", pairs=recorded).partition(QUESTION)[2]


@pytest.mark.slow
def test_metrics_that_contradict_each_other_are_named(table: pd.DataFrame, tmp_path: Path) -> None:
    guided = table["guide"].notna()
    contradicting = table.copy()
    for end in ("", "_low", "_high"):
        contradicting.loc[guided, f"alignment{end}"] -= 3 * GAIN
    comparisons = compare_guides(contradicting, METRIC, "gflop", UNPAIRED)
    assert [found[1:] for found in disagreements(comparisons)] == [("better", "alignment", "worse")] * 4
    text = "The metrics disagree at 62 GFLOP per image: the guide is better by squared MMD, worse by prompt alignment."
    assert text in written(tmp_path, contradicting).text
    assert text in read_markdown(markdown_summary(contradicting, METRIC, "synthetic")).text
    assert not disagreements(compare_guides(table, METRIC, "gflop", UNPAIRED))
    for end in ("", "_low", "_high"):
        contradicting[f"psnr{end}"] = 30 * contradicting[f"alignment{end}"]
    both = guide_section(contradicting, METRIC, UNPAIRED).tables[0].by_other_metrics
    lines = [line for line in both if line.startswith("The metrics disagree at 62 GFLOP")]
    assert len(lines) == 1, "one sentence per cost"
    assert lines[0].endswith("worse by prompt alignment and peak signal-to-noise ratio.")


def test_mixed_verdicts_are_counted(table: pd.DataFrame) -> None:
    comparisons = compare_guides(table, METRIC, "gflop", UNPAIRED)

    def with_verdict(comparison: GuideComparison, verdict: str) -> GuideComparison:
        assert comparison.difference is not None
        return dataclasses.replace(comparison, difference=dataclasses.replace(comparison.difference, verdict=verdict))

    mixed = [with_verdict(*pair) for pair in zip(comparisons, ("worse", NOT_SHOWN, "better", "better"), strict=True)]
    assert summarise(mixed) == (
        "With a guide, the best squared MMD is better at 2 of 4 costs (22, 62 GFLOP per image). With a guide, the best squared "
        "MMD is worse at 1 of 4 costs (2.8 GFLOP per image). No difference between the best squared MMD with and without a "
        "guide is shown at 1 of 4 costs (7.7 GFLOP per image)."
    )


def test_many_points_do_not_make_a_guide_better() -> None:
    """Without a difference, the best of 200 scores looks better than the best of 4 by more than its optimism explains."""
    generator, error, raw, corrected = np.random.default_rng(0), 1.0, [], []
    for _ in range(200):
        optimism, best = [], []
        for count in (200, 4):
            truth = np.abs(generator.standard_normal(count))
            truth[0] = 0
            scores = truth + error * generator.standard_normal(count)
            rows = pd.DataFrame({METRIC: scores, "gflop": range(count), "point": range(count)})
            optimism.append(analysis._optimism(rows, METRIC, "gflop", error))
            best.append(scores.min())
        raw.append(best[0] - best[1])
        corrected.append(raw[-1] + optimism[0] - optimism[1])
    half_width = 1.96 * 2**0.5 * error
    shares = [float(np.mean(np.array(values) < -half_width)) for values in (raw, corrected)]
    assert shares[0] > 0.06
    assert shares[1] < 0.05
    assert abs(np.mean(corrected)) < 0.6 * abs(np.mean(raw))


def test_optimism_is_that_of_the_bootstrap(table: pd.DataFrame) -> None:
    rows = table[table["guide"].isna()].sort_values(["gflop", "point"])
    values = -rows["alignment"].to_numpy()
    replicates = draw_replicates(values, np.full(len(values), 0.01), analysis.NUM_REPLICATES, 0)
    expected = corrected_running_minimum(values, replicates)[0, -1] - values.min()
    assert analysis._optimism(rows, "alignment", "gflop", 0.01) == pytest.approx(expected)
    assert expected > 0


@pytest.mark.slow
def test_equal_groups_are_rarely_called_different() -> None:
    verdicts = [
        comparison.verdict
        for seed in range(40)
        for comparison in compare_guides(measured(synthetic_guides(0.0), 0.012, seed), METRIC, "gflop", UNPAIRED)
    ]
    assert len(verdicts) == 160
    assert sum(verdict != NOT_SHOWN for verdict in verdicts) <= 12


# --- the best guide ---------------------------------------------------------------------------------------------------


def test_the_best_guide_of_each_network_is_the_planted_one(table: pd.DataFrame) -> None:
    best = best_guides(table, METRIC, "gflop", UNPAIRED)
    assert [(entry.size, entry.num_steps) for entry in best] == [(size, n) for size in ("0.8M", "3.2M") for n in (2, 4, 8, 16)]
    assert {entry.guide for entry in best} == {"0.8M@50000"}
    for entry in best:
        rows = table[(table["size"] == entry.size) & table["guide"].isna() & (table["gflop"] <= entry.cost)]
        assert entry.unguided is not None
        assert float(entry.unguided[0].split()[0]) == pytest.approx(rows[METRIC].min(), rel=0.01)
    assert [entry.difference.verdict for entry in best[:4] if entry.difference] == ["worse", "worse", "better", "better"], (
        "at few steps, more steps without guidance are better than guidance"
    )


def test_the_heat_map_has_the_planted_changes(table: pd.DataFrame) -> None:
    changes = {(change.size, change.guide): change for change in guide_changes(table, METRIC, "gflop")}
    assert list(changes) == [("0.8M", "0.8M@50000"), *(("3.2M", guide) for guide in guides_in_order(table))]
    plain = table[table["guide"].isna() & table["guidance_interval"].isna()]
    for (size, guide), change in changes.items():
        reference = plain.loc[plain["size"] == size, METRIC].min()
        assert change.change == pytest.approx(-GAIN * GUIDE_GAINS[guide] / reference)
        assert change.is_best == (guide == "0.8M@50000")
    heatmap = guide_heatmap(table, METRIC)
    (drawn,) = matplotlib_backend.draw_guide_heatmap(heatmap).axes[0].images
    charted = go.Figure(plotly_backend.plotly_guide_heatmap(heatmap))
    for values in (heatmap.percent, np.ma.filled(drawn.get_array(), np.nan), np.array(charted.data[0].z, dtype=float)):
        assert np.isnan(values[0, 1:]).all()
        assert values[1].tolist() == pytest.approx([100 * changes["3.2M", guide].change for guide in heatmap.guides])
    assert heatmap.best_columns == (0, 0)
    assert [shape.x0 for shape in charted.layout.shapes] == [-0.48, -0.48]
    assert "0.8M@50000" in charted.data[0].customdata[1][0]


def test_a_pair_without_a_reference_is_an_open_cell(table: pd.DataFrame) -> None:
    costly = table[table["guide"].notna() | (table["gflop"] > 61)]
    heatmap = guide_heatmap(costly, METRIC)
    assert (heatmap.text(0, 0), heatmap.text(0, 1)) == ("?", "")
    assert matplotlib_backend.draw_guide_heatmap(heatmap).axes
    assert not [entry for entry in best_guides(costly, METRIC, "gflop", UNPAIRED) if entry.size == "0.8M" and entry.unguided]


def test_changes_are_written_with_a_sign() -> None:
    assert [format_change(value) for value in (-23.4, 4.24, 9.96, 0.01, -0.01)] == ["−23 %", "+4.2 %", "+10 %", "0 %", "0 %"]


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", GUIDE_COSTS)
@pytest.mark.fast_cases(1)
def test_both_back_ends_draw_the_planted_frontiers(table: pd.DataFrame, cost: str) -> None:
    curves = guide_frontier(table, METRIC, cost)
    assert [series.label for series in curves.series] == list(WAYS)
    at_most = [series.y[series.x <= 1e9].min() for series in curves.series]
    assert at_most[3] - min(at_most[:3]) == pytest.approx(-GAIN)
    drawn = {line.get_label(): line.get_ydata() for line in figures.plot_guide_frontier(table, METRIC, cost).axes[0].lines}
    chart = guide_charts(table, METRIC, {}, lambda _: {})["guide_frontier"]
    charted = go.Figure(*chart.figures[f"{GUIDE_COSTS.index(cost)}|0"])
    for series in curves.series:
        np.testing.assert_array_equal(drawn[series.label], series.y)
        (trace,) = (trace for trace in charted.data if trace.name == series.label)
        np.testing.assert_array_equal(trace.y, series.y)


def test_figures_exist_only_with_guides(table: pd.DataFrame, tmp_path: Path) -> None:
    def saved(points: pd.DataFrame) -> list[str]:
        makers = figures.all_figures(points, METRIC, None, {}, [], [], {})
        return figures.FigureFiles(tmp_path, {name: make for name, make in makers.items() if name in expected}).names()

    expected = ["guide_frontier-gflop", "guide_heatmap-gflop"]
    every = figures.all_figures(table, METRIC, None, {}, [], [], {})
    assert {f"guide_{kind}-{cost}" for kind in ("frontier", "heatmap") for cost in GUIDE_COSTS} <= set(every)
    assert saved(table) == expected
    assert saved(table[table["guide"].isna()]) == []
    assert not list(tmp_path.iterdir()), "files of an earlier report are removed"


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_has_the_section_with_its_charts(table: pd.DataFrame, tmp_path: Path) -> None:
    page = written(tmp_path, table)
    sections = [attributes["id"] for tag, attributes in page.elements if tag == "section"]
    assert sections[sections.index("cost") + 1] == "guides"
    charts = json.loads(page.scripts["chart-data"])
    assert set(charts["guide_frontier"]["figures"]) == {f"{cost}|{metric}" for cost in range(6) for metric in range(2)}
    assert set(charts["guide_heatmap"]["figures"]) == set(charts["guide_frontier"]["figures"])
    assert charts["guide_heatmap"]["figures"]["0|0"][0]["layout"]["shapes"], "the frames of the best guides"
    for text in (QUESTION, "Which guide is best for each network?", "The best guide at each number of steps"):
        assert text in page.text
    costs = [attributes for tag, attributes in page.elements if attributes.get("name") == "guide_heatmap-Cost"]
    assert costs
    assert not any("data-cost" in attributes for attributes in costs), "the budget line of the slider would replace the frames"


@pytest.mark.slow
def test_a_table_without_guides_has_the_same_page_as_before(tmp_path: Path) -> None:
    """Empty columns of guides change neither the page nor the summary."""
    plain = synthetic_table(sizes=("0.2M", "0.8M"), num_steps=(2, 4))
    columns = ("guide", "guide_checkpoint", "guide_null_prompt", "guidance_interval", "guidance_schedule")
    empty = plain.assign(**dict.fromkeys(columns), guide_nfe=0.0)
    assert not has_guides(plain)
    assert not has_guides(empty)
    texts = []
    for name, points in (("plain", plain), ("empty", empty)):
        page = write_report(tmp_path / name, "synthetic", points, METRIC, {}, {}, {}, [], figure_formats=())
        texts.append(page.read_text(encoding="utf-8"))
    assert texts[0] == texts[1]
    assert 'id="guides"' not in texts[0]
    assert "guide_frontier" not in texts[0]
    assert markdown_summary(plain, METRIC, "synthetic") == markdown_summary(empty, METRIC, "synthetic")
    assert "guide" not in markdown_summary(plain, METRIC, "synthetic").replace("guidance", "")


@pytest.mark.slow
def test_names_of_guides_stay_text(table: pd.DataFrame, tmp_path: Path) -> None:
    hostile = table.replace({"guide": {"0.8M@50000": "<img src=x onerror=alert(1)> | *a*"}})
    page = written(tmp_path, hostile)
    assert not any("onerror" in attributes for _, attributes in page.elements)
    assert "<img src=x onerror=alert(1)> | *a*" in page.text
    (heatmap,) = json.loads(page.scripts["chart-data"])["guide_heatmap"]["figures"]["0|0"]
    assert "&lt;img" in heatmap["layout"]["xaxis"]["ticktext"][-1], "plotly reads names as markup"
    summary = read_markdown(markdown_summary(hostile, METRIC, "synthetic"))
    assert not any(tag == "img" for tag, _ in summary.tags)


def test_points_that_cannot_be_compared_have_one_line(table: pd.DataFrame, tmp_path: Path) -> None:
    only_guides = table[table["guide"].notna()]
    reason = "add `none` to sweep.guides"
    assert reason in written(tmp_path, only_guides).text
    assert f"{QUESTION} No answer yet: " in read_markdown(markdown_summary(only_guides, METRIC, "synthetic")).text


@pytest.mark.parametrize(
    ("select", "cost", "words"),
    [
        (lambda rows: rows, "normalized_cost", "does not count the passes of a guide; choose another cost of gflop"),
        (lambda rows: rows, "price", "no cost is called 'price'"),
        (lambda rows: rows[rows["guide"].isna()], "gflop", "list guides in sweep.guides"),
        (lambda rows: rows.drop(columns=["guide", "guide_checkpoint"])[rows["guide"].isna()], "gflop", "list guides"),
        (lambda rows: rows[rows["guide"].notna()], "gflop", "add `none` to sweep.guides"),
        (
            lambda rows: rows[rows["guide"].isna() | rows["guidance_interval"].notna()].assign(guide_nfe=0.0),
            "gflop",
            "widen sweep.guidance_intervals",
        ),
    ],
)
def test_wrong_requests_name_the_remedy(table: pd.DataFrame, select: Any, cost: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compare_guides(select(table), METRIC, cost, UNPAIRED)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
