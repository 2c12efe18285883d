"""A study of given checkpoints: swept, scored, costed and recommended from, without a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import LCMScheduler
from safetensors.torch import save_file

import tiny_pipelines
from conftest import plain_study
from isocost.config.base import parse_spec
from isocost.config.study import StudySpec
from isocost.config.study_yaml import dump_study
from isocost.errors import ConfigError
from isocost.models.checkpoint import load_checkpoint
from isocost.models.components import DownsamplingDecoder
from isocost.pipeline.pipeline import Pipeline


def plain(paths: list[Path], **changes: Any) -> dict[str, Any]:
    """A study of checkpoints in seconds."""
    return {
        "name": "given",
        "data": {"resolution": 16, "reference": {"kind": "scenes", "num_images": 64, "seed": 1}},
        "checkpoints": [str(path) for path in paths],
        "sweep": {
            "solvers": [{"name": "euler"}, {"name": "lcm"}],
            "num_steps": [1, 2],
            "guidance": [1, 3],
            "batch_size": 16,
        },
        "protocol": {"num_images": 32, "num_reference": 64, "num_bootstrap": 20},
        **changes,
    }


def study(paths: list[Path], **changes: Any) -> StudySpec:
    return parse_spec(StudySpec, plain(paths, **changes), "given")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A Stable Diffusion, a few-step student of twice the resolution, and a flow."""
    root = tmp_path_factory.mktemp("checkpoints")
    student = tiny_pipelines.stable_diffusion(
        LCMScheduler(**tiny_pipelines.BETAS, prediction_type="epsilon"), {"time_cond_proj_dim": 16}
    )
    student.unet.register_to_config(sample_size=2 * tiny_pipelines.SIDE)
    return [
        tiny_pipelines.written(tiny_pipelines.stable_diffusion(), root / "base"),
        tiny_pipelines.written(student, root / "student"),
        tiny_pipelines.written(tiny_pipelines.sd3(with_t5=False), root / "flow"),
    ]


@pytest.fixture
def isocost(isocost: Any) -> Any:
    """Run a command in this process; gives its answer, or the line of its mistake."""

    def command(*arguments: object) -> Any:
        outcome = isocost(*arguments)
        return outcome.line if outcome.status else outcome.answer

    return command


def test_run_scores_and_recommend_answers(folders: list[Path], tmp_path: Path, isocost: Any) -> None:
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(plain(folders)))
    plan = isocost("run", file, "--out", out, "--dry-run")
    assert [size["images_to_train"] for size in plan["sizes"]] == [0, 0, 0]
    assert plan["total"]["points_to_make"] == 12
    told = isocost("run", file, "--out", out)
    assert told["finished"]
    assert told["num_points"] == 12
    assert isocost("status", out)["stage"] == "done"
    pipeline = Pipeline(parse_spec(StudySpec, yaml.safe_load((out / "study.yaml").read_text()), "study.yaml"), out)
    table = pipeline.results_db.table()
    assert table["mmd_efficientnet"].notna().all()
    assert table["is_final"].all()
    for folder in folders:
        info = pipeline.experiments["text2image"].pretrained(next(run for run in pipeline.runs if run.variant == folder.name))
        assert info is not None
        rows = table[table["size"] == info.label]
        assert len(rows) == 4
        assert set(rows["num_parameters"]) == {info.num_parameters}
        two_passes = (rows["guidance"] > 1) & (not info.model.embeds_guidance)
        assert list(rows["nfe"]) == list(rows["num_steps"] * (1 + two_passes))
        assert list(rows["gflop"]) == pytest.approx(list(rows["nfe"] * info.gflop_per_forward))
        assert list(rows["normalized_cost"]) == pytest.approx(list(rows["num_steps"] * info.normalized_cost_per_step))
        assert set(rows["solver"]) == {"lcm/trailing" if folder.name == "student" else "euler/trailing"}
    before = table.set_index("point")["mmd_efficientnet"]
    assert isocost("sweep", file, "--out", out)["points"] == 12
    assert before.equals(pipeline.results_db.table().set_index("point")["mmd_efficientnet"])
    best = isocost("recommend", out, "--budget-nfe", 4)
    assert any(best["configuration"]["size"].endswith(folder.name) for folder in folders)
    entered = out / "artefacts" / "checkpoint" / best["configuration"]["checkpoint"]
    assert str(entered) in best["command"]
    assert [one.name for one in entered.iterdir()] == ["isocost.json"]
    drawn = isocost("sample", entered, "--prompt", "a ring", "--num-images", 1, "--steps", 1, "--out", tmp_path / "drawn")
    assert len(drawn["files"]) == 1
    assert "no autoencoder of its own" in isocost("autoencoder", file, "--out", out)
    assert "no autoencoder of its own" in isocost("train", file, "--out", out, "--forecast")
    assert "no autoencoder of its own" in isocost("run", file, "--dry-run", "--devices", "8xH100")
    assert "is a pipeline of diffusers already" in isocost("export", folders[0], tmp_path / "exported")


def test_guidance_is_raced_for(folders: list[Path], tmp_path: Path) -> None:
    race = {"search": "race", "guidance": [1, 2, 4], "num_steps": [1], "solvers": [{"name": "ddim"}], "batch_size": 16}
    pipeline = Pipeline(study(folders[:1], sweep={**race, "race": {"rungs": [16]}}), tmp_path / "out")
    assert pipeline.run()
    (run,) = pipeline.runs
    assert {point.spec.guidance == 1 for point in pipeline.points(run)} == {True, False}


def test_a_folder_that_changed_is_not_taken_for_what_was_scored(tmp_path: Path) -> None:
    mine = tiny_pipelines.written(tiny_pipelines.stable_diffusion(), tmp_path / "mine")
    pipeline = Pipeline(study([mine]), tmp_path / "out")
    (run,) = pipeline.runs
    pipeline.train(run)
    entered = pipeline.store.folder("checkpoint", run.final)
    assert load_checkpoint(entered).digest == load_checkpoint(mine).digest == run.final
    tiny_pipelines.change(mine / "scheduler" / "scheduler_config.json", beta_end=0.013)
    with pytest.raises(ConfigError, match="has changed since"):
        load_checkpoint(entered)
    assert Pipeline(study([mine]), tmp_path / "out").runs[0].final != run.final


def test_images_are_reduced_to_the_side_that_is_scored(folders: list[Path], tmp_path: Path) -> None:
    pipeline = Pipeline(study(folders[1:2]), tmp_path / "out")
    (run,) = pipeline.runs
    (job,) = pipeline.experiments["text2image"].jobs(run)
    autoencoder = job.eval_context().autoencoder
    assert isinstance(autoencoder, DownsamplingDecoder)
    assert autoencoder.decode(torch.zeros(2, 4, 16, 16)).shape == (2, 3, 16, 16)
    flat = torch.full((1, 3, 32, 32), 77, dtype=torch.uint8)
    autoencoder.autoencoder = type("Flat", (), {"decode": lambda self, _: flat})()
    assert torch.equal(autoencoder.decode(torch.zeros(1)), flat[:, :, :16, :16])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"resolution": 24, "reference": {"kind": "scenes", "num_images": 64}}}, "base draws 16 pixels"),
        ({"sweep": {"solvers": [{"name": "lcm"}], "num_steps": [2], "guidance": [1]}}, "none for base"),
        ({"sweep": {"solvers": [{"name": "ddim"}], "num_steps": [2], "guidance": [1]}}, "student: it is a few-step student"),
        ({"checkpoints": ["{base}", "{copy}"]}, "both called"),
    ],
)
def test_what_a_checkpoint_does_not_take_is_said_before_anything_is_drawn(
    folders: list[Path], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    asked = plain(folders[:2], **changes)
    asked["checkpoints"] = [str(path).format(base=folders[0], copy=f"{folders[0]}/") for path in asked["checkpoints"]]
    pipeline = Pipeline(parse_spec(StudySpec, asked, "given"), tmp_path / "out")
    with pytest.raises(ConfigError, match=said):
        pipeline.run()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"family": {"widths": [8]}}, "family: has no place beside checkpoints"),
        ({"train": {"num_images": 8}}, "train: has no place"),
        ({"text_encoder": {"path": "elsewhere"}}, "text_encoder: has no place"),
        ({"protocol": {"alignment": "scenes"}}, "protocol.alignment: needs a probe"),
        ({"checkpoints": ["a/b", "a/b"]}, "each once"),
        ({"checkpoints": []}, "autoencoder: missing; a study trains a family, or has checkpoints"),
    ],
)
def test_a_study_trains_or_is_given_checkpoints(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        study([Path("a/b")], **changes)
    with pytest.raises(ConfigError, match=r"data\.train: missing"):
        parse_spec(StudySpec, {**plain_study(), "data": plain([])["data"]}, "tiny")


def test_a_study_of_checkpoints_survives_its_file() -> None:
    asked = study([Path("a/b"), Path("c/d@main")])
    assert parse_spec(StudySpec, yaml.safe_load(dump_study(asked)), "again") == asked
    with pytest.raises(ConfigError, match="its checkpoints are given"):
        asked.own  # noqa: B018


@pytest.mark.slow
def test_flux_and_a_lora_stand_in_a_sweep(folders: list[Path], tmp_path: Path, isocost: Any) -> None:
    """A Flux whose guidance is an input; a Stable Diffusion with a LoRA, which takes both of the sweep's solvers."""
    flux = tiny_pipelines.written(tiny_pipelines.flux(), tmp_path / "flux")
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    torch.manual_seed(0)
    added = {f"{layer}.lora_A.weight": torch.randn(2, 32), f"{layer}.lora_B.weight": torch.randn(32, 2)}
    save_file(added, tmp_path / "style.safetensors")
    style = f"{folders[0]} + {tmp_path / 'style.safetensors'}:0.5"
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    asked = plain([folders[0], flux])
    asked["checkpoints"].append(style)
    asked["sweep"] |= {"num_steps": [2], "guidance": [1, 3]}
    file.write_text(yaml.safe_dump(asked))
    told = isocost("run", file, "--out", out)
    assert told["finished"], told
    table = Pipeline(parse_spec(StudySpec, asked, "given"), out).results_db.table()
    rows = {name: table[table["size"].str.endswith(f" {name}")] for name in ("base", "flux", "base + style:0.5")}
    assert [len(one) for one in rows.values()] == [2, 2, 4]
    assert list(rows["flux"]["nfe"]) == [2, 2]
    assert set(rows["base + style:0.5"]["solver"]) == {"euler/trailing", "lcm/trailing"}
    euler = rows["base + style:0.5"][rows["base + style:0.5"]["solver"] == "euler/trailing"]
    assert list(euler["gflop"]) == list(rows["base"]["gflop"])
    assert not set(euler["mmd_efficientnet"]) & set(rows["base"]["mmd_efficientnet"])
    assert (out / "report" / "index.html").is_file()
    assert "configuration" in isocost("recommend", out, "--budget-nfe", 2)
    drawn = isocost(
        "sample", style, "--prompt", "a ring", "--num-images", 1, "--solver", "lcm", "--steps", 1, "--out", tmp_path / "a"
    )
    assert len(drawn["files"]) == 1
    measured = isocost("latency", flux, "--steps", 1, "--batch", 1, "--repeats", 3)
    assert measured["batches"][0]["nfe_per_image"] == 1
    assert "is a pipeline of diffusers already" in isocost("export", style, tmp_path / "exported")
    assert "of another network" in isocost("sample", f"{flux} + {tmp_path / 'style.safetensors'}", "--prompt", "a ring")
