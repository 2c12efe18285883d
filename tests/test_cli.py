"""The command line: one JSON line on stdout, one line for a mistake, exit 2 and nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from conftest import Outcome, plain_study
from isocost.evaluation.confidence_intervals import Interval
from isocost.sweep.results_db import ResultsDB
from isocost.sweep.schema import PointRecord
from synthetic_results import planted_table

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
    told = lines or [json.dumps({"file": f"{number}.png", "caption": "noise"}) for number in range(count)]
    (folder / "captions.jsonl").write_text("\n".join(told))
    return folder


def refused(outcome: Outcome, *said: str) -> None:
    assert outcome.status == 2, outcome.err
    assert outcome.out == ""
    assert outcome.line.startswith("isocost: "), outcome.err
    assert "Traceback" not in outcome.err
    for words in said:
        assert words in outcome.line


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sweep.guidance=[-0.5]", "sweep.guidance.0 = -0.5"),
        ("sweep.num_steps=[0]", "sweep.num_steps.0 = 0"),
        ("sweep.solvers=[{name: huen}]", "unknown solver 'huen'; did you mean heun?"),
        ("sweep.solvers=[{name: ddpm, eta: 0.5}]", "ddpm has no eta"),
        (
            "sweep={num_steps: [1000], guidance: [1], solvers: [{name: ddim, timestep_spacing: leading}]}",
            "do not fit 1000 timesteps",
        ),
        ("family.widths=[12]", "width 12: no group rule fits"),
        ("protocol.num_images=1", "protocol.num_images = 1"),
        ("protocol.num_images=31", "greater than or equal to 32"),
        ("data.reference.num_images=20", "a distance takes at least 32"),
        ("protocol.num_images=500", "protocol.num_images=500 exceeds the 64 captions"),
        ("protocol.colour=red", "protocol.colour: unknown key; allowed here: num_images"),
        ("report.metric=beauty", "no metric is called 'beauty'"),
        ("sweep", "give KEY=VALUE"),
    ],
)
def test_a_wrong_study_is_one_line(isocost: Any, tmp_path: Path, override: str, said: str) -> None:
    study = write_study(tmp_path)
    if override == "sweep.num_steps=[999]":
        override = "sweep.solvers=[{name: dpmsolver++2m, timestep_spacing: linspace}]"
        refused(
            isocost("run", study, "--out", tmp_path / "out", "--set", override, "--set", "sweep.num_steps=[1000]"), "fit 1000"
        )
        return
    refused(isocost("run", study, "--out", tmp_path / "out", "--set", override), said)
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
    refused(isocost("run", study, "--out", tmp_path / "out"), "absent")
    if train["kind"] != "hub":
        assert not (tmp_path / "out").exists()


def test_the_starting_study_takes_one_folder_for_training_and_reference(isocost: Any, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 500)
    start = Path(__file__).resolve().parents[1] / "studies" / "own.yaml"
    study = tmp_path / "mine.yaml"
    study.write_text(start.read_text().replace("&images IMAGES", f"&images {images}"))
    tiny = ("--dry-run", "--set", "scale=tiny", "--out", tmp_path / "out")
    refused(isocost("run", study, *tiny), "exceeds the ", "captions of data.reference", "or fewer")
    planned = isocost("run", study, *tiny, "--set", "protocol.num_images=32")
    assert planned.status == 0, planned.err
    assert planned.answer["total"]["points"] == 20
    assert not (tmp_path / "out").exists()


def test_a_broken_caption_line_is_named_by_number(isocost: Any, tmp_path: Path) -> None:
    lines = ['{"file": "0.png", "caption": "noise"}', '{"file": "1.png", "caption": ']
    images = write_images(tmp_path / "images", 2, lines)
    source = {"kind": "folder", "path": str(images)}
    study = write_study(tmp_path, data={"resolution": 32, "train": source, "reference": source})
    refused(isocost("run", study, "--out", tmp_path / "out"), "captions.jsonl: line 2 is broken", '"caption": TEXT')


def test_images_that_do_not_read_are_an_error_beyond_the_stated_share(isocost: Any, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 20)
    (images / "3.png").write_bytes(b"no image")
    source = {"kind": "folder", "path": str(images)}
    data = {"resolution": 32, "train": source, "reference": source, "max_unreadable_fraction": 0.01}
    outcome = isocost("run", write_study(tmp_path, data=data), "--out", tmp_path / "out")
    assert outcome.status == 1
    assert "1 of 20 images cannot be read" in outcome.line
    assert "3.png" in outcome.line


def test_images_skipped_within_the_share_are_named_in_the_ledger(isocost: Any, tmp_path: Path) -> None:
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
    refused(isocost("run", study, "--out", tmp_path / "out"), "protocol.alignment needs labels")


def test_a_pickled_checkpoint_is_refused(isocost: Any, tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"x")
    refused(isocost("sample", tmp_path / "model.ckpt", "--prompt", "a"), "pickled weights are refused", "safetensors")


def test_sweep_without_checkpoints_names_the_command_that_makes_them(isocost: Any, tmp_path: Path) -> None:
    refused(isocost("sweep", write_study(tmp_path), "--out", tmp_path / "out"), "no checkpoint at 128 images", "isocost train")


def test_a_part_without_checkpoints_is_refused_before_the_first_image(isocost: Any, tmp_path: Path) -> None:
    plain = {"family": {"widths": [8]}, "train": {"num_images": 16, "batch_size": 8}}
    tuned = {"train": {"num_images": 16}, "sweep": {"num_steps": [1]}}
    study, out = write_study(tmp_path, **plain, superres=tuned), tmp_path / "out"
    assert isocost("train", study, "--task", "text2image", "--out", out).status == 0
    refused(isocost("sweep", study, "--out", out), "superres width 8", "what is trained is swept with --task text2image")
    assert not ResultsDB(out / "results.sqlite").points()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give one budget: --budget-ms"),
        (["--budget-memory-gib", "8"], "give one budget beside --budget-memory-gib: --budget-ms"),
        (["--budget-ms", "4", "--images-per-hour", "1000"], "two budgets of one kind, 4 ms per image and 3,600 ms"),
        (["--budget-nfe", "0"], "a budget is a positive number, not 0"),
        (["--budget-nfe", "16", "--budget-memory-gib", "8"], "no point has a measured peak memory"),
        (["--budget-nfe", "16", "--require", "alignment"], "give METRIC=VALUE, such as alignment=0.9"),
        (["--budget-nfe", "16", "--require", "alignment=high"], "'high' is not a number"),
        (["--budget-nfe", "16", "--require", "alignment=1", "--require", "alignment=2"], "has a requirement of 1 already"),
        (
            ["--budget-nfe", "16", "--require", "alignment=2"],
            "no point meets caption alignment of at least 2; the nearest is 12.6M",
        ),
        (["--budget-nfe", "16", "--protocol", "abc"], "give --database too"),
        (["--budget-nfe", "16", "--database", "absent.sqlite"], "no such file"),
        (["--budget-nfe", "16", "--database", "sqlite:///absent.sqlite"], "no such file"),
    ],
)
def test_recommend_refuses_what_it_cannot_answer(isocost: Any, tmp_path: Path, arguments: list[str], said: str) -> None:
    planted_table().to_parquet(tmp_path / "table.parquet")
    refused(isocost("recommend", tmp_path, *arguments), said)


def test_recommend_wants_a_folder_or_a_ledger(isocost: Any) -> None:
    refused(isocost("recommend", "--budget-nfe", "4"), "give the output folder of a study, or --database")


def test_recommend_wants_a_finished_folder(isocost: Any, tmp_path: Path) -> None:
    refused(isocost("recommend", tmp_path, "--budget-nfe", "4"), "no table.parquet", "isocost run")


@pytest.mark.parametrize("hours", ["0", "-1"])
def test_stop_after_wants_hours(isocost: Any, tmp_path: Path, hours: str) -> None:
    refused(isocost("run", write_study(tmp_path), "--out", tmp_path / "out", "--stop-after", hours), "more than 0")


# --- answers ----------------------------------------------------------------------------------------------------------


def test_family_prints_both_columns_side_by_side(isocost: Any) -> None:
    outcome = isocost("family", "--widths", "64,83M")
    assert [row["size"] for row in outcome.answer["family"]] == ["39M", "83M"]
    assert outcome.answer["family"][1]["reference_gflop"] == 102.7
    assert "99.7" in outcome.err
    assert "102.7" in outcome.err
    assert "rule of the column" in " ".join(outcome.err.split())


def test_family_refuses_what_is_no_size(isocost: Any) -> None:
    refused(isocost("family", "--widths", "40M"), "the named sizes are 39M")
    refused(isocost("family", "--latent", "64"), "channels x side")


def test_recommend_gives_the_command_that_samples_so(isocost: Any, tmp_path: Path) -> None:
    planted_table().to_parquet(tmp_path / "table.parquet")
    outcome = isocost("recommend", tmp_path, "--budget-nfe", "16")
    assert outcome.status == 0
    assert outcome.answer["configuration"]["cost"] <= 16
    assert outcome.answer["command"].startswith("isocost sample")
    assert outcome.answer["reason"] in outcome.err


def test_recommend_keeps_several_budgets_and_requirements(isocost: Any, tmp_path: Path) -> None:
    planted_table().to_parquet(tmp_path / "table.parquet")
    requirements = ["--require", "alignment=0.8", "--require", "frechet_efficientnet=40"]
    outcome = isocost("recommend", tmp_path, "--budget-gflop", "100", "--images-per-hour", "360000", *requirements)
    assert outcome.status == 0
    assert [limit["name"] for limit in outcome.answer["limits"]] == [
        *("gflop", "ms_per_image"),
        *("alignment", "frechet_efficientnet"),
    ]
    assert outcome.answer["cost"] == "gflop"
    turned = isocost("recommend", tmp_path, "--images-per-hour", "360000", "--budget-gflop", "100", *requirements)
    assert turned.answer["cost"] == "ms_per_image", "the first on the line leads"
    assert turned.answer["configuration"]["point"] == outcome.answer["configuration"]["point"]


def test_recommend_reads_a_ledger_without_a_folder(isocost: Any, tmp_path: Path) -> None:
    shown = planted_table(sizes=("0.2M", "0.8M"))
    own = [column.name for column in PointRecord.__table__.columns if column.name in shown.columns]
    rest = {"num_nonfinite": 0, "dtype": "fp32", "seconds": 1.0, "has_too_few_samples": False, "task": "text2image"}
    results_db = ResultsDB(tmp_path / "results.sqlite")
    for row in shown.to_dict("records"):
        scores = {KERNEL: Interval(row[KERNEL], row[f"{KERNEL}_low"], row[f"{KERNEL}_high"])}
        results_db.add_point({**{name: row[name] for name in own}, **rest}, scores, {}, {})
    shown.to_parquet(tmp_path / "table.parquet")
    expected = isocost("recommend", tmp_path, "--budget-nfe", "16").answer
    for arguments in (
        ["--database", tmp_path / "results.sqlite"],
        ["--database", f"sqlite:///{tmp_path}/results.sqlite", tmp_path],
    ):
        outcome = isocost("recommend", "--budget-nfe", "16", *arguments)
        assert outcome.status == 0, outcome.err
        assert outcome.answer["configuration"] == expected["configuration"]
        assert ("OUT/" in outcome.answer["command"]) is (len(arguments) == 2)


def test_a_sweep_asks_for_every_tasks_weights_before_its_first_image(isocost: Any, tmp_path: Path) -> None:
    plain = {"family": {"widths": [8]}, "train": {"num_images": 16, "batch_size": 8}}
    protocol = {"num_images": 32, "num_reference": 64, "lpips": "no.safetensors"}
    superres = {"train": {"num_images": 16}, "sweep": {"num_steps": [1]}, "protocol": protocol}
    study, out = write_study(tmp_path, **plain, superres=superres), tmp_path / "out"
    assert isocost("train", study, "--out", out).status == 0
    refused(isocost("sweep", study, "--out", out), "no.safetensors")
    assert not ResultsDB(out / "results.sqlite").points()


def test_a_dry_run_writes_nothing(isocost: Any, tmp_path: Path) -> None:
    outcome = isocost("run", write_study(tmp_path), "--out", tmp_path / "out", "--dry-run")
    assert outcome.status == 0
    assert [size["points_to_make"] for size in outcome.answer["sizes"]] == [5, 5]
    assert [size["images_to_train"] for size in outcome.answer["sizes"]] == [256, 256]
    assert not (tmp_path / "out").exists()
