"""Races on planted curves: the optimum, its interval, the images spent, edges; then races of a study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from conftest import tiny_study
from isocost.config.model import ModelSpec, TextEncoderSpec
from isocost.config.sampling import SolverSpec
from isocost.config.sweep import PointSpec, RaceSpec
from isocost.errors import ConfigError
from isocost.evaluation.bootstrap import check_resampled
from isocost.evaluation.confidence_intervals import generated_counts, mean_resamples
from isocost.evaluation.protocol import Protocol
from isocost.models.checkpoint import CheckpointInfo
from isocost.pipeline.dry_run import plan
from isocost.pipeline.merge import archive, merge
from isocost.pipeline.pipeline import Pipeline
from isocost.sweep.grid import SearchCell, search_cells
from isocost.sweep.guidance_search import Found, SearchConfig, _Observations, nearest_grid_index, race, value_at
from isocost.sweep.guidance_search_runner import Candidate, rungs_for, stopped, tolerance_for
from isocost.sweep.schema import HARDWARE_COLUMNS

N = 8000
RULES = SearchConfig(rungs_for(N), 1.5, 8.0)


class Planted:
    """Scores 1 + 0.4 log2(w / best)², a mean over images whose noise is mostly shared by all values."""

    def __init__(self, best: float, seed: int, noise: float = 1.0, sign: float = 1.0, broken_from: float = np.inf) -> None:
        generator = np.random.default_rng(seed)
        self.best, self.sign, self.broken_from = best, sign, broken_from
        self.shared, self.tilt = noise * generator.standard_normal((2, N))
        self.own = {value_at(place): 0.3 * noise * generator.standard_normal(N) for place in range(40)}

    def truth(self, guidance: float) -> float:
        return 1 + 0.4 * np.log2(guidance / self.best) ** 2

    def score(self, guidance: float, num_images: int) -> np.ndarray:
        if guidance >= self.broken_from:
            return np.full(101, np.inf)
        moved = self.shared + 0.3 * self.tilt * np.log2(guidance) + self.own[guidance]
        counts = generated_counts(num_images, 100, 0)
        return self.sign * mean_resamples(self.truth(guidance) + moved[:num_images], counts)


def run(planted: Planted, rules: SearchConfig = RULES, start: int | None = None) -> Found:
    running = race(rules, start)
    wishes = next(running)
    while True:
        try:
            wishes = running.send({wish: planted.score(wish.guidance, wish.num_images) for wish in wishes})
        except StopIteration as ended:
            return ended.value


def test_rungs_double_from_a_twentieth_to_a_half() -> None:
    assert rungs_for(10_000) == (500, 1000, 2000, 4000)
    assert rungs_for(100) == (32,)


@pytest.mark.parametrize("best", [1.3, 2.6, 5.0])
def test_planted_optima_are_found_with_few_images_and_intervals_that_cover(best: float) -> None:
    found = [run(Planted(best, seed)) for seed in range(60)]
    lost = np.array([Planted(best, 0).truth(one.guidance) - 1 for one in found])
    assert (lost <= 0.02).mean() >= 0.95
    # Half a place of the ladder is what its rounding hides.
    covered = [one.low / 1.045 <= best <= one.high * 1.045 for one in found]
    assert np.mean(covered) >= 0.85
    assert np.mean([one.num_images for one in found]) + N < 8 * N / 4
    assert all(one.num_images == sum(one.images_at.values()) for one in found)


def test_more_noise_takes_more_images_and_is_told() -> None:
    quiet, loud = run(Planted(2.6, 3, noise=0.2)), run(Planted(2.6, 3, noise=60.0))
    assert quiet.num_images < loud.num_images
    assert quiet.is_decided
    assert quiet.high / quiet.low < loud.high / loud.low
    assert not loud.is_decided
    assert loud.regret > RULES.tolerance


def test_a_start_near_the_optimum_saves_images() -> None:
    planted = Planted(1.3, 5)
    assert run(planted, start=nearest_grid_index(1.3)).num_images < run(planted, start=nearest_grid_index(8.0)).num_images


def test_higher_is_better_is_the_same_race_upside_down() -> None:
    up = SearchConfig(RULES.rungs, RULES.low, RULES.high, higher_is_better=True)
    one, other = run(Planted(2.6, 1)), run(Planted(2.6, 1, sign=-1.0), up)
    assert (one.guidance, one.low, one.high) == (other.guidance, other.low, other.high)


def test_beyond_the_range_the_ladder_goes_on_and_says_so() -> None:
    narrow = SearchConfig(RULES.rungs, 1.5, 3.0)
    found = run(Planted(4.6, 2), narrow)
    assert abs(nearest_grid_index(found.guidance) - nearest_grid_index(4.6)) <= 1
    assert "outside 1.5 to 3" in found.warnings[0]
    end = run(Planted(30.0, 2), narrow)
    assert end.guidance == value_at(narrow.last_place)
    assert "end of the ladder" in end.warnings[0]
    assert run(Planted(30.0, 2), SearchConfig(RULES.rungs, 1.0, 6.0, lowest_place=0, beyond=0)).guidance <= 6.0


def test_guidance_that_breaks_images_is_dropped() -> None:
    found = run(Planted(2.6, 4, broken_from=3.5))
    assert abs(nearest_grid_index(found.guidance) - nearest_grid_index(2.6)) <= 2


def test_metrics_without_resamples_cannot_be_raced_by() -> None:
    check_resampled("frechet_efficientnet")
    with pytest.raises(ConfigError, match="nothing can be raced by it"):
        check_resampled("frechet_infinity_efficientnet")


# --- which cells are scored -------------------------------------------------------------------------------------------


def contender(size: str, gflop: float, num_steps: int, score: float, seed: int = 0) -> Candidate:
    protocol = Protocol(1000, 1000, 32, "planted", "planted", "planted", "none", 100, 0)
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
    return Candidate(cell, info, 2.0, lambda n: mean_resamples(score + 0.5 * noise[:n], generated_counts(n, 100, 0)), 1000)


def test_cells_that_a_cheaper_one_beats_are_stopped_and_no_others() -> None:
    small, more_steps = contender("small", 1, 4, 1.0), contender("small", 1, 8, 1.2)
    large, best = contender("large", 4, 4, 1.1), contender("large", 4, 8, 0.9)
    reasons = stopped([small, more_steps, large, best], 0.99)
    assert set(reasons) == {more_steps.cell.digest, large.cell.digest}
    assert "small, ddim 4 steps" in reasons[large.cell.digest]
    near = contender("large", 4, 4, 1.001, seed=1)
    assert stopped([small, near], 0.99) == {}  # their interval holds 0


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


def test_a_race_ends_in_points_of_their_own_noise(raced: Pipeline) -> None:
    races, table = raced.results_db.races(), raced.results_db.table()
    assert len(races) == 4  # two numbers of steps, one pass and two
    with_metric = {row["point"] for row in races.values() if row["stopped"] is None}
    assert with_metric
    assert set(table["point"]) == with_metric
    assert set(table["seed"]) == {0}
    assert set(table["num_images"]) == {32}
    for row in races.values():
        drawn = json.loads(row["images_at"])
        assert row["num_images"] == sum(drawn.values())
        assert row["guidance_low"] <= row["guidance"] <= row["guidance_high"]


def without_times(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(columns=HARDWARE_COLUMNS)


def test_shards_of_another_size_and_a_second_look_change_nothing(raced: Pipeline, tmp_path: Path) -> None:
    study = tiny_study(sweep={**SWEEP, "shard_size": 7}, **SMALL)
    other = Pipeline(study, tmp_path)
    assert other.run()
    assert other.results_db.races() == raced.results_db.races()
    pd.testing.assert_frame_equal(without_times(other.results_db.table()), without_times(raced.results_db.table()))
    again = Pipeline(study, tmp_path)
    assert again.run()
    assert again.results_db.races() == raced.results_db.races()


def test_a_race_goes_on_where_it_was_stopped(raced: Pipeline, tmp_path: Path) -> None:
    study, made = tiny_study(sweep=SWEEP, **SMALL), 0
    while not Pipeline(study, tmp_path).run(deadline=0.0 if made < 1 else None):
        made += 1
    assert made == 1
    assert Pipeline(study, tmp_path).results_db.races() == raced.results_db.races()


def test_what_is_kept_goes_on_elsewhere_without_a_image(raced: Pipeline, tmp_path: Path) -> None:
    kept = archive(raced.out, tmp_path / "kept")
    assert kept == archive(raced.out, tmp_path / "kept")
    assert not (tmp_path / "kept" / "artefacts" / "point").exists()
    merge(tmp_path / "out", [tmp_path / "kept"])
    again = Pipeline(raced.study, tmp_path / "out")
    total = plan(again)["total"]
    assert total["points_to_make"] == total["images_of_races"] == 0
    assert again.run()
    assert again.results_db.races() == raced.results_db.races()
    pd.testing.assert_frame_equal(again.results_db.table(), raced.results_db.table())
    assert not list((tmp_path / "out" / "artefacts").glob("point/*"))
    assert not list((tmp_path / "out" / "artefacts").glob("run/*"))
    with pytest.raises(ConfigError, match=r"train\.lr"):
        archive(raced.out, other_study_kept(tmp_path))


def other_study_kept(root: Path) -> Path:
    study = tiny_study(sweep=SWEEP, **{**SMALL, "train": {**SMALL["train"], "lr": 2e-3}})
    assert Pipeline(study, root / "other").run()
    archive(root / "other", root / "other-kept")
    return root / "other-kept"


def test_a_range_that_begins_at_one_pass_is_raced_all_over() -> None:
    def ranges(guidance: list[float], embeds: bool = False) -> list[tuple[float, ...]]:
        study = tiny_study(sweep={**SWEEP, "num_steps": [2], "guidance": guidance}, **SMALL)
        protocol = Protocol(32, 32, 32, "extractor", "reference", "captions", "none", 100, 0)
        return [cell.guidance for cell in search_cells("checkpoint", study.sweep, study.protocol, protocol, "mmd", embeds)]

    assert ranges([1, 6]) == [(1,), (1.09, 6)]
    assert ranges([1, 1.5, 6]) == [(1,), (1.5, 6)]
    assert ranges([4]) == [(4,)]
    assert ranges([1, 6], embeds=True) == [(1, 6)]


def test_bad_races_are_one_line() -> None:
    with pytest.raises(ConfigError, match=r"race\.seed"):
        tiny_study(sweep={**SWEEP, "seed": 1})
    with pytest.raises(ConfigError, match="guidance from 1 on"):
        tiny_study(sweep={**SWEEP, "guidance": [0, 2]})
    with pytest.raises(ConfigError, match="rungs must rise"):
        tiny_study(sweep={**SWEEP, "race": {"rungs": [64, 32]}})


def test_the_tolerance_goes_with_what_the_scores_can_tell() -> None:
    assert tolerance_for(5000) == 0.015
    assert tolerance_for(20_000) == pytest.approx(0.0075)
    assert tolerance_for(100) == 0.05


def test_a_rung_keeps_the_better_half() -> None:
    known = _Observations(RULES)
    scores = (3.0, 1.0, 2.0, 5.0, 4.0, 6.0, 7.0, 8.0)
    noise = [np.array([0.0, 20.0 * place, -20.0 * place]) for place in range(len(scores))]
    known.losses = {place: {RULES.rungs[0]: score + noise[place]} for place, score in enumerate(scores)}
    flat = known.survivors(set(known.losses))
    assert {1, 2, 0, 4} <= flat
    assert len(flat) <= 5
