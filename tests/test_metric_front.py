"""Two metrics at once: the front is the set of points that no other point beats by both."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from conftest import assert_refused
from isocost.analysis.metric_front import metric_front, second_metrics
from isocost.analysis.pareto import default_budgets
from isocost.errors import ConfigError
from isocost.report.chart_panels import CHARTS
from isocost.report.matplotlib_backend import draw_curves
from isocost.report.plot_data_metrics import metric_front_curves
from isocost.report.plotly_backend import plotly_curves
from synthetic_results import synthetic_table

METRIC, OTHER = "mmd_efficientnet", "alignment"


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """The synthetic study with an alignment of its own: it rises with guidance, while the distance has an optimum at 2."""
    rows = synthetic_table(guidance=(1.0, 2.0, 4.0, 8.0))
    alignment = 0.5 + 0.1 * np.log2(rows["guidance"]) + 0.02 * np.log2(rows["num_parameters"] / 2e5)
    return rows.assign(alignment=alignment, alignment_low=alignment - 0.01, alignment_high=alignment + 0.01)


@pytest.mark.parametrize(("cost", "budget"), [("gflop", 5.0), ("nfe", 16.0), ("images_per_hour", 100_000.0)])
def test_no_point_within_the_budget_beats_the_front_and_every_other_point_is_beaten(
    table: pd.DataFrame, cost: str, budget: float
) -> None:
    front = metric_front(table, METRIC, OTHER, cost, budget)
    finals = table[table["is_final"]]
    fits = finals[finals["ms_per_image"] <= 3.6e6 / budget] if cost == "images_per_hour" else finals[finals[cost] <= budget]
    assert 2 <= len(front) < len(fits)

    def beats(one: pd.Series, two: pd.Series) -> bool:
        at_least = one[METRIC] <= two[METRIC] and one[OTHER] >= two[OTHER]
        return bool(at_least and (one[METRIC] < two[METRIC] or one[OTHER] > two[OTHER]))

    on_front = [row for _, row in front.iterrows()]
    assert not any(beats(one, two) for one, two in itertools.permutations(on_front, 2))
    for _, row in fits[~fits["point"].isin(front["point"])].iterrows():
        equal = ((front[METRIC] == row[METRIC]) & (front[OTHER] == row[OTHER])).any()
        assert equal or any(beats(one, row) for one in on_front)
    assert list(front[METRIC]) == sorted(front[METRIC])
    assert list(front[OTHER]) == sorted(front[OTHER]), "worse by one metric, better by the other"
    assert front["point"].iloc[0] in set(fits.loc[fits[METRIC] == fits[METRIC].min(), "point"])


def test_two_metrics_of_which_lower_is_better(table: pd.DataFrame) -> None:
    front = metric_front(table, METRIC, "frechet_efficientnet", "nfe", 16.0)
    assert len(front) == 1, "both are the same function of the points"


def test_equal_points_are_listed_once(table: pd.DataFrame) -> None:
    one_solver = table[table["solver"] == table["solver"].iloc[0]]
    copies = one_solver.assign(point="f" + one_solver["point"].str[1:], solver="euler/trailing")
    both = pd.concat([table, copies], ignore_index=True)
    once, twice = (metric_front(rows, METRIC, OTHER, "nfe", 16.0) for rows in (table, both))
    assert list(once[METRIC]) == list(twice[METRIC])


def test_the_second_metric_of_a_report_is_of_preference_or_alignment(table: pd.DataFrame) -> None:
    assert second_metrics(table, METRIC) == [OTHER]
    assert second_metrics(table.assign(clip_score_l14=0.3, hpsv2=np.nan), METRIC) == ["clip_score_l14", OTHER]
    assert second_metrics(table, OTHER) == []


def test_the_figure_has_a_line_for_each_budget(table: pd.DataFrame) -> None:
    curves = metric_front_curves(table, METRIC)
    budgets = default_budgets(table, "gflop", 4)
    assert len(curves.series) == len(budgets)
    for series, budget in zip(curves.series, budgets, strict=True):
        front = metric_front(table, METRIC, OTHER, "gflop", budget)
        assert sorted(series.y) == sorted(front[METRIC])
        assert list(series.x) == sorted(front[OTHER])
    drawn = draw_curves(curves).axes[0]
    labels = [text.get_text() for text in drawn.get_legend().get_texts()]
    assert labels == [series.label for series in curves.series]
    figure = go.Figure(plotly_curves(curves))
    assert [trace.name for trace in figure.data] == labels


def test_the_chart_has_every_second_metric_and_cost(table: pd.DataFrame) -> None:
    clip = {"clip_score_b32": table[OTHER], "clip_score_b32_low": 0.0, "clip_score_b32_high": 1.0}
    chart = CHARTS["metric_front"](table.assign(**clip), METRIC, {}, lambda _: {})
    assert chart.controls[0].choices == ("CLIP score", "prompt alignment")
    assert len(chart.figures) == 2 * len(chart.controls[1].choices)


def test_without_a_second_metric_there_is_no_figure(table: pd.DataFrame) -> None:
    with pytest.raises(ConfigError, match="there is no second metric"):
        metric_front_curves(table.drop(columns=OTHER), METRIC)


def test_the_command_lists_the_front(table: pd.DataFrame, tmp_path: Path, isocost: Any) -> None:
    table.to_parquet(tmp_path / "table.parquet")
    outcome = isocost("recommend", tmp_path, "--budget-nfe", 16, "--front", OTHER)
    assert outcome.status == 0, outcome.err
    front = metric_front(table, METRIC, OTHER, "nfe", 16.0)
    assert [row["point"] for row in outcome.answer["front"]] == list(front["point"])
    assert outcome.err.count("prompt alignment 0.") == len(front)


def test_requirements_have_a_sign(table: pd.DataFrame, tmp_path: Path, isocost: Any) -> None:
    table.to_parquet(tmp_path / "table.parquet")
    answers = [
        isocost("recommend", tmp_path, "--budget-nfe", 16, "--require", text).answer["configuration"]
        for text in ("alignment=0.7", "alignment>=0.7", "alignment >= 0.7")
    ]
    assert answers[0] == answers[1] == answers[2]
    assert_refused(isocost("recommend", tmp_path, "--budget-nfe", 16, "--require", "alignment<=0.7"), 'give "alignment>=0.7"')
    assert_refused(isocost("recommend", tmp_path, "--budget-nfe", 16, "--require", "alignment>0.7"), "in quotes")


@pytest.mark.parametrize(
    ("other", "budget", "message"),
    [
        (
            "clip_score_l14",
            16,
            "no point has clip_score_l14 along with mmd_efficientnet; second metrics of this",
        ),
        ("nonsense", 16, "nonsense"),
        (METRIC, 16, "a front needs two metrics"),
        (OTHER, 0.001, "is below every point"),
    ],
)
def test_wrong_fronts_are_one_line(
    table: pd.DataFrame, other: str, budget: float, message: str, tmp_path: Path, isocost: Any
) -> None:
    table.to_parquet(tmp_path / "table.parquet")
    assert_refused(isocost("recommend", tmp_path, "--budget-nfe", budget, "--front", other), message)
