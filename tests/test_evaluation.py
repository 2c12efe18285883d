"""Scores: from images in any order to intervals under a protocol, for a study's points and for folders of images."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from PIL import Image, ImageFilter
from torch import Tensor

from conftest import tiny_study
from isocost.config.data import ScenesSource
from isocost.config.evaluation import MIN_IMAGES, ProtocolSpec
from isocost.data.latent_cache import ImageDataset, load_images
from isocost.errors import ConfigError
from isocost.evaluation.evaluator import FeatureCollector, frechet_is_biased, score
from isocost.evaluation.feature_store import SampleFeatures
from isocost.evaluation.protocol import Protocol, make_protocol
from isocost.evaluation.reference_set import (
    ReferenceSet,
    fit_attribute_classifier,
    make_extractors,
    num_label_classes,
    read_features,
    require_labels,
    select_prompts,
    write_features,
)
from isocost.evaluation.score_folder import PRESETS, FolderScore, score_folder
from isocost.experiments.study_assets import StudyAssets
from isocost.metrics.attribute_classifier import AttributeClassifier, AttributeClassifierNetwork
from isocost.metrics.efficientnet import EfficientNetLite0
from isocost.metrics.extractor_base import FeatureExtractor
from isocost.metrics.frechet import frechet_distance
from isocost.metrics.mmd import squared_mmd
from isocost.metrics.registry import METRICS
from isocost.utils.artifact_store import Store

KERNEL = "mmd-efficientnet-64"
LITE = "efficientnet-lite0"
PLAIN = Protocol(
    num_images=100,
    num_reference=200,
    resolution=32,
    extractor="some-network/side=64",
    reference="0123456789abcdef",
    prompts="fedcba987654",
    alignment="none",
    num_bootstrap=50,
    seed=0,
)


class Thumbnail:
    """Features without a network: the mean colour of each of 16 tiles."""

    id = "thumbnail/4x4"
    width = 48

    def __call__(self, images: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)


def scenes(num: int, seed: int) -> ImageDataset:
    return load_images(ScenesSource(kind="scenes", num_images=num, seed=seed), 32, 0)


def reference_of(
    real: ImageDataset, extractor: FeatureExtractor, *, num_images: int, probe: AttributeClassifier | None = None
) -> ReferenceSet:
    spec = ProtocolSpec(num_images=num_images, num_bootstrap=60, seed=3)
    captions, labels = select_prompts(real, num_images)
    protocol = make_protocol(
        spec,
        resolution=32,
        extractor=extractor.id,
        reference=real.fingerprint(),
        num_reference=len(real),
        prompts=captions,
    )
    return ReferenceSet(protocol, {LITE: extractor}, {LITE: extractor(real.images).cpu().numpy()}, captions, labels, probe)


def measured_in(reference: ReferenceSet, images: Tensor, batches: list[list[int]]) -> SampleFeatures:
    measuring = FeatureCollector(reference)
    for ids in batches:
        measuring.add(ids, images[ids])
    return measuring.measured()


def blurred(images: Tensor, radius: float) -> Tensor:
    """Gaussian blur by Pillow."""
    opened = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy()]
    return torch.from_numpy(np.stack([image.filter(ImageFilter.GaussianBlur(radius)) for image in opened])).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def real() -> ImageDataset:
    return scenes(96, 1)


@pytest.fixture(scope="module")
def drawn() -> Tensor:
    """Images of the same distribution as `real`, none of them the same: uint8 [80, 3, 32, 32]."""
    return scenes(80, 0).images


@pytest.fixture(scope="module")
def reference(real: ImageDataset) -> ReferenceSet:
    """Real features, and a probe that nobody trained."""
    assert real.labels is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        probe = AttributeClassifier(AttributeClassifierNetwork(32, num_label_classes(real)))
    return reference_of(real, EfficientNetLite0(side=64), num_images=80, probe=probe)


@pytest.fixture(scope="module")
def thumbnails(real: ImageDataset) -> ReferenceSet:
    return reference_of(real, Thumbnail(), num_images=80)


# --- measuring --------------------------------------------------------------------------------------------------------


def test_order_and_batching_of_images_do_not_change_a_bit(reference: ReferenceSet, drawn: Tensor) -> None:
    mixed = np.random.default_rng(0).permutation(40).tolist()
    whole = measured_in(reference, drawn, [list(range(40))])
    assert whole.alignment is not None
    for batches in ([mixed[:1], mixed[1:30], mixed[30:]], [list(range(39, 19, -1)), list(range(20))]):
        again = measured_in(reference, drawn, batches)
        assert np.array_equal(again.features[LITE], whole.features[LITE])
        assert np.array_equal(again.alignment, whole.alignment)
        assert score(again, reference, ("mmd",)) == score(whole, reference, ("mmd",))


def test_what_is_measured_stands_in_the_order_of_image_ids(thumbnails: ReferenceSet, drawn: Tensor) -> None:
    whole = measured_in(thumbnails, drawn, [[5, 79, 0], [33]])
    assert whole.features[LITE].shape == (4, 48)
    assert whole.features[LITE].dtype == np.float32
    assert np.array_equal(whole.features[LITE], Thumbnail()(drawn[[0, 5, 33, 79]]).numpy())
    assert whole.alignment is None


def test_a_images_alignment_is_with_the_labels_of_its_own_id(reference: ReferenceSet, drawn: Tensor) -> None:
    assert reference.probe is not None
    assert reference.labels is not None
    found = measured_in(reference, drawn, [[70, 2], [11]]).alignment
    assert found is not None
    ids = [2, 11, 70]
    expected = (reference.probe.predict(drawn[ids]) == reference.labels[ids]).double().mean(1)
    np.testing.assert_allclose(found, expected)


# --- score ------------------------------------------------------------------------------------------------------------


def test_scores_are_the_asked_for_distances_under_their_names(thumbnails: ReferenceSet, drawn: Tensor) -> None:
    measured = measured_in(thumbnails, drawn, [list(range(80))])
    assert set(score(measured, thumbnails, ("mmd",))) == {"mmd_efficientnet"}
    both = score(measured, thumbnails, ("mmd", "frechet"))
    assert set(both) == {"mmd_efficientnet", "frechet_efficientnet"} <= set(METRICS)
    assert both["mmd_efficientnet"].value == pytest.approx(
        squared_mmd(measured.features[LITE], thumbnails.features[LITE]), rel=1e-9
    )
    assert both["frechet_efficientnet"].value == pytest.approx(
        frechet_distance(measured.features[LITE], thumbnails.features[LITE]), rel=1e-9
    )
    for interval in both.values():
        assert interval.low < interval.value < interval.high
        assert interval.confidence == 0.95


def test_the_score_of_alignment_is_the_mean_over_images(reference: ReferenceSet, drawn: Tensor) -> None:
    measured = measured_in(reference, drawn, [list(range(40))])
    assert measured.alignment is not None
    alignment = score(measured, reference, ())["alignment"]
    assert alignment.value == pytest.approx(measured.alignment.mean(), rel=1e-12)
    assert 0 <= alignment.low < alignment.value < alignment.high <= 1


def test_the_protocols_seed_and_resamples_decide_the_interval(thumbnails: ReferenceSet, drawn: Tensor) -> None:
    def ends(**changes: int) -> tuple[float, float, float]:
        changed = dataclasses.replace(thumbnails, protocol=dataclasses.replace(thumbnails.protocol, **changes))
        with_metric = score(measured_in(changed, drawn, [list(range(80))]), changed, ("mmd",))["mmd_efficientnet"]
        return with_metric.value, with_metric.low, with_metric.high

    value, low, high = ends()
    assert ends() == (value, low, high)
    for other in (ends(seed=4), ends(num_bootstrap=61)):
        assert other[0] == value
        assert other[1:] != (low, high)


def test_the_references_own_distribution_scores_near_zero_and_blur_scores_worse(reference: ReferenceSet, drawn: Tensor) -> None:
    with_metric = []
    for radius in (0, 0.7, 1, 1.5):
        images = blurred(drawn, radius) if radius else drawn
        with_metric.append(
            score(SampleFeatures({LITE: reference.extractors[LITE](images).numpy()}), reference, ("mmd", "frechet"))
        )
    kernels = [one["mmd_efficientnet"] for one in with_metric]
    assert kernels[0].low < 0 < kernels[0].high
    for metric in ("mmd_efficientnet", "frechet_efficientnet"):
        better, worse = [one[metric] for one in with_metric[:-1]], [one[metric] for one in with_metric[1:]]
        assert all(a.value < b.value for a, b in zip(better, worse, strict=True)), metric
        assert better[0].high < worse[-1].low
    assert abs(kernels[0].value) < 0.05 * kernels[-1].value


@pytest.mark.parametrize(("num_images", "has_too_few_samples"), [(2, True), (2559, True), (2560, False), (50_000, False)])
def test_a_frechet_distance_from_too_few_images_is_flagged(num_images: int, has_too_few_samples: bool) -> None:
    assert frechet_is_biased(num_images, 1280) is has_too_few_samples


# --- protocol ---------------------------------------------------------------------------------------------------------


def test_a_protocols_id_is_the_hash_of_its_fields() -> None:
    fields = {name: value for name, value in dataclasses.asdict(PLAIN).items() if name != "inputs"}
    assert PLAIN.inputs == ""  # a field that came later, and enters where it says something
    plain = json.dumps([fields], sort_keys=True, separators=(",", ":"))
    assert PLAIN.id == hashlib.sha256(plain.encode()).hexdigest()[:12]


def test_a_protocols_id_is_the_one_in_results_databases() -> None:
    assert PLAIN.id == "8a5a21e457f4"


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Protocol)])
def test_a_protocols_id_changes_with_each_field(name: str) -> None:
    value = getattr(PLAIN, name)
    changed = dataclasses.replace(PLAIN, **{name: value + 1 if isinstance(value, int) else f"{value}'"})
    assert changed.id != PLAIN.id
    assert dataclasses.replace(changed, **{name: value}).id == PLAIN.id


def make(spec: ProtocolSpec | None = None, **changes: object) -> Protocol:
    made = {"resolution": 32, "extractor": "e", "reference": "r", "num_reference": 9, "prompts": ["a cat", "été"], **changes}
    return make_protocol(spec or ProtocolSpec(num_images=32), **made)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"resolution": 64},
        {"extractor": "f"},
        {"reference": "s"},
        {"num_reference": 10},
        {"prompts": ["a cat", "ete"]},
        {"prompts": ["été", "a cat"]},
        {"prompts": ["a cat"]},
        {"prompts": ["a", " catété"]},
        {"spec": ProtocolSpec(num_images=33)},
        {"spec": ProtocolSpec(num_images=32, num_bootstrap=201)},
        {"spec": ProtocolSpec(num_images=32, seed=1)},
        {"spec": ProtocolSpec(num_images=32, alignment="class")},
    ],
    ids=str,
)
def test_each_ingredient_makes_another_protocol(changes: dict[str, object]) -> None:
    assert make(**changes).id != make().id  # type: ignore[arg-type]


def test_further_distances_leave_the_protocol_as_it_is() -> None:
    assert make(ProtocolSpec(num_images=32, metrics=("mmd", "frechet"))).id == make().id


def test_a_probe_from_other_images_makes_another_protocol(tmp_path: Path, drawn: Tensor) -> None:
    def reference_with(seed: int) -> ReferenceSet:
        parts = {"train": {"kind": "scenes", "num_images": 192, "seed": seed}}
        parts["reference"] = {"kind": "scenes", "num_images": 64, "seed": 1}
        return StudyAssets(tiny_study(data={"resolution": 32, **parts}), Store(tmp_path)).reference

    one, other = reference_with(0), reference_with(5)
    alignments = [measured_in(reference, drawn, [list(range(32))]).alignment for reference in (one, other)]
    assert not np.array_equal(*alignments)
    assert one.protocol.id != other.protocol.id


def test_a_protocol_can_be_told_in_words() -> None:
    sentence = PLAIN.sentence()
    for part in ("100 images", "32 x 32", "200 reference", PLAIN.reference, PLAIN.prompts, PLAIN.extractor, "50 bootstrap"):
        assert part in sentence


# --- reference --------------------------------------------------------------------------------------------------------


def captioned(num: int, labels: Tensor | None = None) -> ImageDataset:
    captions = [(f"first {number}", f"second {number}") for number in range(num)]
    return ImageDataset(
        torch.zeros(num, 3, 32, 32, dtype=torch.uint8), captions, [str(number) for number in range(num)], labels
    )


def test_the_captions_to_draw_are_the_first_of_each_image() -> None:
    labels = torch.arange(10).reshape(5, 2)
    captions, drawn_labels = select_prompts(captioned(5, labels), 3)
    assert captions == ["first 0", "first 1", "first 2"]
    assert drawn_labels is not None
    assert torch.equal(drawn_labels, labels[:3])
    everything, nothing = select_prompts(captioned(5), 5)
    assert len(everything) == 5
    assert nothing is None


def test_more_images_than_captions_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"protocol\.num_images=6 exceeds the 5 captions"):
        select_prompts(captioned(5), 6)


def test_a_study_with_too_few_reference_images_is_refused(tmp_path: Path) -> None:
    few = {"kind": "scenes", "num_images": MIN_IMAGES - 1, "seed": 1}
    study = tiny_study(data={"resolution": 32, "train": {**few, "seed": 0}, "reference": few})
    with pytest.raises(ConfigError, match=r"data\.reference: 31 images.*at least 32"):
        _ = StudyAssets(study, Store(tmp_path)).reference


def test_alignment_without_labels_is_refused() -> None:
    labelled, bare = captioned(4, torch.zeros(4, 1, dtype=torch.int64)), captioned(4)
    require_labels(labelled, labelled)
    for pair in ((labelled, bare), (bare, labelled)):
        with pytest.raises(ConfigError, match="label_column"):
            require_labels(*pair)


def test_features_survive_a_folder(tmp_path: Path, drawn: Tensor) -> None:
    write_features(tmp_path, Thumbnail(), drawn)
    assert np.array_equal(read_features(tmp_path), Thumbnail()(drawn).numpy())


def test_the_extractor_of_a_study_sees_its_feature_side() -> None:
    (extractor,) = make_extractors(ProtocolSpec(feature_size=96)).values()
    assert extractor.id == EfficientNetLite0(side=96).id


def test_a_probe_is_trained_kept_and_judged_on_images_held_out(tmp_path: Path) -> None:
    def shaded(num: int, seed: int) -> ImageDataset:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 3, (num, 1), generator=generator)
        noise = torch.randint(-20, 21, (num, 3, 32, 32), generator=generator)
        images = (60 + 70 * labels[:, :, None, None] + noise).to(torch.uint8)
        return dataclasses.replace(captioned(num, labels), images=images)

    train, held_out = shaded(768, 0), shaded(60, 1)
    held_out.labels[:15] = (held_out.labels[:15] + 1) % 3  # type: ignore[index]
    assert num_label_classes(train) == (3,)
    manifest = fit_attribute_classifier(tmp_path, train, held_out, (3,), seed=0)
    assert manifest == {"accuracy": 0.75, "accuracy_by_head": [0.75], "held_out": 60}
    assert AttributeClassifier.load(tmp_path).accuracy(held_out.images, held_out.labels).tolist() == [0.75]  # type: ignore[arg-type]


# --- folders ----------------------------------------------------------------------------------------------------------


def save_images(folder: Path, images: Tensor, name: Callable[[int], str] = "{:04d}.png".format) -> Path:
    for number, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        file = folder / name(number)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, real: ImageDataset, drawn: Tensor) -> Path:
    """`real` and `drawn` of one distribution, `noise`, and `few`, one image short of enough."""
    root = tmp_path_factory.mktemp("images")
    save_images(root / "real", real.images[:64])
    save_images(root / "drawn", drawn[:64])
    noise = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_images(root / "noise", noise)
    save_images(root / "few", drawn[: MIN_IMAGES - 1])
    return root


@pytest.fixture(scope="module")
def plain_score(folders: Path) -> FolderScore:
    return score_folder(folders / "drawn", folders / "real", KERNEL)


def kernel_value(found: FolderScore) -> float:
    return found.scores["mmd_efficientnet"].value


def test_a_folder_of_the_same_distribution_scores_near_zero_and_noise_does_not(folders: Path, plain_score: FolderScore) -> None:
    alike = plain_score.scores["mmd_efficientnet"]
    noise = score_folder(folders / "noise", folders / "real", KERNEL)
    assert alike.low < 0 < alike.high
    assert noise.scores["mmd_efficientnet"].low > 3 * alike.high
    assert (plain_score.num_images, plain_score.num_reference, noise.num_images) == (64, 64, 32)


def test_a_folders_score_is_the_distance_of_its_images_features(
    plain_score: FolderScore, real: ImageDataset, drawn: Tensor
) -> None:
    extractor = EfficientNetLite0(side=64)
    expected = squared_mmd(extractor(drawn[:64]).numpy(), extractor(real.images[:64]).numpy())
    assert kernel_value(plain_score) == pytest.approx(expected, rel=1e-9)
    assert plain_score.extractor == extractor.id
    assert set(plain_score.scores) == {"mmd_efficientnet"}
    assert plain_score.notes == ()


def test_a_frechet_protocol_adds_its_distance_and_says_from_how_few(folders: Path) -> None:
    found = score_folder(folders / "noise", folders / "real", "frechet-efficientnet-64")
    assert set(found.scores) == {"mmd_efficientnet", "frechet_efficientnet"}
    assert found.scores["frechet_efficientnet"].low > 0
    (note,) = found.notes
    assert "32 images" in note
    assert "1280" in note


@pytest.mark.parametrize("name", [name for name in PRESETS if "efficientnet" in name])
def test_a_protocols_name_tells_its_distance_and_side(name: str) -> None:
    distance, _, side = name.split("-")
    spec = PRESETS[name].spec
    assert spec.feature_size == int(side)
    assert spec.metrics == (("mmd", "frechet") if distance == "frechet" else ("mmd",))


def test_where_and_how_images_lie_does_not_matter(
    tmp_path: Path, folders: Path, drawn: Tensor, plain_score: FolderScore
) -> None:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    endings = ("png", "PNG", "bmp", "webp")
    save_images(tmp_path, drawn[:64][order], lambda number: f"part {number % 3}/deep/{number}.{endings[number % 3]}")
    (tmp_path / "part 0" / "captions.txt").write_text("no image")
    (tmp_path / "part 1" / "notes.json").write_text("{}")
    found = score_folder(tmp_path, folders / "real", KERNEL)
    assert found.num_images == 64
    assert kernel_value(found) == pytest.approx(kernel_value(plain_score), rel=1e-4)


def test_images_of_any_shape_and_mode_are_their_centre_squares(tmp_path: Path, folders: Path, drawn: Tensor) -> None:
    wild, squares = tmp_path / "wild", tmp_path / "squares"
    wild.mkdir()
    squares.mkdir()
    shapes = [(48, 40)] * 32 + [(40, 64), (32, 32)]
    for number, (image, shape) in enumerate(zip(drawn[:34].permute(0, 2, 3, 1).numpy(), shapes, strict=True)):
        image = Image.fromarray(image).resize(shape).convert("L" if number % 4 == 3 else "RGB")
        image.save(wild / f"{number:03d}.png")
        side = min(shape)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image.convert("RGB").crop((left, top, left + side, top + side)).save(squares / f"{number:03d}.png")
    found, expected = (score_folder(folder, folders / "real", KERNEL) for folder in (wild, squares))
    assert found == expected


def test_the_name_of_a_folders_protocol_follows_what_decides_its_numbers(folders: Path, plain_score: FolderScore) -> None:
    assert plain_score.protocol.startswith(f"{KERNEL}:")
    own = score_folder(folders / "real", folders / "real", KERNEL)
    assert own.protocol == plain_score.protocol
    others = [
        score_folder(folders / "noise", folders / "real", KERNEL),
        score_folder(folders / "drawn", folders / "noise", KERNEL),
        score_folder(folders / "noise", folders / "real", "frechet-efficientnet-64"),
    ]
    assert len({plain_score.protocol, *(other.protocol for other in others)}) == 4


@pytest.mark.parametrize("absent", ["images", "reference"])
def test_a_missing_folder_is_refused(folders: Path, absent: str) -> None:
    asked = {"images": folders / "noise", "reference": folders / "noise", absent: folders / "nowhere"}
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        score_folder(asked["images"], asked["reference"], KERNEL)


@pytest.mark.parametrize("short", ["images", "reference"])
def test_too_few_images_are_refused(folders: Path, short: str) -> None:
    asked = {"images": folders / "noise", "reference": folders / "noise", short: folders / "few"}
    with pytest.raises(ConfigError, match=r"few: 31 images.*at least 32"):
        score_folder(asked["images"], asked["reference"], KERNEL)


def test_an_unknown_protocol_is_refused_with_the_known_ones(folders: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        score_folder(folders / "noise", folders / "real", "fid")
    assert "'fid'" in str(refused.value)
    assert all(name in str(refused.value) for name in PRESETS)


@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_a_image_that_cannot_be_read_is_named(tmp_path: Path, folders: Path, drawn: Tensor, damage: str) -> None:
    save_images(tmp_path, drawn[:MIN_IMAGES])
    file = tmp_path / "0007.png"
    whole = file.read_bytes()
    file.write_bytes({"empty": b"", "text": b"not an image", "cut": whole[: len(whole) // 2]}[damage])
    with pytest.raises(ConfigError, match=r"0007\.png: cannot be read") as refused:
        score_folder(tmp_path, folders / "real", KERNEL)
    assert "\n" not in str(refused.value)


# --- features as the reference ----------------------------------------------------------------------------------------


def test_features_that_a_study_kept_score_as_the_images_they_were_made_from(tmp_path: Path, folders: Path) -> None:
    study = tiny_study(protocol={"num_images": 32, "num_reference": 40, "num_bootstrap": 20})
    assets = StudyAssets(study, Store(tmp_path / "out"))
    assert assets.reference.features[LITE].shape == (40, 1280)
    (kept,) = (tmp_path / "out" / "artefacts" / "features").iterdir()
    save_images(tmp_path / "images", assets.images("reference").images[:40])
    by_images = score_folder(folders / "noise", tmp_path / "images", KERNEL)
    by_features = score_folder(folders / "noise", kept, KERNEL)
    assert by_features.scores == by_images.scores
    assert by_features.num_reference == by_images.num_reference == 40
    assert score_folder(folders / "noise", kept / "features.safetensors", KERNEL) == by_features


def test_features_of_another_extractor_are_refused(tmp_path: Path, folders: Path, drawn: Tensor) -> None:
    store, extractor = Store(tmp_path), EfficientNetLite0(side=32)
    with store.create("features", "small", {"extractor": extractor.id}) as folder:
        write_features(folder, extractor, drawn[:32])
    with pytest.raises(ConfigError, match=r"another extractor.*side=32.*side=64"):
        score_folder(folders / "noise", store.folder("features", "small"), KERNEL)


def test_features_of_unknown_making_are_refused(tmp_path: Path, folders: Path, drawn: Tensor) -> None:
    write_features(tmp_path, EfficientNetLite0(side=64), drawn[:32])
    with pytest.raises(ConfigError, match="another extractor"):
        score_folder(folders / "noise", tmp_path, KERNEL)
