"""A study continues after its autoencoder, text encoder or parent checkpoints moved, and only if their files are the same."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from conftest import plain_study
from finished_study import PARTS, copy_of, finished_spec
from isocost.config.base import parse_spec
from isocost.config.study import StudySpec
from isocost.errors import ConfigError
from isocost.models.text_encoder import minilm_path
from isocost.pipeline import compatibility
from isocost.pipeline.compatibility import DATA_FILE, read_content
from isocost.pipeline.merge import merge
from isocost.pipeline.pipeline import Pipeline

BUILT_IN = resources.files("isocost.assets") / "scenes-autoencoder"


def study(vae: Path, text: Path) -> StudySpec:
    components = {
        "autoencoder": {"kind": "pretrained", "path": str(vae)},
        "text_encoder": {"path": str(text), "max_tokens": 8},
    }
    return parse_spec(StudySpec, plain_study(**components), "study")


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    return Path(shutil.copytree(str(BUILT_IN), tmp_path / "vae"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text encoder whose files are links."""
    folder = tmp_path / "text"
    folder.mkdir()
    for file in Path(minilm_path()).iterdir():
        if file.is_file():
            (folder / file.name).symlink_to(file)
    return folder


@pytest.fixture
def out(vae: Path, text: Path, tmp_path: Path) -> Path:
    """An output folder with reference features."""
    pipeline = Pipeline(study(vae, text), tmp_path / "out")
    pipeline.prepare()
    pipeline.assets.prepare_reference()
    return pipeline.out


def digests(pipeline: Pipeline) -> tuple[str, str]:
    return pipeline.assets.autoencoder_digest, pipeline.assets.cache_digest


def test_moved_components_keep_the_names_of_all_artefacts(vae: Path, text: Path, out: Path, tmp_path: Path) -> None:
    before = digests(Pipeline(study(vae, text), out))
    for number in range(2):  # moved twice
        vae, text = (Path(shutil.move(folder, tmp_path / f"{folder.name}-{number}")) for folder in (vae, text))
        pipeline = Pipeline(study(vae, text), out)
        assert digests(pipeline) == before
        pipeline.prepare()
    assert pipeline.assets.load_or_train_autoencoder().latent_channels == 4
    recorded = read_content(out).components
    assert {part: Path(component.path).name for part, component in recorded.items()} == {
        "autoencoder": "vae",
        "text_encoder": "text",
    }
    other = Pipeline(study(vae, text), tmp_path / "new")
    assert digests(other) != before


def test_a_moved_component_that_is_absent_now_stays_known(vae: Path, text: Path, out: Path, tmp_path: Path) -> None:
    """As when an output folder goes to a machine without the autoencoder and the text encoder."""
    before = digests(Pipeline(study(vae, text), out))
    moved = [Path(shutil.move(folder, tmp_path / f"{folder.name}-moved")) for folder in (vae, text)]
    Pipeline(study(*moved), out).prepare()
    for folder in moved:
        shutil.rmtree(folder)
    pipeline = Pipeline(study(*moved), out)
    assert digests(pipeline) == before
    pipeline.prepare()
    assert digests(Pipeline(study(*moved), out)) == before, "the record stays"
    assert digests(Pipeline(study(vae, text), out)) == before, "the first paths name the artefacts"
    with pytest.raises(ConfigError, match=r"autoencoder\.path"):
        Pipeline(study(tmp_path / "elsewhere", moved[1]), out)


def test_other_files_at_another_path_are_refused(vae: Path, text: Path, out: Path) -> None:
    moved = vae.rename(vae.with_name("elsewhere"))
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    with pytest.raises(ConfigError, match=r"autoencoder\.path = .*, whose files differ; set autoencoder\.path back") as caught:
        Pipeline(study(moved, text), out)
    assert "\n" not in str(caught.value)


def test_other_files_at_the_same_path_are_refused(vae: Path, text: Path, out: Path) -> None:
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    with pytest.raises(ConfigError, match=r"autoencoder\.path = .*: its files have changed since the artefacts"):
        Pipeline(study(vae, text), out)


def test_a_folder_without_the_record_compares_both_paths(
    vae: Path, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digests(Pipeline(study(vae, text), out))
    (out / DATA_FILE).unlink()
    copied = Path(shutil.copytree(vae, vae.with_name("copy")))
    read, files = compatibility.load_study, []
    monkeypatch.setattr(compatibility, "load_study", lambda file: files.append(file) or read(file))
    assert digests(Pipeline(study(copied, text), out)) == before
    assert files == [out / "study.yaml"], "the former study is read once"
    shutil.rmtree(vae)
    with pytest.raises(ConfigError, match=r"autoencoder\.path"):
        Pipeline(study(copied, text), out)


def test_a_folder_with_the_name_of_a_built_in_part_is_not_read(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("scenes", "minilm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    pipeline = Pipeline(study(Path("scenes"), Path("minilm")), tmp_path / "built-in")
    assert pipeline.components == {}


@pytest.mark.slow
def test_folders_whose_artefacts_have_other_names_are_not_merged(vae: Path, text: Path, out: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(vae, vae.with_name("copy")))
    other = Pipeline(study(copied, text), tmp_path / "other")
    other.prepare()
    other.assets.prepare_reference()
    with pytest.raises(ConfigError, match=r"autoencoder\.path"):
        merge(out, [other.out])
    Pipeline(study(copied, text), out).prepare()
    second = Pipeline(study(copied, text), tmp_path / "second")
    second.prepare()
    second.assets.prepare_reference()
    with pytest.raises(ConfigError, match=r"autoencoder\.path"):  # equal paths now, but other names
        merge(out, [second.out])


def test_a_home_folder_is_written_as_a_tilde(vae: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(vae.parent))
    spec = study(Path("~") / vae.name, Path("~") / text.name)
    assert (spec.autoencoder.path, spec.text_encoder.path) == (str(vae), str(text))  # type: ignore[union-attr]


# --- parent checkpoints -----------------------------------------------------------------------------------------------


def with_teachers(*teachers: Path) -> StudySpec:
    part = {**PARTS["distill"], "variants": ["consistency"], "teachers": [str(folder) for folder in teachers]}
    return finished_spec("distill", distill=part)


def test_a_parent_checkpoint_is_known_by_its_content_whatever_its_folder_is_called(
    finished_study: Path, tmp_path: Path
) -> None:
    out = copy_of(finished_study / "family", tmp_path / "out")
    family = Pipeline(finished_spec(), out)
    (run,) = family.runs
    first, last = (family.store.folder("checkpoint", name) for name in run.checkpoints.values())
    own = Pipeline(with_teachers(last), out).experiments["distill"].runs
    links = [tmp_path / "a" / "model", tmp_path / "b" / "model"]
    for link, folder in zip(links, (first, last), strict=True):
        link.parent.mkdir()
        link.symlink_to(folder)
    renamed = Pipeline(with_teachers(links[1]), out).experiments["distill"].runs
    assert [run.digest for run in renamed] == [run.digest for run in own]
    both = Pipeline(with_teachers(*links), out).experiments["distill"].runs
    assert len({run.digest for run in both}) == 2  # two checkpoints in folders of one name


def test_a_parent_with_the_same_autoencoder_at_another_path_is_accepted(vae: Path, text: Path, out: Path) -> None:
    copied = Path(shutil.copytree(vae, vae.with_name("copy")))
    assets: Any = Pipeline(study(vae, text), out).assets
    info = type("Info", (), {"autoencoder": str(copied), "autoencoder_subfolder": None})()
    assert assets.has_autoencoder_of(info)
    other = Path(shutil.copytree(vae, vae.parent / "other" / "vae"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    info.autoencoder = str(other)
    assert not assets.has_autoencoder_of(info)  # although the last part of its path is the same
