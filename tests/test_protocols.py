"""Protocol presets: fixed inputs, pairs, subjects, and the description of the differences between two protocols."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

from isocost.analysis.pareto import best_guidance
from isocost.config.evaluation import ProtocolSpec
from isocost.errors import ConfigError
from isocost.evaluation import score_folder as score_folder_module
from isocost.evaluation.evaluator import FeatureCollector, score
from isocost.evaluation.image_sources import image_id, iter_images
from isocost.evaluation.prompt_lists import prompts_sha256, read_prompt_list
from isocost.evaluation.protocol import Protocol, format_difference, make_protocol
from isocost.evaluation.protocol_presets import PRESETS, Crops, PromptList, ProtocolPreset
from isocost.evaluation.reference_set import ReferenceSet
from isocost.evaluation.score_folder import make_reference, score_folder
from isocost.metrics.extractor_base import FeatureExtractor
from isocost.metrics.image_similarity import psnr, ssim
from synthetic_results import synthetic_table
from tiny_configs import Thumbnail, ThumbnailWithText, save, scenes


@pytest.fixture
def thumbnails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace every extractor by a thumbnail."""

    def make(spec: ProtocolSpec, device: str = "cpu") -> dict[str, FeatureExtractor]:
        return {name: ThumbnailWithText() if name.startswith("clip") else Thumbnail() for name in spec.features}

    monkeypatch.setattr(score_folder_module, "make_extractors", make)
    monkeypatch.setattr("isocost.evaluation.paired_images.CLIPFeatureExtractor", ThumbnailWithText)


def register(monkeypatch: pytest.MonkeyPatch, protocol: ProtocolPreset) -> str:
    monkeypatch.setitem(PRESETS, protocol.name, protocol)
    return protocol.name


# --- the registry -----------------------------------------------------------------------------------------------------


def test_the_documented_presets_exist() -> None:
    assert {"coco30k-fid-clip", "div2k-sr", "dreambooth-30x25", "aerial-fd", "demo"} <= set(PRESETS)
    for name, protocol in PRESETS.items():
        assert protocol.name == name
        assert protocol.version >= 1
        assert protocol.prompts is None or len(protocol.prompts.sha256) == 64


def test_the_protocol_page_names_each_preset_with_its_version_and_hash() -> None:
    page = (Path(__file__).parents[1] / "docs" / "protocol.md").read_text(encoding="utf-8")
    for protocol in PRESETS.values():
        assert f"`{protocol.name}`" in page
        if protocol.prompts is not None:
            assert protocol.prompts.sha256 in page
            assert f"`{protocol.title}`" in page


@pytest.mark.slow
def test_the_demo_protocol_needs_images_only(tmp_path: Path) -> None:
    images = scenes(256, 32, seed=1)
    np.save(tmp_path / "generated.npy", images.permute(0, 2, 3, 1).numpy())
    result = score_folder(tmp_path / "generated.npy", "scenes:2000", "demo")
    assert (result.num_images, result.num_reference) == (256, 2000)
    assert abs(result.scores["mmd_efficientnet"].value) < 0.5
    assert (
        result.parts["prompts"]
        != make_protocol(ProtocolSpec(), resolution=32, extractor="", reference="", num_reference=1, prompts=[]).prompts
    )


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("coco30k-fid-clip", "prompts/coco_30k.csv"),
        ("aerial-fd", "aerial/test-000.tar"),
        ("dreambooth-30x25", "dreambooth/prompts_and_classes.txt"),
    ],
)
def test_the_published_prompt_lists_have_the_hashes_of_the_presets(shared: Path, name: str, file: str) -> None:
    prompt_list = PRESETS[name].prompts
    assert prompt_list is not None
    assert len(read_prompt_list(str(shared / file), prompt_list)) == prompt_list.num


def test_ids_of_images() -> None:
    for name in ("COCO_val2014_000000203564.jpg", "a/000000203564.png", "203564", "x/203564.WEBP"):
        assert image_id(name) == "203564"
    assert image_id("test-000.tar/airport_348") == "airport_348"
    assert image_id("scene-1-0") == "scene-1-0"
    assert image_id("00.7.png") == "00.7"


# --- pairs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def super_resolution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thumbnails: None) -> tuple[str, Path, Path]:
    """A small div2k-sr with 12 crops of 32 pixels from 4 images: its name, the originals, and a folder for statistics."""
    small = dataclasses.replace(
        PRESETS["div2k-sr"],
        name="sr12",
        spec=ProtocolSpec(num_images=32, metrics=("mmd",)),
        resolution=32,
        num_images=12,
        num_reference=12,
        paired_image_metrics=("psnr", "ssim"),
        crops=Crops(12, 32, 4),
    )
    originals = save(tmp_path / "HR", scenes(4, 90), [f"080{number}" for number in range(4)])
    return register(monkeypatch, small), originals, tmp_path / "stats"


def test_crops_are_a_function_of_their_number(super_resolution: tuple[str, Path, Path]) -> None:
    name, originals, out = super_resolution
    make_reference(originals, out, name)
    files = sorted((out / "images").iterdir())
    assert [file.name for file in files] == [f"{number:05d}.png" for number in range(12)]
    crops = Crops(12, 32, 4)
    sources = scenes(4, 90).permute(0, 2, 3, 1).numpy()
    corners = [crops.corner(number, 90, 90) for number in range(12)]
    assert len(set(corners)) > 10
    assert all(0 <= offset <= 58 for corner in corners for offset in corner)
    for number, (file, (top, left)) in enumerate(zip(files, corners, strict=True)):
        expected = sources[number % 4][top : top + 32, left : left + 32]
        assert np.array_equal(np.asarray(Image.open(file)), expected)
    assert PRESETS["div2k-sr"].crops == Crops(3000, 512, 100)
    assert Crops(3000, 512, 100).corner(17, 1356, 2040) == (160, 861)


def test_pairs_are_scored_by_id(super_resolution: tuple[str, Path, Path], tmp_path: Path) -> None:
    name, originals, out = super_resolution
    make_reference(originals, out, name)
    real = torch.stack([image.pixels for image in iter_images(str(out / "images"), resolution=32, exact=True)])
    generated = (real.int() + 1 + torch.arange(12).reshape(12, 1, 1, 1)).clamp(0, 255).to(torch.uint8)
    images = save(tmp_path / "generated", generated.flip(0), [str(number) for number in reversed(range(12))])
    scores = score_folder(images, out, name).scores
    assert scores["psnr"].value == pytest.approx(psnr(generated.numpy(), real.numpy()).mean(), rel=1e-12)
    assert scores["ssim"].value == pytest.approx(ssim(generated, real).mean(), rel=1e-12)
    save(images, (255 - real[:1]), ["0"])
    scores = score_folder(images, out, name).scores
    changed = torch.cat([255 - real[:1], generated[1:]])
    assert scores["psnr"].value == pytest.approx(psnr(changed.numpy(), real.numpy()).mean(), rel=1e-12)
    assert scores["psnr"].low < scores["psnr"].value < scores["psnr"].high
    save(images, real[:1], ["0"])
    with pytest.raises(ConfigError, match="1 images equal their originals"):
        score_folder(images, out, name)
    save(images, real[:1], ["99"])
    (images / "0.png").unlink()
    with pytest.raises(ConfigError, match="have no original in the reference; the first is 99"):
        score_folder(images, out, name)
    save(out / "images", real[:1], ["again/00001"])
    with pytest.raises(ConfigError, match="id 1 appears twice in the reference"):
        score_folder(images, out, name)
    (originals / "0803.png").unlink()
    with pytest.raises(ConfigError, match="3 images; this protocol needs 4"):
        make_reference(originals, tmp_path / "other", name)


# --- subjects ---------------------------------------------------------------------------------------------------------


def test_dreambooth_images_are_compared_with_subject_and_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thumbnails: None
) -> None:
    prompts = {f"{subject}/{number:02d}": f"a {subject} {'x' * number}" for subject in ("dog", "vase") for number in range(2)}
    small = dataclasses.replace(
        PRESETS["dreambooth-30x25"],
        name="dreams",
        num_images=8,
        prompts=PromptList(4, prompts_sha256(prompts), "four prompts"),
    )
    prompts_file = tmp_path / "prompts.csv"
    prompts_file.write_text("id,caption\n" + "".join(f"{key},{prompt}\n" for key, prompt in prompts.items()))
    monkeypatch.setattr(score_folder_module, "read_prompt_list", lambda source, expected: prompts)
    name = register(monkeypatch, small)
    generated = scenes(8, 40)
    keys = [f"{subject}/{number:02d}_{copy}" for subject in ("dog", "vase") for number in range(2) for copy in range(2)]
    images = save(tmp_path / "generated", generated, keys)
    reference = save(tmp_path / "real", scenes(5, 48, seed=1), ["dog/00", "dog/01", "vase/00", "vase/01", "vase/02"])
    result = score_folder(images, reference, name, prompts=str(prompts_file))
    assert (result.num_images, result.num_reference) == (8, 5)
    thumbnail, real = Thumbnail(), scenes(5, 48, seed=1)
    generated_unit, real_unit = (torch.nn.functional.normalize(thumbnail(images).double()) for images in (generated, real))
    dog, vase = (generated_unit[:4] @ real_unit[:2].T).mean(1), (generated_unit[4:] @ real_unit[2:].T).mean(1)
    expected = torch.cat([dog, vase]).mean()
    assert result.scores["dino"].value == result.scores["clip_i"].value == pytest.approx(float(expected), rel=1e-6)
    assert result.scores["clip_t"].value == pytest.approx(float((generated_unit.sum(1) / 48**0.5).mean()), rel=1e-6)
    save(images, generated[:1], ["dog/07_0"])
    with pytest.raises(ConfigError, match=r"07_0\.png: unknown subject or prompt"):
        score_folder(images, reference, name, prompts=str(prompts_file))
    (images / "dog" / "07_0.png").rename(images / "dog" / "00_7.png")
    with pytest.raises(ConfigError, match="9 images; this protocol needs 8"):
        score_folder(images, reference, name, prompts=str(prompts_file))


# --- prompts ----------------------------------------------------------------------------------------------------------


class OneDirectionPerLength(ThumbnailWithText):
    """The embedding of a text is the unit vector whose index is the text's length."""

    def encode_text(self, texts: list[str]) -> Tensor:
        return torch.eye(48)[[len(text) for text in texts]]


def test_an_image_is_compared_with_its_own_prompt_if_other_images_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isocost.evaluation.reference_set.CLIPFeatureExtractor", OneDirectionPerLength)
    images, prompts, name = scenes(40, 32), ["x" * number for number in range(40)], "clip-vit-b-32"
    protocol = make_protocol(
        ProtocolSpec(num_images=40), resolution=32, extractor="", reference="", num_reference=40, prompts=prompts
    )
    reference = ReferenceSet(protocol, {name: OneDirectionPerLength()}, {name: Thumbnail()(images).numpy()}, prompts)
    collector = FeatureCollector(reference)
    present = [number for number in range(40) if number not in (0, 7, 33)]
    collector.add(present, images[present])
    unit = torch.nn.functional.normalize(Thumbnail()(images).double())
    expected = float(unit[present, present].mean())
    interval = score(collector.features(), reference, ("prompt_similarity",))["clip_score_b32"]
    assert interval.value == pytest.approx(expected, rel=1e-6)


# --- differences ------------------------------------------------------------------------------------------------------


PLAIN = Protocol(100, 200, 32, "net:aaaa/resize=bicubic/side=64/fp32", "real", "prompts", "none", 50, 0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_images": 300}, "N (100, 300)"),
        ({"reference": "other"}, "reference (real, other)"),
        ({"prompts": "more"}, "prompts (prompts, more)"),
        ({"resolution": 64}, "resolution (32, 64)"),
        ({"extractor": "net:bbbb/resize=bicubic/side=64/fp32"}, "weights of net (aaaa, bbbb)"),
        ({"extractor": "net:aaaa/resize=bilinear/side=64/fp32"}, "resize of net (bicubic, bilinear)"),
        ({"extractor": "net:aaaa/resize=bicubic/side=64/fp16"}, "precision of net (fp32, fp16)"),
        ({"extractor": "net:aaaa/resize=bicubic/side=64/fp32 + two:cccc/fp32"}, "features (net; net, two)"),
        ({}, ""),
    ],
)
def test_the_differences_between_two_protocols_are_described(changes: dict[str, object], expected: str) -> None:
    assert format_difference(PLAIN.parts, dataclasses.replace(PLAIN, **changes).parts) == expected  # type: ignore[arg-type]


def test_points_of_two_protocols_are_refused_with_the_differences() -> None:
    table = synthetic_table()
    other = dataclasses.replace(PLAIN, num_images=300, extractor="net:aaaa/resize=bilinear/side=64/fp32")
    parts = {PLAIN.id: json.dumps(PLAIN.parts), other.id: json.dumps(other.parts)}
    table["protocol"] = np.where(np.arange(len(table)) % 2 == 0, PLAIN.id, other.id)
    table["protocol_parts"] = table["protocol"].map(parts)
    with pytest.raises(ConfigError, match="points that differ in protocol cannot be compared") as refused:
        best_guidance(table, "mmd_efficientnet")
    assert "; they differ in N (" in str(refused.value)
    assert "resize of net (" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert isinstance(table, pd.DataFrame)


def test_features_saved_in_half_precision_are_another_protocol() -> None:
    parts = {"resolution": 32, "extractor": ["e:1/fp32"], "reference": "r", "num_reference": 9, "prompts": []}
    plain, half = (make_protocol(ProtocolSpec(feature_dtype=dtype), **parts) for dtype in ("fp32", "fp16"))  # type: ignore[arg-type]
    assert plain.id != half.id
    assert format_difference(plain.parts, half.parts) == "dtype of e (none, fp16)"
