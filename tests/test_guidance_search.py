"""Guidance searches (races) on synthetic curves: optimum, interval, number of images, boundaries; then races of a study."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from conftest import tiny_study
from isocost.config.model import ModelSpec, TextEncoderSpec
from isocost.config.sampling import SolverSpec
from isocost.config.sweep import PointSpec, RaceSpec
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.errors import ConfigError
from isocost.evaluation.bootstrap import check_resampled
from isocost.evaluation.confidence_intervals import generated_counts, mean_resamples
from isocost.evaluation.protocol import Protocol
from isocost.metrics.arrays import Array
from isocost.models.checkpoint import CheckpointInfo
from isocost.models.component_costs import ComponentCosts
from isocost.pipeline.dry_run import plan
from isocost.pipeline.merge import archive, merge
from isocost.pipeline.pipeline import Pipeline
from isocost.sweep.grid import SearchCell, search_cells
from isocost.sweep.guidance_search import (
    GuidanceSearch,
    SearchConfig,
    SearchResult,
    _Observations,
    grid_value,
    nearest_grid_index,
    search_guidance,
    search_options,
)
from isocost.sweep.guidance_search_runner import Candidate, dominated, rungs_for, tolerance_for
from isocost.sweep.schema import HARDWARE_COLUMNS

N = 8000
CONFIG = SearchConfig(rungs_for(N), 1.5, 8.0)


class SyntheticCurve:
    """Scores 1 + 0.4 log2(w / best)², a mean over images whose noise is mostly common to all values."""

    def __init__(
        self,
        best: float,
        seed: int,
        noise: float = 1.0,
        sign: float = 1.0,
        nonfinite_from: float = np.inf,
        minimum: float = 1.0,
    ) -> None:
        generator = np.random.default_rng(seed)
        self.best, self.sign, self.nonfinite_from, self.minimum = best, sign, nonfinite_from, minimum
        self.common, self.tilt = noise * generator.standard_normal((2, N))
        self.independent = {grid_value(index): 0.3 * noise * generator.standard_normal(N) for index in range(40)}

    def true_score(self, guidance: float) -> float:
        return self.minimum + 0.4 * np.log2(guidance / self.best) ** 2

    def score(self, guidance: float, num_images: int) -> np.ndarray:
        if guidance >= self.nonfinite_from:
            return np.full(101, np.inf)
        noise = self.common + 0.3 * self.tilt * np.log2(guidance) + self.independent[guidance]
        counts = generated_counts(num_images, 100, 0)
        return self.sign * mean_resamples(self.true_score(guidance) + noise[:num_images], counts)


def run(curve: SyntheticCurve, config: SearchConfig = CONFIG, start: int | None = None) -> SearchResult:
    return answer(search_guidance(config, start), [curve])


def answer(search: GuidanceSearch, curves: Sequence[SyntheticCurve]) -> SearchResult:
    """Run a search; its option k has the scores of curve k."""
    requests = next(search)
    while True:
        try:
            scores = {request: curves[request.option].score(request.guidance, request.num_images) for request in requests}
            requests = search.send(scores)
        except StopIteration as ended:
            return ended.value


def test_rungs_double_from_a_twentieth_to_a_half() -> None:
    assert rungs_for(10_000) == (500, 1000, 2000, 4000)
    assert rungs_for(100) == (32,)


@pytest.mark.parametrize("best", [1.3, 2.6, 5.0])
@pytest.mark.fast_cases(1)
def test_synthetic_optima_are_found_with_few_images_and_intervals_that_cover(best: float) -> None:
    results = [run(SyntheticCurve(best, seed)) for seed in range(60)]
    losses = np.array([SyntheticCurve(best, 0).true_score(result.guidance) - 1 for result in results])
    assert (losses <= 0.02).mean() >= 0.95
    # The grid rounds by up to half a grid step, a factor of 1.045.
    covered = [result.low / 1.045 <= best <= result.high * 1.045 for result in results]
    assert np.mean(covered) >= 0.85
    assert np.mean([result.num_images for result in results]) + N < 8 * N / 4
    assert all(result.num_images == sum(result.images_by_guidance.values()) for result in results)


def test_more_noise_takes_more_images_and_is_reported() -> None:
    quiet, loud = run(SyntheticCurve(2.6, 3, noise=0.2)), run(SyntheticCurve(2.6, 3, noise=60.0))
    assert quiet.num_images < loud.num_images
    assert quiet.is_decided
    assert quiet.high / quiet.low < loud.high / loud.low
    assert not loud.is_decided
    assert loud.regret > CONFIG.tolerance


def test_a_start_near_the_optimum_saves_images() -> None:
    curve = SyntheticCurve(1.3, 5)
    assert run(curve, start=nearest_grid_index(1.3)).num_images < run(curve, start=nearest_grid_index(8.0)).num_images


def test_higher_is_better_is_the_same_race_with_the_opposite_sign() -> None:
    higher = SearchConfig(CONFIG.rungs, CONFIG.low, CONFIG.high, higher_is_better=True)
    first, second = run(SyntheticCurve(2.6, 1)), run(SyntheticCurve(2.6, 1, sign=-1.0), higher)
    assert (first.guidance, first.low, first.high) == (second.guidance, second.low, second.high)


def test_a_race_may_leave_the_range_and_warns() -> None:
    narrow = SearchConfig(CONFIG.rungs, 1.5, 3.0)
    outside = run(SyntheticCurve(4.6, 2), narrow)
    assert abs(nearest_grid_index(outside.guidance) - nearest_grid_index(4.6)) <= 1
    assert "outside 1.5 to 3" in outside.warnings[0]
    at_boundary = run(SyntheticCurve(30.0, 2), narrow)
    assert at_boundary.guidance == grid_value(narrow.max_index)
    assert "upper end of the grid" in at_boundary.warnings[0]
    not_extended = SearchConfig(CONFIG.rungs, 1.0, 6.0, min_index=0, max_extension=0)
    assert run(SyntheticCurve(30.0, 2), not_extended).guidance <= 6.0


def test_guidance_with_nonfinite_images_is_dropped() -> None:
    result = run(SyntheticCurve(2.6, 4, nonfinite_from=3.5))
    assert abs(nearest_grid_index(result.guidance) - nearest_grid_index(2.6)) <= 2


def test_a_race_refuses_metrics_without_resamples() -> None:
    check_resampled("frechet_efficientnet")
    with pytest.raises(ConfigError, match="the guidance search cannot use it"):
        check_resampled("frechet_infinity_efficientnet")


# --- guides and intervals against each other -----------------------------------------------------------------------


def race_options(curves: Sequence[SyntheticCurve]) -> SearchResult:
    return answer(search_options(CONFIG, [CONFIG.initial_indices(None) for _ in curves]), curves)


@pytest.mark.slow
def test_the_best_of_several_guides_is_found_at_its_best_guidance_with_few_images() -> None:
    minima, optima = (1.3, 1.0, 1.02, 1.6), (1.6, 4.0, 2.0, 7.0)
    losses, num_images = [], []
    for seed in range(60):
        # The images of one option share most of their noise, and so do those of all options.
        curves = [SyntheticCurve(best, seed, minimum=low) for best, low in zip(optima, minima, strict=True)]
        result = race_options(curves)
        losses.append(curves[result.option].true_score(result.guidance) - min(minima))
        num_images.append(result.num_images)
        assert result.num_images == sum(sum(images.values()) for images in result.tried.values())
        assert set(result.tried) == {0, 1, 2, 3}
        assert result.images_by_guidance == result.tried[result.option]
    assert np.mean(np.array(losses) <= 0.03) >= 0.95
    assert np.mean(num_images) < 0.1 * 4 * 16 * N


def test_an_option_that_is_shown_to_be_worse_gets_no_more_images() -> None:
    curves = [SyntheticCurve(2.6, 0, minimum=1.0), SyntheticCurve(2.6, 0, minimum=3.0)]
    result = race_options(curves)
    assert result.option == 0
    assert set(result.tried[1].values()) == {CONFIG.rungs[0]}


def test_one_option_alone_is_the_race_of_one_curve() -> None:
    curve = SyntheticCurve(2.6, 1)
    alone, joint = run(curve), race_options([curve])
    assert (joint.guidance, joint.low, joint.high) == (alone.guidance, alone.low, alone.high)
    assert joint.num_images == alone.num_images


def test_options_without_finite_images_lose() -> None:
    curves = [SyntheticCurve(2.6, 0, minimum=0.1, nonfinite_from=0.0), SyntheticCurve(2.6, 0)]
    assert race_options(curves).option == 1


def test_equal_options_are_reported_as_decided() -> None:
    result = race_options([SyntheticCurve(2.6, 0, noise=0.2), SyntheticCurve(2.6, 0, noise=0.2)])
    assert result.is_decided


# --- which cells are scored -------------------------------------------------------------------------------------------


def candidate(size: str, gflop: float, num_steps: int, score: float, seed: int = 0, decoder: float = 1.0) -> Candidate:
    protocol = Protocol(1000, 1000, 32, "synthetic", "synthetic", "synthetic", "none", 100, 0)
    spec = PointSpec(checkpoint=size, solver=SolverSpec(), num_steps=num_steps, guidance=2.0, num_images=1000)
    cell = SearchCell(spec, spec, (2.0, 4.0), protocol, "mmd_efficientnet", RaceSpec(), is_two_pass=True)
    info = CheckpointInfo(
        model=ModelSpec(width=8),
        size=size,
        num_parameters=1,
        images_seen=1,
        gflop_per_forward=gflop,
        normalized_cost_per_step=gflop,
        prediction_type="epsilon",
        autoencoder="",
        text_encoder=TextEncoderSpec(),
        resolution=32,
        run="",
    )
    noise = np.random.default_rng(seed).standard_normal(1000)

    def scores(n: int) -> Array:
        return mean_resamples(score + 0.5 * noise[:n], generated_counts(n, 100, 0))

    return Candidate(cell, info, None, 2.0, scores, 1000, ComponentCosts(1.0, 0.0, decoder))


def test_cells_that_a_cheaper_cell_beats_are_dominated_and_no_others() -> None:
    small, more_steps = candidate("small", 1, 4, 1.0), candidate("small", 1, 8, 1.2)
    large, best = candidate("large", 4, 4, 1.1), candidate("large", 4, 8, 0.9)
    reasons = dominated([small, more_steps, large, best], 0.99)
    assert set(reasons) == {more_steps.cell.digest, large.cell.digest}
    assert "small, ddim 4 steps" in reasons[large.cell.digest]
    near = candidate("large", 4, 4, 1.001, seed=1)
    assert dominated([small, near], 0.99) == {}  # the interval of their difference contains 0
    with_costly_decoder = candidate("small", 1, 4, 1.0, decoder=30.0)
    assert not dominated([with_costly_decoder, large], 0.99), "its whole image costs more: 8 + 1 + 30, not 32 + 2 GFLOP"


# --- a study that races -----------------------------------------------------------------------------------------------

SWEEP: dict[str, Any] = {
    "num_steps": [1, 2],
    "guidance": [1, 1.5, 4],
    "batch_size": 16,
    "shard_size": 16,
    "snapshot_num_steps": 2,
    "snapshot_guidance": 2,
    "search": "race",
    "race": {"rungs": [16, 32]},
}
SMALL: dict[str, Any] = {"family": {"widths": [8]}, "train": {"num_images": 64, "batch_size": 16, "lr": 1e-3}}


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    pipeline = Pipeline(tiny_study(sweep=SWEEP, **SMALL), tmp_path_factory.mktemp("raced"))
    assert pipeline.run()
    return pipeline


def test_a_race_ends_in_points_with_fresh_noise(raced: Pipeline) -> None:
    races, table = raced.results_db.races(), raced.results_db.table()
    assert len(races) == 4  # two numbers of steps, one pass and two passes
    scored = {row["point"] for row in races.values() if row["dominated_by"] is None}
    assert scored
    assert set(table["point"]) == scored
    assert set(table["seed"]) == {0}
    assert set(table["num_images"]) == {32}
    for row in races.values():
        images_by_guidance = json.loads(row["images_by_guidance"])
        assert row["num_images"] == sum(images_by_guidance.values())
        assert row["guidance_low"] <= row["guidance"] <= row["guidance_high"]


def without_times(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(columns=HARDWARE_COLUMNS)


@pytest.mark.slow
def test_another_shard_size_and_a_second_run_change_nothing(raced: Pipeline, tmp_path: Path) -> None:
    study = tiny_study(sweep={**SWEEP, "shard_size": 7}, **SMALL)
    other = Pipeline(study, tmp_path)
    assert other.run()
    assert other.results_db.races() == raced.results_db.races()
    pd.testing.assert_frame_equal(without_times(other.results_db.table()), without_times(raced.results_db.table()))
    again = Pipeline(study, tmp_path)
    assert again.run()
    assert again.results_db.races() == raced.results_db.races()


@pytest.mark.slow
def test_a_stopped_race_resumes(raced: Pipeline, tmp_path: Path) -> None:
    study, num_stops = tiny_study(sweep=SWEEP, **SMALL), 0
    while not Pipeline(study, tmp_path).run(deadline=0.0 if num_stops < 1 else None):
        num_stops += 1
    assert num_stops == 1
    assert Pipeline(study, tmp_path).results_db.races() == raced.results_db.races()


@pytest.mark.slow
def test_an_archive_resumes_elsewhere_without_new_images(raced: Pipeline, tmp_path: Path) -> None:
    archived = archive(raced.out, tmp_path / "archive")
    assert archived == archive(raced.out, tmp_path / "archive")
    assert not (tmp_path / "archive" / "artefacts" / "point").exists()
    merge(tmp_path / "out", [tmp_path / "archive"])
    again = Pipeline(raced.study, tmp_path / "out")
    total = plan(again)["total"]
    assert total["points_to_make"] == total["images_of_races"] == 0
    assert again.run()
    assert again.results_db.races() == raced.results_db.races()
    pd.testing.assert_frame_equal(again.results_db.table(), raced.results_db.table())
    assert not list((tmp_path / "out" / "artefacts").glob("point/*"))
    assert not list((tmp_path / "out" / "artefacts").glob("run/*"))
    with pytest.raises(ConfigError, match=r"train\.lr"):
        archive(raced.out, archive_of_another_study(tmp_path))


def archive_of_another_study(root: Path) -> Path:
    study = tiny_study(sweep=SWEEP, **{**SMALL, "train": {**SMALL["train"], "lr": 2e-3}})
    assert Pipeline(study, root / "other").run()
    archive(root / "other", root / "other-archive")
    return root / "other-archive"


def test_a_range_that_begins_at_one_pass_is_searched_completely() -> None:
    def ranges(guidance: list[float], embeds: bool = False) -> list[tuple[float, ...]]:
        study = tiny_study(sweep={**SWEEP, "num_steps": [2], "guidance": guidance}, **SMALL)
        protocol = Protocol(32, 32, 32, "extractor", "reference", "captions", "none", 100, 0)
        schedule = NoiseSchedule.scaled_linear()
        cells = search_cells("checkpoint", study.sweep, study.protocol, protocol, "mmd", embeds, schedule)
        return [cell.guidance for cell in cells]

    assert ranges([1, 6]) == [(1,), (1.09, 6)]
    assert ranges([1, 1.5, 6]) == [(1,), (1.5, 6)]
    assert ranges([4]) == [(4,)]
    assert ranges([1, 6], embeds=True) == [(1, 6)]


def test_bad_races_are_one_line() -> None:
    with pytest.raises(ConfigError, match=r"race\.seed"):
        tiny_study(sweep={**SWEEP, "seed": 1})
    with pytest.raises(ConfigError, match="needs guidance of 1 or more"):
        tiny_study(sweep={**SWEEP, "guidance": [0, 2]})
    with pytest.raises(ConfigError, match="rungs must rise"):
        tiny_study(sweep={**SWEEP, "race": {"rungs": [64, 32]}})


def test_the_tolerance_follows_the_precision_of_the_scores() -> None:
    assert tolerance_for(5000) == 0.015
    assert tolerance_for(20_000) == pytest.approx(0.0075)
    assert tolerance_for(100) == 0.05


def test_a_rung_keeps_the_better_half() -> None:
    observations = _Observations(CONFIG, active=set(range(8)))
    scores = (3.0, 1.0, 2.0, 5.0, 4.0, 6.0, 7.0, 8.0)
    noise = [np.array([0.0, 20.0 * index, -20.0 * index]) for index in range(len(scores))]
    observations.losses = {index: {CONFIG.rungs[0]: score + noise[index]} for index, score in enumerate(scores)}
    survivors = observations.survivors()
    assert {1, 2, 0, 4} <= survivors
    assert len(survivors) <= 5
