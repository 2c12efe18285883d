"""The command line: one JSON line on stdout; a wrong request gives one line, exit status 2, and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from sqlalchemy import inspect

from conftest import assert_refused, plain_study
from isocost.evaluation.confidence_intervals import Interval
from isocost.sweep.results_db import ResultsDB
from isocost.sweep.schema import PointRecord
from synthetic_results import synthetic_table

KERNEL = "mmd_efficientnet"


def write_study(folder: Path, **changes: Any) -> Path:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(plain_study(**changes)))
    return file


def write_images(folder: Path, count: int, lines: list[str] | None = None) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    lines = lines or [json.dumps({"file": f"{number}.png", "caption": "noise"}) for number in range(count)]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


# --- numbers ----------------------------------------------------------------------------------------------------------

HUGE = "99999999999999999999"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (f"sample CKPT --prompt a --seed {HUGE}", f"--seed {HUGE}: it should be less than or equal to 9223372036854775806"),
        ("sample CKPT --prompt a --seed -1", "--seed -1: it should be greater than or equal to 0"),
        ("sample CKPT --prompt a --steps 0", "--steps 0"),
        ("sample CKPT --prompt a --num-images 0", "--num-images 0"),
        ("sample CKPT --prompt a --guidance nan", "--guidance nan: it should be a finite number"),
        ("sample CKPT --prompt a --guidance -3", "--guidance -3.0"),
        (f"sample CKPT --prompt a --steps-offset {HUGE}", "--solver: steps_offset"),
        ("sample CKPT --prompt a --eta 7", "--solver: eta = 7"),
        (f"upscale CKPT a.png b.png --seed {HUGE}", f"--seed {HUGE}"),
        ("upscale CKPT a.png b.png --overlap 1", "--overlap 1.0: it should be less than 1"),
        ("latency CKPT --batch 1 --batch 0", "--batch 0"),
        (f"latency CKPT --batch {HUGE}", f"--batch {HUGE}"),
        ("latency CKPT --repeats 2", "--repeats 2"),
        ("score CKPT --reference CKPT --protocol fid --weights inception=a --weights inception=b", "already has the source a"),
        ("recommend CKPT --budget-ms nan", "--budget-ms nan: it should be a finite number"),
        ("recommend CKPT --images-per-hour 0", "--images-per-hour 0.0: it should be greater than 0"),
        ("compare CKPT CKPT --budget inf", "--budget inf: it should be a finite number"),
        ("archive CKPT NEW --checkpoint-mib nan", "--checkpoint-mib nan"),
        ("run CKPT --dry-run --devices 8xH100 --utilisation 5", "--utilisation 5.0: it should be less than or equal to 1"),
        ("family --context 0", "--context 0"),
        (f"family --tokens {HUGE}", f"--tokens {HUGE}"),
        (f"family --latent 4x{HUGE}", "family: latent_size"),
        ("family --latent 0x64", "family: latent_channels = 0"),
        ("family --widths 64,²", "size '²': unknown"),
        (f"family --widths {HUGE}", f"size '{HUGE}': unknown"),
    ],
)
def test_every_number_of_a_command_is_checked_before_anything_is_read(
    arguments: str, message: str, tmp_path: Path, isocost: Any
) -> None:
    """CKPT does not exist, so a check that came later would name it."""
    words = [str(tmp_path / word) if word in ("CKPT", "NEW") else word for word in arguments.split()]
    assert_refused(isocost(*words), message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("hours", ["nan", "inf", "0"])
def test_stop_after_is_a_number_of_hours(hours: str, tmp_path: Path, isocost: Any) -> None:
    assert_refused(
        isocost("sweep", write_study(tmp_path), "--out", tmp_path / "out", "--stop-after", hours), "give hours, more than 0"
    )


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sweep.guidance=[-0.5]", "sweep.guidance.0 = -0.5"),
        ("sweep.num_steps=[0]", "sweep.num_steps.0 = 0"),
        ("sweep.solvers=[{name: huen}]", "unknown solver 'huen'; did you mean heun?"),
        ("sweep.solvers=[{name: ddpm, eta: 0.5}]", "ddpm has no eta"),
        (
            "sweep={num_steps: [1000], guidance: [1], solvers: [{name: ddim, timestep_spacing: leading}]}",
            "do not fit 1000 timesteps",
        ),
        ("family.widths=[12]", "width 12: group norms and heads cannot divide it"),
        ("protocol.num_images=1", "protocol.num_images = 1"),
        ("protocol.num_images=31", "greater than or equal to 32"),
        ("data.reference.num_images=20", "a metric needs at least 32"),
        ("protocol.num_images=500", "protocol.num_images=500 exceeds the 64 captions"),
        ("protocol.colour=red", "protocol.colour: unknown key; allowed here: num_images"),
        ("report.metric=beauty", "unknown metric 'beauty'"),
        ("sweep", "give KEY=VALUE"),
    ],
)
def test_a_wrong_study_is_one_line(isocost: Any, tmp_path: Path, override: str, message: str) -> None:
    study = write_study(tmp_path)
    assert_refused(isocost("run", study, "--out", tmp_path / "out", "--set", override), message)
    assert not (tmp_path / "out" / "report").exists()
    assert not list((tmp_path / "out").glob("artefacts/checkpoint/*"))


@pytest.mark.parametrize(
    "train",
    [
        {"kind": "folder", "path": "absent"},
        {"kind": "webdataset", "path": "absent-*.tar"},
        {"kind": "hub", "path": "./absent.parquet"},
    ],
)
def test_missing_images_are_named_and_nothing_is_written(isocost: Any, tmp_path: Path, train: dict, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    study = write_study(tmp_path, data={**plain_study()["data"], "train": train})
    assert_refused(isocost("run", study, "--out", tmp_path / "out"), "absent")
    if train["kind"] != "hub":
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_template_study_takes_one_folder_for_training_and_reference(isocost: Any, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 500)
    start = Path(__file__).resolve().parents[1] / "studies" / "own.yaml"
    study = tmp_path / "mine.yaml"
    study.write_text(start.read_text().replace("&images IMAGES", f"&images {images}"))
    tiny = ("--dry-run", "--set", "scale=tiny", "--out", tmp_path / "out")
    assert_refused(isocost("run", study, *tiny), "exceeds the ", "captions of data.reference", "or fewer")
    planned = isocost("run", study, *tiny, "--set", "protocol.num_images=32")
    assert planned.status == 0, planned.err
    assert planned.answer["total"]["points"] == 20
    assert not (tmp_path / "out").exists()


def test_a_broken_caption_line_is_named_by_number(isocost: Any, tmp_path: Path) -> None:
    lines = ['{"file": "0.png", "caption": "noise"}', '{"file": "1.png", "caption": ']
    images = write_images(tmp_path / "images", 2, lines)
    source = {"kind": "folder", "path": str(images)}
    study = write_study(tmp_path, data={"resolution": 32, "train": source, "reference": source})
    assert_refused(isocost("run", study, "--out", tmp_path / "out"), "captions.jsonl: line 2 is broken", '"caption": TEXT')


def test_unreadable_images_are_an_error_beyond_the_allowed_fraction(isocost: Any, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 20)
    (images / "3.png").write_bytes(b"no image")
    source = {"kind": "folder", "path": str(images)}
    data = {"resolution": 32, "train": source, "reference": source, "max_unreadable_fraction": 0.01}
    outcome = isocost("run", write_study(tmp_path, data=data), "--out", tmp_path / "out")
    assert outcome.status == 1
    assert "1 of 20 images cannot be read" in outcome.line
    assert "3.png" in outcome.line


@pytest.mark.slow
def test_skipped_images_are_named_in_the_results_database(isocost: Any, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 40)
    (images / "3.png").write_bytes(b"no image")
    source = {"kind": "folder", "path": str(images)}
    data = {"resolution": 32, "train": source, "reference": source, "max_unreadable_fraction": 0.1}
    protocol = {**plain_study()["protocol"], "alignment": "none", "num_reference": 39}
    study = write_study(
        tmp_path, data=data, protocol=protocol, autoencoder={**plain_study()["autoencoder"], "num_fit_images": 39}
    )
    outcome = isocost("train", study, "--out", tmp_path / "out", "--set", "family.widths=[8]", "--set", "train.num_images=128")
    assert outcome.status == 0, outcome.err
    assert {event["subject"] for event in ResultsDB(tmp_path / "out" / "results.sqlite").events()} == {"3.png"}


def test_alignment_without_labels_is_refused(isocost: Any, tmp_path: Path) -> None:
    source = {"kind": "folder", "path": str(write_images(tmp_path / "images", 64))}
    study = write_study(tmp_path, data={"resolution": 32, "train": source, "reference": source})
    assert_refused(isocost("run", study, "--out", tmp_path / "out"), "protocol.alignment needs labels")


def test_a_pickled_checkpoint_is_refused(isocost: Any, tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"x")
    assert_refused(isocost("sample", tmp_path / "model.ckpt", "--prompt", "a"), "pickled weights are refused", "safetensors")


def test_sweep_without_checkpoints_names_the_command_that_makes_them(isocost: Any, tmp_path: Path) -> None:
    assert_refused(
        isocost("sweep", write_study(tmp_path), "--out", tmp_path / "out"), "no checkpoint at 128 images", "isocost train"
    )


@pytest.mark.slow
def test_a_part_without_checkpoints_is_refused_before_the_first_image(isocost: Any, tmp_path: Path) -> None:
    plain = {"family": {"widths": [8]}, "train": {"num_images": 16, "batch_size": 8}}
    tuned = {"train": {"num_images": 16}, "sweep": {"num_steps": [1]}}
    study, out = write_study(tmp_path, **plain, superres=tuned), tmp_path / "out"
    assert isocost("train", study, "--task", "text2image", "--out", out).status == 0
    assert_refused(isocost("sweep", study, "--out", out), "superres width 8", "--task text2image sweeps the trained part")
    assert not ResultsDB(out / "results.sqlite").points()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a budget: --budget-normalized-cost, "),
        (["--budget-memory-gib", "8"], "give a budget other than --budget-memory-gib: --budget-normalized-cost, "),
        (["--budget-ms", "4", "--images-per-hour", "1000"], "two budgets of one kind, 4 ms per image and 3,600 ms"),
        (["--budget-nfe", "0"], "--budget-nfe 0.0: it should be greater than 0"),
        (["--budget-nfe", "16", "--budget-memory-gib", "8"], "no point has a measured peak memory"),
        (["--budget-nfe", "16", "--require", "alignment"], 'give "METRIC>=VALUE" or "METRIC<=VALUE" in quotes'),
        (["--budget-nfe", "16", "--require", "alignment=high"], "'high' is not a number"),
        (["--budget-nfe", "16", "--require", "alignment=1", "--require", "alignment=2"], "already has the requirement 1"),
        (
            ["--budget-nfe", "16", "--require", "alignment=2"],
            "no point meets prompt alignment of at least 2; the nearest is 12.6M",
        ),
        (["--budget-nfe", "16", "--protocol", "abc"], "give --database too"),
        (["--budget-nfe", "16", "--database", "absent.sqlite"], "no such file"),
        (["--budget-nfe", "16", "--database", "sqlite:///absent.sqlite"], "no such file"),
    ],
)
def test_recommend_refuses_a_wrong_request(isocost: Any, tmp_path: Path, arguments: list[str], message: str) -> None:
    synthetic_table().to_parquet(tmp_path / "table.parquet")
    assert_refused(isocost("recommend", tmp_path, *arguments), message)


def test_recommend_needs_a_folder_or_a_results_database(isocost: Any) -> None:
    assert_refused(isocost("recommend", "--budget-nfe", "4"), "give the output folder of a study, or --database")


def test_recommend_needs_a_finished_folder(isocost: Any, tmp_path: Path) -> None:
    assert_refused(isocost("recommend", tmp_path, "--budget-nfe", "4"), "no table.parquet", "isocost run")


@pytest.mark.parametrize("hours", ["0", "-1"])
def test_stop_after_needs_positive_hours(isocost: Any, tmp_path: Path, hours: str) -> None:
    assert_refused(isocost("run", write_study(tmp_path), "--out", tmp_path / "out", "--stop-after", hours), "more than 0")


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_family_prints_our_numbers_and_the_papers(isocost: Any) -> None:
    outcome = isocost("family", "--widths", "64,83M")
    assert [row["size"] for row in outcome.answer["family"]] == ["39M", "83M"]
    assert outcome.answer["family"][1]["reference_gflop"] == 102.7
    assert "99.7" in outcome.err
    assert "102.7" in outcome.err
    assert "pattern of the column" in " ".join(outcome.err.split())


def test_family_refuses_an_unknown_size(isocost: Any) -> None:
    assert_refused(isocost("family", "--widths", "40M"), "size '40M': unknown; choose one of 39M")
    assert_refused(isocost("family", "--latent", "64"), "channels x size")


def test_recommend_gives_the_command_that_samples_its_configuration(isocost: Any, tmp_path: Path) -> None:
    synthetic_table().to_parquet(tmp_path / "table.parquet")
    outcome = isocost("recommend", tmp_path, "--budget-nfe", "16")
    assert outcome.status == 0
    assert outcome.answer["configuration"]["cost"] <= 16
    assert outcome.answer["command"].startswith("isocost sample")
    assert outcome.answer["reason"] in outcome.err


def test_recommend_meets_several_budgets_and_requirements(isocost: Any, tmp_path: Path) -> None:
    synthetic_table().to_parquet(tmp_path / "table.parquet")
    requirements = ["--require", "alignment=0.8", "--require", "frechet_efficientnet=40"]
    outcome = isocost("recommend", tmp_path, "--budget-gflop", "100", "--images-per-hour", "360000", *requirements)
    assert outcome.status == 0
    assert [limit["name"] for limit in outcome.answer["limits"]] == [
        *("gflop", "ms_per_image"),
        *("alignment", "frechet_efficientnet"),
    ]
    assert outcome.answer["cost"] == "gflop"
    reversed_budgets = isocost("recommend", tmp_path, "--images-per-hour", "360000", "--budget-gflop", "100", *requirements)
    assert reversed_budgets.answer["cost"] == "ms_per_image", "the first budget of the command line leads"
    assert reversed_budgets.answer["configuration"]["point"] == outcome.answer["configuration"]["point"]


def test_recommend_reads_a_results_database_without_a_folder(isocost: Any, tmp_path: Path) -> None:
    table = synthetic_table(sizes=("0.2M", "0.8M"))
    columns = [column.key for column in inspect(PointRecord).column_attrs if column.key in table.columns]
    other_columns = {"num_nonfinite": 0, "dtype": "fp32", "seconds": 1.0, "has_too_few_samples": False, "task": "text2image"}
    other_columns |= {"compiled": False, "batch_size": 64, "min_batch_size": 64}
    results_db = ResultsDB(tmp_path / "results.sqlite")
    for row in table.to_dict("records"):
        scores = {KERNEL: Interval(row[KERNEL], row[f"{KERNEL}_low"], row[f"{KERNEL}_high"])}
        results_db.add_point({**{name: row[name] for name in columns}, **other_columns}, scores, {}, {})
    table.to_parquet(tmp_path / "table.parquet")
    expected = isocost("recommend", tmp_path, "--budget-nfe", "16").answer
    for arguments in (
        ["--database", tmp_path / "results.sqlite"],
        ["--database", f"sqlite:///{tmp_path}/results.sqlite", tmp_path],
    ):
        outcome = isocost("recommend", "--budget-nfe", "16", *arguments)
        assert outcome.status == 0, outcome.err
        assert outcome.answer["configuration"] == expected["configuration"]
        assert ("OUT/" in outcome.answer["command"]) is (len(arguments) == 2)


@pytest.mark.slow
def test_a_sweep_checks_the_weights_of_every_task_before_its_first_image(isocost: Any, tmp_path: Path) -> None:
    plain = {"family": {"widths": [8]}, "train": {"num_images": 16, "batch_size": 8}}
    protocol = {"num_images": 32, "num_reference": 64, "lpips": "no.safetensors"}
    superres = {"train": {"num_images": 16}, "sweep": {"num_steps": [1]}, "protocol": protocol}
    study, out = write_study(tmp_path, **plain, superres=superres), tmp_path / "out"
    assert isocost("train", study, "--out", out).status == 0
    assert_refused(isocost("sweep", study, "--out", out), "no.safetensors")
    assert not ResultsDB(out / "results.sqlite").points()


def test_a_dry_run_writes_nothing(isocost: Any, tmp_path: Path) -> None:
    outcome = isocost("run", write_study(tmp_path), "--out", tmp_path / "out", "--dry-run")
    assert outcome.status == 0
    assert [size["points_to_make"] for size in outcome.answer["sizes"]] == [5, 5]
    assert [size["images_to_train"] for size in outcome.answer["sizes"]] == [256, 256]
    assert not (tmp_path / "out").exists()
