"""Fresh images where a budget is undecided: the boundary, the order of the batches, and a study that spends them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from conftest import assert_refused, plain_study
from isocost.analysis.until_decided import LOOKS, boundary, critical_value, decide_with_batches
from isocost.cli.study import Contests
from isocost.config.base import parse_spec
from isocost.config.study import StudySpec
from isocost.errors import ConfigError
from isocost.metrics.arrays import Array
from isocost.pipeline import until_decided
from isocost.pipeline.merge import merge
from isocost.pipeline.pipeline import Pipeline
from isocost.pipeline.until_decided import FIRST_SEED, decide_budgets
from isocost.report.build import report
from isocost.sweep.results_db import ResultsDB
from isocost.training.trainer import DeadlineReached

NUM_RESAMPLES = 400


def draw_of(difference: float, seed: int = 0, shared_error: float = 0.0) -> Any:
    """Batches whose difference has a standard error of 1, of which `shared_error` is the same in all batches."""
    generator = np.random.default_rng(seed)
    shared = shared_error * generator.standard_normal(NUM_RESAMPLES + 1)
    numbers = []

    def draw(number: int) -> tuple[Array, Array]:
        numbers.append(number)
        own = np.sqrt(1 - shared_error**2) * generator.standard_normal(NUM_RESAMPLES)
        value = difference + np.sqrt(1 - shared_error**2) * generator.standard_normal() + shared[0]
        return np.concatenate([[value], value + own + shared[1:]]), np.zeros(NUM_RESAMPLES + 1)

    draw.numbers = numbers  # type: ignore[attr-defined]
    return draw


@pytest.mark.parametrize(("looks", "published"), [((1,), 1.960), ((1, 2), 2.178), ((1, 2, 3), 2.289), ((1, 2, 3, 4, 5), 2.413)])
def test_the_boundary_is_that_of_pocock(looks: tuple[int, ...], published: float) -> None:
    assert boundary(looks) == pytest.approx(published, abs=0.015)


def test_few_resamples_widen_the_interval() -> None:
    """The standard error of a difference is itself an estimate."""
    exact = boundary(LOOKS)
    assert critical_value(10**6) == pytest.approx(exact, rel=1e-3)
    assert critical_value(20) > 1.1 * exact
    assert critical_value(200, 0.025) > critical_value(200, 0.05)


@pytest.mark.parametrize("max_batches", [1, 5, 16])
def test_fewer_batches_keep_the_boundary_of_all_looks(max_batches: int) -> None:
    """So a call with more batches can continue it, and the probability of a false decision stays."""
    decision = decide_with_batches(draw_of(0.0), True, max_batches)
    assert decision.outcome == "open"
    assert decision.num_batches == max(look for look in LOOKS if look <= max_batches)
    error = (decision.difference.high - decision.difference.low) / 2 / critical_value(NUM_RESAMPLES)
    assert error == pytest.approx(1 / np.sqrt(decision.num_batches), rel=0.25)


def test_equal_configurations_are_told_apart_in_at_most_five_percent() -> None:
    outcomes = [decide_with_batches(draw_of(0.0, seed), True, 16).outcome for seed in range(400)]
    assert np.mean([outcome != "open" for outcome in outcomes]) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400)


@pytest.mark.parametrize("lower_is_better", [True, False])
def test_the_better_configuration_is_named_whichever_comes_first(lower_is_better: bool) -> None:
    for difference in (-6.0, 6.0):
        decision = decide_with_batches(draw_of(difference), lower_is_better, 16)
        assert decision.outcome == ("first" if (difference < 0) == lower_is_better else "second")
        assert decision.num_batches == 1
        assert decision.difference.low < difference < decision.difference.high


def test_batches_are_drawn_once_and_no_more_than_needed() -> None:
    draw = draw_of(-1.3, seed=3)
    decision = decide_with_batches(draw, True, 16)
    assert draw.numbers == list(range(decision.num_batches))
    assert decision.outcome == "first"
    assert 1 < decision.num_batches < 16


def test_an_error_that_all_batches_share_does_not_shrink() -> None:
    """Reference images are the same in every batch: more of them cannot decide a difference within their error."""
    decision = decide_with_batches(draw_of(-1.0, seed=1, shared_error=0.9), True, 16)
    assert decision.outcome == "open"
    assert decision.num_batches == 16
    assert decision.difference.high - decision.difference.low > 2 * 0.9 * boundary(LOOKS) * 0.8


# --- a study ----------------------------------------------------------------------------------------------------------

CHANGES: dict[str, Any] = {
    "family": {"widths": [4, 8]},
    "train": {"num_images": 32, "batch_size": 16, "lr": 1e-3, "snapshots": []},
    "sweep": {"num_steps": [1], "guidance": [1], "batch_size": 16, "shard_size": 32},
    "protocol": {"num_images": 32, "num_reference": 64, "num_bootstrap": 40},
}
BUDGET = 1.0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    out = tmp_path_factory.mktemp("decided") / "out"
    pipeline = Pipeline(parse_spec(StudySpec, plain_study(**CHANGES), "tiny"), out)
    assert pipeline.run()
    return pipeline


def again(pipeline: Pipeline) -> Pipeline:
    return Pipeline(pipeline.study, pipeline.out)


@pytest.mark.slow
def test_fresh_batches_are_points_that_the_report_does_not_show(finished: Pipeline) -> None:
    before = finished.results_db.table()
    report(finished, figure_formats=())
    (text,) = decide_budgets(again(finished), [BUDGET], "nfe", max_batches=2)
    after = finished.results_db.table()
    fresh = after[~after["point"].isin(before["point"])]
    assert set(fresh["seed"]) <= {FIRST_SEED, FIRST_SEED + 1}
    assert set(fresh["task"]) == {"fresh-batch"}
    assert set(fresh["checkpoint"]) == set(before["checkpoint"]), "the two sizes"
    assert len(fresh) == 2 * fresh["seed"].nunique()
    assert f"within {BUDGET:g} network evaluations per image: " in text
    assert f"{32 * fresh['seed'].nunique()} fresh images of each" in text
    written = report(again(finished), figure_formats=())
    assert set(written.table["point"]) == set(before["point"])
    page = written.page.read_text(encoding="utf-8")
    assert "Decided with fresh images" in page
    assert text.split(":")[1][:20] in page


@pytest.mark.slow
def test_a_second_call_samples_nothing_and_says_the_same(finished: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    first = decide_budgets(again(finished), [BUDGET], "nfe", max_batches=2)
    monkeypatch.setattr(Pipeline, "score_fresh", lambda *_, **__: pytest.fail("the batches are recorded"))
    assert decide_budgets(again(finished), [BUDGET], "nfe", max_batches=2) == first


@pytest.mark.slow
def test_decisions_are_merged(finished: Pipeline, tmp_path: Path) -> None:
    (text,) = decide_budgets(again(finished), [BUDGET], "nfe", max_batches=1)
    merge(tmp_path / "merged", [finished.out])
    assert [row["text"] for row in ResultsDB(tmp_path / "merged" / "results.sqlite").decisions("mmd_efficientnet")] == [text]


@pytest.mark.slow
def test_a_deadline_keeps_the_finished_batches(finished: Pipeline) -> None:
    pipeline = again(finished)
    monotonic_past = 0.0
    recorded = len(pipeline.recorded_points())
    with pytest.raises(DeadlineReached, match="the same command continues"):
        decide_budgets(pipeline, [BUDGET], "nfe", max_batches=16, deadline=monotonic_past)
    assert len(pipeline.recorded_points()) == recorded


@pytest.mark.slow
def test_wrong_budgets_are_one_line(finished: Pipeline) -> None:
    with pytest.raises(ConfigError, match=r"a budget of 0\.5 network evaluations per image is below every point"):
        decide_budgets(again(finished), [0.5], "nfe")
    with pytest.raises(ConfigError, match="no final point has a measured latency_ms"):
        decide_budgets(again(finished), [1.0], "latency_ms")
    cheapest = finished.results_db.table()["gflop_denoiser"].min()
    with pytest.raises(ConfigError, match="only one size fits within"):
        decide_budgets(again(finished), [float(cheapest)], "gflop_denoiser")
    small = finished.runs[0].final
    finished.store.remove("checkpoint", small)
    until_decided.FIRST_SEED += 100
    with pytest.raises(ConfigError, match=f"no checkpoint {small}"):
        decide_budgets(again(finished), [BUDGET], "nfe")
    until_decided.FIRST_SEED -= 100


@pytest.mark.slow
def test_the_command_decides_after_the_run(tmp_path: Path, isocost: Any) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(plain_study(**CHANGES)), encoding="utf-8")
    arguments = ("--until-decided", 1, "--decided-cost", "nfe", "--max-batches", 1, "--no-figures")
    outcome = isocost("run", file, "--out", tmp_path / "out", *arguments)
    assert outcome.status == 0, outcome.err
    assert "within 1 network evaluations per image: " in outcome.err
    assert outcome.answer["finished"]
    assert "Decided with fresh images" in (tmp_path / "out" / "report" / "index.html").read_text(encoding="utf-8")


def test_options_without_a_budget_are_refused(tmp_path: Path, isocost: Any) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(plain_study(**CHANGES)), encoding="utf-8")
    outcome = isocost("run", file, "--out", tmp_path / "out", "--max-batches", 2)
    assert_refused(outcome, "need --until-decided BUDGET")
    assert_refused(isocost("run", file, "--out", tmp_path / "out", "--until-decided", -1), "--until-decided -1")
    assert not (tmp_path / "out").exists()
    assert Contests().budgets == ()
