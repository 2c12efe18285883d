"""Scores from captions and images on disk: the same numbers however they lie there, and what is refused in one line."""

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
from isocost.evaluation import protocol_presets as named
from isocost.evaluation.image_sources import iter_images
from isocost.evaluation.prompt_lists import prompts_sha256
from isocost.evaluation.protocol_presets import PRESETS, PromptList
from isocost.evaluation.reference_stats import read_statistics
from isocost.evaluation.score_folder import make_reference, score_folder
from isocost.metrics.download import file_sha256
from isocost.metrics.efficientnet import EfficientNetLite0
from isocost.metrics.mmd import squared_mmd
from tiny_configs import save, scenes

# --- coco30k-fid-clip in small ----------------------------------------------------------------------------------------

IDS = [203564 + 7 * number for number in range(40)]
CAPTIONS = {str(number): f"image number {number}" for number in IDS}


@pytest.fixture
def coco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path, Path, Path]:
    """A protocol of the same making as coco30k-fid-clip of 40 images: name, captions, images, reference."""
    small = dataclasses.replace(
        PRESETS["coco30k-fid-clip"],
        name="coco40",
        spec=ProtocolSpec(num_images=40, features="efficientnet-lite0", metrics=("mmd", "precision_recall")),  # type: ignore[arg-type]
        resolution=64,
        num_images=40,
        num_reference=40,
        prompts=PromptList(40, prompts_sha256(CAPTIONS), "forty captions"),
    )
    listed = tmp_path / "captions.csv"
    with listed.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image_id", "source", "prompt"])
        writer.writerows([f"{number:012d}", "x", f" {CAPTIONS[str(number)]}\n"] for number in IDS)
    images = save(tmp_path / "made", scenes(40, 64), [f"{number:012d}" for number in IDS])
    real = scenes(43, 80, seed=1)
    names = [f"COCO_val2014_{number:012d}" for number in [*IDS, 1, 2, 3]]
    reference = save(tmp_path / "val2014", real, names)
    monkeypatch.setitem(PRESETS, small.name, small)
    return small.name, listed, images, reference


def test_captions_and_images_on_disk_become_scores(coco: tuple[str, Path, Path, Path]) -> None:
    name, captions, images, reference = coco
    found = score_folder(images, reference, name, prompts=str(captions))
    assert found.protocol.startswith("coco40@1:")
    assert (found.num_images, found.num_reference) == (40, 40)
    assert set(found.scores) == {"mmd_efficientnet", "precision_efficientnet", "recall_efficientnet"}
    extractor = EfficientNetLite0(side=64)
    real = torch.stack([one.pixels for one in iter_images(str(reference), side=64, exact=False)])[3:]
    assert len(real) == 40
    expected = squared_mmd(extractor(scenes(40, 64)).numpy(), extractor(real).numpy())
    assert found.scores["mmd_efficientnet"].value == pytest.approx(expected, rel=1e-9)
    assert found.parts["name"] == "coco40@1"


def test_statistics_made_once_score_as_the_images(coco: tuple[str, Path, Path, Path], tmp_path: Path) -> None:
    name, captions, images, reference = coco
    out = tmp_path / "stats"
    taken = make_reference(reference, out, name, prompts=str(captions))
    assert len(taken) == 40
    assert not list(tmp_path.glob("**/*.partial"))
    rows = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [str(number) for number in IDS]
    by_images = score_folder(images, reference, name, prompts=str(captions))
    assert score_folder(images, out, name, prompts=str(captions)) == by_images
    with pytest.raises(ConfigError, match="is there already"):
        make_reference(reference, out, name, prompts=str(captions))


def test_names_and_places_of_images_do_not_change_a_bit(coco: tuple[str, Path, Path, Path], tmp_path: Path) -> None:
    name, captions, images, reference = coco
    whole = score_folder(images, reference, name, prompts=str(captions))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    moved = save(tmp_path / "moved", scenes(40, 64)[order], [f"{place % 3}/{IDS[place]}" for place in order])
    assert score_folder(moved, reference, name, prompts=str(captions)) == whole
    np.savez(tmp_path / "made.npz", scenes(40, 64).permute(0, 2, 3, 1).numpy())
    assert score_folder(tmp_path / "made.npz", reference, name, prompts=str(captions)) == whole


def test_another_list_of_captions_is_refused(coco: tuple[str, Path, Path, Path]) -> None:
    name, captions, images, reference = coco
    captions.write_text(captions.read_text().replace("number 203571", "number 203572"))
    with pytest.raises(ConfigError, match=r"40 captions of hash .*, the protocol fixes 40 of .*forty captions") as refused:
        score_folder(images, reference, name, prompts=str(captions))
    assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match="needs --prompts: forty captions"):
        score_folder(images, reference, name)


def test_missing_and_doubled_images_are_named(coco: tuple[str, Path, Path, Path]) -> None:
    name, captions, images, reference = coco
    (images / f"{IDS[5]:012d}.png").unlink()
    with pytest.raises(ConfigError, match=f"1 of 40 images are missing; the first is id {IDS[5]}"):
        score_folder(images, reference, name, prompts=str(captions))
    save(images, scenes(2, 64), [f"{IDS[5]}", f"again/{IDS[6]}"])
    with pytest.raises(ConfigError, match=f"id {IDS[6]} came twice"):
        score_folder(images, reference, name, prompts=str(captions))


@pytest.mark.parametrize(
    ("mode", "side", "said"),
    [("L", 64, "is grey"), ("RGBA", 64, "is RGBA"), ("P", 64, "of a palette"), ("RGB", 65, "65 x 65 pixels; .* takes 64 x 64")],
)
def test_a_generated_image_of_another_kind_is_one_line(
    coco: tuple[str, Path, Path, Path], mode: str, side: int, said: str
) -> None:
    name, captions, images, reference = coco
    file = images / f"{IDS[3]:012d}.png"
    Image.open(file).resize((side, side)).convert(mode).save(file)
    with pytest.raises(ConfigError, match=f"{file.name}.*{said}") as refused:
        score_folder(images, reference, name, prompts=str(captions))
    assert "\n" not in str(refused.value)


# --- array files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.full((40, 64, 64, 3), np.nan), "40 images hold NaN or infinite pixels"),
        (np.zeros((40, 64, 64, 3), dtype=np.float32), "pixels are floating point"),
        (np.zeros((40, 64, 64, 1), dtype=np.uint8), "grey"),
        (np.zeros((40, 64, 64, 4), dtype=np.uint8), "RGBA"),
        (np.zeros((40, 32, 32, 3), dtype=np.uint8), "32 x 32 pixels; this protocol takes 64 x 64"),
        (np.zeros((40, 64), dtype=np.uint8), "no stack of images"),
        (np.zeros((39, 64, 64, 3), dtype=np.uint8), "1 of 40 images are missing"),
    ],
    ids=["nan", "float", "grey", "rgba", "size", "flat", "few"],
)
def test_an_array_that_is_no_stack_of_images_is_one_line(
    coco: tuple[str, Path, Path, Path], tmp_path: Path, array: np.ndarray, said: str
) -> None:
    name, captions, _, reference = coco
    np.save(tmp_path / "made.npy", array)
    with pytest.raises(ConfigError, match=said) as refused:
        score_folder(tmp_path / "made.npy", reference, name, prompts=str(captions))
    assert "\n" not in str(refused.value)


def test_pickled_and_truncated_arrays_are_one_line(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "plain.npy").write_bytes(pickle.dumps([1, 2, 3]))
    np.save(tmp_path / "whole.npy", np.zeros((3, 8, 8, 3), dtype=np.uint8))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:-50])
    for file in ("objects.npy", "plain.npy", "cut.npy", "absent.npy"):
        with pytest.raises(ConfigError, match=f"{file}: (holds pickled|cut short|no such)") as refused:
            list(iter_images(str(tmp_path / file), side=None, exact=False))
        assert "\n" not in str(refused.value)


# --- references and weights --------------------------------------------------------------------------------------------


def test_statistics_of_another_extractor_are_refused(coco: tuple[str, Path, Path, Path], tmp_path: Path) -> None:
    name, captions, _, reference = coco
    make_reference(reference, tmp_path / "stats", name, prompts=str(captions))
    with pytest.raises(ConfigError, match=r"another extractor.*side=64.*needs .*side=96"):
        read_statistics(tmp_path / "stats", {"efficientnet-lite0": EfficientNetLite0(side=96)})


def test_weights_for_what_is_not_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="inception is not used here; this protocol uses efficientnet-lite0, lpips"):
        score_folder(tmp_path, tmp_path, "mmd-efficientnet-64", weights={"inception": "x"})
    with pytest.raises(ConfigError, match="has no captions; leave it out"):
        score_folder(tmp_path, tmp_path, "mmd-efficientnet-64", prompts="x.csv")


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_commands_score_and_reference(coco: tuple[str, Path, Path, Path], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    name, captions, images, reference = coco
    options = ["--protocol", name, "--prompts", str(captions)]
    made = CliRunner().invoke(app, ["reference", str(reference), str(tmp_path / "stats"), *options])
    assert json.loads(made.stdout.splitlines()[-1])["num_images"] == 40
    with_metric = CliRunner().invoke(app, ["score", str(images), "--reference", str(tmp_path / "stats"), *options])
    answer = json.loads(with_metric.stdout.splitlines()[-1])
    assert answer["parts"]["num_images"] == 40
    assert answer["scores"]["mmd_efficientnet"]["low"] < answer["scores"]["mmd_efficientnet"]["high"]


def test_verify_fails_with_status_1_where_an_anchor_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from isocost.errors import RunError
    from isocost.evaluation import self_check as verify

    sound = CliRunner().invoke(app, ["verify", "--json"])
    answer = json.loads(sound.stdout.splitlines()[-1])
    assert sound.exit_code == 0
    assert answer["passed"]
    assert len(answer["anchors"]) == 15
    monkeypatch.setattr(verify, "LPIPS_PUBLISHED", {"ex_p0": 0.722, "ex_p1": 0.14})
    broken = CliRunner().invoke(app, ["verify", "--json"])
    assert isinstance(broken.exception, RunError)
    assert "1 of 15 anchors failed; the first is LPIPS of the example pair ex_ref, ex_p1" in str(broken.exception)
    assert not json.loads(broken.stdout.splitlines()[-1])["passed"]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("too few", "5 images; a distance takes at least 32"),
        ("size", "65 x 65 pixels; this protocol takes 64 x 64"),
        ("grey", "is grey"),
        ("rgba", "is RGBA"),
        ("nan", "40 images hold NaN"),
        ("pickled images", "holds pickled objects"),
        ("truncated weights", "cut short"),
        ("another hash", "SHA-256 .*, expected 6726825d0af5f729"),
        ("pickled weights", "holds pickled objects, which are refused"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(
    bad: str,
    said: str,
    coco: tuple[str, Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, captions, images, reference = coco
    made, options, first = str(images), ["--protocol", name, "--prompts", str(captions)], images / f"{IDS[0]:012d}.png"
    if bad == "too few":
        made, options = str(save(tmp_path / "few", scenes(5, 64), list("abcde"))), ["--protocol", "mmd-efficientnet-64"]
    elif bad in ("size", "grey", "rgba"):
        image = Image.open(first)
        (image.resize((65, 65)) if bad == "size" else image.convert({"grey": "L", "rgba": "RGBA"}[bad])).save(first)
    elif bad in ("nan", "pickled images"):
        made = str(tmp_path / "made.npy")
        np.save(made, np.full((40, 64, 64, 3), np.nan) if bad == "nan" else np.array([{}], dtype=object), allow_pickle=True)
    else:
        file, held = tmp_path / "weights.pth", torch.zeros(1000)
        torch.save({"a": held} if bad != "pickled weights" else {"a": Image.new("L", (2, 2))}, file)
        if bad == "truncated weights":
            file.write_bytes(file.read_bytes()[:-900])
        stated = "" if bad == "another hash" else f"#sha256={file_sha256(file)}"
        options = ["--protocol", "div2k-sr", "--weights", f"inception={file}{stated}"]
    monkeypatch.setattr("sys.argv", ["isocost", "score", made, "--reference", str(reference), *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert re.search(said, lines[0])


def test_the_module_of_names_has_no_protocol_twice() -> None:
    assert named.protocol_preset("demo") is PRESETS["demo"]
