"""Distillation the whole way: a study's students beside their teachers, exports, costs, mistakes; planted comparisons."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, StableDiffusionPipeline

from conftest import plain_study
from interruptions import stop_twice
from isocost.analysis.distillation import acceleration, against_teacher, comparisons, steps_to_reach, teacher_of
from isocost.cli import main
from isocost.config.base import parse_spec
from isocost.config.study import StudySpec
from isocost.diffusion.philox import INITIAL_NOISE, philox_normal
from isocost.errors import ConfigError
from isocost.evaluation.confidence_intervals import Interval
from isocost.experiments.distillation import DistillExperiment, StudentRun
from isocost.models.autoencoder import load_autoencoder
from isocost.models.checkpoint import load_checkpoint
from isocost.models.export_diffusers import export
from isocost.pipeline.dry_run import plan
from isocost.pipeline.merge import archive, merge
from isocost.pipeline.pipeline import Pipeline
from isocost.report.build import report
from isocost.sampling.sample import sample
from isocost.sampling.upscale import upscale
from isocost.sweep.schema import HARDWARE_COLUMNS
from synthetic_results import planted_table

VARIANTS = ["consistency", "codi", "codi-efficient", "progressive"]


def distill_study(**changes: Any) -> StudySpec:
    """The tiny study of one size with students of every kind."""
    plain = plain_study(
        autoencoder={"kind": "pretrained", "path": "scenes"},
        family={"widths": [8]},
        train={"num_images": 64, "batch_size": 16, "lr": 1e-3, "prediction_type": "v_prediction", "state_every_images": 32},
        sweep={"num_steps": [1, 4], "guidance": [1, 2], "batch_size": 16},
        distill={
            "variants": VARIANTS,
            "guidance_range": [1, 4],
            "stages": [4, 2],
            "train": {"num_images": 64, "snapshots": [32], "lr": 1e-3},
            "sweep": {"num_steps": [1, 2, 4], "guidance": [1, 2], "batch_size": 16},
            **changes,
        },
    )
    return parse_spec(StudySpec, plain, "tiny")


def superres_study(**changes: Any) -> StudySpec:
    """The tiny study with few-step super-resolution."""
    plain = plain_study(
        family={"widths": [8]},
        train={"num_images": 32, "batch_size": 16, "lr": 1e-3, "prediction_type": "v_prediction"},
        sweep={"num_steps": [1], "guidance": [1], "batch_size": 16},
        superres={
            "train": {"num_images": 32},
            "sweep": {"num_steps": [4], "batch_size": 16},
            "protocol": {"num_images": 32, "num_reference": 64, "num_bootstrap": 20, "paired_metrics": ["psnr", "ssim"]},
            "metric": "psnr",
            "distill": {
                "variants": VARIANTS[:2],
                "train": {"num_images": 32},
                "sweep": {"num_steps": [4], "batch_size": 16},
                **changes,
            },
        },
    )
    return parse_spec(StudySpec, plain, "tiny")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    pipeline = Pipeline(distill_study(), tmp_path_factory.mktemp("distill") / "out")
    assert pipeline.run()
    report(pipeline)
    return pipeline


@pytest.fixture(scope="module")
def enlarged(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    pipeline = Pipeline(superres_study(), tmp_path_factory.mktemp("enlarged") / "out")
    assert pipeline.run()
    return pipeline


def students(pipeline: Pipeline, task: str = "distill") -> dict[str, StudentRun]:
    """The last run of every kind."""
    experiment = pipeline.experiments[task]  # type: ignore[index]
    assert isinstance(experiment, DistillExperiment)
    return {run.kind: run for run in experiment.runs if isinstance(run, StudentRun)}


def component_name(pipeline: Pipeline, kind: str, task: str = "distill") -> Path:
    return pipeline.store.folder("checkpoint", students(pipeline, task)[kind].final)


# --- the whole way ---


def test_students_and_teachers_stand_in_one_table_with_true_costs(finished: Pipeline) -> None:
    table = pd.read_parquet(finished.out / "table-distill.parquet")
    final_points = table[table["is_final"]]
    assert set(final_points["size"]) == {"0.8M", *(f"0.8M {kind}" for kind in VARIANTS)}
    is_student = final_points["size"] != "0.8M"
    assert (final_points[is_student]["nfe"] == final_points[is_student]["num_steps"]).all()
    guided = final_points[~is_student & (final_points["guidance"] != 1)]
    assert (guided["nfe"] == 2 * guided["num_steps"]).all()
    by_size = final_points[final_points["num_steps"] == 4].groupby("size")["normalized_cost"].first()
    assert by_size["0.8M consistency"] == pytest.approx(by_size["0.8M"], rel=0.01)
    assert by_size["0.8M codi"] > 1.2 * by_size["0.8M"]
    assert by_size["0.8M codi"] == by_size["0.8M codi-efficient"]
    assert set(final_points[final_points["size"] == "0.8M progressive"]["num_steps"]) == {1, 2, 4}
    assert set(final_points[is_student].groupby("size")["solver"].agg(set).map(tuple)) == {
        ("lcm/trailing",),
        ("ddim/trailing",),
    }
    progressive = final_points[final_points["size"] == "0.8M progressive"].groupby("num_steps")["checkpoint"].agg(set)
    assert progressive[1] == progressive[2] != progressive[4]
    assert set(table[~table["is_final"]]["images_seen"]) == {32}
    assert set(pd.read_parquet(finished.out / "table.parquet")["size"]) == {"0.8M"}


def test_training_compute_counts_teacher_and_average(finished: Pipeline) -> None:
    table = pd.read_parquet(finished.out / "table-distill.parquet")
    told = table[table["is_final"]].groupby(["size", "num_steps"])["training_gflop"].first()
    forward = load_checkpoint(component_name(finished, "consistency")).info.gflop_per_forward
    of_teacher = load_checkpoint(finished.store.folder("checkpoint", finished.runs[0].final)).info.gflop_per_forward
    assert told["0.8M consistency", 4] == pytest.approx(64 * (4 * forward + 2 * of_teacher))
    first, second = 32 * (3 * forward + 4 * of_teacher), 32 * (3 * forward + 2 * of_teacher)
    assert told["0.8M progressive", 4] == pytest.approx(first)
    assert told["0.8M progressive", 2] == pytest.approx(first + second)


def test_a_checkpoint_says_what_it_is(finished: Pipeline) -> None:
    info = load_checkpoint(component_name(finished, "codi")).info
    assert (info.task, info.distilled, info.variant, info.size) == ("distill", "codi", "codi", "0.8M")
    assert info.guidance_range == (1, 4)
    assert info.solver.name == "lcm"
    assert info.parent == finished.runs[0].final
    stages = [run for run in finished.experiments["distill"].runs if run.variant == "progressive"]
    assert [run.num_steps for run in stages if isinstance(run, StudentRun)] == [4, 2]
    assert stages[1].parent == finished.store.folder("checkpoint", stages[0].final)
    assert load_checkpoint(component_name(finished, "progressive")).info.solver.name == "ddim"


def test_the_report_tells_students_from_teachers(finished: Pipeline) -> None:
    page = (finished.out / "report" / "distill" / "index.html").read_text()
    for words in ("0.8M codi-efficient", "student less its own teacher", "steps that the undistilled needs", "own size"):
        assert words in page, words
    assert "distill/index.html" in (finished.out / "report" / "index.html").read_text()


def test_a_student_takes_one_pass_and_listens_to_guidance(finished: Pipeline) -> None:
    folder = component_name(finished, "consistency")
    drawn = [sample(folder, ["a red ring"], num_images=2, guidance=guidance) for guidance in (1.0, 4.0)]
    assert [one.nfe for one in drawn] == [4, 4]
    assert not np.array_equal(drawn[0].images, drawn[1].images)
    progressive = sample(component_name(finished, "progressive"), ["a red ring"], num_steps=2, num_images=2)
    assert progressive.nfe == 2
    assert sample(component_name(finished, "codi"), ["a red ring"], num_images=1).nfe == 4


@pytest.mark.slow
def test_a_run_that_was_killed_in_between_ends_with_the_same_table(
    finished: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second stage of the progressive student, then in a sweep."""
    out, study = tmp_path / "out", distill_study()
    stop_twice(study, out, monkeypatch, at_step=4 + 3 * 4 + 3, at_record=2)
    pipeline = Pipeline(study, out)
    assert pipeline.run()
    report(pipeline)
    left, right = (
        pd.read_parquet(each.out / "table-distill.parquet").drop(columns=HARDWARE_COLUMNS) for each in (finished, pipeline)
    )
    pd.testing.assert_frame_equal(left, right)


def test_super_resolution_has_students_too(enlarged: Pipeline) -> None:
    table = enlarged.results_db.table()
    table = table[table["task"] == "superres-distill"]
    assert set(table["size"]) == {f"0.8M {kind}" for kind in VARIANTS[:2]}
    assert (table["nfe"] == table["num_steps"]).all()
    image = np.full((9, 11, 3), 90, dtype=np.uint8)
    for kind in VARIANTS[:2]:
        folder = component_name(enlarged, kind, "superres-distill")
        done = upscale(folder, image)
        assert (done.image.shape, done.nfe) == ((36, 44, 3), 4)
    info = load_checkpoint(component_name(enlarged, "codi", "superres-distill")).info
    assert info.parent == enlarged.experiments["text2image"].runs[0].final
    assert (info.model.adapter, info.guidance_range) == ("concat_cond", None)


@pytest.mark.slow
def test_their_page_shows_what_was_enlarged(enlarged: Pipeline) -> None:
    report(enlarged)
    table = pd.read_parquet(enlarged.out / "table-superres-distill.parquet")
    assert set(table["size"]) == {"0.8M", *(f"0.8M {kind}" for kind in VARIANTS[:2])}
    page = (enlarged.out / "report" / "superres-distill" / "index.html").read_text()
    assert "low resolution" in page


# --- out of the house ---


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 4])
def test_diffusers_draws_what_a_consistency_student_draws(
    finished: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guidance: float, num_steps: int
) -> None:
    """Latents of the LCM pipeline and ours from the same noise, to 1e-5 of their size."""
    folder, prompts = component_name(finished, "consistency"), ["a red circle on a white background", "two blue squares"]
    autoencoder, decoded = load_autoencoder("scenes"), []
    decode = autoencoder.decode
    monkeypatch.setattr(autoencoder, "decode", lambda latents: decoded.append(latents.clone()) or decode(latents))
    monkeypatch.setattr("isocost.sampling.sample.load_checkpoint_autoencoder", lambda *_: autoencoder)
    sample(folder, prompts, num_steps=num_steps, guidance=guidance, num_images=1, seed=5)
    ours = decoded[0][:2]
    pipeline = LatentConsistencyModelPipeline.from_pretrained(export(folder, tmp_path / "exported"), use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    drawn = iter(range(1, num_steps))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_lcm.randn_tensor",
        lambda *_, **__: philox_normal(5, torch.arange(2), next(drawn), (4, 8, 8), "cpu"),
    )
    theirs = pipeline(
        prompts,
        num_inference_steps=num_steps,
        guidance_scale=guidance,
        latents=philox_normal(5, torch.arange(2), INITIAL_NOISE, (4, 8, 8), "cpu"),
        height=32,
        width=32,
        output_type="latent",
    ).images
    assert next(drawn, None) is None
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_a_progressive_student_exports_to_stable_diffusions_pipeline(finished: Pipeline, tmp_path: Path) -> None:
    folder = component_name(finished, "progressive")
    ours = sample(folder, ["a red ring"], num_steps=2, guidance=2.0, num_images=1, seed=5).images[:, 0]
    pipeline = StableDiffusionPipeline.from_pretrained(export(folder, tmp_path / "exported"), use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    noise = philox_normal(5, torch.arange(1), INITIAL_NOISE, (4, 8, 8), "cpu")
    theirs = pipeline(
        ["a red ring"], num_inference_steps=2, guidance_scale=2.0, latents=noise, height=32, width=32, output_type="np"
    ).images
    assert np.abs(ours.astype(float) - theirs * 255).max() <= 1.0


# --- mistakes ---


def test_mistakes_are_one_line(finished: Pipeline, enlarged: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has an adapter"):
        export(component_name(finished, "codi"), tmp_path / "exported")
    with pytest.raises(ConfigError, match="this student was taught 1 to 4"):
        sample(component_name(finished, "consistency"), ["a ring"], guidance=7.5)
    with pytest.raises(ConfigError, match="a negative prompt has no place"):
        sample(component_name(finished, "consistency"), ["a ring"], negative_prompt="a square")
    with pytest.raises(ConfigError, match="isocost upscale"):
        sample(component_name(enlarged, "consistency", "superres-distill"), ["a ring"])
    pipeline = Pipeline(distill_study(), tmp_path / "new")
    with pytest.raises(ConfigError, match="no teacher to distil yet; `isocost train`"):
        pipeline.train(students(pipeline)["consistency"])


def test_teachers_must_fit(finished: Pipeline, enlarged: Pipeline, tmp_path: Path) -> None:
    def runs(teacher: Path, study: StudySpec | None = None) -> list[Any]:
        spec = study or distill_study(teachers=[str(teacher)])
        return Pipeline(spec, tmp_path / "other").experiments["distill"].runs

    plain = finished.store.folder("checkpoint", finished.runs[0].final)
    assert {run.teacher for run in runs(plain)} == {plain}
    with pytest.raises(ConfigError, match="is a student already"):
        runs(component_name(finished, "consistency"))
    with pytest.raises(ConfigError, match="no such checkpoint folder"):
        runs(tmp_path / "absent")
    with pytest.raises(ConfigError, match="made for superres"):
        runs(enlarged.store.folder("checkpoint", enlarged.experiments["superres"].runs[0].final))
    with pytest.raises(ConfigError, match="latents of another autoencoder"):
        runs(enlarged.store.folder("checkpoint", enlarged.runs[0].final))
    whole = distill_study(teachers=[str(plain)]).model_dump(mode="json")
    whole["train"]["prediction_type"] = whole["distill"]["train"]["prediction_type"] = "epsilon"
    with pytest.raises(ConfigError, match="predicts v_prediction, the study epsilon"):
        runs(plain, parse_spec(StudySpec, whole, "tiny"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sweep": {"guidance": [0.5]}}, "0.5 lies outside what students learn, 1 to 4"),
        ({"guidance_range": [4, 1]}, "runs backwards"),
        ({"stages": [16, 4]}, "each has half the steps of the one before"),
        ({"solver_steps": 48}, "does not divide 1000 timesteps"),
        ({"train": {"num_images": 8, "prediction_type": "epsilon"}}, "a network is tuned as it was trained"),
        ({"train": {"num_images": 8, "prediction_type": "flow_prediction"}}, "is not distilled"),
        ({"train": {"num_images": 8, "sharding": "fsdp"}}, "are not sharded"),
        ({"variants": ["magic"]}, "distill.variants.0 = 'magic'"),
    ],
)
def test_a_study_says_what_is_wrong(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        distill_study(**changes)


def test_a_changed_recipe_conflicts_and_a_new_variant_does_not(finished: Pipeline) -> None:
    with pytest.raises(ConfigError, match=r"distill.latent_weight = 1.0, now it says 2"):
        Pipeline(distill_study(latent_weight=2), finished.out)
    fewer = Pipeline(distill_study(variants=["codi"]), finished.out)
    assert [row["points_to_make"] for row in plan(fewer)["sizes"]] == [0, 0]


def test_a_plan_counts_what_the_table_will_say(finished: Pipeline, tmp_path: Path) -> None:
    """Teacher's and average's passes are part of a student's training, and earlier stages are not counted again."""
    planned = plan(Pipeline(finished.study, tmp_path))["sizes"]
    students = [(run, row) for run, row in zip(finished.runs, planned, strict=True) if run.task == "distill"]
    told = finished.results_db.table().drop_duplicates("checkpoint").set_index("checkpoint")["training_gflop"]
    assert students
    for run, row in students:
        assert row["training_gflop"] == pytest.approx(run.gflop_per_image * row["images_to_train"])
        assert row["training_gflop"] + run.gflop_before == pytest.approx(told[run.final])
        assert row["training_gflop"] > 3 * finished.cost(run).gflop_per_forward * row["images_to_train"]


def test_the_command_line_draws_with_the_students_own_solver(
    finished: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [
        "sample",
        str(component_name(finished, "consistency")),
        "--prompt",
        "a ring",
        "--num-images",
        "1",
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr("sys.argv", ["isocost", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["nfe"] == 4


# --- what the analysis says of planted students ---


class Planted:
    """Differences of the planted values, sure to 0.001."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.values = table.set_index("point")["mmd_efficientnet"]

    def of_points(self, first: str, second: str, metric: str) -> Interval | None:
        difference = float(self.values[first] - self.values[second])
        return Interval(difference, difference - 0.001, difference + 0.001)


@pytest.fixture(scope="module")
def planted() -> pd.DataFrame:
    """Students as good at n steps as their teacher at 4 n, at one pass; the largest is no better than its teacher."""
    table = planted_table(sizes=("0.2M", "3.2M", "12.6M"), solvers=("ddim/trailing",), snapshots=())
    made = table[table["num_steps"] <= 8].copy()
    worth = {"0.2M": 4, "3.2M": 4, "12.6M": 1}
    for column in ("mmd_efficientnet", "mmd_efficientnet_low", "mmd_efficientnet_high"):
        own = table.set_index(["size", "num_steps", "guidance"])[column]
        made[column] = [
            own[size, worth[size] * steps, w]
            for size, steps, w in zip(made["size"], made["num_steps"], made["guidance"], strict=True)
        ]
    made["nfe"] = made["num_steps"].astype(float)
    made["gflop"] /= np.where(made["guidance"] == 1, 1, 2)
    made["size"] += " consistency"
    made["point"] = [f"s{number}" for number in range(len(made))]
    return pd.concat([table, made], ignore_index=True)


def test_sizes_are_told_from_how_they_were_distilled() -> None:
    assert teacher_of("2.6M codi-efficient") == ("2.6M", "codi-efficient")
    assert teacher_of("2.6M from scratch codi") == ("2.6M from scratch", "codi")
    assert teacher_of("2.6M from scratch") == ("2.6M from scratch", "")


def test_planted_accelerations_are_found(planted: pd.DataFrame) -> None:
    found = {(one.student, one.num_steps): one for one in acceleration(planted, "mmd_efficientnet")}
    for steps in (2, 4, 8):
        one = found["3.2M consistency", steps]
        assert one.steps_to_match == pytest.approx(4 * steps)
        assert one.low < one.steps_to_match < one.high
        assert str(one).startswith(f"{steps} steps: 4x [")
    assert found["12.6M consistency", 4].steps_to_match == pytest.approx(4)
    assert "at most 1x" in str(found["12.6M consistency", 2])


def test_steps_between_those_tried_lie_on_a_line_of_the_logarithm() -> None:
    steps, values = np.array([1.0, 4.0, 16.0]), np.array([5.0, 3.0, 1.0])
    assert steps_to_reach(steps, values, 2.0) == pytest.approx(8)
    assert steps_to_reach(steps, values, 6.0) == 1
    assert math.isinf(steps_to_reach(steps, values, 0.5))


def test_planted_students_beat_their_teachers_where_they_do(planted: pd.DataFrame) -> None:
    told = against_teacher(planted, "mmd_efficientnet", Planted(planted))
    assert [one.split(":")[0] for one in told["0.2M consistency"]] == ["2 steps", "4 steps", "8 steps"]
    assert all(one.endswith(", better") for one in told["0.2M consistency"])
    assert all(one.endswith(", undecided") for one in told["12.6M consistency"])


def test_every_pair_is_compared_at_equal_cost(planted: pd.DataFrame) -> None:
    found = comparisons(planted, "mmd_efficientnet", Planted(planted))
    assert set(found["cost"]) == {"normalized_cost", "nfe", "gflop", "ms_per_image"}
    by_paper = found[found["cost"] == "normalized_cost"]
    assert by_paper["claim"].value_counts().to_dict() == {
        "own size": 3,
        "small student, large student": 3,
        "small undistilled, large undistilled": 3,
        "small undistilled, large student": 3,
        "small student, large undistilled": 3,
    }
    own = by_paper[by_paper["claim"] == "own size"].set_index("one")["verdict"]
    assert own.to_dict() == {"0.2M consistency": "better", "3.2M consistency": "better", "12.6M consistency": "undecided"}
    # Guidance 2 is best: at equal evaluations the undistilled has half the steps, so the student wins even where it saves none.
    by_nfe = found[(found["cost"] == "nfe") & (found["claim"] == "own size")].set_index("one")
    assert by_nfe.loc["12.6M consistency", "verdict"] == "better"
    assert (by_nfe["budget"] == 4).all()
    row = by_nfe.loc["0.2M consistency"]
    values = Planted(planted).values
    best = planted[(planted["size"] == "0.2M") & (planted["nfe"] <= 4)]["mmd_efficientnet"].min()
    ours = planted[(planted["size"] == "0.2M consistency") & (planted["nfe"] <= 4)]["mmd_efficientnet"].min()
    assert row["difference"] == pytest.approx(ours - best)
    assert len(values) == len(planted)


class Elsewhere:
    """Points whose features are not here."""

    def of_points(self, first: str, second: str, metric: str) -> Interval | None:
        return None


def test_points_that_were_measured_elsewhere_are_compared_by_their_own_intervals(planted: pd.DataFrame) -> None:
    told = against_teacher(planted, "mmd_efficientnet", Elsewhere())
    assert all(one.endswith(" (not paired), better") for one in told["0.2M consistency"])
    found = comparisons(planted, "mmd_efficientnet", Elsewhere())
    assert not found["is_paired"].any()
    assert found["text"].str.contains(" (not paired): ", regex=False).all()
    paired = comparisons(planted, "mmd_efficientnet", Planted(planted))
    assert found["difference"].tolist() == pytest.approx(paired["difference"].tolist())
    assert ((found["high"] - found["low"]) > (paired["high"] - paired["low"])).all()
    unsure = planted.assign(mmd_efficientnet_low=math.nan)
    (first, *_) = against_teacher(unsure, "mmd_efficientnet", Elsewhere())["0.2M consistency"]
    assert first.endswith("this metric has no interval, undecided")


def test_a_folder_put_together_from_what_was_kept_has_its_report(finished: Pipeline, tmp_path: Path) -> None:
    archive(finished.out, tmp_path / "kept")
    merge(tmp_path / "elsewhere", [tmp_path / "kept"])
    elsewhere = Pipeline(finished.study, tmp_path / "elsewhere")
    report(elsewhere)
    page = (elsewhere.out / "report" / "distill" / "index.html").read_text()
    assert "(not paired)" in page
    assert "(not paired)" not in (finished.out / "report" / "distill" / "index.html").read_text()
