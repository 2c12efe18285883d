"""Distillation: students and teachers of a complete study, exports, costs, errors; comparisons on synthetic tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from diffusers import LatentConsistencyModelPipeline, StableDiffusionPipeline

from conftest import plain_study
from finished_study import PARTS, VARIANTS, finished_spec, with_part
from interruptions import stop_twice
from isocost.analysis.costs import REPORT_COSTS
from isocost.analysis.distillation import (
    comparisons,
    format_teacher_differences,
    measure_accelerations,
    split_student_name,
    steps_to_reach,
)
from isocost.cli import main
from isocost.config.base import parse_spec
from isocost.config.study import StudySpec
from isocost.diffusion.philox import INITIAL_NOISE, philox_normal
from isocost.errors import ConfigError
from isocost.evaluation.confidence_intervals import Interval
from isocost.experiments import distillation
from isocost.experiments.base import make_run
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
from synthetic_results import synthetic_table
from test_latency import write_checkpoint


def distill_study(**changes: Any) -> StudySpec:
    """The finished study with students of every variant, without its other experiments."""
    return with_part("distill", **changes)


@pytest.fixture(scope="module")
def finished(finished_copy: Path) -> Pipeline:
    return Pipeline(finished_spec("distill", "superres"), finished_copy)


def students(pipeline: Pipeline, task: str = "distill") -> dict[str, StudentRun]:
    """The last run of every variant."""
    experiment = pipeline.experiments[task]  # type: ignore[index]
    assert isinstance(experiment, DistillExperiment)
    return {run.kind: run for run in experiment.runs if isinstance(run, StudentRun)}


def student_folder(pipeline: Pipeline, kind: str, task: str = "distill") -> Path:
    return pipeline.store.folder("checkpoint", students(pipeline, task)[kind].final)


# --- a complete study ---


def test_students_and_teachers_are_in_one_table_with_true_costs(finished: Pipeline) -> None:
    table = pd.read_parquet(finished.out / "table-distill.parquet")
    final_points = table[table["is_final"]]
    assert set(final_points["size"]) == {"0.8M", *(f"0.8M {kind}" for kind in VARIANTS)}
    is_student = final_points["size"] != "0.8M"
    assert (final_points[is_student]["nfe"] == final_points[is_student]["num_steps"]).all()
    guided = final_points[~is_student & (final_points["guidance"] != 1)]
    assert (guided["nfe"] == 2 * guided["num_steps"]).all()
    by_size = final_points[final_points["num_steps"] == 2].groupby("size")["normalized_cost"].first()
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


@pytest.mark.slow
def test_training_compute_counts_teacher_and_average(finished: Pipeline) -> None:
    table = pd.read_parquet(finished.out / "table-distill.parquet")
    training_gflop = table[table["is_final"]].groupby(["size", "num_steps"])["training_gflop"].first()
    student = load_checkpoint(student_folder(finished, "consistency")).info.gflop_per_forward
    teacher = load_checkpoint(finished.store.folder("checkpoint", finished.runs[0].final)).info.gflop_per_forward
    assert training_gflop["0.8M consistency", 4] == pytest.approx(64 * (4 * student + 2 * teacher))
    first, second = 32 * (3 * student + 4 * teacher), 32 * (3 * student + 2 * teacher)
    assert training_gflop["0.8M progressive", 4] == pytest.approx(first)
    assert training_gflop["0.8M progressive", 2] == pytest.approx(first + second)


def test_the_metadata_of_a_checkpoint_describes_the_student(finished: Pipeline) -> None:
    info = load_checkpoint(student_folder(finished, "codi")).info
    assert (info.task, info.distilled, info.variant, info.size) == ("distill", "codi", "codi", "0.8M")
    assert info.guidance_range == (1, 4)
    assert info.solver.name == "lcm"
    assert info.parent == finished.runs[0].final
    stages = [run for run in finished.experiments["distill"].runs if run.variant == "progressive"]
    assert [run.num_steps for run in stages if isinstance(run, StudentRun)] == [4, 2]
    assert stages[1].parent == finished.store.folder("checkpoint", stages[0].final)
    assert load_checkpoint(student_folder(finished, "progressive")).info.solver.name == "ddim"


def test_the_report_compares_students_with_teachers(finished: Pipeline) -> None:
    page = (finished.out / "report" / "distill" / "index.html").read_text()
    for text in ("0.8M codi-efficient", "student minus its own teacher", "steps that the undistilled model needs", "own size"):
        assert text in page, text
    assert "distill/index.html" in (finished.out / "report" / "index.html").read_text()


def test_a_student_takes_one_pass_and_depends_on_guidance(finished: Pipeline) -> None:
    folder = student_folder(finished, "consistency")
    low, high = (sample(folder, ["a red ring"], num_images=2, guidance=guidance) for guidance in (1.0, 4.0))
    assert low.nfe == high.nfe == 4
    assert not np.array_equal(low.array, high.array)
    progressive = sample(student_folder(finished, "progressive"), ["a red ring"], num_steps=2, num_images=2)
    assert progressive.nfe == 2
    assert sample(student_folder(finished, "codi"), ["a red ring"], num_images=1).nfe == 4


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_table(finished: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the second stage of the progressive student, then in a sweep."""
    out, study = tmp_path / "out", distill_study()
    stop_twice(study, out, monkeypatch, at_step=4 + 3 * 4 + 3, at_record=2)
    pipeline = Pipeline(study, out)
    assert pipeline.run()
    report(pipeline, figure_formats=())
    left, right = (
        pd.read_parquet(run.out / "table-distill.parquet").drop(columns=HARDWARE_COLUMNS).dropna(axis="columns", how="all")
        for run in (finished, pipeline)
    )
    pd.testing.assert_frame_equal(left, right)


def test_super_resolution_has_students_too(finished: Pipeline) -> None:
    table = finished.results_db.table()
    table = table[table["task"] == "superres-distill"]
    assert set(table["size"]) == {f"0.8M {kind}" for kind in VARIANTS[:2]}
    assert (table["nfe"] == table["num_steps"]).all()
    image = np.full((9, 11, 3), 90, dtype=np.uint8)
    for kind in VARIANTS[:2]:
        folder = student_folder(finished, kind, "superres-distill")
        result = upscale(folder, image)
        assert (result.image.shape, result.nfe) == ((36, 44, 3), 4)
    info = load_checkpoint(student_folder(finished, "codi", "superres-distill")).info
    assert info.parent == finished.experiments["text2image"].runs[0].final
    assert (info.model.adapter, info.guidance_range) == ("concat_cond", None)


def test_the_page_of_superres_students_shows_the_inputs(finished: Pipeline) -> None:
    table = pd.read_parquet(finished.out / "table-superres-distill.parquet")
    assert set(table["size"]) == {"0.8M", "0.8M from scratch", *(f"0.8M {kind}" for kind in VARIANTS[:2])}
    page = (finished.out / "report" / "superres-distill" / "index.html").read_text()
    assert "low resolution" in page


# --- exports ---


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.fast_cases(2)
def test_diffusers_generates_the_latents_of_a_consistency_student(
    finished: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guidance: float, num_steps: int
) -> None:
    """Latents of the LCM pipeline and ours from the same noise, with a relative error of 1e-5."""
    folder, prompts = student_folder(finished, "consistency"), ["a red circle on a white background", "two blue squares"]
    autoencoder, decoded = load_autoencoder("scenes"), []
    decode = autoencoder.decode
    monkeypatch.setattr(autoencoder, "decode", lambda latents: decoded.append(latents.clone()) or decode(latents))
    monkeypatch.setattr("isocost.sampling.sample.load_checkpoint_autoencoder", lambda *_: autoencoder)
    sample(folder, prompts, num_steps=num_steps, guidance=guidance, num_images=1, seed=5)
    ours = decoded[0][:2]
    pipeline = LatentConsistencyModelPipeline.from_pretrained(export(folder, tmp_path / "exported"), use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    evaluations = iter(range(1, num_steps))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_lcm.randn_tensor",
        lambda *_, **__: philox_normal(5, torch.arange(2), next(evaluations), (4, 8, 8), "cpu"),
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
    assert next(evaluations, None) is None
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.slow
def test_a_progressive_student_is_exported_to_the_pipeline_of_stable_diffusion(finished: Pipeline, tmp_path: Path) -> None:
    folder = student_folder(finished, "progressive")
    ours = sample(folder, ["a red ring"], num_steps=2, guidance=2.0, num_images=1, seed=5).array[:, 0]
    pipeline = StableDiffusionPipeline.from_pretrained(export(folder, tmp_path / "exported"), use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    noise = philox_normal(5, torch.arange(1), INITIAL_NOISE, (4, 8, 8), "cpu")
    theirs = pipeline(
        ["a red ring"], num_inference_steps=2, guidance_scale=2.0, latents=noise, height=32, width=32, output_type="np"
    ).images
    assert np.abs(ours.astype(float) - theirs * 255).max() <= 1.0


# --- errors ---


def test_errors_are_one_line(finished: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="network with an adapter"):
        export(student_folder(finished, "codi"), tmp_path / "exported")
    with pytest.raises(ConfigError, match="this student was trained on guidance 1 to 4"):
        sample(student_folder(finished, "consistency"), ["a ring"], guidance=7.5)
    with pytest.raises(ConfigError, match="no unconditional pass; leave the negative prompt out"):
        sample(student_folder(finished, "consistency"), ["a ring"], negative_prompt="a square")
    with pytest.raises(ConfigError, match="isocost upscale"):
        sample(student_folder(finished, "consistency", "superres-distill"), ["a ring"])
    pipeline = Pipeline(distill_study(), tmp_path / "new")
    with pytest.raises(ConfigError, match="its teacher does not exist yet; run `isocost train`"):
        pipeline.train(students(pipeline)["consistency"])


def test_teachers_must_be_compatible(finished: Pipeline, tmp_path: Path) -> None:
    def runs(teacher: Path, study: StudySpec | None = None) -> list[Any]:
        spec = study or distill_study(teachers=[str(teacher)])
        return Pipeline(spec, tmp_path / "other").experiments["distill"].runs

    plain = finished.store.folder("checkpoint", finished.runs[0].final)
    assert {run.teacher for run in runs(plain)} == {plain}
    with pytest.raises(ConfigError, match="is a student already"):
        runs(student_folder(finished, "consistency"))
    with pytest.raises(ConfigError, match="no such checkpoint folder"):
        runs(tmp_path / "absent")
    with pytest.raises(ConfigError, match="trained for superres"):
        runs(finished.store.folder("checkpoint", finished.experiments["superres"].runs[0].final))
    distill = {**PARTS["distill"], "teachers": [str(plain)]}
    with pytest.raises(ConfigError, match="latents of another autoencoder"):
        runs(plain, finished_spec("distill", autoencoder=plain_study()["autoencoder"], distill=distill))
    study = distill_study(teachers=[str(plain)]).model_dump(mode="json")
    study["train"]["prediction_type"] = study["distill"]["train"]["prediction_type"] = "epsilon"
    with pytest.raises(ConfigError, match="trained with prediction_type v_prediction, but the study has epsilon; set"):
        runs(plain, parse_spec(StudySpec, study, "tiny"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweep": {"guidance": [0.5]}}, "0.5 is outside guidance_range, 1 to 4"),
        ({"guidance_range": [4, 1]}, "runs backwards"),
        ({"stages": [16, 4]}, "half the steps of the previous one"),
        ({"solver_steps": 48}, "does not divide 1000 timesteps"),
        ({"train": {"num_images": 8, "prediction_type": "epsilon"}}, "fine-tuning needs the value of train"),
        ({"train": {"num_images": 8, "prediction_type": "flow_prediction"}}, "cannot be distilled"),
        ({"train": {"num_images": 8, "sharding": "fsdp"}}, "does not support sharding"),
        ({"guide": {"size": 4}, "guidance_range": None, "sweep": {"guidance": [1]}}, "needs a guidance_range"),
        ({"guide": {"size": 4}, "guidance_range": [0.5, 4]}, "w below 1 with a guide"),
        ({"guide": {"size": 4, "checkpoint": "x"}}, "either size or checkpoint"),
        ({"guide": {"size": "all"}}, "distill.guide.size = 'all'"),
        ({"variants": ["magic"]}, "distill.variants.0 = 'magic'"),
    ],
)
def test_an_invalid_study_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        distill_study(**changes)


def pair_study(guide: dict[str, Any] | None, **changes: Any) -> StudySpec:
    """Two sizes and their students, whose teachers have a guide."""
    distill = {**PARTS["distill"], "variants": ["consistency", "progressive"], "guide": guide, **changes}
    return finished_spec("distill", family={"widths": [4, 8]}, distill=distill)


def student_runs(study: StudySpec, out: Path) -> list[StudentRun]:
    return [run for run in Pipeline(study, out).experiments["distill"].runs if isinstance(run, StudentRun)]


def test_a_guide_is_one_member_of_the_study_and_its_passes_are_counted(tmp_path: Path) -> None:
    guided = student_runs(pair_study({"size": 4, "snapshot": 32}), tmp_path)
    plain = student_runs(pair_study(None), tmp_path)
    pipeline = Pipeline(pair_study(None), tmp_path)
    small, large = pipeline.experiments["text2image"].runs
    guide = pipeline.store.folder("checkpoint", small.checkpoints[32])
    cost = {run.model.width: pipeline.cost(run).gflop_per_forward for run in (small, large)}
    for run, without in zip(guided, plain, strict=True):
        assert run.digest != without.digest
        is_guided = run.is_first
        assert run.guide == (guide if is_guided else None)
        assert (guide in run.sources) is is_guided, "training waits for the checkpoint of the guide"
        number = 2 if run.kind == "progressive" else 1
        saved = number * (cost[run.model.width] - cost[4]) if is_guided else 0
        assert run.gflop_per_image == pytest.approx(without.gflop_per_image - saved)
    by_size = student_runs(pair_study({"size": "same", "snapshot": 32}), tmp_path)
    folders = [pipeline.store.folder("checkpoint", run.checkpoints[32]) for run in (small, large)]
    assert list(dict.fromkeys(run.guide for run in by_size if run.guide is not None)) == folders


def test_without_a_guide_the_digest_of_a_student_has_no_key_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs: list[Any] = []
    monkeypatch.setattr(distillation, "make_run", lambda *arguments: inputs.append(arguments[3]) or make_run(*arguments))
    without = {run.digest for run in student_runs(distill_study(), tmp_path)}
    assert without == {run.digest for run in student_runs(distill_study(guide=None), tmp_path)}
    assert inputs
    assert all("guide" not in stage for stage in inputs)


WRONG_GUIDES: dict[str, tuple[dict[str, Any], str]] = {
    "itself": ({"size": "same"}, "would guide itself; give an earlier snapshot"),
    "no smaller size": ({"size": "smaller"}, "no width of the study is smaller than teacher"),
    "larger": ({"size": 8}, "it is larger than teacher"),
    "no such width": ({"size": 5}, "no such width; the study has 4, 8"),
    "no such snapshot": ({"size": 4, "snapshot": 33}, "width 4 has no such snapshot; it has 32, 64 images"),
    "no such folder": ({"checkpoint": "absent"}, "absent: no such checkpoint folder"),
}


@pytest.mark.parametrize("case", WRONG_GUIDES)
def test_a_wrong_guide_of_teachers_is_one_line_and_nothing_is_written(case: str, tmp_path: Path, isocost: Any) -> None:
    guide, message = WRONG_GUIDES[case]
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(pair_study(guide).model_dump(mode="json")), encoding="utf-8")
    outcome = isocost("run", study, "--out", tmp_path / "out")
    assert outcome.status == 2, outcome.err
    assert message in outcome.line
    assert len(outcome.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_guide_in_a_folder_must_fit_the_study(finished: Pipeline, tmp_path: Path) -> None:
    def refused(guide: Path, **changes: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            student_runs(distill_study(guide={"checkpoint": str(guide)}, **changes), tmp_path)
        return str(caught.value)

    assert "would guide itself" in refused(
        finished.store.folder("checkpoint", finished.runs[0].final),
        teachers=[str(finished.store.folder("checkpoint", finished.runs[0].final))],
    )
    assert "is a student already" in refused(student_folder(finished, "consistency"))
    assert "trained for superres" in refused(
        finished.store.folder("checkpoint", finished.experiments["superres"].runs[0].final)
    )
    other = write_checkpoint(tmp_path / "other", {"latent_size": 16})
    assert "latents of another autoencoder" in refused(other)
    zero_snr = write_checkpoint(tmp_path / "zero-snr", {"width": 4}, rescale_betas_zero_snr=True)
    assert "another noise schedule" in refused(zero_snr)
    fitting = write_checkpoint(tmp_path / "fitting", {"width": 4})
    runs = student_runs(distill_study(guide={"checkpoint": str(fitting)}), tmp_path)
    assert {run.guide for run in runs if run.is_first} == {fitting}


@pytest.mark.slow
def test_a_student_learns_the_guided_pair(family_copy: Path) -> None:
    """The teacher of width 8 is guided by its own snapshot at 32 images."""
    sweep = {"num_steps": [4], "guidance": [2], "batch_size": 16}
    study = distill_study(variants=["consistency"], guide={"size": "same", "snapshot": 32}, sweep=sweep)
    pipeline = Pipeline(study, family_copy)
    assert pipeline.run()
    (run,) = pipeline.experiments["distill"].runs
    info = load_checkpoint(pipeline.store.folder("checkpoint", run.final)).info
    assert info.teacher_guide == pipeline.runs[0].checkpoints[32]
    cost = pipeline.cost(pipeline.runs[0]).gflop_per_forward
    assert info.training_gflop == pytest.approx(64 * (4 * info.gflop_per_forward + 2 * cost))
    table = pipeline.results_db.table()
    rows = table[table["checkpoint"] == run.final]
    assert (rows["nfe"] == rows["num_steps"]).all()
    with pytest.raises(ConfigError, match=r"distill.guide"):
        Pipeline(distill_study(variants=["consistency"], sweep=sweep), family_copy)


def test_a_changed_recipe_conflicts_and_a_new_variant_does_not(finished: Pipeline) -> None:
    with pytest.raises(ConfigError, match=r"distill.latent_weight = 1.0, but the study has 2"):
        Pipeline(distill_study(latent_weight=2), finished.out)
    fewer = Pipeline(distill_study(variants=["codi"]), finished.out)
    assert [row["points_to_make"] for row in plan(fewer)["sizes"]] == [0, 0]


def test_a_plan_counts_the_training_compute_of_the_table(finished: Pipeline, tmp_path: Path) -> None:
    """It includes the passes of the teacher and of the weight average, and does not count previous stages again."""
    planned = plan(Pipeline(finished.study, tmp_path))["sizes"]
    students = [(run, row) for run, row in zip(finished.runs, planned, strict=True) if run.task == "distill"]
    training_gflop = finished.results_db.table().drop_duplicates("checkpoint").set_index("checkpoint")["training_gflop"]
    assert students
    for run, row in students:
        assert row["training_gflop"] == pytest.approx(run.gflop_per_image * row["images_to_train"])
        assert row["training_gflop"] + run.gflop_before == pytest.approx(training_gflop[run.final])
        assert row["training_gflop"] > 3 * finished.cost(run).gflop_per_forward * row["images_to_train"]


def test_the_command_line_samples_with_the_students_own_solver(
    finished: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [
        "sample",
        str(student_folder(finished, "consistency")),
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


# --- analysis of synthetic students ---


class SyntheticComparer:
    """Differences of synthetic values, with intervals of ±0.001."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.values = table.set_index("point")["mmd_efficientnet"]

    def difference(self, first: str, second: str, metric: str) -> Interval | None:
        difference = float(self.values[first] - self.values[second])
        return Interval(difference, difference - 0.001, difference + 0.001)


@pytest.fixture(scope="module")
def synthetic() -> pd.DataFrame:
    """Students of one pass that equal their teachers at four times the steps; the largest only equals its teacher."""
    table = synthetic_table(sizes=("0.2M", "3.2M", "12.6M"), solvers=("ddim/trailing",), snapshots=())
    students = table[table["num_steps"] <= 8].copy()
    acceleration = {"0.2M": 4, "3.2M": 4, "12.6M": 1}
    for column in ("mmd_efficientnet", "mmd_efficientnet_low", "mmd_efficientnet_high"):
        teacher_scores = table.set_index(["size", "num_steps", "guidance"])[column]
        students[column] = [
            teacher_scores[size, acceleration[size] * steps, w]
            for size, steps, w in zip(students["size"], students["num_steps"], students["guidance"], strict=True)
        ]
    students["nfe"] = students["num_steps"].astype(float)
    students["gflop"] /= np.where(students["guidance"] == 1, 1, 2)
    students["size"] += " consistency"
    students["point"] = [f"s{number}" for number in range(len(students))]
    return pd.concat([table, students], ignore_index=True)


def test_the_name_of_a_student_is_split_into_size_and_variant() -> None:
    assert split_student_name("2.6M codi-efficient") == ("2.6M", "codi-efficient")
    assert split_student_name("2.6M from scratch codi") == ("2.6M from scratch", "codi")
    assert split_student_name("2.6M from scratch") == ("2.6M from scratch", "")


def test_synthetic_accelerations_are_found(synthetic: pd.DataFrame) -> None:
    accelerations = {(row.student, row.num_steps): row for row in measure_accelerations(synthetic, "mmd_efficientnet")}
    for steps in (2, 4, 8):
        acceleration = accelerations["3.2M consistency", steps]
        assert acceleration.steps_to_match == pytest.approx(4 * steps)
        assert acceleration.low < acceleration.steps_to_match < acceleration.high
        assert str(acceleration).startswith(f"{steps} steps: 4x [")
    assert accelerations["12.6M consistency", 4].steps_to_match == pytest.approx(4)
    assert "at most 1x" in str(accelerations["12.6M consistency", 2])


def test_steps_are_interpolated_linearly_in_their_logarithm() -> None:
    steps, values = np.array([1.0, 4.0, 16.0]), np.array([5.0, 3.0, 1.0])
    assert steps_to_reach(steps, values, 2.0) == pytest.approx(8)
    assert steps_to_reach(steps, values, 6.0) == 1
    assert math.isinf(steps_to_reach(steps, values, 0.5))


def test_only_better_synthetic_students_beat_their_teachers(synthetic: pd.DataFrame) -> None:
    differences = format_teacher_differences(synthetic, "mmd_efficientnet", SyntheticComparer(synthetic))
    assert [text.split(":")[0] for text in differences["0.2M consistency"]] == ["2 steps", "4 steps", "8 steps"]
    assert all(text.endswith(", better") for text in differences["0.2M consistency"])
    assert all(text.endswith(", undecided") for text in differences["12.6M consistency"])


def test_every_pair_is_compared_at_equal_cost(synthetic: pd.DataFrame) -> None:
    compared = comparisons(synthetic, "mmd_efficientnet", SyntheticComparer(synthetic))
    assert set(compared["cost"]) == set(REPORT_COSTS)
    at_normalized_cost = compared[compared["cost"] == "normalized_cost"]
    assert at_normalized_cost["claim"].value_counts().to_dict() == {
        "own size": 3,
        "small student, large student": 3,
        "small undistilled, large undistilled": 3,
        "small undistilled, large student": 3,
        "small student, large undistilled": 3,
    }
    verdicts = at_normalized_cost[at_normalized_cost["claim"] == "own size"].set_index("one")["verdict"]
    assert verdicts.to_dict() == {"0.2M consistency": "better", "3.2M consistency": "better", "12.6M consistency": "undecided"}
    # Guidance 2 is best. At equal NFE the teacher has half the steps, so even the student without acceleration wins.
    by_nfe = compared[(compared["cost"] == "nfe") & (compared["claim"] == "own size")].set_index("one")
    assert by_nfe.loc["12.6M consistency", "verdict"] == "better"
    assert (by_nfe["budget"] == 4).all()
    row = by_nfe.loc["0.2M consistency"]
    within_budget = synthetic[synthetic["nfe"] <= 4]
    teacher = within_budget[within_budget["size"] == "0.2M"]["mmd_efficientnet"].min()
    student = within_budget[within_budget["size"] == "0.2M consistency"]["mmd_efficientnet"].min()
    assert row["difference"] == pytest.approx(student - teacher)


class UnpairedComparer:
    """Comparer of points whose features are in another output folder."""

    def difference(self, first: str, second: str, metric: str) -> Interval | None:
        return None


def test_points_without_features_are_compared_by_their_own_intervals(synthetic: pd.DataFrame) -> None:
    differences = format_teacher_differences(synthetic, "mmd_efficientnet", UnpairedComparer())
    assert all(text.endswith(" (not paired), better") for text in differences["0.2M consistency"])
    unpaired = comparisons(synthetic, "mmd_efficientnet", UnpairedComparer())
    assert not unpaired["is_paired"].any()
    assert unpaired["text"].str.contains(" (not paired): ", regex=False).all()
    paired = comparisons(synthetic, "mmd_efficientnet", SyntheticComparer(synthetic))
    assert unpaired["difference"].tolist() == pytest.approx(paired["difference"].tolist())
    assert ((unpaired["high"] - unpaired["low"]) > (paired["high"] - paired["low"])).all()
    without_interval = synthetic.assign(mmd_efficientnet_low=math.nan)
    (first, *_) = format_teacher_differences(without_interval, "mmd_efficientnet", UnpairedComparer())["0.2M consistency"]
    assert first.endswith("this metric has no interval, undecided")


@pytest.mark.slow
def test_a_folder_merged_from_an_archive_has_its_report(finished: Pipeline, tmp_path: Path) -> None:
    archive(finished.out, tmp_path / "archive")
    merge(tmp_path / "elsewhere", [tmp_path / "archive"])
    elsewhere = Pipeline(distill_study(), tmp_path / "elsewhere")
    report(elsewhere, figure_formats=())
    page = (elsewhere.out / "report" / "distill" / "index.html").read_text()
    assert "(not paired)" not in page, "the archive has the resamples of the points"
    assert "(not paired)" not in (finished.out / "report" / "distill" / "index.html").read_text()
