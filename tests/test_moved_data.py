"""A study continues in its output folder after its images moved, and only if their bytes are the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import plain_study
from isocost.config.base import parse_spec
from isocost.config.study import StudySpec
from isocost.errors import ConfigError
from isocost.pipeline.compatibility import DATA_FILE, STUDY_FILE
from isocost.pipeline.merge import archive, merge
from isocost.pipeline.pipeline import Pipeline
from tiny_configs import save, scenes


def study(folder: Path, **changes: Any) -> StudySpec:
    """A study of the images in `folder`, with an autoencoder that takes a moment."""
    sources = {part: {"kind": "folder", "path": str(folder / part)} for part in ("train", "reference")}
    sources["train"] |= changes
    return parse_spec(StudySpec, plain_study(data={"resolution": 16, **sources}), "study")


def write_images(folder: Path) -> Path:
    for seed, part in enumerate(("train", "reference")):
        names = [f"{index:02}" for index in range(40)]
        save(folder / part, scenes(40, 16, seed), names)
        for name in names:
            (folder / part / f"{name}.txt").write_text(f"scene {name}")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


@pytest.fixture
def out(images: Path, tmp_path: Path) -> Path:
    """An output folder with an autoencoder of the images."""
    pipeline = Pipeline(study(images), tmp_path / "out")
    pipeline.prepare()
    pipeline.assets.load_or_train_autoencoder()
    return pipeline.out


def test_moved_images_continue_a_study_with_all_its_artefacts(images: Path, out: Path) -> None:
    moved = images.rename(images.with_name("elsewhere"))
    pipeline = Pipeline(study(moved), out)
    assert pipeline.store.has("autoencoder", pipeline.assets.autoencoder_digest)
    pipeline.prepare()
    assert str(moved) in (out / STUDY_FILE).read_text()
    assert str(images) not in (out / STUDY_FILE).read_text()
    Pipeline(study(moved), out)


def test_images_with_another_byte_are_refused(images: Path, out: Path) -> None:
    moved = images.rename(images.with_name("elsewhere"))
    (moved / "reference" / "00.txt").write_text("another caption")
    with pytest.raises(ConfigError, match=r"data\.reference\.path = .*, whose files differ; set data\.reference\.path back"):
        Pipeline(study(moved), out)
    with pytest.raises(ConfigError, match="no such file or folder"):
        Pipeline(study(images), out).prepare()


def test_a_moved_source_that_is_read_in_another_way_is_refused(images: Path, out: Path) -> None:
    moved = images.rename(images.with_name("elsewhere"))
    with pytest.raises(ConfigError, match=r"data\.train\.path"):
        Pipeline(study(moved, limit=30), out)


def test_a_folder_without_the_record_compares_the_files_of_both_paths(images: Path, out: Path) -> None:
    (out / DATA_FILE).unlink()
    copied = shutil.copytree(images, images.with_name("copy"))
    Pipeline(study(copied), out)
    shutil.rmtree(images)
    with pytest.raises(ConfigError, match=r"data\.json and the files at the former path are missing"):
        Pipeline(study(copied), out)


def test_a_damaged_record_is_one_line(images: Path, out: Path) -> None:
    moved = images.rename(images.with_name("elsewhere"))
    for text in ("{", "[1]", "3", '{"train"'):
        (out / DATA_FILE).write_text(text)
        with pytest.raises(ConfigError) as caught:
            Pipeline(study(moved), out)
        assert "\n" not in str(caught.value)


def test_folders_of_machines_with_other_paths_are_archived_and_merged(images: Path, out: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(images, images.with_name("copy"))
    other = Pipeline(study(copied), tmp_path / "other")
    other.prepare()
    other.assets.load_or_train_autoencoder()
    shutil.rmtree(copied)
    shutil.rmtree(images)
    merge(out, [other.out])
    archive(other.out, tmp_path / "archive")
    archive(out, tmp_path / "archive")
    merge(tmp_path / "new", [tmp_path / "archive"])
    moved = write_images(tmp_path / "again")
    for folder in (out, tmp_path / "archive", tmp_path / "new"):
        Pipeline(study(moved), folder).prepare()
