"""Guides, guidance intervals and schedules in a study: points, costs, table, report, recommendation and sampling."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from finished_study import BASE, finished_spec, plain_finished
from isocost.cli import app
from isocost.config.base import parse_spec
from isocost.config.study import StudySpec
from isocost.config.sweep import SweepSpec
from isocost.errors import ConfigError
from isocost.models.checkpoint import read_info
from isocost.pipeline.dry_run import plan
from isocost.pipeline.merge import archive
from isocost.pipeline.pipeline import Pipeline
from isocost.report.build import report
from isocost.report.report_data import rebuild
from isocost.sampling.sample import Model
from isocost.sweep.image_shards import read_images

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
    report(pipeline, with_figures=False)
    return pipeline


@pytest.fixture(scope="module")
def table(guided: Pipeline) -> pd.DataFrame:
    rows = guided.results_db.table()
    return rows[rows["num_steps"] == 4].reset_index(drop=True)


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


def test_costs_count_both_networks(guided: Pipeline, table: pd.DataFrame) -> None:
    for row in table.to_dict("records"):
        info = read_info(guided.store.folder("checkpoint", row["checkpoint"]))
        guided_steps = row["guide_nfe"] if isinstance(row["guide_checkpoint"], str) else row["nfe"] - 4
        expected = info.gflop_per_forward * (row["nfe"] - row["guide_nfe"])
        if isinstance(row["guide_checkpoint"], str):
            guide = read_info(guided.store.folder("checkpoint", row["guide_checkpoint"]))
            expected += guide.gflop_per_forward * row["guide_nfe"]
            assert row["nfe"] == 4 + row["guide_nfe"]
        assert row["gflop"] == pytest.approx(expected)
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


def test_a_second_run_and_a_plan_make_nothing_again(guided: Pipeline) -> None:
    before = guided.results_db.table()
    again = Pipeline(finished_spec(**GUIDED), guided.out)
    planned = plan(again)
    assert planned["total"]["points_to_make"] == 0
    assert again.run()
    pd.testing.assert_frame_equal(before, again.results_db.table())


def test_points_without_a_guide_keep_their_digest(guided: Pipeline) -> None:
    without = Pipeline(finished_spec(family={"widths": [4, 8]}, sweep={**BASE["sweep"], "num_steps": [4]}), guided.out)
    recorded = guided.results_db.points()
    for run in without.runs:
        assert {point.digest for point in without.experiments["text2image"].points(run)} <= recorded


def test_a_plan_counts_the_passes_of_guides(tmp_path: Path, guided: Pipeline, table: pd.DataFrame) -> None:
    """The planned GFLOP of a study that has made nothing is the sum over the points of the finished one."""
    planned = plan(Pipeline(finished_spec(**GUIDED), tmp_path / "out"))
    rows = guided.results_db.table()
    wanted = {point.digest for run in guided.runs for point in guided.experiments["text2image"].points(run)}
    rows = rows[rows["point"].isin(wanted)]
    gflop = sum(size["sampling_gflop"] for size in planned["sizes"])
    assert gflop == pytest.approx(float((rows["gflop"] * rows["num_images"]).sum()))


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


def test_the_page_and_the_table_show_the_guidance(guided: Pipeline, table: pd.DataFrame) -> None:
    summary = (guided.out / "report" / "summary.md").read_text(encoding="utf-8")
    page = (guided.out / "report" / "index.html").read_text(encoding="utf-8")
    assert "[-3, 2]" in page
    for label in table["guide"].dropna().unique():
        assert label in page
    assert "log-SNR interval" in page
    assert "guidance" in summary


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
    rebuild(tmp_path / "archive", with_figures=False)
    for name in ("index.html", "summary.md"):
        assert (tmp_path / "archive" / "report" / name).read_bytes() == (guided.out / "report" / name).read_bytes()


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
def test_a_race_finds_guidance_for_each_guide(family_copy_of_race: Path) -> None:
    sweep = {**SWEEP, "search": "race", "guidance_schedules": [], "race": {"rungs": [16, 32]}, "guidance": [1, 4]}
    pipeline = Pipeline(finished_spec(family={"widths": [4, 8]}, sweep=sweep), family_copy_of_race)
    assert pipeline.run()
    races = pipeline.results_db.races()
    cells = [cell for run in pipeline.runs for job in pipeline.experiments["text2image"].jobs(run) for cell in job.cells]
    assert {cell.digest for cell in cells} == set(races)
    by_width = {run.model.width: [cell for cell in cells if cell.scored.checkpoint == run.final] for run in pipeline.runs}
    assert len(by_width[4]) == 1 + 2 * 2
    assert len(by_width[8]) == 1 + 5 * 2


@pytest.fixture
def family_copy_of_race(guided: Pipeline, tmp_path: Path) -> Path:
    """The trained sizes in a folder of their own."""
    from finished_study import copy_trained

    copy_trained(guided.out, tmp_path / "race")
    return tmp_path / "race"
