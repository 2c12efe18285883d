"""A study of published checkpoints: sweep, scores, costs and recommendation without training."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
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
from isocost.report.report_data import rebuild


def plain(paths: list[Path], **changes: Any) -> dict[str, Any]:
    """A study of checkpoints that takes seconds."""
    return {
        "name": "pretrained",
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
    return parse_spec(StudySpec, plain(paths, **changes), "pretrained")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A Stable Diffusion, a few-step student of twice the resolution, and a flow."""
    root = tmp_path_factory.mktemp("checkpoints")
    student = tiny_pipelines.stable_diffusion(
        LCMScheduler(**tiny_pipelines.BETAS, prediction_type="epsilon"), {"time_cond_proj_dim": 16}
    )
    student.unet.register_to_config(sample_size=2 * tiny_pipelines.LATENT_SIZE)
    return [
        tiny_pipelines.written(tiny_pipelines.stable_diffusion(), root / "base"),
        tiny_pipelines.written(student, root / "student"),
        tiny_pipelines.written(tiny_pipelines.sd3(with_t5=False), root / "flow"),
    ]


@pytest.fixture
def isocost(isocost: Any) -> Any:
    """Run a command in this process and return its JSON, or its error line."""

    def command(*arguments: object) -> Any:
        outcome = isocost(*arguments)
        return outcome.line if outcome.status else outcome.answer

    return command


def check_report(out: Path) -> None:
    """The report leads with GFLOP per image, names nothing that needs a training, and is rebuilt byte by byte."""
    page, summary = (out / "report" / "index.html"), (out / "report" / "summary.md").read_text()
    body = page.read_text().partition('id="report-data"')[0].partition("<h3>Study</h3>")[0]
    for text in (re.sub(r"<[^>]+>", " ", body.partition("<body>")[2]), summary):
        assert "GFLOP per image" in text
        assert "units of normalized cost" not in text
        for word in (
            "DreamBooth",
            "super-resolution",
            "snapshot",
            "Training",
            "training",
            " trained",
            "images seen",
            "paper's",
        ):
            assert word not in text, word
    assert "| GFLOP |" in summary
    assert not (out / "report" / "claims.md").exists()
    assert not list((out / "report" / "figures").glob("*compute*"))
    before = page.read_bytes()
    rebuild(out)
    assert page.read_bytes() == before
    assert (out / "report" / "summary.md").read_text() == summary


@pytest.mark.slow
def test_a_run_is_scored_and_recommended_from(folders: list[Path], tmp_path: Path, isocost: Any) -> None:
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(plain(folders)))
    plan = isocost("run", file, "--out", out, "--dry-run")
    assert [size["images_to_train"] for size in plan["sizes"]] == [0, 0, 0]
    assert plan["total"]["points_to_make"] == 12
    result = isocost("run", file, "--out", out)
    assert result["finished"]
    assert result["num_points"] == 12
    assert isocost("status", out)["stage"] == "done"
    assert {choice["cost"] for choice in result["best_at_budgets"]} == {"gflop"}
    check_report(out)
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
        assert list(rows["gflop_denoiser"]) == pytest.approx(list(rows["nfe"] * info.gflop_per_forward))
        assert list(rows["normalized_cost"]) == pytest.approx(list(rows["num_steps"] * info.normalized_cost_per_step))
        assert set(rows["solver"]) == {"lcm/trailing" if folder.name == "student" else "euler/trailing"}
    before = table.set_index("point")["mmd_efficientnet"]
    assert isocost("sweep", file, "--out", out)["points"] == 12
    assert before.equals(pipeline.results_db.table().set_index("point")["mmd_efficientnet"])
    best = isocost("recommend", out, "--budget-nfe", 4)
    assert any(best["configuration"]["size"].endswith(folder.name) for folder in folders)
    checkpoint = out / "artefacts" / "checkpoint" / best["configuration"]["checkpoint"]
    assert str(checkpoint) in best["command"]
    assert [path.name for path in checkpoint.iterdir()] == ["isocost.json"]
    images = isocost("sample", checkpoint, "--prompt", "a ring", "--num-images", 1, "--steps", 1, "--out", tmp_path / "images")
    assert len(images["files"]) == 1
    assert "this study scores pretrained checkpoints and trains nothing" in isocost("autoencoder", file, "--out", out)
    assert "this study scores pretrained checkpoints and trains nothing" in isocost("train", file, "--out", out, "--estimate")
    assert "this study scores pretrained checkpoints and trains nothing" in isocost(
        "run", file, "--dry-run", "--devices", "8xH100"
    )
    assert "is a diffusers pipeline already" in isocost("export", folders[0], tmp_path / "exported")


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Files cannot grow beyond a size, so the operating system refuses to write more, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
def test_a_sweep_and_its_report_stop_in_one_line_where_nothing_can_be_written_and_go_on(
    folders: list[Path], tmp_path: Path, isocost: Any
) -> None:
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    sweep = {"solvers": [{"name": "ddim"}], "num_steps": [1], "guidance": [1], "batch_size": 16}
    file.write_text(yaml.safe_dump(plain(folders[:1], sweep=sweep)))
    pipeline = Pipeline(study(folders[:1], sweep=sweep), out)
    for stage, limit in (("start", 1000), ("features", 200_000), ("sweep", 150_000)):
        if stage == "sweep":
            pipeline.assets.prepare_reference()
        assert bool(list(out.glob("artefacts/features/*"))) is (stage == "sweep")
        with largest_file(limit):
            line = isocost("run", file, "--out", out, "--no-figures")
        assert isinstance(line, str)
        assert line.startswith("isocost: ")
        assert "sqlalche" not in line
        assert not list(out.glob("artefacts/point/*"))
        assert not list(out.glob("artefacts/.partial/*"))
    result = isocost("run", file, "--out", out, "--no-figures")
    assert (result["finished"], result["num_points"]) == (True, 1)


@pytest.mark.slow
def test_guidance_is_searched(folders: list[Path], tmp_path: Path) -> None:
    race = {"search": "race", "guidance": [1, 2, 4], "num_steps": [1], "solvers": [{"name": "ddim"}], "batch_size": 16}
    pipeline = Pipeline(study(folders[:1], sweep={**race, "race": {"rungs": [16]}}), tmp_path / "out")
    assert pipeline.run()
    (run,) = pipeline.runs
    assert {point.spec.guidance == 1 for point in pipeline.points(run)} == {True, False}


def test_a_folder_that_changed_after_scoring_is_refused(tmp_path: Path) -> None:
    source = tiny_pipelines.written(tiny_pipelines.stable_diffusion(), tmp_path / "source")
    pipeline = Pipeline(study([source]), tmp_path / "out")
    (run,) = pipeline.runs
    pipeline.train(run)
    checkpoint = pipeline.store.folder("checkpoint", run.final)
    assert load_checkpoint(checkpoint).digest == load_checkpoint(source).digest == run.final
    tiny_pipelines.change(source / "scheduler" / "scheduler_config.json", beta_end=0.013)
    with pytest.raises(ConfigError, match="has changed since"):
        load_checkpoint(checkpoint)
    assert Pipeline(study([source]), tmp_path / "out").runs[0].final != run.final


def test_images_are_downsampled_to_the_scored_resolution(folders: list[Path], tmp_path: Path) -> None:
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
    ("changes", "message"),
    [
        ({"data": {"resolution": 24, "reference": {"kind": "scenes", "num_images": 64}}}, "base generates 16 pixels"),
        ({"sweep": {"solvers": [{"name": "lcm"}], "num_steps": [2], "guidance": [1]}}, "none of them supports base"),
        ({"sweep": {"solvers": [{"name": "ddim"}], "num_steps": [2], "guidance": [1]}}, "student, which is a few-step student"),
        ({"checkpoints": ["{base}", "{copy}"]}, "has the same files as another checkpoint"),
    ],
)
def test_settings_that_a_checkpoint_does_not_support_are_refused_before_sampling(
    folders: list[Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = plain(folders[:2], **changes)
    config["checkpoints"] = [str(path).format(base=folders[0], copy=f"{folders[0]}/") for path in config["checkpoints"]]
    pipeline = Pipeline(parse_spec(StudySpec, config, "pretrained"), tmp_path / "out")
    with pytest.raises(ConfigError, match=message):
        pipeline.run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": {"widths": [8]}}, "family: a study of pretrained checkpoints does not use it"),
        ({"train": {"num_images": 8}}, "train: a study of pretrained checkpoints does not use it"),
        ({"text_encoder": {"path": "elsewhere"}}, "text_encoder: a study of pretrained checkpoints does not use it"),
        ({"protocol": {"alignment": "scenes"}}, "protocol.alignment: needs a classifier"),
        ({"checkpoints": ["a/b", "a/b"]}, "name each checkpoint once"),
        ({"checkpoints": []}, "autoencoder: missing; a study needs it to train a family"),
    ],
)
def test_a_study_has_either_a_family_or_checkpoints(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study([Path("a/b")], **changes)
    with pytest.raises(ConfigError, match=r"data\.train: missing"):
        parse_spec(StudySpec, {**plain_study(), "data": plain([])["data"]}, "tiny")


def test_a_study_of_checkpoints_is_saved_and_loaded_unchanged() -> None:
    spec = study([Path("a/b"), Path("c/d@main")])
    assert parse_spec(StudySpec, yaml.safe_load(dump_study(spec)), "again") == spec
    with pytest.raises(ConfigError, match="this study scores pretrained checkpoints"):
        spec.require_training_parts()


@pytest.mark.slow
def test_a_sweep_of_flux_and_a_lora(folders: list[Path], tmp_path: Path, isocost: Any) -> None:
    """Guidance is an input of Flux; Stable Diffusion with a LoRA runs with both solvers of the sweep."""
    flux = tiny_pipelines.written(tiny_pipelines.flux(), tmp_path / "flux")
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    torch.manual_seed(0)
    update = {f"{layer}.lora_A.weight": torch.randn(2, 32), f"{layer}.lora_B.weight": torch.randn(32, 2)}
    save_file(update, tmp_path / "style.safetensors")
    style = f"{folders[0]} + {tmp_path / 'style.safetensors'}:0.5"
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    config = plain([folders[0], flux])
    config["checkpoints"].append(style)
    config["sweep"] |= {"num_steps": [2], "guidance": [1, 3]}
    file.write_text(yaml.safe_dump(config))
    result = isocost("run", file, "--out", out)
    assert result["finished"], result
    table = Pipeline(parse_spec(StudySpec, config, "pretrained"), out).results_db.table()
    rows = {name: table[table["size"].str.endswith(f" {name}")] for name in ("base", "flux", "base + style:0.5")}
    assert [len(points) for points in rows.values()] == [2, 2, 4]
    assert list(rows["flux"]["nfe"]) == [2, 2]
    assert set(rows["base + style:0.5"]["solver"]) == {"euler/trailing", "lcm/trailing"}
    euler = rows["base + style:0.5"][rows["base + style:0.5"]["solver"] == "euler/trailing"]
    assert list(euler["gflop"]) == list(rows["base"]["gflop"])
    assert not set(euler["mmd_efficientnet"]) & set(rows["base"]["mmd_efficientnet"])
    assert (out / "report" / "index.html").is_file()
    assert "configuration" in isocost("recommend", out, "--budget-nfe", 2)
    images = isocost(
        "sample", style, "--prompt", "a ring", "--num-images", 1, "--solver", "lcm", "--steps", 1, "--out", tmp_path / "a"
    )
    assert len(images["files"]) == 1
    measured = isocost("latency", flux, "--steps", 1, "--batch", 1, "--repeats", 3)
    assert measured["batches"][0]["nfe_per_image"] == 1
    assert "is a diffusers pipeline already" in isocost("export", style, tmp_path / "exported")
    assert "of another network" in isocost("sample", f"{flux} + {tmp_path / 'style.safetensors'}", "--prompt", "a ring")
