"""Scores from prompts and images on disk: numbers that do not depend on file names and layout, and one-line refusals."""

from __future__ import annotations

import csv
import dataclasses
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from isocost.cli import app, main
from isocost.config.evaluation import ProtocolSpec
from isocost.errors import ConfigError
from isocost.evaluation import protocol_presets
from isocost.evaluation.image_sources import iter_images
from isocost.evaluation.prompt_lists import prompts_sha256
from isocost.evaluation.protocol_presets import PRESETS, PromptList
from isocost.evaluation.reference_stats import read_statistics
from isocost.evaluation.score_folder import make_reference, score_folder
from isocost.metrics.download import file_sha256
from isocost.metrics.efficientnet import EfficientNetLite0
from isocost.metrics.mmd import squared_mmd
from tiny_configs import save, scenes

# --- a small coco30k-fid-clip -----------------------------------------------------------------------------------------

IDS = [203564 + 7 * number for number in range(40)]
PROMPTS = {str(number): f"image number {number}" for number in IDS}


@pytest.fixture
def coco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path, Path, Path]:
    """A preset like coco30k-fid-clip with 40 images: its name, prompts file, images, reference."""
    small = dataclasses.replace(
        PRESETS["coco30k-fid-clip"],
        name="coco40",
        spec=ProtocolSpec(num_images=40, features="efficientnet-lite0", metrics=("mmd", "precision_recall")),  # type: ignore[arg-type]
        resolution=64,
        num_images=40,
        num_reference=40,
        prompts=PromptList(40, prompts_sha256(PROMPTS), "forty prompts"),
    )
    prompts_file = tmp_path / "prompts.csv"
    with prompts_file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image_id", "source", "prompt"])
        writer.writerows([f"{number:012d}", "x", f" {PROMPTS[str(number)]}\n"] for number in IDS)
    images = save(tmp_path / "generated", scenes(40, 64), [f"{number:012d}" for number in IDS])
    real = scenes(43, 80, seed=1)
    names = [f"COCO_val2014_{number:012d}" for number in [*IDS, 1, 2, 3]]
    reference = save(tmp_path / "val2014", real, names)
    monkeypatch.setitem(PRESETS, small.name, small)
    return small.name, prompts_file, images, reference


def test_prompts_and_images_on_disk_are_scored(coco: tuple[str, Path, Path, Path]) -> None:
    name, prompts, images, reference = coco
    result = score_folder(images, reference, name, prompts=str(prompts))
    assert result.protocol.startswith("coco40@1:")
    assert (result.num_images, result.num_reference) == (40, 40)
    assert set(result.scores) == {"mmd_efficientnet", "precision_efficientnet", "recall_efficientnet"}
    extractor = EfficientNetLite0(side=64)
    real = torch.stack([image.pixels for image in iter_images(str(reference), resolution=64, exact=False)])[3:]
    assert len(real) == 40
    expected = squared_mmd(extractor(scenes(40, 64)).numpy(), extractor(real).numpy())
    assert result.scores["mmd_efficientnet"].value == pytest.approx(expected, rel=1e-9)
    assert result.parts["name"] == "coco40@1"


def test_saved_statistics_give_the_scores_of_the_images(coco: tuple[str, Path, Path, Path], tmp_path: Path) -> None:
    name, prompts, images, reference = coco
    out = tmp_path / "stats"
    statistics = make_reference(reference, out, name, prompts=str(prompts))
    assert len(statistics) == 40
    assert not list(tmp_path.glob("**/*.partial"))
    rows = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [str(number) for number in IDS]
    by_images = score_folder(images, reference, name, prompts=str(prompts))
    assert score_folder(images, out, name, prompts=str(prompts)) == by_images
    with pytest.raises(ConfigError, match="exists already"):
        make_reference(reference, out, name, prompts=str(prompts))


def test_file_names_and_folders_of_images_do_not_change_a_bit(coco: tuple[str, Path, Path, Path], tmp_path: Path) -> None:
    name, prompts, images, reference = coco
    expected = score_folder(images, reference, name, prompts=str(prompts))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    moved = save(tmp_path / "moved", scenes(40, 64)[order], [f"{index % 3}/{IDS[index]}" for index in order])
    assert score_folder(moved, reference, name, prompts=str(prompts)) == expected
    np.savez(tmp_path / "images.npz", scenes(40, 64).permute(0, 2, 3, 1).numpy())
    assert score_folder(tmp_path / "images.npz", reference, name, prompts=str(prompts)) == expected


def test_another_prompt_list_is_refused(coco: tuple[str, Path, Path, Path]) -> None:
    name, prompts, images, reference = coco
    prompts.write_text(prompts.read_text().replace("number 203571", "number 203572"))
    with pytest.raises(ConfigError, match=r"40 prompts with hash .*, but .* needs 40 with .*forty prompts") as refused:
        score_folder(images, reference, name, prompts=str(prompts))
    assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match="needs --prompts: forty prompts"):
        score_folder(images, reference, name)


def test_missing_and_duplicate_images_are_named(coco: tuple[str, Path, Path, Path]) -> None:
    name, prompts, images, reference = coco
    (images / f"{IDS[5]:012d}.png").unlink()
    with pytest.raises(ConfigError, match=f"1 of 40 images are missing; the first is id {IDS[5]}"):
        score_folder(images, reference, name, prompts=str(prompts))
    save(images, scenes(2, 64), [f"{IDS[5]}", f"again/{IDS[6]}"])
    with pytest.raises(ConfigError, match=f"id {IDS[6]} appears twice"):
        score_folder(images, reference, name, prompts=str(prompts))


@pytest.mark.parametrize(
    ("mode", "side", "message"),
    [
        ("L", 64, "is grey"),
        ("RGBA", 64, "is RGBA"),
        ("P", 64, "has a palette"),
        ("RGB", 65, "65 x 65 pixels; .* needs 64 x 64"),
    ],
)
def test_a_generated_image_with_another_mode_or_size_gives_one_line(
    coco: tuple[str, Path, Path, Path], mode: str, side: int, message: str
) -> None:
    name, prompts, images, reference = coco
    file = images / f"{IDS[3]:012d}.png"
    Image.open(file).resize((side, side)).convert(mode).save(file)
    with pytest.raises(ConfigError, match=f"{file.name}.*{message}") as refused:
        score_folder(images, reference, name, prompts=str(prompts))
    assert "\n" not in str(refused.value)


# --- array files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((40, 64, 64, 3), np.nan), "40 images contain NaN or infinite pixels"),
        (np.zeros((40, 64, 64, 3), dtype=np.float32), "pixels are floating point"),
        (np.zeros((40, 64, 64, 1), dtype=np.uint8), "grey"),
        (np.zeros((40, 64, 64, 4), dtype=np.uint8), "RGBA"),
        (np.zeros((40, 32, 32, 3), dtype=np.uint8), "32 x 32 pixels; this protocol needs 64 x 64"),
        (np.zeros((40, 64), dtype=np.uint8), "not four-dimensional"),
        (np.zeros((39, 64, 64, 3), dtype=np.uint8), "1 of 40 images are missing"),
    ],
    ids=["nan", "float", "grey", "rgba", "size", "flat", "few"],
)
def test_an_array_that_is_not_a_batch_of_images_gives_one_line(
    coco: tuple[str, Path, Path, Path], tmp_path: Path, array: np.ndarray, message: str
) -> None:
    name, prompts, _, reference = coco
    np.save(tmp_path / "images.npy", array)
    with pytest.raises(ConfigError, match=message) as refused:
        score_folder(tmp_path / "images.npy", reference, name, prompts=str(prompts))
    assert "\n" not in str(refused.value)


def test_pickled_and_truncated_arrays_give_one_line(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "plain.npy").write_bytes(pickle.dumps([1, 2, 3]))
    np.save(tmp_path / "whole.npy", np.zeros((3, 8, 8, 3), dtype=np.uint8))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:-50])
    for file in ("objects.npy", "plain.npy", "cut.npy", "absent.npy"):
        with pytest.raises(ConfigError, match=f"{file}: (contains pickled|truncated|no such)") as refused:
            list(iter_images(str(tmp_path / file), resolution=None, exact=False))
        assert "\n" not in str(refused.value)


# --- references and weights -------------------------------------------------------------------------------------------


def test_statistics_of_another_extractor_are_refused(coco: tuple[str, Path, Path, Path], tmp_path: Path) -> None:
    name, prompts, _, reference = coco
    make_reference(reference, tmp_path / "stats", name, prompts=str(prompts))
    with pytest.raises(ConfigError, match=r"another extractor.*side=64.*needs .*side=96"):
        read_statistics(tmp_path / "stats", {"efficientnet-lite0": EfficientNetLite0(side=96)})


def test_weights_of_an_unused_network_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="inception is not used; this protocol uses efficientnet-lite0, lpips"):
        score_folder(tmp_path, tmp_path, "mmd-efficientnet-64", weights={"inception": "x"})
    with pytest.raises(ConfigError, match="has no prompts; omit the option"):
        score_folder(tmp_path, tmp_path, "mmd-efficientnet-64", prompts="x.csv")


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_commands_score_and_reference(coco: tuple[str, Path, Path, Path], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    name, prompts, images, reference = coco
    options = ["--protocol", name, "--prompts", str(prompts)]
    built = CliRunner().invoke(app, ["reference", str(reference), str(tmp_path / "stats"), *options])
    assert json.loads(built.stdout.splitlines()[-1])["num_images"] == 40
    scored = CliRunner().invoke(app, ["score", str(images), "--reference", str(tmp_path / "stats"), *options])
    answer = json.loads(scored.stdout.splitlines()[-1])
    assert answer["parts"]["num_images"] == 40
    assert answer["scores"]["mmd_efficientnet"]["low"] < answer["scores"]["mmd_efficientnet"]["high"]


@pytest.mark.slow
def test_verify_exits_with_status_1_if_a_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from isocost.errors import RunError
    from isocost.evaluation import self_check

    passing = CliRunner().invoke(app, ["verify", "--json"])
    answer = json.loads(passing.stdout.splitlines()[-1])
    assert passing.exit_code == 0
    assert answer["passed"]
    assert len(answer["checks"]) == 15
    monkeypatch.setattr(self_check, "LPIPS_PUBLISHED", {"ex_p0": 0.722, "ex_p1": 0.14})
    failing = CliRunner().invoke(app, ["verify", "--json"])
    assert isinstance(failing.exception, RunError)
    assert "1 of 15 checks failed; the first is LPIPS of the example pair ex_ref, ex_p1" in str(failing.exception)
    assert not json.loads(failing.stdout.splitlines()[-1])["passed"]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("too few", "5 images; a metric needs at least 32"),
        ("size", "65 x 65 pixels; this protocol needs 64 x 64"),
        ("grey", "is grey"),
        ("rgba", "is RGBA"),
        ("nan", "40 images contain NaN"),
        ("pickled images", "contains pickled objects"),
        ("truncated weights", "truncated or not a torch weights file"),
        ("another hash", "SHA-256 .*, expected 6726825d0af5f729"),
        ("pickled weights", "contains pickled objects, which are refused"),
    ],
)
def test_a_users_mistake_gives_one_line_and_status_2(
    mistake: str,
    message: str,
    coco: tuple[str, Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, prompts, images, reference = coco
    source, options, first = str(images), ["--protocol", name, "--prompts", str(prompts)], images / f"{IDS[0]:012d}.png"
    if mistake == "too few":
        source, options = str(save(tmp_path / "few", scenes(5, 64), list("abcde"))), ["--protocol", "mmd-efficientnet-64"]
    elif mistake in ("size", "grey", "rgba"):
        image = Image.open(first)
        (image.resize((65, 65)) if mistake == "size" else image.convert({"grey": "L", "rgba": "RGBA"}[mistake])).save(first)
    elif mistake in ("nan", "pickled images"):
        source = str(tmp_path / "images.npy")
        array = np.full((40, 64, 64, 3), np.nan) if mistake == "nan" else np.array([{}], dtype=object)
        np.save(source, array, allow_pickle=True)
    else:
        file, tensor = tmp_path / "weights.pth", torch.zeros(1000)
        torch.save({"a": tensor} if mistake != "pickled weights" else {"a": Image.new("L", (2, 2))}, file)
        if mistake == "truncated weights":
            file.write_bytes(file.read_bytes()[:-900])
        hash_suffix = "" if mistake == "another hash" else f"#sha256={file_sha256(file)}"
        options = ["--protocol", "div2k-sr", "--weights", f"inception={file}{hash_suffix}"]
    monkeypatch.setattr("sys.argv", ["isocost", "score", source, "--reference", str(reference), *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0])


def test_a_preset_is_found_by_its_name() -> None:
    assert protocol_presets.protocol_preset("demo") is PRESETS["demo"]
