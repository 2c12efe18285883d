"""Guides, guidance intervals and schedules in a study: points, costs, table, report, recommendation and sampling."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from finished_study import BASE, copy_of, finished_spec, plain_finished
from isocost.cli import app
from isocost.config.base import parse_spec
from isocost.config.sampling import SolverSpec
from isocost.config.study import StudySpec
from isocost.config.sweep import SweepSpec
from isocost.diffusion.guidance import guidance_per_evaluation
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.solvers import solver_coefficients
from isocost.errors import ConfigError
from isocost.models.checkpoint import read_info
from isocost.pipeline import sweep_runner
from isocost.pipeline.dry_run import plan
from isocost.pipeline.merge import archive
from isocost.pipeline.pipeline import Pipeline
from isocost.report.build import report
from isocost.report.report_data import rebuild
from isocost.sampling import generate
from isocost.sampling.generate import make_engine
from isocost.sampling.guides import make_guide
from isocost.sampling.latency import load_components, load_guide
from isocost.sampling.sample import Model
from isocost.sweep import worker
from isocost.sweep.grid import SearchCell, distinct_intervals
from isocost.sweep.guidance_search_runner import option_of
from isocost.sweep.image_shards import read_images
from isocost.sweep.leases import Leases
from isocost.training.state_checkpoint import newest_state_images
from test_timings import VirtualClock

INTERVAL = [-3.0, 2.0]
SWEEP: dict[str, Any] = {
    **BASE["sweep"],
    "num_steps": [4],
    "guides": ["none", {"size": "all", "snapshot": "all"}, {"size": 4, "null_prompt": True}],
    "guidance_intervals": ["all", INTERVAL],
    "guidance_schedules": [[[-4, 1], [0, 3]]],
}
GUIDED: dict[str, Any] = {"family": {"widths": [4, 8]}, "sweep": SWEEP}


@pytest.fixture(scope="module")
def guided(family_copy: Path) -> Pipeline:
    """The finished family with a second, smaller size and all ways of guidance, after a run and a report."""
    pipeline = Pipeline(finished_spec(**GUIDED), family_copy)
    assert pipeline.run()
    report(pipeline, figure_formats=())
    return pipeline


@pytest.fixture(scope="module")
def table(guided: Pipeline) -> pd.DataFrame:
    rows = guided.results_db.table()
    return rows[rows["num_steps"] == 4].reset_index(drop=True)


@pytest.mark.slow
def test_the_sweep_is_expanded_to_members_of_the_study(guided: Pipeline, table: pd.DataFrame) -> None:
    """Width 4 is guided by its own snapshot; width 8 by its snapshot and by both checkpoints of width 4."""
    runs = {run.model.width: run for run in guided.runs}
    expected = {
        4: {runs[4].checkpoints[32]},
        8: {runs[8].checkpoints[32], *runs[4].checkpoints.values()},
    }
    for width, run in runs.items():
        rows = table[(table["width"] == width) & (table["checkpoint"] == run.final)]
        with_prompt = rows[rows["guide_null_prompt"].eq(False)]
        assert set(with_prompt["guide_checkpoint"]) == expected[width]
        assert set(rows[rows["guide_null_prompt"].eq(True)]["guide_checkpoint"]) == ({runs[4].final} if width == 8 else set())
        num_guides = len(expected[width]) + (width == 8) + 1
        assert len(rows) == 1 + num_guides * 2 * 2, "one without guidance; each guide with w and the schedule, in two intervals"
        assert (rows[rows["guidance"] == 1]["guide"].isna()).all()
    size = {width: table[table["width"] == width]["size"].iloc[0] for width in (4, 8)}
    assert set(table["guide"].dropna()) == {size[4], f"{size[4]}@32", f"{size[4]}/null", f"{size[8]}@32"}


@pytest.mark.slow
def test_costs_count_both_networks(guided: Pipeline, table: pd.DataFrame) -> None:
    for row in table.to_dict("records"):
        info = read_info(guided.store.folder("checkpoint", row["checkpoint"]))
        guided_steps = row["guide_nfe"] if isinstance(row["guide_checkpoint"], str) else row["nfe"] - 4
        expected = info.gflop_per_forward * (row["nfe"] - row["guide_nfe"])
        if isinstance(row["guide_checkpoint"], str):
            guide = read_info(guided.store.folder("checkpoint", row["guide_checkpoint"]))
            expected += guide.gflop_per_forward * row["guide_nfe"]
            assert row["nfe"] == 4 + row["guide_nfe"]
        assert row["gflop_denoiser"] == pytest.approx(expected)
        if row["guidance"] == 1:
            assert guided_steps == 0
        elif isinstance(row["guidance_interval"], str):
            assert json.loads(row["guidance_interval"]) == INTERVAL
            assert 0 < guided_steps < 4
        elif not isinstance(row["guidance_schedule"], str):
            assert guided_steps == 4
        assert row["ms_per_image"] > 0
    small = table[table["guide"].notna() & (table["width"] == 8) & table["guidance_interval"].isna()]
    own = table[table["guide"].isna() & (table["width"] == 8) & (table["guidance"] == 2) & table["guidance_interval"].isna()]
    cheaper = small[small["guide_checkpoint"].isin(guided.runs[0].checkpoints.values()) & small["guidance_schedule"].isna()]
    assert (cheaper["gflop"] < own["gflop"].iloc[0]).all()


FEW_WAYS: dict[str, Any] = {
    **BASE["sweep"],
    "num_steps": [4],
    "guides": ["none", {"size": 4}, {"size": 4, "null_prompt": True}],
    "guidance_intervals": ["all", INTERVAL],
}
"""A part of the points of `SWEEP`."""


@pytest.fixture
def timed(guided: Pipeline, monkeypatch: pytest.MonkeyPatch) -> tuple[Pipeline, VirtualClock]:
    """The study with few points of guides and intervals, on a clock that passes only in the stages of sampling."""
    clock = VirtualClock(prompt_s=0.003, evaluation_s=0.01, decoded_image_s=0.05)
    pipeline = Pipeline(finished_spec(family={"widths": [4, 8]}, sweep=FEW_WAYS), guided.out)

    def timed_engine(*arguments: Any, **options: Any) -> Any:
        engine = make_engine(*arguments, **options)
        engine.denoise = clock.costing(engine.denoise, clock.evaluation_s)
        return engine

    def timed_guide(*arguments: Any, **options: Any) -> Any:
        guide = make_guide(*arguments, **options)
        return dataclasses.replace(guide, denoise=clock.costing(guide.denoise, GUIDE_S))

    def with_calls_of(seconds: float, load: Any) -> Any:
        """A loader whose network takes `CALL_S` per call and `seconds` per row of it."""

        def loaded(*arguments: Any) -> Any:
            part = load(*arguments)
            denoise = clock.costing(part.network.denoise(), seconds)

            def call(*inputs: Any) -> Any:
                clock.pass_time(CALL_S)
                return denoise(*inputs)

            monkeypatch.setattr(part.network, "denoise", lambda: call)
            if load is load_components:
                monkeypatch.setattr(part.autoencoder, "decode", clock.costing(part.autoencoder.decode, clock.decoded_image_s))
                monkeypatch.setattr(part.text_encoder, "encode", clock.costing(part.text_encoder.encode, clock.prompt_s))
            return part

        return loaded

    monkeypatch.setattr(worker, "make_engine", timed_engine)
    monkeypatch.setattr(worker, "make_guide", timed_guide)
    monkeypatch.setattr(worker, "load_components", with_calls_of(clock.evaluation_s, load_components))
    monkeypatch.setattr(worker, "load_guide", with_calls_of(GUIDE_S, load_guide))
    monkeypatch.setattr(sweep_runner, "Worker", partial(worker.Worker, now=clock.now))
    monkeypatch.setattr(generate, "time", SimpleNamespace(perf_counter=clock.now))
    autoencoder, text_encoder = pipeline.assets.load_or_train_autoencoder(), pipeline.assets.text_encoder
    monkeypatch.setattr(autoencoder, "decode", clock.costing(autoencoder.decode, clock.decoded_image_s))
    monkeypatch.setattr(text_encoder, "encode", clock.costing(text_encoder.encode, clock.prompt_s))
    return pipeline, clock


GUIDE_S, CALL_S = 0.004, 0.03


@pytest.mark.slow
def test_remeasured_times_count_the_passes_of_both_networks(timed: tuple[Pipeline, VirtualClock]) -> None:
    pipeline, clock = timed
    run = pipeline.runs[1]
    points = [point.digest for job in pipeline.experiments["text2image"].jobs(run) for point in job.points]
    assert pipeline.remeasure(run) == len(points) == 1 + 3 * 2 + 2, "with the settings of the snapshots"
    table = pipeline.results_db.table().set_index("point").loc[points]
    own, by_guide = table["nfe"] - table["guide_nfe"], table["guide_nfe"]
    true_ms = 1000 * (clock.prompt_s + own * clock.evaluation_s + by_guide * GUIDE_S + clock.decoded_image_s)
    assert (table["ms_per_image"] / true_ms).tolist() == pytest.approx([1.0] * len(points), rel=0.01)
    num_calls = table["num_steps"] + by_guide
    true_latency_ms = true_ms + 1000 * num_calls * CALL_S
    assert (table["latency_ms"] / true_latency_ms).tolist() == pytest.approx([1.0] * len(points), rel=0.01)
    in_interval = table[table["guidance_interval"].notna() & table["guide"].isna()]
    assert (in_interval["nfe"] < 8).all(), "steps without guidance take one row of a call"


@pytest.mark.slow
def test_a_second_run_and_a_plan_make_nothing_again(guided: Pipeline) -> None:
    before = guided.results_db.table()
    again = Pipeline(finished_spec(**GUIDED), guided.out)
    planned = plan(again)
    assert planned["total"]["points_to_make"] == 0
    assert again.run()
    pd.testing.assert_frame_equal(before, again.results_db.table())


@pytest.mark.slow
def test_points_without_a_guide_keep_their_digest(guided: Pipeline) -> None:
    without = Pipeline(finished_spec(family={"widths": [4, 8]}, sweep={**BASE["sweep"], "num_steps": [4]}), guided.out)
    recorded = guided.results_db.points()
    for run in without.runs:
        assert {point.digest for point in without.experiments["text2image"].points(run)} <= recorded


@pytest.mark.slow
def test_a_plan_counts_the_passes_of_guides(tmp_path: Path, guided: Pipeline, table: pd.DataFrame) -> None:
    """The planned GFLOP of a study that has made nothing is the sum over the points of the finished one."""
    planned = plan(Pipeline(finished_spec(**GUIDED), tmp_path / "out"))
    rows = guided.results_db.table()
    wanted = {point.digest for run in guided.runs for point in guided.experiments["text2image"].points(run)}
    rows = rows[rows["point"].isin(wanted)]
    gflop = sum(size["sampling_gflop"] for size in planned["sizes"])
    assert gflop == pytest.approx(float((rows["gflop_denoiser"] * rows["num_images"]).sum()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["interval", "null_prompt", "schedule"])
def test_the_command_of_a_point_draws_its_images(guided: Pipeline, table: pd.DataFrame, kind: str, tmp_path: Path) -> None:
    """`recommend` prints the guide, interval and schedule; the first saved image of the point comes out again."""
    rows = table[table["guide"].notna() & (table["width"] == 8)]
    selected = {
        "interval": rows[
            rows["guidance_interval"].notna() & rows["guidance_schedule"].isna() & rows["guide_null_prompt"].eq(False)
        ],
        "null_prompt": rows[rows["guide_null_prompt"].eq(True) & rows["guidance_interval"].isna()],
        "schedule": rows[rows["guidance_schedule"].notna() & rows["guidance_interval"].notna()],
    }[kind]
    row = selected.iloc[0]
    from isocost.analysis.pareto import Configuration
    from isocost.analysis.recommend import sample_command

    def text(column: str) -> str | None:
        return row[column] if isinstance(row[column], str) else None

    configuration = Configuration(
        row["point"],
        row["checkpoint"],
        row["size"],
        row["solver"],
        int(row["num_steps"]),
        float(row["guidance"]),
        1.0,
        1.0,
        None,
        None,
        False,
        guide=text("guide"),
        guide_checkpoint=text("guide_checkpoint"),
        guide_null_prompt=bool(row["guide_null_prompt"]),
        guidance_interval=text("guidance_interval"),
        guidance_schedule=text("guidance_schedule"),
    )
    prompt = guided.assets.reference.prompts[0]
    command = sample_command(configuration, str(guided.out)).replace("TEXT", shlex.quote(prompt))
    words = [*shlex.split(command)[1:], "--num-images", "1", "--out", str(tmp_path / "images")]
    outcome = CliRunner().invoke(app, words, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    drawn = np.asarray(Image.open(tmp_path / "images" / "00-00.png")).astype(int)
    saved = read_images(guided.store.folder("point", row["point"]))[0].astype(int)
    assert 0 in guided.assets.saved_indices
    assert np.abs(drawn - saved).max() <= 2, "the batch size differs, so rounding may"


@pytest.mark.slow
def test_without_the_guide_nothing_is_timed(guided: Pipeline, tmp_path: Path) -> None:
    copy_of(guided.out, tmp_path / "out")
    pipeline = Pipeline(finished_spec(family={"widths": [4, 8]}, sweep=FEW_WAYS), tmp_path / "out")
    small, large = pipeline.runs
    pipeline.store.remove("checkpoint", small.final)
    with pytest.raises(ConfigError, match=f"no checkpoint {small.final}"):
        pipeline.check_checkpoints([large])


@pytest.mark.slow
def test_the_page_and_the_table_show_the_guidance(guided: Pipeline, table: pd.DataFrame) -> None:
    summary = (guided.out / "report" / "summary.md").read_text(encoding="utf-8")
    page = (guided.out / "report" / "index.html").read_text(encoding="utf-8")
    assert "[-3, 2]" in page
    for label in table["guide"].dropna().unique():
        assert label in page
    assert "log-SNR interval" in page
    assert "guidance" in summary


@pytest.mark.slow
def test_the_report_compares_the_guides_by_paired_differences(guided: Pipeline, tmp_path: Path) -> None:
    """The differences are in the report data, so that a page without the features of the points shows the same."""
    section = (
        (guided.out / "report" / "summary.md").read_text(encoding="utf-8").partition("What does a guide buy at equal cost?")
    )
    assert " costs (" in section[2]
    rows = [line for line in section[2].splitlines() if line.startswith("| ") and "minus" not in line]
    assert rows
    assert "(not paired)" not in rows[0].split(" | ")[-3]
    stored = json.loads((guided.out / "report_data" / "text2image" / "page.json").read_text(encoding="utf-8"))["differences"]
    leading = guided.experiments["text2image"].metric
    first, second, metric, value, low, high = next(row for row in stored if row[2] == leading)
    assert low <= value <= high
    comparer = guided.experiments["text2image"].comparer()
    assert comparer is not None
    again = comparer.difference(first, second, metric)
    assert again is not None
    assert (again.value, again.low, again.high) == (value, low, high)
    archive(guided.out, tmp_path / "archive")
    rebuild(tmp_path / "archive", figure_formats=())
    for name in ("index.html", "summary.md"):
        assert (tmp_path / "archive" / "report" / name).read_bytes() == (guided.out / "report" / name).read_bytes()


@pytest.mark.slow
def test_the_api_samples_with_a_guide(guided: Pipeline) -> None:
    finals = [guided.store.folder("checkpoint", run.final) for run in guided.runs]
    guide, model = Model(finals[0]), Model(finals[1])
    plain = model.sample("a red ring", num_steps=4, guidance=3.0)
    by_guide = model.sample("a red ring", num_steps=4, guidance=3.0, guide=guide)
    in_interval = model.sample("a red ring", num_steps=4, guidance=3.0, guide=finals[0], guidance_interval=(None, 0.0))
    one_pass = model.sample("a red ring", num_steps=4, guidance=1.0)
    assert [samples.nfe for samples in (plain, by_guide, one_pass)] == [8, 8, 4]
    assert 4 < in_interval.nfe < 8
    assert one_pass.gflop < in_interval.gflop < by_guide.gflop < plain.gflop
    arrays = [samples.array.astype(int) for samples in (plain, by_guide, in_interval, one_pass)]
    for first in range(4):
        for second in range(first):
            assert np.abs(arrays[first] - arrays[second]).max() > 0
    with pytest.raises(ConfigError, match="cannot guide itself"):
        model.sample("a red ring", guide=finals[1])


def test_a_snapshot_is_named_as_in_the_training(tmp_path: Path) -> None:
    """Both numbers are rounded up to whole batches of 16, so 20 images are the snapshot at 32."""
    spec = finished_spec(
        family={"widths": [4, 8]},
        train={**BASE["train"], "snapshots": [20]},
        sweep={**BASE["sweep"], "guides": ["none", {"size": "smaller", "snapshot": 20}, {"size": "same", "snapshot": 32}]},
    )
    pipeline = Pipeline(spec, tmp_path / "out")
    small, large = pipeline.runs
    guides = pipeline.experiments["text2image"].guides(large)
    assert [None if guide is None else guide.checkpoint for guide in guides] == [
        None,
        small.checkpoints[32],
        large.checkpoints[32],
    ]


WRONG_SWEEPS = {
    "itself": ({"guides": [{"size": "same"}]}, "each would guide itself; give an earlier snapshot"),
    "no such width": ({"guides": [{"size": 5}]}, "no such width; the study has 4, 8"),
    "no such snapshot": ({"guides": [{"size": "smaller", "snapshot": 33}]}, "width 4 has no such snapshot; it has 32, 64"),
    "no smaller size": ({"guides": [{"size": "smaller"}], "widths": [8]}, "no size is smaller"),
    "a checkpoint": ({"guides": [{"checkpoint": "OWNER/NAME"}]}, "only guides by size"),
    "interval outside": ({"guidance_intervals": [[9, 12]]}, "log-SNR of this noise schedule goes from"),
}


@pytest.mark.parametrize("case", WRONG_SWEEPS)
def test_a_wrong_guide_is_refused_before_anything_is_made(case: str, tmp_path: Path) -> None:
    changes, words = WRONG_SWEEPS[case]
    changes = dict(changes)
    widths = changes.pop("widths", [4, 8])
    spec = finished_spec(family={"widths": widths}, sweep={**BASE["sweep"], **changes})
    with pytest.raises(ConfigError) as caught:
        Pipeline(spec, tmp_path / "out").run()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("artefacts/run/*"))


WRONG_SPECS = {
    "reversed": ({"guidance_intervals": [[2, -3]]}, "the lower log-SNR comes first"),
    "both": ({"guides": [{"size": 4, "checkpoint": "x"}]}, "either size or checkpoint"),
    "neither": ({"guides": [{}]}, "either size or checkpoint"),
    "below 1": ({"guides": [{"size": 4}], "guidance": [0.5]}, "guidance below 1 with a guide"),
    "schedule below 1": (
        {"guides": [{"size": 4}], "guidance_schedules": [[[0, 0.5], [1, 2]]]},
        "guidance below 1 with a guide",
    ),
    "falling": ({"guidance_schedules": [[[1, 2], [0, 2]]]}, "rising log-SNR"),
    "raced schedule": ({"search": "race", "guidance_schedules": [[[0, 1], [1, 2]]]}, "use search: grid"),
    "unknown key": ({"guides": [{"width": 4}]}, "unknown key"),
    "no number": ({"guidance_intervals": [["low", 2]]}, "give a number"),
}


@pytest.mark.parametrize("case", WRONG_SPECS)
def test_a_wrong_sweep_is_refused_in_one_line(case: str) -> None:
    changes, words = WRONG_SPECS[case]
    with pytest.raises(ConfigError) as caught:
        parse_spec(SweepSpec, {"num_steps": [4], "guidance": [1, 2], **changes}, "study.yaml: sweep")
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert "function-after" not in message


@pytest.mark.parametrize("part", ["distill", "dreambooth"])
def test_students_and_subjects_take_no_guides(part: str) -> None:
    plain = plain_finished(part)
    plain[part] = {**plain[part], "sweep": {**plain[part]["sweep"], "guides": [{"size": "smaller"}]}}
    with pytest.raises(ConfigError, match="takes no guides"):
        parse_spec(StudySpec, plain, "study.yaml")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "text", "words"),
    [
        ("--guidance-interval", "3", "give LOW:HIGH"),
        ("--guidance-interval", "a:3", "'a' is not a number"),
        ("--guidance-interval", "3:-3", "the lower log-SNR comes first"),
        ("--guidance-interval", "20:30", "goes from"),
        ("--guidance-interval", "nan:3", "not finite"),
        ("--guidance-schedule", "1,2", "give points LOGSNR:GUIDANCE"),
        ("--guidance-schedule", "1:2,0:1", "rising log-SNR"),
    ],
)
def test_wrong_options_of_sample(guided: Pipeline, option: str, text: str, words: str, tmp_path: Path) -> None:
    checkpoint = str(guided.store.folder("checkpoint", guided.runs[0].final))
    arguments = ["sample", checkpoint, "--prompt", "a ring", "--out", str(tmp_path / "images"), option, text]
    outcome = CliRunner().invoke(app, arguments)
    assert isinstance(outcome.exception, ConfigError), outcome.output
    assert words in str(outcome.exception)
    assert not (tmp_path / "images").exists()


@pytest.mark.slow
def test_a_guide_whose_weights_are_gone_is_trained_again_but_no_further(guided: Pipeline, tmp_path: Path) -> None:
    shutil.copytree(guided.out, tmp_path / "out")
    run = guided.runs[0]
    early = run.checkpoints[32]
    weights = next((guided.store.folder("checkpoint", early)).rglob("*.safetensors"))
    spec = finished_spec(family={"widths": [4, 8]}, sweep={**SWEEP, "num_steps": [2, 4], "guidance_schedules": []})
    again = Pipeline(spec, tmp_path / "out")
    shutil.rmtree(again.store.folder("checkpoint", early))
    shutil.rmtree(again.store.folder("run", run.digest))
    trained = {size["width"]: size["images_to_train"] for size in plan(again)["sizes"]}
    assert trained == {4: 32, 8: 0}
    assert again.run()
    rebuilt = again.store.folder("checkpoint", early) / weights.relative_to(guided.store.folder("checkpoint", early))
    assert rebuilt.read_bytes() == weights.read_bytes()
    assert newest_state_images(again.store.folder("run", run.digest)) == 32


RACE: dict[str, Any] = {**SWEEP, "search": "race", "guidance_schedules": [], "race": {"rungs": [16, 32]}, "guidance": [1, 4]}


def cells_of(pipeline: Pipeline, width: int) -> list[SearchCell]:
    (run,) = (run for run in pipeline.runs if run.model.width == width)
    return [cell for job in pipeline.experiments["text2image"].jobs(run) for cell in job.cells]


@pytest.mark.slow
def test_guides_and_intervals_race_against_each_other(family_copy_of_race: Path) -> None:
    sweep = {**RACE, "guidance_intervals": ["all", INTERVAL, "search"]}
    spec = finished_spec(family={"widths": [4, 8]}, sweep=sweep)
    pipeline = Pipeline(spec, family_copy_of_race)
    assert pipeline.run()
    races, table = pipeline.results_db.races(), pipeline.results_db.table()
    cells = [*cells_of(pipeline, 4), *cells_of(pipeline, 8)]
    assert {cell.digest for cell in cells} == set(races)
    # One pass; then the network itself and its guides, each at all noise levels, in the interval, and with a searched interval.
    assert [len(cells_of(pipeline, width)) for width in (4, 8)] == [1 + 2 * 3, 1 + 2 * 3]
    for cell in cells_of(pipeline, 8):
        race = races[cell.digest]
        winner = cell.options[option_of(race)]
        assert race["point"] == cell.point(race["guidance"], option_of(race)).digest
        if not cell.is_joint:
            assert race["option_index"] is None
            continue
        tried = json.loads(race["options"])
        assert race["num_images"] == sum(sum(option["images_by_guidance"].values()) for option in tried)
        if cell.base is None:
            assert len(tried) == len(cell.options) == 4
            assert len({option.guide for option in cell.options}) == 4
        else:
            base = races[cell.base.digest]
            guide = cell.base.options[option_of(base)].guide
            assert winner.guide == guide, "the interval is searched for the guide that the base found"
            assert {option["guide_checkpoint"] for option in tried} == {None if guide is None else guide.checkpoint}
            # Four steps guide 1 to 4 evaluations in a row: 10 intervals, of which the coarse ends tell some apart.
            assert 4 <= len({option["guidance_interval"] for option in tried}) == len(tried) <= 10
    scored = table.set_index("point")
    for cell in cells:
        race = races[cell.digest]
        if race["dominated_by"] is None:
            row = scored.loc[race["point"]]
            assert row["seed"] == 0, "the winner has other noise than the race"
            assert row["race_images"] == race["num_images"]
    again = Pipeline(spec, pipeline.out)
    assert plan(again)["total"]["images_of_races"] == 0
    assert again.run()
    assert again.results_db.races() == races


@pytest.mark.slow
def test_every_guide_can_have_a_race_of_its_own(guided: Pipeline) -> None:
    sweep = {**RACE, "race": {"rungs": [16, 32], "guides": "each"}}
    pipeline = Pipeline(finished_spec(family={"widths": [4, 8]}, sweep=sweep), guided.out)
    assert [len(cells_of(pipeline, width)) for width in (4, 8)] == [1 + 2 * 2, 1 + 5 * 2]
    assert not any(cell.is_joint for cell in cells_of(pipeline, 8))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"search": "grid", "guidance_intervals": ["all", "search"]}, "only a race searches the interval"),
        ({"guidance_intervals": ["search"]}, "add all"),
        ({"guidance": [3], "guidance_intervals": ["all"]}, "needs a range of guidance"),
    ],
)
def test_wrong_races_of_guides(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        finished_spec(family={"widths": [4, 8]}, sweep={**RACE, **changes})


@pytest.mark.parametrize("num_steps", [1, 2, 4, 16])
def test_intervals_of_a_race_guide_different_evaluations(num_steps: int) -> None:
    schedule = NoiseSchedule.scaled_linear()
    coefficients = solver_coefficients(SolverSpec(), num_steps, schedule)
    intervals = distinct_intervals(SolverSpec(), num_steps, schedule)
    guided = [
        tuple(weight == 2 for weight in guidance_per_evaluation(coefficients.alpha, coefficients.sigma, 2.0, interval))
        for interval in intervals
    ]
    assert len(set(guided)) == len(intervals)
    assert all(0 < sum(evaluations) < num_steps for evaluations in guided)
    # All runs of consecutive evaluations, but the whole, where the noise levels lie apart.
    assert len(intervals) == {1: 0, 2: 2, 4: 9}.get(num_steps, len(intervals))


@pytest.fixture
def family_copy_of_race(guided: Pipeline, tmp_path: Path) -> Path:
    """The trained sizes in a folder of their own."""
    from finished_study import copy_trained

    copy_trained(guided.out, tmp_path / "race")
    return tmp_path / "race"


@pytest.mark.slow
def test_a_worker_trains_while_another_one_trains_a_guide(
    finished_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Width 8 needs width 4 as a guide for its sweep, but not for its training."""
    study = finished_spec(family={"widths": [4, 8]}, sweep={**BASE["sweep"], "guides": [{"size": "smaller"}]})
    pipeline = Pipeline(study, copy_of(finished_study / "family", tmp_path / "out"))
    small, large = pipeline.runs
    shutil.rmtree(pipeline.store.folder("checkpoint", large.final))
    was_trained = []

    def stop_the_other_worker(*_: str) -> None:
        was_trained.append(pipeline.store.has("checkpoint", large.final))
        other_worker.close()

    pipeline.prepare()
    other_worker = Leases(pipeline.results_db.engine)
    assert other_worker.acquire(f"train {small.digest}")
    monkeypatch.setattr(pipeline.leases, "wait", stop_the_other_worker)
    assert pipeline.run()
    assert was_trained == [True]
    assert pipeline.results_db.table()["guide_checkpoint"].eq(small.final).any()
