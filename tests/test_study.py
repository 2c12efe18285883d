"""Specs: stable digests, studies as YAML, one-line messages for mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import plain_study, tiny_study
from isocost.config.base import digest, parse_spec
from isocost.config.evaluation import ProtocolSpec
from isocost.config.sampling import SolverSpec
from isocost.config.study import StudySpec
from isocost.config.study_yaml import dump_study, load_study
from isocost.config.training import TrainSpec
from isocost.errors import ConfigError


def test_a_study_is_the_same_after_a_yaml_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(dump_study(tiny_study()))
    assert load_study(file) == tiny_study()


def test_a_default_that_is_written_out_changes_no_digest() -> None:
    assert digest(SolverSpec()) == digest(SolverSpec(name="ddim", timestep_spacing="trailing", eta=0.0))
    assert digest(SolverSpec()) != digest(SolverSpec(timestep_spacing="leading"))


def test_a_digest_is_the_sha256_of_canonical_json() -> None:
    assert digest({"stage": "point"}, SolverSpec(name="ddpm")) == "4c5068367771f898"


def test_the_length_of_a_training_and_its_snapshots_are_not_part_of_the_recipe() -> None:
    short, long = (
        TrainSpec(num_images=10),
        TrainSpec(num_images=20, snapshots=(5,), state_every_images=7, tracker="tensorboard"),
    )
    assert short.recipe() == long.recipe()
    assert short.recipe() != TrainSpec(num_images=10, lr=2e-4).recipe()


def test_snapshots_are_at_whole_batches() -> None:
    assert TrainSpec(num_images=100, batch_size=32).whole_batches(50) == 64
    assert TrainSpec(num_images=100, snapshots=(50, 20)).all_snapshots(1.0) == (20, 50, 100)
    by_compute = TrainSpec(num_images=100, snapshots=(50,), snapshots_gflop=(60.0, 240.0, 900.0))
    assert by_compute.all_snapshots(1.0) == (20, 50, 80, 100)
    assert by_compute.all_snapshots(2.0) == (10, 40, 50, 100)


def test_growing_a_study_changes_no_immutable_field() -> None:
    grown = plain_study(family={"widths": [8, 16, 24]})
    grown["sweep"] = {**grown["sweep"], "num_steps": [1, 2, 4], "guidance": [1, 2, 3], "solvers": [{"name": "ddpm"}]}
    grown["train"] = {**grown["train"], "num_images": 512}
    assert parse_spec(StudySpec, grown, "grown").immutable_fields() == tiny_study().immutable_fields()


def changed(path: str, value: Any) -> dict[str, Any]:
    plain = yaml.safe_load(yaml.safe_dump(plain_study()))
    *parents, last = path.split(".")
    section = plain
    for parent in parents:
        section = section[parent]
    section[last] = value
    return plain


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sweep.guidence", [1], "sweep.guidence: unknown key; allowed here: solvers, num_steps, guidance"),
        ("trian", {}, "trian: unknown key; allowed here: name, data, autoencoder"),
        ("data.train.pth", "x", "data.train.pth: unknown key; allowed here: kind, num_images, first, seed"),
        ("autoencoder.patches", 4, "autoencoder.patches: unknown key; allowed here: kind, patch, num_channels"),
        ("autoencoder.kind", "vq", "autoencoder"),
        ("sweep.guidance", [-1], "sweep.guidance.0 = -1"),
        ("sweep.num_steps", [0], "sweep.num_steps.0 = 0"),
        ("sweep.num_steps", [], "sweep.num_steps"),
        ("family.widths", [8, 8], "give at least one width, and each width once"),
        ("train.snapshots", [999], "snapshots must lie between 1 and num_images=256"),
        ("train.num_images", "many", "train.num_images = 'many'"),
        ("protocol.num_images", 1, "protocol.num_images = 1"),
        ("data.reference.num_images", 0, "data.reference.num_images = 0"),
    ],
)
def test_a_mistake_is_one_line_with_file_key_value_and_remedy(path: str, value: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(changed(path, value)))
    with pytest.raises(ConfigError) as caught:
        load_study(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
    assert message in str(caught.value)


def test_an_override_sets_a_nested_key(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(plain_study()))
    assert load_study(file, {"train.lr": 5e-4, "sweep.num_steps": [3]}).sweep.num_steps == (3,)
    with pytest.raises(ConfigError, match="'lr' is not a mapping"):
        load_study(file, {"train.lr.x": 1})


def test_a_file_that_is_not_a_study_is_rejected(tmp_path: Path) -> None:
    for text in ("a: [", "- 1", ""):
        (tmp_path / "study.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"study\.yaml"):
            load_study(tmp_path / "study.yaml")
    with pytest.raises(ConfigError, match="no such study file"):
        load_study(tmp_path / "absent.yaml")


def test_a_spec_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ProtocolSpec().num_images = 3  # type: ignore[misc]


STUDIES = sorted((Path(__file__).resolve().parents[1] / "studies").glob("*.yaml"))


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.name)
def test_every_study_of_the_project_is_valid_and_states_its_cost(file: Path) -> None:
    assert load_study(file).name == file.stem
    assert "# Cost:" in file.read_text()


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.name)
def test_every_scale_of_a_study_is_valid(file: Path) -> None:
    for scale in yaml.safe_load(file.read_text()).get("scales", {}):
        assert load_study(file, {"scale": scale}) != load_study(file)


def test_the_paper_study_has_the_papers_recipe_and_a_tiny_scale() -> None:
    file = next(file for file in STUDIES if file.name == "paper.yaml")
    paper, tiny = load_study(file), load_study(file, {"scale": "tiny"})
    assert paper.family.widths == (64, 96, 128, 160, 192, 224, 256, 288, 320, 512, 768)
    assert (paper.train.num_images, paper.train.batch_size, paper.train.lr) == (500_000 * 2048, 2048, 1e-4)
    assert paper.sweep.num_steps == (4, 6, 8, 10, 20, 50)
    assert {1.5, 2, 3, 4, 5, 6, 7, 8} <= set(paper.sweep.guidance)
    assert (paper.sweep.snapshot_num_steps, paper.sweep.snapshot_guidance, paper.sweep.solvers[0].name) == (50, 7.5, "ddim")
    assert [len(paper.train.all_snapshots(gflop)) for gflop in (53.0, 4195.1)] == [6, 13]
    assert tiny.family.widths == (8, 16, 24)
    assert tiny.train.num_images == 256
    assert tiny.train.prediction_type == paper.train.prediction_type


# --- protocol: offline ------------------------------------------------------------------------------------------------


def study_file(folder: Path, **changes: Any) -> Path:
    file = folder / "study.yaml"
    protocol = {"num_images": 64, "num_reference": 128, "features": ["inception", "clip-vit-b-32"], "metrics": ["frechet"]}
    file.write_text(yaml.safe_dump(plain_study(protocol=protocol, report={"metric": "fid"}, **changes)), encoding="utf-8")
    return file


def test_the_word_offline_takes_features_without_a_download_and_keeps_the_numbers_of_images(tmp_path: Path) -> None:
    file = study_file(tmp_path)
    assert load_study(file).report.metric == "fid"
    offline = load_study(file, {"protocol": "offline"})
    assert (offline.protocol.features, offline.protocol.metrics) == (("efficientnet-lite0",), ("mmd",))
    assert (offline.protocol.num_images, offline.protocol.num_reference) == (64, 128)
    assert offline.report.metric == "mmd_efficientnet"
    later = load_study(file, {"protocol": "offline", "protocol.metrics": ["mmd", "frechet"], "protocol.num_images": 99})
    assert (later.protocol.metrics, later.protocol.num_images) == (("mmd", "frechet"), 99)


def test_a_study_file_can_have_the_word(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({**plain_study(), "protocol": "offline"}), encoding="utf-8")
    assert load_study(file).protocol == ProtocolSpec()
    assert load_study(file, {"protocol.num_images": 99}).protocol.num_images == 99
    file.write_text(yaml.safe_dump({**plain_study(), "protocol": "online"}), encoding="utf-8")
    with pytest.raises(ConfigError, match="protocol = 'online': give a mapping, or one of the words offline"):
        load_study(file)


@pytest.mark.parametrize("name", ["hub", "paper"])
def test_studies_of_published_scores_lead_with_fid_and_have_an_offline_form(name: str) -> None:
    file = next(file for file in STUDIES if file.stem == name)
    study, offline = load_study(file), load_study(file, {"protocol": "offline"})
    assert study.report.metric == "fid"
    assert {"inception", "clip-vit-b-32", "dinov2-vit-l-14"} == set(study.protocol.features)
    assert {"frechet", "prompt_similarity"} <= set(study.protocol.metrics)
    assert offline.protocol.features == ("efficientnet-lite0",)
    assert offline.protocol.num_images == study.protocol.num_images >= 2 * 2048, "a Frechet distance of fewer images is flagged"


def test_the_word_keeps_what_a_scale_sets(tmp_path: Path) -> None:
    """A word on the command line replaces the features of a scale, not its numbers; a word in the file comes first."""
    paper = next(file for file in STUDIES if file.stem == "paper")
    tiny = load_study(paper, {"scale": "tiny", "protocol": "offline"}).protocol
    assert (tiny.num_images, tiny.num_reference, tiny.num_bootstrap) == (32, 64, 20)
    file = tmp_path / "study.yaml"
    scale = {"protocol.metrics": ["frechet"], "report.metric": "frechet_efficientnet"}
    file.write_text(yaml.safe_dump({**plain_study(), "protocol": "offline", "scales": {"other": scale}}), encoding="utf-8")
    assert load_study(file, {"scale": "other"}).report.metric == "frechet_efficientnet"
    load_study(file, {"protocol": "offline", "protocol.weights.inception": "file.pth"})
    assert load_study(file).protocol.weights == {}, "one study changes no other"
